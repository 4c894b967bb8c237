"""The demo's checks refuse what they must refuse.

Each test takes the record of an evacuation that went well (testdata/evacuation.json: real guests,
real switches), spoils one thing in it, and sees exactly the one check break that asks for it.
Pure: no cloud, no root.
"""

from __future__ import annotations

import copy
import json
import sys
import unittest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "lab"))

# pylint: disable=wrong-import-position
from cloud.state import RUN  # noqa: E402
from demonstration import telling  # noqa: E402
from demonstration.checks import QUESTIONS, judge  # noqa: E402
from demonstration.evidence import Evidence, Guest, Held  # noqa: E402
from demonstration.gaps import Span, left_of  # noqa: E402
from demonstration.serial import Account, Tick  # noqa: E402
from demonstration.uplink import dropped, drops  # noqa: E402
from demonstration.waiting import Wait, Waits, owner_of, waited  # noqa: E402

SAMPLE = json.loads((Path(__file__).parent / "testdata/evacuation.json").read_text())
(RUNS, EMPTY, BYTES, READ, DISK, BASE, LIFE, GAPS, TCP, PAUSE, SHARE, LEFT) = (
    name for name, _ in QUESTIONS)


def evidence(record: Any) -> Evidence:
    """A record, read back."""
    accounts = {}
    for name, said in record["serial"].items():
        ticks = [Tick(**tick) for tick in said["ticks"]]
        accounts[name] = Account(said["boots"], ticks, said["alarms"], said["before"])
    return Evidence(
        host=record["host"],
        guests=[Guest(**guest) for guest in record["guests"]],
        plan=record["plan"],
        report=record["report"],
        vms=record["vms"],
        verified=record.get("verified", {}),
        disks=record.get("disks", {}),
        client=record["client"],
        accounts=accounts,
        before=record["looks"]["before"],
        after=record["looks"]["after"],
        held=[Held(**one) for one in record["reserved"]],
        waits=Waits(Wait(**one) for one in record.get("waits", [])),
        full=[Span(**one) for one in record.get("uplink_full", [])],
    )


class Spoilt(unittest.TestCase):
    """`self.record` is a copy to spoil; its only guest is `self.name`."""

    def setUp(self) -> None:
        self.record = copy.deepcopy(SAMPLE)
        self.name = self.record["guests"][0]["name"]
        self.row = self.record["report"]["vms"][0]
        self.client = self.record["client"]["guests"][0]
        self.said = self.record["serial"][self.name]
        self.after = self.record["looks"]["after"]

    def broken(self) -> dict[str, list[str]]:
        """The checks that do not hold, and why."""
        return {check.name: check.faults for check in judge(evidence(self.record))
                if not check.held}

    def breaks(self, *names: str) -> str:
        """Exactly these checks break; all that is said about them."""
        broken = self.broken()
        self.assertEqual(sorted(broken), sorted(names))
        return "\n".join(fault for faults in broken.values() for fault in faults)

    def add_disk(self) -> None:
        """The guest has an overlay of two blocks, which went with it and which it reads."""
        self.record["guests"][0]["disk"] = 8192
        base = {"disk": "solo.qcow2", "path": "/d/base.raw", "bytes": 16384, "state": "same"}
        self.record["verified"] = {
            self.name: [{**base, "host": host} for host in ("h2", "h3")],
        }
        self.record["disks"] = {
            self.row["destination"]: {"solo.qcow2": 12288},
            self.record["host"]: {"solo.qcow2.left-e1-m1": 12288},
        }
        for second, tick in enumerate(self.said["ticks"][self.said["before"]:]):
            tick["disk"] = [second, 2 * second]

    def add_gap(self, start_ms: float, length_ms: float) -> None:
        """The guest does not answer for a while."""
        self.client["gaps"].append({"start_ms": start_ms, "length_ms": length_ms})
        self.client["gap_count"] += 1


