"""Makes the kernel write events: a packet that policy denies, run through the attached program.

    python -m tests.bench.ringload PINNED-PROGRAM IFINDEX SOURCE DESTINATION SOURCE-MAC NODE-MAC
                                   EVENTS-A-SECOND SECONDS

To be run in the node's namespace. Each run is denied, which is two events (the verdict and the
drop). Prints how many events that were.
"""

from __future__ import annotations

import socket
import struct
import sys
import time
from pathlib import Path

from cilia.bpf import Program, SkBuffCtx

EVENTS_A_RUN = 2
BURST = 100


def syn(source: str, destination: str, source_mac: str, node_mac: str) -> bytes:
    """An Ethernet frame with a TCP SYN to port 80; its checksums are nobody's concern here."""
    ethernet = bytes.fromhex(node_mac.replace(":", "") + source_mac.replace(":", "")) + b"\x08\0"
    addresses = socket.inet_aton(source) + socket.inet_aton(destination)
    ip = struct.pack(">BBHHHBBH", 0x45, 0, 40, 1, 0, 64, 6, 0) + addresses
    total = sum(struct.unpack(">10H", ip))
    total = (total & 0xFFFF) + (total >> 16)
    check = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    ip = ip[:10] + struct.pack(">H", check) + ip[12:]
    tcp = struct.pack(">HHIIBBHHH", 40000, 80, 1, 0, 0x50, 2, 65535, 0, 0)
    return ethernet + ip + tcp


def main() -> None:
    path, ifindex, source, destination, source_mac, node_mac, rate, seconds = sys.argv[1:]
    program = Program.open_pinned(Path(path))
    packet = syn(source, destination, source_mac, node_mac)
    ctx = SkBuffCtx(ifindex=int(ifindex))
    program.test_run(packet, ctx=ctx, repeat=1)
    began, runs = time.monotonic(), 1
    wanted = int(float(rate) / EVENTS_A_RUN * float(seconds))
    while runs < wanted:
        due = min(wanted, int((time.monotonic() - began) * float(rate) / EVENTS_A_RUN))
        while runs < due:
            count = min(BURST, due - runs)
            program.test_run(packet, ctx=ctx, repeat=count)
            runs += count
        time.sleep(0.0005)
    print(runs * EVENTS_A_RUN, f"{time.monotonic() - began:.3f}")


if __name__ == "__main__":
    main()
