"""Did the evacuation do what it promised? Pure: evidence -> checks, each with what broke it.

Deliberately not here: any figure of how good it was (telling.py prints them); a check only says
whether a promise was kept. Every one of them is refused a bad sample in tests/mininet/.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable, Optional

from .evidence import Evidence, Guest, spans
from .gaps import Span, left_of
from .leftovers import differences, stray_taps
from .waiting import on_the_way, waited

DOWNTIME_MOST_MS = 300.0
ALIVE_STATES = ("running", "paused", "sending", "incoming", "uncertain", "in doubt", "crashed")
SHOWN = 6
# What a guest writes and compares at a time.
BLOCK_BYTES = 4096


@dataclass
class Check:
    """A promise, and everything that breaks it."""

    name: str
    faults: list[str] = field(default_factory=list)

    @property
    def held(self) -> bool:
        return not self.faults


def judge(evidence: Evidence) -> list[Check]:
    """Every check, in the order in which a person asks."""
    return [Check(name, question(evidence)) for name, question in QUESTIONS]


def arrived(evidence: Evidence) -> list[str]:
    """Lifeboat's report, Lifeboat's inventory and the process tables agree on where it runs."""
    faults = []
    for guest in evidence.guests:
        row = evidence.moved(guest.name)
        if row is None:
            faults.append(f"{guest.name}: the report does not name it")
        elif row["outcome"] != "moved":
            faults.append(f"{guest.name}: {row['outcome']}: {row['reason']}")
        else:
            faults += _runs_at(evidence, guest.name, row["destination"])
    return faults


def _runs_at(evidence: Evidence, name: str, destination: str) -> list[str]:
    faults = []
    if destination in ("", evidence.host):
        return [f"{name}: moved to `{destination}`, which is no destination"]
    running = [vm["host"] for vm in evidence.vms if vm["name"] == name and vm["state"] == "running"]
    if running != [destination]:
        faults.append(f"{name}: should run at {destination}; `lifeboat vms` says {running}")
    qemus = [node for node in evidence.after for one in evidence.processes(node)
             if one["vm"] == name]
    if qemus != [destination]:
        faults.append(f"{name}: should run at {destination}; its QEMUs are on {qemus}")
    return faults


def source_is_empty(evidence: Evidence) -> list[str]:
    """No QEMU, and nothing that Lifeboat still counts there."""
    faults = [f"{evidence.host}: QEMU {one['pid']} of `{one['vm']}` still runs"
              for one in evidence.processes(evidence.host)]
    return faults + [
        f"{evidence.host}: `lifeboat vms` shows {vm['name']} there as {vm['state']}"
        for vm in evidence.vms if vm["host"] == evidence.host and vm["state"] in ALIVE_STATES
    ]


def no_wrong_byte(evidence: Evidence) -> list[str]:
    """Neither a guest nor the client has found one, on the serial line or on the network."""
    faults = []
    for guest in evidence.guests:
        account, row = evidence.accounts.get(guest.name), evidence.seen_by_client(guest.name)
        if account is None or not account.ticks:
            faults.append(f"{guest.name}: said nothing on its serial line")
        elif complaint := account.complaint():
            faults.append(f"{guest.name}: {complaint}")
        if row is None:
            faults.append(f"{guest.name}: the client has not watched it")
        elif row["corrupt"] or row["guest_errors"] or row["stream"]["errors"]:
            faults.append(f"{guest.name}: the client saw {row['guest_errors']} wrong pages and "
                          f"{row['stream']['errors']} wrong bytes on its stream")
    return faults


def read_again(evidence: Evidence) -> list[str]:
    """Every page has been read and compared after the move, not only the busy ones."""
    faults = []
    for guest in evidence.guests:
        account = evidence.accounts.get(guest.name)
        passes = account.passes_since_arrival() if account else 0.0
        if passes < 1:
            faults.append(f"{guest.name}: {passes:.0%} of its memory was read and compared since "
                          "it arrived")
    return faults


def disks_read_again(evidence: Evidence) -> list[str]:
    """A local disk came along: the guest has compared all of it since, and goes on writing."""
    faults = []
    for guest in (guest for guest in evidence.guests if guest.disk):
        account = evidence.accounts.get(guest.name)
        written, compared = account.disk_since_arrival() if account else (0, 0)
        if compared * BLOCK_BYTES < guest.disk or not written:
            faults.append(f"{guest.name}: {compared} of {guest.disk // BLOCK_BYTES} blocks of its "
                          f"disk were compared since it arrived, and {written} written")
    return faults


def bases_stayed(evidence: Evidence) -> list[str]:
    """Only what was written above a base was sent, because every host has the base."""
    faults = []
    for guest in (guest for guest in evidence.guests if guest.disk):
        overlay = evidence.overlay(guest.name)
        if overlay is None:
            faults.append(f"{guest.name}: nobody compared what its disk lies on")
            continue
        faults += [f"{guest.name}: at {file['host']} {file['path']} {file['state']}"
                   for file in evidence.verified[guest.name] if file["state"] != "same"]
        destination = evidence.destination(guest.name)
        if overlay.moved is None:
            faults.append(f"{guest.name}: {overlay.image} is not at `{destination}`")
        elif overlay.moved >= overlay.base_bytes:
            faults.append(f"{guest.name}: {overlay.image} takes {overlay.moved} bytes at "
                          f"{destination}, as if it held its base's {overlay.base_bytes}")
        if overlay.image in evidence.disks.get(evidence.host, {}):
            faults.append(f"{guest.name}: {overlay.image} is still in use at {evidence.host}")
    return faults


def same_life(evidence: Evidence) -> list[str]:
    """Booted once, never set back, never two of it."""
    faults = []
    for guest in evidence.guests:
        row, account = evidence.seen_by_client(guest.name), evidence.accounts.get(guest.name)
        boots = set(row["boot_ids"] if row else []) | set(account.boots if account else [])
        if len(boots) != 1:
            faults.append(f"{guest.name}: {len(boots)} boot ids: {', '.join(sorted(boots))}")
        if account and (back := account.step_back()):
            faults.append(f"{guest.name}: {back}")
        if row and row["ticks_went_backwards"]:
            faults.append(f"{guest.name}: its counters fell {row['ticks_went_backwards']} times")
        if row and row["repeated"]:
            faults.append(f"{guest.name}: {row['repeated']} heartbeats were answered twice")
    return faults


def gaps_accounted_for(evidence: Evidence) -> list[str]:
    """Silence has a cause that was measured."""
    faults = []
    for guest in evidence.guests:
        row = evidence.seen_by_client(guest.name)
        if row is None or row["answered"] == 0:
            faults.append(f"{guest.name}: answered no heartbeat")
            continue
        if not row["alive"]:
            faults.append(f"{guest.name}: silent at the end")
        if row["gap_count"] != len(row["gaps"]):
            faults.append(f"{guest.name}: {row['gap_count']} gaps, too many to be listed")
        for gap in spans(row["gaps"]):
            if cause_of(evidence, guest, gap) is None:
                starved = starvation(evidence, guest, gap)
                faults.append(f"{guest.name}: {_when(evidence, guest, gap.start)} silent for "
                              f"{gap.length:.0f} ms, {starved:.0f} ms of it for want of a processor")
    return faults


def cause_of(evidence: Evidence, guest: Guest, gap: Span) -> Optional[str]:
    """What a gap comes from, in a word; None if from nothing that is known.

    A migration is entitled to so much of the host's uplink that the rest may be too little for what the
    other guests send: while packets are dropped there, silence of a guest that is still behind it
    up to the length of a pause is the link's. A guest falters when QEMU begins to track which pages it writes, and at each round: while its
    own memory is copied, silence up to the length of a pause is the move's. At any other time only
    stalls of the client and waits for a processor explain a gap."""
    window, copying = evidence.window(guest.name), evidence.copying(guest.name)
    threshold = evidence.client.get("threshold_ms", 0)
    stalls = spans(evidence.client.get("client_stalls", []))
    starved = starvation(evidence, guest, gap)
    if window and gap.overlaps(window):
        return "switchover" if left_of(gap, [window, *stalls]) - starved <= threshold else None
    left = left_of(gap, stalls) - starved
    if left <= threshold:
        return "machine"
    if left >= DOWNTIME_MOST_MS:
        return None
    if copying and gap.overlaps(copying):
        return "copy"
    here = window is None or gap.end <= window.start
    return "link" if here and left_of(gap, [*evidence.full, *stalls]) - starved <= threshold else None


def starvation(evidence: Evidence, guest: Guest, gap: Span) -> float:
    """Milliseconds of a gap in which the guest, or a switch on its way, waited for a processor."""
    row = evidence.moved(guest.name)
    gone = row is not None and 0 < row["stop_unix_us"] / 1000 < gap.start
    host = evidence.destination(guest.name) if gone else evidence.host
    return waited(evidence.waits, on_the_way(guest.name, host), gap)


def _when(evidence: Evidence, guest: Guest, start_ms: float) -> str:
    row = evidence.moved(guest.name)
    if row and row["stop_unix_us"]:
        away = start_ms / 1000 - row["stop_unix_us"] / 1e6
        return f"{abs(away):.1f} s {'after' if away > 0 else 'before'} its switchover"
    return f"{start_ms - evidence.client.get('started_ms', 0):.0f} ms after the client's start"


def connections_survived(evidence: Evidence) -> list[str]:
    """The one connection to each guest is still the first, and still carries."""
    faults = []
    for guest in evidence.guests:
        row = evidence.seen_by_client(guest.name)
        stream = row["stream"] if row else {"alive": False, "bytes": 0, "lost_connections": 0}
        if stream["lost_connections"]:
            faults.append(f"{guest.name}: its connection was lost")
        if not stream["alive"] or not stream["bytes"]:
            faults.append(f"{guest.name}: its connection carries nothing at the end")
    return faults


def pauses_were_short(evidence: Evidence) -> list[str]:
    """STOP to RESUME, by QEMU's events."""
    faults = []
    for guest in evidence.guests:
        row = evidence.moved(guest.name)
        if row is None or evidence.window(guest.name) is None:
            faults.append(f"{guest.name}: no STOP and RESUME were reported")
            continue
        by_events = (row["resume_unix_us"] - row["stop_unix_us"]) / 1000
        pause = max(by_events, row["downtime_us"] / 1000)
        if pause >= DOWNTIME_MOST_MS or by_events < 0:
            faults.append(f"{guest.name}: stood for {pause:.0f} ms")
    return faults


