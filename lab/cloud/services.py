"""Lifeboat's own processes in the cloud: one agent per host, one for the
fabric, one controller.

They are started in their nodes' namespaces with their output in run/NODE/*.log, and stopped by
their pids. QEMUs are the agents' business.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Optional

from . import configs
from .network import Cloud
from .shell import in_node, run
from .state import RUN, State, lifeboat_env

STOP_SECONDS = 3
READY_SECONDS = 30


class Services:
    """The processes that this lab started."""

    def __init__(self, cloud: Cloud, binaries: str) -> None:
        self.cloud = cloud
        self.binaries = Path(binaries)
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.env = {
            **os.environ,
            "PATH": f"{binaries}:{os.environ['PATH']}",
            **lifeboat_env(),
        }

    def start_all(self) -> None:
        """Certificates, the agents, then the controller that connects to them."""
        run(str(self.binaries / "lifeboat"), *configs.certs_arguments(self.cloud))
        for host in self.cloud.scenario.hosts:
            self._agent(host.name, self.cloud.node(host.name).pid)
        self._agent(configs.FABRIC, None)
        self._start("controller", None, RUN / "controller.log",
                    "lifeboat", "controller", "--config", str(RUN / "lab.toml"))
        state = State.load()
        state.services = {name: process.pid for name, process in self.running.items()}
        state.save()
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        """Until the controller knows every host and switch: a command given at once shall find
        them. A cloud where that takes too long is raised all the same, and says so."""
        deadline = time.monotonic() + READY_SECONDS
        while (missing := self._not_connected()) and time.monotonic() < deadline:
            time.sleep(0.2)
        if missing:
            print(f"lab/up: not connected after {READY_SECONDS} s: {missing}; see "
                  f"{RUN / 'controller.log'}", file=sys.stderr)

    def _not_connected(self) -> str:
        asked = subprocess.run([str(self.binaries / "lifeboat"), "hosts", "--json"], env=self.env,
                               stdin=subprocess.DEVNULL, capture_output=True, text=True,
                               check=False)
        if asked.returncode != 0:
            return "the controller"
        keys = ("connected", "ovsdb_connected", "openflow_connected")
        return ", ".join(host["name"] for host in json.loads(asked.stdout)["hosts"]
                         if not all(host[key] for key in keys))

    def _agent(self, name: str, pid: Optional[int]) -> None:
        config, log = RUN / name / "agent.toml", RUN / name / "agent.log"
        self._start(f"agent-{name}", pid, log, "lifeboat-agent", "--config", str(config))

    def _start(self, name: str, pid: Optional[int], log: Path, binary: str, *args: str) -> None:
        command = in_node(pid, [str(self.binaries / binary), *args])
        with open(log, "ab") as out:
            self.running[name] = subprocess.Popen(
                command, env=self.env, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                # Ctrl-C is for the lab, which then stops them in order.
                start_new_session=True,
            )

    def stop_all(self) -> None:
        """Asks all of them to end, then makes them."""
        for process in self.running.values():
            if process.poll() is None:
                process.terminate()
        for name, process in self.running.items():
            try:
                process.wait(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                print(f"lab/up: {name} did not end when asked to", file=sys.stderr)
                process.kill()
