"""Sums by columns agree with plain counting."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from protos.hubble.v1 import flow_pb2
from services.flows.aggregate import Sums, TooManyGroups
from services.flows.encoder import Encoder
from services.flows.filterspec import FlowQuery
from services.flows.grouping import ColumnUnknown, columns_of
from services.flows.rows import Rows
from services.flows.store import Store
from tests.unit.flows.flowworld import OFFSET_NS, meaning, random_events


@pytest.fixture(scope="module")
def batches() -> list[Rows]:
    store = Store(capacity=4096, run=9)
    store.learn(meaning())
    for seen in random_events(random.Random(21), 1500):
        if seen.l7 is None:
            store.take(seen.event(), wall_offset_ns=OFFSET_NS)
        else:
            store.take_l7([seen.l7_event()], wall_offset_ns=OFFSET_NS)
    cursor = store.query(FlowQuery())
    items: list[Rows] = []
    while cursor.state.name not in ("DONE", "WAITING"):
        items += [item for item in cursor.read() if isinstance(item, Rows)]
    # Several batches, as live ones come.
    return [item.take(slice(at, at + 100)) for item in items for at in range(0, len(item), 100)]


def test_against_counting(batches: list[Rows]) -> None:
    sums = Sums(columns_of(["source_ip", "port", "protocol", "verdict"]), limit=10000)
    expected: Counter[tuple[str, ...]] = Counter()
    octets: Counter[tuple[str, ...]] = Counter()
    encoder = Encoder()
    for rows in batches:
        sums.add(rows)
        for at, raw in enumerate(encoder.flows(rows)):
            flow = flow_pb2.Flow.FromString(raw)
            l4 = flow.l4.WhichOneof("protocol") or "50"
            # For ICMP the port is the code.
            port = int(rows.columns["dport"][at])
            key = (flow.IP.source, str(port), l4, flow_pb2.Verdict.Name(flow.verdict))
            expected[key] += 1
            octets[key] += int(rows.columns["length"][at])
    found = dict(sums.largest(100_000))
    assert {key: group.flows for key, group in found.items()} == expected
    assert {key: group.bytes for key, group in found.items()} == octets
    assert sums.flows == sum(expected.values())
    assert all(group.first_ns <= group.last_ns for group in found.values())


def test_first_and_last(batches: list[Rows]) -> None:
    sums = Sums(columns_of(["direction"]), limit=10)
    for rows in batches:
        sums.add(rows)
    times = [int(t) for rows in batches for t in rows.times]
    groups = [group for _, group in sums.largest(10)]
    assert min(g.first_ns for g in groups) == min(times)
    assert max(g.last_ns for g in groups) == max(times)


def test_largest_first(batches: list[Rows]) -> None:
    sums = Sums(columns_of(["destination"]), limit=1000)
    for rows in batches:
        sums.add(rows)
    counts = [group.flows for _, group in sums.largest(5)]
    assert counts == sorted(counts, reverse=True)
    assert len(counts) == 5


def test_policies_and_http(batches: list[Rows]) -> None:
    sums = Sums(columns_of(["policy"]), limit=1000)
    paths = Sums(columns_of(["http_method", "http_path", "http_status"]), limit=1000)
    for rows in batches:
        sums.add(rows)
        paths.add(rows)
    texts = {keys[0] for keys, _ in sums.largest(1000)}
    assert "CiliumNetworkPolicy lab/allow-empire spec.ingress[0] (p.yaml:3)" in texts
    assert any(text.startswith("isolated by CiliumNetworkPolicy lab/isolate") for text in texts)
    assert any(keys[:2] == ("PUT", "/v1/exhaust-port") for keys, _ in paths.largest(1000))


def test_bounds(batches: list[Rows]) -> None:
    sums = Sums(columns_of(["source_ip", "destination_ip", "port"]), limit=3)
    with pytest.raises(TooManyGroups, match="more than 3 groups"):
        sums.add(batches[0])
    with pytest.raises(ColumnUnknown, match="'colour' is no column"):
        columns_of(["colour"])
    with pytest.raises(ColumnUnknown, match="different columns"):
        columns_of(["port", "port"])
    with pytest.raises(ColumnUnknown):
        columns_of([])
