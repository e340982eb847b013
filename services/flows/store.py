"""The flows that are kept: newest in memory, older on disk, and what is missing between.

events ──▶ Store.take ──▶ LiveDimensions.intern ──▶ Ring.write ──▶ waiting readers woken
                                                      │
                      Segments.write ◀── Store.spill ─┘      Ledger ◀── every gap
FlowQuery ──▶ Store.query ──▶ Cursor ──▶ Rows | Loss, oldest first
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cilia.bpf import constants as k
from cilia.bpf.layout import EVENT
from services.flows.dimensions import Dimensions, LiveDimensions
from services.flows.filterspec import FlowQuery
from services.flows.interning import AnyArray
from services.flows.l7 import L7Record
from services.flows.ledger import Cause, Ledger, Loss
from services.flows.matching import CelCompiler, Encode, compile_filters
from services.flows.query import Cursor
from services.flows.ring import Ring
from services.flows.rows import ROW, Rows
from services.flows.segments import Segments
from services.flows.uuids import new_run
from services.flows.world import Meaning, World

_STEP_NS = 500_000_000  # a wall clock that jumps by more is stepped, not slewed
_NAMESPACE_TTL_S = 3600.0


@dataclass(frozen=True, slots=True)
class L7Event:
    """One request or answer, with the ends the agent found for it."""

    event: AnyArray  # one EVENT of type 129; its reason is the verdict
    record: L7Record


@dataclass(slots=True)
class Counters:
    seen: int = 0
    l7: int = 0
    started_ns: int = field(default_factory=time.time_ns)
    spilled: int = 0
    spill_errors: int = 0
    last_spill_error: str = ""


class Store:
    """Owned by the event loop; only `Segments` works in threads."""

    def __init__(
        self,
        *,
        capacity: int,
        world: World | None = None,
        segments: Segments | None = None,
        ledger: Ledger | None = None,
        run: int | None = None,
        cel: CelCompiler | None = None,
        encode_flows: Encode | None = None,
    ) -> None:
        self.run = new_run() if run is None else run
        self.world = world or World()
        self.dimensions = LiveDimensions(self.world)
        self.ring = Ring(capacity)
        self.ledger = Ledger(run=self.run) if ledger is None else ledger
        self.segments = segments
        self.counters = Counters()
        self._cel = cel
        self._encode_flows = encode_flows
        self._news = asyncio.Event()
        self._spilled = 0  # rows up to here are on disk, or given up
        self._offset_ns: int | None = None
        self._rates: deque[tuple[float, int]] = deque()
        self._rate_due = 0.0
        self._noted = 0  # rows whose namespaces are known
        self.namespaces: dict[tuple[str, str], float] = {}

    # ---- in

    def learn(self, meaning: Meaning) -> None:
        """What numbers mean from now on."""
        self.dimensions.retire(self.world.learn(meaning))

    def forget(self, meaning: Meaning) -> None:
        """What numbers do not mean any more; after the events that came with it."""
        self.dimensions.retire(self.world.forget(meaning))

    def take(self, events: AnyArray, *, wall_offset_ns: int) -> None:
        """Stores raw events. `wall_offset_ns` makes their monotonic time wall clock."""
        self._note_clock(events, wall_offset_ns)
        for at in range(0, len(events), 65536):
            self._take(events[at : at + 65536], wall_offset_ns, None)
        self._wake()

    def take_l7(self, events: Sequence[L7Event], *, wall_offset_ns: int) -> None:
        """Stores what proxies saw."""
        for at in range(0, len(events), 4096):
            part = events[at : at + 4096]
            raw = np.concatenate([one.event.reshape(1) for one in part], dtype=EVENT)
            self._take(raw, wall_offset_ns, [one.record for one in part])
            self.counters.l7 += len(part)
        self._wake()

    def lose(
        self, cause: Cause, count: int | None, *, detail: str = "", since_ns: int | None = None
    ) -> None:
        """Some events never came, and would have come since the newest that did."""
        now = time.time_ns()
        since = self.ring.newest_time() if self.ring.head else now
        if since_ns is not None:
            since = since_ns
        self.ledger.add(
            cause,
            from_ns=min(since, now),
            to_ns=now,
            count=count,
            row=self.ring.head,
            detail=detail,
        )
        self._wake()

    def _take(self, events: AnyArray, wall_offset_ns: int, records: list[L7Record] | None) -> None:
        if not len(events):
            return
        times = events["time_ns"].astype(np.int64) + wall_offset_ns
        if len(times) > 1 and (np.diff(times) < 0).any():
            # Processors take the time before they take their place in the ring.
            order = np.argsort(times, kind="stable")
            events, times = events[order], times[order]
            if records is not None:
                records = [records[at] for at in order.tolist()]
        head = self.ring.head + len(events)
        tail = self.ring.tail
        pairs, metas = self.dimensions.intern(events, head=head, tail=tail)
        l7: AnyArray | int = 0
        if records is not None:
            l7 = self.dimensions.add_l7(records, head=head, tail=tail)
        self.ring.write(
            {
                "time_ns": times,
                "pair": pairs,
                "meta": metas,
                "sport": events["sport_be"],
                "dport": events["dport_be"],
                "length": events["length"],
                "l7": l7,
            },
            len(events),
        )
        self.counters.seen += len(events)
        if self.segments is None:
            self._spilled = self.ring.head
        elif self._spilled < self.ring.tail:
            self._give_up(self.ring.tail)

    def _note_clock(self, events: AnyArray, wall_offset_ns: int) -> None:
        before, self._offset_ns = self._offset_ns, wall_offset_ns
        if before is None or not len(events) or abs(wall_offset_ns - before) < _STEP_NS:
            return
        first = int(events["time_ns"][0])
        step_s = (wall_offset_ns - before) / 1e9
        self.ledger.add(
            Cause.CLOCK,
            from_ns=first + min(before, wall_offset_ns),
            to_ns=first + max(before, wall_offset_ns),
            count=0,
            row=self.ring.head,
            detail=f"the wall clock was set by {step_s:+.3f} s",
        )

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    # ---- out

    def query(self, query: FlowQuery) -> Cursor:
        """Raises FilterInvalid."""
        matcher = compile_filters(
            query.whitelist, query.blacklist, cel=self._cel, encode=self._encode_flows
        )
        return Cursor(self, query, matcher)

    async def wait_for_rows(self, cursor: Cursor) -> None:
        """Returns when something came since the cursor last read."""
        while self.ring.head <= cursor.position and self.ledger.version == cursor.losses_seen:
            await self._news.wait()

    def view(self) -> Dimensions:
        return self.dimensions.view()

    def rows(self, first: int, count: int) -> Rows:
        """Views of contiguous rows: see `Ring.spans`."""
        return Rows(
            self.run,
            np.arange(first, first + count, dtype=np.uint64),
            self.ring.slice(first, count),
            self.view(),
        )

    @property
    def rate(self) -> float:
        """Flows a second over the last minute."""
        now = time.monotonic()
        self.tick(now)
        if len(self._rates) < 2:
            return 0.0
        (then, count), (last, total) = self._rates[0], self._rates[-1]
        return (total - count) / (last - then) if last > then else 0.0

    def tick(self, now: float) -> None:
        """Once a second or so: what rates and namespaces are told from."""
        if now < self._rate_due:
            return
        self._rate_due = now + 1.0
        self._rates.append((now, self.counters.seen))
        while self._rates and now - self._rates[0][0] > 60.0:
            self._rates.popleft()

    def note_namespaces(self, now: float) -> None:
        """Which namespaces flows are of; kept for an hour. Looks at what is new since."""
        head = self.ring.head
        start = max(self.ring.tail, self._noted, head - 65536)
        self._noted = head
        view = self.view()
        for first, count in self.ring.spans(start, head):
            pairs = np.unique(self.ring.slice(first, count)["pair"])
            for side in ("src", "dst"):
                for number in np.unique(view.pairs[side][pairs]).tolist():
                    party = view.parties[number]
                    if party.namespace:
                        self.namespaces[party.cluster or "default", party.namespace] = now
        for key in [key for key, at in self.namespaces.items() if now - at > _NAMESPACE_TTL_S]:
            del self.namespaces[key]

    # ---- to disk

    @property
    def unspilled(self) -> int:
        return self.ring.head - self._spilled

    def oldest_unspilled_ns(self) -> int | None:
        if self._spilled >= self.ring.head:
            return None
        return int(self.ring.columns["time_ns"][self._spilled & (self.ring.capacity - 1)])

    def _give_up(self, upto: int) -> None:
        """Rows that were overwritten before they were written to disk: from memory they are gone
        as all are in their time, but history has a hole."""
        first = self._spilled
        self._spilled = upto
        newest = self.ring.oldest_time()
        self.ledger.add(
            Cause.HISTORY,
            from_ns=newest,
            to_ns=newest,
            count=upto - first,
            row=upto,
            detail=self.counters.last_spill_error or "the disk is too slow",
        )

    async def spill(self, limit: int) -> int:
        """Writes up to `limit` rows that are not on disk yet; how many. Never raises OSError."""
        if self.segments is None:
            return 0
        start = max(self._spilled, self.ring.tail)
        end = min(self.ring.head, start + limit)
        if end <= start:
            return 0
        parts = [self.rows(first, count) for first, count in self.ring.spans(start, end)]
        rows = Rows(
            self.run,
            np.arange(start, end, dtype=np.uint64),
            {name: np.concatenate([part.columns[name] for part in parts]) for name in ROW},
            self.view(),
        )
        frozen = self.segments.freeze(rows)
        try:
            await asyncio.to_thread(self.segments.write, frozen)
        except OSError as error:
            self.counters.spill_errors += 1
            self.counters.last_spill_error = error.strerror or str(error)
            return 0
        self.counters.last_spill_error = ""
        self.counters.spilled += end - start
        self._spilled = max(self._spilled, end)
        return end - start


__all__ = ["Counters", "L7Event", "Loss", "Store", "k"]
