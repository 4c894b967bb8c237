"""What a guest said on its serial lines, before and after its move. Pure.

The lines are described in guest-workload/src/guest.rs. A guest that moves leaves one log at each
host; `Account` reads them in the order in which they were written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Iterable, Optional

READY = re.compile(r"LIFEBOAT-READY name=(\S+) role=(\S+) boot=([0-9a-f]+) pages=(\d+)")
TICK = re.compile(r"LIFEBOAT-TICK (\d+) (\S+) pages=(\d+) .*?checked=(\d+) errors=(\d+)")
DISK = re.compile(r" disk_writes=(\d+) disk_checks=(\d+)")
CORRUPT = "LIFEBOAT-CORRUPT"


@dataclass(frozen=True)
class Tick:
    """One second of a guest's life, by its own clock."""

    second: int
    verdict: str
    pages: int
    checked: int
    errors: int
    # Blocks written and compared on its local disk; None where it has none.
    disk: Optional[tuple[int, int]] = None


@dataclass
class Account:
    """All that one guest said."""

    boots: list[str] = field(default_factory=list)
    ticks: list[Tick] = field(default_factory=list)
    alarms: list[str] = field(default_factory=list)
    # How many of `ticks` were said at the host that it left.
    before: int = 0

    @staticmethod
    def of(source: str, destination: str = "") -> Account:
        """Reads what was said at the source, then what was said at the destination."""
        account = Account()
        account.read(source.splitlines())
        account.before = len(account.ticks)
        account.read(destination.splitlines())
        return account

    def read(self, lines: Iterable[str]) -> None:
        """Takes lines in; what is neither of ours is the kernel's business."""
        for line in lines:
            if found := READY.search(line):
                self.boots.append(found[3])
            elif found := TICK.search(line):
                second, verdict, pages, checked, errors = found.groups()
                on_disk = DISK.search(line)
                disk = (int(on_disk[1]), int(on_disk[2])) if on_disk else None
                self.ticks.append(Tick(int(second), verdict, int(pages), int(checked), int(errors),
                                       disk))
            elif CORRUPT in line:
                self.alarms.append(line.strip())

    @property
    def after(self) -> list[Tick]:
        """Ticks said at the destination."""
        return self.ticks[self.before:]

    def complaint(self) -> Optional[str]:
        """The first wrong byte that it reported, or None."""
        if self.alarms:
            return self.alarms[0]
        wrong = [tick for tick in self.ticks if tick.errors or tick.verdict != "ok"]
        return f"tick {wrong[0].second} says {wrong[0].verdict}" if wrong else None

    def step_back(self) -> Optional[str]:
        """A second or a counter that was lower than one before it, or None."""
        for one, other in zip(self.ticks, self.ticks[1:]):
            if other.second <= one.second:
                return f"second {other.second} came after second {one.second}"
            if other.checked < one.checked:
                return f"second {other.second}: {other.checked} pages checked, {one.checked} before"
        return None

    def passes_since_arrival(self) -> float:
        """How often it has read and compared its whole memory region since it arrived."""
        ticks = self.after
        if len(ticks) < 2 or ticks[0].pages == 0:
            return 0.0
        return (ticks[-1].checked - ticks[0].checked) / ticks[0].pages

    def disk_since_arrival(self) -> tuple[int, int]:
        """Blocks written and compared on its local disk since it arrived."""
        counts = [tick.disk for tick in self.after if tick.disk]
        if not counts:
            return 0, 0
        (written, compared), (now_written, now_compared) = counts[0], counts[-1]
        return now_written - written, now_compared - compared
