"""Identity allocation: one transaction, no lock, for new label sets and for known ones alike.

    /cilia/v1/key/<hash>         -> N                     which number these labels have
    /cilia/v1/id/<N>             -> canonical labels      which labels this number has
    /cilia/v1/ref/<hash>/<node>  -> N          (leased)   this node uses it
    /cilia/v1/quarantine/<N>     -> ""         (leased)   N was freed lately: do not give it out

`hash` is the first 128 bits of SHA-256 over the canonical labels, in hexadecimal, so a key has a
fixed length and no label can contain a separator.

`key` and `id` are written and deleted together; a reference and the identity it refers to meet in
one transaction. Collection deletes an identity under a compare that no reference exists, so the
store itself orders it against an allocation: either the reference is first and the identity stays,
or the identity goes first and the allocation makes a new one. A number that was freed waits in
quarantine, so that no node still takes it for the old labels when it comes back with new ones.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Container
from dataclasses import dataclass, field

from cilia.errors import Kind
from cilia.identity import MAX_CLUSTER_ID, MIN_CLUSTER_ID, NumericIdentity
from cilia.kv.backend import (
    Backend,
    Delete,
    KvError,
    LeaseID,
    Put,
    RangeResult,
    Span,
    Txn,
    TxnResult,
    absent,
    get,
    present,
    unchanged,
)
from cilia.labels import Labels

KEY_PREFIX = b"/cilia/v1/key/"
ID_PREFIX = b"/cilia/v1/id/"
REF_PREFIX = b"/cilia/v1/ref/"
QUARANTINE_PREFIX = b"/cilia/v1/quarantine/"

_RANDOM_TRIES = 16
_LOST_BEFORE_ASKING = 8
_MAX_ATTEMPTS = 64
_SWEEP_KEYS_A_LEASE = 1000
"""etcd deletes a lease's keys in one revision and one watch message: keep both moderate."""


class IdentitySpaceExhausted(KvError):
    """Every number of the range is in use or in quarantine."""

    default_kind = Kind.EXHAUSTED

    def __init__(self, low: int, high: int) -> None:
        super().__init__(
            f"all {high - low + 1} identities from {low} to {high} are in use or in quarantine",
            cure="Use fewer distinct label sets (see `cilia identity list`), or wait for the "
            "quarantine of freed ones to end",
        )


class AllocationContended(KvError):
    """Other writers won every attempt."""

    default_kind = Kind.ABORTED

    def __init__(self) -> None:
        super().__init__("the identity could not be allocated: too many writers at once")


@dataclass(frozen=True, slots=True)
class Allocation:
    id: NumericIdentity
    is_new: bool
    revision: int


@dataclass(slots=True, kw_only=True)
class AllocatorStats:
    """Counts since the start. `conflicts` are numbers somebody else took first."""

    created: int = 0
    reused: int = 0
    conflicts: int = 0
    released: int = 0
    swept: int = 0
    kept: int = 0


@dataclass(slots=True)
class _Nothing:
    def __contains__(self, item: object) -> bool:
        return False


def labels_hash(labels: Labels) -> bytes:
    return hashlib.sha256(labels.canonical()).hexdigest()[:32].encode()


def id_key(identity: int) -> bytes:
    return ID_PREFIX + b"%d" % identity


def ref_prefix(digest: bytes) -> bytes:
    return REF_PREFIX + digest + b"/"


