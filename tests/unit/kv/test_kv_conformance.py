"""What every backend promises (cilia.kv.backend), parametrised over the backends there are."""

from __future__ import annotations

import asyncio

import pytest

from cilia.kv import (
    Backend,
    Compacted,
    Compare,
    Delete,
    DeleteResult,
    Expectation,
    FutureRevision,
    Get,
    InvalidRequest,
    LeaseExists,
    LeaseID,
    LeaseNotFound,
    Op,
    Put,
    RangeResult,
    Relation,
    Span,
    Txn,
    TxnResult,
    absent,
    get,
    present,
    unchanged,
)

ALL = Span.prefix(b"k/")


async def values(store: Backend, span: Span = ALL, *, revision: int = 0) -> dict[bytes, bytes]:
    return {kv.key: kv.value for kv in (await store.range(span, revision=revision)).kvs}


async def test_an_empty_store_is_at_revision_one_and_each_change_takes_one(store: Backend) -> None:
    assert store.revision == 1
    first = await store.put(b"k/a", b"1")
    second = await store.put(b"k/a", b"2")
    assert (first.revision, second.revision, store.revision) == (2, 3, 3)
    kv = await store.get(b"k/a")
    assert kv is not None
    assert (kv.value, kv.create_revision, kv.mod_revision, kv.version) == (b"2", 2, 3, 2)
    assert second.previous is not None
    assert second.previous.value == b"1"


async def test_deleting_nothing_changes_nothing(store: Backend) -> None:
    await store.put(b"k/a", b"")
    result = await store.delete(Span.key(b"k/b"))
    assert (result.deleted, result.revision, store.revision) == ((), 2, 2)


async def test_a_key_made_again_counts_versions_from_one(store: Backend) -> None:
    await store.put(b"k/a", b"1")
    await store.delete(Span.key(b"k/a"))
    await store.put(b"k/a", b"2")
    kv = await store.get(b"k/a")
    assert kv is not None
    assert (kv.create_revision, kv.version) == (4, 1)


async def test_ranges_are_half_open_sorted_and_cut_by_limit(store: Backend) -> None:
    for key in (b"k/c", b"k/a", b"k/b", b"l", b"k0"):
        await store.put(key, key)
    page = await store.range(ALL, limit=2)
    assert [kv.key for kv in page.kvs] == [b"k/a", b"k/b"]
    assert (page.count, page.more) == (3, True)
    assert [kv.key for kv in (await store.range(Span(b"k/b", b"k/c"))).kvs] == [b"k/b"]
    assert [kv.key for kv in (await store.range(Span(b"k/c", None))).kvs] == [b"k/c", b"k0", b"l"]
    assert (await store.range(ALL, count_only=True)).kvs == ()
    assert {kv.value for kv in (await store.range(ALL, keys_only=True)).kvs} == {b""}


@pytest.mark.parametrize(
    ("prefix", "inside", "outside"),
    [
        (b"a", [b"a", b"a\xff\xff"], [b"b", b"A"]),
        (b"a\xff", [b"a\xff", b"a\xff\x00"], [b"b", b"a\xfe"]),
        (b"\xff", [b"\xff", b"\xff\xff"], [b"\xfe"]),
    ],
)
def test_prefix_spans(prefix: bytes, inside: list[bytes], outside: list[bytes]) -> None:
    assert all(key in Span.prefix(prefix) for key in inside)
    assert not any(key in Span.prefix(prefix) for key in outside)


async def test_old_revisions_can_be_read(store: Backend) -> None:
    await store.put(b"k/a", b"1")  # 2
    await store.put(b"k/b", b"1")  # 3
    await store.delete(Span.key(b"k/a"))  # 4
    await store.put(b"k/a", b"2")  # 5
    assert await values(store, revision=1) == {}
    assert await values(store, revision=3) == {b"k/a": b"1", b"k/b": b"1"}
    assert await values(store, revision=4) == {b"k/b": b"1"}
    assert await values(store) == {b"k/a": b"2", b"k/b": b"1"}
    with pytest.raises(FutureRevision):
        await store.range(ALL, revision=6)


