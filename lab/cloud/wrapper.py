"""lab/up from the outside: everything that must be done on the machine itself.

It checks the scenario, raises one kernel parameter for the few seconds in which the switches
start, and starts the rest in namespaces of its own, so that interfaces, processes and mounts
vanish with it however it ends:

 - told to stop (Ctrl-C, SIGTERM, lab/down): it passes that on, and the inside ends in order;
 - killed: `unshare` gets SIGKILL from the kernel (parent-death signal) and takes process 1 of
   the namespaces with it (--kill-child), and the kernel ends everything in there.

The kernel parameter: ovs-vswitchd sends for all its ports through one socket, whose buffer is
net.core.wmem_default when it is opened. One full queue would stop all other ports. It belongs to
the machine, not to a namespace; the sockets keep what they got.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any, Optional, Sequence

from . import state
from .state import LAB, ROOT, RUN, UP, LabError

WMEM = Path("/proc/sys/net/core/wmem_default")
WMEM_WANTED = 16 * 1024 * 1024
PR_SET_PDEATHSIG = 1
TOOLS = ("unshare", "nsenter", "mnexec", "ovs-vswitchd", "ovsdb-tool", "ip", "tc", "ethtool",
         "ping", "sysctl")


def _check_way() -> None:
    """The guests' QEMUs run as a user without rights, who has to reach this checkout."""
    for folder in (LAB, *LAB.parents):
        if not folder.stat().st_mode & stat.S_IXOTH:
            raise LabError(f"the guests run as `nobody`, who cannot pass through {folder}: move the "
                           f"checkout elsewhere, for instance to /opt, or `chmod o+x {folder}`")


def main() -> int:
    """lab/up."""
    args = _arguments()
    try:
        return _up(args)
    except LabError as error:
        print(f"lab/up: {error}", file=sys.stderr)
        return 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lab/up",
        description="Raises a cloud on this machine and keeps it until Ctrl-C.",
    )
    parser.add_argument("scenario", nargs="?", default=str(LAB / "scenarios/two-racks.toml"),
                        help="scenario file (default: lab/scenarios/two-racks.toml)")
    parser.add_argument("--binaries", type=Path, metavar="DIR",
                        help="where lifeboat, lifeboat-agent and lifeboat-lab are "
                             "(default: target/release or target/debug, the newer one)")
    parser.add_argument("--network-only", action="store_true",
                        help="start no controller and no agents")
    parser.add_argument("--exec", nargs=argparse.REMAINDER, metavar="CMD", dest="command",
                        help="run CMD in the cloud, then tear down and end with its exit code")
    return parser.parse_args()


def _up(args: argparse.Namespace) -> int:
    if os.geteuid() != 0:
        raise LabError("needs root (it makes network namespaces): run it as root")
    lock = state.Lock()
    if not lock.take():
        if args.command:
            raise LabError("a cloud is up already; run your command with lab/exec, or lab/down first")
        print(f"lab/up: a cloud is up already (process {state.read_pid('wrapper.pid')})")
        return 0
    _check_tools()
    _check_way()
    _restore_wmem()
    state.clear_run()
    (RUN / "wrapper.pid").write_text(str(os.getpid()))
    binaries = _binaries(args.binaries, args.network_only)
    _write_scenario(binaries, args.scenario)
    options = {
        "binaries": str(binaries),
        "network_only": args.network_only,
        "command": args.command,
        "cwd": os.getcwd(),
    }
    try:
        return _run_inside(options)
    finally:
        _restore_wmem()
        for name in ("wrapper.pid", "init.pid", "state.json"):
            (RUN / name).unlink(missing_ok=True)
        lock.release()


def _check_tools() -> None:
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    os.environ["PATH"] = path
    missing = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    if missing:
        raise LabError(f"{', '.join(missing)} missing: run lab/install first")


def _binaries(given: Optional[Path], network_only: bool) -> Path:
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    folders = [given.resolve()] if given else [target / "release", target / "debug"]
    wanted = ["lifeboat-lab"] if network_only else [
        "lifeboat-lab", "lifeboat-agent", "lifeboat-disk", "lifeboat"]
    there = [folder for folder in folders if all((folder / name).exists() for name in wanted)]
    if not there:
        raise LabError(f"{', '.join(wanted)}: not all in {' or '.join(map(str, folders))}. Build "
                       "them (cargo build --bins), or raise the network alone (--network-only)")
    return max(there, key=lambda folder: (folder / wanted[-1]).stat().st_mtime)


