"""Tables: the state that one part of a service owns and others read, index and watch.

A `Table` holds frozen rows by key. Every change takes the next revision; writing an equal row
changes nothing. The owner keeps the `Table`; everybody else is handed `table.reader()`, which
cannot write.

Watchers hold no queue. A watcher remembers the revision that it has seen and is given, for each key
that changed since, its newest row only; so a slow watcher costs no memory and never falls behind by
more than one change a key. Deleted keys are remembered as tombstones, the newest `tombstones` of
them; a watcher that slept past the oldest is given the whole table again, marked `reset`.

All of it runs on one event loop's thread; the writing methods never block and never await.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import OrderedDict
from collections.abc import (
    AsyncIterator,
    Callable,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar, runtime_checkable

K = TypeVar("K", bound=Hashable)
R = TypeVar("R")

IndexFunction = Callable[[R], Iterable[Hashable]]


@runtime_checkable
class Printable(Protocol):
    """A row that says how it is shown by `cilia status --tables`."""

    @classmethod
    def table_header(cls) -> Sequence[str]: ...

    def table_row(self) -> Sequence[str]: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Change(Generic[K, R]):
    """One key's newest state; `row` is None when the key was deleted."""

    key: K
    row: R | None
    revision: int


@dataclasses.dataclass(frozen=True, slots=True)
class Batch(Generic[K, R]):
    """What changed up to `revision`, oldest change first, at most one entry a key.

    `reset` means: forget all that you know, `changes` are all rows there are.
    `synced` means: the sources of the table have delivered their first full state.
    """

    revision: int
    changes: tuple[Change[K, R], ...]
    reset: bool
    synced: bool


@dataclasses.dataclass(frozen=True, slots=True)
class TableDump:
    """A table made ready for printing."""

    name: str
    revision: int
    synced: bool
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


class _Core(Generic[K, R]):
    """The state that a table and its readers share."""

    __slots__ = (
        "compacted",
        "graves",
        "index_functions",
        "indexes",
        "key",
        "listeners",
        "log",
        "name",
        "revision",
        "rows",
        "synced",
        "tombstones",
    )

    def __init__(
        self,
        name: str,
        key: Callable[[R], K],
        indexes: Mapping[str, IndexFunction[R]],
        tombstones: int,
    ) -> None:
        self.name = name
        self.key = key
        self.revision = 0
        self.compacted = 0  # changes up to this revision may have been forgotten
        self.synced = False
        self.rows: dict[K, R] = {}
        # The revision of every live key and tombstone, in the order of revisions.
        self.log: OrderedDict[K, int] = OrderedDict()
        self.graves: OrderedDict[K, None] = OrderedDict()
        self.tombstones = tombstones
        self.index_functions = dict(indexes)
        self.indexes: dict[str, dict[Hashable, dict[K, R]]] = {n: {} for n in indexes}
        self.listeners: dict[object, Callable[[], None]] = {}

    def index_add(self, key: K, row: R) -> None:
        for name, function in self.index_functions.items():
            index = self.indexes[name]
            for value in function(row):
                index.setdefault(value, {})[key] = row

    def index_remove(self, key: K, row: R) -> None:
        for name, function in self.index_functions.items():
            index = self.indexes[name]
            for value in function(row):
                bucket = index.get(value)
                if bucket is not None:
                    bucket.pop(key, None)
                    if not bucket:
                        del index[value]

    def announce(self) -> None:
        for listener in tuple(self.listeners.values()):
            listener()


