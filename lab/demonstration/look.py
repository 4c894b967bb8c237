"""Looks at everything that Lifeboat could leave behind, and prints it as JSON.

Runs inside the cloud's namespaces (`lab/exec python3 -m demonstration.look`): processes, links,
tc and Open vSwitch of every node, each asked itself. What only counts (packets, ages, ids of
rows) is left out, so that two looks at the same state are equal. Judges nothing: leftovers.py.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any, Optional

from cloud.shell import run
from cloud.state import RUN, State

FABRIC = "fabric"
TABLES = {
    # Rows are told apart by what they say, not by their ids.
    "qos": ("QoS", "type,other_config,external_ids"),
    "queues": ("Queue", "dscp,other_config,external_ids"),
    "ports": ("Port", "name,tag,external_ids"),
    "taps": ("Interface", "name,external_ids"),
}


def main() -> int:
    """One JSON object: node -> what was seen there."""
    nodes: dict[str, Optional[int]] = {FABRIC: None, **State.load().nodes}
    json.dump({name: node(name, pid) for name, pid in nodes.items()}, sys.stdout)
    return 0


def node(name: str, pid: Optional[int]) -> dict[str, Any]:
    """One node: a host with its own bridge, or the fabric with all its switches."""
    links = link_names(pid)
    folder = str(RUN / (FABRIC if name == FABRIC else f"{name}/ovs"))
    env = {key: folder for key in ("OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR", "OVS_SYSCONFDIR")}
    return {
        "links": links,
        "tc": traffic_control(pid, links),
        "processes": processes(pid),
        **open_vswitch(pid, env),
    }


def link_names(pid: Optional[int]) -> list[str]:
    """Interfaces, by name."""
    lines = run("ip", "-o", "link", "show", pid=pid).splitlines()
    return sorted(line.split(": ")[1].split("@")[0] for line in lines)


def traffic_control(pid: Optional[int], links: list[str]) -> list[str]:
    """Every qdisc, class and filter of a node."""
    seen = [f"qdisc {line}" for line in _lines(run("tc", "qdisc", "show", pid=pid))]
    with_classes = {line.split(" dev ")[1].split()[0] for line in seen if " noqueue " not in line}
    for link in sorted(with_classes & set(links)):
        for kind in ("class", "filter"):
            said = run("tc", kind, "show", "dev", link, pid=pid)
            seen += [f"{kind} dev {link} {line}" for line in _lines(said)]
    for link in (link for link in links if f"clsact ffff: dev {link} " in "\n".join(seen)):
        for hook in ("ingress", "egress"):
            said = run("tc", "filter", "show", "dev", link, hook, pid=pid)
            seen += [f"filter dev {link} {hook} {line}" for line in _lines(said)]
    return sorted(seen)


def _lines(text: str) -> list[str]:
    """Lines of tc without what only counts."""
    return [re.sub(r" refcnt \d+", "", line).strip() for line in text.splitlines() if line.strip()]


def processes(pid: Optional[int]) -> list[dict[str, Any]]:
    """The QEMUs in a node's network namespace, with the VM that each was started for."""
    wanted = os.readlink(f"/proc/{pid or 'self'}/ns/net")
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _namespace(entry) == wanted:
            words = _words(entry)
            if words and "qemu-system" in words[0]:
                found.append({"pid": int(entry.name), "vm": _guest_of(words)})
    return sorted(found, key=lambda one: one["pid"])


def _namespace(entry: Path) -> str:
    try:
        return os.readlink(entry / "ns/net")
    except OSError:
        return ""  # it has ended meanwhile


def _words(entry: Path) -> list[str]:
    try:
        return (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _guest_of(words: list[str]) -> str:
    for option, value in zip(words, words[1:]):
        if option == "-name" and value.startswith("guest="):
            return value.removeprefix("guest=").split(",")[0]
    return ""


def open_vswitch(pid: Optional[int], env: dict[str, str]) -> dict[str, Any]:
    """Rows of the database; flows and meters of every bridge."""
    seen: dict[str, Any] = {key: rows(pid, env, *what) for key, what in TABLES.items()}
    seen["shaped"] = shaped_ports(pid, env)
    seen["flows"], seen["meters"] = {}, {}
    for bridge in run("ovs-vsctl", "list-br", pid=pid, env=env).split():
        switch = ("ovs-ofctl", "-O", "OpenFlow13")
        flows = run(*switch, "--no-stats", "dump-flows", bridge, pid=pid, env=env)
        seen["flows"][bridge] = sorted(line.strip() for line in flows.splitlines() if "=" in line)
        meters = run(*switch, "dump-meters", bridge, pid=pid, env=env).splitlines()
        seen["meters"][bridge] = sorted(line.strip() for line in meters if "meter=" in line)
    return seen


def rows(pid: Optional[int], env: dict[str, str], table: str, columns: str) -> list[str]:
    """The rows of a table, each as one line."""
    said = run("ovs-vsctl", "--format=json", f"--columns={columns}", "list", table, pid=pid,
               env=env)
    return sorted(json.dumps(row) for row in json.loads(said)["data"])


def shaped_ports(pid: Optional[int], env: dict[str, str]) -> list[str]:
    """The names of the ports that have a QoS row."""
    said = run("ovs-vsctl", "--format=json", "--columns=name,qos", "list", "Port", pid=pid, env=env)
    data = json.loads(said)["data"]
    return sorted(name for name, qos in data if qos and qos[0] == "uuid")


if __name__ == "__main__":
    sys.exit(main())
