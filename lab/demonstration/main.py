"""lab/demo: raises a cloud, evacuates a host of it while everybody watches, and judges.

The story is `Demo.tell`; each of its steps says what it does. Ctrl-C ends it at any point, and
takes the cloud down. Exit codes: 0 if every check held, 1 if one is broken, 2 if it could not be
shown at all, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn, Sequence

from cloud.model import Scenario
from cloud.shell import CommandFailed
from cloud.state import LAB, ROOT, RUN, LabError

from . import telling
from .checks import BLOCK_BYTES, Check, judge
from .evidence import Evidence, Guest
from .spoil import SPOILS
from .standing import Standing
from .uplink import Uplink
from .waiting import Waiting
from .watching import Client, Listener, Reservations, until

TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
WORKLOAD = TARGET / "x86_64-unknown-linux-gnu/release/guest-workload"
PACKAGES = ("lifeboat-agent", "lifeboat-controller", "lifeboat-lab")
CONNECT_SECONDS = 60
BOOT_SECONDS = 90
READ_AGAIN_SECONDS = 90
# Time in which nothing happens, before and after: the checks need to see what quiet looks like.
QUIET_SECONDS = 2


def main() -> int:
    """Parses, tells the story, and turns whatever ends it into an exit code."""
    args = _arguments()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    demo = Demo(args)
    try:
        return 0 if demo.tell() else 1
    except (LabError, CommandFailed) as error:
        print(f"\nlab/demo: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"\nlab/demo: `{' '.join(map(str, error.cmd))}` failed", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nlab/demo: interrupted; taking the cloud down", file=sys.stderr)
        return 130
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        demo.standing.end()


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lab/demo",
        description="Raises a small cloud on this machine, evacuates a host of it, and checks that "
                    "no guest took harm. Installs and builds what it needs first.",
    )
    parser.add_argument("--scenario", default=str(LAB / "scenarios/two-racks.toml"), metavar="FILE",
                        help="another cloud (default: lab/scenarios/two-racks.toml)")
    parser.add_argument("--host", default="h1", help="the host to evacuate (default: h1)")
    parser.add_argument("--reason", default="failing", choices=("failing", "maintenance"),
                        help="why; sets the urgency (default: failing)")
    parser.add_argument("--urgency", metavar="PERCENT",
                        help="the share of each link to reserve (default: by the reason)")
    parser.add_argument("--json", type=Path, metavar="FILE",
                        help="write everything that was seen there")
    parser.add_argument("--keep", action="store_true",
                        help="leave the cloud up at the end (lab/down ends it)")
    parser.add_argument("--binaries", type=Path, metavar="DIR",
                        help="install and build nothing; take lifeboat's programs from DIR")
    # For developers: does the demo notice? Not for --help.
    parser.add_argument("--spoil", choices=sorted(SPOILS), help=argparse.SUPPRESS)
    return parser.parse_args()


class Demo:
    """One run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.begun = time.monotonic()
        self.standing = Standing((args.binaries or TARGET / "debug").resolve(), args.keep)

    def tell(self) -> bool:
        """The whole story; true if every check held."""
        if os.geteuid() != 0:
            raise LabError("needs root: it makes network namespaces. Run it as root")
        if self.args.binaries is None:
            self.prepare()
        built = time.monotonic()
        self.say("raising the cloud")
        self.standing.raise_it(self.args.scenario)
        evidence = self.evacuate(Scenario.load(RUN / "scenario.json"))
        checks = judge(evidence)
        seconds = time.monotonic() - built
        self.conclude(evidence, checks, seconds)
        return all(check.held for check in checks)

    def say(self, what: str) -> None:
        """A step of the story, with the time since the beginning."""
        print(f"[{time.monotonic() - self.begun:4.0f} s] {what}", flush=True)

    def prepare(self) -> None:
        """Packages, guest image, programs. Each does nothing where nothing is missing."""
        self.say("packages, Rust (lab/install)")
        _do("lab/install")
        self.say("guest image: Debian's kernel, our workload (lab/image)")
        _do("lab/image")
        self.say("building Lifeboat: about three minutes the first time, seconds after that")
        quiet = [] if sys.stderr.isatty() else ["--quiet"]
        packages = [word for name in PACKAGES for word in ("-p", name)]
        # The profile of tests/run, whose dependencies serve both; but guests stand still here while the
        # agent's code runs, and the machine is full.
        faster = ("--config", "profile.dev.package.lifeboat-agent.opt-level=1")
        _do("cargo", "build", "--bins", *faster, *quiet, *packages)

    def evacuate(self, scenario: Scenario) -> Evidence:
        """From a quiet cloud to an evacuated host, with everything that was seen."""
        vms = [vm for vm in scenario.vms if vm.host == self.args.host]
        if not vms:
            raise LabError(f"the scenario has no VM on {self.args.host}: name another --host")
        guests = [Guest(vm.name, vm.role, len(vm.nics), vm.disk) for vm in vms]
        evidence = Evidence(self.args.host, guests, reserves=self.args.urgency != "0")
        listeners = {vm.name: Listener(vm) for vm in vms}
        self.wait_for_everybody(listeners)
        client = Client(self.standing, scenario, WORKLOAD)
        waiting, uplink = Waiting(), Uplink(self.standing, self.args.host)
        waiting.start()
        until("the client", BOOT_SECONDS, client.not_heard)
        evidence.before = self.standing.look()
        self.show_cloud()
        self.show_bases(evidence)
        evidence.plan = self.show_plan()
        evidence.held, evidence.report = self.run_evacuation()
        self.after_it(evidence, listeners)
        evidence.client = client.finish()
        evidence.waits, evidence.full = waiting.finish(), uplink.finish()
        evidence.after = self.standing.look()
        evidence.disks = {host.name: _images(host.name) for host in scenario.hosts}
        evidence.vms = self.standing.ask("vms")["vms"]
        evidence.accounts = accounts(listeners, evidence)
        return evidence

    def wait_for_everybody(self, listeners: dict[str, Listener]) -> None:
        """Hosts connected, guests booted."""
        self.say("waiting for the agents and switches to connect, and for the guests to boot")
        until("hosts", CONNECT_SECONDS, self.standing.not_connected)
        until("guests", BOOT_SECONDS, lambda: _not_ready(listeners))

    def show_cloud(self) -> None:
        """What an operator sees before anything happens."""
        time.sleep(QUIET_SECONDS)
        for words in (("hosts",), ("vms",)):
            self.say(f"lifeboat {' '.join(words)}")
            self.standing.show(*words)

    def show_bases(self, evidence: Evidence) -> None:
        """What the guests' disks lie on, and which hosts have it: that is not sent."""
        for guest in (guest for guest in evidence.guests if guest.disk):
            self.say(f"lifeboat verify {guest.name}")
            evidence.verified[guest.name] = self.standing.ask("verify", guest.name)["files"]
            self.standing.show("verify", guest.name)

    def order(self, verb: str) -> list[str]:
        """`plan h1 ...` or `evacuate h1 ...`."""
        words = [verb, self.args.host, "--reason", self.args.reason]
        return words + (["--urgency", self.args.urgency] if self.args.urgency else [])

    def show_plan(self) -> Any:
        """What it would do, and how long that would take: for the eye, and for the checks."""
        self.say(f"lifeboat {' '.join(self.order('plan'))}")
        plan = self.standing.ask(*self.order("plan"))
        self.standing.show(*self.order("plan"))
        return plan

    def run_evacuation(self) -> tuple[Sequence[Any], Any]:
        """The evacuation itself, on this terminal; what was reserved, and the report."""
        order = [*self.order("evacuate"), "--yes"]
        self.say(f"lifeboat {' '.join(order)}")
        watcher = Reservations(self.standing)
        watcher.start()
        code = self.standing.show(*order)
        held = watcher.finish()
        begun = self.standing.ask("status")["evacuations"]
        if not begun:
            raise LabError(f"the evacuation did not begin: it ended with {code}")
        newest = max(begun, key=lambda one: int(one["evacuation"].lstrip("e")))
        return held, self.standing.ask("report", newest["evacuation"])

    def after_it(self, evidence: Evidence, listeners: dict[str, Listener]) -> None:
        """Lets the guests read their whole memory and disks again; then spoils something, if asked to."""
        moved = {guest.name for guest in evidence.guests if evidence.destination(guest.name)}
        listeners = {name: one for name, one in listeners.items() if name in moved}
        self.say(f"{len(moved)} guests read and compare all that they have once more")
        try:
            until("guests", READ_AGAIN_SECONDS, lambda: _unread(evidence, accounts(listeners, evidence)))
        except LabError:
            pass  # the checks will say it, with all the rest
        if self.args.spoil:
            self.say(f"spoiling: {self.args.spoil}")
            SPOILS[self.args.spoil](self.standing, evidence)
        time.sleep(QUIET_SECONDS)

    def conclude(self, evidence: Evidence, checks: Sequence[Check], seconds: float) -> None:
        """Tables, check list, record."""
        self.say("what it came to")
        print(f"\n{telling.moves(evidence)}\n{telling.silences(evidence)}")
        if disks := telling.overlays(evidence):
            print(disks)
        if evidence.held:
            print(telling.reservations(evidence.held))
        print(telling.check_list(checks, sys.stdout.isatty()))
        if self.args.json:
            record = telling.record(evidence, checks, seconds)
            self.args.json.write_text(json.dumps(record, indent=1) + "\n")
        held = sum(check.held for check in checks)
        where = "; the cloud stays up, lab/down ends it" if self.args.keep else ""
        print(f"{held} of {len(checks)} checks held, in {seconds:.0f} s{where}", flush=True)


def accounts(listeners: dict[str, Listener], evidence: Evidence) -> dict[str, Any]:
    """What every guest has said so far, wherever it is."""
    return {name: listener.account(evidence.destination(name))
            for name, listener in listeners.items()}


def _images(host: str) -> dict[str, int]:
    images = sorted((RUN / host / "disks").iterdir())
    return {image.name: image.stat().st_blocks * 512 for image in images}


def _do(*words: str) -> None:
    subprocess.run(words, cwd=ROOT, check=True)


def _not_ready(listeners: dict[str, Listener]) -> str:
    missing = [name for name, listener in listeners.items() if not listener.is_ready()]
    return f"{', '.join(missing)} not booted; see lab/run/HOST/agent.log" if missing else ""


def _unread(evidence: Evidence, said: dict[str, Any]) -> str:
    disks = {guest.name: guest.disk for guest in evidence.guests}
    unread = [name for name, account in said.items()
              if account.passes_since_arrival() < 1
              or account.disk_since_arrival()[1] * BLOCK_BYTES < disks[name]]
    return f"{', '.join(unread)} not read through" if unread else ""


if __name__ == "__main__":
    sys.exit(main())
