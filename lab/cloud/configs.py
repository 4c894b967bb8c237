"""The configuration files that a scenario means: agents, controller, VM definitions.

One function per file, so that a change of a format is a change of one function. Rates and sizes
are written with their units, as an operator would.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Mapping, Sequence

from .model import Host, Link, Plug, Vm
from .network import BRIDGE, CONTROLLER_IP, HOST_PORT, Cloud
from .ovs import OVSDB_PORT
from .shell import run
from .state import BUILD, RUN

AGENT_PORT = 7444
PAGE_PORT = 7445
CONTROLLER_PORT = 7443
OPENFLOW_PORT = 6653
CERTS = RUN / "certs"
CONTROLLER = "lab"
FABRIC = "fabric"
OPERATOR = "lab"
# no_timer_check: a guest under emulation that waits for a CPU while it boots would take its timer for broken.
KERNEL_WORDS = "console=ttyS0 quiet panic=-1 nokaslr tsc=unstable no_timer_check mitigations=off"


def write_all(cloud: Cloud) -> None:
    """Every file of the cloud."""
    for host in cloud.scenario.hosts:
        _write(RUN / host.name / "agent.toml", agent(host))
    _write(RUN / FABRIC / "agent.toml", fabric_agent())
    for vm in cloud.scenario.vms:
        if vm.disk:
            make_disk(vm, cloud.scenario.hosts)
        _write(RUN / vm.host / "vms" / f"{vm.name}.toml", definition(vm, cloud.scenario.guest_mtu))
    _write(RUN / "lab.toml", controller(cloud))


def agent(host: Host) -> str:
    """A host's agent."""
    folder = RUN / host.name
    roles = ["hypervisor", "switch"] + (["intermediary"] if host.stores else [])
    text = _agent(host.name, host.plug.management, folder, folder / "ovs", {
        "page_listen": f"{host.ip}:{PAGE_PORT}",
        "roles": roles,
        "memory": _size(host.memory),
    })
    stores = {"memory": _size(host.stores)}
    return text + (_toml(("intermediary", stores)) if host.stores else "")


def fabric_agent() -> str:
    """The agent on the fabric's machine, where all its switches are: it runs no VM."""
    folder = RUN / FABRIC
    return _agent(FABRIC, CONTROLLER_IP, folder, folder, {
        "page_listen": f"{CONTROLLER_IP}:{PAGE_PORT}",
        "roles": ["switch"],
        "memory": "0 MiB",
    })


