"""The lab's network, raised for real: it connects, its links carry what the scenario says, and
nothing of it is left on the machine afterwards.

Needs root. One cloud at a time can be up in a checkout; if one is, these tests say so and fail.
Deliberately not here: migrations (lab/demo, tests/tests).
"""

from __future__ import annotations

import json
import subprocess
import unittest
from pathlib import Path
from typing import Optional

ROOT = Path(__file__).resolve().parents[2]
UP_SECONDS = 60
TRIES = 5
LEAST = 150  # Mbit/s
HOSTS = ("h1", "h2", "h3", "h4", "h5")
WMEM = Path("/proc/sys/net/core/wmem_default")


def interfaces() -> set[str]:
    """Network interfaces of the machine's own namespace."""
    return {entry.name for entry in Path("/sys/class/net").iterdir()}


def inside(node: str, *command: str) -> str:
    """Runs a command on a node of the cloud and returns what it prints."""
    done = subprocess.run([ROOT / "lab/exec", node, *command], capture_output=True, text=True,
                          timeout=60, check=False)
    if done.returncode != 0:
        raise AssertionError(f"{node}: {command} ended with {done.returncode}:\n"
                             f"{done.stdout}{done.stderr}")
    return done.stdout


class Cloud:
    """lab/up without Lifeboat's own processes, for as long as a class of tests wants it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([ROOT / "lab/up", "--network-only"],
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.said: list[str] = []

    def wait_until_up(self) -> None:
        """Reads what it says until it says how to enter it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)
            if "enter it with lab/exec" in line:
                return
        raise AssertionError(f"lab/up ended with {self.process.wait()}:\n{''.join(self.said)}")

    def stop(self) -> int:
        """Ends it in order; it is killed if that takes too long."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.communicate(timeout=UP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
        return self.process.returncode


class TheNetworkOfTwoRacks(unittest.TestCase):
    cloud: Optional[Cloud] = None
    before: set[str] = set()
    wmem = ""

    @classmethod
    def setUpClass(cls) -> None:
        cls.before, cls.wmem = interfaces(), WMEM.read_text()
        cls.cloud = Cloud()
        cls.addClassCleanup(cls.cloud.stop)
        cls.cloud.wait_until_up()

    def address(self, node: str) -> str:
        scenario = json.loads((ROOT / "lab/run/scenario.json").read_text())
        return next(h["address"] for h in scenario["hosts"] if h["name"] == node).split("/")[0]

    def test_every_host_reaches_every_other_one(self) -> None:
        for host in HOSTS:
            for other in HOSTS:
                inside(host, "ping", "-q", "-c1", "-W2", self.address(other))

    def test_a_link_carries_what_the_scenario_says_and_no_more(self) -> None:
        # 200 Mbit/s and 2 % of slack, of which TCP's payload is 99.3 % in packets of 9000 bytes. A
        # busy machine does not fill the link; what it must never do is carry more.
        rates: list[float] = []
        while len(rates) < TRIES and max(rates, default=0.0) < LEAST:
            rates.append(self.measure("h1", "h3"))
        self.assertLess(max(rates), 204)
        self.assertGreater(max(rates), LEAST, rates)

    def measure(self, one: str, other: str) -> float:
        """Mbit/s of TCP payload from one host to another."""
        # Without --forceflush it says that it listens only when it has ended.
        server = subprocess.Popen(
            [ROOT / "lab/exec", other, "iperf3", "-s", "-1", "--forceflush"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        try:
            assert server.stdout is not None
            for line in server.stdout:
                if "listening" in line:
                    break
            said = inside(one, "iperf3", "-J", "-t3", "-O1", "-c", self.address(other))
            server.communicate(timeout=20)
        finally:
            server.kill()
            server.wait()
            server.stdout.close()
        return json.loads(said)["end"]["sum_received"]["bits_per_second"] / 1e6

    def test_nothing_of_it_is_on_the_machine_itself(self) -> None:
        self.assertEqual(interfaces(), self.before)
        self.assertEqual(WMEM.read_text(), self.wmem)

    def test_a_second_cloud_is_not_raised_beside_it(self) -> None:
        again = subprocess.run([ROOT / "lab/up", "--network-only", "--exec", "true"],
                               capture_output=True, text=True, timeout=60, check=False)
        self.assertNotEqual(again.returncode, 0)
        self.assertIn("a cloud is up already", again.stderr)


class Afterwards(unittest.TestCase):
    def test_a_command_that_fails_ends_the_cloud_with_its_exit_code(self) -> None:
        before = interfaces()
        done = subprocess.run([ROOT / "lab/up", "--network-only", "--exec", "sh", "-c", "exit 7"],
                              capture_output=True, text=True, timeout=UP_SECONDS, check=False)
        self.assertEqual(done.returncode, 7, done.stdout + done.stderr)
        self.assertEqual(interfaces(), before)
        self.assertFalse((ROOT / "lab/run/state.json").exists())


class BadScenarios(unittest.TestCase):
    def test_a_scenario_that_is_not_there_is_named(self) -> None:
        done = subprocess.run([ROOT / "lab/up", "no-such.toml"], capture_output=True, text=True,
                              timeout=60, check=False)
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("no-such.toml", done.stderr)


if __name__ == "__main__":
    unittest.main()
