"""A cable: a Mininet link whose capacity holds whatever the switches at its ends configure.

The ports at both ends belong to Open vSwitch, and Lifeboat puts its QoS on them. OVS replaces
whatever qdisc it finds on a port when a QoS row is attached, and takes its own away when the row
goes; a capacity enforced there (Mininet's TCLink) would be gone after the first reservation, and
a QoS row of the lab's own would be somebody else's row on every port. Arriving packets cannot be
limited at all: the userspace datapath takes them before tc's ingress hook. So the capacity sits
where a real one does, in the cable:

    node1                   the lab's own namespace                      node2
    name1 ====veth==== name1-c --- bridge --- name2-c ====veth==== name2
                          ^ tbf: towards node1    ^ tbf: towards node2

Frames to a node leave through the `-c` end that faces it, and that end's token bucket lets pass
what the link carries. It is 2 % quicker than the scenario says, so that a port shaped to the
link's nominal rate is the bottleneck and its queues decide who goes first: two shapers of one
rate in a row would share that decision. A full bucket's queue holds 25 ms, or what the scenario says,
and then drops, as a switch's buffer does.
"""

from __future__ import annotations

from itertools import count
from typing import Any

from mininet.link import Link

from .shell import run

SLACK = 1.02
BURST_SECONDS = 0.002
BURST_LEAST = 32 * 1024

_numbers = count(1)


class Cable(Link):
    """A Link with a capacity in bit/s towards each of its ends:
    `net.addLink(a, b, cls=Cable, capacity=(to_a, to_b))`."""

    def __init__(self, *args: Any, capacity: tuple[int, int], mtu: int = 1500,
                 queue_ms: int = 25, **params: Any) -> None:
        self.capacity = capacity
        self.mtu = mtu
        self.queue_seconds = queue_ms / 1000
        super().__init__(*args, **params)

    # Mininet calls this for every new link; its name and order are Mininet's.
    def makeIntfPair(  # pylint: disable=invalid-name,arguments-differ
        self,
        name1: str,
        name2: str,
        addr1: str,
        addr2: str,
        node1: Any,
        node2: Any,
        deleteIntfs: bool = False,
    ) -> None:
        del deleteIntfs  # the namespaces are new: there is nothing to delete
        bridge = f"cable{next(_numbers)}"
        steps = [
            # A cable learns nothing and keeps nothing back, LLDP included.
            f"link add {bridge} type bridge ageing_time 0 group_fwd_mask 0xfff8 mcast_snooping 0",
            *_half(name1, addr1, node1, bridge, self.mtu),
            *_half(name2, addr2, node2, bridge, self.mtu),
            f"link set {bridge} up",
        ]
        run("ip", "-batch", "-", stdin="\n".join(steps) + "\n")
        ends = zip((name1, name2), (node1, node2), self.capacity)
        for name, node, capacity in ends:
            _limit(f"{name}-c", capacity, self.queue_seconds)
            # The userspace datapath completes no checksums that a sender left to the hardware.
            run("ethtool", "-K", name, "tx", "off", pid=_pid(node))


def _pid(node: Any) -> int | None:
    return node.pid if node.inNamespace else None


def _half(name: str, mac: str, node: Any, bridge: str, mtu: int) -> list[str]:
    where = f"netns {node.pid}" if node.inNamespace else ""
    return [
        f"link add {name}-c mtu {mtu} type veth peer name {name} address {mac} mtu {mtu} {where}",
        f"link set {name}-c master {bridge} up",
    ]


def _limit(end: str, capacity: int, queue_seconds: float) -> None:
    rate = int(capacity * SLACK)
    burst = max(int(rate / 8 * BURST_SECONDS), BURST_LEAST)
    limit = int(rate / 8 * queue_seconds) + burst
    bucket = ("tbf", "rate", f"{rate}bit", "burst", str(burst), "limit", str(limit))
    run("tc", "qdisc", "add", "dev", end, "root", *bucket)
