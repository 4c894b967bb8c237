"""Bad input to a live controller: the error says what, why and what to do, and nothing changes.

"Nothing changes" is looked at, not believed: links, tc, queues, QoS, flows, meters and processes
of every node before and after each refusal. Needs what evacuation_test.py needs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import unittest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "lab"))

# pylint: disable=wrong-import-position
from cloud.state import RUN, State  # noqa: E402
from demonstration.standing import Standing  # noqa: E402

TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
SMALL = ROOT / "tests/mininet/small.toml"
TCP = "10.99.0.254:7443"
CONNECT_SECONDS = 60


def inside(*command: str, node: str = "") -> subprocess.CompletedProcess[str]:
    """Runs a command in the cloud."""
    where = [node] if node else []
    return subprocess.run([ROOT / "lab/exec", *where, *command], capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, timeout=120, check=False)


STANDING = Standing(TARGET / "debug", keep=False)


def setUpModule() -> None:  # pylint: disable=invalid-name
    """One cloud for all of these: none of them may change it."""
    unittest.addModuleCleanup(STANDING.end)
    STANDING.raise_it(str(SMALL))
    deadline = time.monotonic() + CONNECT_SECONDS
    while not is_ready():
        if time.monotonic() > deadline:
            raise AssertionError(f"the cloud is not ready: {STANDING.not_connected()}")
        time.sleep(0.5)


def is_ready() -> bool:
    """Hosts and switches connected, the guest running."""
    return not STANDING.not_connected() and [
        (vm["name"], vm["host"], vm["state"]) for vm in STANDING.ask("vms")["vms"]
    ] == [("solo", "h1", "running")]


class Refusals(unittest.TestCase):
    def setUp(self) -> None:
        self.before: Any = STANDING.look()

    def unchanged(self) -> None:
        """Every node is as it was before the test."""
        self.assertEqual(STANDING.look(), self.before, "something has changed")

    def refused(self, *words: str, code: int = 1) -> str:
        """Runs a command that must be refused, and returns its one sentence."""
        said = inside("lifeboat", *words)
        self.assertEqual(said.returncode, code, said.stdout + said.stderr)
        self.unchanged()
        return said.stderr

    def says(self, text: str, *parts: str) -> None:
        """What was asked, what stood in the way, what to do."""
        for part in parts:
            self.assertIn(part, text)


class ALiveController(Refusals):
    def test_an_unknown_host(self) -> None:
        said = self.refused("evacuate", "h9", "--yes")
        self.says(said, "no host `h9`", "h1, h2, h3")

    def test_an_unknown_vm(self) -> None:
        said = self.refused("migrate", "nobody", "--to", "h2", "--yes")
        self.says(said, "no VM `nobody`", "lifeboat vms")

    def test_an_unknown_destination(self) -> None:
        said = self.refused("migrate", "solo", "--to", "h9", "--yes")
        self.says(said, "no host `h9`", "h1, h2, h3")

    def test_a_vm_that_is_there_already(self) -> None:
        said = self.refused("migrate", "solo", "--to", "h1", "--yes")
        self.says(said, "solo is already at h1", "name another host")

    def test_an_urgency_of_140(self) -> None:
        said = self.refused("evacuate", "h1", "--urgency", "140", "--yes")
        self.says(said, "140", "100")

    def test_an_intermediary_that_is_not_there(self) -> None:
        said = self.refused("evacuate", "h1", "--mode", "scatter-gather", "--intermediaries", "h9",
                            "--yes")
        self.says(said, "no host `h9`", "h1, h2, h3")

    def test_an_order_that_nobody_can_confirm(self) -> None:
        said = self.refused("evacuate", "h1")
        self.says(said, "there is no terminal to ask on", "--yes")

    def test_no_certificate(self) -> None:
        said = self.refused("--server", TCP, "hosts")
        self.says(said, TCP, "--tls-dir")

    def test_a_certificate_of_another_role(self) -> None:
        said = self.refused("--server", TCP, "--tls-dir", str(RUN / "certs/agent-h1"),
                            "evacuate", "h1", "--yes")
        self.says(said, "agent", "operator")

    def test_a_certificate_of_an_operator_is_taken(self) -> None:
        said = inside("lifeboat", "--server", TCP, "--tls-dir", str(RUN / "certs/operator-lab"),
                      "hosts")
        self.assertEqual(said.returncode, 0, said.stderr)

    def test_no_destination_with_enough_memory(self) -> None:
        said = inside("lifeboat", "plan", "h1", "--to", "h3")
        self.assertEqual(said.returncode, 0, said.stderr)
        self.says(said.stdout, "stays: solo at h1", "h3", "MiB")
        self.unchanged()


class AForeignQos(Refusals):
    def test_of_a_kind_that_cannot_be_joined_stays_and_so_does_the_vm(self) -> None:
        inside("ovs-vsctl", "--", "--id=@q", "create", "QoS", "type=linux-hfsc", "--",
               "set", "Port", "h1-up", "qos=@q", node="h1")
        self.addCleanup(inside, "ovs-vsctl", "--all", "destroy", "QoS", node="h1")
        self.addCleanup(inside, "ovs-vsctl", "clear", "Port", "h1-up", "qos", node="h1")
        self.setUp()
        said = inside("lifeboat", "evacuate", "h1", "--yes")
        self.assertEqual(said.returncode, 3, said.stdout + said.stderr)
        self.says(said.stdout, "left-behind", "h1-up", "linux-hfsc", "not Lifeboat's",
                  "remove it")
        self.unchanged()


class WithoutItsAgent(Refusals):
    """Comes last, by its name: the agent does not come back."""

    def test_a_host_is_named_and_nothing_is_tried(self) -> None:
        inside("kill", "-TERM", str(State.load().services["agent-h1"]))
        deadline = time.monotonic() + 30
        while STANDING.ask("hosts")["hosts"][0]["connected"]:
            self.assertLess(time.monotonic(), deadline, "its loss was not noticed")
            time.sleep(0.5)
        said = self.refused("evacuate", "h1", "--yes")
        self.says(said, "h1", "agent")
        # The guest is none the worse for it: its QEMU outlives the agent.
        self.assertEqual([one["vm"] for one in self.before["h1"]["processes"]], ["solo"])


if __name__ == "__main__":
    unittest.main()
