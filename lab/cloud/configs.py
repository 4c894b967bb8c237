"""The configuration files that a scenario means: agents, controller, VM definitions.

One function per file, so that a change of a format is a change of one function. Rates and sizes
are written with their units, as an operator would.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Mapping, Sequence

from .model import Host, Link, Plug, Vm
from .network import BRIDGE, CONTROLLER_IP, HOST_PORT, Cloud
from .ovs import OVSDB_PORT
from .state import BUILD, RUN

AGENT_PORT = 7400
PAGE_PORT = 7401
CONTROLLER_PORT = 7500
OPENFLOW_PORT = 6653
KERNEL_WORDS = "console=ttyS0 quiet panic=-1 nokaslr tsc=unstable mitigations=off"


def write_all(cloud: Cloud) -> None:
    """Every file of the cloud."""
    for host in cloud.scenario.hosts:
        folder = RUN / host.name
        for name in ("state", "vms", "qemu"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        _write(folder / "agent.toml", agent(host, cloud.datapath))
    for vm in cloud.scenario.vms:
        _write(RUN / vm.host / "vms" / f"{vm.name}.toml", definition(vm, cloud.datapath))
    _write(RUN / "lab.toml", controller(cloud))


def agent(host: Host, datapath: str) -> str:
    """A host's agent."""
    folder = RUN / host.name
    return _toml(
        {
            "name": host.name,
            "roles": ["hypervisor", "switch"],
            "listen": f"{host.plug.management}:{AGENT_PORT}",
            "page_listen": f"{host.ip}:{PAGE_PORT}",
            "state": str(folder / "state"),
            "vms": str(folder / "vms"),
            "run": str(folder / "qemu"),
            "images": str(BUILD),
            "memory": _size(host.memory),
        },
        ("network", {
            "bridge": BRIDGE,
            "uplink": host.plug.uplink,
            "page_interface": HOST_PORT,
            "ovsdb": f"unix:{folder}/ovs/db.sock",
            "datapath": datapath,
        }),
        ("tls", _tls(f"agent-{host.name}")),
    )


def controller(cloud: Cloud) -> str:
    """The controller: who is there, and what every link carries."""
    scenario = cloud.scenario
    tables: list[tuple[str, Mapping[str, Any]]] = [("tls", _tls("controller"))]
    for switch in scenario.switches:
        tables.append(("[switch]", {
            "name": switch.name, "datapath": switch.datapath,
            "ovsdb": f"tcp:{CONTROLLER_IP}:{OVSDB_PORT}", "bridge": switch.name,
        }))
    for host in scenario.hosts:
        tables.append(("[host]", {
            "name": host.name,
            "agent": f"{host.plug.management}:{AGENT_PORT}",
            "bridge": BRIDGE,
            "datapath": host.plug.datapath,
            "ovsdb": f"tcp:{host.plug.management}:{OVSDB_PORT}",
        }))
    tables += [("[link]", link_table(link)) for link in scenario.links]
    tables += [("[link]", plug_table(host.name, host.plug)) for host in scenario.hosts]
    tables.append(("[link]", plug_table("client", scenario.client.plug)))
    return _toml(
        {
            "listen": f"{CONTROLLER_IP}:{CONTROLLER_PORT}",
            "openflow": f"{CONTROLLER_IP}:{OPENFLOW_PORT}",
            "state": str(RUN / "controller"),
        },
        *tables,
    )


def link_table(link: Link) -> Mapping[str, Any]:
    """A link between two switches."""
    one, other = link.ends
    return {
        "ends": [f"{one.switch}:{one.port}", f"{other.switch}:{other.port}"],
        "capacity": _rate(link.capacity),
    }


def plug_table(name: str, plug: Plug) -> Mapping[str, Any]:
    """The link between a host's own bridge and its edge switch."""
    return {
        "ends": [f"{name}:{plug.uplink}", f"{plug.edge.switch}:{plug.edge.port}"],
        "capacity": _rate(plug.capacity),
    }


def definition(vm: Vm, datapath: str) -> str:
    """A VM, as its host's agent reads it."""
    nics = [
        ("[nic]", {
            "mac": nic.mac, "bridge": BRIDGE, "vlan": nic.vlan, "mtu": 1500,
            # The userspace datapath finishes no checksum that a guest left to its NIC.
            "offload": datapath == "system",
        })
        for nic in vm.nics
    ]
    return _toml(
        {
            "name": vm.name,
            "memory": _size(vm.memory),
            "vcpus": 1,
            "machine": "pc-i440fx-7.2",
            "cpu": "max",
            "kernel": "vmlinuz",
            "initrd": "initrd",
            "kernel_arguments": f"{KERNEL_WORDS} {vm.arguments}",
            "network_rate": _rate(vm.rate),
        },
        *nics,
    )


def _tls(name: str) -> Mapping[str, Any]:
    certs = RUN / "certs"
    return {
        "ca": str(certs / "ca.pem"),
        "cert": str(certs / f"{name}.pem"),
        "key": str(certs / f"{name}.key"),
    }


def _rate(bits: int) -> str:
    return f"{bits // 1_000_000} Mbit/s" if bits % 1_000_000 == 0 else f"{bits} bit/s"


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size % (1 << 20) == 0 else f"{size} B"


def _toml(top: Mapping[str, Any], *tables: tuple[str, Mapping[str, Any]]) -> str:
    """TOML text; `[x]` names an element of an array of tables. Strings, numbers, booleans and
    lists of strings look the same in JSON and TOML, which is all that is needed here."""
    parts = [_pairs(top)]
    parts += [f"\n[{name}]\n{_pairs(table)}" for name, table in tables]
    return "".join(parts)


def _pairs(table: Mapping[str, Any]) -> str:
    return "".join(f"{key} = {_value(value)}\n" for key, value in table.items())


def _value(value: str | int | bool | Sequence[str]) -> str:
    return json.dumps(value)


def _write(path: Path, text: str) -> None:
    path.write_text(text)