class ReadTable(Generic[K, R]):
    """The reading side of a table."""

    __slots__ = ("_core",)

    def __init__(self, core: _Core[K, R]) -> None:
        self._core = core

    @property
    def name(self) -> str:
        return self._core.name

    @property
    def revision(self) -> int:
        """The revision of the last change; 0 when there was none."""
        return self._core.revision

    @property
    def synced(self) -> bool:
        """True once the sources of the table have delivered their first full state."""
        return self._core.synced

    def get(self, key: K) -> R | None:
        return self._core.rows.get(key)

    def __getitem__(self, key: K) -> R:
        return self._core.rows[key]

    def __contains__(self, key: object) -> bool:
        return key in self._core.rows

    def __len__(self) -> int:
        return len(self._core.rows)

    def __iter__(self) -> Iterator[R]:
        """Iterates over a snapshot: the table may change meanwhile."""
        return iter(tuple(self._core.rows.values()))

    def keys(self) -> frozenset[K]:
        return frozenset(self._core.rows)

    def rows(self) -> tuple[R, ...]:
        return tuple(self._core.rows.values())

    def snapshot(self) -> dict[K, R]:
        return dict(self._core.rows)

    def by(self, index: str, value: Hashable) -> tuple[R, ...]:
        """The rows that the named index files under `value`."""
        return tuple(self._core.indexes[index].get(value, {}).values())

    def row_revision(self, key: K) -> int:
        """The revision of the key's last change, deletion included; 0 when unknown."""
        return self._core.log.get(key, 0)

    def changes(self, since: int | None) -> Batch[K, R]:
        """What changed after revision `since`; None, or a forgotten revision, gives everything.

        Costs as much as there are changes, not rows.
        """
        core = self._core
        if since is None or since < core.compacted or since > core.revision:
            everything = tuple(
                Change(key, core.rows[key], revision)
                for key, revision in core.log.items()
                if key in core.rows
            )
            return Batch(core.revision, everything, True, core.synced)
        found: list[Change[K, R]] = []
        for key in reversed(core.log):
            revision = core.log[key]
            if revision <= since:
                break
            found.append(Change(key, core.rows.get(key), revision))
        found.reverse()
        return Batch(core.revision, tuple(found), False, core.synced)

    @contextmanager
    def listen(self, callback: Callable[[], None]) -> Iterator[None]:
        """Calls `callback` after every change while the context lasts; it should only mark work."""
        token = object()
        self._core.listeners[token] = callback
        try:
            yield
        finally:
            del self._core.listeners[token]

    async def watch(
        self, since: int | None = None, *, min_interval_s: float = 0.0
    ) -> AsyncIterator[Batch[K, R]]:
        """Yields what changed after `since`, then every further change, for ever.

        The first batch comes at once, even when empty, so that a watcher learns where it stands. A
        batch without changes is yielded again only when `synced` turns true. Batches come no faster
        than `min_interval_s`; what happens in between is folded into one.
        """
        changed = asyncio.Event()
        with self.listen(changed.set):
            batch = self.changes(since)
            yield batch
            while True:
                await changed.wait()
                if min_interval_s > 0:
                    await asyncio.sleep(min_interval_s)
                changed.clear()
                known_synced = batch.synced
                batch = self.changes(batch.revision)
                if batch.changes or batch.reset or batch.synced != known_synced:
                    yield batch

    async def wait_until(self, predicate: Callable[[ReadTable[K, R]], bool]) -> None:
        """Returns when `predicate(table)` holds; it is asked again after every change."""
        changed = asyncio.Event()
        with self.listen(changed.set):
            while not predicate(self):
                changed.clear()
                await changed.wait()

    async def wait_synced(self) -> None:
        await self.wait_until(lambda table: table.synced)

    def dump(self) -> TableDump:
        """The table as text cells; rows that are not `Printable` show their dataclass fields."""
        rows = self.rows()
        header: tuple[str, ...] = ("Row",)
        if rows:
            first = rows[0]
            if isinstance(first, Printable):
                header = tuple(first.table_header())
            elif dataclasses.is_dataclass(first):
                header = tuple(field.name for field in dataclasses.fields(first))
        return TableDump(
            self.name, self.revision, self.synced, header, tuple(_cells(row) for row in rows)
        )


def _cells(row: object) -> tuple[str, ...]:
    if isinstance(row, Printable):
        return tuple(row.table_row())
    if dataclasses.is_dataclass(row):
        return tuple(str(getattr(row, field.name)) for field in dataclasses.fields(row))
    return (str(row),)


class Table(ReadTable[K, R]):
    """A table as its one owner sees it: the reader with the writing methods."""

    __slots__ = ("_reader",)

    def __init__(
        self,
        name: str,
        *,
        key: Callable[[R], K],
        indexes: Mapping[str, IndexFunction[R]] | None = None,
        tombstones: int = 4096,
    ) -> None:
        super().__init__(_Core(name, key, indexes or {}, tombstones))
        self._reader = ReadTable(self._core)

    def reader(self) -> ReadTable[K, R]:
        """The table without its writing methods, to be handed to others."""
        return self._reader

    def upsert(self, row: R) -> bool:
        """Stores the row under its key; False when an equal row is there already."""
        changed = self._store(row)
        if changed:
            self._core.announce()
        return changed

    def upsert_all(self, rows: Iterable[R]) -> int:
        """Stores many rows and wakes the watchers once; returns how many changed."""
        changed = sum([self._store(row) for row in rows])
        if changed:
            self._core.announce()
        return changed

    def delete(self, key: K) -> R | None:
        """Removes the key; returns the row it had, None when it was absent."""
        row = self._erase(key)
        if row is not None:
            self._core.announce()
        return row

    def replace_all(self, rows: Iterable[R]) -> int:
        """Makes `rows` the whole content, touching what differs; returns how many keys changed."""
        wanted = {self._core.key(row): row for row in rows}
        changed = 0
        for key in [key for key in self._core.rows if key not in wanted]:
            self._erase(key)
            changed += 1
        changed += sum([self._store(row) for row in wanted.values()])
        if changed:
            self._core.announce()
        return changed

    def mark_synced(self) -> None:
        """Says that the table now holds all that its sources had at the start; stays true."""
        if not self._core.synced:
            self._core.synced = True
            self._core.announce()

    def touch(self) -> None:
        """Wakes the listeners though nothing changed: what `wait_until` asks about has changed."""
        self._core.announce()

    def _store(self, row: R) -> bool:
        core = self._core
        key = core.key(row)
        old = core.rows.get(key)
        if old is not None:
            if old == row:
                return False
            core.index_remove(key, old)
        core.rows[key] = row
        core.index_add(key, row)
        core.revision += 1
        core.log[key] = core.revision
        core.log.move_to_end(key)
        core.graves.pop(key, None)
        return True

    def _erase(self, key: K) -> R | None:
        core = self._core
        row = core.rows.pop(key, None)
        if row is None:
            return None
        core.index_remove(key, row)
        core.revision += 1
        core.log[key] = core.revision
        core.log.move_to_end(key)
        core.graves[key] = None
        while len(core.graves) > core.tombstones:
            forgotten, _ = core.graves.popitem(last=False)
            core.compacted = core.log.pop(forgotten)
        return row
