"""Reading flows in order, from disk and memory, with what is missing in its place.

A cursor gives `Rows` and `Loss`es, oldest first, in steps of bounded work:

    while True:
        for item in cursor.read():            # state DISK: in a thread
            ...
        match cursor.state:
            READY    go on                    (other readers may have their turn before)
            DISK     the next step reads files: `await asyncio.to_thread(cursor.read)`
            WAITING  `await store.wait_for_rows(cursor)`
            DONE     stop

Rows read from memory must be encoded before anything is awaited.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from services.flows.filterspec import FlowQuery
from services.flows.interning import I64
from services.flows.ledger import Cause, Loss
from services.flows.matching import Matcher
from services.flows.rows import Rows
from services.flows.segments import Segment, SegmentDamaged

if TYPE_CHECKING:
    from services.flows.store import Store

Item = Rows | Loss

ALL: Final = (1 << 64) - 1  # what clients send for "all of them"
_NO_NUMBERS: Final = 1 << 62
# How far back on disk the newest flows are looked for when no time is given.
_BACK_ROWS: Final = 1 << 24
_BATCH: Final = 1 << 14  # most rows in one item


class State(Enum):
    READY = "ready"
    DISK = "disk"
    WAITING = "waiting"
    DONE = "done"


class Cursor:
    """One query under way."""

    def __init__(self, store: Store, query: FlowQuery, matcher: Matcher) -> None:
        self._store = store
        self._query = query
        self._matcher = matcher
        self._pending: list[Item] = []
        self._left = _NO_NUMBERS
        self.state = State.READY
        self.position = store.ring.head
        self.losses_seen = store.ledger.version
        self.given = 0
        self._end = None if query.follow else store.ring.head
        self._steps = self._run()

    def read(self) -> list[Item]:
        """The next items; none does not mean the end: see `state`."""
        self._pending = []
        try:
            self.state = next(self._steps)
        except StopIteration:
            self.state = State.DONE
        return self._pending

    # ---- the order of things

    def _run(self) -> Generator[State, None, None]:
        query, ring = self._query, self._store.ring
        backward = query.since_ns is None and not query.first and query.number not in (0, ALL)
        if query.since_ns is None and query.follow and query.number == 0:
            start = ring.head
        elif backward:
            start = yield from self._last()
        else:
            if query.number not in (0, ALL) and not query.follow:
                self._left = query.number
            start = ring.tail
            if (
                query.since_ns is not None
                or query.until_ns is not None
                or query.first
                or query.number == ALL
            ):
                yield from self._history(0, start)
                # The ring goes on meanwhile; what left it is on disk by now, or never will be.
                while ring.tail > start and self._left > 0:
                    before, start = start, ring.tail
                    yield from self._history(before, start)
        yield from self._memory(start)

    # ---- memory

    def _memory(self, start: int) -> Iterator[State]:
        store, ring, query = self._store, self._store.ring, self._query
        self.position = start
        losses = _LossReader(self, start)
        while True:
            end = ring.head if self._end is None else min(self._end, ring.head)
            worked = 0
            while self.position < end and self._left > 0:
                if self.position < ring.tail:
                    self._overtaken(ring.tail)
                first, count = ring.spans(self.position, end)[0]
                cut = losses.next_row(first, first + count)
                if cut is not None:
                    count = cut - first
                self.position = self._span(first, count)
                losses.emit(self.position)
                worked += 1
                if worked % 8 == 0 or self._pending_rows() >= _BATCH:
                    yield State.READY
                    end = ring.head if self._end is None else min(self._end, ring.head)
            if self._left <= 0:
                return
            losses.emit(self.position)
            if self._end is not None:
                return
            if query.until_ns is not None and ring.head and (ring.newest_time() > query.until_ns):
                return
            self.losses_seen = store.ledger.version
            yield State.WAITING

    def _pending_rows(self) -> int:
        return sum(len(item) for item in self._pending if isinstance(item, Rows))

    def _overtaken(self, tail: int) -> None:
        now = self._store.ring.oldest_time()
        self._pending.append(
            Loss(
                from_ns=now,
                to_ns=now,
                count=tail - self.position,
                cause=Cause.READER,
                detail="overwritten before this reader came to it",
                row=tail,
                run=self._store.run,
            )
        )
        self.position = tail

    def _span(self, first: int, count: int) -> int:
        """Looks at rows of memory; where to go on, at most a batch of matches further."""
        low, high = self._store.ring.bounds(first)
        query = self._query
        if query.since_ns is not None and high < query.since_ns:
            return first + count
        if query.until_ns is not None and low > query.until_ns:
            return first + count
        if not self._filtered(low, high):
            count = min(count, _BATCH)
        rows = self._store.rows(first, count)
        mask = self._mask(rows, low, high)
        which = np.arange(count) if mask is None else np.flatnonzero(mask)
        if len(which) > _BATCH:
            which = which[:_BATCH]
            count = int(which[-1]) + 1
        for part in self._parts(rows, which):
            self._pending.append(part)
        return first + count

    def _filtered(self, low: int, high: int) -> bool:
        query = self._query
        return not self._matcher.everything or (
            (query.since_ns is not None and low < query.since_ns)
            or (query.until_ns is not None and high > query.until_ns)
        )

    def _mask(self, rows: Rows, low: int, high: int) -> npt.NDArray[np.bool_] | None:
        """Which of them are asked for; None: all."""
        query = self._query
        found: npt.NDArray[np.bool_] | None = None
        if query.since_ns is not None and low < query.since_ns:
            found = rows.times >= query.since_ns
        if query.until_ns is not None and high > query.until_ns:
            early = rows.times <= query.until_ns
            found = early if found is None else found & early
        if not self._matcher.everything:
            if found is None:
                found = self._matcher.mask(rows)
            elif found.any():
                which = np.flatnonzero(found)
                found = np.zeros(len(rows), bool)
                found[which[self._matcher.mask(rows.take(which))]] = True
        return found

    def _parts(self, rows: Rows, which: I64) -> Iterator[Rows]:
        """Those rows, a batch at a time, as copies: the ring goes on."""
        which = which[: self._left]
        self._left -= len(which)
        self.given += len(which)
        for at in range(0, len(which), _BATCH):
            part = which[at : at + _BATCH]
            first = int(part[0])
            if int(part[-1]) - first == len(part) - 1:
                taken = rows.take(slice(first, first + len(part)))
                yield Rows(
                    taken.run,
                    taken.numbers,
                    {name: column.copy() for name, column in taken.columns.items()},
                    taken.dimensions,
                )
            else:
                yield rows.take(part)

    # ---- the newest of them

    def _last(self) -> Generator[State, None, int]:
        """Where to start so that `number` flows match; those on disk are given already."""
        ring, wanted = self._store.ring, self._query.number
        query = self._query
        head = ring.head
        found = 0
        position = head
        for first, count in reversed(ring.spans(ring.tail, head)):
            low, high = ring.bounds(first)
            if query.until_ns is not None and low > query.until_ns:
                position = first
                continue
            rows = self._store.rows(first, count)
            mask = self._mask(rows, low, high)
            matches = count if mask is None else int(np.count_nonzero(mask))
            if found + matches >= wanted:
                which = np.arange(count) if mask is None else np.flatnonzero(mask)
                at = len(which) - (wanted - found)
                position = first + int(which[at])
                found = wanted
                break
            found += matches
            position = first
        if found < wanted and self._store.segments is not None:
            yield from self._last_on_disk(wanted - found, position)
        if not query.follow:
            self._left = wanted - self.given
        return max(position, ring.tail)

    def _last_on_disk(self, wanted: int, before_row: int) -> Iterator[State]:
        segments = self._store.segments
        assert segments is not None
        looked = 0
        chosen: list[tuple[Segment, int]] = []
        for segment in reversed(segments.between(None, self._query.until_ns)):
            if wanted <= 0 or looked >= _BACK_ROWS:
                break
            yield State.DISK
            looked += segment.rows
            matches = 0
            for rows in self._load(segment, before_row):
                mask = self._mask(rows, segment.from_ns, segment.to_ns)
                matches += len(rows) if mask is None else int(np.count_nonzero(mask))
            if matches:
                chosen.append((segment, max(0, matches - wanted)))
                wanted -= matches
        for segment, skip in reversed(chosen):
            yield State.DISK
            for rows in self._load(segment, before_row):
                mask = self._mask(rows, segment.from_ns, segment.to_ns)
                which = np.arange(len(rows)) if mask is None else np.flatnonzero(mask)
                take, skip = which[skip:], max(0, skip - len(which))
                for at in range(0, len(take), _BATCH):
                    part = take[at : at + _BATCH]
                    self.given += len(part)
                    self._pending.append(rows.take(part))
                    if self._pending_rows() >= _BATCH:
                        yield State.DISK
        yield State.READY

    # ---- disk

    def _history(self, from_row: int, before_row: int) -> Iterator[State]:
        """What is on disk and not in memory, as asked for: of this run rows `from_row` to
        `before_row`, and with `from_row` 0 everything of earlier runs.
        """
        segments = self._store.segments
        query = self._query
        losses = [] if from_row else self._old_losses(before_row)
        if segments is not None:
            for segment in segments.between(query.since_ns, query.until_ns):
                ours = segment.run == self._store.run
                if from_row and not ours:
                    continue
                if (ours and not from_row < segment.first + segment.rows) or (
                    ours and segment.first >= before_row
                ):
                    continue
                if self._left <= 0:
                    return
                yield State.DISK
                for rows in self._load(segment, before_row, from_row):
                    while losses and losses[0].from_ns <= int(rows.times[0]):
                        self._pending.append(losses.pop(0))
                    mask = self._mask(rows, segment.from_ns, segment.to_ns)
                    which = np.arange(len(rows)) if mask is None else np.flatnonzero(mask)
                    for part in self._parts(rows, which):
                        self._pending.append(part)
                        if self._pending_rows() >= _BATCH:
                            yield State.DISK
        self._pending.extend(losses)
        yield State.READY

    def _old_losses(self, before_row: int) -> list[Loss]:
        return [
            loss
            for loss in self._store.ledger.between(self._query.since_ns, self._query.until_ns)
            if loss.cause is not Cause.CLOCK
            and (loss.run != self._store.run or loss.row <= before_row)
        ]

    def _load(self, segment: Segment, before_row: int, from_row: int = 0) -> Iterator[Rows]:
        """A segment's rows that are not in memory. One that is damaged is reported as a loss."""
        segments = self._store.segments
        assert segments is not None
        try:
            for rows in segments.read(segment, self._query.since_ns, self._query.until_ns):
                if segment.run == self._store.run:
                    inside = (rows.numbers < np.uint64(before_row)) & (
                        rows.numbers >= np.uint64(from_row)
                    )
                    rows = rows if inside.all() else rows.take(inside)
                if len(rows):
                    yield rows
        except SegmentDamaged as error:
            self._pending.append(
                Loss(
                    from_ns=segment.from_ns,
                    to_ns=segment.to_ns,
                    count=segment.rows,
                    cause=Cause.HISTORY,
                    detail=error.message,
                )
            )


