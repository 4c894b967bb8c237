"""An evacuation on the lab's cloud, for real: the short form of lab/demo, with all its checks.

Needs root, the guest image (lab/image) and Lifeboat's programs, which tests/run has built. One
cloud at a time can be up in a checkout. Deliberately not here: what the checks make of bad
samples (demo_checks_test.py), and the full demo, which is an operator's (lab/demo).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
import unittest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
SMALL = ROOT / "tests/mininet/small.toml"
DEMO_SECONDS = 240
FULL = os.environ.get("LIFEBOAT_TESTS") == "full"


def demo(*more: str) -> list[str]:
    """The demo of one small guest, with the programs that are being tested."""
    return [str(ROOT / "lab/demo"), "--scenario", str(SMALL), "--binaries", str(TARGET / "debug"),
            *more]


def run_demo(*more: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Runs it to its end; what it said, and what it recorded."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        done = subprocess.run(demo("--json", str(record), *more), stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, timeout=DEMO_SECONDS,
                              check=False)
        return done, json.loads(record.read_text()) if record.exists() else {}


class OneSmallGuest(unittest.TestCase):
    def test_it_is_evacuated_and_every_check_holds(self) -> None:
        done, record = run_demo()
        self.assertEqual(done.returncode, 0, done.stdout)
        self.assertTrue(record["ok"])
        moved = record["report"]["vms"][0]
        # h3 has no room for it.
        self.assertEqual((moved["vm"], moved["destination"]), ("solo", "h2"))
        self.assertTrue(moved["network_downtime_known"])
        hosts = {file["host"] for file in record["verified"]["solo"]}
        self.assertLessEqual({"h2", "h3"}, hosts)
        self.assertIn("solo.qcow2", record["disks"]["h2"])
        self.assertIn("solo-base.raw", done.stdout)
        self.assertFalse((ROOT / "lab/run/state.json").exists())

    # What each check makes of what is left is demo_checks_test.py's, and quick.
    @unittest.skipUnless(FULL, "takes long: tests/full")
    def test_the_demo_fails_when_a_flow_is_left(self) -> None:
        done, record = run_demo("--spoil", "flow")
        self.assertEqual(done.returncode, 1, done.stdout)
        left = record["checks"][-1]
        self.assertFalse(left["held"])
        self.assertIn("cookie=0x4c42", left["faults"][0])


class CtrlC(unittest.TestCase):
    def test_an_interrupted_demo_leaves_no_cloud(self) -> None:
        before = {entry.name for entry in Path("/sys/class/net").iterdir()}
        # A background job of a script ignores Ctrl-C, and so would all that it starts; whoever sits
        # at a terminal does not.
        listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
        with subprocess.Popen(demo(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True, preexec_fn=listen) as running:
            assert running.stdout is not None
            for line in running.stdout:
                if "waiting for the agents" in line:
                    break
            time.sleep(2)  # into the middle of it, where QEMUs are being started
            running.send_signal(signal.SIGINT)
            said, _ = running.communicate(timeout=60)
        self.assertEqual(running.returncode, 130, said)
        self.assertEqual({entry.name for entry in Path("/sys/class/net").iterdir()}, before)
        free = subprocess.run([ROOT / "lab/exec", "true"], capture_output=True, text=True,
                              check=False)
        self.assertIn("no cloud is up", free.stderr)


if __name__ == "__main__":
    unittest.main()