async def test_a_transaction_takes_one_branch_at_one_revision(store: Backend) -> None:
    txn = Txn(
        (absent(b"k/a"),),
        success=(Put(b"k/a", b"new"), Put(b"k/b", b"new")),
        failure=(get(b"k/a"), Put(b"k/c", b"")),
    )
    first = await store.txn(txn)
    assert (first.succeeded, first.revision) == (True, 2)
    second = await store.txn(txn)
    assert (second.succeeded, second.revision) == (False, 3)
    read = second.results[0]
    assert isinstance(read, RangeResult)
    assert [kv.value for kv in read.kvs] == [b"new"]
    assert [kv.mod_revision for kv in (await store.range(ALL)).kvs] == [2, 2, 3]


async def test_compares_look_at_the_state_before_the_transaction(store: Backend) -> None:
    result = await store.txn(
        Txn(
            success=(
                Put(b"k/a", b"1"),
                get(b"k/a"),
                Txn(
                    (present(b"k/a"),), success=(Put(b"k/yes", b""),), failure=(Put(b"k/no", b""),)
                ),
            )
        )
    )
    nested = result.results[2]
    assert isinstance(nested, TxnResult)
    assert not nested.succeeded
    read = result.results[1]
    assert isinstance(read, RangeResult)
    assert read.count == 1, "a read sees what its transaction wrote before it"
    assert set(await values(store)) == {b"k/a", b"k/no"}


@pytest.mark.parametrize(
    ("field", "relation", "operand", "holds"),
    [
        (Expectation.VALUE, Relation.EQUAL, b"v", True),
        (Expectation.VALUE, Relation.LESS, b"w", True),
        (Expectation.VALUE, Relation.GREATER, b"v", False),
        (Expectation.VERSION, Relation.EQUAL, 2, True),
        (Expectation.VERSION, Relation.NOT_EQUAL, 2, False),
        (Expectation.CREATE_REVISION, Relation.EQUAL, 2, True),
        (Expectation.MOD_REVISION, Relation.GREATER, 2, True),
        (Expectation.LEASE, Relation.EQUAL, 0, True),
    ],
)
async def test_compares(
    store: Backend, field: Expectation, relation: Relation, operand: int | bytes, holds: bool
) -> None:
    await store.put(b"k/a", b"v")
    await store.put(b"k/a", b"v")
    result = await store.txn(Txn((Compare(Span.key(b"k/a"), field, relation, operand),)))
    assert result.succeeded is holds


async def test_an_absent_key_compares_as_zero_and_its_value_as_nothing(store: Backend) -> None:
    nobody = Span.key(b"k/a")
    for relation in Relation:
        compare = Compare(nobody, Expectation.VALUE, relation, b"")
        assert not (await store.txn(Txn((compare,)))).succeeded
    assert (await store.txn(Txn((unchanged(b"k/a", 0), absent(b"k/a"))))).succeeded


async def test_a_range_compare_holds_for_all_keys_or_for_nobody(store: Backend) -> None:
    empty = Txn((absent(Span.prefix(b"k/ref/")),))
    assert (await store.txn(empty)).succeeded
    await store.put(b"k/ref/1", b"x")
    assert not (await store.txn(empty)).succeeded
    await store.put(b"k/ref/2", b"y")
    same = Compare(Span.prefix(b"k/ref/"), Expectation.VALUE, Relation.EQUAL, b"x")
    assert not (await store.txn(Txn((same,)))).succeeded


