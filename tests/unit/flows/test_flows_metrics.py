"""Prometheus series of flows agree with counting them one by one."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry

from protos.hubble.v1 import flow_pb2
from services.flows import metrics
from services.flows.encoder import Encoder
from services.flows.filterspec import FlowQuery
from services.flows.ledger import Cause
from services.flows.metrics import FlowMetrics, MetricSpecInvalid, parse_spec
from services.flows.rows import Rows
from services.flows.store import Store
from tests.unit.flows.flowworld import OFFSET_NS, meaning, random_events

Series = dict[tuple[tuple[str, str], ...], float]
WORLDS = {2, 9, 10}


@pytest.fixture(scope="module")
def batches() -> list[Rows]:
    store = Store(capacity=4096, run=9)
    store.learn(meaning())
    for seen in random_events(random.Random(31), 1500):
        if seen.l7 is None:
            store.take(seen.event(), wall_offset_ns=OFFSET_NS)
        else:
            store.take_l7([seen.l7_event()], wall_offset_ns=OFFSET_NS)
    cursor = store.query(FlowQuery())
    items: list[Rows] = []
    while cursor.state.name not in ("DONE", "WAITING"):
        items += [item for item in cursor.read() if isinstance(item, Rows)]
    return [item.take(slice(at, at + 250)) for item in items for at in range(0, len(item), 250)]


@pytest.fixture(scope="module")
def flows(batches: list[Rows]) -> list[flow_pb2.Flow]:
    encoder = Encoder()
    return [flow_pb2.Flow.FromString(raw) for rows in batches for raw in encoder.flows(rows)]


def counted(batches: list[Rows], spec: str, name: str) -> Series:
    """The series of one family, as a scrape shows them."""
    collector = FlowMetrics([parse_spec(spec)])
    registry = CollectorRegistry()
    registry.register(collector)
    for rows in batches:
        collector.count(rows)
    return {
        tuple(sorted(sample.labels.items())): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == name
    }


def expect(
    flows: list[flow_pb2.Flow], key: Callable[[flow_pb2.Flow], dict[str, str] | None]
) -> Series:
    found: Counter[tuple[tuple[str, str], ...]] = Counter()
    for flow in flows:
        labels = key(flow)
        if labels is not None:
            found[tuple(sorted(labels.items()))] += 1
    return {labels: float(count) for labels, count in found.items()}


def proto(flow: flow_pb2.Flow) -> str:
    return flow.l4.WhichOneof("protocol") or "Unknown flow"


def test_drops(batches: list[Rows], flows: list[flow_pb2.Flow]) -> None:
    from cilia.bpf.dropreason import reason_text

    assert counted(batches, "drop", "hubble_drop_total") == expect(
        flows,
        lambda f: (
            {"reason": reason_text(f.drop_reason), "protocol": proto(f)}
            if f.event_type.type == 1
            else None
        ),
    )


def test_drops_by_who(batches: list[Rows], flows: list[flow_pb2.Flow]) -> None:
    from cilia.bpf.dropreason import reason_text

    def key(flow: flow_pb2.Flow) -> dict[str, str] | None:
        if flow.event_type.type != 1:
            return None
        reserved = {1: "reserved:host", 2: "reserved:world", 9: "reserved:world-ipv4"}
        return {
            "source": flow.source.namespace or reserved.get(flow.source.identity, ""),
            "traffic_direction": flow_pb2.TrafficDirection.Name(flow.traffic_direction)
            .lower()
            .replace("traffic_direction_", ""),
            "reason": reason_text(flow.drop_reason),
            "protocol": proto(flow),
        }

    spec = "drop:sourceContext=namespace|reserved-identity;labelsContext=traffic_direction"
    assert counted(batches, spec, "hubble_drop_total") == expect(flows, key)


def test_flows_processed(batches: list[Rows], flows: list[flow_pb2.Flow]) -> None:
    series = counted(batches, "flow", "hubble_flows_processed_total")
    assert sum(series.values()) == len(flows)
    dropped = sum(v for labels, v in series.items() if ("verdict", "DROPPED") in labels)
    assert dropped == sum(f.verdict == flow_pb2.DROPPED for f in flows)


def test_policy_verdicts(batches: list[Rows], flows: list[flow_pb2.Flow]) -> None:
    matches = ("none", "l3-only", "l3-l4", "l4-only", "all", "l3-proto", "proto-only")

    def key(flow: flow_pb2.Flow) -> dict[str, str] | None:
        if flow.event_type.type != 5:
            return None
        direction = flow_pb2.TrafficDirection.Name(flow.traffic_direction).lower()
        return {
            "direction": direction.replace("traffic_direction_", ""),
            "match": matches[flow.policy_match_type],
            "action": flow_pb2.Verdict.Name(flow.verdict).lower(),
        }

    assert counted(batches, "policy", "hubble_policy_verdicts_total") == expect(flows, key)


def test_icmp_and_to_world(batches: list[Rows], flows: list[flow_pb2.Flow]) -> None:
    icmp = counted(batches, "icmp", "hubble_icmp_total")
    assert sum(icmp.values()) == sum(proto(f).startswith("ICMP") for f in flows)

    def key(flow: flow_pb2.Flow) -> dict[str, str] | None:
        outside = flow.destination.identity in WORLDS or flow.destination.identity >> 24 & 1
        other_drop = flow.verdict == flow_pb2.DROPPED and flow.drop_reason not in (133, 181)
        if flow.event_type.type == 129 and flow.verdict == flow_pb2.DROPPED:
            other_drop = True  # a proxy's denial is no drop for want of policy
        if not outside or flow.is_reply.value or other_drop:
            return None
        return {"protocol": proto(flow), "verdict": flow_pb2.Verdict.Name(flow.verdict)}

    assert counted(batches, "flows-to-world", "hubble_flows_to_world_total") == expect(flows, key)


def test_http(batches: list[Rows], flows: list[flow_pb2.Flow]) -> None:
    def key(flow: flow_pb2.Flow) -> dict[str, str] | None:
        if not flow.l7.HasField("http") or flow.l7.type != flow_pb2.RESPONSE:
            return None
        return {
            "method": flow.l7.http.method,
            "status": str(flow.l7.http.code),
            "reporter": "server" if flow.traffic_direction == flow_pb2.INGRESS else "client",
        }

    assert counted(batches, "http", "hubble_http_responses_total") == expect(flows, key)
    durations = counted(batches, "http", "hubble_http_request_duration_seconds_sum")
    expected = sum(
        f.l7.latency_ns for f in flows if f.l7.HasField("http") and f.l7.type == flow_pb2.RESPONSE
    )
    assert sum(durations.values()) == pytest.approx(expected / 1e9)


def test_dns_and_kafka(batches: list[Rows], flows: list[flow_pb2.Flow]) -> None:
    dns = counted(batches, "dns:query", "hubble_dns_responses_total")
    assert sum(dns.values()) == sum(
        f.l7.HasField("dns") and f.l7.type == flow_pb2.RESPONSE for f in flows
    )
    assert any(("query", "www.example.com.") in labels for labels in dns)
    kafka = counted(batches, "kafka", "hubble_kafka_requests_total")
    assert sum(kafka.values()) == sum(f.l7.HasField("kafka") for f in flows)


def test_series_are_capped(batches: list[Rows], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_SERIES", 3)
    series = counted(batches, "flow:sourceContext=ip", "hubble_flows_processed_total")
    assert len(series) == 4
    assert sum(series.values()) == sum(map(len, batches))
    assert any(("source", "other") in labels for labels in series)


def test_losses() -> None:
    collector = FlowMetrics([], lost=lambda: {Cause.KERNEL: 7})
    (family,) = collector.collect()
    values = {s.labels["source"]: s.value for s in family.samples}
    assert values["perf_event_ring_buffer"] == 7
    assert values["hubble_ring_buffer"] == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("drops", "is no metric"),
        ("drop:colour=red", "has no option 'colour'"),
        ("drop:sourceContext=colour", "is no context"),
        ("drop:labelsContext=source_colour", "is no label"),
    ],
)
def test_bad_specs(text: str, words: str) -> None:
    with pytest.raises(MetricSpecInvalid, match=words):
        FlowMetrics([parse_spec(text)])


def test_a_metric_twice() -> None:
    with pytest.raises(MetricSpecInvalid, match="twice"):
        FlowMetrics([parse_spec("http"), parse_spec("httpV2")])