def _write_scenario(binaries: Path, scenario: str) -> None:
    checked = subprocess.run([binaries / "lifeboat-lab", scenario], capture_output=True, text=True,
                             check=False)
    if checked.returncode != 0:
        raise LabError(checked.stderr.strip().removeprefix("lifeboat-lab: "))
    (RUN / "scenario.json").write_text(checked.stdout)


def _run_inside(options: dict[str, Any]) -> int:
    read_end, write_end = os.pipe()
    options["up_fd"] = write_end
    inside = subprocess.Popen(
        ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--",
         sys.executable, "-B", "-m", "cloud.inside", json.dumps(options)],
        cwd=LAB, pass_fds=[write_end], preexec_fn=_die_with_parent,
    )
    os.close(write_end)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: _pass_on(inside.pid, number))
    _raise_wmem()
    with os.fdopen(read_end, "rb") as up:
        first = _child_of(inside.pid)
        if first is not None:
            (RUN / "init.pid").write_text(str(first))
        up.read(len(UP))  # returns when the network is up, or when the inside has ended
    _restore_wmem()
    return _exit_code(inside.wait())


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _child_of(pid: int) -> Optional[int]:
    """The process that unshare forks, looked for until it is there or unshare has ended."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    for _ in range(10_000):
        try:
            children = path.read_text().split()
        except FileNotFoundError:
            return None
        if children:
            return int(children[0])
        signal.sigtimedwait([], 0.001)
    return None


def _pass_on(unshare: int, number: int) -> None:
    """unshare itself ignores SIGINT and SIGTERM; process 1 of the namespaces must hear them."""
    child = _child_of(unshare)
    if child is not None:
        os.kill(child, signal.SIGTERM if number == signal.SIGHUP else number)


def _exit_code(code: int) -> int:
    return code if code >= 0 else 128 - code


def _raise_wmem() -> None:
    before = int(WMEM.read_text())
    if before < WMEM_WANTED:
        (RUN / "wmem_default").write_text(str(before))
        WMEM.write_text(str(WMEM_WANTED))


def _restore_wmem() -> None:
    """Also after a lab/up that was killed while the parameter was raised."""
    kept = RUN / "wmem_default"
    if kept.exists():
        WMEM.write_text(kept.read_text())
        kept.unlink()


def down() -> int:
    """lab/down: stops the cloud if one is up."""
    if os.geteuid() != 0:
        print("lab/down: needs root", file=sys.stderr)
        return 1
    for number, seconds in ((signal.SIGTERM, 20), (signal.SIGKILL, 5)):
        pid = state.read_pid("wrapper.pid")
        if not state.is_up():
            _restore_wmem()
            return 0
        if pid is not None:
            os.kill(pid, number)
        for _ in range(seconds * 10):
            if not state.is_up():
                break
            signal.sigtimedwait([], 0.1)
    if state.is_up():
        print("lab/down: the cloud does not stop", file=sys.stderr)
        return 1
    _restore_wmem()
    return 0


def execute(argv: Sequence[str]) -> int:
    """lab/exec [NODE] CMD: becomes CMD inside the running cloud."""
    try:
        words = _entering(list(argv))
    except LabError as error:
        print(f"lab/exec: {error}", file=sys.stderr)
        return 1
    os.execvp(words[0], words)


def _entering(argv: list[str]) -> list[str]:
    running = state.State.load()
    init = state.read_pid("init.pid")
    if init is None or not state.is_up():
        raise LabError("no cloud is up: start one with lab/up")
    node = argv.pop(0) if argv and argv[0] in running.nodes else None
    if not argv:
        raise LabError(f"usage: lab/exec [NODE] CMD...; nodes: {' '.join(running.nodes)}")
    ovs = RUN / (f"{node}/ovs" if node and (RUN / node / "ovs").exists() else "fabric")
    env = [f"{key}={ovs}" for key in ("OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR", "OVS_SYSCONFDIR")]
    env += [f"{key}={value}" for key, value in state.lifeboat_env().items()]
    path = f"PATH={running.binaries}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    enter = ["nsenter", "-t", str(init), "-n", "-m", "-p", f"--wdns={os.getcwd()}", "--"]
    attach = ["mnexec", "-a", str(running.nodes[node])] if node else []
    return [*enter, *attach, "env", *env, path, *argv]
