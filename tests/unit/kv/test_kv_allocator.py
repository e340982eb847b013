"""Identities are unique, shared by equal labels, and never swept from under a user."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cilia.kv import Allocator, Collector, EmbeddedBackend, LeaseID, LeaseNotFound, Span
from cilia.kv.allocator import (
    ID_PREFIX,
    KEY_PREFIX,
    QUARANTINE_PREFIX,
    REF_PREFIX,
    IdentitySpaceExhausted,
)
from cilia.labels import Labels


def labels(name: object) -> Labels:
    return Labels.parse([f"k8s:app={name}", "k8s:ns=default"])


async def stored(store: EmbeddedBackend, prefix: bytes) -> dict[bytes, bytes]:
    kvs = (await store.range(Span.prefix(prefix))).kvs
    return {kv.key[len(prefix) :]: kv.value for kv in kvs}


async def check_invariants(store: EmbeddedBackend) -> dict[int, Labels]:
    """key and id say the same; no number twice; nothing in use is in quarantine."""
    ids = {
        int(key): Labels.from_canonical(v) for key, v in (await stored(store, ID_PREFIX)).items()
    }
    keys = {int(value) for value in (await stored(store, KEY_PREFIX)).values()}
    assert keys == set(ids)
    assert len(await stored(store, KEY_PREFIX)) == len(ids)
    assert len(set(ids.values())) == len(ids)
    quarantined = {int(key) for key in await stored(store, QUARANTINE_PREFIX)}
    assert not quarantined & set(ids)
    return ids


async def test_many_nodes_agree(store: EmbeddedBackend) -> None:
    """32 nodes, each knowing nothing of the others, in a space so small that they collide."""
    nodes, sets = 32, 40
    got: list[dict[Labels, int]] = [{} for _ in range(nodes)]
    allocators = [Allocator(backend=store, low=256, high=256 + 2 * sets) for _ in range(nodes)]

    async def node(number: int) -> None:
        lease = (await store.grant(60)).id
        order = [*range(sets)]
        random.Random(number).shuffle(order)
        for name in [*order, f"only-{number}" if number < 8 else 0]:
            allocation = await allocators[number].allocate(
                labels(name), node=f"node{number}", lease=lease
            )
            got[number][labels(name)] = allocation.id

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        for number in range(nodes):
            group.create_task(node(number))
    agreed: dict[Labels, int] = {}
    for mine in got:
        for key, number in mine.items():
            assert agreed.setdefault(key, number) == number
    assert len(set(agreed.values())) == len(agreed) == sets + 8
    assert await check_invariants(store) == {number: key for key, number in agreed.items()}
    assert sum(a.stats.created for a in allocators) == sets + 8
    assert sum(a.stats.conflicts for a in allocators) > 0, "the space was small enough to collide"
    assert len(await allocators[0].nodes_of(labels(0))) == nodes


async def test_allocation_is_one_transaction_and_idempotent(store: EmbeddedBackend) -> None:
    lease = (await store.grant(60)).id
    allocator = Allocator(backend=store)
    first = await allocator.allocate(labels("a"), node="n", lease=lease)
    assert first.is_new
    assert store.revision == 2
    again = await allocator.allocate(labels("a"), node="n", lease=lease)
    assert (again.id, again.is_new, store.revision) == (first.id, False, 3)
    assert await allocator.labels_of(first.id) == labels("a")
    assert await allocator.find(labels("a")) == first.id
    assert await allocator.find(labels("b")) is None


async def test_labels_in_another_order_are_the_same_labels(store: EmbeddedBackend) -> None:
    lease = (await store.grant(60)).id
    allocator = Allocator(backend=store)
    one = Labels.parse(["k8s:a=1", "k8s:b=2"])
    two = Labels.parse(["k8s:b=2", "k8s:a=1"])
    first = await allocator.allocate(one, node="n", lease=lease)
    assert (await allocator.allocate(two, node="n", lease=lease)).id == first.id


async def test_without_a_lease_there_is_no_allocation(store: EmbeddedBackend) -> None:
    with pytest.raises(LeaseNotFound):
        await Allocator(backend=store).allocate(labels("a"), node="n", lease=LeaseID(9))
    assert store.revision == 1


async def test_the_space_can_be_filled_to_the_last_number(store: EmbeddedBackend) -> None:
    lease = (await store.grant(60)).id
    allocator = Allocator(backend=store, low=256, high=287)
    for name in range(32):
        await allocator.allocate(labels(name), node="n", lease=lease)
    with pytest.raises(IdentitySpaceExhausted) as caught:
        await allocator.allocate(labels("more"), node="n", lease=lease)
    assert "256 to 287" in caught.value.message
    assert len(await check_invariants(store)) == 32
    assert (await allocator.allocate(labels(5), node="m", lease=lease)).is_new is False


async def test_collection_takes_two_rounds_and_quarantines_the_number(
    store: EmbeddedBackend,
) -> None:
    lease = (await store.grant(60)).id
    allocator = Allocator(backend=store, low=300, high=300)
    collector = Collector(backend=store, quarantine_s=1, stats=allocator.stats)
    await allocator.allocate(labels("a"), node="n", lease=lease)
    for _ in range(3):
        assert await collector.collect() == 0
    await allocator.release(labels("a"), node="n")
    assert await collector.collect() == 0
    assert collector.marked == 1
    assert await collector.collect() == 1
    assert await check_invariants(store) == {}
    assert await stored(store, QUARANTINE_PREFIX) == {b"300": b""}
    with pytest.raises(IdentitySpaceExhausted):
        await allocator.allocate(labels("b"), node="n", lease=lease)
    async with store.watch(Span.prefix(QUARANTINE_PREFIX), start_revision=store.revision) as watch:
        async with asyncio.timeout(5):
            while not (await watch.next()).changes[0].deleted:
                pass
    assert (await allocator.allocate(labels("b"), node="n", lease=lease)).id == 300


async def test_a_reference_between_the_rounds_saves_the_identity(store: EmbeddedBackend) -> None:
    lease = (await store.grant(60)).id
    allocator = Allocator(backend=store)
    collector = Collector(backend=store, quarantine_s=60)
    first = await allocator.allocate(labels("a"), node="n", lease=lease)
    await allocator.release(labels("a"), node="n")
    await collector.collect()
    await allocator.allocate(labels("a"), node="other", lease=lease)
    assert await collector.collect() == 0
    assert await allocator.find(labels("a")) == first.id


async def test_the_end_of_a_nodes_lease_frees_what_only_it_used(store: EmbeddedBackend) -> None:
    gone, stays = (await store.grant(60)).id, (await store.grant(60)).id
    allocator = Allocator(backend=store)
    collector = Collector(backend=store, quarantine_s=60)
    await allocator.allocate(labels("mine"), node="gone", lease=gone)
    shared = await allocator.allocate(labels("ours"), node="gone", lease=gone)
    await allocator.allocate(labels("ours"), node="stays", lease=stays)
    await store.revoke(gone)
    await collector.collect()
    assert await collector.collect() == 1
    assert await check_invariants(store) == {shared.id: labels("ours")}


@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(2, 6))
def test_collection_races_with_allocation(rng: random.Random, nodes: int) -> None:
    """Nodes take and drop references while several collectors run without a pause. Whoever holds a
    reference finds its labels under its number, at every moment."""

    async def main() -> None:
        store = await EmbeddedBackend.open(None)
        held: dict[tuple[str, Labels], int] = {}

        async def node(name: str) -> None:
            lease = (await store.grant(60)).id
            allocator = Allocator(backend=store, low=256, high=300)
            for _ in range(30):
                wanted = labels(rng.randrange(4))
                if (name, wanted) in held:
                    del held[name, wanted]
                    await allocator.release(wanted, node=name)
                else:
                    number = (await allocator.allocate(wanted, node=name, lease=lease)).id
                    held[name, wanted] = number
                for _ in range(rng.randrange(3)):
                    await asyncio.sleep(0)
                ids = {
                    int(kv.key[len(ID_PREFIX) :]): kv.value
                    for kv in (await store.range(Span.prefix(ID_PREFIX))).kvs
                }
                for (_, known), mine in held.items():
                    assert ids.get(mine) == known.canonical()

        async def collect(collector: Collector) -> None:
            while True:
                await collector.collect()
                await asyncio.sleep(0)

        async with asyncio.TaskGroup() as group:
            collectors = [Collector(backend=store, quarantine_s=1) for _ in range(2)]
            sweeping = [group.create_task(collect(collector)) for collector in collectors]
            async with asyncio.TaskGroup() as working:
                for number in range(nodes):
                    working.create_task(node(f"n{number}"))
            for task in sweeping:
                task.cancel()
        ids = await check_invariants(store)
        refs = {key.split(b"/")[0] for key in await stored(store, REF_PREFIX)}
        keys = set(await stored(store, KEY_PREFIX))
        assert refs <= keys, "a reference without its identity"
        assert {(n, k) for (_, k), n in held.items()} <= set(ids.items())
        await store.close()

    asyncio.run(main())