class AnUnspoiltRecord(Spoilt):
    def test_holds_every_check(self) -> None:
        self.breaks()

    def test_shows_the_network_downtime_beside_the_pause(self) -> None:
        shown = telling.moves(evidence(self.record))
        self.assertIn("NETWORK DOWNTIME", shown)
        merged = telling.with_network_downtime(evidence(self.record))["vms"][0]
        self.assertTrue(merged["network_downtime_known"])


class WhereItRuns(Spoilt):
    def test_a_guest_that_was_left_behind_breaks_it_with_the_reason(self) -> None:
        self.row.update(outcome="left-behind", reason="no room anywhere")
        self.assertIn("no room anywhere", self.breaks(RUNS, LEFT))

    def test_a_guest_that_the_report_forgets_breaks_all_that_needs_its_move(self) -> None:
        self.record["report"]["vms"] = []
        self.assertIn(RUNS, self.broken())
        self.assertIn(PAUSE, self.broken())

    def test_a_report_is_not_believed_without_a_process(self) -> None:
        self.after[self.row["destination"]]["processes"] = []
        self.assertIn("its QEMUs are on []", self.breaks(RUNS))

    def test_two_qemus_of_one_guest_break_it(self) -> None:
        self.after["fabric"]["processes"] = [{"pid": 9, "vm": self.name}]
        self.assertIn(f"{self.row['destination']}", self.breaks(RUNS))

    def test_a_qemu_that_stayed_at_the_source_breaks_it(self) -> None:
        self.after[self.record["host"]]["processes"] = [{"pid": 7, "vm": "ghost"}]
        self.assertIn("QEMU 7 of `ghost` still runs", self.breaks(EMPTY))

    def test_a_vm_that_lifeboat_still_counts_at_the_source_breaks_it(self) -> None:
        left = {**self.record["vms"][0], "host": self.record["host"], "state": "uncertain"}
        self.record["vms"].append(left)
        self.assertIn("as uncertain", self.breaks(EMPTY))


class WhatTheGuestSaid(Spoilt):
    def test_a_wrong_page_on_the_serial_line_breaks_it(self) -> None:
        self.said["alarms"].append("LIFEBOAT-CORRUPT page 5 word 100: found 0")
        self.assertIn("page 5", self.breaks(BYTES))

    def test_a_tick_that_is_not_ok_breaks_it(self) -> None:
        self.said["ticks"][-1].update(verdict="CORRUPT", errors=1)
        self.breaks(BYTES)

    def test_a_wrong_byte_on_the_stream_breaks_it(self) -> None:
        self.client["stream"]["errors"] = 1
        self.breaks(BYTES)

    def test_a_guest_that_says_nothing_breaks_it(self) -> None:
        self.said.update(ticks=[], before=0)
        self.breaks(BYTES, READ)

    def test_a_guest_that_stopped_reading_after_its_move_breaks_it(self) -> None:
        self.said["ticks"] = self.said["ticks"][: self.said["before"] + 2]
        self.assertIn("was read and compared", self.breaks(READ))

    def test_a_disk_that_was_not_read_again_breaks_it(self) -> None:
        self.add_disk()
        self.assertEqual(self.broken(), {})
        for tick in self.said["ticks"][self.said["before"]:]:
            tick["disk"] = [7, 70]
        self.assertIn("0 of 2 blocks", self.breaks(DISK))
        for tick in self.said["ticks"]:
            tick["disk"] = None
        self.breaks(DISK)

    def test_a_disk_shows_what_it_left_where_it_was(self) -> None:
        self.assertEqual(telling.overlays(evidence(self.record)), "")
        self.add_disk()
        self.record["verified"][self.name][0]["bytes"] = 33554432
        shown = telling.overlays(evidence(self.record)).splitlines()[1].split()
        self.assertEqual(shown, [self.name, "solo.qcow2", "0", "MB", "base.raw", "34", "MB"])

    def test_a_disk_of_which_nobody_compared_the_base_breaks_it(self) -> None:
        self.add_disk()
        self.record["verified"] = {}
        self.assertIn("nobody compared", self.breaks(BASE))

    def test_a_base_that_is_another_one_somewhere_breaks_it(self) -> None:
        self.add_disk()
        self.record["verified"][self.name][1]["state"] = "differs"
        self.assertIn("at h3 /d/base.raw differs", self.breaks(BASE))

    def test_a_disk_that_holds_its_base_or_has_not_arrived_breaks_it(self) -> None:
        self.add_disk()
        there = self.record["disks"][self.row["destination"]]
        there["solo.qcow2"] = 20480
        self.assertIn("as if it held", self.breaks(BASE))
        del there["solo.qcow2"]
        self.assertIn("is not at `h2`", self.breaks(BASE))

    def test_a_disk_that_is_in_use_at_the_source_breaks_it(self) -> None:
        self.add_disk()
        self.record["disks"][self.record["host"]]["solo.qcow2"] = 12288
        self.assertIn("still in use at h1", self.breaks(BASE))

    def test_a_second_boot_breaks_it(self) -> None:
        self.said["boots"].append("00" * 16)
        self.assertIn("2 boot ids", self.breaks(LIFE))

    def test_another_boot_id_than_at_first_breaks_it(self) -> None:
        self.client["boot_ids"] = ["11" * 16]
        self.breaks(LIFE)

    def test_a_second_that_comes_twice_breaks_it(self) -> None:
        ticks = self.said["ticks"]
        ticks.insert(self.said["before"], copy.deepcopy(ticks[self.said["before"] - 1]))
        self.assertIn("came after second", self.breaks(LIFE))

    def test_a_counter_that_fell_breaks_it(self) -> None:
        self.client["ticks_went_backwards"] = 1
        self.breaks(LIFE)

    def test_a_heartbeat_that_two_answered_breaks_it(self) -> None:
        self.client["repeated"] = 1
        self.breaks(LIFE)


