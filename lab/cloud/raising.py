"""The cloud's own process: raises the network, starts Lifeboat on it, waits, stops it.

Whatever is left when it ends (switches, QEMUs) goes with the namespaces.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from typing import Any, NoReturn, Optional

from mininet.log import setLogLevel

from . import configs
from .model import Scenario
from .network import Cloud
from .ovs import datapath_type
from .services import Services
from .shell import CommandFailed
from .state import RUN, UP, LabError, State


class Stop(BaseException):
    """Somebody asked the cloud to end."""


def raise_cloud(options: dict[str, Any]) -> int:
    """The whole life of a cloud; returns the exit code of lab/up."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _on_signal)
    services: Optional[Services] = None
    try:
        cloud = _network(options)
        services = Services(cloud, options["binaries"])
        if not options["network_only"]:
            services.start_all()
        return _stay(options["command"], options["cwd"], services)
    except Stop:
        return 0 if not options["command"] else 130
    except (CommandFailed, LabError) as error:
        print(f"lab/up: {error}", file=sys.stderr)
        return 1
    except Exception:  # pylint: disable=broad-except
        traceback.print_exc()  # a fault of the lab itself: say all there is
        return 1
    finally:
        _ignore_signals()
        if services is not None:
            services.stop_all()


def _network(options: dict[str, Any]) -> Cloud:
    setLogLevel("warning")
    begin = time.monotonic()
    scenario = Scenario.load(RUN / "scenario.json")
    os.environ.update({"OVS_RUNDIR": str(RUN / "fabric"), "OVS_LOGDIR": str(RUN / "fabric")})
    cloud = Cloud(scenario, RUN, datapath_type())
    cloud.raise_all()
    configs.write_all(cloud)
    nodes = [*(host.name for host in scenario.hosts), "client"]
    pids = {name: cloud.node(name).pid for name in nodes}
    State(scenario=scenario.name, nodes=pids, binaries=options["binaries"]).save()
    os.write(options["up_fd"], UP)
    os.close(options["up_fd"])
    kind = {"netdev": "userspace", "system": "kernel"}[cloud.datapath]
    print(f"lab/up: {scenario.name} is up after {time.monotonic() - begin:.1f} s: "
          f"{len(scenario.switches)} switches, {len(scenario.hosts)} hosts, {kind} datapath",
          flush=True)
    return cloud


def _stay(command: Optional[list[str]], cwd: str, services: Services) -> int:
    if command is None:
        print("lab/up: enter it with lab/exec [NODE] CMD; Ctrl-C or lab/down ends it", flush=True)
        while True:
            signal.pause()
    running = subprocess.Popen(command, cwd=cwd, env=services.env, preexec_fn=_default_signals)
    try:
        return _exit_code(running.wait())
    except Stop:
        running.terminate()
        try:
            running.wait(timeout=15)
        except subprocess.TimeoutExpired:
            running.kill()
        raise


def _exit_code(code: int) -> int:
    return code if code >= 0 else 128 - code


def _on_signal(_number: int, _frame: object) -> NoReturn:
    _ignore_signals()  # asked once is enough: the end must not be interrupted
    raise Stop


def _ignore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _default_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
