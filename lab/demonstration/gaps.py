"""Is every gap in a guest's heartbeats accounted for? Pure.

A gap is a stretch without an answer, longer than the client's threshold (guest-workload/src/
gaps.rs). It is accounted for by the guest's own move (STOP to RESUME by QEMU's events, and the
moment until its announcement has reached the switches), by stalls of the client itself, and by
the time in which the guest's QEMU or a switch on its way waited for a processor (waiting.py), and,
behind the evacuated host's uplink, by the time in which that was full (uplink.py). What is left of the gap after that must be shorter than the threshold: as long as a heartbeat may take
at any time; while the guest's own memory is copied, shorter than a pause may be. Another guest's
move explains nothing. The rule itself is checks.cause_of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable, Sequence

# From STOP backwards: the last answer before it was sent up to one interval and a way earlier.
BEFORE_MS = 40.0
# From RESUME: the announcement, the guest's own catching up with its emulated timers, and a QEMU that
# emulates translates the guest's code anew at its destination, piece by piece as it is run.
AFTER_MS = 300.0


@dataclass(frozen=True)
class Span:
    """A stretch of time; Unix milliseconds."""

    start: float
    end: float

    @property
    def length(self) -> float:
        return self.end - self.start

    def overlaps(self, other: Span) -> bool:
        return self.start < other.end and other.start < self.end

    def without(self, other: Span) -> list[Span]:
        """What is left of it."""
        if not self.overlaps(other):
            return [self]
        parts = (Span(self.start, other.start), Span(other.end, self.end))
        return [part for part in parts if part.length > 0]


def move_window(stop_us: int, resume_us: int) -> Span:
    """The stretch in which a guest's own move keeps it from answering."""
    return Span(stop_us / 1000 - BEFORE_MS, resume_us / 1000 + AFTER_MS)


def left_of(gap: Span, causes: Iterable[Span]) -> float:
    """The milliseconds of a gap that no cause covers."""
    parts = [gap]
    for cause in causes:
        parts = [rest for part in parts for rest in part.without(cause)]
    return sum(part.length for part in parts)


def network_downtime(gaps: Sequence[Span], window: Span) -> float:
    """The longest gap that the move has caused, in ms; 0 where none was over the threshold."""
    return max((gap.length for gap in gaps if gap.overlaps(window)), default=0.0)
