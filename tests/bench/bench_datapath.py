"""What one packet costs: BPF_PROG_TEST_RUN of from_endpoint, local to local, IPv4 TCP.

Conntrack and ipcache hold 65536 rows each; the policy has 1, 1000 or 65536 rows, and the ones that
match are reached last but by identity and port. Every run is of another tuple, in no order that a
cache likes. What a tail call into a program that does nothing costs is subtracted.

Most of an established packet's time is the memory of 65536 conntrack rows (25 MB): with few
connections it takes a third. So each figure is the least of many short rounds, taken in turns: what
else runs on the machine takes its share of the caches.
"""

from __future__ import annotations

import statistics
import struct
from typing import Any

import numpy as np
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from cilia.bpf import Map, Object, Program, SkBuffCtx, layout
from cilia.bpf.uapi import MapType
from tests.bench.figure import figure
from tests.datapath.harness import (
    BPF_F_NO_PREALLOC,
    OBJECTS,
    Endpoint,
    Node,
    Rule,
    build_objects,
    mac_bytes,
)

ROWS = 65536
ROUNDS = 25
ROUNDS_NEW = 9


class Bench:
    """A node filled to size, and the program that varies the tuple."""

    def __init__(self) -> None:
        build_objects()
        self.node = Node(
            cilia_ipcache=2 * ROWS, cilia_ct=262144, cilia_events=1 << 26, cilia_policy_meta=64
        )
        self.object = Object.open(OBJECTS / "tests" / "bench.bpf.o")
        self.object.load()
        self.next = self.object.program("bench_next")
        self.nothing = self.object.program("bench_nothing")
        a, b = self.node.a, self.node.b
        self.macs = mac_bytes(a.node_mac) + mac_bytes(a.mac)
        self.frame = bytes(
            Ether(src=a.mac, dst=a.node_mac) / IP(src=a.ip4, dst=b.ip4) / TCP(flags="A") / bytes(10)
        )
        self.syn = bytes(
            Ether(src=a.mac, dst=a.node_mac) / IP(src=a.ip4, dst=b.ip4) / TCP(flags="S") / bytes(10)
        )
        self.node.runtime(aggregation=3, report_interval_s=1 << 30)
        self.policies: dict[tuple[int, int], Map] = {}
        self.rev = 1 << 16
        self._fill_ipcache()

    def close(self) -> None:
        self.object.close()
        self.node.close()

    def _fill_ipcache(self) -> None:
        keys = np.zeros(ROWS, layout.IPCACHE_KEY)
        keys["prefixlen"] = 128
        raw = np.zeros((ROWS, 16), "u1")
        raw[:, 10:12] = 0xFF
        number = np.arange(ROWS, dtype="u4")
        raw[:, 12], raw[:, 13] = 100, 64
        raw[:, 14], raw[:, 15] = number >> 8, number & 0xFF
        keys["addr"] = raw.reshape(-1).view("V16")
        values = np.zeros(ROWS, layout.IPCACHE_VALUE)
        values["identity"] = 5000 + number
        self.node.map("cilia_ipcache").update_batch(keys, values)

    def policy(self, ep: Endpoint, rows: int, peer: int) -> None:
        """Swap in `rows` rows by identity and port of either direction; two of them match.

        The maps are made once and kept: freeing one would cost the CPU that is measured on.
        """
        inner = self.policies.get((ep.slot, rows))
        if inner is None:
            self.node.policy(
                ep, (Rule(True, peer, 6, 0, 8, id=1), Rule(False, peer, 6, 0, 8, id=2))
            )
            inner = self.policies[ep.slot, rows] = self._grown(self.node._inner[ep.slot], rows)
        self.node.map("cilia_policy").set_inner(ep.slot, inner)
        self.rev += 1
        meta = np.zeros(1, layout.POLICY_META)
        meta["rev"], meta["plens_id"] = self.rev, 1 << 24 | 1 << 8
        self.node.map("cilia_policy_meta").update(ep.slot.to_bytes(4, "little"), meta.tobytes())

    def _grown(self, few: Map, rows: int) -> Map:
        inner = Map.create(
            MapType.HASH,
            "policy",
            layout.POLICY_KEY.itemsize,
            layout.POLICY_VALUE.itemsize,
            2 * ROWS,
            BPF_F_NO_PREALLOC,
        )
        inner.update_batch(*few.items_np(layout.POLICY_KEY, layout.POLICY_VALUE))
        number = np.arange(max(rows - 2, 0))
        keys = np.zeros(len(number), layout.POLICY_KEY)
        keys["identity"] = 100000 + number // 2
        keys["proto"], keys["dport_be"] = 6, 80
        keys["l4_plen_egress"] = np.where(
            number % 2 == 0, layout.plen_egress(24, True), layout.plen_egress(24, False)
        )
        values = np.zeros(len(number), layout.POLICY_VALUE)
        values["rule_id"] = 9
        inner.update_batch(keys, values)
        return inner

    def run(self, program: Program, frame: bytes, repeat: int, dport: int, mask: int) -> int:
        """Mean ns of `repeat` runs on distinct tuples, the harness's own part included."""
        target = self.object.map("bench_target")
        target.update(bytes(4), program.fd.to_bytes(4, "little"))
        state = struct.pack("=II12sI", 0, mask, self.macs, dport)
        self.object.map("bench_state").update(bytes(4), state)
        ctx = SkBuffCtx(ifindex=self.node.a.ifindex)
        result = self.node.thread.call(
            lambda: self.next.test_run(frame, ctx=ctx, repeat=repeat, cpu=0)
        )
        return result.duration_ns

    def overhead(self) -> int:
        return min(self.run(self.nothing, self.frame, ROWS * 4, 80, 0xFFFF) for _ in range(ROUNDS))

    def rows(self, rows: int) -> None:
        """Both ends have policies of this size."""
        a, b = self.node.a, self.node.b
        self.policy(a, rows, b.identity)
        self.policy(b, rows, a.identity)

    def established(self) -> int:
        program = self.node.programs["from_endpoint"]
        self.run(program, self.frame, ROWS, 80, 0xFFFF)  # the entries, or their new revision
        self.node.drain()
        return self.run(program, self.frame, ROWS, 80, 0xFFFF)

    def new(self, dport: int) -> int:
        cost = self.run(self.node.programs["from_endpoint"], self.syn, ROWS // 2, dport, 0xFFFF)
        self.node.drain()
        return cost


def bench_datapath_packet() -> list[dict[str, Any]]:
    """Established and new packets, at 1, 1000 and 65536 policy rows.

    The value is the least of all rounds, the ratio to one row the median of each round's own.
    """
    sizes = (1, 1000, ROWS)
    costs: dict[tuple[str, int], list[float]] = {
        (what, rows): [] for what in ("established", "new") for rows in sizes
    }
    bench = Bench()
    try:
        overhead = bench.overhead()
        for _ in range(ROUNDS):
            for rows in sizes:
                bench.rows(rows)
                costs["established", rows].append(bench.established() - overhead)
        for turn in range(ROUNDS_NEW):
            for n, rows in enumerate(sizes):
                bench.rows(rows)
                cost = bench.new(1000 + turn * len(sizes) + n) - overhead
                costs["new", rows].append(cost)
    finally:
        bench.close()
    figures = []
    for (what, rows), found in costs.items():
        name = f"datapath_{what}_{rows}_rows"
        bounds = {"goal": 300.0, "floor": 450.0} if what == "established" else {}
        figures.append(figure(name, min(found), "ns", less_is_better=True, **bounds))
        if rows != 1:
            ratio = statistics.median(
                mine / other for mine, other in zip(found, costs[what, 1], strict=True)
            )
            figures.append(
                figure(
                    f"{name}_to_1",
                    statistics.median(found),
                    "ns",
                    baseline=statistics.median(costs[what, 1]),
                    ratio=ratio,
                    goal=1.15,
                    floor=1.15,
                    less_is_better=True,
                )
            )
    return figures