@pytest.mark.parametrize(
    "ops",
    [
        (Put(b"k", b""), Put(b"k", b"")),
        (Put(b"k", b""), Delete(Span.key(b"k"))),
        (Delete(Span.prefix(b"k")), Put(b"k1", b"")),
        (Delete(Span(b"a", None)), Put(b"k1", b"")),
        (Put(b"k", b""), Txn((absent(b"z"),), success=(Put(b"k", b""),))),
        (Txn(success=(Put(b"k", b""),)), Txn(failure=(Put(b"k", b""),))),
        (Put(b"", b""),),
        (Delete(Span(b"", b"z")),),
        (Get(Span(b"", None)),),
        tuple(Put(b"%d" % n, b"") for n in range(129)),
        (Put(b"k", b"x" * 1_600_000),),
        (Put(b"k" * 5000, b""),),
    ],
)
async def test_refused_transactions_change_nothing(store: Backend, ops: tuple[Op, ...]) -> None:
    with pytest.raises(InvalidRequest):
        await store.txn(Txn(success=(Put(b"zz", b""), *ops)))
    assert store.revision == 1
    assert (await store.range(Span(b"\0", None))).count == 0


async def test_branches_that_exclude_each_other_may_write_the_same_key(store: Backend) -> None:
    inner = Txn((absent(b"k/z"),), success=(Put(b"k/a", b"1"),), failure=(Put(b"k/a", b"2"),))
    await store.txn(Txn(success=(inner,)))
    assert await values(store) == {b"k/a": b"1"}


async def test_one_bad_put_spoils_the_whole_transaction(store: Backend) -> None:
    with pytest.raises(LeaseNotFound):
        await store.txn(Txn(success=(Put(b"k/a", b""), Put(b"k/b", b"", LeaseID(7)))))
    with pytest.raises(FutureRevision):
        await store.txn(Txn(success=(Put(b"k/a", b""), Get(ALL, revision=9))))
    assert (store.revision, await values(store)) == (1, {})


async def test_delete_returns_what_was_there(store: Backend) -> None:
    await store.put(b"k/a", b"1")
    await store.put(b"k/b", b"2")
    result = await store.txn(Txn(success=(Delete(ALL), Delete(ALL))))
    first, second = result.results
    assert isinstance(first, DeleteResult)
    assert isinstance(second, DeleteResult)
    assert [kv.value for kv in first.deleted] == [b"1", b"2"]
    assert second.deleted == ()
    assert store.revision == 4


# Leases


async def test_revoking_a_lease_deletes_its_keys_in_one_revision(store: Backend) -> None:
    lease = (await store.grant(60)).id
    await store.put(b"k/a", b"", lease=lease)
    await store.put(b"k/b", b"", lease=lease)
    await store.put(b"k/b", b"", lease=LeaseID(0))  # detached by the last put
    await store.put(b"k/c", b"", lease=lease)
    async with store.watch(ALL, start_revision=store.revision + 1) as watch:
        assert (await store.lease(lease)).keys == 2
        revision = await store.revoke(lease)
        batch = await watch.next()
    assert batch.revision == revision
    assert [(kv.key, kv.deleted) for kv in batch.changes] == [(b"k/a", True), (b"k/c", True)]
    assert set(await values(store)) == {b"k/b"}
    for call in (store.revoke, store.keepalive, store.lease):
        with pytest.raises(LeaseNotFound):
            await call(lease)


async def test_lease_ids_and_times_are_checked(store: Backend) -> None:
    await store.grant(10, lease=LeaseID(5))
    with pytest.raises(LeaseExists):
        await store.grant(10, lease=LeaseID(5))
    for ttl in (0, -1, 10**9):
        with pytest.raises(InvalidRequest):
            await store.grant(ttl)
    for lease in (-1, 1 << 63):
        with pytest.raises(InvalidRequest):
            await store.grant(10, lease=LeaseID(lease))
    assert [lease.id for lease in await store.leases()] == [5]


# Watches


async def test_a_watch_gets_whole_revisions_of_its_span_in_order(store: Backend) -> None:
    await store.put(b"k/a", b"1")  # 2
    await store.put(b"other", b"")  # 3
    await store.txn(Txn(success=(Put(b"k/b", b""), Put(b"other2", b""), Delete(Span.key(b"k/a")))))
    async with store.watch(ALL, start_revision=2) as watch:
        first, second = await watch.next(), await watch.next()
        await store.put(b"k/c", b"")
        third = await watch.next()
    assert [batch.revision for batch in (first, second, third)] == [2, 4, 5]
    assert [(kv.key, kv.deleted) for kv in second.changes] == [(b"k/b", False), (b"k/a", True)]


