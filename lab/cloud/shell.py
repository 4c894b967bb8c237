"""Running a program and caring about how it ended.

Mininet's `cmd` returns output and forgets the exit code; everything that must succeed goes
through here instead. Programs of a node are run in its namespaces by its shell's pid.
"""

from __future__ import annotations

import os
import subprocess
from typing import Mapping, Optional, Sequence


class CommandFailed(Exception):
    """A program that had to succeed did not."""

    def __init__(self, argv: Sequence[str], code: int, output: str) -> None:
        super().__init__(f"`{' '.join(argv)}` ended with {code}: {output.strip()}")


def in_node(pid: Optional[int], argv: Sequence[str]) -> list[str]:
    """`argv` inside the network and mount namespaces of `pid` (None: where we are)."""
    return list(argv) if pid is None else ["mnexec", "-a", str(pid), *argv]


def run(
    *argv: str,
    pid: Optional[int] = None,
    env: Optional[Mapping[str, str]] = None,
    stdin: Optional[str] = None,
) -> str:
    """Runs a program to its end and returns its output; raises CommandFailed if it failed."""
    done = subprocess.run(
        in_node(pid, argv),
        env={**os.environ, **(env or {})},
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise CommandFailed(argv, done.returncode, done.stdout)
    return done.stdout


def sysctl(name: str, value: object, pid: Optional[int] = None) -> None:
    """Sets a kernel parameter of a network namespace."""
    run("sysctl", "-q", "-w", f"{name}={value}", pid=pid)
