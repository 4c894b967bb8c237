"""When the evacuated host's uplink dropped packets of everybody but the migration: a witness.

A reservation at urgency 90 leaves a tenth of the uplink to all the rest. While guests that have
not left yet send more than that, their queue is full, and heartbeats are dropped with all else: that
is what was ordered, and it is to be seen, not guessed. The queue's own counter tells.

As a program (`lab/exec HOST python3 -m demonstration.uplink DEV`) it prints a line per look until it is
ended; `Uplink` starts it and reads it. Judges nothing: checks.py.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from typing import Iterator, Sequence

from cloud.state import LAB

from .gaps import Span
from .standing import OUT, Standing, end_inside

LOOK_SECONDS = 0.1
# Open vSwitch's queue 0, to which everything goes that has no queue of its own, is class 1:1.
EVERYBODY = "1:1"
HEAD = re.compile(r"^class htb (\S+) ")
DROPPED = re.compile(r"\(dropped (\d+),")
# Answers to heartbeats that were dropped are missed until the next one comes.
INTERVAL_MS = 20.0


def main() -> int:
    """Prints `TIME_MS DROPPED` ten times a second."""
    while True:
        said = subprocess.run(["tc", "-s", "class", "show", "dev", sys.argv[1]], text=True,
                              capture_output=True, check=False).stdout
        print(f"{time.time() * 1000:.0f} {dropped(said)}", flush=True)
        time.sleep(LOOK_SECONDS)


def dropped(said: str) -> int:
    """What `tc -s class show` counts as dropped of everybody's; 0 where there is no queue."""
    count, theirs = 0, False
    for line in said.splitlines():
        if head := HEAD.match(line):
            theirs = head[1] == EVERYBODY
        elif theirs and (found := DROPPED.search(line)):
            count = int(found[1])
    return count


def drops(looks: Sequence[tuple[float, int]]) -> list[Span]:
    """The stretches between two looks in which something was dropped, joined."""
    found: list[Span] = []
    for (since, before), (until, after) in zip(looks, looks[1:]):
        # A queue that was made anew begins at 0.
        if after > before:
            start = found.pop().start if found and found[-1].end >= since else since
            found.append(Span(start, until + INTERVAL_MS))
    return found


class Uplink:
    """The witness beside an evacuation."""

    def __init__(self, standing: Standing, host: str) -> None:
        self.said = OUT / "demo-uplink.log"
        words = ["/usr/bin/python3", "-B", "-m", "demonstration.uplink", f"{host}-up"]
        with open(self.said, "wb") as out:
            self.process = standing.on(host, words, stdout=out, stderr=out, cwd=LAB)

    def finish(self) -> list[Span]:
        """Ends it and returns when the link was full."""
        end_inside(self.process)
        return drops(list(_looks(self.said.read_text())))


def _looks(text: str) -> Iterator[tuple[float, int]]:
    for line in text.splitlines():
        at, count = line.split()
        yield float(at), int(count)


if __name__ == "__main__":
    sys.exit(main())
