"""The xDS service against many clients, and against what it would cost without its cache.

One process serves, another plays the clients: 1,000 delta streams of 200 resources each, all of
them shared. The clients are as thin as can be (they answer with bytes made by hand), for what is
measured is the service.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from envoy.config.route.v3 import route_components_pb2, route_pb2
from envoy.service.discovery.v3 import discovery_pb2

from cilia.rpc.server import Server
from cilia.telemetry import log
from services.xds.cache import ResourceCache
from services.xds.hub import Hub, Peer
from services.xds.resources import RDS, NodeID, delta_response, field, make
from services.xds.server import DiscoveryServer
from tests.bench.figure import figure, percentile

ROOT = Path(__file__).resolve().parents[2]
STREAMS = 1000
RESOURCES = 200
CHANGES = 20
METHOD = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"


def routes(name: str, text: str) -> route_pb2.RouteConfiguration:
    """About 1 KB, as rules are."""
    made = route_pb2.RouteConfiguration(name=name)
    host = made.virtual_hosts.add(name="all", domains=["*"])
    for number in range(8):
        route = host.routes.add()
        route.match.safe_regex.regex = f"/v1/{text}/{number}/[a-z0-9]+/items/[0-9]+"
        route.route.cluster = "upstream"
        route.typed_per_filter_config["x"].Pack(route_components_pb2.VirtualHost(name=text))
    return made


# ---- the processes


async def serve(socket: Path) -> None:
    """Told by lines: `change`, `rss`; tells one JSON object a line."""
    log.setup("bench", level="error")
    cache = ResourceCache()
    with cache.transaction() as change:
        for number in range(RESOURCES):
            change.put(RDS, f"r{number}", routes(f"r{number}", "first"))
    hub = Hub(cache, max_streams_a_node=STREAMS + 1)
    discovery = DiscoveryServer(hub=hub, transport="unix")
    server = Server(socket=socket, services=[discovery.register], group=None)
    await server.start()
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
    )
    say({"ready": True})
    round_, until, everybody = 0, 0, asyncio.Event()

    def on_answer(_: NodeID) -> None:
        if hub.acks >= until:
            everybody.set()

    hub.watch(on_answer)
    while line := (await lines.readline()).strip():
        if line == b"change":
            round_ += 1
            until, everybody = hub.acks + STREAMS, asyncio.Event()
            begun = time.monotonic()
            cache.put(RDS, "r7", routes("r7", f"round{round_}"))
            await everybody.wait()
            say({"last_ack_s": time.monotonic() - begun})
        else:
            held = sum(
                len(sub.held)
                for attached in hub.streams.values()
                for sub in attached.stream.subscriptions.values()
            )
            say(
                {
                    "rss": rss(),
                    "cpu_s": time.process_time(),
                    "streams": len(hub.streams),
                    "held": held,
                }
            )
    await server.stop()


async def play(socket: Path) -> None:
    """The clients. Each answers every response as soon as it is there."""
    names = [f"r{number}" for number in range(RESOURCES)]
    subscribe = discovery_pb2.DeltaDiscoveryRequest(type_url=RDS, resource_names_subscribe=names)
    subscribe.node.id = "bench"
    first = subscribe.SerializeToString()
    ready = 0
    channels = [
        grpc.aio.insecure_channel(
            f"unix:{socket}",
            options=[
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.default_authority", "localhost"),
            ],
        )
        for _ in range(20)
    ]

    async def one(number: int) -> None:
        nonlocal ready
        call: Any = channels[number % len(channels)].stream_stream(METHOD, None, None)
        call = call()
        await call.write(first)
        counted = False
        while True:
            data = await call.read()
            if not data:
                return
            await call.write(field(2, RDS.encode()) + field(6, nonce_of(data)))
            if not counted:
                counted = True
                ready += 1
                if ready == STREAMS:
                    say({"ready": True})

    async with asyncio.TaskGroup() as group:
        for number in range(STREAMS):
            group.create_task(one(number))


def nonce_of(data: bytes) -> bytes:
    """The service puts it behind the resources, before removals: field 5, of up to 9 digits."""
    at = data.rindex(b"\x2a", max(0, len(data) - 12))
    return data[at + 2 : at + 2 + data[at + 1]]


def say(what: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def rss() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Child:
    def __init__(self, role: str, socket: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.bench_xds", role, str(socket)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the process has ended"
        said: dict[str, Any] = json.loads(line)
        return said

    def ask(self, what: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self.hear()


@contextlib.contextmanager
def child(role: str, socket: Path) -> Iterator[Child]:
    made = Child(role, socket)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.communicate()


# ---- the benches


def bench_xds_fanout() -> list[dict[str, Any]]:
    """1,000 streams of 200 resources: one change until the last has acknowledged it.

    The baseline is gRPC itself: the same number of messages of the same size to as many streams,
    written by a handler that does nothing else.
    """
    with tempfile.TemporaryDirectory(prefix="cilt-bench-") as directory:
        socket = Path(directory) / "xds.sock"
        with child("serve", socket) as server:
            server.hear()
            empty = server.ask("rss")["rss"]
            begun = time.monotonic()
            with child("play", socket) as clients:
                clients.hear()
                connected_s = time.monotonic() - begun
                time.sleep(1)
                full = server.ask("rss")
                assert full["streams"] == STREAMS
                assert full["held"] == STREAMS * RESOURCES
                for _ in range(3):
                    server.ask("change")
                before = server.ask("rss")["cpu_s"]
                took = [server.ask("change")["last_ack_s"] for _ in range(CHANGES)]
                last = server.ask("rss")
                after, cpu_s = last["rss"], (last["cpu_s"] - before) / CHANGES / STREAMS
    bare = asyncio.run(_bare_fanout())
    return [
        figure(
            "xds_change_to_last_ack_p99",
            percentile(took, 99),
            "s",
            goal=1.0,
            less_is_better=True,
        ),
        figure("xds_change_to_last_ack_p50", statistics.median(took), "s"),
        figure("xds_cpu_per_response_and_ack", cpu_s * 1e6, "us"),
        figure(
            "xds_fanout_to_bare_grpc",
            statistics.median(took),
            "s",
            baseline=bare,
            goal=4.0,
            less_is_better=True,
        ),
        figure("xds_1000_streams_sent_200_each", STREAMS * RESOURCES / connected_s, "res/s"),
        figure("xds_rss_empty", empty / 1e6, "MB"),
        figure("xds_rss_1000_streams", max(full["rss"], after) / 1e6, "MB"),
        figure("xds_rss_per_stream", (full["rss"] - empty) / STREAMS / 1e3, "KB"),
    ]


async def _bare_fanout() -> float:
    """What a message to each of as many streams, and an answer to each, costs without us; both ends
    in this process' children would measure the children: here server and clients share one loop, so
    the figure is of both."""
    size = len(delta_response(RDS, "v", "1", [make(RDS, "r7", routes("r7", "round1"))], ()))
    data = b"x" * size
    answered = connected = 0
    gates = [asyncio.Event() for _ in range(STREAMS)]
    everybody = asyncio.Event()

    async def handle(requests: AsyncIterator[bytes], context: Any) -> None:
        nonlocal answered, connected
        gate = gates[connected]
        connected += 1
        if connected == STREAMS:
            everybody.set()
        iterator = aiter(requests)
        await anext(iterator)
        while True:
            await gate.wait()
            gate.clear()
            await context.write(data)
            await anext(iterator)
            answered += 1
            if answered == STREAMS:
                everybody.set()

    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(handle)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("b.B", {"M": handler}),))
    with tempfile.TemporaryDirectory(prefix="cilt-bench-") as directory:
        address = f"unix:{directory}/b.sock"
        server.add_insecure_port(address)
        await server.start()
        channels = [
            grpc.aio.insecure_channel(
                address,
                options=[
                    ("grpc.use_local_subchannel_pool", 1),
                    ("grpc.default_authority", "localhost"),
                ],
            )
            for _ in range(20)
        ]

        async def client(number: int) -> None:
            call: Any = channels[number % 20].stream_stream("/b.B/M", None, None)
            call = call()
            await call.write(b"")
            while await call.read():
                await call.write(b"x" * 80)

        took = []
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(client(number)) for number in range(STREAMS)]
            await everybody.wait()
            for _ in range(5):
                everybody.clear()
                answered, begun = 0, time.monotonic()
                for gate in gates:
                    gate.set()
                await everybody.wait()
                took.append(time.monotonic() - begun)
            for task in tasks:
                task.cancel()
        await server.stop(0)
    return statistics.median(took)


def bench_xds_core() -> list[dict[str, Any]]:
    """The core alone, without gRPC: responses for many streams from one serialisation, against
    messages that are built and serialised for each."""
    cache = ResourceCache()
    with cache.transaction() as change:
        for number in range(RESOURCES):
            change.put(RDS, f"r{number}", routes(f"r{number}", "first"))
    hub = Hub(cache, max_streams_a_node=STREAMS)
    request = discovery_pb2.DeltaDiscoveryRequest(
        type_url=RDS, resource_names_subscribe=[f"r{number}" for number in range(RESOURCES)]
    )
    streams = 100
    attached = [
        hub.attach(NodeID("n"), delta=True, peer=Peer(), wake=lambda: None, time=0)
        for _ in range(streams)
    ]
    begun = time.perf_counter()
    for one in attached:
        one.stream.receive(request, 0)
        hub.settle(one, 0)
        sent = list(one.stream.send(0))
        assert len(sent) == 1
    ours = streams * RESOURCES / (time.perf_counter() - begun)
    messages = [routes(f"r{number}", "first") for number in range(RESOURCES)]
    rounds = 5
    begun = time.perf_counter()
    for _ in range(rounds):
        response = discovery_pb2.DeltaDiscoveryResponse(type_url=RDS, nonce="1")
        for message in messages:
            entry = response.resources.add(name=message.name, version="1")
            entry.resource.Pack(message)
        response.SerializeToString()
    theirs = rounds * RESOURCES / (time.perf_counter() - begun)
    return [figure("xds_core_resources", ours, "res/s", baseline=theirs, goal=1.0, floor=0.5)]


if __name__ == "__main__":
    role = {"serve": serve, "play": play}[sys.argv[1]]
    asyncio.run(role(Path(sys.argv[2])))
