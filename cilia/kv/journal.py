"""The embedded store's file: a SQLite database in WAL mode, in a directory that has one owner.

    store.sqlite        history, leases, who the store is
    store.sqlite-wal    what SQLite has not yet moved into it
    lock                held by the process that has the store open; contains its pid

A commit is on the disk when `commit` returns: `synchronous=FULL` syncs the WAL at each one.
A store that fails its check is refused and left as it lies, byte for byte; nothing is repaired,
created or truncated in its place. New files appear by rename, whole or not at all.

Blocking: callers run this off the event loop.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from cilia.errors import DomainError, Kind
from cilia.kv.backend import KeyValue, LeaseID
from cilia.statefile import DirectoryLock, sync_directory

T = TypeVar("T")

APPLICATION_ID = 0x43494C49  # "CILI", in the header of the file
FORMAT_VERSION = 1
LOCK_OWNER = "identity service"

_SCHEMA = f"""
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {FORMAT_VERSION};
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE history (
    revision INTEGER NOT NULL,
    key BLOB NOT NULL,
    position INTEGER NOT NULL,
    value BLOB NOT NULL,
    create_revision INTEGER NOT NULL,
    version INTEGER NOT NULL,
    lease INTEGER NOT NULL,
    PRIMARY KEY (revision, key)
) WITHOUT ROWID;
CREATE TABLE lease (id INTEGER PRIMARY KEY, ttl_s INTEGER NOT NULL);
"""

_INSERT_HISTORY = "INSERT INTO history VALUES (?, ?, ?, ?, ?, ?, ?)"
_DELETE_HISTORY = "DELETE FROM history WHERE revision = ? AND key = ?"
_INSERT_LEASE = "INSERT INTO lease VALUES (?, ?)"
_DELETE_LEASE = "DELETE FROM lease WHERE id = ?"
_SET_META = "INSERT INTO meta VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value"


class StoreFileError(DomainError):
    """The store's file cannot be used; the text names the file and the cure."""

    default_kind = Kind.PRECONDITION

    def __init__(self, path: Path, message: str, *, cure: str = "") -> None:
        super().__init__(message, cure=cure)
        self.path = path


class StoreDamaged(StoreFileError):
    """The file is not a sound store. It was left untouched."""

    default_kind = Kind.DATA_LOSS

    def __init__(self, path: Path, detail: str) -> None:
        super().__init__(
            path,
            f"the store {path} is damaged ({detail}); it was left as it is",
            cure="Restore a backup with `cilia store restore FILE`, or move the file away to "
            "begin with an empty store",
        )
        self.detail = detail


class StoreFormatUnknown(StoreFileError):
    """The file was written by a newer version."""


class StoreRestoreInterrupted(StoreFileError):
    """A restore was cut off between moving the old store away and putting the new one in place."""


class StoreWriteFailed(Exception):
    """A commit failed (a full disk, an I/O error) and was rolled back."""


@dataclass(slots=True)
class Changes:
    """What the next commit writes, in order."""

    statements: list[tuple[str, list[tuple[object, ...]]]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.statements)

    def record(self, changes: Sequence[KeyValue]) -> None:
        self._extend(
            _INSERT_HISTORY,
            [
                (
                    kv.mod_revision,
                    kv.key,
                    position,
                    kv.value,
                    kv.create_revision,
                    kv.version,
                    kv.lease,
                )
                for position, kv in enumerate(changes)
            ],
        )

    def forget(self, compacted: int, gone: Sequence[tuple[int, bytes]]) -> None:
        self._extend(_DELETE_HISTORY, list(gone))
        self._extend(_SET_META, [("compacted", str(compacted))])

    def grant(self, lease: LeaseID, ttl_s: int) -> None:
        self._extend(_INSERT_LEASE, [(lease, ttl_s)])

    def revoke(self, lease: LeaseID) -> None:
        self._extend(_DELETE_LEASE, [(lease,)])

    def _extend(self, statement: str, rows: Sequence[tuple[object, ...]]) -> None:
        if not rows:
            return
        if self.statements and self.statements[-1][0] == statement:
            self.statements[-1][1].extend(rows)
        else:
            self.statements.append((statement, list(rows)))


