"""Who waited for a processor, and when: the witness for a machine that is too small or too busy.

Two cores carry four emulated guests and seven software switches. A guest may be silent because
its QEMU, or a switch on its way, was ready to run and was not let: that is the machine's doing,
not the move's. The kernel counts it per thread (/proc/PID/task/TID/schedstat, second figure:
nanoseconds on a run queue, added when the thread is let run again). What is counted here is taken
from a gap (gaps.py) and named in the record; it is measured, never assumed.
"""

from __future__ import annotations

import os
import re
import threading
import time
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Iterator, Mapping, Sequence

from cloud.state import RUN

from .gaps import Span

# How exactly it is known when somebody waited, at 2 % of a core.
SAMPLE_SECONDS = 0.01
SEARCH_SECONDS = 1.0
# Shorter waits are how a scheduler works.
LEAST_MS = 0.5
# Time that the host of a virtual machine kept its processors from it ("steal" of /proc/stat).
STOLEN = "this machine"
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
CORES = os.cpu_count() or 1
PROGRAMS = {"qemu-system-x86": "qemu", "ovs-vswitchd": "switch"}
# Of real-time threads the least: punctual beside whatever is not one.
PUNCTUAL = 1


@dataclass(frozen=True)
class Wait:
    """Some thread of `who` waited `length_ms`, and was let run between two looks (Unix times).

    It may have waited several times in between, and the first look may have come in the middle."""

    who: str
    since_ms: float
    until_ms: float
    length_ms: float

    def stretch_in(self, gap: Span) -> tuple[float, float]:
        """Where in a gap it can have been: as late as the gap lasts, but no later than it was seen."""
        end = min(max(gap.end, self.since_ms), self.until_ms)
        return max(end - self.length_ms, gap.start), min(end, gap.end)


class Waits:
    """Waits in the order in which they were seen. Some minutes have a hundred thousand of them and
    hundreds of gaps: a gap looks only at those near it."""

    def __init__(self, waits: Iterable[Wait] = ()) -> None:
        self._waits = sorted(waits, key=lambda wait: wait.until_ms)
        self._until = [wait.until_ms for wait in self._waits]
        # How much earlier than it was seen a wait can have been.
        self._reach = max((wait.until_ms - wait.since_ms + wait.length_ms for wait in self._waits),
                          default=0.0)

    def __iter__(self) -> Iterator[Wait]:
        return iter(self._waits)

    def near(self, gap: Span) -> Sequence[Wait]:
        """All that can have been in it, and perhaps others."""
        return self._waits[bisect_right(self._until, gap.start):
                           bisect_left(self._until, gap.end + self._reach)]


def waited(waits: Waits, who: Sequence[str], gap: Span) -> float:
    """How many milliseconds of a gap some thread of `who` waited for a processor. When two wait at
    the same time, that time counts once."""
    possible = (wait.stretch_in(gap) for wait in waits.near(gap) if wait.who in who)
    stretches = sorted((start, end) for start, end in possible if start < end)
    total, reached = 0.0, gap.start
    for start, end in stretches:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return min(total, gap.length)


class Waiting(threading.Thread):
    """Watches the cloud's QEMUs and switches until it is told to end."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.waits: list[Wait] = []
        self._threads: dict[Path, str] = {}
        self._open: dict[Path, int] = {}
        self._counted: dict[Path, int] = {}
        self._looked_ms = time.time() * 1000
        self._over = threading.Event()

    def run(self) -> None:
        # A witness that waits for a processor itself sees every wait too late.
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(PUNCTUAL))
        searched = 0.0
        while not self._over.wait(SAMPLE_SECONDS):
            if time.monotonic() - searched > SEARCH_SECONDS:
                searched = time.monotonic()
                self._watch(dict(_threads()))
            now_ms = time.time() * 1000
            self._sample(now_ms)
            self._stolen(now_ms)
            self._looked_ms = now_ms
        self._watch({})

    def _watch(self, threads: dict[Path, str]) -> None:
        """Keeps what is read a hundred times a second open."""
        for file in self._threads.keys() - threads.keys():
            os.close(self._open.pop(file))
        for file in threads.keys() - self._threads.keys():
            try:
                self._open[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                del threads[file]  # it has ended
        self._threads = threads

    def _sample(self, now_ms: float) -> None:
        for file, who in self._threads.items():
            try:
                total = int(os.pread(self._open[file], 100, 0).split()[1])
            except (OSError, IndexError, ValueError):
                continue  # it has ended
            length = (total - self._counted.get(file, total)) / 1e6
            self._counted[file] = total
            if length >= LEAST_MS:
                self.waits.append(Wait(who, self._looked_ms, now_ms, length))

    def _stolen(self, now_ms: float) -> None:
        """What was stolen of one processor, on average over all."""
        file = Path("/proc/stat")
        total = int(file.read_text().split("\n", 1)[0].split()[8])
        length = (total - self._counted.get(file, total)) * 1000 / TICKS_PER_SECOND / CORES
        self._counted[file] = total
        if length >= LEAST_MS:
            self.waits.append(Wait(STOLEN, self._looked_ms, now_ms, length))

    def finish(self) -> Waits:
        """Ends it and returns what it has seen."""
        self._over.set()
        self.join(timeout=10)
        return Waits(self.waits)


def _threads() -> Iterator[tuple[Path, str]]:
    """The threads that carry guests and packets, with whose they are: `qemu web h1`, `switch h1`."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            program = PROGRAMS.get((entry / "comm").read_text().strip())
            words = (entry / "cmdline").read_bytes().decode(errors="replace") if program else ""
        except OSError:
            continue
        # Another cloud's, of another checkout, has other paths in its command line.
        if program and (who := owner_of(program, words)):
            yield from ((task / "schedstat", who) for task in _busy(entry, program))


def owner_of(program: str, words: str) -> str:
    """By the sockets in its own folder: RUN/h1/qemu/web/io/..., RUN/h1/ovs/db.sock, RUN/fabric/db.sock.
    A QEMU's command line names images in other folders as well."""
    folder = re.escape(str(RUN))
    if program == "qemu":
        found = re.search(rf"{folder}/([^/]+)/qemu/([^/]+)/", words)
        return f"qemu {found[2]} {found[1]}" if found else ""
    found = re.search(rf"{folder}/([^/]+)/", words)
    return f"switch {found[1]}" if found else ""


def _busy(entry: Path, program: str) -> Iterator[Path]:
    """The main thread, and of a QEMU its virtual processors: the threads that an answer needs."""
    for task in (entry / "task").iterdir():
        try:
            name = (task / "comm").read_text()
        except OSError:
            continue
        if task.name == entry.name or (program == "qemu" and name.startswith("CPU ")):
            yield task


def on_the_way(guest: str, host: str) -> tuple[str, ...]:
    """Who has to run for a guest on a host to be heard by the client."""
    return (f"qemu {guest} {host}", f"switch {host}", "switch fabric", "switch client",
            STOLEN)


def as_record(waits: Waits) -> Mapping[str, float]:
    """The sum of all waits, by whom; milliseconds."""
    sums: dict[str, float] = {}
    for wait in waits:
        sums[wait.who] = round(sums.get(wait.who, 0.0) + wait.length_ms, 1)
    return dict(sorted(sums.items()))