def _agent(name: str, management: str, folder: Path, ovs: Path, own: Mapping[str, Any]) -> str:
    for sub in ("state", "vms", "qemu", "profiles", "disks"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    top = {
        "host": name,
        "listen": [f"unix:{folder}/agent.sock", f"{management}:{AGENT_PORT}"],
        "tls_dir": tls_dir("agent", name),
        "state_dir": str(folder / "state"),
        "run_dir": str(folder / "qemu"),
        "images_dir": str(BUILD),
        "vms_dir": str(folder / "vms"),
        "profiles_dir": str(folder / "profiles"),
        "disk_dirs": [str(folder / "disks")],
        **own,
    }
    # Emulated: nested virtualisation runs no stock kernel on every machine that has /dev/kvm.
    qemu = {"user": "nobody", "accelerator": "tcg"}
    return _pairs(top) + _toml(("qemu", qemu), ("ovs", {"database": f"unix:{ovs}/db.sock"}))


def controller(cloud: Cloud) -> str:
    """The controller: who is there, and what every link carries. The client's cable is not in
    it: no migration ever uses that."""
    scenario = cloud.scenario
    tables: list[tuple[str, Mapping[str, Any]]] = [("controller", {
        "listen": [f"unix:{RUN}/controller.sock", f"{CONTROLLER_IP}:{CONTROLLER_PORT}"],
        "openflow_listen": f"{CONTROLLER_IP}:{OPENFLOW_PORT}",
        "state_dir": str(RUN / "controller"),
        "tls_dir": tls_dir("controller", CONTROLLER),
    })]
    for host in scenario.hosts:
        tables.append(("[host]", {
            "name": host.name,
            "agent": f"{host.plug.management}:{AGENT_PORT}",
            "ovsdb": f"tcp:{host.plug.management}:{OVSDB_PORT}",
            "bridge": BRIDGE,
            "uplink": host.plug.uplink,
            "address": host.ip,
            "datapath_id": host.plug.datapath,
        }))
    for switch in scenario.switches:
        tables.append(("[switch]", {
            "name": switch.name,
            "datapath_id": switch.datapath,
            "ovsdb": f"tcp:{CONTROLLER_IP}:{OVSDB_PORT}",
            # Queues of a userspace datapath need a classifier on the switch's own machine.
            "agent": f"{CONTROLLER_IP}:{AGENT_PORT}",
            "agent_name": FABRIC,
        }))
    tables += [("[link]", link_table(link)) for link in scenario.links]
    tables += [("[link]", plug_table(host.name, host.plug)) for host in scenario.hosts]
    return _toml(*tables)


def link_table(link: Link) -> Mapping[str, Any]:
    """A link between two switches."""
    one, other = link.ends
    return {
        "a": f"{one.switch}:{one.port}",
        "b": f"{other.switch}:{other.port}",
        "capacity": _rate(link.capacity),
    }


def plug_table(name: str, plug: Plug) -> Mapping[str, Any]:
    """The link between a host's own bridge and its edge switch."""
    return {
        "a": f"{plug.edge.switch}:{plug.edge.port}",
        "b": f"{name}:{plug.uplink}",
        "capacity": _rate(plug.capacity_in),
        "capacity_back": _rate(plug.capacity),
    }


def definition(vm: Vm, mtu: int) -> str:
    """A VM, as its host's agent reads it. What it is promised of the network is what it takes."""
    # Ethernet's own is what a guest takes that is told nothing.
    told = {} if mtu == 1500 else {"mtu": mtu}
    nics = [
        ("[nic]", {"mac": nic.mac, "bridge": BRIDGE, "vlan_tag": nic.vlan, **told})
        for nic in vm.nics
    ]
    top = {
        "name": vm.name,
        "memory": _size(vm.memory),
        "vcpus": 1,
        "machine": "pc-i440fx-7.2",
        "cpu_model": "max",
        "kernel": "vmlinuz",
        "initrd": "initrd",
        "kernel_arguments": f"{KERNEL_WORDS} {vm.arguments}",
        "promised_network": _rate(vm.rate),
        "autostart": True,
    }
    # A plain name: each host has its own directory of disks.
    disks = [("[disk]", {"path": disk_name(vm), "format": "qcow2"})] if vm.disk else []
    return _pairs(top) + _toml(*nics, *disks)


def disk_name(vm: Vm) -> str:
    """What a VM's local disk is called on every host."""
    return f"{vm.name}.qcow2"


def make_disk(vm: Vm, hosts: Sequence[Host]) -> None:
    """A local disk: an overlay of a base of which every host has a copy, at the same place beside its
    disks. Of its two halves the guest writes the first one."""
    base, overlay = f"{vm.name}-base.raw", RUN / vm.host / "disks" / disk_name(vm)
    content = os.urandom(2 * vm.disk)
    for host in hosts:
        (RUN / host.name / base).write_bytes(content)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", f"../{base}", str(overlay))
    # QEMU runs as an unprivileged user.
    overlay.chmod(0o666)


def tls_dir(role: str, name: str) -> str:
    """Where `lifeboat certs init` puts the certificate of an agent, a controller or an operator."""
    return str(CERTS / f"{role}-{name}")


def certs_arguments(cloud: Cloud) -> list[str]:
    """The `lifeboat certs init` that makes every certificate of the cloud."""
    agents = [f"{host.name}={host.plug.management}" for host in cloud.scenario.hosts]
    agents.append(f"{FABRIC}={CONTROLLER_IP}")
    return ["certs", "init", str(CERTS), "--agent", ",".join(agents),
            "--controller", f"{CONTROLLER}={CONTROLLER_IP}", "--operator", OPERATOR]


def _rate(bits: int) -> str:
    return f"{bits // 1_000_000} Mbit/s" if bits and bits % 1_000_000 == 0 else f"{bits} bit/s"


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size % (1 << 20) == 0 else f"{size} B"


def _toml(*tables: tuple[str, Mapping[str, Any]]) -> str:
    """TOML text; `[x]` names an element of an array of tables. Strings, numbers, booleans and
    lists of strings look the same in JSON and TOML, which is all that is needed here."""
    return "".join(f"[{name}]\n{_pairs(table)}\n" for name, table in tables)


def _pairs(table: Mapping[str, Any]) -> str:
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())


def _write(path: Path, text: str) -> None:
    path.write_text(text)
