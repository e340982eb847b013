"""The store: what a query gives and in which order, from memory, disk, and where something is
missing."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest

from cilia.bpf.layout import EVENT
from protos.hubble.v1 import flow_pb2 as pb
from services.flows import convert
from services.flows.encoder import Encoder
from services.flows.filterspec import FilterSpec, FlowQuery
from services.flows.history import History
from services.flows.ledger import Cause, Ledger, Loss
from services.flows.query import ALL, Cursor, State
from services.flows.rows import Rows
from services.flows.segments import SegmentDamaged, Segments
from services.flows.store import Store
from services.flows.uuids import format_uuid
from services.flows.world import EndpointInfo, Meaning
from tests.unit.flows.flowworld import (
    IDENTITIES,
    OFFSET_NS,
    Seen,
    expected_flow,
    meaning,
    random_events,
    store_all,
)

SECOND = 1_000_000_000


def events(times_s: list[float], **changes: object) -> np.ndarray:
    rows = [Seen(time_ns=int(at * SECOND), **changes).event() for at in times_s]  # type: ignore[arg-type]  # fields of Seen
    return np.concatenate(rows, dtype=EVENT) if rows else np.zeros(0, EVENT)


def fill(store: Store, times_s: list[float], **changes: object) -> None:
    store.take(events(times_s, **changes), wall_offset_ns=OFFSET_NS)


def wall(at_s: float) -> int:
    return int(at_s * SECOND) + OFFSET_NS


def step(cursor: Cursor) -> list[Rows | Loss]:
    """Until it waits or is done."""
    found = []
    while True:
        found += cursor.read()
        if cursor.state in (State.WAITING, State.DONE):
            return found


def seconds(items: list[Rows | Loss]) -> list[object]:
    """What came: the second of each flow, and causes of gaps."""
    out: list[object] = []
    for item in items:
        if isinstance(item, Rows):
            out += [(int(at) - OFFSET_NS) // SECOND for at in item.times]
        else:
            out.append((str(item.cause), item.count))
    return out


@pytest.fixture
def store() -> Store:
    made = Store(capacity=1024, run=1)
    made.learn(meaning())
    return made


class TestMemory:
    def test_plain(self, store: Store) -> None:
        fill(store, [1, 2, 3, 4, 5])
        assert seconds(step(store.query(FlowQuery()))) == [1, 2, 3, 4, 5]
        assert seconds(step(store.query(FlowQuery(number=2)))) == [4, 5]
        assert seconds(step(store.query(FlowQuery(number=2, first=True)))) == [1, 2]
        assert seconds(step(store.query(FlowQuery(number=ALL)))) == [1, 2, 3, 4, 5]
        assert seconds(step(store.query(FlowQuery(number=99)))) == [1, 2, 3, 4, 5]

    def test_both_times_are_inclusive(self, store: Store) -> None:
        fill(store, [1, 2, 3, 4, 5])
        query = FlowQuery(since_ns=wall(2), until_ns=wall(4))
        assert seconds(step(store.query(query))) == [2, 3, 4]
        assert seconds(step(store.query(FlowQuery(since_ns=wall(2), number=2)))) == [2, 3]
        assert seconds(step(store.query(FlowQuery(until_ns=wall(3), number=2)))) == [2, 3]
        assert seconds(step(store.query(FlowQuery(until_ns=wall(3))))) == [1, 2, 3]

    def test_number_counts_what_matches(self, store: Store) -> None:
        for at in range(900):
            fill(store, [at], dport=80 if at % 100 == 7 else 443)
        wanted = (FilterSpec(destination_port=("80",)),)
        last = seconds(step(store.query(FlowQuery(number=3, whitelist=wanted))))
        assert last == [607, 707, 807]
        first = seconds(step(store.query(FlowQuery(number=3, first=True, whitelist=wanted))))
        assert first == [7, 107, 207]

    async def test_follow_gives_what_comes(self, store: Store) -> None:
        fill(store, [1, 2, 3])
        now, backlog = (store.query(FlowQuery(follow=True, number=n)) for n in (0, 2))
        assert seconds(step(now)) == []
        assert seconds(step(backlog)) == [2, 3]
        assert now.state is backlog.state is State.WAITING
        async with asyncio.timeout(5), asyncio.TaskGroup() as group:
            group.create_task(store.wait_for_rows(now))
            await asyncio.sleep(0)
            fill(store, [4])
        assert seconds(step(now)) == seconds(step(backlog)) == [4]
        until = store.query(FlowQuery(follow=True, since_ns=wall(2), until_ns=wall(5)))
        assert seconds(step(until)) == [2, 3, 4]
        fill(store, [5, 6])
        assert seconds(step(until)) == [5]
        assert until.state is State.DONE

    def test_a_slow_reader_is_told_how_much_it_lost(self, store: Store) -> None:
        cursor = store.query(FlowQuery(follow=True))
        assert step(cursor) == []
        for at in range(0, 3000, 100):
            fill(store, list(range(at, at + 100)))
        found = seconds(step(cursor))
        assert found[0] == ("reader", 3000 - 1024)
        assert found[1:] == list(range(3000 - 1024, 3000))

    def test_a_reader_from_the_oldest_row_lost_nothing(self, store: Store) -> None:
        for at in range(0, 3000, 100):
            fill(store, list(range(at, at + 100)))
        assert seconds(step(store.query(FlowQuery()))) == list(range(1976, 3000))
        assert seconds(step(store.query(FlowQuery(number=2000)))) == list(range(1976, 3000))

    def test_losses_stand_where_they_were(self, store: Store) -> None:
        fill(store, [1, 2])
        store.lose(Cause.KERNEL, 5)
        fill(store, [3])
        store.lose(Cause.TRANSPORT, 6)
        expected = [1, 2, ("kernel-ring", 5), 3, ("transport", 6)]
        assert seconds(step(store.query(FlowQuery()))) == expected
        # Of what was before the first flow that is shown nothing is said.
        assert seconds(step(store.query(FlowQuery(number=1)))) == [3, ("transport", 6)]

    def test_a_follower_is_told_of_a_loss_that_grows(self, store: Store) -> None:
        fill(store, [1])
        cursor = store.query(FlowQuery(follow=True))
        assert step(cursor) == []
        for count in (3, 4):
            store.lose(Cause.KERNEL, count)
            assert seconds(step(cursor)) == [("kernel-ring", count)]
        assert step(cursor) == []
        assert sum(loss.count or 0 for loss in store.ledger) == 7
        assert len(store.ledger) == 1

    def test_a_batch_out_of_order_is_put_in_order(self, store: Store) -> None:
        fill(store, [3, 1, 2])
        assert seconds(step(store.query(FlowQuery()))) == [1, 2, 3]

    def test_a_step_of_the_clock_is_noted_and_loses_nothing(self, store: Store) -> None:
        store.take(events([10]), wall_offset_ns=OFFSET_NS)
        store.take(events([11]), wall_offset_ns=OFFSET_NS - 5 * SECOND)
        store.take(events([12]), wall_offset_ns=OFFSET_NS - 5 * SECOND)
        assert seconds(step(store.query(FlowQuery()))) == [10, 6, 7]
        assert seconds(step(store.query(FlowQuery(since_ns=wall(7))))) == [10, 7]
        [loss] = store.ledger
        assert loss.cause is Cause.CLOCK
        assert "-5.000 s" in loss.detail

    def test_an_old_flow_keeps_the_names_it_had(self, store: Store) -> None:
        fill(store, [1])
        store.learn(
            Meaning(
                endpoints=(
                    EndpointInfo(
                        id=2, name="renamed", namespace="lab", labels=(), identity=1002, ifindex=102
                    ),
                ),
                identities={1001: ("k8s:app=other",)},
            )
        )
        fill(store, [2])
        store.forget(Meaning(gone_endpoints=(2,), gone_identities=(1001,)))
        fill(store, [3])
        [rows] = step(store.query(FlowQuery()))
        assert isinstance(rows, Rows)
        flows = [pb.Flow.FromString(raw) for raw in Encoder().flows(rows)]
        assert [flow.destination.pod_name for flow in flows] == ["deathstar-1", "renamed", ""]
        assert [list(flow.source.labels) for flow in flows] == [
            list(IDENTITIES[1001]),
            ["k8s:app=other"],
            list(IDENTITIES[1001]),  # as the endpoint has them; the identity's are not known
        ]
        wanted = (FilterSpec(destination_pod=("lab/deathstar",)),)
        assert seconds(step(store.query(FlowQuery(whitelist=wanted)))) == [1]

    def test_namespaces_and_rate(self, store: Store) -> None:
        fill(store, [1])
        store.note_namespaces(time.monotonic())
        assert set(store.namespaces) == {("default", "lab")}
        assert store.rate == 0.0


def disk_store(path: Path, *, run: int, **limits: int) -> tuple[Store, History]:
    segments = Segments(
        path / "segments",
        max_bytes=limits.get("max_bytes", 1 << 30),
        max_age_s=limits.get("max_age_s", 1 << 40),
    )
    ledger = Ledger(path / "ledger.jsonl", run=run)
    store = Store(capacity=1024, run=run, segments=segments, ledger=ledger)
    history = History(store, segments, directory=path, segment_rows=256, segment_age_s=3600)
    store.learn(meaning())
    return store, history


def flows_of(items: list[Rows | Loss]) -> list[pb.Flow]:
    encoder = Encoder()
    return [
        pb.Flow.FromString(raw)
        for item in items
        if isinstance(item, Rows)
        for raw in encoder.flows(item)
    ]


class TestDisk:
    async def test_memory_and_disk_are_read_as_one(self, tmp_path: Path) -> None:
        store, history = disk_store(tmp_path, run=1)
        await history.start()
        made = random_events(random.Random(1), 5000)
        for at in range(0, 5000, 300):
            store_all(store, made[at : at + 300])
            await history.spill_due()
        assert store.segments is not None
        assert store.segments.count >= 15
        found = step(store.query(FlowQuery(since_ns=0)))
        assert not [item for item in found if isinstance(item, Loss)]
        flows = flows_of(found)
        assert [flow.uuid for flow in flows] == [format_uuid(1, n) for n in range(5000)]
        for at in range(0, 5000, 7):
            wanted = expected_flow(made[at], format_uuid(1, at))
            wanted.Summary = flows[at].Summary
            assert flows[at] == wanted

        def uuids(query: FlowQuery) -> list[str]:
            return [flow.uuid for flow in flows_of(step(store.query(query)))]

        dropped = convert.filter_from_proto(pb.FlowFilter(verdict=[pb.DROPPED], protocol=["tcp"]))
        chosen = [f.uuid for f in flows if f.verdict == pb.DROPPED and f.l4.HasField("TCP")]
        assert uuids(FlowQuery(since_ns=0, whitelist=(dropped,))) == chosen
        assert uuids(FlowQuery(number=ALL, whitelist=(dropped,))) == chosen
        # More than memory has: the newest of them, from disk and memory.
        count = len(chosen) - 10
        assert uuids(FlowQuery(number=count, whitelist=(dropped,))) == chosen[-count:]
        assert uuids(FlowQuery(number=3000)) == [flow.uuid for flow in flows[-3000:]]
        assert uuids(FlowQuery(number=7, first=True)) == [flow.uuid for flow in flows[:7]]
        middle = FlowQuery(
            since_ns=made[1000].time_ns + OFFSET_NS, until_ns=made[1500].time_ns + OFFSET_NS
        )
        assert uuids(middle) == [flow.uuid for flow in flows[1000:1501]]
        by_uuid = FilterSpec(uuid=(flows[17].uuid, flows[4990].uuid))
        assert uuids(FlowQuery(since_ns=0, whitelist=(by_uuid,))) == [
            flows[17].uuid, flows[4990].uuid,
        ]  # fmt: skip

    async def test_a_restart_goes_on_and_knows_the_gap(self, tmp_path: Path) -> None:
        store, history = disk_store(tmp_path, run=1)
        await history.start()
        fill(store, [float(at) for at in range(1, 50)])
        store.lose(Cause.KERNEL, 9)
        await history.stop()
        later, history = disk_store(tmp_path, run=2)
        await history.start()
        fill(later, [100, 101])
        found = seconds(step(later.query(FlowQuery(since_ns=0))))
        flows = [item for item in found if isinstance(item, int)]
        gaps = [item for item in found if not isinstance(item, int)]
        assert flows == [*range(1, 50), 100, 101]
        assert gaps == [("kernel-ring", 9), ("not-running", None)]
        assert seconds(step(later.query(FlowQuery(number=4))))[:2] == [48, 49]
        await history.stop()

    async def test_a_kill_leaves_what_it_had_not_written(self, tmp_path: Path) -> None:
        store, history = disk_store(tmp_path, run=1)
        await history.start()
        fill(store, [1, 2, 3])
        await history._save()  # the sign of life, and then no end
        later, history = disk_store(tmp_path, run=2)
        await history.start()
        gaps = [(loss.cause, loss.count) for loss in later.ledger]
        assert gaps == [(Cause.HISTORY, 3), (Cause.STOPPED, None)]
        await history.stop()

    async def test_damage_is_skipped_and_reported(self, tmp_path: Path) -> None:
        store, history = disk_store(tmp_path, run=1)
        await history.start()
        for batch in range(4):
            fill(store, [batch * 1000 + at for at in range(256)])
            await history.spill_due()
        await history.stop()
        files = sorted((tmp_path / "segments").iterdir())
        assert len(files) == 4
        # One cut short, one with a byte changed, one half-written, one that is no file of ours.
        files[0].write_bytes(files[0].read_bytes()[:-50])
        flipped = bytearray(files[1].read_bytes())
        flipped[200] ^= 0xFF
        files[1].write_bytes(flipped)
        (tmp_path / "segments" / ".x.parquet.partial").write_bytes(b"PAR1")
        (tmp_path / "segments" / "notes.parquet").write_bytes(b"")
        later, history = disk_store(tmp_path, run=2)
        await history.start()
        found = seconds(step(later.query(FlowQuery(since_ns=0))))
        flows = [item for item in found if isinstance(item, int)]
        assert flows == [*range(2000, 2256), *range(3000, 3256)]
        assert ("history", 256) in found
        await history.spill_due()
        damaged = [loss for loss in later.ledger if loss.cause is Cause.HISTORY]
        assert [loss.count for loss in damaged] == [256, 256]
        assert later.segments is not None
        assert len(later.segments.damaged) == 3
        assert not list((tmp_path / "segments").glob(".*"))
        # It is said once, and what is not damaged goes on.
        again = seconds(step(later.query(FlowQuery(since_ns=0))))
        assert [item for item in again if isinstance(item, int)] == flows
        await history.stop()

    async def test_any_damage_is_found_or_harmless(self, tmp_path: Path) -> None:
        store, history = disk_store(tmp_path, run=1)
        await history.start()
        made = random_events(random.Random(4), 200)
        store_all(store, made)
        await history.stop()
        assert store.segments is not None
        [segment] = store.segments.between(None, None)
        whole = segment.path.read_bytes()
        encoder = Encoder()
        known = {raw for rows in store.segments.read(segment) for raw in encoder.flows(rows)}
        assert len(known) == 200
        r = random.Random(5)
        found = 0
        for _ in range(150):
            damaged = bytearray(whole)
            at = r.randrange(len(whole))
            match r.choice(("flip", "flip", "zero", "cut")):
                case "flip":
                    damaged[at] ^= 1 << r.randrange(8)
                case "zero":
                    damaged[at : at + 64] = bytes(len(damaged[at : at + 64]))
                case _:
                    del damaged[at : at + r.randint(1, 100)]
            segment.path.write_bytes(damaged)
            try:
                got = {raw for rows in store.segments.read(segment) for raw in encoder.flows(rows)}
            except SegmentDamaged:
                found += 1
            else:
                assert got <= known  # it may miss flows, but shows none that never were
        assert found > 100

    async def test_a_full_disk_stops_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store, history = disk_store(tmp_path, run=1)
        await history.start()
        real = os.fsync

        def full(fd: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        for batch in range(10):
            fill(store, [batch * 1000 + at for at in range(256)])
            await history.spill_due()
        assert not list((tmp_path / "segments").iterdir())
        assert "space" in store.counters.last_spill_error
        monkeypatch.setattr(os, "fsync", real)
        await history.spill_due()
        assert store.counters.last_spill_error == ""
        found = seconds(step(store.query(FlowQuery(since_ns=0))))
        lost = sum(item[1] for item in found if isinstance(item, tuple))
        assert lost == 10 * 256 - 1024
        assert len(found) - sum(isinstance(item, tuple) for item in found) == 1024
        assert "space" in next(iter(store.ledger)).detail
        await history.stop()

    async def test_old_files_go(self, tmp_path: Path) -> None:
        store, history = disk_store(tmp_path, run=1, max_bytes=6_000)
        await history.start()
        for batch in range(12):
            fill(store, [batch * 1000 + at for at in range(256)])
            await history.spill_due()
        assert store.segments is not None
        assert 0 < store.segments.bytes <= 6_000
        assert store.segments.expired_files > 0
        aged, history = disk_store(tmp_path, run=2, max_age_s=1)
        await history.start()
        assert aged.segments is not None
        assert aged.segments.count == 0
        assert not list((tmp_path / "segments").iterdir())
        await history.stop()


class TestLedger:
    def test_neighbours_are_one_row(self) -> None:
        ledger = Ledger(run=1)
        for at in range(10):
            ledger.add(Cause.KERNEL, from_ns=at * 10**8, to_ns=at * 10**8, count=2)
        assert len(ledger) == 1
        ledger.add(Cause.TRANSPORT, from_ns=10**9, to_ns=10**9, count=2)
        ledger.add(Cause.KERNEL, from_ns=10**9, to_ns=10**9, count=2)
        assert len(ledger) == 3
        assert ledger.totals[Cause.KERNEL] == 22

    def test_it_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("services.flows.ledger._MAX_ROWS", 10)
        ledger = Ledger(run=1)
        for at in range(30):
            ledger.add(Cause.KERNEL, from_ns=at * 10**10, to_ns=at * 10**10, count=1)
        assert len(ledger) == 10
        assert ledger.forgotten == 20
        assert ledger.end == 30

    def test_damaged_lines_are_skipped(self, tmp_path: Path) -> None:
        path = tmp_path / "l"
        first = Ledger(path, run=1)
        first.add(Cause.AGENT, from_ns=1, to_ns=2, count=None, detail="x")
        first.append(first.take_unsaved())
        first.extend(Cause.AGENT, 50)
        first.append(first.take_unsaved())
        with path.open("ab") as file:
            file.write(b'{"from_ns": 1, "cau\n\xff\n{"cause": "none"}\n')
        again = Ledger(path, run=2)
        again.load()
        assert [(loss.from_ns, loss.to_ns) for loss in again] == [(1, 50)]
        assert again.damaged_lines == 3