async def test_a_watch_without_a_start_gets_what_comes(store: Backend) -> None:
    await store.put(b"k/a", b"1")
    async with store.watch(ALL) as watch:
        await store.put(b"k/a", b"2")
        assert (await watch.next()).revision == 3


async def test_a_watch_resumes_where_it_ended(store: Backend) -> None:
    seen: list[int] = []
    start = 1
    for round_number in range(5):
        for number in range(3):
            await store.put(b"k/%d" % number, b"%d" % round_number)
        async with store.watch(ALL, start_revision=start) as watch:
            for _ in range(2):
                batch = await watch.next()
                seen.append(batch.revision)
                start = batch.revision + 1
    assert seen == list(range(2, 12))


async def test_a_quiet_watch_reports_progress(store: Backend) -> None:
    async with store.watch(ALL, start_revision=2, progress_s=0.02) as watch:
        await store.put(b"elsewhere", b"")
        batch = await watch.next()
    assert (batch.changes, batch.revision) == ((), 2)


async def test_compaction_forgets_history_and_keeps_the_state(store: Backend) -> None:
    await store.put(b"k/a", b"1")  # 2
    await store.put(b"k/a", b"2")  # 3
    await store.put(b"k/b", b"1")  # 4
    await store.delete(Span.key(b"k/b"))  # 5
    await store.put(b"k/a", b"3")  # 6
    await store.compact(5)
    assert (store.compacted, store.revision) == (5, 6)
    assert await values(store, revision=5) == {b"k/a": b"2"}
    assert await values(store) == {b"k/a": b"3"}
    with pytest.raises(Compacted):
        await store.range(ALL, revision=4)
    with pytest.raises(Compacted):
        await store.compact(5)
    with pytest.raises(FutureRevision):
        await store.compact(7)
    with pytest.raises(Compacted):
        store.watch(ALL, start_revision=4)
    # As in etcd: from the compacted revision itself, its deletion included.
    async with store.watch(ALL, start_revision=5) as watch:
        batch = await watch.next()
        assert [(kv.key, kv.deleted) for kv in batch.changes] == [(b"k/b", True)]
        assert (await watch.next()).revision == 6


async def test_a_watch_that_sleeps_through_a_compaction_is_told(store: Backend) -> None:
    async with store.watch(ALL, start_revision=2) as watch:
        for number in range(5):
            await store.put(b"k/a", b"%d" % number)
        await store.compact(6)
        with pytest.raises(Compacted) as caught:
            await watch.next()
    assert caught.value.compacted == 6


async def test_many_writers_and_watchers_agree(store: Backend) -> None:
    """Each watcher rebuilds the state; all end with the state that is there."""
    writers, writes = 16, 20
    rebuilt: list[dict[bytes, bytes]] = [{} for _ in range(4)]

    async def watch(state: dict[bytes, bytes]) -> None:
        last = 0
        async with store.watch(ALL, start_revision=2) as batches:
            async for batch in batches:
                assert batch.revision == last + 1 or not last
                last = batch.revision
                for kv in batch.changes:
                    if kv.deleted:
                        state.pop(kv.key)
                    else:
                        state[kv.key] = kv.value
                if last == writers * writes + 1:
                    return

    async def write(number: int) -> None:
        for count in range(writes):
            if count % 5 == 4:
                await store.delete(Span.key(b"k/%d" % number))
            else:
                await store.put(b"k/%d" % number, b"%d" % count)

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        for state in rebuilt:
            group.create_task(watch(state))
        for number in range(writers):
            group.create_task(write(number))
    expected = await values(store)
    assert all(state == expected for state in rebuilt)
