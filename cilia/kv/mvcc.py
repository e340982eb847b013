"""The embedded store's state: keys with their history, in memory, without I/O or time.

    keys      sorted list of every key that has history        -> ranges by bisection
    history   key -> its versions, oldest first                -> reads of old revisions
    live      key -> its newest version, if not deleted        -> the fast path
    log       (revision, its changes), from `compacted` on     -> watches
    leased    lease -> its keys                                -> expiry

One writer, never concurrent: callers apply whole transactions. Nothing here waits, so a
transaction is atomic because nobody else runs. Durability is the caller's matter: it reads at the
newest durable revision while `revision` runs ahead.
"""

from __future__ import annotations

import operator
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, assert_never

from cilia.kv.backend import (
    FIRST_REVISION,
    NO_LEASE,
    Compacted,
    Compare,
    Delete,
    DeleteResult,
    Expectation,
    FutureRevision,
    Get,
    InvalidRequest,
    KeyValue,
    LeaseID,
    LeaseNotFound,
    Limits,
    Op,
    Put,
    PutResult,
    RangeResult,
    Relation,
    Result,
    Span,
    Txn,
    TxnResult,
)

MAX_NESTING = 8
"""Depth of nested transactions; etcd has no bound of its own, protobuf's is 100."""

_RELATIONS: dict[Relation, Callable[[Any, Any], bool]] = {
    Relation.EQUAL: operator.eq,
    Relation.NOT_EQUAL: operator.ne,
    Relation.GREATER: operator.gt,
    Relation.LESS: operator.lt,
}


@dataclass(slots=True)
class _Writes:
    """What a branch may write, for the rule that no key is written twice."""

    puts: set[bytes] = field(default_factory=set)
    deletes: list[Span] = field(default_factory=list)

    def clashes(self, other: _Writes) -> bool:
        return (
            not self.puts.isdisjoint(other.puts)
            or any(key in span for key in self.puts for span in other.deletes)
            or any(key in span for key in other.puts for span in self.deletes)
        )

    def add(self, other: _Writes) -> None:
        self.puts |= other.puts
        self.deletes += other.deletes