def pages_had_their_share(evidence: Evidence) -> list[str]:
    """What the plan was to reserve was seen reserved while it ran."""
    if not evidence.reserves:
        return []
    planned = {(hop["switch"], hop["port"]) for hop in evidence.plan.get("reservations", [])}
    seen = {(held.switch, held.port) for held in evidence.held if held.reserved}
    if not planned:
        return ["the plan reserves nothing"]
    return [f"{switch}:{port}: nothing was reserved there"
            for switch, port in sorted(planned - seen)]


def nothing_is_left(evidence: Evidence) -> list[str]:
    """Queues, QoS, flows, meters, qdiscs, links: as before, on every node."""
    if not evidence.before or not evidence.after:
        return ["nobody looked"]
    places = {guest.name: evidence.destination(guest.name) or evidence.host
              for guest in evidence.guests}
    nics = {guest.name: guest.nics for guest in evidence.guests}
    return (differences(evidence.before, evidence.after)
            + stray_taps(evidence.after, places, nics))


QUESTIONS: tuple[tuple[str, Callable[[Evidence], list[str]]], ...] = (
    ("every guest runs at its destination, and nowhere else", arrived),
    ("the source holds no QEMU any more", source_is_empty),
    ("no guest ever reported a wrong byte", no_wrong_byte),
    ("every page was read and compared again since it arrived", read_again),
    ("every block of a local disk was read and compared again, too", disks_read_again),
    ("a disk went along without its base, which every host has", bases_stayed),
    ("every guest is in its first life, and was never set back", same_life),
    ("every heartbeat gap is accounted for", gaps_accounted_for),
    ("every checked TCP connection survived", connections_survived),
    (f"every guest stood for less than {DOWNTIME_MOST_MS:.0f} ms", pauses_were_short),
    ("the pages had their reserved share on every link", pages_had_their_share),
    ("nothing of Lifeboat's is left on switches, links and hosts", nothing_is_left),
)
