"""Spoils an evacuation that went well, so that a developer sees the demo fail: --spoil WHAT.

Used by no test run and no operator; it proves that the checks look at the real thing. What is
spoilt here is what only a running cloud has; bad samples of everything else are in tests/mininet/.
"""

from __future__ import annotations

import subprocess
import time
from typing import Callable

from cloud.state import LAB

from .evidence import Evidence
from .standing import Standing


def gap(standing: Standing, evidence: Evidence) -> None:
    """Freezes a guest for half a second, long after its move."""
    del evidence
    vm = standing.ask("vms")["vms"][0]
    said = subprocess.run(
        [LAB / "exec", "sh", "-c", f"cat {LAB}/run/{vm['host']}/qemu/{vm['name']}/io/pid"],
        capture_output=True, text=True, check=True,
    )
    for word in ("STOP", "CONT"):
        subprocess.run([LAB / "exec", "kill", f"-{word}", said.stdout.strip()], check=True)
        time.sleep(0.5)


def flow(standing: Standing, evidence: Evidence) -> None:
    """Leaves a flow on a switch of the fabric."""
    del standing, evidence
    added = "cookie=0x4c42,priority=7,in_port=1,actions=drop"
    subprocess.run([LAB / "exec", "ovs-ofctl", "-O", "OpenFlow13", "add-flow", "s1", added],
                   check=True)


def qemu(standing: Standing, evidence: Evidence) -> None:
    """Starts a QEMU on the host that was emptied."""
    words = ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-S", "-name", "guest=ghost"]
    standing.on(evidence.host, words)
    time.sleep(1)


SPOILS: dict[str, Callable[[Standing, Evidence], None]] = {"gap": gap, "flow": flow, "qemu": qemu}
