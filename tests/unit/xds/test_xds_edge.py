"""The edge with real gRPC: who a client is, what is refused, what reaches whom."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from envoy.service.discovery.v3 import discovery_pb2 as ds

from cilia.pki.authority import Authority, Request
from cilia.pki.files import Credentials
from cilia.rpc.server import Server, TlsServer
from protos.xds.v1 import xds_pb2 as pb
from protos.xds.v1 import xds_pb2_grpc as pb_grpc
from services.xds.accesslog import AccessLog
from services.xds.cache import ResourceCache
from services.xds.hub import Hub
from services.xds.redirects import Redirects
from services.xds.resources import CDS, LDS, RDS, NodeID
from services.xds.server import (
    AccessLogServer,
    DiscoveryServer,
    EdgeLimits,
    RedirectServer,
)
from tests.unit.xds.test_xds_redirects import Plain, redirect

ADS = "/envoy.service.discovery.v3.AggregatedDiscoveryService/"


class Edge:
    def __init__(self, socket: Path, limits: EdgeLimits | None = None) -> None:
        self.cache = ResourceCache()
        self.hub = Hub(self.cache, max_streams=4, max_streams_a_node=2)
        self.log = AccessLog(capacity=10, batch=4)
        self.redirects = Redirects(
            cache=self.cache, hub=self.hub, make_translator=Plain, node=NodeID("proxy")
        )
        self.discovery = DiscoveryServer(hub=self.hub, transport="unix", limits=limits)
        redirects, log = RedirectServer(self.redirects), AccessLogServer(self.log)
        self.server = Server(
            socket=socket,
            group=None,
            grace_s=0.1,
            services=[
                self.discovery.register,
                lambda target: pb_grpc.add_RedirectServiceServicer_to_server(redirects, target),
                lambda target: pb_grpc.add_AccessLogServiceServicer_to_server(log, target),
            ],
        )
        self.channel = grpc.aio.insecure_channel(
            f"unix:{socket}", options=[("grpc.default_authority", "localhost")]
        )

    def stream(self, method: str = ADS + "DeltaAggregatedResources") -> Any:
        call: Any = self.channel.stream_stream(method, None, None)
        return call()


@asynccontextmanager
async def edge(path: Path, limits: EdgeLimits | None = None) -> AsyncIterator[Edge]:
    made = Edge(path / "xds.sock", limits)
    await made.server.start()
    try:
        yield made
    finally:
        made.discovery.close()
        made.log.close()
        await made.channel.close(None)
        await made.server.stop()


def request(node: str, url: str = CDS, **more: Any) -> bytes:
    message = ds.DeltaDiscoveryRequest(type_url=url, **more)
    message.node.id = node
    return bytes(message.SerializeToString())


async def read(call: Any) -> ds.DeltaDiscoveryResponse:
    async with asyncio.timeout(5):
        data = await call.read()
    assert data, "the stream has ended"
    return ds.DeltaDiscoveryResponse.FromString(data)


async def until(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not check():  # noqa: ASYNC110  # what is waited for has no event
            await asyncio.sleep(0.01)


async def ended(call: Any) -> tuple[grpc.StatusCode, str]:
    async with asyncio.timeout(5):
        return await call.code(), await call.details()


async def test_changes_reach_whom_they_are_for(tmp_path: Path) -> None:
    async with edge(tmp_path) as made:
        one, two = made.stream(), made.stream()
        await one.write(request("one"))
        await two.write(request("two"))
        assert not (await read(one)).resources
        assert not (await read(two)).resources
        with made.cache.transaction() as change:
            change.put(CDS, "mine", b"1", nodes=["one"])
            change.put(CDS, "all", b"2")
        assert {r.name for r in (await read(one)).resources} == {"mine", "all"}
        assert {r.name for r in (await read(two)).resources} == {"all"}


async def test_one_types_own_service(tmp_path: Path) -> None:
    async with edge(tmp_path) as made:
        made.cache.put(RDS, "r", b"1")
        call = made.stream("/envoy.service.route.v3.RouteDiscoveryService/DeltaRoutes")
        await call.write(request("n", "", resource_names_subscribe=["r"]))
        response = await read(call)
        assert (response.type_url, [r.name for r in response.resources]) == (RDS, ["r"])
        wrong = made.stream("/envoy.service.route.v3.RouteDiscoveryService/DeltaRoutes")
        await wrong.write(request("n", LDS))
        code, details = await ended(wrong)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "Listener" in details


@pytest.mark.parametrize(
    ("data", "code", "said"),
    [
        (b"\xff\xff", grpc.StatusCode.INVALID_ARGUMENT, "cannot be read"),
        (request(""), grpc.StatusCode.INVALID_ARGUMENT, "names no node"),
        (request("n", ""), grpc.StatusCode.INVALID_ARGUMENT, "type_url"),
        (request("n", "x" * 2000), grpc.StatusCode.INVALID_ARGUMENT, "type_url"),
        (
            request("n", resource_names_subscribe=["x" * 9000]),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "9",
        ),
        (request("n" * 5000), grpc.StatusCode.RESOURCE_EXHAUSTED, "describes itself"),
    ],
)
async def test_what_no_client_says_ends_its_stream(
    tmp_path: Path, data: bytes, code: grpc.StatusCode, said: str
) -> None:
    limits = EdgeLimits(request_bytes=8192, node_bytes=4096)
    async with edge(tmp_path, limits) as made:
        call = made.stream()
        await call.write(data)
        answer = await ended(call)
        assert answer[0] is code
        assert said in answer[1]
        await asyncio.sleep(0.05)
        assert not made.hub.streams


async def test_nobody_else_is_the_proxy(tmp_path: Path) -> None:
    """What it accepts is believed to be enforced."""
    async with edge(tmp_path) as made:
        made.discovery._reserved = NodeID("proxy")
        call = made.stream()
        await call.write(request("proxy"))
        code, details = await ended(call)
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert "is the proxy" in details


async def test_streams_are_bounded_by_node_and_in_all(tmp_path: Path) -> None:
    async with edge(tmp_path) as made:
        calls = []
        for node in ("a", "a", "b", "c"):
            call = made.stream()
            await call.write(request(node))
            await read(call)
            calls.append(call)
        for node, said in (("a", "4 streams"), ("d", "4 streams")):
            call = made.stream()
            await call.write(request(node))
            code, details = await ended(call)
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert said in details
        calls[3].cancel()
        await until(lambda: len(made.hub.streams) < 4)
        call = made.stream()
        await call.write(request("a"))
        code, details = await ended(call)
        assert "node a has 2" in details


async def test_a_flood_of_requests_is_read_slowly_and_others_are_served(tmp_path: Path) -> None:
    limits = EdgeLimits(requests_per_s=100, burst=10)
    async with edge(tmp_path, limits) as made:
        flood, other = made.stream(), made.stream()
        await flood.write(request("flood"))
        await read(flood)
        for _ in range(200):
            await flood.write(request("flood"))
        await other.write(request("other"))
        await read(other)
        [stream] = [a.stream for a in made.hub.streams.values() if a.stream.node == "flood"]
        assert stream.requests < 100


async def test_the_service_stopping_ends_streams_at_once(tmp_path: Path) -> None:
    async with edge(tmp_path) as made:
        call = made.stream()
        await call.write(request("n"))
        await read(call)
        made.discovery.close()
        async with asyncio.timeout(2):
            assert not await call.read()


async def test_redirects_over_the_wire(tmp_path: Path) -> None:
    async with edge(tmp_path) as made:
        made.redirects.prepare()
        stub: Any = pb_grpc.RedirectServiceStub(made.channel)
        agent: Any = stub.Sync()
        await agent.write(pb.SyncRequest(node=pb.Node(name="n"), sequence=1))
        await agent.write(pb.SyncRequest(sequence=2, upserts=[redirect(1, "a")], synced=True))
        response: Any = await agent.read()
        [state] = response.states
        assert (state.port, state.state, state.sequence) == (1, pb.RedirectState.PENDING, 2)
        # A proxy comes and accepts.
        proxy = made.stream()
        for url, names in ((LDS, []), (RDS, ["p1"])):
            await proxy.write(request("proxy", url, resource_names_subscribe=names))
            answer = await read(proxy)
            await proxy.write(request("proxy", url, response_nonce=answer.nonce))
        response = await agent.read()
        [state] = response.states
        assert (state.port, state.state, state.digest) == (1, pb.RedirectState.ACKED, "a")
        # What cannot be meant is refused with its reason, and a newer agent ends an older one.
        newer: Any = stub.Sync()
        await newer.write(pb.SyncRequest(node=pb.Node(name="n"), sequence=1))
        code, details = await ended(agent)
        assert code is grpc.StatusCode.ABORTED
        await newer.write(pb.SyncRequest(upserts=[redirect(99_999, "a")]))
        code, details = await ended(newer)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "99999" in details
        assert set(made.redirects.rows) == {1}


async def test_a_slow_reader_of_the_log_is_told_what_it_lost(tmp_path: Path) -> None:
    async with edge(tmp_path) as made:
        records = made.log.read()
        waiting = asyncio.ensure_future(anext(records))  # noqa: TID251  # a reader that is late
        await asyncio.sleep(0)
        for number in range(15):
            made.log.publish([pb.L7Record(time_ns=number)])
        batch = await waiting
        assert batch.lost == 5
        got = list(batch.records)
        while len(got) < 10:
            batch = await anext(records)
            assert batch.lost == 0
            got += batch.records
        assert [r.time_ns for r in got] == list(range(5, 15))
        assert got[-1].node_records == 15
        assert made.log.lost == 5
        stub = pb_grpc.AccessLogServiceStub(made.channel)
        call: Any = stub.Records(pb.RecordsRequest())
        await until(lambda: made.log.readers == 2)
        made.log.publish([pb.L7Record(time_ns=99)])
        batch = await call.read()
        assert [r.time_ns for r in batch.records] == [99]


async def test_on_tcp_the_certificate_counts_and_only_discovery_is_served(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    authority.init()
    authority.issue(Request(node="n1", service="xds", names=("localhost",)))
    authority.issue(Request(node="web-7", service="envoy"))
    cache = ResourceCache()
    cache.put(CDS, "seven", b"7", nodes=["web-7"])
    cache.put(CDS, "eight", b"8", nodes=["web-8"])
    hub = Hub(cache)
    discovery = DiscoveryServer(hub=hub, transport="tcp")
    server = TlsServer(
        address="localhost:0",
        credentials=Credentials(tmp_path / "n1-xds"),
        services=[discovery.register],
        grace_s=0.1,
    )
    await server.start()
    pair = Credentials(tmp_path / "web-7-envoy").current()
    channel = grpc.aio.secure_channel(
        f"localhost:{server.port}",
        grpc.ssl_channel_credentials(pair.roots, pair.key, pair.chain),
    )
    try:
        call: Any = channel.stream_stream(ADS + "DeltaAggregatedResources", None, None)
        call = call()
        await call.write(request("web-8"))
        assert [r.name for r in (await read(call)).resources] == ["seven"]
        [attached] = hub.streams.values()
        assert (attached.stream.node, attached.peer.claimed_node) == ("web-7", "web-8")
        stub: Any = pb_grpc.RedirectServiceStub(channel)
        sync = stub.Sync()
        assert (await ended(sync))[0] is grpc.StatusCode.UNIMPLEMENTED
    finally:
        discovery.close()
        await channel.close(None)
        await server.stop()


async def test_clients_that_come_and_go_at_any_moment_leave_nothing(tmp_path: Path) -> None:
    """Half of them are cancelled while they are written to; resources change all the time."""
    dice = random.Random(3)
    async with edge(tmp_path) as made:
        made.hub._max_streams = made.hub._max_streams_a_node = 1000

        async def client(number: int) -> None:
            for _ in range(4):
                call = made.stream()
                await call.write(request(f"n{number}", RDS, resource_names_subscribe=["a", "b"]))
                for _ in range(dice.randrange(4)):
                    response = await read(call)
                    await call.write(request("", RDS, response_nonce=response.nonce))
                if dice.random() < 0.5:
                    call.cancel()
                else:
                    await call.done_writing()
                await asyncio.sleep(dice.random() / 50)

        async def change() -> None:
            for number in range(10_000):
                made.cache.put(RDS, "ab"[number % 2], b"x" * dice.randrange(100_000))
                await asyncio.sleep(0.002)

        async with asyncio.TaskGroup() as group:
            changing = group.create_task(change())
            async with asyncio.TaskGroup() as clients:
                for number in range(40):
                    clients.create_task(client(number))
            changing.cancel()
        await until(lambda: not made.hub.streams)
        assert not made.hub._index
        assert not made.hub._of_node
        call = made.stream()
        await call.write(request("n", RDS, resource_names_subscribe=["a"]))
        assert (await read(call)).resources
