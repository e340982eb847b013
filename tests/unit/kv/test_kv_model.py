"""Random operations against a model that keeps a full copy of the state for every revision."""

from __future__ import annotations

import asyncio
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cilia.kv import (
    Compacted,
    Compare,
    Delete,
    DeleteResult,
    EmbeddedBackend,
    Expectation,
    FutureRevision,
    Get,
    InvalidRequest,
    KeyValue,
    LeaseID,
    LeaseNotFound,
    Put,
    PutResult,
    RangeResult,
    Relation,
    Retention,
    Span,
    Txn,
    TxnResult,
)
from cilia.kv.backend import Op

keys = st.sampled_from([b"a", b"b", b"b\x00", b"ba", b"c", b"\xff"])
ends = st.one_of(st.none(), keys)
spans = st.one_of(
    keys.map(Span.key),
    keys.map(Span.prefix),
    st.builds(Span, keys, ends),
    st.just(Span(b"\0", None)),
)
leases = st.sampled_from([LeaseID(0), LeaseID(1), LeaseID(2)])
numbers = st.integers(0, 5)
compares = st.one_of(
    st.builds(
        Compare,
        spans,
        st.sampled_from([e for e in Expectation if e is not Expectation.VALUE]),
        st.sampled_from(Relation),
        numbers,
    ),
    st.builds(
        Compare,
        spans,
        st.just(Expectation.VALUE),
        st.sampled_from(Relation),
        st.sampled_from([b"", b"x", b"y"]),
    ),
)
simple: st.SearchStrategy[Op] = st.one_of(
    st.builds(Put, keys, st.sampled_from([b"", b"x", b"y"])),
    st.builds(Put, keys, st.sampled_from([b"", b"x", b"y"]), leases),
    st.builds(Delete, keys.map(Span.key)),
    st.builds(Delete, spans),
    st.builds(Get, spans, revision=st.integers(0, 30), limit=st.integers(0, 3)),
)


def txns(ops: st.SearchStrategy[Op]) -> st.SearchStrategy[Txn]:
    branch = st.lists(ops, max_size=4).map(tuple)
    return st.builds(Txn, st.lists(compares, max_size=2).map(tuple), branch, branch)


nested = txns(st.one_of(simple, txns(st.one_of(simple, txns(simple)))))
# Most big transactions write a key twice and are refused; these fill the store and decide on it.
puts = st.builds(
    lambda put: Txn(success=(put,)), st.builds(Put, keys, st.sampled_from([b"x", b"y"]))
)
decisions = st.builds(
    lambda compare, yes, no: Txn((compare,), (yes,), (no,)), compares, simple, simple
)


@dataclass(frozen=True)
class Compact:
    back: int


@dataclass(frozen=True)
class Grant:
    lease: LeaseID


@dataclass(frozen=True)
class Revoke:
    lease: LeaseID


@dataclass(frozen=True)
class Reopen:
    pass


steps = st.lists(
    st.one_of(
        puts,
        puts,
        decisions,
        decisions,
        nested,
        st.builds(Compact, st.integers(0, 4)),
        st.builds(Grant, leases.filter(bool)),
        st.builds(Revoke, leases.filter(bool)),
        st.just(Reopen()),
    ),
    min_size=4,
    max_size=20,
)

State = dict[bytes, KeyValue]
OPERATORS: dict[Relation, Callable[[Any, Any], bool]] = {
    Relation.EQUAL: operator.eq,
    Relation.NOT_EQUAL: operator.ne,
    Relation.GREATER: operator.gt,
    Relation.LESS: operator.lt,
}


