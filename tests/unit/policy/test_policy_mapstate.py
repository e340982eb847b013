"""Rows of a policy map: port prefixes, the kernel's lookup, deltas."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cilia.policy.api import RuleID
from cilia.policy.mapstate import (
    MATCH_ALL,
    MATCH_L3,
    MATCH_L3_L4,
    MATCH_L3_PROTO,
    MATCH_L4,
    MATCH_PROTO,
    L4Key,
    MapState,
    PolicyEntry,
    PolicyKey,
    port_prefixes,
)

ports = st.integers(0, 65535)


def covered(port: int, bits: int) -> range:
    return range(port, port + (1 << (16 - bits)))


@given(ports, ports)
def test_prefixes_cover_the_range_and_nothing_else(a: int, b: int) -> None:
    first, last = sorted((a, b))
    prefixes = port_prefixes(first, last)
    at = first
    for port, bits in prefixes:
        assert port == at
        assert port % (1 << (16 - bits)) == 0
        at = covered(port, bits).stop
    assert at == last + 1
    assert len(prefixes) <= 30


@pytest.mark.parametrize(
    ("first", "last", "count"),
    [(0, 65535, 1), (80, 80, 1), (1, 65535, 16), (1024, 65535, 6), (8080, 8081, 1), (1, 65534, 30)],
)
def test_fewest_prefixes(first: int, last: int, count: int) -> None:
    assert len(port_prefixes(first, last)) == count


def test_a_range_that_is_none() -> None:
    for first, last in ((2, 1), (-1, 3), (0, 65536)):
        with pytest.raises(ValueError, match="not a range"):
            port_prefixes(first, last)


def state(*rows: tuple[PolicyKey, bool, int]) -> MapState:
    blocks: dict[int, dict[L4Key, PolicyEntry]] = {}
    for key, deny, rule in rows:
        blocks.setdefault(key.identity, {})[L4Key(*key[1:])] = PolicyEntry(deny, RuleID(rule))
    return MapState(blocks)


ALL = PolicyKey(0, False, 0, 0, 0)
L3 = PolicyKey(300, False, 0, 0, 0)
TCP = PolicyKey(0, False, 6, 0, 8)
L3_TCP = PolicyKey(300, False, 6, 0, 8)
RANGE = PolicyKey(0, False, 6, 64, 18)  # 64 to 127
PORT = PolicyKey(0, False, 6, 80, 24)
L3_PORT = PolicyKey(300, False, 6, 80, 24)


def test_longest_l4_prefix_wins_then_the_identity() -> None:
    rows = [ALL, L3, TCP, L3_TCP, RANGE, PORT, L3_PORT]
    for n in range(len(rows), 0, -1):
        found = state(*((key, False, i + 1) for i, key in enumerate(rows[:n]))).lookup(
            300, False, 6, 80
        )
        assert found is not None
        assert found.key == rows[n - 1]
    assert [x.match_type for x in rows] == [
        MATCH_ALL,
        MATCH_L3,
        MATCH_PROTO,
        MATCH_L3_PROTO,
        MATCH_L4,
        MATCH_L4,
        MATCH_L3_L4,
    ]
    assert (RANGE.port, RANGE.last_port) == (64, 127)
    assert (TCP.last_port, PORT.last_port) == (65535, 80)


def test_a_deny_row_wins_whatever_its_length() -> None:
    found = state((ALL, True, 1), (L3_PORT, False, 2)).lookup(300, False, 6, 80)
    assert found is not None
    assert found.entry.deny
    assert found.key == ALL


def test_misses() -> None:
    rows = state((L3_PORT, False, 1))
    assert rows.lookup(300, False, 6, 80)
    assert rows.lookup(301, False, 6, 80) is None
    assert rows.lookup(300, True, 6, 80) is None
    assert rows.lookup(300, False, 17, 80) is None
    assert rows.lookup(300, False, 6, 81) is None
    assert MapState({}).lookup(0, False, 6, 80) is None


def test_mapping_and_masks() -> None:
    rows = state((ALL, False, 1), (L3_PORT, True, 2), (RANGE, False, 3))
    assert len(rows) == 3
    assert set(rows) == {ALL, L3_PORT, RANGE}
    assert rows[L3_PORT].deny
    with pytest.raises(KeyError):
        rows[L3]
    assert rows.has_deny
    assert rows.masks == ((1 << 24, 0), ((1 << 0) | (1 << 18), 0))


def test_delta() -> None:
    old = state((ALL, False, 1), (L3_PORT, True, 2))
    new = state((ALL, False, 1), (L3_PORT, False, 2), (RANGE, False, 3))
    assert set(new.delta(old).upserts) == {L3_PORT, RANGE}
    assert new.delta(old).deletes == ()
    assert old.delta(new).deletes == (RANGE,)
    assert set(new.delta(None).upserts) == set(new)
    assert not new.delta(new)
