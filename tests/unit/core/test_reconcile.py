"""Reconcilers by scripts of insert, break, heal and delete, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from cilia.controller import spawn
from cilia.errors import UnavailableError
from cilia.reconcile import NotReconciled, Reconciler, State
from cilia.table import Table

pytestmark = pytest.mark.looptime


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    value: int = 0


class Store(Reconciler[str, Row]):
    """A dictionary that can be broken, as a whole or for one key."""

    def __init__(self, table: Table[str, Row], **options: float) -> None:
        super().__init__("store", table.reader(), retry_s=1, retry_max_s=4, jitter=0, **options)
        self.content: dict[str, int] = {}
        self.broken: set[str] = set()
        self.calls: list[str] = []

    def _touch(self, what: str, key: str) -> None:
        self.calls.append(f"{what} {key}")
        if key in self.broken or "*" in self.broken:
            raise UnavailableError(f"{key} is broken")

    async def update(self, row: Row) -> None:
        self._touch("update", row.name)
        self.content[row.name] = row.value

    async def delete(self, row: Row) -> None:
        self._touch("delete", row.name)
        self.content.pop(row.name, None)

    async def prune(self, rows: Collection[Row]) -> None:
        self._touch("prune", "-")
        wanted = {row.name for row in rows}
        self.content = {k: v for k, v in self.content.items() if k in wanted}


def make_table() -> Table[str, Row]:
    return Table("rows", key=lambda row: row.name)


@asynccontextmanager
async def running(store: Store) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        task = spawn(group, store.run(), "store")
        await asyncio.sleep(0)
        yield
        task.cancel()


def states(store: Store) -> dict[str, str]:
    return {s.key: s.state.value + (" del" if s.deleting else "") for s in store.statuses}


async def test_insert_break_heal_delete() -> None:
    table = make_table()
    store = Store(table)
    async with running(store):
        table.upsert(Row("a", 1))
        await store.wait_done()
        assert (store.content, states(store)) == ({"a": 1}, {"a": "Done"})

        store.broken = {"b"}
        table.upsert_all([Row("a", 2), Row("b", 1)])
        await asyncio.sleep(0.5)
        assert (store.content, states(store)) == ({"a": 2}, {"a": "Done", "b": "Error"})
        assert store.errors == {"b": "b is broken"}

        await asyncio.sleep(3)  # tried again after 1 and 2 seconds more
        assert store.calls.count("update b") == 3
        assert store.statuses["b"].attempts == 3

        store.broken = set()
        await store.wait_done(["b"])
        assert (store.content, states(store)) == ({"a": 2, "b": 1}, {"a": "Done", "b": "Done"})
        assert store.statuses["b"].attempts == 0

        store.broken = {"a"}
        table.delete("a")
        await asyncio.sleep(0.5)
        assert (store.content["a"], states(store)["a"]) == (2, "Error del")
        store.broken = set()
        await store.wait_done()
        assert (store.content, states(store)) == ({"b": 1}, {"b": "Done"})


async def test_deleted_before_it_could_be_applied() -> None:
    table = make_table()
    store = Store(table)
    store.broken = {"a"}
    async with running(store):
        table.upsert(Row("a"))
        await asyncio.sleep(0.1)
        table.delete("a")  # it may be there in part, so it is deleted
        store.broken = set()
        await store.wait_done(["a"])
        assert store.calls == ["update a", "delete a"]
        table.upsert(Row("c"))
        table.delete("c")  # never seen: nothing to do
        await store.wait_done()
        assert store.calls == ["update a", "delete a"]
        assert states(store) == {}


async def test_a_change_of_a_failed_row_is_tried_at_once() -> None:
    table = make_table()
    store = Store(table)
    store.broken = {"a"}
    async with running(store):
        table.upsert(Row("a", 1))
        await asyncio.sleep(3.5)
        store.broken = set()
        table.upsert(Row("a", 2))
        async with asyncio.timeout(0.01):
            await store.wait_done()
        assert store.content == {"a": 2}


async def test_nothing_is_pruned_before_synced() -> None:
    table = make_table()
    store = Store(table)
    store.content = {"left-over": 1, "a": 1}
    async with running(store):
        table.upsert(Row("a", 1))
        await store.wait_done()
        await asyncio.sleep(100)
        assert store.content == {"left-over": 1, "a": 1}
        table.mark_synced()
        await asyncio.sleep(0.01)
        assert store.content == {"a": 1}


async def test_a_prune_that_fails_is_retried() -> None:
    table = make_table()
    store = Store(table)
    store.content = {"left-over": 1}
    store.broken = {"-"}
    table.mark_synced()
    async with running(store):
        await asyncio.sleep(0.5)
        assert store.prune_error == "- is broken"
        store.broken = set()
        await asyncio.sleep(1)
        assert (store.content, store.prune_error) == ({}, "")


async def test_resync_repairs_what_others_did() -> None:
    table = make_table()
    store = Store(table, resync_s=60)
    table.mark_synced()
    async with running(store):
        table.upsert(Row("a", 1))
        await store.wait_done()
        store.content = {"a": 9, "intruder": 1}
        await asyncio.sleep(61)
        assert store.content == {"a": 1}
        assert states(store) == {"a": "Done"}


async def test_wait_done_fails_fast_when_asked() -> None:
    table = make_table()
    store = Store(table)
    store.broken = {"a"}
    async with running(store):
        table.upsert(Row("a"))
        with pytest.raises(NotReconciled, match="store is not applied: a: a is broken"):
            await store.wait_done(fail_fast=True)


async def test_wait_done_waits_for_rows_not_yet_looked_at() -> None:
    table = make_table()
    store = Store(table)
    table.upsert(Row("a"))
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        waiting = group.create_task(store.wait_done(["a"]))
        await asyncio.sleep(1)
        assert not waiting.done()
        await store.flush()


class Bulk(Store):
    """A store with a bulk operation that fails as a whole."""

    async def update_batch(self, rows):  # type: ignore[no-untyped-def]
        self.calls.append(f"bulk {len(rows)}")
        if self.broken:
            raise OSError("the map is full")
        self.content.update({key: row.value for key, row in rows.items()})
        return {}


async def test_a_batch_that_raises_fails_its_rows() -> None:
    table = make_table()
    store = Bulk(table)
    store.broken = {"*"}
    table.upsert_all([Row(str(i)) for i in range(100)])
    async with running(store):
        await asyncio.sleep(0.1)
        assert store.calls == ["bulk 100"]
        assert all(s.state is State.ERROR for s in store.statuses)
        store.broken = set()
        await store.wait_done()
        assert len(store.content) == 100
        assert store.calls == ["bulk 100", "bulk 100"]


@pytest.mark.parametrize("updates_first", [True, False])
async def test_order_of_updates_and_deletes(updates_first: bool) -> None:
    table = make_table()
    store = Store(table)
    store.updates_first = updates_first
    table.upsert(Row("old"))
    await store.flush()
    store.calls.clear()
    table.delete("old")
    table.upsert(Row("new"))
    await store.flush()
    expected = ["update new", "delete old"]
    assert store.calls == (expected if updates_first else expected[::-1])


async def test_the_result_depends_on_the_last_state_only() -> None:
    """Every path through a few states, forwards, backwards and in one jump, ends alike."""
    named = {
        "empty": [],
        "one": [Row("a", 1)],
        "two": [Row("a", 1), Row("b", 1)],
        "changed": [Row("a", 2), Row("b", 1)],
        "other": [Row("c", 1)],
    }
    names = list(named)
    for path in (names, names[::-1], ["two", "empty", "two"], ["other", "changed"], ["changed"]):
        table = make_table()
        store = Store(table)
        for name in path:
            table.replace_all(named[name])
            await store.flush()
        assert store.content == {row.name: row.value for row in named[path[-1]]}
        assert set(states(store).values()) <= {"Done"}
