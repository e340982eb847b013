"""Numbers for repeating things: the same key the same number, for as long as a row names it."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.flows.dimensions import Pool
from services.flows.interning import Hasher, Index, Slots
from services.flows.ring import Ring
from services.flows.rows import ROW
from services.flows.uuids import format_uuid, new_run, parse_uuid

LIVE = 1 << 63


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(("insert", "remove")), st.sets(st.integers(0, 400), max_size=60)),
        max_size=30,
    )
)
def test_an_index_is_a_dict(script: list[tuple[str, set[int]]]) -> None:
    index, model = Index(bits=4), dict[int, int]()
    serial = 0
    for what, chosen in script:
        # Alike in their high bits, so that many want one place.
        keys = {number % 7 << 40 | number | LIVE for number in chosen}
        if what == "insert":
            keys -= model.keys()
            slots = np.arange(serial, serial + len(keys))
            index.insert(np.array(sorted(keys), np.uint64), slots)
            model |= dict(zip(sorted(keys), slots.tolist(), strict=True))
            serial += len(keys)
        else:
            index.remove(np.array(sorted(keys), np.uint64))
            for key in keys:
                model.pop(key, None)
        everything = [number % 7 << 40 | number | LIVE for number in range(401)]
        found = index.find(np.array(everything, np.uint64)).tolist()
        assert found == [model.get(key, -1) for key in everything]
        assert len(index) == len(model)


def test_a_slot_is_given_again_only_when_no_row_names_it() -> None:
    r = random.Random(1)
    slots = Slots({"value": "u8"}, size=16)
    capacity, head = 200, 0
    rows: list[tuple[int, int]] = []  # (key, slot) of each row ever
    for batch in range(300):
        size = r.randint(1, 40)
        chosen = [LIVE | r.randint(0, 50) + batch // 3 * 5 for _ in range(size)]
        keys = np.array(chosen, np.uint64)
        tail = max(0, head - capacity)
        numbers, new, where = slots.intern(keys, head=head + size, tail=tail)
        slots.columns["value"][new] = keys[where]
        head += size
        rows += zip(keys.tolist(), numbers.tolist(), strict=True)
        for key, slot in rows[max(0, head - capacity) :]:
            assert slot != 0
            assert slots.columns["value"][slot] == key
    assert slots.size <= 4 * capacity


def test_what_is_retired_stays_for_its_rows_and_is_not_found_again() -> None:
    slots = Slots({"value": "u8"}, size=16)
    keys = np.array([5, 6], np.uint64) | np.uint64(LIVE)
    first, new, _ = slots.intern(keys, head=2, tail=0)
    assert sorted(slots.live().tolist()) == sorted(new.tolist())
    slots.retire(first[:1])
    again, fresh, _ = slots.intern(keys, head=4, tail=0)
    assert again[0] != first[0]
    assert again[1] == first[1]
    assert fresh.tolist() == [again[0]]
    assert slots.born[again[0]] > slots.born[first[0]]


def test_hashes_differ_with_any_bit_and_any_process() -> None:
    hasher, other = Hasher(), Hasher()
    zero = np.zeros(1, np.uint64)
    words = [zero] * 8
    seen = {int(hasher(*words)[0])}
    for position in range(8):
        for bit in range(64):
            changed = list(words)
            changed[position] = np.array([1 << bit], np.uint64)
            seen.add(int(hasher(*changed)[0]))
    # Differences in high bits of different words must not cancel out.
    for a in range(8):
        for b in range(a):
            changed = list(words)
            changed[a] = changed[b] = np.array([1 << 63], np.uint64)
            seen.add(int(hasher(*changed)[0]))
    assert len(seen) == 1 + 8 * 64 + 28
    assert int(hasher(*words)[0]) != int(other(*words)[0])


def test_a_pool_gives_numbers_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool("")
    numbers = [pool.number(f"value {at}") for at in range(100)]
    assert pool.number("value 7") == numbers[7]
    pool.collect(np.array(numbers[:10]))
    assert len(pool) == 11
    fresh = [pool.number(f"other {at}") for at in range(50)]
    assert not set(fresh) & {0, *numbers[:10]}
    assert [pool.values[number] for number in numbers[:3]] == ["value 0", "value 1", "value 2"]
    assert max(fresh) <= 100


def test_a_ring_keeps_the_newest_and_the_times_of_its_chunks() -> None:
    ring = Ring(1024)
    written = 0
    for size in (1, 500, 600, 1024, 77):
        values = {name: np.zeros(size, kind) for name, kind in ROW.items()}
        values["time_ns"] = np.arange(written, written + size)
        ring.write(values, size)
        written += size
        assert ring.head == written
        start = ring.tail
        times = np.concatenate(
            [ring.slice(first, count)["time_ns"] for first, count in ring.spans(start, ring.head)]
        )
        assert times.tolist() == list(range(start, written))
        for first, count in ring.spans(start, ring.head):
            low, high = ring.bounds(first)
            assert low <= first
            assert high >= first + count - 1
    with pytest.raises(ValueError, match="power of two"):
        Ring(1000)


@given(st.integers(0, (1 << 60) - 1), st.integers(0, (1 << 60) - 1))
def test_uuids_are_read_back(run: int, number: int) -> None:
    text = format_uuid(run, number)
    assert parse_uuid(text) == (run, number)
    assert len(text) == 36
    assert parse_uuid(text.upper()) in (None, (run, number))


def test_what_is_no_uuid_of_ours() -> None:
    assert new_run() != new_run()
    for text in ("", "x", "00000000-0000-4000-8000-000000000000", "0" * 36, "-" * 36):
        assert parse_uuid(text) is None
