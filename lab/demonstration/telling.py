"""What a person reads at the end, and the JSON record. Pure but for the printing itself."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from typing import Any, Iterable, Optional, Sequence

from .checks import SHOWN, Check, cause_of
from .evidence import Evidence, Held, spans
from .gaps import network_downtime
from .waiting import as_record


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() + "\n"
        for line in lines
    )


def network_downtime_us(evidence: Evidence, name: str) -> Optional[int]:
    """Last answer before the move to the first after it, as the client saw it. None: unknown;
    0: no silence over the client's threshold."""
    row, window = evidence.seen_by_client(name), evidence.window(name)
    if row is None or window is None:
        return None
    return round(network_downtime(spans(row["gaps"]), window) * 1000)


def with_network_downtime(evidence: Evidence) -> dict[str, Any]:
    """The controller's report with what only the client can know filled in."""
    rows = []
    for row in evidence.report.get("vms", []):
        seen = network_downtime_us(evidence, row["vm"])
        known = seen is not None
        rows.append({**row, "network_downtime_us": seen or 0, "network_downtime_known": known})
    return {**evidence.report, "vms": rows}


def moves(evidence: Evidence) -> str:
    """Downtimes side by side: the guest's own pause, and what the network saw."""
    threshold = evidence.client.get("threshold_ms", 0)
    rows = []
    for guest in evidence.guests:
        row, seen = evidence.moved(guest.name), network_downtime_us(evidence, guest.name)
        if row is None:
            continue
        silence = "?" if seen is None else f"{seen / 1000:.0f} ms" if seen else f"< {threshold} ms"
        rows.append([guest.name, guest.role, row["source"], row["destination"] or "-",
                     f"{row['total_ms'] / 1000:.1f} s", f"{row['downtime_us'] / 1000:.1f} ms",
                     silence, _megabytes(row["bytes_sent"])])
    return table(("VM", "ROLE", "FROM", "TO", "TOTAL", "DOWNTIME", "NETWORK DOWNTIME", "SENT"), rows)


def overlays(evidence: Evidence) -> str:
    """The disks that went along, and what they lie on; empty where there is none."""
    rows = []
    for guest in evidence.guests:
        overlay = evidence.overlay(guest.name)
        if overlay is not None:
            moved = "?" if overlay.moved is None else _megabytes(overlay.moved)
            rows.append([guest.name, overlay.image, moved, overlay.base,
                         _megabytes(overlay.base_bytes)])
    return table(("VM", "DISK", "MOVED", "LIES ON", "NOT SENT"), rows) if rows else ""


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


def silences(evidence: Evidence) -> str:
    """How often each guest was not heard for longer than the threshold, by cause."""
    causes = ("switchover", "copy", "link", "machine", None)
    rows = []
    for guest in evidence.guests:
        row = evidence.seen_by_client(guest.name)
        found = [cause_of(evidence, guest, gap) for gap in spans(row["gaps"])] if row else []
        longest = f"{row['longest_gap_ms']:.0f} ms" if row else "?"
        rows.append([guest.name, *(str(found.count(cause)) for cause in causes), longest])
    over = f"SILENT > {evidence.client.get('threshold_ms', 0)} MS BY"
    return table((over, "SWITCHOVER", "COPY", "FULL LINK", "MACHINE", "NOTHING KNOWN", "LONGEST"), rows)


def reservations(held: Sequence[Held]) -> str:
    """The most that was reserved and used on each port."""
    ports = sorted({(one.switch, one.port) for one in held})
    rows = []
    for switch, port in ports:
        there = [one for one in held if (one.switch, one.port) == (switch, port)]
        reserved = max(one.reserved for one in there)
        used = max(one.used for one in there)
        rows.append([f"{switch}:{port}", _rate(there[0].capacity), _rate(reserved), _rate(used)])
    return table(("RESERVED ON", "CAPACITY", "AT MOST", "USED AT MOST"), rows)


def _rate(bits: int) -> str:
    return f"{bits / 1e6:.0f} Mbit/s"


def check_list(checks: Sequence[Check], colour: bool) -> str:
    """One line per promise; what breaks it below it."""
    lines = []
    for check in checks:
        word = "held  " if check.held else "BROKEN"
        if colour:
            word = f"\x1b[{32 if check.held else 31}m{word}\x1b[0m"
        lines.append(f"  {word}  {check.name}")
        lines += [f"          {fault}" for fault in check.faults[:SHOWN]]
        if len(check.faults) > SHOWN:
            lines.append(f"          and {len(check.faults) - SHOWN} more")
    return "\n".join(lines) + "\n"


def record(evidence: Evidence, checks: Sequence[Check], seconds: float) -> dict[str, Any]:
    """Everything, for whoever reads files."""
    return {
        "ok": all(check.held for check in checks),
        "seconds": round(seconds, 1),
        "machine": {"cores": os.cpu_count(), "kernel": platform.release()},
        "checks": [{"name": check.name, "held": check.held, "faults": check.faults}
                   for check in checks],
        "host": evidence.host,
        "guests": [asdict(guest) for guest in evidence.guests],
        "plan": evidence.plan,
        "report": with_network_downtime(evidence),
        "vms": evidence.vms,
        "verified": evidence.verified,
        "disks": evidence.disks,
        "client": evidence.client,
        "reserved": [asdict(one) for one in evidence.held],
        "uplink_full": [asdict(one) for one in evidence.full],
        "waited_for_processor_ms": as_record(evidence.waits),
        "serial": {name: asdict(account) for name, account in evidence.accounts.items()},
        "looks": {"before": evidence.before, "after": evidence.after},
    }
