"""A relay before servers that speak as nodes do, over real sockets; grpcio is the client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from protos.hubble.v1 import observer_pb2, observer_pb2_grpc, peer_pb2, relay_pb2
from services.flows.http2 import Call, GrpcServer, RpcFailure, Status, frame_message
from services.flows.relay.info import PeerInfo, with_port
from services.flows.relay.peers import Peers, PeersUnreadable, read_peers
from services.flows.relay.server import RelayObserver

S = 1_000_000_000


class Node:
    """A server with the flows of one node, at the given times (ns)."""

    def __init__(self, name: str, path: Path, times: Sequence[int], fail: str = "") -> None:
        self.name, self.path, self.times, self.fail = name, path, times, fail
        self.requests: list[observer_pb2.GetFlowsRequest] = []
        self.metadata: dict[str, str] = {}
        self.live: asyncio.Queue[int] = asyncio.Queue()
        handlers = {
            "/observer.Observer/GetFlows": self.flows,
            "/observer.Observer/ServerStatus": self.status,
            "/observer.Observer/GetNamespaces": self.namespaces,
        }
        self.server = GrpcServer(handlers, socket=path, group=None)

    def message(self, at: int) -> bytes:
        response = observer_pb2.GetFlowsResponse(node_name=self.name)
        response.flow.uuid = f"{self.name}/{at}"
        response.time.FromNanoseconds(at)
        return frame_message(response.SerializeToString())

    async def flows(self, call: Call) -> None:
        request = observer_pb2.GetFlowsRequest.FromString(await call.message())
        self.requests.append(request)
        self.metadata = dict(call.metadata)
        await call.start()
        await call.send_framed(b"".join(map(self.message, self.times)))
        if self.fail:
            raise RpcFailure(Status.INTERNAL, self.fail)
        while request.follow:
            await call.send_framed(self.message(await self.live.get()))

    async def status(self, call: Call) -> None:
        await call.message()
        status = observer_pb2.ServerStatusResponse(
            num_flows=len(self.times), max_flows=100, seen_flows=7, uptime_ns=5, version="cilia 1",
            flows_rate=1.5,
        )  # fmt: skip
        await call.send(status.SerializeToString())

    async def namespaces(self, call: Call) -> None:
        await call.message()
        response = observer_pb2.GetNamespacesResponse()
        response.namespaces.add(cluster="default", namespace=f"ns-{self.name}")
        response.namespaces.add(cluster="default", namespace="shared")
        await call.send(response.SerializeToString())


class Change:
    """Waits for what the peers tell of."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def __call__(self) -> None:
        self._event.set()

    async def until(self, reached: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not reached():
                self._event.clear()
                await self._event.wait()


class Relay:
    """Nodes, and a relay before them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.nodes: dict[str, Node] = {}
        self.file = directory / "peers.yaml"
        self.change = Change()
        self.peers = Peers(file=self.file, on_change=self.change)
        observer = RelayObserver(self.peers, version="cilia-relay test")
        self.server = GrpcServer(observer.handlers(), socket=directory / "relay.sock", group=None)
        self.stub: Any = None

    def write_peers(self, *extra: str) -> None:
        names = [*self.nodes, *extra]
        self.file.write_text(
            "".join(
                f"- {{name: {name}, address: 'unix://{self.directory}/{name}.sock'}}\n"
                for name in names
            )
        )

    async def add(self, name: str, times: Sequence[int], fail: str = "") -> Node:
        node = self.nodes[name] = Node(name, self.directory / f"{name}.sock", times, fail)
        await node.server.start()
        return node

    async def connected(self, *names: str) -> None:
        await self.change.until(
            lambda: {p.info.name for p in self.peers.all() if p.connected} == set(names)
        )

    async def ask(self, **request: Any) -> tuple[list[str], dict[int, list[tuple[list[str], str]]]]:
        """uuids in the order in which they came, and the reports by state."""
        uuids: list[str] = []
        reports: dict[int, list[tuple[list[str], str]]] = {}
        async for response in self.stub.GetFlows(observer_pb2.GetFlowsRequest(**request)):
            if response.HasField("node_status"):
                report = response.node_status
                reports.setdefault(report.state_change, []).append(
                    (sorted(report.node_names), report.message)
                )
            else:
                uuids.append(response.flow.uuid)
        return uuids, reports


@pytest.fixture
async def relay(tmp_path: Path) -> AsyncIterator[Relay]:
    relay = Relay(tmp_path)
    await relay.add("a", [1, 4, 5, 9])
    await relay.add("b", [2, 3, 8])
    relay.write_peers("dead")
    await relay.peers.start()
    await relay.server.start()
    await relay.connected("a", "b")
    channel: Any
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/relay.sock") as channel:
        relay.stub = observer_pb2_grpc.ObserverStub(channel)
        yield relay
    await relay.server.stop()
    await relay.peers.stop()
    for node in relay.nodes.values():
        await node.server.stop()


async def test_flows_come_merged_and_absence_is_shown(relay: Relay) -> None:
    uuids, reports = await relay.ask(number=20)
    assert uuids == ["a/1", "b/2", "b/3", "a/4", "a/5", "b/8", "a/9"]
    assert reports[relay_pb2.NODE_CONNECTED] == [(["a", "b"], "")]
    ((away, why),) = reports[relay_pb2.NODE_UNAVAILABLE]
    assert away == ["dead"]
    assert "dead.sock" in why
    assert [node.requests[-1].number for node in relay.nodes.values()] == [20, 20]


async def test_metadata_is_passed_on(relay: Relay) -> None:
    async for _ in relay.stub.GetFlows(
        observer_pb2.GetFlowsRequest(), metadata=(("authorization", "Basic xyz"),)
    ):
        pass
    assert relay.nodes["a"].metadata["authorization"] == "Basic xyz"


async def test_a_node_that_fails_is_reported_and_the_others_go_on(relay: Relay) -> None:
    relay.nodes["b"].fail = "out of order"
    uuids, reports = await relay.ask()
    assert set(uuids) == {"a/1", "b/2", "b/3", "a/4", "a/5", "b/8", "a/9"}
    assert reports[relay_pb2.NODE_ERROR] == [(["b"], "out of order")]


async def test_one_is_killed_and_comes_back(relay: Relay) -> None:
    await relay.nodes["b"].server.stop()
    await relay.connected("a")
    uuids, reports = await relay.ask()
    assert uuids == ["a/1", "a/4", "a/5", "a/9"]
    assert {name for names, _ in reports[relay_pb2.NODE_UNAVAILABLE] for name in names} == {
        "b", "dead",
    }  # fmt: skip
    await relay.add("b", [2, 3, 8])
    await relay.connected("a", "b")
    assert (await relay.ask())[0] == ["a/1", "b/2", "b/3", "a/4", "a/5", "b/8", "a/9"]


async def test_following_shows_what_comes_and_who_goes(relay: Relay) -> None:
    call = relay.stub.GetFlows(observer_pb2.GetFlowsRequest(follow=True))
    seen: list[str] = []
    states: list[tuple[int, list[str]]] = []

    async def until(uuid: str = "", state: int = -1) -> None:
        async with asyncio.timeout(10):
            while uuid not in seen and (state not in [s for s, _ in states] or uuid):
                response = await call.read()
                if response.HasField("node_status"):
                    report = response.node_status
                    states.append((report.state_change, list(report.node_names)))
                else:
                    seen.append(response.flow.uuid)

    await until("a/9")
    now = time.time_ns()
    relay.nodes["a"].live.put_nowait(now)
    await until(f"a/{now}")
    await relay.nodes["b"].server.stop()
    await until(state=relay_pb2.NODE_ERROR)
    assert states[-1] == (relay_pb2.NODE_ERROR, ["b"])
    states.clear()
    node = await relay.add("b", [])
    await until(state=relay_pb2.NODE_CONNECTED)
    later = time.time_ns()
    node.live.put_nowait(later)
    await until(f"b/{later}")
    call.cancel()


async def test_status_nodes_and_namespaces(relay: Relay) -> None:
    status = await relay.stub.ServerStatus(observer_pb2.ServerStatusRequest())
    assert (status.num_flows, status.max_flows, status.seen_flows) == (7, 200, 14)
    assert status.flows_rate == 3.0
    assert status.num_connected_nodes.value == 2
    assert list(status.unavailable_nodes) == ["dead"]
    assert status.version == "cilia-relay test"
    nodes = (await relay.stub.GetNodes(observer_pb2.GetNodesRequest())).nodes
    assert {n.name: n.state for n in nodes} == {
        "a": relay_pb2.NODE_CONNECTED,
        "b": relay_pb2.NODE_CONNECTED,
        "dead": relay_pb2.NODE_UNAVAILABLE,
    }
    namespaces = (await relay.stub.GetNamespaces(observer_pb2.GetNamespacesRequest())).namespaces
    assert [n.namespace for n in namespaces] == ["ns-a", "ns-b", "shared"]


async def test_events_are_refused_with_a_reason(relay: Relay) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in relay.stub.GetAgentEvents(observer_pb2.GetAgentEventsRequest()):
            pass
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "ask a node" in (caught.value.details() or "")


async def test_a_changed_file_changes_the_peers(relay: Relay) -> None:
    await relay.add("c", [6])
    relay.write_peers()
    await relay.connected("a", "b", "c")
    assert "c/6" in (await relay.ask())[0]
    relay.file.write_text("- {name: a}\n")
    await relay.change.until(lambda: bool(relay.peers.problem))
    assert "peer 1 lacks" in relay.peers.problem
    assert len(relay.peers.all()) == 3


async def test_a_peer_service_is_followed(tmp_path: Path) -> None:
    changes: asyncio.Queue[peer_pb2.ChangeNotification] = asyncio.Queue()

    async def notify(call: Call) -> None:
        await call.message()
        await call.start()
        while True:
            await call.send((await changes.get()).SerializeToString())

    service = GrpcServer({"/peer.Peer/Notify": notify}, socket=tmp_path / "p.sock", group=None)
    await service.start()
    node = Node("n", tmp_path / "n.sock", [1])
    await node.server.start()
    change = Change()
    peers = Peers(service=f"unix://{tmp_path}/p.sock", on_change=change)
    await peers.start()
    try:
        changes.put_nowait(
            peer_pb2.ChangeNotification(
                name="n", address=f"unix://{tmp_path}/n.sock", type=peer_pb2.PEER_ADDED
            )
        )
        await change.until(lambda: any(peer.connected for peer in peers.all()))
        changes.put_nowait(peer_pb2.ChangeNotification(name="n", type=peer_pb2.PEER_DELETED))
        await change.until(lambda: not peers.all())
    finally:
        await peers.stop()
        await node.server.stop()
        await service.stop()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not YAML"),
        ("a: b", "not a list"),
        ("- {name: x}", "peer 1 lacks a name or an address"),
        ("- {name: x, address: y, port: 1}", "unknown field port"),
        ("- {name: x, address: y}\n- {name: x, address: z}", "listed twice"),
    ],
)
def test_bad_files_of_peers(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "peers.yaml"
    path.write_text(text)
    with pytest.raises(PeersUnreadable, match=message):
        read_peers(path)


def test_addresses_get_hubbles_port(tmp_path: Path) -> None:
    path = tmp_path / "peers.yaml"
    path.write_text("- {name: x, address: 10.0.0.1}\n")
    assert read_peers(path) == (PeerInfo("x", "10.0.0.1:4244"),)
    assert with_port("10.0.0.1:99") == "10.0.0.1:99"
    assert with_port("fd00::1") == "[fd00::1]:4244"
    assert with_port("[fd00::1]:5") == "[fd00::1]:5"
    assert with_port("unix:///run/x") == "unix:///run/x"