class Silence(Spoilt):
    def test_a_gap_away_from_the_move_breaks_it(self) -> None:
        self.add_gap(self.row["stop_unix_us"] / 1000 + 5000, 400)
        self.assertIn("5.0 s after its switchover silent for 400 ms", self.breaks(GAPS))

    def test_a_gap_that_goes_on_long_after_the_move_breaks_it(self) -> None:
        self.add_gap(self.row["stop_unix_us"] / 1000, 3000)
        self.breaks(GAPS)

    def test_a_guest_may_falter_while_its_memory_is_copied_but_not_for_as_long_as_a_pause(
            self) -> None:
        self.add_gap(self.row["stop_unix_us"] / 1000 - 1000, 280)
        self.breaks()
        self.add_gap(self.row["stop_unix_us"] / 1000 - 2000, 420)
        self.assertIn("2.0 s before its switchover silent for 420 ms", self.breaks(GAPS))

    def test_a_gap_before_its_memory_is_copied_breaks_it(self) -> None:
        self.add_gap(self.row["stop_unix_us"] / 1000 - self.row["total_ms"] - 5000, 280)
        self.breaks(GAPS)

    def test_a_gap_during_the_move_is_the_moves(self) -> None:
        length = (self.row["resume_unix_us"] - self.row["stop_unix_us"]) / 1000
        self.add_gap(self.row["stop_unix_us"] / 1000, length)
        self.breaks()

    def test_a_gap_that_is_the_clients_own_stall_is_not_the_guests(self) -> None:
        at = self.row["stop_unix_us"] / 1000 + 5000
        self.add_gap(at, 400)
        stall = {"start_ms": at, "length_ms": 400}
        self.record["client"]["client_stalls"].append(stall)
        self.breaks()

    def test_a_wait_for_a_processor_explains_what_it_is_long_and_no_more(self) -> None:
        at = self.row["stop_unix_us"] / 1000 + 5000
        self.add_gap(at, 400)
        who = f"qemu {self.name} {self.row['destination']}"
        self.record["waits"] = [
            {"who": who, "since_ms": at + 380, "until_ms": at + 390, "length_ms": 380.0}]
        self.breaks()
        self.record["waits"][0]["length_ms"] = 100.0
        self.assertIn("100 ms of it for want of a processor", self.breaks(GAPS))

    def test_the_wait_of_somebody_else_explains_nothing(self) -> None:
        at = self.row["stop_unix_us"] / 1000 + 5000
        self.add_gap(at, 400)
        self.record["waits"] = [
            {"who": "qemu other h2", "since_ms": at + 380, "until_ms": at + 390,
             "length_ms": 380.0}]
        self.breaks(GAPS)

    def test_a_full_uplink_explains_what_is_behind_it_and_short(self) -> None:
        at = self.row["stop_unix_us"] / 1000 - self.row["total_ms"] - 5000
        self.record["uplink_full"] = [{"start": at, "end": at + 1000}]
        self.add_gap(at + 100, 140)
        self.breaks()
        self.add_gap(at + 500, 400)
        self.breaks(GAPS)
        self.client["gaps"].pop()
        self.add_gap(at + 950, 140)
        self.breaks(GAPS)

    def test_a_full_uplink_explains_nothing_of_a_guest_that_has_left(self) -> None:
        at = self.row["resume_unix_us"] / 1000 + 5000
        self.record["uplink_full"] = [{"start": at, "end": at + 1000}]
        self.add_gap(at + 100, 140)
        self.breaks(GAPS)

    def test_drops_of_everybodys_queue_are_counted_and_of_no_other(self) -> None:
        said = ("class htb 1:fffe root rate 1Mbit \n Sent 1 bytes 1 pkt (dropped 9, overlimits 0)\n"
                "class htb 1:1 parent 1:fffe \n Sent 1 bytes 1 pkt (dropped 7, overlimits 0)\n"
                "class htb 1:4 parent 1:fffe \n Sent 1 bytes 1 pkt (dropped 3, overlimits 0)\n")
        self.assertEqual((dropped(said), dropped("")), (7, 0))
        looks = [(0, 5), (100, 5), (200, 6), (300, 9), (400, 9), (500, 0), (600, 2)]
        self.assertEqual(drops(looks), [Span(100, 320), Span(500, 620)])

    def test_a_wait_counts_where_it_was_seen(self) -> None:
        gap = Span(100, 200)
        for since, until, length, expected in (
            (110, 120, 5, 5), (50, 60, 50, 0), (95, 105, 30, 5), (195, 205, 60, 60),
            (205, 215, 30, 25), (240, 250, 30, 0), (90, 300, 150, 100),
        ):
            with self.subTest(since=since, until=until):
                self.assertEqual(waited(Waits([Wait("x", since, until, length)]), "x", gap),
                                 expected)
        twice = Waits([Wait("x", 110, 120, 20), Wait("x", 110, 120, 15)])
        self.assertEqual(waited(twice, "x", gap), 20)

    def test_no_wait_that_counts_is_passed_over(self) -> None:
        waits = [Wait("x", 10 * n, 10 * n + 5 + n % 7, 1 + n * 37 % 90) for n in range(100)]
        for start in range(-100, 1100, 13):
            gap = Span(start, start + 29)
            alone = [wait for wait in waits if waited(Waits([wait]), "x", gap) > 0]
            self.assertEqual(waited(Waits(waits), "x", gap), waited(Waits(alone), "x", gap))
            self.assertLessEqual(set(alone), set(Waits(waits).near(gap)))

    def test_a_qemu_is_known_by_its_own_folder(self) -> None:
        disk = f"-blockdev\0driver=file,filename={RUN}/h1/disks/web.qcow2,read-only=off"
        words = f"qemu\0-name\0web\0{disk}\0-qmp\0unix:{RUN}/h1/qemu/web/io/qmp"
        self.assertEqual(owner_of("qemu", words), "qemu web h1")
        self.assertEqual(owner_of("switch", f"ovs-vswitchd\0unix:{RUN}/h2/ovs/db.sock"), "switch h2")
        self.assertEqual(owner_of("qemu", f"qemu\0{disk}"), "")
        self.assertEqual(owner_of("switch", "ovs-vswitchd\0unix:/run/db.sock"), "")

    def test_a_guest_that_is_silent_at_the_end_breaks_it(self) -> None:
        self.client["alive"] = False
        self.breaks(GAPS)

    def test_more_gaps_than_are_listed_break_it(self) -> None:
        self.client["gap_count"] += 1
        self.breaks(GAPS)

    def test_what_is_left_of_a_gap_is_counted_once(self) -> None:
        causes = [Span(10, 20), Span(15, 30), Span(90, 200)]
        self.assertEqual(left_of(Span(0, 100), causes), 70)


