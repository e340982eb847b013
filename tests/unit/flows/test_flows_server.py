"""The services over a real socket, asked with grpcio's stubs: each call of Hubble's command."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.flows.v1 import flows_pb2, flows_pb2_grpc
from protos.hubble.v1 import (
    flow_pb2,
    observer_pb2,
    observer_pb2_grpc,
    peer_pb2,
    peer_pb2_grpc,
    relay_pb2,
)
from services.flows import convert
from services.flows.encoder import Encoder
from services.flows.http2 import GrpcServer
from services.flows.http2.standard import Health, reflection_handlers
from services.flows.ledger import Cause, Loss
from services.flows.notes import Note, Notes
from services.flows.rows import Rows
from services.flows.server import FLOWS, HUBBLE_HEALTH, OBSERVER, PEER, About, FlowServer
from services.flows.store import Store
from tests.unit.flows.flowworld import NODE_NAME, Seen, expected_flow, meaning, random_events

COUNT = 600


def request(**fields: Any) -> observer_pb2.GetFlowsRequest:
    return observer_pb2.GetFlowsRequest(**fields)


class Served:
    """A store with flows, served."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = Store(
            capacity=2048, run=5, cel=convert.compile_cel, encode_flows=Encoder().flows
        )
        self.store.learn(meaning())
        # Wall clock as of now, so that ages mean something.
        self.offset_ns = time.time_ns() - 2_000_000_000
        self.seen = random_events(random.Random(3), COUNT, start_ns=1_000_000_000)
        self.put(*self.seen)
        self.notes = Notes()
        self.away = ""
        self.flows = FlowServer(
            self.store,
            self.notes,
            About(
                version="cilia v0.3.0",
                node_name=lambda: NODE_NAME,
                address="192.0.2.1:4244",
                watching=lambda: self.away,
            ),
        )
        self.health = Health((OBSERVER, HUBBLE_HEALTH))
        self.server = GrpcServer(
            {
                **self.flows.handlers(),
                **self.health.handlers(),
                **reflection_handlers((OBSERVER, PEER, FLOWS)),
            },
            socket=path,
            group=None,
            headers=[("hubble-server-version", "0.3.0")],
        )
        self.observer: Any = None
        self.channel: Any = None

    def put(self, *seen: Seen) -> None:
        for one in seen:
            if one.l7 is None:
                self.store.take(one.event(), wall_offset_ns=self.offset_ns)
            else:
                self.store.take_l7([one.l7_event()], wall_offset_ns=self.offset_ns)

    def expected(self, seen: Seen, uuid: str) -> flow_pb2.Flow:
        flow = expected_flow(seen, uuid)
        flow.time.CopyFrom(convert.to_timestamp(seen.time_ns + self.offset_ns))
        return flow

    async def ask(self, **fields: Any) -> list[observer_pb2.GetFlowsResponse]:
        return [response async for response in self.observer.GetFlows(request(**fields))]


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    served = Served(tmp_path / "hubble.sock")
    await served.server.start()
    await served.health.set_serving(True)
    async with grpc.aio.insecure_channel(f"unix:{served.path}") as channel:
        served.channel = channel
        served.observer = observer_pb2_grpc.ObserverStub(channel)
        yield served
    await served.server.stop()


def same(flow: flow_pb2.Flow, expected: flow_pb2.Flow) -> bool:
    flow.ClearField("Summary")
    return flow == expected


# ---- observe


async def test_every_flow_arrives_field_by_field(served: Served) -> None:
    found = await served.ask(number=(1 << 64) - 1)
    assert len(found) == COUNT
    for response, seen in zip(found, served.seen, strict=True):
        expected = served.expected(seen, response.flow.uuid)
        assert same(response.flow, expected), (response.flow, expected)
        assert response.node_name == NODE_NAME
        assert response.time == expected.time
    assert len({response.flow.uuid for response in found}) == COUNT