@dataclass
class Model:
    """Knows nothing of indexes or logs; a revision is a copy of everything."""

    states: dict[int, State] = field(default_factory=lambda: {1: {}})
    revision: int = 1
    compacted: int = 0
    leases: set[LeaseID] = field(default_factory=set)
    changes: dict[int, list[tuple[bytes, bool]]] = field(default_factory=dict)

    def run(self, txn: Txn) -> TxnResult:
        before = self.states[self.revision]
        after = dict(before)
        if not self.acceptable(txn):
            raise InvalidRequest("twice")
        self.check(txn, before)
        changed: list[tuple[bytes, bool]] = []
        result = self.execute(txn, before, after, changed)
        self.commit(after, changed)
        return result

    def commit(self, after: State, changed: list[tuple[bytes, bool]]) -> None:
        if changed:
            self.revision += 1
            self.states[self.revision] = after
            self.changes[self.revision] = changed

    def holds(self, txn: Txn, state: State) -> bool:
        for compare in txn.compares:
            test = OPERATORS[compare.relation]
            found = [kv for key, kv in state.items() if key in compare.span]
            if not found and compare.field is Expectation.VALUE:
                return False
            wanted = [getattr(kv, compare.field.value) for kv in found] or [0]
            if not all(test(value, compare.operand) for value in wanted):
                return False
        return True

    def check(self, txn: Txn, state: State) -> None:
        for op in txn.success if self.holds(txn, state) else txn.failure:
            if isinstance(op, Put) and op.lease and op.lease not in self.leases:
                raise LeaseNotFound(op.lease)
            if isinstance(op, Get) and op.revision:
                if op.revision > self.revision:
                    raise ValueError("future")
                if op.revision < self.compacted:
                    raise Compacted(self.compacted)
            if isinstance(op, Txn):
                self.check(op, state)

    def execute(
        self, txn: Txn, before: State, after: State, changed: list[tuple[bytes, bool]]
    ) -> TxnResult:
        taken = self.holds(txn, before)
        results: list[Any] = []
        new = self.revision + 1
        for op in txn.success if taken else txn.failure:
            if isinstance(op, Put):
                old = after.get(op.key)
                after[op.key] = KeyValue(
                    op.key,
                    op.value,
                    old.create_revision if old else new,
                    new,
                    old.version + 1 if old else 1,
                    op.lease,
                )
                changed.append((op.key, False))
                results.append(PutResult(new, old))
            elif isinstance(op, Delete):
                gone = [after.pop(key) for key in sorted(after) if key in op.span]
                changed += [(kv.key, True) for kv in gone]
                results.append(DeleteResult(new if changed else self.revision, tuple(gone)))
            elif isinstance(op, Get):
                source = self.states[op.revision] if op.revision else after
                found = [source[key] for key in sorted(source) if key in op.span]
                cut = found[: op.limit] if op.limit else found
                results.append(
                    RangeResult(self.revision, tuple(cut), len(found), len(cut) < len(found))
                )
            else:
                results.append(self.execute(op, before, after, changed))
        return TxnResult(new if changed else self.revision, taken, tuple(results))

    def acceptable(self, txn: Txn) -> bool:
        """Every path through the branches is walked: none may write a key twice."""
        return all(self.path_ok(path) for path in self.paths(txn.success) + self.paths(txn.failure))

    def paths(self, ops: tuple[Op, ...]) -> list[list[Op]]:
        found: list[list[Op]] = [[]]
        for op in ops:
            tails: list[list[Op]] = [[op]]
            if isinstance(op, Txn):
                tails = self.paths(op.success) + self.paths(op.failure)
            found = [head + tail for head in found for tail in tails]
        return found

    @staticmethod
    def path_ok(path: list[Op]) -> bool:
        puts = [op.key for op in path if isinstance(op, Put)]
        deletes = [op.span for op in path if isinstance(op, Delete)]
        return len(set(puts)) == len(puts) and not any(k in s for k in puts for s in deletes)

    def drop(self, lease: LeaseID) -> None:
        self.leases.discard(lease)
        before = self.states[self.revision]
        after = {key: kv for key, kv in before.items() if kv.lease != lease}
        self.commit(after, [(key, True) for key in sorted(before) if key not in after])


async def walk(program: list[Any], path: Path | None) -> None:
    keep = Retention(revisions=100_000, age_s=86_400.0)
    store = await EmbeddedBackend.open(path, retention=keep)
    model = Model()
    try:
        for step in program:
            if isinstance(step, Txn):
                expected = attempt(model, step)
                actual: Any
                try:
                    actual = await store.txn(step)
                except FutureRevision:
                    actual = ValueError
                except (InvalidRequest, LeaseNotFound, Compacted) as error:
                    actual = type(error)
                assert actual == expected, step
            elif isinstance(step, Compact):
                target = model.revision - step.back
                if target > model.compacted:
                    await store.compact(target)
                    model.compacted = target
            elif isinstance(step, Grant):
                if step.lease not in model.leases:
                    await store.grant(600, lease=step.lease)
                    model.leases.add(step.lease)
            elif isinstance(step, Revoke):
                if step.lease in model.leases:
                    await store.revoke(step.lease)
                    model.drop(step.lease)
            elif path is not None:
                await store.close()
                store = await EmbeddedBackend.open(path, retention=keep)
            assert store.revision == model.revision
        await compare(store, model)
    finally:
        await store.close()


async def compare(store: EmbeddedBackend, model: Model) -> None:
    assert store.compacted == model.compacted
    everything = Span(b"\0", None)
    first = max(model.compacted, 1)
    for revision in range(first, model.revision + 1):
        state = model.states[revision]
        read = await store.range(everything, revision=revision)
        assert read.kvs == tuple(state[key] for key in sorted(state))
    wanted = [r for r in sorted(model.changes) if r >= first]
    async with store.watch(everything, start_revision=first) as watch:
        for revision in wanted:
            batch = await watch.next()
            assert batch.revision == revision
            assert [(kv.key, kv.deleted) for kv in batch.changes] == model.changes[revision]
    for lease in await store.leases():
        held = sum(kv.lease == lease.id for kv in model.states[model.revision].values())
        assert lease.keys == held


def attempt(model: Model, txn: Txn) -> Any:
    try:
        return model.run(txn)
    except (InvalidRequest, LeaseNotFound, Compacted, ValueError) as error:
        return type(error)


@settings(max_examples=300, deadline=None)
@given(steps)
def test_memory_agrees_with_the_model(program: list[Any]) -> None:
    asyncio.run(walk(program, None))


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(program=steps)
def test_file_agrees_with_the_model_across_restarts(
    tmp_path_factory: Any, program: list[Any]
) -> None:
    asyncio.run(walk(program, tmp_path_factory.mktemp("model") / "store.sqlite"))
