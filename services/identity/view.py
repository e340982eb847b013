"""The watched part of the store, in memory, in the order of its changes.

    rows    key -> newest value            -> snapshots
    log     key -> revision, oldest first  -> "what changed after revision R", once a key
    graves  deleted keys still in the log  -> bounded; `floor` is the newest one forgotten

Readers hold no queue. A reader is a revision; what it has not seen is the tail of the log, at most
one change a key, however slow it is. Who stands before `floor` may have missed a deletion and must
begin anew. So a slow client costs nothing, and memory is bounded by the state and the graves.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cilia.kv.allocator import QUARANTINE_PREFIX, id_key
from cilia.kv.backend import KeyValue, WatchBatch
from services.identity.keys import Kind, kind_of, quarantine_key


@dataclass(frozen=True, slots=True)
class Change:
    """The newest state of a key; `kv.deleted` tells a deletion."""

    kind: Kind
    kv: KeyValue


class View:
    def __init__(self, *, graves: int = 16_384) -> None:
        self.revision = 0
        self.floor = 0
        self.quarantined = 0
        self._max_graves = graves
        self._rows: dict[bytes, KeyValue] = {}
        self._log: OrderedDict[bytes, int] = OrderedDict()
        self._graves: OrderedDict[bytes, KeyValue] = OrderedDict()
        self._counts = dict.fromkeys(Kind, 0)

    def load(self, kvs: Iterable[KeyValue], revision: int) -> None:
        """Begins anew from a listing; readers from before it begin anew too."""
        self._rows.clear()
        self._log.clear()
        self._graves.clear()
        self._counts = dict.fromkeys(Kind, 0)
        self.quarantined = 0
        for kv in sorted(kvs, key=lambda kv: kv.mod_revision):
            self._put(kv)
        self.revision = revision
        self.floor = revision

    def apply(self, batch: WatchBatch) -> None:
        assert batch.revision >= self.revision, "watches never go back"
        for kv in batch.changes:
            if kv.deleted:
                self._delete(kv)
            else:
                self._put(kv)
        self.revision = batch.revision

    def count(self, kind: Kind) -> int:
        return self._counts[kind]

    def snapshot(self, kinds: frozenset[Kind]) -> list[Change]:
        """Every row, oldest change first. Costs a walk, no copies of values."""
        return [
            Change(kind, self._rows[key])
            for key in self._log
            if key in self._rows and (kind := kind_of(key)) in kinds
        ]

    def changes_after(self, revision: int, kinds: frozenset[Kind]) -> list[Change] | None:
        """What changed since, oldest first; None when that cannot be told any more."""
        if revision < self.floor or revision > self.revision:
            return None
        found = [Change(kind, kv) for kind, kv in self._tail(revision) if kind in kinds]
        found.reverse()
        return found

    def __contains__(self, identity: object) -> bool:
        """Whether a number is in use or in quarantine, as far as we have heard."""
        return isinstance(identity, int) and (
            id_key(identity) in self._rows or quarantine_key(identity) in self._rows
        )

    def _tail(self, revision: int) -> Iterator[tuple[Kind, KeyValue]]:
        for key in reversed(self._log):
            if self._log[key] <= revision:
                return
            kind = kind_of(key)
            assert kind is not None, "only watched keys are logged"
            yield kind, self._rows.get(key) or self._graves[key]

    def _put(self, kv: KeyValue) -> None:
        kind = kind_of(kv.key)
        if kind is None:
            if kv.key.startswith(QUARANTINE_PREFIX):
                self.quarantined += kv.key not in self._rows
                self._rows[kv.key] = kv
            return
        self._counts[kind] += kv.key not in self._rows
        self._rows[kv.key] = kv
        self._graves.pop(kv.key, None)
        self._note(kv)

    def _delete(self, kv: KeyValue) -> None:
        known = self._rows.pop(kv.key, None) is not None
        kind = kind_of(kv.key)
        if kind is None:
            self.quarantined -= known
            return
        self._counts[kind] -= known
        self._graves[kv.key] = kv
        self._graves.move_to_end(kv.key)
        self._note(kv)
        while len(self._graves) > self._max_graves:
            forgotten, _ = self._graves.popitem(last=False)
            self.floor = max(self.floor, self._log.pop(forgotten))

    def _note(self, kv: KeyValue) -> None:
        self._log[kv.key] = kv.mod_revision
        self._log.move_to_end(kv.key)
