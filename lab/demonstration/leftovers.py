"""Is anything of Lifeboat's left? Pure: compares two looks (look.py) at every node.

What an evacuation may change for good: the taps of the VMs that moved are gone at the source and
there at the destination. Everything else, on hosts and on the fabric, must be as it was before:
queues, QoS rows, flows, meters, qdiscs, classes, filters, links.
"""

from __future__ import annotations

import json
import re
from typing import Any, Mapping, Sequence

Look = Mapping[str, Mapping[str, Any]]

TAP = re.compile(r"\blb[0-9a-f]{8}n\d+\b")
LISTS = ("links", "tc", "qos", "queues", "ports", "shaped")
BY_BRIDGE = ("flows", "meters")


def differences(before: Look, after: Look) -> list[str]:
    """Each thing that appeared or vanished, except taps."""
    found = []
    for node in sorted(before.keys() | after.keys()):
        old, new = before.get(node, {}), after.get(node, {})
        for kind in LISTS:
            found += _changed(f"{node} {kind}", old.get(kind, []), new.get(kind, []))
        for kind in BY_BRIDGE:
            one, other = old.get(kind, {}), new.get(kind, {})
            for bridge in sorted(one.keys() | other.keys()):
                found += _changed(f"{node} {kind} of {bridge}", one.get(bridge, []),
                                  other.get(bridge, []))
    return found


def _changed(where: str, old: Sequence[str], new: Sequence[str]) -> list[str]:
    rest = [line for line in old if not TAP.search(line)]
    more = []
    for line in (line for line in new if not TAP.search(line)):
        if line in rest:
            rest.remove(line)
        else:
            more.append(line)
    return [f"{where}: new: {line}" for line in more] + [f"{where}: gone: {line}" for line in rest]


def tap_owners(node: Mapping[str, Any]) -> dict[str, str]:
    """Tap -> VM, as a node's Open vSwitch has them marked."""
    owners = {}
    for row in map(json.loads, node.get("taps", [])):
        name, marks = row[0], dict(row[1][1])
        if TAP.fullmatch(name):
            owners[name] = marks.get("lifeboat-vm", "")
    return owners


def stray_taps(look: Look, places: Mapping[str, str], nics: Mapping[str, int]) -> list[str]:
    """Taps that are not where their VM is, and taps that are missing there.

    `places`: VM -> node on which it should run; `nics`: VM -> how many it has."""
    found = []
    for node, seen in sorted(look.items()):
        owners = tap_owners(seen)
        for tap in (link for link in seen.get("links", []) if TAP.fullmatch(link)):
            if tap not in owners:
                found.append(f"{node}: tap {tap} is on no bridge")
        for tap, vm in sorted(owners.items()):
            if tap not in seen.get("links", []):
                found.append(f"{node}: port {tap} of {vm} has no interface")
            elif places.get(vm) != node:
                found.append(f"{node}: tap {tap} of {vm}, which should run on {places.get(vm)}")
    for vm, place in sorted(places.items()):
        there = sum(owner == vm for owner in tap_owners(look.get(place, {})).values())
        if there != nics.get(vm, there):
            found.append(f"{place}: {vm} has {there} taps, and {nics[vm]} NICs")
    return found
