"""The store as the rest of the suite sees it: a Protocol with etcd v3's semantics, in our words.

Promises every backend keeps:

- There is one revision counter. A transaction that changes something moves it by exactly one, and
  all its changes carry that revision. Reading changes nothing.
- An answered write is durable. Nobody, reader or watcher, is shown what is not.
- Compares of a transaction, nested ones too, are evaluated against the state before it.
- A watch delivers the changes of one revision together, in revision order, without a gap; when
  it cannot, it raises `Compacted` and the caller lists again.

Every range of keys is half open, `[start, end)`. A single key is the range `[key, key + NUL)`, so
there is one shape for both.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NewType, Protocol, Self

from cilia.errors import DomainError, Kind

LeaseID = NewType("LeaseID", int)

NO_LEASE = LeaseID(0)
FIRST_REVISION = 1
"""The revision of an empty store; its first change makes 2 (as in etcd)."""


class KvError(DomainError):
    """What a backend reports about a request; the request has changed nothing."""


class Compacted(KvError):
    """The revision asked for has been compacted away: list again and watch from there."""

    default_kind = Kind.OUT_OF_RANGE

    def __init__(self, compacted: int) -> None:
        super().__init__(f"the revision asked for is older than the compaction at {compacted}")
        self.compacted = compacted


class FutureRevision(KvError):
    """The revision asked for has not been reached; usually it came from another store."""

    default_kind = Kind.OUT_OF_RANGE

    def __init__(self, asked: int, current: int) -> None:
        super().__init__(f"revision {asked} is in the future: the store is at {current}")
        self.asked = asked
        self.current = current


class LeaseNotFound(KvError):
    """The lease has expired, was revoked, or never was."""

    default_kind = Kind.NOT_FOUND

    def __init__(self, lease: LeaseID) -> None:
        super().__init__(f"lease {lease} not found")
        self.lease = lease


class LeaseExists(KvError):
    """A lease was asked for under an id that is in use."""

    default_kind = Kind.CONFLICT

    def __init__(self, lease: LeaseID) -> None:
        super().__init__(f"lease {lease} exists")
        self.lease = lease


class InvalidRequest(KvError):
    """The request breaks a rule of the store: an empty key, a key written twice, too large."""

    default_kind = Kind.INVALID


class BackendUnavailable(KvError):
    """The store cannot answer now; whether a write in flight took effect is unknown only when
    the backend is remote. The embedded backend has not applied it."""

    default_kind = Kind.UNAVAILABLE


class Expectation(enum.Enum):
    """Which field of a key a `Compare` looks at."""

    VERSION = "version"
    CREATE_REVISION = "create_revision"
    MOD_REVISION = "mod_revision"
    VALUE = "value"
    LEASE = "lease"


class Relation(enum.Enum):
    """How a `Compare` wants the field to relate to its operand."""

    EQUAL = "=="
    NOT_EQUAL = "!="
    GREATER = ">"
    LESS = "<"


@dataclass(frozen=True, slots=True)
class Span:
    """The keys `start <= key < end`; no end means to the end of the key space."""

    start: bytes
    end: bytes | None

    @classmethod
    def key(cls, key: bytes) -> Self:
        return cls(key, key + b"\0")

    @classmethod
    def prefix(cls, prefix: bytes) -> Self:
        """Every key that begins with `prefix`."""
        stem = prefix.rstrip(b"\xff")
        return cls(prefix, stem[:-1] + bytes([stem[-1] + 1]) if stem else None)

    @property
    def is_single(self) -> bool:
        return self.end is not None and self.end == self.start + b"\0"

    def __contains__(self, key: bytes) -> bool:
        return key >= self.start and (self.end is None or key < self.end)


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One key at one revision. `version` counts the puts since creation; 0 marks a deletion, and
    then only `key` and `mod_revision` mean anything."""

    key: bytes
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease: LeaseID = NO_LEASE

    @property
    def deleted(self) -> bool:
        return self.version == 0


@dataclass(frozen=True, slots=True)
class Compare:
    """True when every existing key of `span` relates so to `operand`.

    An empty span is compared as one key whose numbers are all 0 and whose value relates to
    nothing; so `CREATE_REVISION == 0` over a prefix says that nobody is there.
    """

    span: Span
    field: Expectation
    relation: Relation
    operand: int | bytes


@dataclass(frozen=True, slots=True)
class Put:
    key: bytes
    value: bytes
    lease: LeaseID = NO_LEASE


@dataclass(frozen=True, slots=True)
class Delete:
    span: Span


@dataclass(frozen=True, slots=True)
class Get:
    """A read; inside a transaction it sees what the transaction did before it.

    revision 0 reads the current state; limit 0 means all. Keys come in byte order.
    """

    span: Span
    revision: int = 0
    limit: int = 0
    keys_only: bool = False
    count_only: bool = False


@dataclass(frozen=True, slots=True)
class Txn:
    """If all compares hold then `success` else `failure`, as one change. Nests as an operation.

    On no path may a key be written twice, or written and deleted (InvalidRequest).
    """

    compares: tuple[Compare, ...] = ()
    success: tuple[Op, ...] = ()
    failure: tuple[Op, ...] = ()


