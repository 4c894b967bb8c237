"""An Open vSwitch of its own: ovsdb-server and ovs-vswitchd in a folder and a namespace.

The fabric's switches share one; every host has its own, as a real host has. The machine's own
Open vSwitch is never asked or touched: every command gets the folder by OVS_RUNDIR.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from .shell import CommandFailed, run

SCHEMA = "/usr/share/openvswitch/vswitch.ovsschema"
OVSDB_PORT = 6640
OPENFLOW = "tcp:10.99.0.254:6653"
# The client takes datagrams for hours and answers none: a switch that forgot where it is (after 300
# seconds, unless told otherwise) would flood them to every guest.
MAC_AGING_SECONDS = 3600
# Reconnect quickly after a controller's restart; never ask for addresses in band.
CONTROLLER = (
    f"target=\"{OPENFLOW}\" max_backoff=1000 inactivity_probe=5000 connection_mode=out-of-band"
)


@dataclass(frozen=True)
class Ovs:
    """A running pair of daemons."""

    folder: Path
    pid: Optional[int]  # of a process in its namespace; None: ours
    datapath_type: str  # netdev (userspace) or system (kernel)

    @property
    def env(self) -> dict[str, str]:
        """What OVS' own tools need to find these daemons."""
        folder = str(self.folder)
        return {
            "OVS_RUNDIR": folder,
            "OVS_LOGDIR": folder,
            "OVS_DBDIR": folder,
            "OVS_SYSCONFDIR": folder,
        }

    def start(self, address: str, system_id: str) -> None:
        """Starts both daemons; the database is served on the management address too."""
        self.folder.mkdir(parents=True, exist_ok=True)
        database, socket = self.folder / "conf.db", self.folder / "db.sock"
        self.run("ovsdb-tool", "create", str(database), SCHEMA)
        self.run(
            "ovsdb-server",
            str(database),
            f"--remote=punix:{socket}",
            f"--remote=ptcp:{OVSDB_PORT}:{address}",
            "--pidfile",
            "--detach",
            f"--log-file={self.folder}/ovsdb-server.log",
            "-vconsole:off",
        )
        self.run("ovs-vsctl", "--no-wait", "init", "--", "set", "Open_vSwitch", ".",
                 f"external-ids:system-id={system_id}")
        self.run(
            "ovs-vswitchd",
            f"unix:{socket}",
            "--pidfile",
            "--detach",
            f"--log-file={self.folder}/ovs-vswitchd.log",
            "-vconsole:off",
        )

    def run(self, *argv: str) -> str:
        """Runs one of OVS' tools on these daemons."""
        return run(*argv, pid=self.pid, env=self.env)

    def vsctl(self, *clauses: str) -> None:
        """Runs clauses as one transaction and waits until ovs-vswitchd has carried them out."""
        words = [word for clause in clauses for word in ("--", *clause.split())]
        self.run("ovs-vsctl", "--timeout=10", *words)

    def govern(self, bridge: str) -> None:
        """Points a bridge to the controller, and lets it forward without one meanwhile.

        Secure with a flow of lowest priority, not standalone: a standalone bridge overrides its
        flows while it has no controller. The flow comes last: setting the first controller of a
        bridge flushes its flows.
        """
        self.vsctl(
            f"--id=@c create Controller {CONTROLLER}",
            f"set Bridge {bridge} controller=@c fail_mode=secure protocols=OpenFlow13"
            f" other-config:mac-aging-time={MAC_AGING_SECONDS}",
        )
        self.run("ovs-ofctl", "-O", "OpenFlow13", "add-flow", bridge, "priority=0,actions=NORMAL")

    def bridge(self, name: str, datapath: str) -> None:
        """Makes a bridge."""
        self.vsctl(
            f"add-br {name}",
            f"set Bridge {name} datapath_type={self.datapath_type} fail_mode=secure"
            f" protocols=OpenFlow13 other-config:datapath-id={datapath}"
            " other-config:disable-in-band=true",
        )

    def internal(
        self, bridge: str, name: str, address: str, vlan: int = 0, mtu: int = 1500
    ) -> None:
        """Gives the namespace itself a port on the bridge."""
        tag = f" tag={vlan}" if vlan else ""
        self.vsctl(f"add-port {bridge} {name}{tag}",
                   f"set Interface {name} type=internal mtu_request={mtu}")
        run("ethtool", "-K", name, "tx", "off", pid=self.pid)
        self.address(name, address)

    def address(self, name: str, address: str) -> None:
        """Adds an address to an interface of the namespace and sets it up."""
        run("ip", "address", "add", address, "dev", name, pid=self.pid)
        run("ip", "link", "set", name, "up", pid=self.pid)


def datapath_type() -> str:
    """The kernel's datapath where its module is (or can be) loaded, else the userspace one."""
    module = Path("/sys/module/openvswitch")
    if not module.exists() and shutil.which("modprobe"):
        try:
            run("modprobe", "openvswitch")
        except CommandFailed:
            pass  # this kernel has no such module, which is an answer too
    return "system" if module.exists() else "netdev"
