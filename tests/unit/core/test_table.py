"""Tables: revisions, indexes, watchers that coalesce, forgotten revisions."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cilia.table import ReadTable, Table


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    value: int = 0
    tags: tuple[str, ...] = ()


def make(tombstones: int = 100) -> Table[str, Row]:
    return Table(
        "rows", key=lambda r: r.name, indexes={"tag": lambda r: r.tags}, tombstones=tombstones
    )


def test_equal_rows_change_nothing() -> None:
    table = make()
    assert table.upsert(Row("a", 1)) is True
    assert table.upsert(Row("a", 1)) is False
    assert table.revision == 1
    assert table.upsert(Row("a", 2)) is True
    assert (table.revision, table.row_revision("a"), len(table)) == (2, 2, 1)
    assert table.delete("a") == Row("a", 2)
    assert table.delete("a") is None
    assert (table.revision, "a" in table, table.row_revision("a")) == (3, False, 3)


def test_indexes_follow_rows() -> None:
    table = make()
    table.upsert_all([Row("a", tags=("x", "y")), Row("b", tags=("y",))])
    assert [r.name for r in table.by("tag", "y")] == ["a", "b"]
    table.upsert(Row("a", tags=("z",)))
    assert [r.name for r in table.by("tag", "y")] == ["b"]
    assert table.by("tag", "x") == ()
    table.delete("b")
    assert table.by("tag", "y") == ()


def test_changes_coalesce_to_the_newest() -> None:
    table = make()
    table.upsert_all([Row("a", 1), Row("b", 1)])
    seen = table.revision
    table.upsert(Row("b", 2))
    table.upsert(Row("c", 1))
    table.upsert(Row("b", 3))
    table.delete("a")
    batch = table.changes(seen)
    assert [(c.key, c.row and c.row.value) for c in batch.changes] == [
        ("c", 1),
        ("b", 3),
        ("a", None),
    ]
    assert not batch.reset
    assert table.changes(batch.revision).changes == ()


def test_a_forgotten_revision_resets() -> None:
    table = make(tombstones=2)
    table.upsert_all([Row(str(i)) for i in range(5)])
    for i in range(3):
        table.delete(str(i))
    batch = table.changes(5)
    assert batch.reset
    assert [c.key for c in batch.changes] == ["3", "4"]
    assert not table.changes(6).reset
    assert table.changes(99).reset  # of another life of the table


def test_readers_cannot_write() -> None:
    reader = make().reader()
    assert not any(hasattr(reader, name) for name in ("upsert", "delete", "replace_all"))


async def test_watch_follows_and_tells_synced() -> None:
    table = make()
    table.upsert(Row("a"))
    watcher = table.watch()
    first = await anext(watcher)
    assert (first.reset, first.synced, [c.key for c in first.changes]) == (True, False, ["a"])
    table.mark_synced()
    second = await anext(watcher)
    assert (second.reset, second.synced, second.changes) == (False, True, ())
    table.upsert(Row("b"))
    table.upsert(Row("c"))
    table.delete("b")
    third = await anext(watcher)
    assert [(c.key, c.row is None) for c in third.changes] == [("c", False), ("b", True)]


async def test_wait_until() -> None:
    table = make()

    def full(t: ReadTable[str, Row]) -> bool:
        return len(t) == 2

    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        waiting = group.create_task(table.wait_until(full))
        await asyncio.sleep(0)
        table.upsert(Row("a"))
        await asyncio.sleep(0)
        assert not waiting.done()
        table.upsert(Row("b"))


def test_dump_of_plain_rows() -> None:
    table = make()
    table.upsert(Row("a", 3))
    dump = table.dump()
    assert dump.header == ("name", "value", "tags")
    assert dump.rows == (("a", "3", "()"),)


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 3), st.booleans())),
    st.integers(1, 7),
    st.integers(0, 4),
)
def test_a_watcher_that_looks_now_and_then_knows_all(
    steps: list[tuple[str, int, bool]], every: int, tombstones: int
) -> None:
    table = make(tombstones)
    mirror: dict[str, Row] = {}
    seen: int | None = None

    def look() -> None:
        nonlocal seen
        batch = table.changes(seen)
        if batch.reset:
            mirror.clear()
        for change in batch.changes:
            if change.row is None:
                mirror.pop(change.key, None)
            else:
                mirror[change.key] = change.row
        seen = batch.revision

    for number, (key, value, delete) in enumerate(steps):
        if delete:
            table.delete(key)
        else:
            table.upsert(Row(key, value, (str(value),)))
        if number % every == 0:
            look()
            assert mirror == table.snapshot()
    look()
    assert mirror == table.snapshot()
    for value in range(4):
        expected = {r for r in table if str(value) in r.tags}
        assert set(table.by("tag", str(value))) == expected


@pytest.mark.parametrize("rows", [[], [Row("a")], [Row("a", 2), Row("z")]])
def test_replace_all_touches_what_differs(rows: list[Row]) -> None:
    table = make()
    table.upsert_all([Row("a"), Row("b")])
    before = table.row_revision("a")
    table.replace_all(rows)
    assert table.snapshot() == {r.name: r for r in rows}
    assert (table.row_revision("a") == before) == (Row("a") in rows)
