"""Several nodes' streams into one, by the time of each message."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protos.hubble.v1 import observer_pb2
from services.flows.relay.merge import Merge, time_ns

S = 1_000_000_000


def message(at_ns: int, node: str = "") -> bytes:
    response = observer_pb2.GetFlowsResponse(node_name=node)
    response.flow.uuid = f"{node}-{at_ns}"
    response.time.FromNanoseconds(at_ns)
    return response.SerializeToString()


def node_and_time(data: bytes) -> tuple[str, int]:
    response = observer_pb2.GetFlowsResponse.FromString(data)
    return response.node_name, response.time.ToNanoseconds()


@given(st.integers(0, 4_000_000_000 * S))
def test_the_time_is_read_without_decoding(at_ns: int) -> None:
    assert time_ns(message(at_ns, "n")) == at_ns


def test_a_message_without_time() -> None:
    assert time_ns(b"") is None
    assert time_ns(observer_pb2.GetFlowsResponse(node_name="n").SerializeToString()) is None


@settings(max_examples=300)
@given(st.binary(max_size=60))
def test_damage_is_a_value_error_or_nothing(data: bytes) -> None:
    try:
        time_ns(data)
    except ValueError:
        return


def test_a_field_that_reaches_beyond_the_end() -> None:
    with pytest.raises(ValueError, match="beyond"):
        time_ns(b"\x0a\x7f")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.sampled_from("abcd"), st.lists(st.integers(1, 40), max_size=20).map(sorted), min_size=1
    ),
    st.randoms(use_true_random=False),
)
def test_what_ends_comes_out_in_order(streams: dict[str, list[int]], random: object) -> None:
    """However the nodes' batches arrive, the result is all messages, sorted."""
    merge = Merge(follow=False)
    for node in streams:
        merge.add(node)
    left = {node: list(times) for node, times in streams.items()}
    out: list[tuple[str, int]] = []
    while left:
        node = random.choice(sorted(left))  # type: ignore[attr-defined]
        count = random.randint(0, 4)  # type: ignore[attr-defined]
        merge.push(node, [message(t, node) for t in left[node][:count]])
        del left[node][:count]
        if not left[node]:
            merge.end(node)
            del left[node]
        out += [node_and_time(m) for m in merge.take(0, limit=random.randint(1, 9))]  # type: ignore[attr-defined]
    while messages := merge.take(0):
        out += [node_and_time(m) for m in messages]
    assert merge.empty
    assert [t for _, t in out] == sorted(t for times in streams.values() for t in times)
    for node, times in streams.items():
        assert [t for n, t in out if n == node] == times


def test_nothing_goes_out_before_a_node_that_may_be_older() -> None:
    merge = Merge(follow=False)
    merge.add("a")
    merge.add("b")
    merge.push("a", [message(5), message(9)])
    assert merge.take(100 * S) == []
    assert merge.waits_for == {"b"}
    merge.push("b", [message(7)])
    assert [node_and_time(m)[1] for m in merge.take(100 * S)] == [5, 7]
    merge.end("b")
    assert [node_and_time(m)[1] for m in merge.take(100 * S)] == [9]
    assert not merge.empty
    merge.end("a")
    assert merge.empty


def test_a_quiet_node_holds_a_followed_stream_up_for_a_moment_only() -> None:
    merge = Merge(follow=True, lag_ns=S)
    merge.add("a")
    merge.add("quiet")
    merge.push("a", [message(10 * S), message(10 * S + S // 2)])
    assert merge.take(10 * S + S // 2) == []
    assert [node_and_time(m)[1] for m in merge.take(11 * S)] == [10 * S]
    assert [node_and_time(m)[1] for m in merge.take(11 * S + S // 2)] == [10 * S + S // 2]


def test_a_node_whose_clock_steps_back_keeps_its_own_order() -> None:
    merge = Merge(follow=False)
    merge.add("a")
    merge.push("a", [message(5, "x"), message(3, "y"), message(6, "z")])
    merge.end("a")
    assert [node_and_time(m)[0] for m in merge.take(0)] == ["x", "y", "z"]
