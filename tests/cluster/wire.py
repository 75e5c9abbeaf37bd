"""A bad network cable: two TAP devices, and between them a queue that loses frames and delays them.

    wire.py NEAR BRIDGE NODE_PID MAC ADDRESS/BITS LOSS DELAY_MS JITTER_MS

NEAR is put into BRIDGE, the far end becomes eth0 of the node whose PID 1 is NODE_PID. Prints "up", then works until it is killed.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import selectors
import struct
import subprocess
import sys
import time

SET_INTERFACE, TAP, NO_HEADER = 0x400454CA, 0x0002, 0x1000
FRAME = 65_600


def tap(name: str) -> int:
    """A new TAP device; what is written to the descriptor arrives on it."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, SET_INTERFACE, struct.pack("16sH22x", name.encode(), TAP | NO_HEADER))
    return descriptor


def relay(ends: tuple[int, int], loss: float, delay_s: float, jitter_s: float) -> None:
    """Pass frames both ways, for ever; those of different delay may overtake each other."""
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    chance = random.Random(0)
    waiting: list[tuple[float, int, int, bytes]] = []
    passed = 0
    with selectors.DefaultSelector() as selector:
        for end in ends:
            selector.register(end, selectors.EVENT_READ)
        while True:
            pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
            for key, _ in selector.select(pause):
                frame = os.read(key.fd, FRAME)
                if chance.random() >= loss:
                    passed += 1
                    due = time.monotonic() + max(0.0, delay_s + chance.uniform(-jitter_s, jitter_s))
                    heapq.heappush(waiting, (due, passed, other[key.fd], frame))
            while waiting and waiting[0][0] <= time.monotonic():
                _, _, end, frame = heapq.heappop(waiting)
                try:
                    os.write(end, frame)
                except OSError:  # the end is down: a frame into the void
                    continue


def main() -> None:
    """Make the cable and pass its frames."""
    near, bridge, pid, mac, address = sys.argv[1:6]
    loss, delay_ms, jitter_ms = (float(text) for text in sys.argv[6:9])
    far = f"{near}f"
    ends = tap(near), tap(far)
    inside = f"nsenter --target {pid} --net ip"
    for command in (
        f"ip link set {near} master {bridge} up",
        f"ip link set {far} address {mac}",
        f"ip link set {far} netns {pid} name eth0",
        f"{inside} address add {address} dev eth0",
        f"{inside} link set eth0 up",
    ):
        subprocess.run(command.split(), check=True)
    print("up", flush=True)
    relay(ends, loss, delay_ms / 1000, jitter_ms / 1000)


if __name__ == "__main__":
    main()