async def test_last_first_since_and_until(served: Served) -> None:
    everything = await served.ask(number=(1 << 64) - 1)
    uuids = [r.flow.uuid for r in everything]

    async def shown(**fields: Any) -> list[str]:
        return [r.flow.uuid for r in await served.ask(**fields)]

    assert await shown(number=3) == uuids[-3:]
    assert await shown(number=3, first=True) == uuids[:3]
    middle = everything[COUNT // 2].time
    assert await shown(since=middle) == uuids[COUNT // 2 :]
    assert await shown(until=middle) == uuids[: COUNT // 2 + 1]
    assert await shown(since=middle, until=middle) == [uuids[COUNT // 2]]
    assert await shown() == uuids


async def test_masks(served: Served) -> None:
    paths = ["time", "source.pod_name", "verdict", "IP", "l4"]
    full = await served.ask(number=50)
    masked = await served.ask(number=50, field_mask=FieldMask(paths=paths))
    for whole, part in zip(full, masked, strict=True):
        wanted = flow_pb2.Flow()
        FieldMask(paths=paths).MergeMessage(whole.flow, wanted)
        # A part that holds nothing may be there or not.
        if not wanted.source.pod_name:
            wanted.ClearField("source")
        if not part.flow.source.pod_name:
            part.flow.ClearField("source")
        assert part.flow == wanted


async def test_filters(served: Served) -> None:
    dropped = await served.ask(whitelist=[flow_pb2.FlowFilter(verdict=[flow_pb2.DROPPED])])
    assert dropped
    assert all(r.flow.verdict == flow_pb2.DROPPED for r in dropped)
    xwing = await served.ask(
        whitelist=[flow_pb2.FlowFilter(source_pod=["lab/xwing"])],
        blacklist=[flow_pb2.FlowFilter(verdict=[flow_pb2.FORWARDED])],
    )
    assert xwing
    assert all(
        r.flow.source.pod_name == "xwing" and r.flow.verdict != flow_pb2.FORWARDED for r in xwing
    )


async def test_following_shows_what_comes(served: Served) -> None:
    call = served.observer.GetFlows(request(follow=True, number=2))
    backlog = [await call.read(), await call.read()]
    assert all(r.HasField("flow") for r in backlog)
    fresh = replace(served.seen[0], l7=None, type=4, time_ns=3_000_000_000)
    served.put(fresh)
    async with asyncio.timeout(5):
        response = await call.read()
    assert same(response.flow, served.expected(fresh, response.flow.uuid))
    assert served.flows.followers == 1
    call.cancel()


async def test_followers_of_the_same_share_what_was_encoded(served: Served) -> None:
    calls = [served.observer.GetFlows(request(follow=True)) for _ in range(4)]
    for call in calls:
        await call.initial_metadata()
    await asyncio.sleep(0)
    before = served.flows._encoded.hits
    fresh = replace(served.seen[0], l7=None, type=4, time_ns=3_000_000_000)
    served.put(fresh)
    async with asyncio.timeout(5):
        uuids = {(await call.read()).flow.uuid for call in calls}
    assert len(uuids) == 1
    assert served.flows._encoded.hits == before + 3
    for call in calls:
        call.cancel()


async def test_losses_are_told(served: Served) -> None:
    served.store.lose(Cause.KERNEL, 17)
    served.put(replace(served.seen[0], l7=None, type=4, time_ns=3_000_000_000))
    found = await served.ask(number=(1 << 64) - 1)
    (lost,) = [r.lost_events for r in found if r.HasField("lost_events")]
    assert (lost.source, lost.num_events_lost) == (flow_pb2.PERF_EVENT_RING_BUFFER, 17)
    served.store.lose(Cause.AGENT, None, detail="the agent went away")
    found = await served.ask(number=(1 << 64) - 1)
    (away,) = [r.node_status for r in found if r.HasField("node_status")]
    assert away.state_change == relay_pb2.NODE_UNAVAILABLE
    assert "the agent went away" in away.message


async def test_a_reader_that_is_overtaken_is_told_how_much(served: Served) -> None:
    cursor = served.store.query(convert.flows_request(request(follow=True))[0])
    cursor.read()
    served.put(*random_events(random.Random(4), 3000, start_ns=3_000_000_000))
    items: list[Rows | Loss] = []
    while cursor.state.name != "WAITING" or not items:
        items += cursor.read()
    lost = sum(item.count or 0 for item in items if isinstance(item, Loss))
    assert lost == 3000 - 2048


@pytest.mark.parametrize(
    ("asked", "code", "words"),
    [
        ({"first": True, "follow": True}, "INVALID_ARGUMENT", "exclude"),
        ({"whitelist": [flow_pb2.FlowFilter(source_port=["http"])]}, "INVALID_ARGUMENT", "http"),
        ({"whitelist": [flow_pb2.FlowFilter(http_path=["("])]}, "INVALID_ARGUMENT", "http_path"),
        ({"field_mask": FieldMask(paths=["nothing"])}, "INVALID_ARGUMENT", "nothing"),
    ],
)
async def test_what_cannot_be_answered_is_refused(
    served: Served, asked: dict[str, Any], code: str, words: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.ask(**asked)
    assert caught.value.code().name == code
    assert words in (caught.value.details() or "")


async def test_unknown_fields_are_refused_not_ignored(served: Served) -> None:
    method = served.channel.unary_stream("/observer.Observer/GetFlows")
    newer = bytes([0x32, 3, 0xC2, 0x3E, 0])  # whitelist {1000: ""}
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in method(newer):
            pass
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in method(b"\xff\xff"):
            pass
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


# ---- the other calls of the command


async def test_status(served: Served) -> None:
    checker: Any = health_pb2_grpc.HealthStub(served.channel)
    health = await checker.Check(health_pb2.HealthCheckRequest(service=HUBBLE_HEALTH))
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    status = await served.observer.ServerStatus(observer_pb2.ServerStatusRequest())
    assert (status.num_flows, status.max_flows, status.seen_flows) == (COUNT, 2048, COUNT)
    assert status.version == "cilia v0.3.0"
    assert status.num_connected_nodes.value == 1
    served.away = "the agent does not answer"
    status = await served.observer.ServerStatus(observer_pb2.ServerStatusRequest())
    assert list(status.unavailable_nodes) == [NODE_NAME]


async def test_list_nodes_and_namespaces(served: Served) -> None:
    (node,) = (await served.observer.GetNodes(observer_pb2.GetNodesRequest())).nodes
    assert (node.name, node.address, node.state) == (
        NODE_NAME, "192.0.2.1:4244", relay_pb2.NODE_CONNECTED,
    )  # fmt: skip
    found = await served.observer.GetNamespaces(observer_pb2.GetNamespacesRequest())
    assert [n.namespace for n in found.namespaces] == ["lab", "prod"]


async def test_watch_peers(served: Served) -> None:
    stub: Any = peer_pb2_grpc.PeerStub(served.channel)
    call = stub.Notify(peer_pb2.NotifyRequest())
    change = await call.read()
    assert (change.name, change.address, change.type) == (
        NODE_NAME, "192.0.2.1:4244", peer_pb2.PEER_ADDED,
    )  # fmt: skip
    call.cancel()


async def test_agent_events(served: Served) -> None:
    def note(at: int, revision: int) -> Note:
        event = flow_pb2.AgentEvent(type=flow_pb2.POLICY_UPDATED)
        event.policy_update.revision = revision
        return Note(at, event.SerializeToString())

    served.notes.add(note(10**18 + i, i) for i in range(5))

    async def revisions(**fields: Any) -> list[int]:
        call = served.observer.GetAgentEvents(observer_pb2.GetAgentEventsRequest(**fields))
        return [r.agent_event.policy_update.revision async for r in call]

    assert await revisions(number=2) == [3, 4]
    assert await revisions(number=2, first=True) == [0, 1]
    assert await revisions(since=convert.to_timestamp(10**18 + 3)) == [3, 4]
    call = served.observer.GetAgentEvents(observer_pb2.GetAgentEventsRequest(follow=True, number=1))
    assert (await call.read()).agent_event.policy_update.revision == 4
    served.notes.add([note(10**18 + 9, 9)])
    assert (await call.read()).agent_event.policy_update.revision == 9
    call.cancel()


@pytest.mark.parametrize("path", ["/observer.Observer/GetDebugEvents", "/recorder.Recorder/Record"])
async def test_calls_that_are_not_served_say_why(served: Served, path: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in served.channel.unary_stream(path)(b""):
            pass
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "here" in (caught.value.details() or "") or "no debug" in (caught.value.details() or "")


async def test_reflection(served: Served) -> None:
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    stub: Any = reflection_pb2_grpc.ServerReflectionStub(served.channel)

    async def asked() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        yield reflection_pb2.ServerReflectionRequest(file_containing_symbol="flow.Flow")

    listed, described = [answer async for answer in stub.ServerReflectionInfo(asked())]
    names = {service.name for service in listed.list_services_response.service}
    assert {"observer.Observer", "peer.Peer", "grpc.health.v1.Health"} <= names
    assert described.file_descriptor_response.file_descriptor_proto


# ---- what Hubble lacks


async def test_sums(served: Served) -> None:
    stub: Any = flows_pb2_grpc.FlowsServiceStub(served.channel)
    reply = await stub.Aggregate(
        flows_pb2.AggregateRequest(
            group_by=["source", "verdict"],
            whitelist=[flow_pb2.FlowFilter(verdict=[flow_pb2.DROPPED])],
        )
    )
    flows = await served.ask(whitelist=[flow_pb2.FlowFilter(verdict=[flow_pb2.DROPPED])])
    assert reply.flows == len(flows)
    by_xwing = sum(r.flow.source.pod_name == "xwing" for r in flows)
    assert {tuple(row.keys): row.flows for row in reply.rows}["lab/xwing", "DROPPED"] == by_xwing
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Aggregate(flows_pb2.AggregateRequest(group_by=["colour"]))
    assert "is no column" in (caught.value.details() or "")


async def test_losses_and_stats(served: Served) -> None:
    stub: Any = flows_pb2_grpc.FlowsServiceStub(served.channel)
    served.store.lose(Cause.TRANSPORT, 3, detail="too slow")
    reply = await stub.Losses(flows_pb2.LossesRequest())
    assert reply.watching
    (loss,) = reply.losses
    assert (loss.cause, loss.count, loss.detail) == ("transport", 3, "too slow")
    stats = await stub.Stats(flows_pb2.StatsRequest())
    assert (stats.seen, stats.memory.flows, stats.lost["transport"]) == (COUNT, COUNT, 3)
    assert not stats.disk.capacity
