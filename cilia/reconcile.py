"""Reconcilers: keep one real thing equal to a table of desired rows, and say of each row how it
stands.

A reconciler has three operations, all idempotent: `update(row)`, `delete(row)` and `prune(rows)`,
which removes what no row wants. Deleting what is absent is success. Every row has a status,
Pending, Done or Error with a message, in a table of its own (`statuses`), so that "why is it not
applied?" is a query. A row that failed is tried again after n * `retry_s` for its n-th failure, at
most `retry_max_s`.

Nothing is pruned before the desired table is synced: what an earlier run left must keep working
until we know that nobody wants it. `resync_s` repeats every update and the prune, against meddling
by others.

       desired ReadTable --changes--> flush(): update_batch -> delete_batch -> prune
                                         |
                                 statuses: Table of RowStatus

Run it with `run()` in a task, or call `flush()` where the order among several reconcilers matters.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import time
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import Generic, TypeVar

import structlog

from cilia.controller import describe, linear_backoff
from cilia.errors import DomainError, Kind
from cilia.table import ReadTable, Table
from cilia.telemetry import fields

K = TypeVar("K", bound=Hashable)
R = TypeVar("R")

log = structlog.get_logger()


class State(enum.Enum):
    PENDING = "Pending"
    DONE = "Done"
    ERROR = "Error"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RowStatus(Generic[K]):
    """How one desired row stands.

    `revision` is the desired table's revision that the state speaks of. A deleted row keeps a
    status until its deletion is done. `attempts` counts the failures in a row.
    """

    key: K
    state: State
    revision: int
    message: str = ""
    attempts: int = 0
    deleting: bool = False
    changed_s: float = dataclasses.field(default=0.0, compare=False)

    @classmethod
    def table_header(cls) -> tuple[str, ...]:
        return ("Key", "State", "Revision", "Attempts", "Message")

    def table_row(self) -> tuple[str, ...]:
        state = f"{self.state.value} (delete)" if self.deleting else self.state.value
        return (str(self.key), state, str(self.revision), str(self.attempts), self.message)


class NotReconciled(DomainError):
    """Rows that a caller waits for could not be applied (yet: they are still retried)."""

    default_kind = Kind.UNAVAILABLE

    def __init__(self, name: str, errors: Mapping[Hashable, str]) -> None:
        first = next(iter(errors.items()), None)
        detail = f": {first[0]}: {first[1]}" if first else ""
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        super().__init__(f"{name} is not applied{detail}{more}")
        self.errors = dict(errors)


class Reconciler(Generic[K, R]):
    """Base class; a subclass gives `update`, `delete` and `prune`, or the batch forms of them.

    `updates_first` makes before it breaks: no traffic is lost while rows replace each other. A
    reconciler whose keys share one real resource, or whose store may be full, sets it to False, or
    has `delete` check that the thing it removes still belongs to the row.
    """

    updates_first = True

    def __init__(
        self,
        name: str,
        desired: ReadTable[K, R],
        *,
        min_interval_s: float = 0.0,
        retry_s: float = 1.0,
        retry_max_s: float = 30.0,
        resync_s: float | None = None,
        jitter: float = 0.1,
    ) -> None:
        assert retry_s > 0, "a reconciler must not spin"
        self.name = name
        self._desired = desired
        self._min_interval_s = min_interval_s
        self._retry_s = retry_s
        self._retry_max_s = retry_max_s
        self._resync_s = resync_s
        self._jitter = jitter
        self._statuses: Table[K, RowStatus[K]] = Table(
            f"{name}-status", key=lambda status: status.key
        )
        self._seen: int | None = None  # desired revision folded into _work
        self._work: dict[K, R | None] = {}  # what is to be done: a row to update, None to delete
        self._attempted: dict[K, R] = {}  # rows that may have left a trace in the real thing
        self._retry_at: dict[K, float] = {}  # loop time before which a failed key is left alone
        self._prune_due = True
        self._prune_attempts = 0
        self._prune_error = ""
        self._prune_at = 0.0
        self._resync_at: float | None = None
        self._wake = asyncio.Event()
        self._lock = asyncio.Lock()

    # ---- what a subclass gives

    async def update(self, row: R) -> None:
        """Makes the real thing have the row. Idempotent."""
        raise NotImplementedError

    async def delete(self, row: R) -> None:
        """Removes the row from the real thing; success when it is absent."""
        raise NotImplementedError

    async def prune(self, rows: Collection[R]) -> None:
        """Removes all that none of the rows wants. Called only when the desired table is synced."""

    async def update_batch(self, rows: Mapping[K, R]) -> Mapping[K, Exception]:
        """Updates many; returns what failed. Override where the store has a bulk operation.

        Raising means that every row of the batch failed.
        """
        failed: dict[K, Exception] = {}
        for key, row in rows.items():
            try:
                await self.update(row)
            except Exception as error:
                failed[key] = error
        return failed

    async def delete_batch(self, rows: Mapping[K, R]) -> Mapping[K, Exception]:
        """Deletes many; returns what failed. Raising means that every row of the batch failed."""
        failed: dict[K, Exception] = {}
        for key, row in rows.items():
            try:
                await self.delete(row)
            except Exception as error:
                failed[key] = error
        return failed

    # ---- what others use

    @property
    def statuses(self) -> ReadTable[K, RowStatus[K]]:
        return self._statuses.reader()

    @property
    def errors(self) -> dict[K, str]:
        """The rows in error, with the reason."""
        return {s.key: s.message for s in self._statuses if s.state is State.ERROR}

    @property
    def prune_error(self) -> str:
        """Why the last prune failed; "" when it did not."""
        return self._prune_error

    def paused(self) -> asyncio.Lock:
        """To be held by who looks at the real thing: nothing is written meanwhile."""
        return self._lock

    def trigger_prune(self) -> None:
        """Asks for a prune at the next flush."""
        self._prune_due = True
        self._prune_at = 0.0
        self._wake.set()

    def trigger_resync(self) -> None:
        """Asks for every row to be written again and for a prune."""
        for key, row in self._desired.snapshot().items():
            self._work.setdefault(key, row)
        self._retry_at.clear()
        self.trigger_prune()

    async def wait_done(
        self,
        keys: Iterable[K] | None = None,
        *,
        revision: int | None = None,
        fail_fast: bool = False,
    ) -> None:
        """Returns when the rows `keys` (None: all) are applied as of the desired `revision`
        (None: the present one). A key that is absent by then must have been removed.

        Errors are waited through, since they are retried: bound it with asyncio.timeout. With
        `fail_fast`, NotReconciled is raised as soon as one of the rows is in error.
        """
        wanted = self._desired.revision if revision is None else revision
        chosen = None if keys is None else frozenset(keys)

        def settled(_: ReadTable[K, RowStatus[K]]) -> bool:
            errors: dict[Hashable, str] = {}
            pending = self._seen is None or self._seen < wanted
            for status in self._rows_of(chosen):
                if status.state is State.ERROR:
                    errors[status.key] = status.message
                pending = pending or status.state is not State.DONE
            if errors and fail_fast:
                raise NotReconciled(self.name, errors)
            return not pending

        await self._statuses.wait_until(settled)

    def _rows_of(self, keys: frozenset[K] | None) -> list[RowStatus[K]]:
        if keys is None:
            return list(self._statuses)
        found = (self._statuses.get(key) for key in keys)
        return [status for status in found if status is not None]

    # ---- the loop

    async def run(self) -> None:
        """Keeps the real thing up to date; runs until cancelled."""
        loop = asyncio.get_running_loop()
        with self._desired.listen(self._wake.set):
            while True:
                self._wake.clear()
                started = loop.time()
                await self.flush()
                try:
                    async with asyncio.timeout_at(self._next_due()):
                        await self._wake.wait()
                except TimeoutError:
                    pass
                if (wait := started + self._min_interval_s - loop.time()) > 0:
                    await asyncio.sleep(wait)

    async def flush(self) -> None:
        """Does once all that is due. Errors stay in the rows' statuses; it raises none of them."""
        async with self._lock:
            loop = asyncio.get_running_loop()
            if self._resync_s is not None:
                if self._resync_at is None:
                    self._resync_at = loop.time() + self._resync_s
                elif loop.time() >= self._resync_at:
                    self._resync_at = loop.time() + self._resync_s
                    self.trigger_resync()
            self._fold_changes()
            now = loop.time()
            due = [key for key in self._work if self._retry_at.get(key, 0.0) <= now]
            updates = {key: row for key in due if (row := self._work[key]) is not None}
            deletes = {key: self._attempted[key] for key in due if self._work[key] is None}
            if self.updates_first:
                await self._do_updates(updates)
                await self._do_deletes(deletes)
            else:
                await self._do_deletes(deletes)
                await self._do_updates(updates)
            if self._prune_due and self._desired.synced and loop.time() >= self._prune_at:
                await self._do_prune()

    def _fold_changes(self) -> None:
        batch = self._desired.changes(self._seen)
        now_s = time.time()
        statuses: list[RowStatus[K]] = []
        if batch.reset:
            present = {change.key for change in batch.changes}
            for key in [key for key in (*self._attempted, *self._work) if key not in present]:
                statuses += self._fold(key, None, batch.revision, now_s)
        for change in batch.changes:
            statuses += self._fold(change.key, change.row, change.revision, now_s)
        self._seen = batch.revision
        if not self._statuses.upsert_all(statuses):
            # wait_done also looks at _seen, so wake it although no status changed.
            self._statuses.touch()

    def _fold(self, key: K, row: R | None, revision: int, now_s: float) -> list[RowStatus[K]]:
        self._retry_at.pop(key, None)
        if row is None and key not in self._attempted:
            self._work.pop(key, None)  # came and went before we did anything
            self._statuses.delete(key)
            return []
        self._work[key] = row
        return [
            RowStatus(
                key=key,
                state=State.PENDING,
                revision=revision,
                deleting=row is None,
                changed_s=now_s,
            )
        ]

    async def _do_updates(self, rows: dict[K, R]) -> None:
        if not rows:
            return
        self._attempted.update(rows)
        try:
            failed = await self.update_batch(rows)
        except Exception as error:
            failed = dict.fromkeys(rows, error)
        self._record(rows, failed, deleting=False)

    async def _do_deletes(self, rows: dict[K, R]) -> None:
        if not rows:
            return
        try:
            failed = await self.delete_batch(rows)
        except Exception as error:
            failed = dict.fromkeys(rows, error)
        self._record(rows, failed, deleting=True)

    def _record(
        self, rows: Mapping[K, R], failed: Mapping[K, Exception], *, deleting: bool
    ) -> None:
        now = asyncio.get_running_loop().time()
        now_s = time.time()
        statuses: list[RowStatus[K]] = []
        new_errors: list[tuple[K, Exception]] = []
        for key in rows:
            old = self._statuses.get(key)
            revision = old.revision if old else 0
            error = failed.get(key)
            if error is None:
                self._work.pop(key, None)
                self._retry_at.pop(key, None)
                if deleting:
                    self._attempted.pop(key, None)
                    self._statuses.delete(key)
                    continue
                statuses.append(
                    RowStatus(key=key, state=State.DONE, revision=revision, changed_s=now_s)
                )
                continue
            attempts = (old.attempts if old else 0) + 1
            message = describe(error)
            if old is None or old.message != message:
                new_errors.append((key, error))
            # A resync that fails has work to do again.
            self._work[key] = None if deleting else rows[key]
            self._retry_at[key] = now + linear_backoff(
                attempts, self._retry_s, self._retry_max_s, self._jitter
            )
            statuses.append(
                RowStatus(
                    key=key,
                    state=State.ERROR,
                    revision=revision,
                    message=message,
                    attempts=attempts,
                    deleting=deleting,
                    changed_s=now_s,
                )
            )
        self._statuses.upsert_all(statuses)
        self._warn(new_errors, deleting=deleting)

    def _warn(self, errors: Sequence[tuple[K, Exception]], *, deleting: bool) -> None:
        """One line a flush: a store that is gone fails every row alike."""
        if not errors:
            return
        key, error = errors[0]
        log.warning(
            "Rows could not be removed and will be retried."
            if deleting
            else "Rows could not be applied and will be retried.",
            **{
                fields.RECONCILER: self.name,
                fields.ROWS: len(errors),
                fields.KEY: str(key),
                fields.ERROR: describe(error),
            },
            exc_info=error if not isinstance(error, DomainError | OSError) else None,
        )

    async def _do_prune(self) -> None:
        loop = asyncio.get_running_loop()
        self._prune_due = False
        try:
            await self.prune(self._desired.rows())
        except Exception as error:
            message = describe(error)
            if message != self._prune_error:
                log.warning(
                    "A prune failed and will be retried.",
                    **{fields.RECONCILER: self.name, fields.ERROR: message},
                    exc_info=error if not isinstance(error, DomainError | OSError) else None,
                )
            self._prune_due = True
            self._prune_attempts += 1
            self._prune_error = message
            self._prune_at = loop.time() + linear_backoff(
                self._prune_attempts, self._retry_s, self._retry_max_s, self._jitter
            )
        else:
            self._prune_attempts = 0
            self._prune_error = ""

    def _next_due(self) -> float | None:
        times = [self._retry_at.get(key, 0.0) for key in self._work]
        if self._resync_at is not None:
            times.append(self._resync_at)
        if self._prune_due and self._desired.synced:
            times.append(self._prune_at)
        return min(times, default=None)