class ConnectionsAndPauses(Spoilt):
    def test_a_lost_connection_breaks_it(self) -> None:
        self.client["stream"]["lost_connections"] = 1
        self.breaks(TCP)

    def test_a_connection_that_stands_still_breaks_it(self) -> None:
        self.client["stream"]["alive"] = False
        self.breaks(TCP)

    def test_a_pause_of_300_ms_breaks_it(self) -> None:
        self.row["downtime_us"] = 300_000
        self.assertIn("stood for 300 ms", self.breaks(PAUSE))

    def test_a_pause_by_the_events_counts_where_it_is_the_longer_one(self) -> None:
        self.row["resume_unix_us"] = self.row["stop_unix_us"] + 450_000
        self.assertIn("stood for 450 ms", self.breaks(PAUSE))

    def test_a_report_without_events_breaks_it(self) -> None:
        self.row["stop_unix_us"] = 0
        self.assertIn(PAUSE, self.broken())


class WhatIsLeft(Spoilt):
    def test_each_kind_of_leftover_breaks_it(self) -> None:
        for kind in ("links", "tc", "qos", "queues", "ports", "shaped"):
            with self.subTest(kind):
                self.setUp()
                self.after["fabric"][kind].append(f"some {kind}")
                self.assertIn(f"fabric {kind}: new: some {kind}", self.breaks(LEFT))

    def test_a_flow_that_is_left_breaks_it(self) -> None:
        flows = next(iter(self.after["fabric"]["flows"].values()))
        flows.append("cookie=0x1, priority=7 actions=drop")
        self.assertIn("cookie=0x1", self.breaks(LEFT))

    def test_a_meter_that_is_left_breaks_it(self) -> None:
        bridge = next(iter(self.after["fabric"]["flows"]))
        self.after["fabric"]["meters"][bridge] = ["meter=1 kbps bands="]
        self.breaks(LEFT)

    def test_somebody_elses_flow_that_is_gone_breaks_it(self) -> None:
        flows = next(iter(self.after["fabric"]["flows"].values()))
        gone = flows.pop()
        self.assertIn(f"gone: {gone}", self.breaks(LEFT))

    def test_a_tap_that_is_still_at_the_source_breaks_it(self) -> None:
        source = self.record["looks"]["before"][self.record["host"]]
        self.after[self.record["host"]]["links"] = source["links"]
        self.assertIn("is on no bridge", self.breaks(LEFT))
        self.after[self.record["host"]]["taps"] = source["taps"]
        self.assertIn(f"which should run on {self.row['destination']}", self.breaks(LEFT))

    def test_a_missing_tap_breaks_it(self) -> None:
        self.record["guests"][0]["nics"] += 1
        self.assertIn("NICs", self.breaks(LEFT))

    def test_a_share_that_was_planned_and_never_seen_breaks_it(self) -> None:
        self.record["reserved"] = []
        self.assertIn("nothing was reserved there", self.breaks(SHARE))

    def test_a_plan_without_any_share_breaks_it(self) -> None:
        self.record["plan"]["reservations"] = []
        self.breaks(SHARE)


if __name__ == "__main__":
    unittest.main()
