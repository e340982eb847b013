"""A process that serves made-up flows, for benches of serving them.

    python -m tests.bench.flowserve SOCKET [--rows N] [--rate R --batch B] [--grpcio]

Fills the ring, says "ready", and serves; with --rate it goes on to take in so many events a second
while somebody follows. With --grpcio it serves the same bytes through grpcio instead: the baseline.
On SIGUSR1 it prints how much processor time it has used, in seconds, and how many flows it took in.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import signal
import time
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np

from cilia.bpf import constants as k
from cilia.bpf.layout import EVENT, to_addr
from services.flows.encoder import Encoder
from services.flows.filterspec import FlowQuery
from services.flows.http2 import GrpcServer
from services.flows.interning import AnyArray
from services.flows.notes import Notes
from services.flows.rows import Rows
from services.flows.server import About, FlowServer
from services.flows.store import Store
from services.flows.world import EndpointInfo, Meaning, PolicyRef, World

ENDPOINTS = 200
PAIRS = 4000
RING = 1 << 20


def meaning() -> Meaning:
    """Workloads with names, labels and addresses."""
    labels = {
        1000 + n: (
            f"k8s:app=svc-{n}",
            f"k8s:io.kubernetes.pod.namespace=team-{n % 10}",
            "k8s:io.cilium.k8s.policy.cluster=default",
        )
        for n in range(ENDPOINTS)
    }
    return Meaning(
        reset=True,
        node="bench",
        cluster="default",
        endpoints=tuple(
            EndpointInfo(
                id=n + 1,
                name=f"svc-{n}-0",
                namespace=f"team-{n % 10}",
                labels=labels[1000 + n],
                identity=1000 + n,
                addresses=(f"10.20.{n // 250}.{n % 250 + 1}",),
                ifindex=n + 10,
                interface=f"cil{n + 1:05d}",
            )
            for n in range(ENDPOINTS)
        ),
        identities=labels,
        rules={n: PolicyRef("CiliumNetworkPolicy", "team-1", f"rule-{n}") for n in range(1, 40)},
    )


def events(count: int, *, seed: int = 1) -> AnyArray:
    """Events of all kinds among PAIRS pairs of workloads; times are to be filled in."""
    r = np.random.default_rng(seed)
    addresses = np.frombuffer(
        b"".join(to_addr(f"10.20.{n // 250}.{n % 250 + 1}") for n in range(ENDPOINTS)), "V16"
    )
    pairs = r.integers(0, ENDPOINTS, (PAIRS, 2))
    chosen = pairs[r.integers(0, PAIRS, count)]
    out = np.zeros(count, EVENT)
    src, dst = chosen[:, 0], chosen[:, 1]
    out["saddr"], out["daddr"] = addresses[src], addresses[dst]
    out["src_identity"], out["dst_identity"] = src + 1000, dst + 1000
    out["direction"] = r.choice([k.DIR_INGRESS, k.DIR_EGRESS], count)
    egress = out["direction"] == k.DIR_EGRESS
    out["ep_id"] = np.where(egress, src, dst) + 1
    out["peer_ep_id"] = np.where(egress, dst, src) + 1
    kind = r.choice([k.EVENT_TRACE, k.EVENT_VERDICT, k.EVENT_DROP], count, p=[0.8, 0.15, 0.05])
    out["type"] = kind
    out["reason"] = np.where(kind == k.EVENT_DROP, 133, np.where(kind == k.EVENT_TRACE, 1, 0))
    out["rule_id"] = np.where(kind == k.EVENT_VERDICT, r.integers(1, 40, count), 0)
    out["match_type"] = np.where(kind == k.EVENT_VERDICT, 2, 0)
    out["proto"] = r.choice([6, 17], count, p=[0.9, 0.1])
    out["tcp_flags"] = np.where(out["proto"] == 6, r.choice([2, 16, 24, 17], count), 0)
    out["sport_be"] = r.integers(1024, 65535, count)
    out["dport_be"] = r.choice([80, 443, 53, 8080, 5432], count)
    out["length"] = r.choice([60, 590, 1500], count)
    out["ifindex"] = src + 10
    return out


class Source:
    """Takes events in at a rate, for as long as somebody follows."""

    def __init__(self, store: Store, rate: float, batch: int) -> None:
        self._store = store
        self._rate = rate
        self._batch = batch
        self._events = events(1 << 16, seed=2)
        self.taken = 0

    def fill(self, count: int) -> None:
        for at in range(0, count, 1 << 16):
            self.take(min(1 << 16, count - at))

    def take(self, count: int) -> None:
        at = self.taken % (len(self._events) - count + 1)
        part = self._events[at : at + count].copy()
        now = time.monotonic_ns()
        part["time_ns"] = now + np.arange(count)
        self._store.take(part, wall_offset_ns=time.time_ns() - now)
        self.taken += count

    async def run(self, server: FlowServer, followers: int) -> None:
        while server.followers < followers:  # noqa: ASYNC110  # nobody tells
            await asyncio.sleep(0.005)
        began, done = time.monotonic(), 0
        while True:
            due = int((time.monotonic() - began) * self._rate)
            while done + self._batch <= due:
                self.take(self._batch)
                done += self._batch
                await asyncio.sleep(0)
            await asyncio.sleep(self._batch / self._rate / 2)


async def ours(options: argparse.Namespace) -> None:
    store = Store(capacity=RING, world=World(node="bench"))
    store.learn(meaning())
    source = Source(store, options.rate, options.batch)
    source.fill(options.rows)
    server = FlowServer(store, Notes(), About(version="bench", node_name=lambda: "default/bench"))
    listener = GrpcServer(server.handlers(), socket=options.socket, group=None)
    await listener.start()

    def tell() -> None:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        print(f"used {usage.ru_utime + usage.ru_stime:.6f} {source.taken}", flush=True)

    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, tell)
    print("ready", flush=True)
    if options.rate:
        await source.run(server, options.followers)
    await asyncio.Event().wait()


async def baseline(options: argparse.Namespace) -> None:
    """grpcio, streaming bytes that are ready: what a runtime costs by itself."""
    store = Store(capacity=RING, world=World(node="bench"))
    store.learn(meaning())
    Source(store, 0, 0).fill(4096)
    encoder = Encoder()
    cursor = store.query(FlowQuery())
    ready = [m for item in cursor.read() if isinstance(item, Rows) for m in encoder.messages(item)]

    async def stream(request: bytes, context: Any) -> None:
        for number in range(options.rows):
            await context.write(ready[number % len(ready)])

    handler = grpc.unary_stream_rpc_method_handler(stream)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("observer.Observer", {"GetFlows": handler})]
    )
    server.add_insecure_port(f"unix:{options.socket}")
    await server.start()
    print("ready", flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("socket", type=Path)
    parser.add_argument("--rows", type=int, default=RING)
    parser.add_argument("--rate", type=float, default=0)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--followers", type=int, default=1)
    parser.add_argument("--grpcio", action="store_true")
    options = parser.parse_args()
    asyncio.run(baseline(options) if options.grpcio else ours(options))


if __name__ == "__main__":
    main()
