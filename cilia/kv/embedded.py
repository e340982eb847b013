"""The embedded store: state in memory, history in a file, one process.

    write ──▶ Mvcc (at once) ──▶ changes ──▶ next group commit ──▶ fsync ──▶ answer
                                                                     │
    readers and watchers see ────────── durable revision ◀───────────┘

Writes are applied in memory in the order they come, and everything that gathers while one commit is
being synced goes into the next: throughput grows with the number of writers, not with the disk.
The newest durable revision runs behind `Mvcc.revision`; reads are made at it, a transaction is
answered only when it has caught up with all the transaction saw, and watches are fed from the log
up to it. So nothing is ever seen that a crash could take back.

A commit that fails (a full disk) fails every write that waited for it, and the memory is loaded
again from the file, which holds exactly what was acknowledged. Reads go on meanwhile.

Watches have no queue: each is a position in the log. History is bounded (`Retention`), so a watch
that sleeps too long gets Compacted, and nobody's slowness costs memory.

Without a path there is no file, and everything else is the same; for tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import secrets
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import structlog

from cilia.kv.backend import (
    NO_LEASE,
    BackendStatus,
    BackendUnavailable,
    Compacted,
    Delete,
    DeleteResult,
    Get,
    InvalidRequest,
    KeyValue,
    Lease,
    LeaseExists,
    LeaseID,
    LeaseNotFound,
    Limits,
    Put,
    PutResult,
    RangeResult,
    Retention,
    Span,
    Txn,
    TxnResult,
    WatchBatch,
)
from cilia.kv.journal import Changes, Contents, Journal, StoreWriteFailed
from cilia.kv.mvcc import Mvcc, check_span, validate
from cilia.telemetry import fields

log = structlog.get_logger()

MAX_LEASE_TTL_S = 86_400
_AGE_SAMPLES = 8
_MAX_LEASES = 100_000
_COMMIT_AND_ONE_MORE = 2


@dataclass(slots=True)
class _HeldLease:
    ttl_s: int
    deadline_s: float


@dataclass(slots=True)
class _Commit:
    """A group of writes on their way to the disk, and those who wait for it."""

    changes: Changes
    revision: int
    done: asyncio.Future[None]


class EmbeddedBackend:
    """A Backend in this process. Make it with `open`, on the event loop that will use it."""

    def __init__(
        self,
        *,
        journal: Journal | None,
        limits: Limits,
        retention: Retention,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._journal = journal
        self._limits = limits
        self._retention = retention
        self._pool = pool
        self._mvcc = Mvcc()
        self._store_id = secrets.randbits(64) or 1
        self._leases: dict[LeaseID, _HeldLease] = {}
        self._expiry: list[tuple[float, LeaseID]] = []
        self._expiry_timer: asyncio.TimerHandle | None = None
        self._durable = self._mvcc.revision
        self._gathering: _Commit | None = None
        self._in_flight: _Commit | None = None
        self._failure: str = ""
        self._recovering = False
        self._closed = False
        self._watches: set[EmbeddedWatch] = set()
        self._commits = 0
        self._ages: deque[int] = deque()
        self._age_timer: asyncio.TimerHandle | None = None

    @classmethod
    async def open(
        cls,
        path: Path | None,
        *,
        limits: Limits | None = None,
        retention: Retention | None = None,
    ) -> Self:
        """Opens or creates the store; every lease in it has its full time again, as in etcd.

        Raises StateDirectoryLocked, StoreDamaged, StoreFormatUnknown, OSError.
        """
        pool = ThreadPoolExecutor(_COMMIT_AND_ONE_MORE, thread_name_prefix="store")
        loop = asyncio.get_running_loop()
        journal: Journal | None = None
        try:
            if path is not None:
                journal = await loop.run_in_executor(pool, Journal.open, path)
            backend = cls(
                journal=journal,
                limits=limits or Limits(),
                retention=retention or Retention(),
                pool=pool,
            )
            if journal is not None:
                backend._adopt(*await loop.run_in_executor(pool, journal.read, _load))
                await loop.run_in_executor(pool, journal.begin)
        except BaseException:
            if journal is not None:
                journal.close()
            pool.shutdown(wait=False)
            raise
        backend._sample_age()
        return backend

    def _adopt(self, contents: Contents, mvcc: Mvcc) -> None:
        now = self._loop.time()
        held = self._leases
        self._store_id = contents.store_id
        self._mvcc = mvcc
        self._durable = mvcc.revision
        self._leases = {
            lease: held.get(lease) or _HeldLease(ttl_s, now + ttl_s)
            for lease, ttl_s in contents.leases
        }
        self._expiry = [(h.deadline_s, lease) for lease, h in self._leases.items()]
        heapq.heapify(self._expiry)
        self._arm_expiry()

    # Identity and limits

    @property
    def store_id(self) -> int:
        return self._store_id

    @property
    def revision(self) -> int:
        return self._durable

    @property
    def compacted(self) -> int:
        return self._mvcc.compacted

    @property
    def limits(self) -> Limits:
        return self._limits

    @property
    def healthy(self) -> bool:
        return not (self._failure or self._closed)

    # Reads

    async def get(self, key: bytes, *, revision: int = 0) -> KeyValue | None:
        kvs = self.range_now(Get(Span.key(key), revision=revision)).kvs
        return kvs[0] if kvs else None

    async def range(
        self,
        span: Span,
        *,
        revision: int = 0,
        limit: int = 0,
        keys_only: bool = False,
        count_only: bool = False,
    ) -> RangeResult:
        return self.range_now(
            Get(span, revision=revision, limit=limit, keys_only=keys_only, count_only=count_only)
        )

    def range_now(self, get: Get) -> RangeResult:
        """A read without waiting: all of it is in memory."""
        self._check_open()
        check_span(get.span, self._limits)
        return self._mvcc.read(get, at=self._durable)

    # Writes

    async def put(self, key: bytes, value: bytes, *, lease: LeaseID = NO_LEASE) -> PutResult:
        result = (await self.txn(Txn(success=(Put(key, value, lease),)))).results[0]
        assert isinstance(result, PutResult)
        return result

    async def delete(self, span: Span) -> DeleteResult:
        result = (await self.txn(Txn(success=(Delete(span),)))).results[0]
        assert isinstance(result, DeleteResult)
        return result

    async def txn(self, txn: Txn) -> TxnResult:
        validate(txn, self._limits)
        self._check_writable()
        result, changes = self._mvcc.transact(txn)
        self._record(changes)
        # A transaction that wrote nothing may still have seen what is not durable yet.
        await self._durable_at(self._mvcc.revision)
        return result

    async def compact(self, revision: int) -> None:
        self._check_writable()
        if revision > self._durable:
            self._mvcc.check_revision(revision, self._durable)
        self._compact(revision)
        await self._flushed()

    def _compact(self, revision: int) -> None:
        gone = self._mvcc.compact(revision)
        self._next_commit().changes.forget(revision, gone)
        # Watches that lost their place must hear of it though nothing new is coming.
        for watch in self._watches:
            watch.wake()

    # Leases

    async def grant(self, ttl_s: int, *, lease: LeaseID = NO_LEASE) -> Lease:
        self._check_writable()
        if not 1 <= ttl_s <= MAX_LEASE_TTL_S:
            raise InvalidRequest(f"a lease of {ttl_s} s is outside 1 to {MAX_LEASE_TTL_S}")
        if not 0 <= lease < 1 << 63:
            raise InvalidRequest(f"the lease id {lease} does not fit 63 bits")
        if lease in self._leases:
            raise LeaseExists(lease)
        if len(self._leases) >= _MAX_LEASES:
            raise InvalidRequest(f"there are {_MAX_LEASES} leases, no more are allowed")
        while lease == NO_LEASE or lease in self._leases:
            lease = LeaseID(secrets.randbits(62))
        deadline = self._loop.time() + ttl_s
        self._leases[lease] = _HeldLease(ttl_s, deadline)
        self._mvcc.leased[lease] = set()
        self._next_commit().changes.grant(lease, ttl_s)
        heapq.heappush(self._expiry, (deadline, lease))
        self._arm_expiry()
        await self._flushed()
        return Lease(lease, ttl_s, float(ttl_s))

    async def keepalive(self, lease: LeaseID) -> Lease:
        self._check_open()
        held = self._leases.get(lease)
        if held is None:
            raise LeaseNotFound(lease)
        held.deadline_s = self._loop.time() + held.ttl_s
        return self._describe(lease, held)

    async def revoke(self, lease: LeaseID) -> int:
        self._check_writable()
        if lease not in self._leases:
            raise LeaseNotFound(lease)
        self._revoke(lease)
        revision = self._mvcc.revision
        await self._flushed()
        return revision

    async def lease(self, lease: LeaseID) -> Lease:
        self._check_open()
        if (held := self._leases.get(lease)) is None:
            raise LeaseNotFound(lease)
        return self._describe(lease, held)

    async def leases(self) -> Sequence[Lease]:
        self._check_open()
        return [self._describe(lease, held) for lease, held in self._leases.items()]

    def _describe(self, lease: LeaseID, held: _HeldLease) -> Lease:
        remaining = max(held.deadline_s - self._loop.time(), 0.0)
        return Lease(lease, held.ttl_s, remaining, len(self._mvcc.leased.get(lease, ())))

    def _revoke(self, lease: LeaseID) -> None:
        changes = self._mvcc.drop_lease(lease)
        del self._leases[lease]
        self._record(changes)
        self._next_commit().changes.revoke(lease)

    def _arm_expiry(self) -> None:
        if self._expiry_timer is not None:
            self._expiry_timer.cancel()
            self._expiry_timer = None
        if self._expiry and not self._closed:
            self._expiry_timer = self._loop.call_at(self._expiry[0][0], self._expire)

    def _expire(self) -> None:
        self._expiry_timer = None
        if self._recovering:
            return  # `_adopt` arms it again
        now = self._loop.time()
        while self._expiry and self._expiry[0][0] <= now:
            _, lease = heapq.heappop(self._expiry)
            held = self._leases.get(lease)
            if held is None:
                continue
            if held.deadline_s > now:  # kept alive since
                heapq.heappush(self._expiry, (held.deadline_s, lease))
                continue
            keys = len(self._mvcc.leased[lease])
            self._revoke(lease)
            log.info(
                "A lease expired.",
                **{fields.LEASE_ID: lease, fields.LEASE_TTL_S: held.ttl_s, fields.COUNT: keys},
            )
        self._arm_expiry()

    # Watches

    def watch(
        self, span: Span, *, start_revision: int = 0, progress_s: float | None = None
    ) -> EmbeddedWatch:
        self._check_open()
        check_span(span, self._limits)
        if start_revision < 0:
            raise InvalidRequest(f"revision {start_revision} is negative")
        if 0 < start_revision < self._mvcc.compacted:
            raise Compacted(self._mvcc.compacted)
        seen = start_revision - 1 if start_revision else self._durable
        watch = EmbeddedWatch(self, span, seen, progress_s)
        self._watches.add(watch)
        return watch

    # Group commit

    def _record(self, changes: Sequence[KeyValue]) -> None:
        if changes:
            commit = self._next_commit()
            commit.changes.record(changes)
            commit.revision = self._mvcc.revision

    def _next_commit(self) -> _Commit:
        """The commit that gathers writes now; it starts at the end of this turn of the loop, or
        when the one before it is on the disk."""
        if self._gathering is None:
            self._gathering = _Commit(Changes(), self._mvcc.revision, self._loop.create_future())
            # A commit nobody waits for (an expired lease) may fail: that is logged in `_failed`.
            self._gathering.done.add_done_callback(_retrieve)
            if self._in_flight is None:
                self._loop.call_soon(self._start_commit)
        return self._gathering

    def _start_commit(self) -> None:
        if self._in_flight is not None or self._gathering is None:
            return
        commit, self._gathering = self._gathering, None
        self._in_flight = commit
        if self._journal is None:
            self._commits += 1
            self._settle(commit)
            return
        written = self._loop.run_in_executor(self._pool, self._journal.commit, commit.changes)
        written.add_done_callback(self._committed)

    def _committed(self, written: asyncio.Future[None]) -> None:
        commit = self._in_flight
        assert commit is not None
        error = written.exception()
        if error is None:
            self._commits += 1
            self._settle(commit)
        else:
            self._failed(commit, error)

    def _settle(self, commit: _Commit) -> None:
        self._in_flight = None
        advanced = commit.revision > self._durable
        self._durable = max(self._durable, commit.revision)
        if self._failure:
            self._failure = ""
            log.info("The store can be written again.", **{fields.REVISION: self._durable})
        if not commit.done.done():
            commit.done.set_result(None)
        if advanced:
            for watch in self._watches:
                watch.wake()
            self._retain()
        if self._gathering is not None:
            self._start_commit()

    def _failed(self, commit: _Commit, error: BaseException) -> None:
        """Takes the memory back to what is on the disk."""
        assert self._journal is not None
        self._failure = str(error)
        self._recovering = True
        log.error(
            "A write to the store failed; it was not acknowledged.",
            **{fields.ERROR: str(error), fields.PATH: str(self._journal.path)},
        )
        refusal = self._refusal()
        for waiting in (commit, self._gathering):
            if waiting is not None:
                waiting.done.set_exception(refusal)
        self._gathering = None
        loaded = self._loop.run_in_executor(self._pool, self._journal.read, _load)
        loaded.add_done_callback(self._recovered)

    def _recovered(self, loaded: asyncio.Future[tuple[Contents, Mvcc]]) -> None:
        self._in_flight = None
        if (error := loaded.exception()) is not None:
            # Stays read-only: what is in memory up to the durable revision is still right.
            self._failure = f"{self._failure}; reading it again failed: {error}"
            log.error("The store could not be read again.", **{fields.ERROR: str(error)})
            return
        self._recovering = False
        self._adopt(*loaded.result())

    async def _durable_at(self, revision: int) -> None:
        if revision <= self._durable:
            return
        commit = self._in_flight
        if commit is None or commit.revision < revision:
            commit = self._gathering
        assert commit is not None, "a revision is durable, in flight, or gathering"
        await asyncio.shield(commit.done)

    async def _flushed(self) -> None:
        """Waits for what was recorded in this turn of the loop."""
        if self._gathering is not None:
            await asyncio.shield(self._gathering.done)

    def _check_open(self) -> None:
        if self._closed:
            raise BackendUnavailable("the store is closed")

    def _check_writable(self) -> None:
        self._check_open()
        if self._recovering:
            raise self._refusal()

    def _refusal(self) -> BackendUnavailable:
        return BackendUnavailable(
            f"the store cannot be written: {self._failure}",
            cure="Make room on its disk, or see why it is read-only; the write was not applied",
        )

    # Retention

    def _retain(self) -> None:
        """Compacts in steps of half the retention, so that its cost is spread."""
        keep = self._retention.revisions
        if self._durable - self._mvcc.compacted > keep + keep // 2 + 1 and not self._recovering:
            self._compact(self._durable - keep)

    def _sample_age(self) -> None:
        """Forgets what has been overwritten for longer than the retention's age."""
        self._age_timer = self._loop.call_later(
            max(self._retention.age_s / _AGE_SAMPLES, 0.001), self._sample_age
        )
        self._ages.append(self._durable)
        if len(self._ages) > _AGE_SAMPLES:
            old = self._ages.popleft()
            if old > self._mvcc.compacted and not self._recovering:
                self._compact(old)

    # The whole

    async def status(self) -> BackendStatus:
        self._check_open()
        size = self._journal.size_bytes() if self._journal else 0
        return BackendStatus(
            backend="embedded",
            store_id=self._store_id,
            revision=self._durable,
            compacted=self._mvcc.compacted,
            keys=len(self._mvcc),
            size_bytes=size,
            healthy=not self._failure,
            message=self._failure,
            commits=self._commits,
            watchers=len(self._watches),
        )

    async def backup(self, destination: Path) -> int:
        """Writes a consistent copy to a new file; writes go on meanwhile. Returns a revision that
        it contains. Raises FileExistsError, BackendUnavailable."""
        self._check_open()
        if self._journal is None:
            raise BackendUnavailable("a store without a file has no backup")
        revision = self._durable
        try:
            await self._loop.run_in_executor(self._pool, self._journal.backup, destination)
        except StoreWriteFailed as error:
            raise BackendUnavailable(f"the backup failed: {error}") from error
        return revision

    async def close(self) -> None:
        """Writes what is under way, ends the watches and gives the file back."""
        if self._closed:
            return
        for timer in (self._expiry_timer, self._age_timer):
            if timer is not None:
                timer.cancel()
        while (commit := self._gathering or self._in_flight) is not None and not self._recovering:
            with contextlib.suppress(BackendUnavailable):
                await asyncio.shield(commit.done)
            await asyncio.sleep(0)
        self._closed = True
        for watch in list(self._watches):
            watch.wake()
        # Waiting for the threads here is bounded: each does one commit or one copy.
        await self._loop.run_in_executor(None, self._pool.shutdown)
        if self._journal is not None:
            self._journal.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


