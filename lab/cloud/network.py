"""The network of a scenario, raised with Mininet.

Three networks, none of which reaches the machine's own:
 - data: hosts' bridges, cables, the fabric's switches; pages and the guests' traffic;
 - management: one Linux bridge (10.99.0.254, the controller's address) and a veth to every host;
   gRPC, OVSDB and OpenFlow go here, so that a full data link never cuts the controller off;
 - none else: no NAT, no way out.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mininet.net import Mininet
from mininet.node import Host as MininetHost
from mininet.node import OVSSwitch

from .cable import Cable
from .model import Plug, Scenario
from .ovs import Ovs
from .shell import run, sysctl

CONTROLLER_IP = "10.99.0.254"
MANAGEMENT = "mgmt"
BRIDGE = "br0"
HOST_PORT = "mig0"


class Cloud:
    """A raised scenario."""

    def __init__(self, scenario: Scenario, folder: Path, datapath: str) -> None:
        self.scenario = scenario
        self.folder = folder
        self.datapath = datapath
        self.fabric = Ovs(folder / "fabric", None, datapath)
        self.net = _empty_mininet()
        self.bridges: dict[str, Ovs] = {}

    def node(self, name: str) -> Any:
        """A Mininet node by name."""
        return self.net.nameToNode[name]

    def raise_all(self) -> None:
        """Everything up to working forwarding; the controller is not needed for it."""
        run("ip", "link", "set", "lo", "up")
        sysctl("net.ipv6.conf.all.disable_ipv6", 1)
        sysctl("net.ipv6.conf.default.disable_ipv6", 1)
        self._management_bridge()
        self.fabric.start(CONTROLLER_IP, "fabric")
        self._nodes_and_cables()
        with ThreadPoolExecutor(max_workers=4) as pool:
            jobs = [pool.submit(self._host, name, plug) for name, plug in self._plugs()]
            for job in jobs:
                job.result()
        self._fabric()
        self._addresses()
        self._first_packets()

    def _plugs(self) -> list[tuple[str, Plug]]:
        hosts = [(host.name, host.plug) for host in self.scenario.hosts]
        return [*hosts, ("client", self.scenario.client.plug)]

    def _management_bridge(self) -> None:
        run("ip", "link", "add", MANAGEMENT, "type", "bridge")
        run("ip", "address", "add", f"{CONTROLLER_IP}/24", "dev", MANAGEMENT)
        run("ip", "link", "set", MANAGEMENT, "up")

    def _nodes_and_cables(self) -> None:
        kind = "user" if self.datapath == "netdev" else "kernel"
        for switch in self.scenario.switches:
            self.net.addSwitch(
                switch.name, cls=OVSSwitch, dpid=switch.datapath, datapath=kind,
                failMode="secure", protocols="OpenFlow13",
            )
        for name, _ in self._plugs():
            self.net.addHost(name, cls=MininetHost, ip=None)
        for link in self.scenario.links:
            one, other = link.ends
            self._cable(one.switch, other.switch, one.port, other.port,
                        (link.capacity, link.capacity))
        for name, plug in self._plugs():
            self._cable(name, plug.edge.switch, plug.uplink, plug.edge.port,
                        (plug.capacity_in, plug.capacity))

    def _cable(self, one: str, other: str, port1: str, port2: str,
               capacity: tuple[int, int]) -> None:
        """The capacities are those towards `one` and towards `other`."""
        self.net.addLink(one, other, cls=Cable, intfName1=port1, intfName2=port2,
                         capacity=capacity, mtu=self.scenario.mtu,
                         queue_ms=self.scenario.queue_ms)

    def _host(self, name: str, plug: Plug) -> None:
        """The management veth and the host's own Open vSwitch with its uplink."""
        pid = self.node(name).pid
        sysctl("net.ipv6.conf.all.disable_ipv6", 1, pid)
        sysctl("net.ipv6.conf.default.disable_ipv6", 1, pid)
        run("ip", "link", "set", "lo", "up", pid=pid)
        outer = f"{MANAGEMENT}-{name}"
        run("ip", "link", "add", outer, "type", "veth", "peer", "name", "mgmt0", "netns", str(pid))
        run("ip", "link", "set", outer, "master", MANAGEMENT, "up")
        run("ip", "address", "add", f"{plug.management}/24", "dev", "mgmt0", pid=pid)
        run("ip", "link", "set", "mgmt0", "up", pid=pid)
        ovs = Ovs(self.folder / name / "ovs", pid, self.datapath)
        ovs.start(plug.management, name)
        ovs.bridge(BRIDGE, plug.datapath)
        ovs.vsctl(f"add-port {BRIDGE} {plug.uplink}")
        ovs.govern(BRIDGE)
        self.bridges[name] = ovs

    def _fabric(self) -> None:
        self.net.start()
        for switch in self.scenario.switches:
            self.fabric.govern(switch.name)

    def _addresses(self) -> None:
        for host in self.scenario.hosts:
            self.bridges[host.name].internal(BRIDGE, HOST_PORT, host.address,
                                             mtu=self.scenario.mtu)
        client, made = self.bridges["client"], {}
        for network in self.scenario.client.networks:
            name = f"vlan{network.vlan}" if network.vlan else "data0"
            if name in made:
                client.address(name, network.address)
            else:
                client.internal(BRIDGE, name, network.address, network.vlan,
                                self.scenario.guest_mtu)
            made[name] = network

    def _first_packets(self) -> None:
        """Sends a packet from everywhere, which proves the network and opens every
        ovs-vswitchd's sending socket while the larger default buffer is in force."""
        client = self.scenario.client.networks[0].address.split("/")[0]
        with ThreadPoolExecutor(max_workers=4) as pool:
            jobs = [
                pool.submit(run, "ping", "-q", "-c1", "-i0.2", "-w10", client,
                            pid=self.node(host.name).pid)
                for host in self.scenario.hosts
            ]
            for job in jobs:
                job.result()


def _empty_mininet() -> Mininet:
    # Mininet raises limits of the whole machine the first time it is used; two racks do not need
    # them, and a lab leaves its machine as it found it.
    Mininet.inited = True
    return Mininet(controller=None, link=Cable, autoSetMacs=False, waitConnected=False)
