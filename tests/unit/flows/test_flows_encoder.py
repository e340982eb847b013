"""Encoded flows against messages that protobuf builds, for every shape of flow and with masks."""

from __future__ import annotations

import random
from difflib import unified_diff
from itertools import pairwise

import pytest
from google.protobuf.field_mask_pb2 import FieldMask as PbMask
from google.protobuf.unknown_fields import UnknownFieldSet

from cilia.bpf import constants as k
from cilia.bpf.dropreason import DROP_REASONS
from protos.hubble.v1 import flow_pb2, observer_pb2
from services.flows.encoder import Encoder
from services.flows.fieldmask import EVERYTHING, FieldMask
from services.flows.filterspec import FlowQuery
from services.flows.l7 import Http, L7Record, L7Type
from services.flows.rows import Rows
from services.flows.store import Store
from services.flows.uuids import format_uuid
from tests.unit.flows.flowworld import (
    NODE_NAME,
    Seen,
    expected_flow,
    meaning,
    random_events,
    store_all,
)

CLI_MASK = (
    "time", "verdict", "ethernet", "IP", "l4", "source.identity", "source.namespace",
    "source.pod_name", "destination.identity", "destination.namespace", "destination.pod_name",
    "Type", "node_name", "l7", "event_type", "source_service", "destination_service", "is_reply",
    "Summary", "ip_trace_id",
)  # fmt: skip


def make_store(events: list[Seen], *, run: int = 0xABCDEF, capacity: int = 4096) -> Store:
    store = Store(capacity=capacity, run=run)
    store.learn(meaning())
    store_all(store, events)
    return store


def all_rows(store: Store) -> list[Rows]:
    cursor = store.query(FlowQuery(number=(1 << 64) - 1))
    rows = [item for item in cursor.read() if isinstance(item, Rows)]
    while cursor.state.name == "READY":
        rows += [item for item in cursor.read() if isinstance(item, Rows)]
    return rows


def decode(store: Store, mask: FieldMask = EVERYTHING) -> list[observer_pb2.GetFlowsResponse]:
    encoder = Encoder(mask)
    messages = []
    for rows in all_rows(store):
        stream = encoder.encode(rows)
        at = 0
        while at < len(stream):
            assert stream[at] == 0
            size = int.from_bytes(stream[at + 1 : at + 5], "big")
            messages.append(
                observer_pb2.GetFlowsResponse.FromString(stream[at + 5 : at + 5 + size])
            )
            at += 5 + size
        assert at == len(stream)
    return messages


def check(events: list[Seen], paths: tuple[str, ...] = ()) -> list[flow_pb2.Flow]:
    store = make_store(events)
    messages = decode(store, FieldMask(paths))
    assert len(messages) == len(events)
    for number, (seen, message) in enumerate(zip(events, messages, strict=True)):
        wanted = expected_flow(seen, format_uuid(store.run, number))
        wanted.Summary = message.flow.Summary
        if not paths or "Summary" in paths:
            assert message.flow.Summary or seen.proto in (0, 50), seen
        if paths:
            masked = flow_pb2.Flow()
            PbMask(paths=paths).MergeMessage(wanted, masked)
            wanted = masked
        if message.flow != wanted:
            differ = unified_diff(
                str(wanted).splitlines(), str(message.flow).splitlines(), lineterm=""
            )
            pytest.fail(f"{seen}\n" + "\n".join(differ))
        assert message.node_name == NODE_NAME
        if not paths or "time" in paths:
            assert message.time == message.flow.time
        assert not len(UnknownFieldSet(message.flow))
    return [message.flow for message in messages]


