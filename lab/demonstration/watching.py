"""The witnesses of a demo: the guests' serial lines, the client, and what is reserved meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, Callable, Optional

from cloud.model import Scenario, Vm
from cloud.state import RUN, LabError

from .evidence import Held
from .serial import Account
from .standing import OUT, Standing, end_inside

INTERVAL_MS = 20
# Two heartbeats missed in a row. TCP's shortest retransmission time-out is four times this.
THRESHOLD_MS = 50
SAMPLE_SECONDS = 0.5


def until(what: str, seconds: float, missing: Callable[[], str]) -> None:
    """Waits until `missing` returns an empty text; LabError with that text after `seconds`."""
    deadline = time.monotonic() + seconds
    while said := missing():
        if time.monotonic() > deadline:
            raise LabError(f"{what}: after {seconds:.0f} s {said}")
        time.sleep(0.2)


def serial_log(host: str, vm: str) -> Path:
    """All that came out of a guest's serial line on one host."""
    return RUN / host / "qemu" / vm / "io" / "serial.log"


class Listener:
    """Listens to one guest from its boot on.

    The source's log is kept open: what the guest said there can be read to its last word, also
    after the agent has removed the file."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self._file: Optional[int] = None

    def is_ready(self) -> bool:
        """Whether the guest has said that it runs."""
        if self._file is None:
            try:
                self._file = os.open(serial_log(self.vm.host, self.vm.name), os.O_RDONLY)
            except FileNotFoundError:
                return False
        return "LIFEBOAT-READY" in self._at_source()

    def _at_source(self) -> str:
        if self._file is None:
            return ""
        size = os.fstat(self._file).st_size
        return os.pread(self._file, size, 0).decode(errors="replace")

    def account(self, destination: str) -> Account:
        """All that it has said so far; `destination` is where it runs now, or empty."""
        there = ""
        if destination and destination != self.vm.host:
            try:
                there = serial_log(destination, self.vm.name).read_text(errors="replace")
            except FileNotFoundError:
                pass  # then it has said nothing there, which is for the checks to judge
        return Account.of(self._at_source(), there)


class Client:
    """guest-workload's client on the client host: heartbeats and a checked stream per guest."""

    def __init__(self, standing: Standing, scenario: Scenario, workload: Path) -> None:
        self.report = OUT / "demo-client.json"
        self.status = OUT / "demo-client.status.json"
        for file in (self.report, self.status):
            file.unlink(missing_ok=True)
        words = [str(workload), "client", "--out", str(self.report), "--status", str(self.status),
                 "--interval", str(INTERVAL_MS), "--threshold", str(THRESHOLD_MS)]
        for vm in scenario.vms:
            words += ["--guest", _peer(vm, scenario.transport)]
        with open(OUT / "demo-client.log", "wb") as out:
            self.process = standing.on("client", words, stdout=out, stderr=out)

    def not_heard(self) -> str:
        """Who does not answer or stream yet, as a sentence; empty when all do."""
        if self.process.poll() is not None:
            raise LabError(f"the client ended: {(OUT / 'demo-client.log').read_text().strip()}")
        try:
            guests = json.loads(self.status.read_text())["guests"]
        except (FileNotFoundError, ValueError):
            return "the client has not reported yet"
        silent = [guest["name"] for guest in guests
                  if not guest["alive"] or not guest["stream"]["alive"]]
        return f"the client does not hear {', '.join(silent)}" if silent else ""

    def finish(self) -> Any:
        """Ends it in order and returns its last report."""
        try:
            end_inside(self.process)
        except subprocess.TimeoutExpired as late:
            self.process.kill()
            raise LabError("the client does not end, and gave no report") from late
        return json.loads(self.report.read_text())


def _peer(vm: Vm, transport: str) -> str:
    words = [f"name={vm.name}", f"ip={vm.nics[0].address.split('/')[0]}"]
    if vm.role == "NI":
        words += [f"source={vm.rate}", f"transport={transport}"]
    return ",".join(words)


class Reservations(threading.Thread):
    """Notes what is reserved on which port while an evacuation runs."""

    def __init__(self, standing: Standing) -> None:
        super().__init__(daemon=True)
        self.standing = standing
        self.held: list[Held] = []
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            try:
                status = self.standing.ask("status")
            except (LabError, ValueError):
                continue  # the command beside it will say what is wrong
            for evacuation in status["evacuations"]:
                self.held += [_held(row) for row in evacuation["reservations"]]

    def finish(self) -> list[Held]:
        """Ends it and returns what it has seen."""
        self._over.set()
        self.join(timeout=10)
        return self.held


def _held(row: dict[str, Any]) -> Held:
    return Held(row["switch"], row["port"], row["queue"], row["capacity_bits_per_sec"],
                row["reserved_bits_per_sec"], row["used_bits_per_sec"])
