"""What is known of the running cloud, for lab/exec, lab/down and the tests: a few files.

    run/lock            held (flock) by lab/up's process as long as the cloud is up
    run/wrapper.pid     lab/up's process, as the machine sees it
    run/init.pid        process 1 of the private namespaces, as the machine sees it
    run/state.json      nodes and their shells' pids *inside*, binaries, services
    run/scenario.json   the checked scenario
    run/wmem_default    what net.core.wmem_default was before, while it is raised
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Optional

LAB = Path(__file__).resolve().parent.parent
ROOT = LAB.parent
RUN = LAB / "run"
BUILD = LAB / "build"
# What the inside tells the outside when the network is up.
UP = b"up"
# An OVS socket is RUN/client/ovs/ovs-vswitchd.NNNNN.ctl, and the kernel allows 107 bytes.
RUN_LENGTH = 107 - len("/client/ovs/ovs-vswitchd.4194304.ctl")


def lifeboat_env() -> dict[str, str]:
    """What lifeboat's own commands need to find this cloud's controller."""
    return {"LIFEBOAT_LAB_RUN": str(RUN), "LIFEBOAT_SERVER": f"unix:{RUN}/controller.sock"}


class LabError(Exception):
    """What stands in the way, and what to do: told to the operator as it is."""


@dataclass
class State:
    """The running cloud."""

    scenario: str
    nodes: dict[str, int]
    binaries: str
    services: dict[str, int] = field(default_factory=dict)

    def save(self) -> None:
        """Writes it whole or not at all."""
        beside = RUN / "state.json.new"
        beside.write_text(json.dumps(asdict(self), indent=1))
        beside.rename(RUN / "state.json")

    @staticmethod
    def load() -> State:
        try:
            return State(**json.loads((RUN / "state.json").read_text()))
        except FileNotFoundError as missing:
            raise LabError("no cloud is up (or not yet): start one with lab/up") from missing


class Lock:
    """Held while a cloud is up. The kernel lets go of it when its process dies."""

    def __init__(self) -> None:
        RUN.mkdir(parents=True, exist_ok=True)
        self.file = open(RUN / "lock", "w", encoding="ascii")

    def take(self) -> bool:
        """True if nobody had it."""
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        """Lets go of it."""
        self.file.close()


def is_up() -> bool:
    """True while some lab/up holds the lock."""
    lock = Lock()
    free = lock.take()
    lock.release()
    return not free


def read_pid(name: str) -> Optional[int]:
    """A pid that was written to the run folder."""
    try:
        return int((RUN / name).read_text())
    except (FileNotFoundError, ValueError):
        return None


def clear_run() -> None:
    """Removes what an earlier cloud left, but not the lock."""
    if len(os.fsencode(RUN)) > RUN_LENGTH:
        raise LabError(
            f"{RUN} is too long a path for Open vSwitch's sockets: check out Lifeboat in a "
            f"folder at least {len(os.fsencode(RUN)) - RUN_LENGTH} characters shorter"
        )
    for entry in RUN.iterdir():
        if entry.name == "lock":
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