Op = Put | Delete | Get | Txn


@dataclass(frozen=True, slots=True)
class PutResult:
    revision: int
    previous: KeyValue | None


@dataclass(frozen=True, slots=True)
class DeleteResult:
    revision: int
    deleted: tuple[KeyValue, ...]


@dataclass(frozen=True, slots=True)
class RangeResult:
    """`count` is of all keys in the span, whatever the limit; `more` says the limit cut."""

    revision: int
    kvs: tuple[KeyValue, ...]
    count: int
    more: bool = False


@dataclass(frozen=True, slots=True)
class TxnResult:
    revision: int
    succeeded: bool
    results: tuple[Result, ...] = ()


Result = PutResult | DeleteResult | RangeResult | TxnResult


@dataclass(frozen=True, slots=True)
class Lease:
    """A lease and what is left of it. `remaining_s` is a lower bound of the time it still lives."""

    id: LeaseID
    ttl_s: int
    remaining_s: float
    keys: int = 0


@dataclass(frozen=True, slots=True)
class WatchBatch:
    """Every change of `revision` inside the watched span; empty: progress, nothing up to there."""

    revision: int
    changes: tuple[KeyValue, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request may ask of a store. The defaults are etcd's (--max-txn-ops and
    --max-request-bytes), so that what fits the embedded store fits etcd."""

    max_txn_ops: int = 128
    max_request_bytes: int = 1_572_864
    max_key_bytes: int = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendStatus:
    backend: str
    store_id: int
    revision: int
    compacted: int
    keys: int
    size_bytes: int
    healthy: bool = True
    message: str = ""
    commits: int = 0
    watchers: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """How much history a store keeps for readers of old revisions and for watches to resume."""

    revisions: int = 10_000
    age_s: float = field(default=3600.0)


class Watch(Protocol):
    """An open watch; iterate it, and close it (or leave its `async with`)."""

    async def next(self) -> WatchBatch:
        """The next batch. Raises Compacted when history was compacted under a slow reader, and
        BackendUnavailable when the backend is closed."""

    def close(self) -> None: ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc: object) -> None: ...

    def __aiter__(self) -> Self: ...

    async def __anext__(self) -> WatchBatch: ...


class Backend(Protocol):
    """A store. Everything but the properties may raise KvError's subclasses."""

    @property
    def store_id(self) -> int:
        """Random u64 made with the store. Revisions of different stores do not compare."""

    @property
    def revision(self) -> int:
        """The newest durable revision."""

    @property
    def compacted(self) -> int:
        """Reads and watches before this revision raise Compacted; 0: none was."""

    @property
    def limits(self) -> Limits: ...

    async def get(self, key: bytes, *, revision: int = 0) -> KeyValue | None: ...

    async def range(
        self,
        span: Span,
        *,
        revision: int = 0,
        limit: int = 0,
        keys_only: bool = False,
        count_only: bool = False,
    ) -> RangeResult: ...

    async def put(self, key: bytes, value: bytes, *, lease: LeaseID = NO_LEASE) -> PutResult: ...

    async def delete(self, span: Span) -> DeleteResult: ...

    async def txn(self, txn: Txn) -> TxnResult: ...

    async def grant(self, ttl_s: int, *, lease: LeaseID = NO_LEASE) -> Lease:
        """A new lease; an id of 0 lets the store choose. Raises LeaseExists."""

    async def keepalive(self, lease: LeaseID) -> Lease:
        """Full time again. Raises LeaseNotFound when it is too late."""

    async def revoke(self, lease: LeaseID) -> int:
        """Ends the lease and deletes its keys in one revision, which is returned."""

    async def lease(self, lease: LeaseID) -> Lease: ...

    async def leases(self) -> Sequence[Lease]: ...

    def watch(
        self, span: Span, *, start_revision: int = 0, progress_s: float | None = None
    ) -> Watch:
        """Changes of `span` from `start_revision` on (0: from now), and an empty batch whenever
        `progress_s` passed without one. Raises Compacted here or from `next`."""

    async def compact(self, revision: int) -> None:
        """Forgets what was overwritten before `revision`. Raises Compacted, FutureRevision."""

    async def status(self) -> BackendStatus: ...

    async def close(self) -> None: ...


class SupportsBackup(Protocol):
    """A backend that can write itself out as one file while it runs."""

    async def backup(self, destination: Path) -> int:
        """Writes a consistent copy to a new file and returns the revision it contains."""


def absent(where: bytes | Span) -> Compare:
    """Nobody is at this key, or anywhere in this span."""
    span = where if isinstance(where, Span) else Span.key(where)
    return Compare(span, Expectation.CREATE_REVISION, Relation.EQUAL, 0)


def present(key: bytes) -> Compare:
    return Compare(Span.key(key), Expectation.CREATE_REVISION, Relation.GREATER, 0)


def unchanged(key: bytes, mod_revision: int) -> Compare:
    """The key was last written at this revision; 0: it does not exist."""
    return Compare(Span.key(key), Expectation.MOD_REVISION, Relation.EQUAL, mod_revision)


def get(key: bytes) -> Get:
    return Get(Span.key(key))
