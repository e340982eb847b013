"""Bounded fan-out and the converters of shared messages."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cilia.errors import Fault, Kind, Origin
from cilia.identity import NumericIdentity
from cilia.labels import Label, Labels
from cilia.rpc import convert
from cilia.rpc.errors import CODE_OF_KIND
from cilia.rpc.fanout import BoundedFanout
from protos.common.v1 import common_pb2


async def test_the_slow_lose_the_oldest_and_are_told() -> None:
    fanout: BoundedFanout[int] = BoundedFanout(capacity=3)
    with fanout.subscribe() as slow, fanout.subscribe(capacity=100) as fast:
        for number in range(10):
            fanout.publish(number)
        late = await anext(slow)
        assert (late.items, late.lost) == ((7, 8, 9), 7)
        everything = await anext(fast)
        assert (everything.items, everything.lost) == (tuple(range(10)), 0)
        fanout.publish(10)
        assert (await anext(slow)).lost == 0
        assert slow.lost_total == 7
    assert (len(fanout), fanout.lost_total) == (0, 7)
    fanout.publish(11)  # to nobody


async def test_weights_count_what_batches_hold() -> None:
    fanout: BoundedFanout[bytes] = BoundedFanout(capacity=10, weigh=len)
    with fanout.subscribe() as subscriber:
        fanout.publish(b"12345")
        fanout.publish(b"123456")
        delivery = subscriber.take()
        assert (delivery.items, delivery.lost) == ((b"123456",), 5)
        fanout.publish(b"x" * 11)  # larger than the queue: lost, and said so
        assert await anext(subscriber) == type(delivery)((), 11)


async def test_closing_delivers_the_rest_and_ends() -> None:
    fanout: BoundedFanout[int] = BoundedFanout(capacity=3)
    subscriber = fanout.subscribe()
    fanout.publish(1)
    fanout.close()
    async with asyncio.timeout(5):
        assert [d.items async for d in subscriber] == [(1,)]
        assert [d async for d in fanout.subscribe()] == []


_WORD = st.text("abcxyz0189", min_size=1, max_size=10)
_LABELS = st.lists(st.builds(Label, _WORD, _WORD, _WORD), max_size=8).map(Labels)


@given(_LABELS, st.integers(0, 2**25))
def test_labels_and_identities_round_trip(labels: Labels, number: int) -> None:
    messages = convert.labels_to_proto(labels)
    assert convert.labels_from_proto(messages) == labels
    wire = convert.identity_to_proto(NumericIdentity(number), labels).SerializeToString()
    identity = common_pb2.Identity.FromString(wire)
    assert convert.identity_from_proto(identity) == (number, labels)


@pytest.mark.parametrize("origin", [None, Origin("a.yaml", 3, 7)])
def test_faults_round_trip(origin: Origin | None) -> None:
    fault = Fault("CiliumNetworkPolicy default/x", "spec.ingress[0]", "wrong", origin)
    assert convert.fault_from_proto(convert.fault_to_proto(fault)) == fault


def test_bad_labels_are_refused() -> None:
    with pytest.raises(convert.InvalidLabel, match="empty key"):
        convert.labels_from_proto([common_pb2.Label(source="k8s")])
    twice = [common_pb2.Label(source="k8s", key="a", value=v) for v in "xy"]
    with pytest.raises(convert.InvalidLabel, match="have the same key"):
        convert.labels_from_proto(twice)


def test_every_kind_has_a_code() -> None:
    assert set(CODE_OF_KIND) == set(Kind)
    assert len(set(CODE_OF_KIND.values())) == len(Kind)