SHAPES = {
    "v4 tcp": Seen(),
    "v6 tcp": Seen(source="fd00::1", destination="fd00::2"),
    "udp": Seen(proto=17, tcp_flags=0),
    "udp port 0": Seen(proto=17, tcp_flags=0, sport=0, dport=0),
    "icmp echo": Seen(proto=1, tcp_flags=0, sport=8, dport=0),
    "icmp echo reply": Seen(proto=1, tcp_flags=0, sport=0, dport=0),
    "icmpv6": Seen(
        source="fd00::1", destination="fd00::2", proto=58, tcp_flags=0, sport=128, dport=0
    ),
    "sctp": Seen(proto=132, tcp_flags=0),
    "esp": Seen(proto=50, tcp_flags=0, sport=0, dport=0),
    "no ip": Seen(
        source="", destination="", proto=0, tcp_flags=0, type=k.EVENT_DROP, reason=139, sport=0,
        dport=0, src_identity=0, dst_identity=0, src_ep=0, dst_ep=0,
    ),
    "to world": Seen(destination="203.0.113.5", dst_identity=9, dst_ep=0, direction=k.DIR_EGRESS),
    "from a cidr": Seen(source="192.0.2.20", src_identity=16777217, src_ep=0),
    "no macs": Seen(smac=bytes(6), dmac=bytes(6)),
    "no tcp flags": Seen(tcp_flags=0),
    "time of no nanoseconds": Seen(time_ns=0),
    "allowed by a rule": Seen(type=k.EVENT_VERDICT, rule=11, match=2),
    "allowed, egress": Seen(type=k.EVENT_VERDICT, rule=11, match=2, direction=k.DIR_EGRESS),
    "allowed by no rule": Seen(type=k.EVENT_VERDICT, match=4),
    "redirected": Seen(type=k.EVENT_VERDICT, verdict=10001, rule=11),
    "denied by default": Seen(type=k.EVENT_VERDICT, verdict=-133),
    "denied by default, by mode": Seen(
        type=k.EVENT_VERDICT, verdict=-133, source="10.1.0.3", src_ep=3, src_identity=1003,
        direction=k.DIR_EGRESS,
    ),
    "denied by a rule": Seen(
        type=k.EVENT_VERDICT, verdict=-181, rule=12, direction=k.DIR_EGRESS
    ),
    "dropped by default": Seen(type=k.EVENT_DROP, reason=133),
    "audited": Seen(type=k.EVENT_VERDICT, flags=k.EVENT_F_AUDITED),
    "a rule nobody told of": Seen(type=k.EVENT_VERDICT, rule=99),
    "http request": Seen(
        l7=L7Record(
            type=L7Type.REQUEST,
            record=Http(method="GET", url="http://d/\u00fc", headers=(("A", "b"), ("A", ""))),
        )
    ),
    "http answer": Seen(
        l7=L7Record(
            type=L7Type.RESPONSE,
            record=Http(method="GET", url="http://d/", code=403, protocol="HTTP/2"),
            latency_ns=1 << 40,
            trace_id="abc",
        ),
        l7_verdict=2,
        flags=k.EVENT_F_REPLY,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_what_protobuf_makes_of_it(name: str) -> None:
    check([SHAPES[name]])
    check([SHAPES[name]], CLI_MASK)


def test_every_drop_reason_is_told_in_both_fields() -> None:
    flows = check([Seen(type=k.EVENT_DROP, reason=reason) for reason in DROP_REASONS])
    names = {flow_pb2.DropReason.Name(flow.drop_reason_desc) for flow in flows}
    assert len(names) == len(DROP_REASONS)


def test_every_observation_point_and_conntrack_state() -> None:
    check(
        [
            Seen(obs_point=point, reason=state, direction=direction)
            for point in range(12)
            for state in range(4)
            for direction in range(3)
        ]
    )


def test_every_combination_of_tcp_flags() -> None:
    check([Seen(tcp_flags=flags) for flags in range(256)])


def test_random_flows_all_together() -> None:
    events = random_events(random.Random(1), 1200)
    check(events)
    check(events, CLI_MASK)


@pytest.mark.parametrize(
    "paths",
    [
        ("time",),
        ("uuid", "l4.TCP"),
        ("l4.TCP.destination_port", "l4.UDP.destination_port"),
        ("l4.TCP.flags.SYN", "IP.source"),
        ("time.seconds", "source.labels", "destination.workloads"),
        ("l7.http.code", "l7.type", "Summary"),
        ("l7.dns", "trace_context.parent.trace_id"),
        ("event_type.type", "is_reply.value", "ethernet.source", "interface.name"),
        ("egress_denied_by", "ingress_denied_by"),
        ("source", "source.labels"),
    ],
)
def test_masks_of_parts(paths: tuple[str, ...]) -> None:
    check(random_events(random.Random(2), 200), paths)


def test_denials_are_explained() -> None:
    [flow] = check([SHAPES["denied by default"]])
    assert [(policy.kind, policy.name) for policy in flow.ingress_denied_by] == [
        ("CiliumNetworkPolicy", "isolate"),
        ("CiliumNetworkPolicy", "allow-empire"),
    ]
    assert "cilia:rule=spec.ingress" in flow.ingress_denied_by[0].labels
    [flow] = check([SHAPES["denied by default, by mode"]])
    assert [(p.kind, p.name) for p in flow.egress_denied_by] == [("EnforcementMode", "always")]


def test_uuids_are_unique_and_lead_back() -> None:
    events = random_events(random.Random(3), 200)
    flows = check(events)
    assert len({flow.uuid for flow in flows}) == len(events)
    assert all(len(flow.uuid) == 36 for flow in flows)


def test_messages_alone_are_those_of_the_stream() -> None:
    store = make_store(random_events(random.Random(4), 50))
    [rows] = all_rows(store)
    encoder = Encoder()
    framed = encoder.encode(rows)
    alone = encoder.messages(rows)
    assert framed == b"".join(b"\0" + len(m).to_bytes(4, "big") + m for m in alone)
    for message, flow in zip(alone, encoder.flows(rows), strict=True):
        whole = observer_pb2.GetFlowsResponse.FromString(message)
        assert whole.flow == flow_pb2.Flow.FromString(flow)


def test_pieces_follow_what_numbers_mean() -> None:
    """Slots are given out again, and the encoder must not show what was there before."""
    r = random.Random(5)
    store = Store(capacity=1024, run=1)
    store.learn(meaning())
    encoder = Encoder()
    shown = []
    batches = []
    for batch in range(40):
        # Ever new addresses of the world: many pairs come and go.
        seen = [
            Seen(
                time_ns=batch * 10**9 + at,
                source=f"203.{batch}.{at // 250}.{at % 250}",
                src_identity=9,
                src_ep=0,
                sport=r.randint(1, 65535),
            )
            for at in range(400)
        ]
        batches += seen
        store_all(store, seen)
        rows = [
            item for item in store.query(FlowQuery(number=100)).read() if isinstance(item, Rows)
        ]
        shown += [
            (int(number), flow)
            for part in rows
            for number, flow in zip(part.numbers, encoder.flows(part), strict=True)
        ]
    for number, flow in shown:
        wanted = expected_flow(batches[number], format_uuid(1, number))
        got = flow_pb2.Flow.FromString(flow)
        wanted.Summary = got.Summary
        assert got == wanted
    assert store.dimensions.pairs_used < 3000
    assert all(a[0] < b[0] for a, b in pairwise(shown[:100]))
