"""The event ring: order, wrapping, odd and discarded records, both readers."""

from __future__ import annotations

import select
import threading
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest

from cilia.bpf import BpfError, Map, Object, Program, RingReader, layout
from cilia.bpf.uapi import MapType

FRAME = bytes(12) + b"\x08\x00" + bytes(50)
ROOM = (1 << 14) // 136  # records of 128 + 8 bytes in the harness's ring


class Build(Protocol):
    def __call__(self, name: str, *defines: str) -> Path: ...


class Harness:
    def __init__(self, path: Path, by_mmap: bool) -> None:
        with Object.open(path, layouts=layout.CILIA) as obj:
            obj.load()
            self.ring = obj.map("t_ring")
            lost = obj.map("t_lost")
            self.emit: Program = obj.program("emit")
            self.discard: Program = obj.program("emit_discarded")
            self.odd: Program = obj.program("emit_odd")
        self.reader = RingReader(self.ring, layout.EVENT, lost=lost, by_mmap=by_mmap)


@pytest.fixture(params=[True, False], ids=["mmap", "libbpf"])
def harness(build: Build, request: pytest.FixtureRequest) -> Harness:
    return Harness(build("plain"), request.param)


def test_events_arrive_in_order_and_once(harness: Harness) -> None:
    assert len(harness.reader.read()) == 0
    harness.emit.test_run(FRAME, repeat=100)
    first = harness.reader.read(30)
    rest = harness.reader.read()
    assert np.concatenate([first, rest])["time_ns"].tolist() == list(range(100))
    assert len(first) == 30
    assert set(rest["verdict"].tolist()) == {-133}
    assert set(rest["length"].tolist()) == {len(FRAME)}
    assert len(harness.reader.read()) == 0
    assert harness.reader.lost == 0


def test_wrapping(harness: Harness) -> None:
    """16384 is no multiple of 136: records lie across the end at another place each round."""
    expected = 0
    for size in [90, 100, 37, 119, 1] * 12:
        harness.emit.test_run(FRAME, repeat=size)
        events = harness.reader.read()
        assert events["time_ns"].tolist() == list(range(expected, expected + size))
        assert not events["pad"].any()
        expected += size


def test_what_does_not_fit_is_counted(harness: Harness) -> None:
    harness.emit.test_run(FRAME, repeat=ROOM + 50)
    assert len(harness.reader.read()) == ROOM
    assert harness.reader.lost == 50
    harness.emit.test_run(FRAME)
    assert len(harness.reader.read()) == 1


def test_discarded_and_odd_records_are_stepped_over(harness: Harness) -> None:
    for program in "edeeoedooe":
        {"e": harness.emit, "d": harness.discard, "o": harness.odd}[program].test_run(FRAME)
    got = []
    while len(events := harness.reader.read()):
        got += events["time_ns"].tolist()
    assert got == [0, 2, 3, 4, 6]
    assert harness.reader.skipped == 3
    harness.emit.test_run(FRAME)
    assert harness.reader.read()["time_ns"].tolist() == [7]


def test_odd_records_fill_the_ring(harness: Harness) -> None:
    for _ in range(3):
        harness.odd.test_run(FRAME, repeat=400)
        harness.emit.test_run(FRAME, repeat=10)
        assert len(harness.reader.read()) == 10


def test_readiness_is_seen_by_epoll(harness: Harness) -> None:
    poll = select.epoll()
    poll.register(harness.reader.fileno(), select.EPOLLIN)
    assert poll.poll(0) == []
    timer = threading.Timer(0.05, lambda: harness.emit.test_run(FRAME))
    timer.start()
    assert poll.poll(5)
    timer.join()
    assert len(harness.reader.read()) == 1
    assert poll.poll(0) == []
    poll.close()


def test_reading_while_events_are_written(harness: Harness) -> None:
    total = 60_000

    def produce() -> None:
        harness.emit.test_run(FRAME, repeat=total)

    thread = threading.Thread(target=produce)
    thread.start()
    last, count = -1, 0
    while True:
        alive = thread.is_alive()
        events = harness.reader.read(1000)
        if len(events):
            times = events["time_ns"].astype("i8")
            assert times[0] == last + 1
            assert (np.diff(times) == 1).all()
            assert (events["verdict"] == -133).all()
            last, count = int(times[-1]), count + len(events)
        elif not alive:
            break
    thread.join()
    # the sequence number is taken by each attempt that got room
    assert count + harness.reader.lost == total


def test_a_new_reader_goes_on_where_the_last_stopped(harness: Harness) -> None:
    harness.emit.test_run(FRAME, repeat=10)
    harness.reader.read(4)
    harness.reader.close()
    assert RingReader(harness.ring, layout.EVENT).read()["time_ns"].tolist() == [4, 5, 6, 7, 8, 9]


def test_a_view_is_taken_off_by_advance(build: Build) -> None:
    harness = Harness(build("plain"), True)
    harness.emit.test_run(FRAME, repeat=5)
    view = harness.reader.peek()
    assert not view.flags.writeable
    assert len(view) == len(harness.reader.peek()) == 5
    harness.reader.advance(3)
    assert harness.reader.read()["time_ns"].tolist() == [3, 4]


def test_a_busy_record_ends_the_view(build: Build) -> None:
    """The header's busy bit as a producer sets it, in memory that we made."""
    harness = Harness(build("plain"), True)
    harness.emit.test_run(FRAME, repeat=5)
    mapped = harness.reader._mapped
    assert mapped is not None
    mapped.data = mapped.data.copy()
    header = mapped.data[2 * 136 : 2 * 136 + 4].view("u4")
    header |= 1 << 31
    assert harness.reader.read()["time_ns"].tolist() == [0, 1]
    assert len(harness.reader.read()) == 0
    header &= (1 << 31) - 1
    assert harness.reader.read()["time_ns"].tolist() == [2, 3, 4]


def test_only_rings_are_read(need_bpf: None) -> None:
    with pytest.raises(BpfError, match="not a ring"):
        RingReader(Map.create(MapType.ARRAY, "t", 4, 4, 1), layout.EVENT)
