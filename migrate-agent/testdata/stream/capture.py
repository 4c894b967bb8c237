#!/usr/bin/env python3
"""Makes the captures in this folder: python3 capture.py QEMU LABEL [OPTION...]

QEMU is a qemu-system-x86_64, LABEL what its files are called after ("7.2"); further words go to
QEMU (such as "-L FOLDER" for one that is not installed). Each capture is what one QEMU wrote to
another, or to a relay between the two, while a guest of 2 MiB ran a program of 26 bytes that writes
to four pages for ever. Nothing but Python's own library is needed; it takes some seconds.
"""
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time

# xor bx,bx / outer: mov ax,2000h; mov cx,4 / inner: mov ds,ax; mov [0],bx; mov [800h],cx;
# add ax,100h; loop inner / inc bx; jmp outer
PROGRAM = bytes.fromhex("31db" "b80020" "b90400" "8ed8" "891e0000" "890e0008" "050001" "e2f1" "43" "ebe8")
JUMP_TO_IT = bytes.fromhex("ea000000f0")
KIB = 1024


def firmware(folder):
    image = bytearray(64 * KIB)
    image[: len(PROGRAM)] = PROGRAM
    image[0xFFF0 : 0xFFF0 + len(JUMP_TO_IT)] = JUMP_TO_IT
    path = os.path.join(folder, "program.bin")
    with open(path, "wb") as file:
        file.write(image)
    return path


class Guest:
    def __init__(self, folder, name, *more):
        qemu, extra = sys.argv[1], sys.argv[3:]
        self.control = os.path.join(folder, name + ".qmp")
        machine = ["-machine", "pc", "-accel", "tcg", "-m", "2", "-nodefaults", "-vga", "none"]
        quiet = ["-display", "none", "-bios", firmware(folder)]
        control = ["-qmp", f"unix:{self.control},server=on,wait=off"]
        self.process = subprocess.Popen([qemu, *extra, *machine, *quiet, *control, *more])
        self.socket = connect(self.control)
        self.lines = self.socket.makefile("r")
        self.lines.readline()
        self.ask("qmp_capabilities")

    def ask(self, command, **arguments):
        line = json.dumps({"execute": command, "arguments": arguments})
        self.socket.sendall(line.encode() + b"\n")
        while True:
            answer = json.loads(self.lines.readline())
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def allow(self, *capabilities):
        wanted = [{"capability": name, "state": True} for name in capabilities]
        self.ask("migrate-set-capabilities", capabilities=wanted)

    def until(self, *wanted):
        end = time.monotonic() + 30
        while time.monotonic() < end:
            if self.ask("query-migrate").get("status") in wanted:
                return
            time.sleep(0.02)
        raise RuntimeError(f"never became {wanted}: {self.ask('query-migrate')}")

    def end(self):
        self.process.kill()
        self.process.wait()


def connect(path):
    for _ in range(200):
        try:
            client = socket.socket(socket.AF_UNIX)
            client.connect(path)
            return client
        except OSError:
            client.close()
            time.sleep(0.05)
    raise RuntimeError(f"nobody listens at {path}")


def listen(path):
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(8)
    return server


def record(taken, given, kept):
    """Carries bytes from one socket to the other until the end, and keeps them."""
    try:
        while data := taken.recv(256 * KIB):
            kept.append(data)
            if given:
                given.sendall(data)
    except OSError:
        pass
    if given:
        try:
            given.shutdown(socket.SHUT_WR)
        except OSError:
            pass


def save(name, kept, most=None):
    data = b"".join(kept)
    with open(name, "wb") as file:
        file.write(data[:most])
    print(f"{name}: {len(data[:most])} of {len(data)} bytes")


def alone(name, capabilities=(), options=(), most=None):
    """One QEMU that writes to a listener: pre-copy, to the end of its stream."""
    with tempfile.TemporaryDirectory() as folder:
        server = listen(os.path.join(folder, "stream"))
        guest = Guest(folder, "source", *options)
        try:
            time.sleep(0.5)
            guest.allow(*capabilities)
            guest.ask("migrate-set-parameters", **{"max-bandwidth": 0})
            guest.ask("migrate", uri=f"unix:{folder}/stream")
            kept = []
            taken, _ = server.accept()
            thread = threading.Thread(target=record, args=(taken, None, kept))
            thread.start()
            if most is None:
                guest.until("completed")
            else:
                time.sleep(1.0)
        finally:
            guest.end()
        thread.join()
        save(name, kept, most)


def pair(name, capabilities, post_copy):
    """Two QEMUs and a relay between them that keeps both directions."""
    with tempfile.TemporaryDirectory() as folder:
        server = listen(os.path.join(folder, "stream"))
        source = Guest(folder, "source")
        destination = Guest(folder, "destination", "-incoming", f"unix:{folder}/incoming")
        try:
            time.sleep(0.5)
            for guest in (source, destination):
                guest.allow(*capabilities)
            slow = 20 * KIB if post_copy else 0
            source.ask("migrate-set-parameters", **{"max-bandwidth": slow, "downtime-limit": 1})
            source.ask("migrate", uri=f"unix:{folder}/stream")
            taken, _ = server.accept()
            given = connect(os.path.join(folder, "incoming"))
            there, back = [], []
            threads = [
                threading.Thread(target=record, args=(taken, given, there)),
                threading.Thread(target=record, args=(given, taken, back)),
            ]
            for thread in threads:
                thread.start()
            time.sleep(0.5)
            if post_copy:
                source.ask("migrate-start-postcopy")
                source.ask("migrate-set-parameters", **{"max-postcopy-bandwidth": 200 * KIB})
            else:
                source.ask("migrate-set-parameters", **{"downtime-limit": 2000})
            source.until("completed")
            destination.until("completed")
        finally:
            source.end()
            destination.end()
        for thread in threads:
            thread.join()
        save(name + ".stream", there)
        save(name + ".return", back)


def main():
    label = sys.argv[2]
    alone(f"pre-copy-{label}.stream")
    pair(f"return-path-{label}", ["return-path"], False)
    pair(f"post-copy-{label}", ["postcopy-ram"], True)
    few = 6 * KIB
    if label == "7.2":
        uuid = ["-uuid", "b8d5a9a0-3c3c-4e0f-9d55-0d6f6b1f2a77"]
        alone(f"uuid-{label}.stream", ["validate-uuid"], uuid, most=few)
        alone(f"ignore-shared-{label}.stream", ["x-ignore-shared"], most=few)
        alone(f"compress-{label}.stream", ["compress"], most=few)
    else:
        alone(f"multifd-{label}.stream", ["multifd"], most=few)


main()
