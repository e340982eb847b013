"""From the agent's messages to flows, and what is told when they do not come."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from ipaddress import ip_address
from typing import Any

import pytest

from cilia.bpf import constants as k
from cilia.errors import UnavailableError
from protos.agent.v1 import agent_pb2
from protos.common.v1 import common_pb2
from protos.hubble.v1 import flow_pb2 as pb
from protos.hubble.v1 import relay_pb2
from protos.xds.v1 import xds_pb2
from services.flows import convert
from services.flows.encoder import Encoder
from services.flows.filterspec import FlowQuery
from services.flows.ingest import AgentBatch, Ingest
from services.flows.ledger import Cause
from services.flows.notes import Notes
from services.flows.rows import Rows
from services.flows.store import Store
from tests.unit.flows.flowworld import OFFSET_NS, Seen

pytestmark = pytest.mark.timeout(20)


def label(key: str, value: str) -> common_pb2.Label:
    return common_pb2.Label(source="k8s", key=key, value=value)


def meaning(**changes: Any) -> agent_pb2.EventMeaning:
    values: dict[str, Any] = {
        "reset": True,
        "node": "n1",
        "cluster": "default",
        "endpoints": [
            agent_pb2.EventEndpoint(
                id=1, name="client", namespace="lab", identity=1001, addresses=["10.1.0.1"],
                ifindex=101, host_interface="lxc1",
            ),
            agent_pb2.EventEndpoint(
                id=2, name="server", namespace="lab", identity=1002, addresses=["10.1.0.2"],
                mode="default", ingress_enforced=True, ingress_isolated_by=[7],
            ),
        ],
        "identities": [
            common_pb2.Identity(id=1001, labels=[label("app", "client")]),
            common_pb2.Identity(id=1002, labels=[label("app", "server")]),
        ],
        "rules": [
            agent_pb2.RuleRef(
                rule_id=7, policy="CiliumNetworkPolicy lab/l7", path="spec.ingress[0]",
                origin=common_pb2.Origin(source="l7.yaml", line=9),
            )
        ],
    }  # fmt: skip
    return agent_pb2.EventMeaning(**(values | changes))


def message(**values: Any) -> agent_pb2.EventBatch:
    return agent_pb2.EventBatch(wall_offset_ns=OFFSET_NS, **values)


def record(**values: Any) -> xds_pb2.L7Record:
    given: dict[str, Any] = {
        "time_ns": OFFSET_NS + 5_000_000_000,
        "type": xds_pb2.L7Record.REQUEST,
        "verdict": xds_pb2.L7Record.FORWARDED,
        "direction": xds_pb2.INGRESS,
        "proxy_port": 10001,
        "source": xds_pb2.L7Peer(
            address=ip_address("10.1.0.1").packed, port=40000, identity=1001, endpoint_id=1
        ),
        "destination": xds_pb2.L7Peer(
            address=ip_address("10.1.0.2").packed, port=80, identity=1002, endpoint_id=2
        ),
        "parser": "http",
        "http": xds_pb2.HTTPRecord(
            method="GET", url="http://server/public", protocol="HTTP/1.1",
            headers=[xds_pb2.Header(name="X-A", value="b")],
        ),
    }  # fmt: skip
    return xds_pb2.L7Record(**(given | values))


class Script:
    """An agent that says what it is given, and then goes."""

    def __init__(self, *batches: agent_pb2.EventBatch) -> None:
        self.said = batches

    async def batches(self) -> AsyncIterator[AgentBatch]:
        for one in self.said:
            yield convert.agent_batch(one)
        raise UnavailableError("the agent is gone")


def flows(store: Store) -> list[pb.Flow]:
    items = store.query(FlowQuery()).read()
    encoder = Encoder()
    return [
        pb.Flow.FromString(raw)
        for item in items
        if isinstance(item, Rows)
        for raw in encoder.flows(item)
    ]


async def hear(*batches: agent_pb2.EventBatch) -> tuple[Store, Notes, Ingest]:
    store, notes = Store(capacity=1024, run=1), Notes()
    ingest = Ingest(Script(*batches), store, notes)
    with pytest.raises(UnavailableError):
        await ingest.follow()
    return store, notes, ingest


async def test_events_are_named_by_what_came_with_them() -> None:
    event = Seen().event().tobytes()
    store, _, _ = await hear(
        message(meaning=meaning()),
        message(events=event),
        # Gone after these events, which it still names.
        message(events=event, meaning=agent_pb2.EventMeaning(gone_endpoints=[1])),
        message(events=event),
    )
    assert [flow.source.pod_name for flow in flows(store)] == ["client", "client", ""]
    assert {flow.node_name for flow in flows(store)} == {"default/n1"}


async def test_a_denial_names_its_rule_file_and_place() -> None:
    drop = Seen(type=k.EVENT_DROP, reason=133).event().tobytes()
    store, _, _ = await hear(message(meaning=meaning()), message(events=drop))
    [flow] = flows(store)
    [by] = flow.ingress_denied_by
    assert (by.kind, by.namespace, by.name) == ("CiliumNetworkPolicy", "lab", "l7")
    assert {"cilia:rule=spec.ingress[0]", "cilia:origin=l7.yaml:9"} <= set(by.labels)


async def test_losses_and_absence_are_entered() -> None:
    store, _, ingest = await hear(
        message(meaning=meaning(), lost_ring=3), message(lost_transport=4, lost_l7=5)
    )
    causes = [(loss.cause, loss.count) for loss in store.ledger]
    assert causes == [
        (Cause.KERNEL, 3),
        (Cause.TRANSPORT, 4),
        (Cause.TRANSPORT, 5),
        (Cause.AGENT, None),
    ]
    assert not ingest.watching
    assert "gone" in ingest.problem
    before = list(store.ledger)[-1]
    ingest.tick()
    after = list(store.ledger)[-1]
    assert len(store.ledger) == 4
    assert after.from_ns == before.from_ns
    assert after.to_ns >= before.to_ns
    status = convert.loss_to_response(after, "default/n1").node_status
    assert status.state_change == relay_pb2.NODE_UNAVAILABLE
    # Trying again in vain is the same absence.
    with pytest.raises(UnavailableError):
        await Ingest(Script(), store, Notes()).follow()


async def test_an_http_request_its_answer_and_its_refusal() -> None:
    answer = record(
        type=xds_pb2.L7Record.RESPONSE,
        latency_ns=7_000_000,
        http=xds_pb2.HTTPRecord(method="GET", url="http://server/public", code=200),
        rule_id=7,
    )
    refusal = record(
        verdict=xds_pb2.L7Record.DENIED,
        time_ns=OFFSET_NS + 6_000_000_000,
        http=xds_pb2.HTTPRecord(
            method="PUT", url="http://server/secret", code=403,
            headers=[xds_pb2.Header(
                name="traceparent", value="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
            )],
        ),
    )  # fmt: skip
    store, _, _ = await hear(message(meaning=meaning()), message(l7=[record(), answer, refusal]))
    asked, answered, refused = flows(store)
    assert asked.Type == pb.L7
    assert asked.event_type.type == 129
    assert (asked.source.pod_name, asked.destination.pod_name) == ("client", "server")
    assert asked.l7.type == pb.REQUEST
    assert (asked.l7.http.method, asked.l7.http.code) == ("GET", 0)
    assert [(h.key, h.value) for h in asked.l7.http.headers] == [("X-A", "b")]
    assert (asked.verdict, asked.is_reply.value) == (pb.FORWARDED, False)
    assert asked.proxy_port == 10001
    assert asked.Summary == "HTTP/1.1 GET http://server/public"
    # The answer goes the other way, when it was given.
    assert (answered.source.pod_name, answered.destination.pod_name) == ("server", "client")
    assert answered.l4.TCP.source_port == 80
    assert answered.is_reply.value
    assert (answered.l7.http.code, answered.l7.latency_ns) == (200, 7_000_000)
    assert answered.time.ToNanoseconds() - asked.time.ToNanoseconds() == 7_000_000
    assert [by.name for by in answered.ingress_allowed_by] == ["l7"]
    assert refused.verdict == pb.DROPPED
    assert (refused.l7.type, refused.l7.http.code) == (pb.REQUEST, 403)
    assert [by.name for by in refused.ingress_denied_by] == ["l7"]
    assert refused.trace_context.parent.trace_id == "0af7651916cd43dd8448eb211c80319c"


async def test_records_of_other_parsers_and_of_hostile_clients() -> None:
    dns = record(parser="dns", fields={"query": "a.b.", "qtypes": "A,AAAA", "rcode": "3"})
    kafka = record(parser="kafka", fields={"api_key": "produce", "topic": "t", "error_code": "x"})
    huge = record(
        http=xds_pb2.HTTPRecord(
            method="GET", url="http://" + "u" * 1_000_000,
            headers=[xds_pb2.Header(name="h", value="v" * 100_000)] * 1000,
        ),
        source=xds_pb2.L7Peer(address=b"123"),
    )  # fmt: skip
    store, _, _ = await hear(message(meaning=meaning()), message(l7=[dns, kafka, huge]))
    named, topic, bounded = flows(store)
    assert (named.l7.dns.query, list(named.l7.dns.qtypes)) == ("a.b.", ["A", "AAAA"])
    assert named.l7.dns.rcode == 3
    assert (topic.l7.kafka.topic, topic.l7.kafka.error_code) == ("t", 0)
    assert bounded.ByteSize() < 2 << 20
    assert not bounded.HasField("IP")


async def test_notifications_become_agent_events() -> None:
    def note(subtype: int, json: str) -> agent_pb2.Notification:
        return agent_pb2.Notification(subtype=subtype, time_ns=time.time_ns(), json=json)

    _, notes, _ = await hear(
        message(
            notifications=[
                note(5, '{"labels":["x"],"revision":4,"rule_count":2}'),
                note(7, '{"id":3,"labels":[],"pod-name":"p","namespace":"n"}'),
                note(2, '{"time":"2026-01-01T00:00:00Z"}'),
                note(9, '{"cidr":"10.0.0.0/8","id":5}'),
                note(4, '{"id":3,"labels":["a"],"error":"bad"}'),
                note(5, "no json"),
                note(99, "{}"),
            ]
        )
    )
    events = [pb.AgentEvent.FromString(one.event) for one in notes.since(0)]
    assert [event.type for event in events] == [
        pb.POLICY_UPDATED, pb.ENDPOINT_CREATED, pb.AGENT_STARTED, pb.IPCACHE_UPSERTED,
        pb.ENDPOINT_REGENERATE_FAILURE, pb.AGENT_EVENT_UNKNOWN, pb.AGENT_EVENT_UNKNOWN,
    ]  # fmt: skip
    assert events[0].policy_update.rule_count == 2
    assert events[1].endpoint_update.pod_name == "p"
    assert events[4].endpoint_regenerate.error == "bad"


def test_events_of_another_size_are_refused() -> None:
    with pytest.raises(convert.EventsInvalid):
        convert.agent_batch(message(events=b"x" * 130))
