"""The checked scenario: the JSON of `lifeboat-lab`, as types.

Field names are those of lab/src/scenario.rs, where the rules are. No defaults and no checks here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class End:
    switch: str
    port: str


@dataclass(frozen=True)
class Switch:
    name: str
    datapath: str


@dataclass(frozen=True)
class Link:
    ends: tuple[End, End]
    capacity: int


@dataclass(frozen=True)
class Plug:
    """Where a host is plugged in: its own bridge's uplink and the edge switch's port."""

    uplink: str
    edge: End
    capacity: int
    capacity_in: int
    datapath: str
    management: str


@dataclass(frozen=True)
class Host:
    name: str
    plug: Plug
    address: str
    memory: int
    stores: int

    @property
    def ip(self) -> str:
        return self.address.split("/")[0]


@dataclass(frozen=True)
class Network:
    address: str
    vlan: int


@dataclass(frozen=True)
class Client:
    plug: Plug
    networks: tuple[Network, ...]


@dataclass(frozen=True)
class Nic:
    mac: str
    address: str
    vlan: int


@dataclass(frozen=True)
class Vm:
    name: str
    host: str
    role: str
    memory: int
    nics: tuple[Nic, ...]
    rate: int
    disk: int
    arguments: str


@dataclass(frozen=True)
class Scenario:
    name: str
    transport: str
    mtu: int
    guest_mtu: int
    queue_ms: int
    switches: tuple[Switch, ...]
    links: tuple[Link, ...]
    hosts: tuple[Host, ...]
    client: Client
    vms: tuple[Vm, ...]

    @staticmethod
    def load(path: Path) -> Scenario:
        given = json.loads(path.read_text())
        return Scenario(
            name=given["name"],
            transport=given["transport"],
            mtu=given["mtu"],
            guest_mtu=given["guest_mtu"],
            queue_ms=given["queue_ms"],
            switches=tuple(Switch(**switch) for switch in given["switches"]),
            links=tuple(_link(link) for link in given["links"]),
            hosts=tuple(Host(**{**host, "plug": _plug(host["plug"])}) for host in given["hosts"]),
            client=Client(
                plug=_plug(given["client"]["plug"]),
                networks=tuple(Network(**network) for network in given["client"]["networks"]),
            ),
            vms=tuple(_vm(vm) for vm in given["vms"]),
        )


def _link(given: dict[str, Any]) -> Link:
    one, other = (End(**end) for end in given["ends"])
    return Link(ends=(one, other), capacity=given["capacity"])


def _plug(given: dict[str, Any]) -> Plug:
    return Plug(**{**given, "edge": End(**given["edge"])})


def _vm(given: dict[str, Any]) -> Vm:
    wanted = ("name", "host", "role", "memory", "rate", "disk", "arguments")
    nics = tuple(Nic(**nic) for nic in given["nics"])
    return Vm(nics=nics, **{key: given[key] for key in wanted})
