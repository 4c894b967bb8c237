"""The cloud that a demo stands on: lab/up as a process of its own, and Lifeboat's commands to it.

lab/up is started in a session of its own, so that Ctrl-C is the demo's to handle, and gets
SIGTERM from the kernel should the demo be killed: nothing stays behind, however it ends. Only
with --keep it stays, and the next demo takes it down first.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Optional, Sequence

from cloud import state
from cloud.state import LAB, RUN, LabError

OUT = LAB / "out"
KEPT = RUN / "kept-by-demo"
UP_SECONDS = 90
STOP_SECONDS = 40
PR_SET_PDEATHSIG = 1


class Standing:
    """A cloud that is up, or about to be."""

    def __init__(self, binaries: Path, keep: bool) -> None:
        self.binaries = binaries
        self.keep = keep
        self.process: Optional[subprocess.Popen[bytes]] = None
        self.env = {**os.environ, **state.lifeboat_env()}

    def raise_it(self, scenario: str) -> None:
        """Starts lab/up and returns when everything in it has been started."""
        _make_room()
        OUT.mkdir(exist_ok=True)
        log = OUT / "demo-up.log"
        with open(log, "wb") as out:
            self.process = subprocess.Popen(
                [LAB / "up", scenario, "--binaries", self.binaries],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
                preexec_fn=None if self.keep else _end_with_parent,
            )
        deadline = time.monotonic() + UP_SECONDS
        while "enter it with lab/exec" not in log.read_text():
            if self.process.poll() is not None:
                raise LabError(f"the cloud did not come up:\n{log.read_text().strip()}")
            if time.monotonic() > deadline:
                raise LabError(f"the cloud is not up after {UP_SECONDS} s; see {log}")
            time.sleep(0.1)

    def end(self) -> None:
        """Takes it down, or leaves it as asked. Safe to call whatever has happened before."""
        if self.process is None or self.process.poll() is not None:
            return
        if self.keep:
            KEPT.write_text(str(self.process.pid))
            return
        self.process.terminate()
        try:
            self.process.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def lifeboat(self, *words: str) -> str:
        """What one of Lifeboat's commands prints; LabError with its own words if it fails."""
        done = subprocess.run([self.binaries / "lifeboat", *words], env=self.env, text=True,
                              capture_output=True, stdin=subprocess.DEVNULL, check=False)
        if done.returncode != 0:
            raise LabError(f"`lifeboat {' '.join(words)}` ended with {done.returncode}: "
                           f"{done.stderr.strip()}")
        return done.stdout

    def ask(self, *words: str) -> Any:
        """The reply of one of Lifeboat's commands."""
        return json.loads(self.lifeboat("--json", *words))

    def not_connected(self) -> str:
        """Which hosts the controller cannot use yet, as a sentence; empty when it can use all."""
        try:
            hosts = self.ask("hosts")["hosts"]
        except LabError as error:
            return str(error)  # its socket is not there at once
        keys = ("connected", "ovsdb_connected", "openflow_connected")
        missing = [host["name"] for host in hosts if not all(host[key] for key in keys)]
        where = "; see lab/run/controller.log"
        return f"{', '.join(missing)} not connected{where}" if missing else ""

    def show(self, *words: str) -> int:
        """Runs one of Lifeboat's commands on this very terminal; its exit code."""
        return subprocess.run([self.binaries / "lifeboat", *words], env=self.env,
                              stdin=subprocess.DEVNULL, check=False).returncode

    def look(self) -> Any:
        """What is on every node (look.py)."""
        command = ["/usr/bin/python3", "-B", "-m", "demonstration.look"]
        done = subprocess.run([LAB / "exec", *command], cwd=LAB, text=True, capture_output=True,
                              check=False)
        if done.returncode != 0:
            raise LabError(f"cannot look at the cloud: {done.stderr.strip()}")
        return json.loads(done.stdout)

    def on(self, node: Optional[str], words: Sequence[str], **how: Any) -> subprocess.Popen[bytes]:
        """Starts a program on a node (None: beside the controller); it ends with the cloud."""
        where = [] if node is None else [node]
        return subprocess.Popen([str(LAB / "exec"), *where, *words], stdin=subprocess.DEVNULL, **how)


def end_inside(process: subprocess.Popen[bytes]) -> None:
    """Ends what `Standing.on` has started: nsenter stands between, so the signal goes to its child."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children or [process.pid]:
        os.kill(int(child), signal.SIGTERM)
    process.wait(timeout=10)


def _make_room() -> None:
    """Takes down what an earlier demo kept; anybody else's cloud is not ours to end."""
    if not state.is_up():
        return
    if not KEPT.exists():
        raise LabError("a cloud is up already, and not by lab/demo: end it with lab/down, then "
                       "run lab/demo again")
    print("taking down the cloud that the last demo kept", flush=True)
    if subprocess.run([LAB / "down"], check=False).returncode != 0:
        raise LabError("the cloud that the last demo kept does not go down; see lab/down")


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