class _LossReader:
    """Gaps of this run, at their places between rows. The last one may yet grow."""

    def __init__(self, cursor: Cursor, start: int) -> None:
        self._cursor = cursor
        self._emitted = 0  # of the gap at our place
        ledger, run = cursor._store.ledger, cursor._store.run
        place = ledger.end
        while (loss := ledger.at(place - 1)) is not None and loss.run == run and loss.row > start:
            place -= 1
        before = ledger.at(place - 1)
        if before is not None and before.run == run:
            place -= 1
            self._emitted = before.count or 1
        self._place = place

    def _next(self) -> Loss | None:
        """The next gap, or what it grew by."""
        ledger, query = self._cursor._store.ledger, self._cursor._query
        self._place = max(self._place, ledger.forgotten)
        while (loss := ledger.at(self._place)) is not None:
            fresh = (loss.count or 1) - self._emitted
            wanted = (
                fresh > 0
                and loss.cause is not Cause.CLOCK
                and (query.since_ns is None or loss.to_ns >= query.since_ns)
                and (query.until_ns is None or loss.from_ns <= query.until_ns)
            )
            if wanted:
                return loss if loss.count is None else replace(loss, count=fresh)
            if self._place + 1 >= ledger.end:
                return None  # stay with the last one
            self._place += 1
            self._emitted = 0
        return None

    def next_row(self, first: int, end: int) -> int | None:
        """The row before which the next gap lies, if it is one of these."""
        loss = self._next()
        return loss.row if loss is not None and first < loss.row < end else None

    def emit(self, position: int) -> None:
        while (loss := self._next()) is not None and loss.row <= position:
            self._cursor._pending.append(loss)
            self._emitted += loss.count or 1
