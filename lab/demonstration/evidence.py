"""All that was seen of an evacuation, as values. Filled by main.py, judged by checks.py.

Replies of Lifeboat and reports of the client stay as they came (their JSON); what is read from
them is read here, in one place.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Mapping, Optional, Sequence

from .gaps import Span, move_window
from .leftovers import Look
from .serial import Account
from .waiting import Waits

Json = Mapping[str, Any]
ORDER_MS = 500.0


@dataclass(frozen=True)
class Guest:
    """A VM of the scenario that stood on the evacuated host."""

    name: str
    role: str
    nics: int
    # Bytes of its local disk that it writes and compares; 0 where it has none.
    disk: int = 0


@dataclass(frozen=True)
class Overlay:
    """A local disk that went along, and what it lies on."""

    image: str
    # What its file takes at the destination, bytes; None where it is not there.
    moved: Optional[int]
    base: str
    # What every host has of it already, bytes.
    base_bytes: int


@dataclass(frozen=True)
class Held:
    """What was reserved on a port at one moment; bit/s."""

    switch: str
    port: str
    queue: int
    capacity: int
    reserved: int
    used: int


@dataclass
class Evidence:
    """One evacuation."""

    host: str
    guests: Sequence[Guest]
    plan: Json = field(default_factory=dict)
    report: Json = field(default_factory=dict)
    vms: Sequence[Json] = ()
    # By guest: the files beneath its disk, compared at every host (`lifeboat verify`).
    verified: dict[str, Sequence[Json]] = field(default_factory=dict)
    client: Json = field(default_factory=dict)
    accounts: Mapping[str, Account] = field(default_factory=dict)
    before: Look = field(default_factory=dict)
    after: Look = field(default_factory=dict)
    # After it, by host: the images in its directory for disks, and what their files take, bytes.
    disks: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    held: Sequence[Held] = ()
    waits: Waits = field(default_factory=Waits)
    # When the host's uplink dropped packets that had no reserved queue (uplink.py).
    full: Sequence[Span] = ()
    # Whether the plan was to reserve at all (an urgency of 0 reserves nothing).
    reserves: bool = True

    def moved(self, name: str) -> Optional[Json]:
        """The report's row of a guest."""
        return next((row for row in self.report.get("vms", []) if row["vm"] == name), None)

    def destination(self, name: str) -> str:
        """Where the report says that a guest has gone; empty where it did not go."""
        row = self.moved(name)
        return row["destination"] if row and row["outcome"] == "moved" else ""

    def window(self, name: str) -> Optional[Span]:
        """When a guest's own move kept it from answering."""
        row = self.moved(name)
        if not row or not row["stop_unix_us"] or not row["resume_unix_us"]:
            return None
        return move_window(row["stop_unix_us"], row["resume_unix_us"])

    def copying(self, name: str) -> Optional[Span]:
        """From the order to the source until the switchover: its memory is being copied."""
        row, window = self.moved(name), self.window(name)
        if row is None or window is None:
            return None
        # The order's own way, and the clocks' whole milliseconds.
        return Span(row["resume_unix_us"] / 1000 - row["total_ms"] - ORDER_MS, window.start)

    def seen_by_client(self, name: str) -> Optional[Json]:
        """The client's row of a guest."""
        return next((row for row in self.client.get("guests", []) if row["name"] == name), None)

    def overlay(self, name: str) -> Optional[Overlay]:
        """A guest's disk after the evacuation; None where nothing was compared of it."""
        files = self.verified.get(name)
        if not files:
            return None
        image, base = files[0]["disk"], files[0]["path"].rsplit("/", 1)[-1]
        moved = self.disks.get(self.destination(name), {}).get(image)
        return Overlay(image, moved, base, files[0]["bytes"])

    def processes(self, node: str) -> Sequence[Json]:
        """The QEMUs on a node, asked the kernel."""
        return self.after.get(node, {}).get("processes", [])


def spans(listed: Sequence[Json]) -> list[Span]:
    """A list of gaps or stalls as the client writes it."""
    return [Span(one["start_ms"], one["start_ms"] + one["length_ms"]) for one in listed]