class Mvcc:
    """Versioned keys. Revisions count from FIRST_REVISION."""

    def __init__(self) -> None:
        self.revision = FIRST_REVISION
        self.compacted = 0
        self.leased: dict[LeaseID, set[bytes]] = {}
        self._keys: list[bytes] = []
        self._history: dict[bytes, list[KeyValue]] = {}
        self._live: dict[bytes, KeyValue] = {}
        self._log_revisions: list[int] = []
        self._log_changes: list[tuple[KeyValue, ...]] = []
        # Keys whose history a compaction could shorten; spares it the walk over all keys.
        self._shrinkable: set[bytes] = set()

    def __len__(self) -> int:
        return len(self._live)

    # Loading

    def load(self, compacted: int, revisions: Iterable[tuple[int, tuple[KeyValue, ...]]]) -> None:
        """Takes over stored history, oldest revision first. Raises ValueError on nonsense."""
        self.compacted = compacted
        self.revision = max(self.revision, compacted)
        previous = 0
        for revision, changes in revisions:
            if revision <= max(previous, 0):
                raise ValueError(f"revision {revision} follows {previous}")
            previous = revision
            for kv in changes:
                self._apply(kv)
            self.revision = max(self.revision, revision)
            if revision >= compacted:
                self._log_revisions.append(revision)
                self._log_changes.append(changes)

    # Reading

    def read(self, get: Get, *, at: int | None = None) -> RangeResult:
        """A range as of `get.revision`, or of `at` (the newest visible revision) if that is 0.

        Raises Compacted, FutureRevision.
        """
        current = self.revision if at is None else at
        self.check_revision(get.revision, current)
        wanted = get.revision or current
        if not get.revision and wanted == self.revision:
            live = self._live
            found = [kv for key in self._span_keys(get.span) if (kv := live.get(key)) is not None]
        else:
            found = [
                kv
                for key in self._span_keys(get.span)
                if (kv := self._version_at(key, wanted)) is not None
            ]
        count = len(found)
        if get.count_only:
            return RangeResult(current, (), count)
        more = bool(get.limit) and count > get.limit
        if more:
            found = found[: get.limit]
        if get.keys_only:
            found = [
                KeyValue(k.key, b"", k.create_revision, k.mod_revision, k.version, k.lease)
                for k in found
            ]
        return RangeResult(current, tuple(found), count, more)

    def check_revision(self, revision: int, current: int) -> None:
        if revision < 0:
            raise InvalidRequest(f"revision {revision} is negative")
        if revision > current:
            raise FutureRevision(revision, current)
        if 0 < revision < self.compacted:
            raise Compacted(self.compacted)

    def changes_after(
        self, revision: int, up_to: int
    ) -> Iterator[tuple[int, tuple[KeyValue, ...]]]:
        """The log's revisions in `(revision, up_to]`. Raises Compacted if some are gone."""
        if revision + 1 < self.compacted:
            raise Compacted(self.compacted)
        first = bisect_right(self._log_revisions, revision)
        last = bisect_right(self._log_revisions, up_to)
        for index in range(first, last):
            yield self._log_revisions[index], self._log_changes[index]

    def _span_keys(self, span: Span) -> list[bytes]:
        if span.is_single:
            return [span.start] if span.start in self._history else []
        first = bisect_left(self._keys, span.start)
        last = len(self._keys) if span.end is None else bisect_left(self._keys, span.end)
        return self._keys[first:last]

    def _version_at(self, key: bytes, revision: int) -> KeyValue | None:
        versions = self._history[key]
        index = bisect_right(versions, revision, key=_mod_revision)
        if index == 0 or versions[index - 1].deleted:
            return None
        return versions[index - 1]

    # Writing

    def transact(self, txn: Txn) -> tuple[TxnResult, tuple[KeyValue, ...]]:
        """Runs a validated transaction; all of it or, on an error, nothing.

        Raises LeaseNotFound, Compacted, FutureRevision.
        """
        path: list[bool] = []
        self._resolve(txn, path)
        changes: list[KeyValue] = []
        revision = self.revision + 1
        result = self._run(txn, iter(path), revision, changes)
        return result, self._seal(revision, changes)

    def drop_lease(self, lease: LeaseID) -> tuple[KeyValue, ...]:
        """Forgets a lease and deletes its keys, as one revision if it has any."""
        keys = sorted(self.leased.pop(lease))
        revision = self.revision + 1
        changes: list[KeyValue] = []
        for key in keys:
            self._change(_tombstone(key, revision), changes)
        return self._seal(revision, changes)

    def compact(self, revision: int) -> list[tuple[int, bytes]]:
        """Forgets what was overwritten or deleted before `revision`; returns what went, as
        (revision, key). What changed exactly at it stays: a watch may begin there.

        Raises Compacted, FutureRevision.
        """
        if revision <= self.compacted:
            raise Compacted(self.compacted)
        if revision > self.revision:
            raise FutureRevision(revision, self.revision)
        self.compacted = revision
        gone: list[tuple[int, bytes]] = []
        dead: set[bytes] = set()
        for key in list(self._shrinkable):
            versions = self._history[key]
            keep = max(bisect_right(versions, revision, key=_mod_revision) - 1, 0)
            if versions[keep].deleted and versions[keep].mod_revision < revision:
                keep += 1
            gone += [(kv.mod_revision, key) for kv in versions[:keep]]
            del versions[:keep]
            if not versions:
                dead.add(key)
                del self._history[key]
                self._shrinkable.discard(key)
            elif len(versions) == 1 and not versions[0].deleted:
                self._shrinkable.discard(key)
        if dead:
            self._keys = [key for key in self._keys if key not in dead]
        index = bisect_left(self._log_revisions, revision)
        del self._log_revisions[:index]
        del self._log_changes[:index]
        return gone

    def _seal(self, revision: int, changes: list[KeyValue]) -> tuple[KeyValue, ...]:
        sealed = tuple(changes)
        if sealed:
            self.revision = revision
            self._log_revisions.append(revision)
            self._log_changes.append(sealed)
        return sealed

    def _resolve(self, txn: Txn, path: list[bool]) -> None:
        """Decides every branch before anything is written, and finds what would fail there."""
        taken = all(self._holds(compare) for compare in txn.compares)
        path.append(taken)
        for op in txn.success if taken else txn.failure:
            match op:
                case Put():
                    if op.lease and op.lease not in self.leased:
                        raise LeaseNotFound(op.lease)
                case Get():
                    self.check_revision(op.revision, self.revision)
                case Txn():
                    self._resolve(op, path)
                case Delete():
                    pass
                case _:
                    assert_never(op)

    def _holds(self, compare: Compare) -> bool:
        relation = _RELATIONS[compare.relation]
        found = [
            kv for key in self._span_keys(compare.span) if (kv := self._live.get(key)) is not None
        ]
        if not found:
            if compare.field is Expectation.VALUE:
                return False
            return relation(0, compare.operand)
        attribute = compare.field.value
        return all(relation(getattr(kv, attribute), compare.operand) for kv in found)

    def _run(
        self, txn: Txn, path: Iterator[bool], revision: int, changes: list[KeyValue]
    ) -> TxnResult:
        taken = next(path)
        results: list[Result] = []
        for op in txn.success if taken else txn.failure:
            match op:
                case Put():
                    old = self._live.get(op.key)
                    kv = KeyValue(
                        op.key,
                        op.value,
                        old.create_revision if old else revision,
                        revision,
                        old.version + 1 if old else 1,
                        op.lease,
                    )
                    self._change(kv, changes)
                    results.append(PutResult(revision, old))
                case Delete():
                    deleted = tuple(
                        self._live[key] for key in self._span_keys(op.span) if key in self._live
                    )
                    for gone in deleted:
                        self._change(_tombstone(gone.key, revision), changes)
                    results.append(DeleteResult(revision if changes else revision - 1, deleted))
                case Get():
                    # Not sealed yet, so `live` already holds this transaction's writes.
                    results.append(self.read(op))
                case Txn():
                    results.append(self._run(op, path, revision, changes))
                case _:
                    assert_never(op)
        return TxnResult(revision if changes else revision - 1, taken, tuple(results))

    def _change(self, kv: KeyValue, changes: list[KeyValue]) -> None:
        self._apply(kv)
        changes.append(kv)

    def _apply(self, kv: KeyValue) -> None:
        key = kv.key
        old = self._live.get(key)
        if old is not None and old.lease != NO_LEASE and old.lease in self.leased:
            self.leased[old.lease].discard(key)
        if kv.deleted:
            self._live.pop(key, None)
        else:
            self._live[key] = kv
            if kv.lease != NO_LEASE and kv.lease in self.leased:
                self.leased[kv.lease].add(key)
        versions = self._history.get(key)
        if versions is None:
            self._history[key] = [kv]
            if not self._keys or key > self._keys[-1]:
                self._keys.append(key)
            else:
                insort(self._keys, key)
            if kv.deleted:
                self._shrinkable.add(key)
        else:
            versions.append(kv)
            self._shrinkable.add(key)