@dataclass(frozen=True, slots=True)
class Contents:
    store_id: int
    compacted: int
    leases: tuple[tuple[LeaseID, int], ...]
    revisions: Iterator[tuple[int, tuple[KeyValue, ...]]]


class Journal:
    """The file of an open store. First `open`, then `read`, then `begin`, then `commit`s."""

    def __init__(self, path: Path, lock: DirectoryLock) -> None:
        self.path = path
        self._lock = lock
        self._db: sqlite3.Connection | None = None

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Locks and checks the store, or makes an empty one where there is none.

        Raises StateDirectoryLocked, StoreFileError's subclasses, OSError.
        """
        lock = DirectoryLock(path.parent, owner=LOCK_OWNER)
        lock.acquire()
        try:
            if restoring_path(path).exists():
                raise StoreRestoreInterrupted(
                    path,
                    f"a restore of the store {path} was interrupted",
                    cure="Run `cilia store restore FILE` again",
                )
            if path.exists():
                verify(path)
            else:
                _create(path)
        except BaseException:
            lock.release()
            raise
        return cls(path, lock)

    def read(self, consume: Callable[[Contents], T]) -> T:
        """Hands the stored contents to `consume`; its history is read while it is iterated.

        Read-only, so that closing cannot move a WAL into a file that turns out unsound.
        Raises StoreDamaged.
        """
        try:
            with contextlib.closing(_connect(self.path, read_only=True)) as db:
                meta = dict(db.execute("SELECT name, value FROM meta"))
                leases = db.execute("SELECT id, ttl_s FROM lease").fetchall()
                return consume(
                    Contents(
                        store_id=int(meta["store_id"]),
                        compacted=int(meta.get("compacted", 0)),
                        leases=tuple((LeaseID(lease), ttl_s) for lease, ttl_s in leases),
                        revisions=_revisions(db),
                    )
                )
        except (sqlite3.Error, ValueError, TypeError, KeyError) as error:
            raise StoreDamaged(self.path, str(error)) from error

    def begin(self) -> None:
        """Opens the file for writing. Raises StoreDamaged."""
        try:
            self._db = _connect(self.path)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
        except sqlite3.Error as error:
            raise StoreDamaged(self.path, str(error)) from error

    def commit(self, changes: Changes) -> None:
        """All of it, synced to the disk. Raises StoreWriteFailed, and then none of it."""
        db = self._db
        assert db is not None, "begin() first"
        try:
            db.execute("BEGIN IMMEDIATE")
            for statement, rows in changes.statements:
                db.executemany(statement, rows)
            db.execute("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                db.execute("ROLLBACK")
            raise StoreWriteFailed(str(error)) from error

    def backup(self, destination: Path) -> None:
        """A consistent copy, made through a connection of its own so that commits go on.

        Raises FileExistsError, StoreWriteFailed.
        """
        with destination.open("xb"):
            pass
        try:
            with (
                contextlib.closing(_connect(self.path)) as source,
                contextlib.closing(_connect(destination)) as target,
            ):
                # One step copies all pages under one read transaction: a snapshot.
                source.backup(target, pages=-1)
                target.execute("PRAGMA journal_mode = DELETE")
        except sqlite3.Error as error:
            destination.unlink(missing_ok=True)
            raise StoreWriteFailed(str(error)) from error

    def size_bytes(self) -> int:
        total = 0
        for path in (self.path, wal_path(self.path)):
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_size
        return total

    def close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None
        self._lock.release()


def _revisions(db: sqlite3.Connection) -> Iterator[tuple[int, tuple[KeyValue, ...]]]:
    rows = db.execute(
        "SELECT revision, key, value, create_revision, version, lease "
        "FROM history ORDER BY revision, position"
    )
    for revision, group in itertools.groupby(rows, key=lambda row: row[0]):
        yield (
            revision,
            tuple(
                KeyValue(bytes(key), bytes(value), created, revision, version, LeaseID(lease))
                for _, key, value, created, version, lease in group
            ),
        )


def wal_path(store: Path) -> Path:
    return store.with_name(store.name + "-wal")


def restoring_path(store: Path) -> Path:
    return store.with_name(store.name + ".restoring")


def verify(path: Path) -> None:
    """Checks a store or a backup without changing a byte of it.

    Raises StoreDamaged, StoreFormatUnknown, OSError.
    """
    if path.stat().st_size == 0:
        raise StoreDamaged(path, "it is empty")
    try:
        # Read-only, so that closing does not move the WAL into a file that is unsound.
        with contextlib.closing(_connect(path, read_only=True)) as db:
            application = db.execute("PRAGMA application_id").fetchone()[0]
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if application != APPLICATION_ID:
                raise StoreDamaged(path, "it is a database, but not a store of ours")
            if version > FORMAT_VERSION:
                raise StoreFormatUnknown(
                    path,
                    f"the store {path} has format {version}, this version knows {FORMAT_VERSION}",
                    cure="Use the version that wrote it",
                )
            fault = db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if fault != "ok":
                raise StoreDamaged(path, str(fault).replace("\n", " "))
            meta = dict(db.execute("SELECT name, value FROM meta"))
            int(meta["store_id"])
            int(meta.get("compacted", 0))
            db.execute("SELECT id, ttl_s FROM lease LIMIT 1").fetchall()
            db.execute("SELECT * FROM history LIMIT 1").fetchall()
    except (sqlite3.Error, KeyError, ValueError, UnicodeDecodeError) as error:
        raise StoreDamaged(path, str(error)) from error


def restore(backup: Path, store: Path) -> Path | None:
    """Puts a backup in the place of a store that nobody has open.

    The backup is verified first, and gets a new store id: revisions went back, so what clients
    remember of the old history must not be taken for this one. The old store, sound or not, is
    kept beside it; its new path is returned (None: there was none). After a crash in between the
    store refuses to open until this is run again.

    Raises StateDirectoryLocked, StoreDamaged (of the backup), StoreFormatUnknown, OSError.
    """
    verify(backup)
    with DirectoryLock(store.parent, owner="cilia store restore"):
        incoming = store.with_name(store.name + ".incoming")
        incoming.unlink(missing_ok=True)
        try:
            with (
                contextlib.closing(_connect(backup, read_only=True)) as source,
                contextlib.closing(_connect(incoming)) as target,
            ):
                source.backup(target, pages=-1)
                target.execute(_SET_META, ("store_id", str(_new_store_id())))
        except sqlite3.Error as error:
            incoming.unlink(missing_ok=True)
            raise StoreDamaged(backup, str(error)) from error
        verify(incoming)
        _sync_file(incoming)
        marker = restoring_path(store)
        incoming.rename(marker)
        sync_directory(store.parent)
        kept = _set_aside(store)
        marker.rename(store)
        sync_directory(store.parent)
        return kept


def _set_aside(store: Path) -> Path | None:
    """Moves the store and its WAL to a name of their own. The WAL goes with it: left in place it
    would be replayed into whatever takes the store's name."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    kept = store.with_name(f"{store.name}.before-restore-{stamp}")
    number = 0
    while kept.exists() or wal_path(kept).exists():
        number += 1
        kept = store.with_name(f"{store.name}.before-restore-{stamp}.{number}")
    moved = store.exists()
    if moved:
        store.rename(kept)
    if wal_path(store).exists():
        wal_path(store).rename(wal_path(kept))
    store.with_name(store.name + "-shm").unlink(missing_ok=True)
    return kept if moved else None


def _create(path: Path) -> None:
    """An empty store, made under another name and renamed: a crash leaves none, not half of one."""
    draft = path.with_name(path.name + ".new")
    draft.unlink(missing_ok=True)
    with contextlib.closing(_connect(draft)) as db:
        db.executescript(_SCHEMA)
        db.execute(_SET_META, ("store_id", str(_new_store_id())))
    _sync_file(draft)
    draft.rename(path)
    sync_directory(path.parent)


def _new_store_id() -> int:
    return secrets.randbits(64) or 1


def _connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}",
        uri=True,
        timeout=10.0,
        isolation_level=None,
        # One commit at a time, each in some thread of the backend's executor.
        check_same_thread=False,
    )


def _sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
