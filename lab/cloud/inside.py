"""Process 1 of the private namespaces: starts the cloud and buries whatever dies there.

QEMUs outlive the agents that started them, and so become children of process 1. When the cloud's
own process has ended, this one ends too, and the kernel with it everything else in here.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys


def _open_tun_device() -> None:
    """A /dev/net/tun of our own that everybody may open, as udev makes it on Debian: QEMU runs
    unprivileged, and a container often has the device for root alone. What may be done with it
    the kernel decides by the tap's owner."""
    if os.stat("/dev/net/tun").st_mode & 0o006 == 0o006:
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "lifeboat-tun", "/dev/net"],
                   check=True)
    os.mknod("/dev/net/tun", 0o666 | stat.S_IFCHR, os.makedev(10, 200))
    os.chmod("/dev/net/tun", 0o666)


def main() -> int:
    """Runs `raising` in a child and reaps until that child has ended."""
    options = json.loads(sys.argv[1])
    _open_tun_device()
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
