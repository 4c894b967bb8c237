"""Process 1 of the private namespaces: starts the cloud and buries whatever dies there.

QEMUs outlive the agents that started them, and so become children of process 1. When the cloud's
own process has ended, this one ends too, and the kernel with it everything else in here.
"""

from __future__ import annotations

import json
import os
import signal
import sys


def main() -> int:
    """Runs `raising` in a child and reaps until that child has ended."""
    options = json.loads(sys.argv[1])
    child = os.fork()
    if child == 0:
        from .raising import raise_cloud  # Mininet is loaded by the child only

        os._exit(raise_cloud(options))
    os.close(options["up_fd"])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(child, signal.SIGTERM))
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child:
            return os.waitstatus_to_exitcode(status) & 0xFF


if __name__ == "__main__":
    sys.exit(main())