class EmbeddedWatch:
    """A position in the log of the embedded store."""

    def __init__(
        self, backend: EmbeddedBackend, span: Span, seen: int, progress_s: float | None
    ) -> None:
        self._backend = backend
        self._span = span
        self._seen = seen
        self._progress_s = progress_s
        self._ready: deque[WatchBatch] = deque()
        self._news = asyncio.Event()
        self._closed = False

    def wake(self) -> None:
        self._news.set()

    async def next(self) -> WatchBatch:
        while True:
            if self._ready:
                return self._ready.popleft()
            self._news.clear()
            if self._closed or self._backend._closed:
                raise BackendUnavailable("the watch is closed")
            self._collect()
            if self._ready:
                continue
            try:
                async with asyncio.timeout(self._progress_s):
                    await self._news.wait()
            except TimeoutError:
                return WatchBatch(max(self._seen, 0))

    def _collect(self) -> None:
        """Takes a bounded number of revisions from the log."""
        durable = self._backend._durable
        log = self._backend._mvcc.changes_after(self._seen, durable)
        for taken, (revision, changes) in enumerate(log, start=1):
            inside = tuple(kv for kv in changes if kv.key in self._span)
            if inside:
                self._ready.append(WatchBatch(revision, inside))
            self._seen = revision
            if taken == _TAKE_AT_ONCE:
                self._news.set()
                return
        self._seen = max(self._seen, durable)

    def close(self) -> None:
        self._closed = True
        self._backend._watches.discard(self)
        self._news.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> WatchBatch:
        return await self.next()


_TAKE_AT_ONCE = 256


def _load(contents: Contents) -> tuple[Contents, Mvcc]:
    mvcc = Mvcc()
    mvcc.leased = {lease: set() for lease, _ in contents.leases}
    mvcc.load(contents.compacted, contents.revisions)
    return contents, mvcc


def _retrieve(future: asyncio.Future[None]) -> None:
    if not future.cancelled():
        future.exception()
