"""Keeping history in order: when to write, what to expire, and what a run leaves for the next one.

<flows dir>/segments/    files of flows
            ledger.jsonl what is missing
            alive        how far the run had come when it last said so, and whether it ended well
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import structlog

from cilia.telemetry import fields
from services.flows.ledger import Cause
from services.flows.segments import Segments
from services.flows.store import Store

log = structlog.get_logger()

_SAY_ALIVE_S: Final = 5.0
_TIDY_S: Final = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Alive:
    run: int
    time_ns: int
    unspilled: int
    ended: bool


class History:
    """A lifecycle part, and the work of a controller."""

    def __init__(
        self,
        store: Store,
        segments: Segments,
        *,
        directory: Path,
        segment_rows: int,
        segment_age_s: float,
    ) -> None:
        self._store = store
        self._segments = segments
        self._alive = directory / "alive"
        self._segment_rows = segment_rows
        self._segment_age_ns = int(segment_age_s * 1e9)
        self._said = 0.0
        self._tidied = 0.0
        self._full = False

    async def start(self) -> None:
        await asyncio.to_thread(self._segments.open)
        await asyncio.to_thread(self._store.ledger.load)
        before = await asyncio.to_thread(self._read_alive)
        self._enter_gaps(before)
        self._note_damage()
        for name, why in self._segments.damaged.items():
            log.warning("A file of flows is skipped.", **{fields.PATH: name, fields.REASON: why})
        await asyncio.to_thread(self._segments.expire, time.time_ns())
        await self._save()

    async def stop(self) -> None:
        while await self._store.spill(self._segment_rows):
            pass
        await self._save(ended=True)

    async def spill_due(self) -> None:
        """Writes what is due to disk. Raises nothing for a full disk: memory goes on, and the
        ledger will say what history lacks.
        """
        store = self._store
        wrote = 0
        while store.unspilled >= self._segment_rows or self._is_old():
            done = await store.spill(self._segment_rows)
            if not done:
                break
            wrote += done
        error = store.counters.last_spill_error
        if bool(error) != self._full:
            self._full = bool(error)
            if error:
                log.error("Flows cannot be written to disk.", **{fields.ERROR: error})
            else:
                log.info("Flows are written to disk again.")
        if wrote:
            await asyncio.to_thread(self._segments.expire, time.time_ns())
        self._note_damage()
        if wrote or time.monotonic() - self._said >= _SAY_ALIVE_S:
            await self._save()

    def _is_old(self) -> bool:
        oldest = self._store.oldest_unspilled_ns()
        return oldest is not None and time.time_ns() - oldest > self._segment_age_ns

    # ---- from run to run

    def _enter_gaps(self, before: Alive | None) -> None:
        store, ledger = self._store, self._store.ledger
        newest = self._segments.newest_ns
        now = time.time_ns()
        if before is not None and not before.ended:
            last = max(newest, before.time_ns)
            ledger.add(
                Cause.HISTORY,
                from_ns=min(newest or last, last),
                to_ns=last,
                # As it last said; what came after that nobody counted.
                count=before.unspilled,
                detail="the service was killed before it wrote these to disk",
            )
        since = max(newest, before.time_ns if before is not None else 0)
        if since:
            ledger.add(
                Cause.STOPPED,
                from_ns=min(since, now),
                to_ns=now,
                count=None,
                row=store.ring.head,
                detail="the flow service did not run",
            )

    def _note_damage(self) -> None:
        for segment in self._segments.take_damage():
            self._store.ledger.add(
                Cause.HISTORY,
                from_ns=segment.from_ns,
                to_ns=segment.to_ns,
                count=segment.rows,
                row=self._store.ring.head,
                detail=f"{segment.path.name} cannot be read: "
                f"{self._segments.damaged.get(segment.path.name, '')}",
            )

    async def _save(self, *, ended: bool = False) -> None:
        """The ledger's news and the sign of life; on a full disk the next time has them."""
        self._said = time.monotonic()
        store = self._store
        rows = store.ledger.take_unsaved()
        alive = Alive(run=store.run, time_ns=time.time_ns(), unspilled=store.unspilled, ended=ended)
        tidy = time.monotonic() - self._tidied > _TIDY_S
        oldest = self._segments.oldest_ns

        def write() -> None:
            store.ledger.append(rows)
            beside = self._alive.with_suffix(".tmp")
            beside.write_text(json.dumps(asdict(alive)))
            beside.replace(self._alive)

        try:
            await asyncio.to_thread(write)
            if tidy and oldest:
                store.ledger.rewrite(oldest)
                self._tidied = time.monotonic()
        except OSError as error:
            store.ledger.put_back(rows)
            log.warning("The ledger cannot be written.", **{fields.ERROR: error.strerror or ""})

    def _read_alive(self) -> Alive | None:
        try:
            return Alive(**json.loads(self._alive.read_text()))
        except (OSError, ValueError, TypeError):
            return None