def validate(txn: Txn, limits: Limits) -> None:
    """Refuses what no store would take. Raises InvalidRequest; looks at no state."""
    size = _check_shape(txn, limits, depth=0)
    if size > limits.max_request_bytes:
        raise InvalidRequest(
            f"the request has {size} bytes, more than the {limits.max_request_bytes} allowed"
        )
    _writes(txn.success)
    _writes(txn.failure)


def _check_shape(txn: Txn, limits: Limits, depth: int) -> int:
    if depth > MAX_NESTING:
        raise InvalidRequest(f"transactions nest deeper than {MAX_NESTING}")
    widest = max(len(txn.compares), len(txn.success), len(txn.failure))
    if widest > limits.max_txn_ops:
        raise InvalidRequest(f"{widest} operations in one transaction, above {limits.max_txn_ops}")
    size = 0
    for compare in txn.compares:
        wants_bytes = compare.field is Expectation.VALUE
        if isinstance(compare.operand, bytes) is not wants_bytes:
            raise InvalidRequest(f"{compare.field.value} is not comparable to {compare.operand!r}")
        size += check_span(compare.span, limits)
    for op in (*txn.success, *txn.failure):
        match op:
            case Put():
                size += check_span(Span.key(op.key), limits) + len(op.value)
            case Delete() | Get():
                size += check_span(op.span, limits)
            case Txn():
                size += _check_shape(op, limits, depth + 1)
            case _:
                assert_never(op)
    return size


def check_span(span: Span, limits: Limits) -> int:
    """Bytes of the span's keys. Raises InvalidRequest."""
    size = len(span.start) + len(span.end or b"")
    if not span.start:
        raise InvalidRequest("the key is empty")
    if len(span.start) > limits.max_key_bytes:
        raise InvalidRequest(f"a key has more than {limits.max_key_bytes} bytes")
    return size


def _writes(ops: tuple[Op, ...]) -> _Writes:
    """What these operations may write. Raises InvalidRequest when a key could be written twice.

    The two branches of a nested transaction exclude each other, so they may write the same.
    etcd lets a put meet a delete whose range has no end; we refuse that too.
    """
    written = _Writes()
    for op in ops:
        match op:
            case Put():
                step = _Writes(puts={op.key})
            case Delete():
                # Deletes may overlap one another: the second finds nothing left.
                step = _Writes(deletes=[op.span])
            case Txn():
                step = _writes(op.success)
                step.add(_writes(op.failure))
            case Get():
                continue
            case _:
                assert_never(op)
        if written.clashes(step):
            raise InvalidRequest("a key is written twice in one transaction")
        written.add(step)
    return written


def _tombstone(key: bytes, revision: int) -> KeyValue:
    return KeyValue(key, b"", 0, revision, 0)


def _mod_revision(kv: KeyValue) -> int:
    return kv.mod_revision