@dataclass(slots=True, kw_only=True)
class Allocator:
    """Allocates numbers in `[low, high]`.

    `taken` is what this process believes is in use or in quarantine; it may lag behind the store
    (a wrong guess costs one more round trip), and it need not exist.
    """

    backend: Backend
    low: int = MIN_CLUSTER_ID
    high: int = MAX_CLUSTER_ID
    taken: Container[int] = field(default_factory=_Nothing)
    randrange: Callable[[int, int], int] = random.randrange
    stats: AllocatorStats = field(default_factory=AllocatorStats)

    async def allocate(self, labels: Labels, *, node: str, lease: LeaseID) -> Allocation:
        """The number of these labels, with a reference of `node` under `lease`. Idempotent.

        Raises LeaseNotFound, IdentitySpaceExhausted, AllocationContended, BackendUnavailable.
        """
        canonical = labels.canonical()
        digest = labels_hash(labels)
        key = KEY_PREFIX + digest
        ref_key = ref_prefix(digest) + node.encode()
        lost: set[int] = set()
        for _ in range(_MAX_ATTEMPTS):
            number = await self._pick(lost)
            id_text = b"%d" % number
            ref = Put(ref_key, b"", lease)
            result = await self.backend.txn(
                Txn(
                    (
                        absent(key),
                        absent(ID_PREFIX + id_text),
                        absent(QUARANTINE_PREFIX + id_text),
                    ),
                    success=(Put(key, id_text), Put(ID_PREFIX + id_text, canonical), ref),
                    failure=(Txn((present(key),), success=(get(key), ref)),),
                )
            )
            if result.succeeded:
                self.stats.created += 1
                return Allocation(NumericIdentity(number), True, result.revision)
            known = result.results[0]
            assert isinstance(known, TxnResult)
            if known.succeeded:
                found = known.results[0]
                assert isinstance(found, RangeResult)
                self.stats.reused += 1
                return Allocation(NumericIdentity(int(found.kvs[0].value)), False, result.revision)
            self.stats.conflicts += 1
            lost.add(number)
        raise AllocationContended

    async def release(self, labels: Labels, *, node: str) -> int:
        """Drops the node's reference, if it has one; returns the store's revision."""
        key = ref_prefix(labels_hash(labels)) + node.encode()
        self.stats.released += 1
        return (await self.backend.delete(Span.key(key))).revision

    async def labels_of(self, identity: int) -> Labels | None:
        kv = await self.backend.get(id_key(identity))
        return Labels.from_canonical(kv.value) if kv else None

    async def find(self, labels: Labels) -> NumericIdentity | None:
        kv = await self.backend.get(KEY_PREFIX + labels_hash(labels))
        return NumericIdentity(int(kv.value)) if kv else None

    async def nodes_of(self, labels: Labels) -> tuple[str, ...]:
        """The nodes that hold a reference, sorted."""
        prefix = ref_prefix(labels_hash(labels))
        refs = await self.backend.range(Span.prefix(prefix), keys_only=True)
        return tuple(kv.key[len(prefix) :].decode() for kv in refs.kvs)

    async def _pick(self, lost: set[int]) -> int:
        """A number that looks free: at random, or the next free one from a random place on. After
        some lost races our knowledge is worth little, and the store is asked."""
        if len(lost) < _LOST_BEFORE_ASKING:
            for _ in range(_RANDOM_TRIES):
                number = self.randrange(self.low, self.high + 1)
                if number not in self.taken and number not in lost:
                    return number
            place = self.randrange(self.low, self.high + 1)
            for number in itertools.chain(range(place, self.high + 1), range(self.low, place)):
                if number not in self.taken and number not in lost:
                    return number
        used = {
            int(kv.key[len(prefix) :])
            for prefix in (ID_PREFIX, QUARANTINE_PREFIX)
            for kv in (await self.backend.range(Span.prefix(prefix), keys_only=True)).kvs
        }
        free = [n for n in range(self.low, self.high + 1) if n not in used and n not in lost]
        if not free:
            raise IdentitySpaceExhausted(self.low, self.high)
        return free[self.randrange(0, len(free))]


@dataclass(slots=True, kw_only=True)
class Collector:
    """Mark and sweep of identities that nobody references.

    An identity is deleted when two rounds in a row found it without a reference and its key was
    not rewritten in between. `quarantine_s` is how long its number is then kept back.
    """

    backend: Backend
    quarantine_s: int
    stats: AllocatorStats = field(default_factory=AllocatorStats)
    _marks: dict[bytes, int] = field(default_factory=dict)

    @property
    def marked(self) -> int:
        return len(self._marks)

    async def collect(self) -> int:
        """One round; returns how many identities were deleted."""
        refs = await self.backend.range(Span.prefix(REF_PREFIX), keys_only=True)
        # At the same revision, or a reference between the two reads would be overlooked: harmless
        # for safety, which the compare below gives, but it would mark what is in use.
        keys = await self.backend.range(Span.prefix(KEY_PREFIX), revision=refs.revision)
        referenced = {kv.key[len(REF_PREFIX) :].split(b"/", 1)[0] for kv in refs.kvs}
        marks: dict[bytes, int] = {}
        doomed: list[tuple[bytes, int, bytes]] = []
        for kv in keys.kvs:
            digest = kv.key[len(KEY_PREFIX) :]
            if digest in referenced:
                continue
            if self._marks.get(digest) == kv.mod_revision:
                doomed.append((digest, kv.mod_revision, kv.value))
            else:
                marks[digest] = kv.mod_revision
        self._marks = marks
        swept = 0
        for start in range(0, len(doomed), _SWEEP_KEYS_A_LEASE):
            lease = (await self.backend.grant(self.quarantine_s)).id
            for digest, revision, number in doomed[start : start + _SWEEP_KEYS_A_LEASE]:
                swept += await self._sweep(digest, revision, number, lease)
        return swept

    async def _sweep(self, digest: bytes, revision: int, number: bytes, lease: LeaseID) -> bool:
        key = KEY_PREFIX + digest
        result = await self.backend.txn(
            Txn(
                (unchanged(key, revision), absent(Span.prefix(ref_prefix(digest)))),
                success=(
                    Delete(Span.key(key)),
                    Delete(Span.key(ID_PREFIX + number)),
                    Put(QUARANTINE_PREFIX + number, b"", lease),
                ),
            )
        )
        if result.succeeded:
            self.stats.swept += 1
        else:
            self.stats.kept += 1
        return result.succeeded
