"""The embedded store's own promises: durability, one owner, damage, backup, retention, leases."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from cilia.kv import (
    BackendUnavailable,
    Compacted,
    EmbeddedBackend,
    LeaseNotFound,
    Put,
    Retention,
    Span,
    StoreDamaged,
    StoreFileError,
    Txn,
    absent,
    restore,
    verify,
)
from cilia.kv.journal import FORMAT_VERSION, StoreRestoreInterrupted
from cilia.statefile import StateDirectoryLocked

KEEP = Retention(revisions=100_000, age_s=86_400.0)
ALL = Span(b"\0", None)


async def open_store(path: Path | None, retention: Retention = KEEP) -> EmbeddedBackend:
    return await EmbeddedBackend.open(path, retention=retention)


def fingerprint(directory: Path) -> dict[str, str]:
    """Every byte of every file but the lock, SQLite's shared memory and an empty WAL: no data."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in directory.iterdir()
        if file.name != "lock" and not file.name.endswith("-shm")
        if not file.name.endswith("-wal") or file.stat().st_size
    }


def start(program: str, path: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", program, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    )


def fill(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def remove(path: Path) -> None:
    path.unlink()


def cut(path: Path, count: int) -> None:
    os.truncate(path, path.stat().st_size - count)


# Durability


async def test_everything_is_there_after_a_restart(path: Path) -> None:
    async with await open_store(path) as store:
        identity = store.store_id
        lease = (await store.grant(300)).id
        await store.put(b"a", b"1", lease=lease)
        await store.put(b"b", b"1")
        await store.delete(Span.key(b"b"))
        await store.compact(3)
        before = await store.range(ALL)
    async with await open_store(path) as store:
        assert (store.store_id, store.revision, store.compacted) == (identity, 4, 3)
        assert (await store.range(ALL)).kvs == before.kvs
        assert (await store.lease(lease)).remaining_s > 299
        await store.revoke(lease)
        assert (await store.range(ALL)).kvs == ()


async def test_nobody_sees_what_is_not_on_the_disk(path: Path) -> None:
    """Another connection holds SQLite's write lock, so the commit cannot finish."""
    async with await open_store(path) as store:
        await store.put(b"a", b"old")
        blocker = sqlite3.connect(path, isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        answered: list[str] = []

        async def write() -> None:
            await store.put(b"a", b"new")
            answered.append("write")

        async def look() -> None:
            """A transaction that writes nothing, but decides on what is not durable."""
            result = await store.txn(Txn((absent(b"zz"),)))
            assert result.revision == 3
            answered.append("look")

        async with asyncio.TaskGroup() as group, store.watch(ALL, start_revision=3) as watch:
            group.create_task(write())
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            group.create_task(look())
            for _ in range(20):
                await asyncio.sleep(0.005)
                kv = await store.get(b"a")
                assert kv is not None
                assert (kv.value, store.revision, answered) == (b"old", 2, [])
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await watch.next()
            blocker.execute("ROLLBACK")
            assert (await watch.next()).revision == 3
        assert sorted(answered) == ["look", "write"]
        blocker.close()


async def test_writers_at_once_share_a_commit(path: Path) -> None:
    async with await open_store(path) as store:
        async with asyncio.TaskGroup() as group:
            for number in range(500):
                group.create_task(store.put(b"%d" % number, b""))
        assert (await store.status()).commits < 50


async def test_a_full_disk_refuses_writes_keeps_reads_and_heals(path: Path) -> None:
    async with await open_store(path) as store:
        lease = (await store.grant(300)).id
        await store.put(b"a", b"1", lease=lease)
        assert store._journal is not None
        database = store._journal._db
        assert database is not None
        pages = database.execute("PRAGMA page_count").fetchone()[0]
        database.execute(f"PRAGMA max_page_count = {pages}")
        refused = 0

        async def write(number: int) -> None:
            nonlocal refused
            try:
                await store.put(b"big%d" % number, b"x" * 20_000)
            except BackendUnavailable as error:
                refused += "full" in error.message

        with capture_logs() as logs:
            async with asyncio.TaskGroup() as group:
                for number in range(4):
                    group.create_task(write(number))
            assert refused == 4
            assert [line["log_level"] for line in logs] == ["error"]
        assert not (await store.status()).healthy
        assert [kv.key for kv in (await store.range(ALL)).kvs] == [b"a"]
        database.execute("PRAGMA max_page_count = 1000000")
        async with asyncio.timeout(5):
            revision = 0
            while not revision:  # until the memory has been loaded again
                try:
                    revision = (await store.put(b"b", b"2")).revision
                except BackendUnavailable:
                    await asyncio.sleep(0.005)
        assert revision == 3, "what was refused has taken no revision"
        assert (await store.status()).healthy
        assert (await store.lease(lease)).keys == 1
    async with await open_store(path) as store:
        assert [kv.key for kv in (await store.range(ALL)).kvs] == [b"a", b"b"]


async def test_a_closed_store_refuses(path: Path) -> None:
    store = await open_store(path)
    watch = store.watch(ALL, start_revision=2)
    await store.close()
    await store.close()
    with pytest.raises(BackendUnavailable):
        await watch.next()
    with pytest.raises(BackendUnavailable):
        await store.put(b"a", b"")


# One owner


async def test_a_second_process_is_refused_with_the_pid_of_the_first(path: Path) -> None:
    program = (
        "import asyncio, sys; from pathlib import Path; from cilia.kv import EmbeddedBackend\n"
        "async def main():\n"
        "    store = await EmbeddedBackend.open(Path(sys.argv[1]))\n"
        "    await store.put(b'a', b'1'); print('open', flush=True); sys.stdin.read()\n"
        "asyncio.run(main())"
    )
    holder = start(program, path)
    try:
        assert holder.stdout is not None
        assert await asyncio.to_thread(holder.stdout.readline) == b"open\n"
        with pytest.raises(StateDirectoryLocked) as caught:
            await open_store(path)
        assert caught.value.pid == holder.pid
        with pytest.raises(StateDirectoryLocked):
            restore(path, path)
    finally:
        holder.kill()
        holder.wait()
        assert holder.stdin is not None
        holder.stdin.close()
        assert holder.stdout is not None
        holder.stdout.close()
    # The kernel has dropped the lock with the process; what it had written is there.
    async with await open_store(path) as store:
        assert (await store.get(b"a")) is not None


# Damage


async def damaged_store(path: Path, damage: Callable[[Path], None]) -> None:
    async with await open_store(path) as store:
        for number in range(300):
            await store.put(b"key%d" % number, b"value" * 20)
    damage(path)


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda p: p.write_bytes(b""), id="empty"),
        pytest.param(lambda p: p.write_bytes(b"not a database " * 400), id="foreign"),
        pytest.param(lambda p: overwrite(p, 0, b"\0" * 100), id="header"),
        pytest.param(lambda p: overwrite(p, 4096 * 3, b"\xff" * 4096), id="page"),
        pytest.param(lambda p: os.truncate(p, p.stat().st_size // 2), id="truncated"),
        pytest.param(lambda p: os.truncate(p, 100), id="stump"),
    ],
)
async def test_a_damaged_store_is_refused_and_left_alone(
    path: Path, damage: Callable[[Path], None]
) -> None:
    await damaged_store(path, damage)
    before = fingerprint(path.parent)
    with pytest.raises(StoreDamaged):
        await open_store(path)
    with pytest.raises(StoreDamaged) as caught:
        await open_store(path)
    assert str(path) in caught.value.message
    assert "cilia store restore" in caught.value.cure
    assert fingerprint(path.parent) == before


async def test_a_damaged_store_keeps_its_unmoved_wal(path: Path) -> None:
    """A killed process leaves its newest writes in the WAL: they must survive our refusal."""
    program = (
        "import asyncio, os, sys; from pathlib import Path; from cilia.kv import EmbeddedBackend\n"
        "async def main():\n"
        "    store = await EmbeddedBackend.open(Path(sys.argv[1]))\n"
        "    for n in range(50): await store.put(b'%d' % n, b'x' * 2000)\n"
        "    os._exit(9)\n"
        "asyncio.run(main())"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", program, str(path)], env=environment, check=False
    )
    wal = path.with_name("store.sqlite-wal")
    assert wal.stat().st_size > 50_000
    overwrite(path, 4096, b"\xff" * 4096)  # the page of `meta`, which no put rewrites
    before = fingerprint(path.parent)
    with pytest.raises(StoreDamaged):
        await open_store(path)
    assert fingerprint(path.parent) == before


async def test_databases_of_others_and_of_the_future_are_refused(path: Path) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE t (x)")
    other.close()
    with pytest.raises(StoreDamaged, match="not a store of ours"):
        await open_store(path)
    remove(path)
    await (await open_store(path)).close()
    with sqlite3.connect(path) as newer:
        newer.execute(f"PRAGMA user_version = {FORMAT_VERSION + 1}")
    newer.close()
    before = fingerprint(path.parent)
    with pytest.raises(StoreFileError, match="has format 2"):
        await open_store(path)
    assert fingerprint(path.parent) == before


# Backup and restore


async def test_a_backup_is_consistent_while_writers_write(path: Path, tmp_path: Path) -> None:
    """Two keys always change together; in a copy they must be equal."""
    copy = tmp_path / "copy.sqlite"
    async with await open_store(path) as store:
        stop, written = asyncio.Event(), asyncio.Event()

        async def write() -> None:
            count = 0
            while not stop.is_set():
                count += 1
                value = b"%d" % count
                await store.txn(Txn(success=(Put(b"left", value), Put(b"right", value))))
                written.set()

        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(write())
            await written.wait()
            revision = await store.backup(copy)
            written.clear()
            await written.wait()
            stop.set()
        with pytest.raises(FileExistsError):
            await store.backup(copy)
        newest = store.revision
    verify(copy)
    kept = restore(copy, path)
    assert kept is not None
    assert kept.exists()
    async with await open_store(path) as store:
        left, right = await store.get(b"left"), await store.get(b"right")
        assert left is not None
        assert right is not None
        assert left.value == right.value
        assert revision <= store.revision <= newest


async def test_a_restored_store_has_a_new_id_and_the_old_file_stays(
    path: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.sqlite"
    async with await open_store(path) as store:
        await store.put(b"a", b"saved")
        await store.backup(copy)
        await store.put(b"a", b"later")
        old_id = store.store_id
        with pytest.raises(StateDirectoryLocked):
            restore(copy, path)
    kept = restore(copy, path)
    again = restore(copy, path)
    assert kept is not None
    assert again is not None
    assert kept != again
    async with await open_store(path) as store:
        kv = await store.get(b"a")
        assert kv is not None
        assert kv.value == b"saved"
        assert store.store_id != old_id
    verify(kept)
    with sqlite3.connect(kept) as old:
        values = [row[0] for row in old.execute("SELECT value FROM history ORDER BY revision")]
    old.close()
    assert values == [b"saved", b"later"]


async def test_a_restore_mends_a_damaged_store(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.sqlite"
    async with await open_store(path) as store:
        await store.put(b"a", b"1")
        await store.backup(copy)
    fill(path, b"rubbish")
    kept = restore(copy, path)
    assert kept is not None
    assert kept.read_bytes() == b"rubbish"
    async with await open_store(path) as store:
        assert (await store.get(b"a")) is not None


async def test_a_bad_backup_changes_nothing(path: Path, tmp_path: Path) -> None:
    await damaged_store(path, lambda p: None)
    copy = tmp_path / "copy.sqlite"
    shutil.copyfile(path, copy)
    cut(copy, 5000)
    before = fingerprint(path.parent)
    with pytest.raises(StoreDamaged):
        restore(copy, path)
    with pytest.raises(FileNotFoundError):
        restore(tmp_path / "none", path)
    assert fingerprint(path.parent) == before


async def test_an_interrupted_restore_is_not_taken_for_an_empty_store(
    path: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.sqlite"
    async with await open_store(path) as store:
        await store.put(b"a", b"1")
        await store.backup(copy)
    shutil.move(path, path.with_name("store.sqlite.restoring"))  # as if killed between the renames
    with pytest.raises(StoreRestoreInterrupted):
        await open_store(path)
    restore(copy, path)
    async with await open_store(path) as store:
        assert (await store.get(b"a")) is not None


# Time


@pytest.mark.looptime
async def test_leases_end_in_time_and_not_before() -> None:
    async with await open_store(None) as store:
        short, long = (await store.grant(10)).id, (await store.grant(30)).id
        await store.put(b"a", b"", lease=short)
        await store.put(b"b", b"", lease=long)
        async with store.watch(ALL, start_revision=4) as watch:
            await asyncio.sleep(9)
            assert (await store.keepalive(short)).remaining_s == 10
            await asyncio.sleep(9.9)
            assert (await store.range(ALL)).count == 2
            await asyncio.sleep(0.2)
            batch = await watch.next()
            assert [(kv.key, kv.deleted) for kv in batch.changes] == [(b"a", True)]
            with pytest.raises(LeaseNotFound):
                await store.keepalive(short)
            await asyncio.sleep(11)
            assert [kv.key for kv in (await watch.next()).changes] == [b"b"]
        assert await store.leases() == []


@pytest.mark.looptime
async def test_history_is_kept_for_an_age() -> None:
    async with await open_store(None, Retention(revisions=100_000, age_s=80.0)) as store:
        await store.put(b"a", b"1")
        await store.put(b"a", b"2")
        await asyncio.sleep(75)
        assert (await store.range(ALL, revision=2)).count == 1
        await asyncio.sleep(30)
        with pytest.raises(Compacted):
            await store.range(ALL, revision=2)
        assert (await store.range(ALL)).kvs[0].value == b"2"


async def test_history_is_kept_for_a_number_of_revisions(path: Path) -> None:
    keep = Retention(revisions=100, age_s=86_400.0)
    async with await open_store(path, keep) as store:
        for number in range(1000):
            await store.put(b"a", b"%d" % number)
        assert 100 <= store.revision - store.compacted <= 151
    async with await open_store(path, keep) as store:
        assert 100 <= store.revision - store.compacted <= 151
        kv = await store.get(b"a")
        assert kv is not None
        assert kv.value == b"999"
    with sqlite3.connect(path) as database:
        rows = database.execute("SELECT count(*) FROM history").fetchone()[0]
    database.close()
    assert rows <= 152, "what is compacted leaves the file too"
