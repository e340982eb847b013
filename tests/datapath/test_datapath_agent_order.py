"""What the agent writes into the kernel's maps when something goes wrong half way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cilia.bpf import constants, layout
from cilia.identity import EndpointID, NumericIdentity, cidr_labels
from cilia.labels import Labels
from cilia.policy import parse_documents
from services.agent.calculation import Calculation
from services.agent.clusterwatch import ClusterView, IdentityEntry, PolicyEntry, PolicyName
from services.agent.endpoint import Endpoint, EndpointState, SlotIndex
from services.agent.endpointtable import Endpoints
from services.agent.identityalloc import CidrIdentities, IdentityAllocator
from services.agent.ipam import Ipam
from services.agent.notifications import Notifier
from services.agent.policystate import PolicyStateFile
from services.agent.record import EndpointRecords
from services.agent.regeneration import Regeneration
from services.agent.restore import restore
from tests.datapath.harness import Node

WEB, DB = Labels.parse(["k8s:app=web"]), Labels.parse(["k8s:app=db"])
DENY = """
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: deny}
spec:
  endpointSelector: {}
  ingress: [{fromEntities: [all]}]
  ingressDeny: [{fromCIDR: [203.0.113.0/24]}]
"""
LOCK = """
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: lock}
spec:
  endpointSelector: {}
  ingress: [{}]
"""


def stored(text: str) -> PolicyEntry:
    result = parse_documents(text, source="test.yaml")
    assert not result.faults
    return PolicyEntry.of(result.documents[0])


NEWER = PolicyEntry(
    PolicyName("CiliumClusterwideNetworkPolicy", "", "lock"),
    b'{"spec": {"endpointSelector": {}, "ingress": [], "fromTheFuture": [{}]}}',
)


class Kernel:
    """The datapath adapter over the maps of a test's node."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.epochs = 0

    async def run(self, function: Callable[..., Any], *args: Any, **more: Any) -> Any:
        return function(*args, **more)

    def map(self, name: str) -> Any:
        return self.node.map(name)

    def host_network(self) -> Kernel:
        return self

    def links(self) -> list[Any]:
        return []

    async def raise_epoch(self) -> None:
        self.epochs += 1


class Agent:
    """The part of the agent between the cluster's view and the maps."""

    def __init__(self, node: Node, directory: Path, *policies: PolicyEntry) -> None:
        self.kernel = Kernel(node)
        self.view = ClusterView()
        self.load(*policies)
        self.endpoints = Endpoints()
        self.clock = 0.0
        self.cidrs = CidrIdentities(
            directory / "cidrs.json", release_delay_s=60, clock=lambda: self.clock
        )
        self.calculation = Calculation(
            mode="default", audit=False, allow_localhost=True, cluster="default", slots=64,
            cidrs=self.cidrs, router=[IPv4Address("10.217.0.1")],
        )  # fmt: skip
        self.announce: Callable[[], Coroutine[Any, Any, None]] = self.nothing
        self.regeneration = Regeneration(
            node="n", view=self.view, endpoints=self.endpoints, calculation=self.calculation,
            datapath=self.kernel,  # type: ignore[arg-type]  # what it calls of it
            notifier=Notifier(), saved=PolicyStateFile(directory),
            announce=lambda: self.announce(), settle_proxies=self.no_proxies, policy_limit=1024,
        )  # fmt: skip

    async def no_proxies(self, _: object) -> frozenset[str]:
        """No policy here has L7 rules."""
        return frozenset()

    async def nothing(self) -> None:
        """Nobody to tell."""

    def load(self, *policies: PolicyEntry) -> None:
        identities = [
            IdentityEntry(NumericIdentity(300), WEB),
            IdentityEntry(NumericIdentity(301), DB),
        ]
        self.view.load(policies=policies, policy_revision=1, identities=identities, store_id=1)

    def endpoint(self, number: int, identity: int | None, ifindex: int) -> Endpoint:
        return Endpoint(
            id=EndpointID(number), name=f"e{number}", namespace="default", labels=WEB,
            identity_labels=DB if identity == 301 else WEB, netns="/none", netns_inode=number,
            interface="eth0", host_interface=f"cil{number:05d}", ifindex=ifindex, wired=True,
            ipv4=IPv4Address(f"10.217.0.{number}"), ipv6=IPv6Address(f"fd00:c111::{number:x}"),
            identity=None if identity is None else NumericIdentity(identity),
            state=EndpointState.READY,
        )  # fmt: skip

    def row(self, ifindex: int) -> Any:
        raw = self.kernel.map("cilia_ifindex").lookup(ifindex.to_bytes(4, "little"))
        return None if raw is None else np.frombuffer(raw, layout.ENDPOINT)[0]

    def open(self, ifindex: int) -> bool:
        row = self.row(ifindex)
        return row is not None and bool(row["flags"] & constants.EP_F_OPEN)

    def rows_of(self, slot: int) -> list[tuple[int, bool]]:
        """(identity, denies) of each row of a slot."""
        inner = self.regeneration.policymap.maps._actual[slot].inner
        keys, values = inner.items_np(layout.POLICY_KEY, layout.POLICY_VALUE)
        return [
            (int(k["identity"]), bool(v["flags"] & constants.POLICY_F_DENY))
            for k, v in zip(keys, values, strict=True)
        ]


@pytest.fixture
def empty(node: Node) -> Node:
    """No endpoints, no policies."""
    for name in ("cilia_lxc", "cilia_ifindex", "cilia_ipcache"):
        for key in list(node.map(name).keys()):
            node.map(name).delete(key)
    for slot in range(64):
        node.map("cilia_policy").clear_inner(slot)
        meta = np.zeros(1, layout.POLICY_META)
        node.map("cilia_policy_meta").update(slot.to_bytes(4, "little"), meta.tobytes())
    return node


def test_the_epoch_is_raised_after_a_flush_that_failed(empty: Node, tmp_path: Path) -> None:
    """Else a connection that was admitted under its peer's old name would never be asked again."""
    agent = Agent(empty, tmp_path, stored(DENY))

    async def broken() -> None:
        raise RuntimeError("announcing failed")

    async def scenario() -> None:
        await agent.regeneration.read_back()
        await agent.regeneration.flush()
        before = agent.kernel.epochs
        agent.announce = broken
        agent.regeneration.set_host_addresses(frozenset({IPv4Address("192.0.2.77")}))
        with pytest.raises(RuntimeError):
            await agent.regeneration.flush()
        agent.announce = agent.nothing
        await agent.regeneration.flush()
        assert agent.kernel.epochs == before + 1
        await agent.regeneration.flush()
        assert agent.kernel.epochs == before + 1  # nothing changed

    asyncio.run(scenario())


def test_the_epoch_is_raised_for_what_changed_between_flushes(empty: Node, tmp_path: Path) -> None:
    agent = Agent(empty, tmp_path, stored(DENY))

    async def scenario() -> None:
        await agent.regeneration.read_back()
        agent.endpoints.insert(agent.endpoint(5, 300, 105), "")
        await agent.regeneration.flush()
        before = agent.kernel.epochs
        await agent.regeneration.close(EndpointID(5))
        agent.endpoints.remove(EndpointID(5))
        agent.endpoints.insert(agent.endpoint(5, 300, 105), "")
        await agent.regeneration.write_closed(EndpointID(5))
        await agent.regeneration.flush()
        assert agent.kernel.epochs > before

    asyncio.run(scenario())


def test_what_changes_during_a_flush_is_for_the_next(empty: Node, tmp_path: Path) -> None:
    """A flush looks at what changed only: what it has passed already must not be forgotten."""
    agent = Agent(empty, tmp_path, stored(DENY))

    async def identity_comes() -> None:
        agent.endpoints.update(EndpointID(5), identity=NumericIdentity(300))

    async def scenario() -> None:
        await agent.regeneration.read_back()
        await agent.regeneration.flush()
        agent.endpoints.insert(agent.endpoint(5, None, 105), "")
        agent.announce = identity_comes
        await agent.regeneration.flush()
        assert not agent.open(105)
        agent.announce = agent.nothing
        await agent.regeneration.flush()
        assert agent.open(105)
        assert agent.endpoints.get(EndpointID(5)).open

    asyncio.run(scenario())


def test_what_a_failed_flush_left_is_for_the_next(empty: Node, tmp_path: Path) -> None:
    agent = Agent(empty, tmp_path, stored(DENY))

    async def broken() -> None:
        raise RuntimeError("announcing failed")

    async def scenario() -> None:
        await agent.regeneration.read_back()
        await agent.regeneration.flush()
        agent.endpoints.insert(agent.endpoint(5, 300, 105), "")
        agent.announce = broken
        with pytest.raises(RuntimeError):
            await agent.regeneration.flush()
        assert not agent.open(105)
        agent.announce = agent.nothing
        await agent.regeneration.flush()
        assert agent.open(105)

    asyncio.run(scenario())


def test_the_slot_of_who_is_deleted_is_emptied_at_once(empty: Node, tmp_path: Path) -> None:
    """Not by the flush that the next endpoint waits for, while a row leads there not at all."""
    agent = Agent(empty, tmp_path, stored(LOCK))

    async def scenario() -> None:
        regeneration = agent.regeneration
        await regeneration.read_back()
        agent.endpoints.insert(agent.endpoint(5, 300, 105), "")
        await regeneration.flush()
        slot = int(agent.row(105)["policy_slot"])
        agent.endpoints.move(EndpointID(5), EndpointState.DISCONNECTING, "")
        await regeneration.close(EndpointID(5))
        await regeneration.flush()
        assert agent.kernel.map("cilia_policy").inner_id(slot) is None

    asyncio.run(scenario())


def test_a_prefix_that_comes_back_is_what_policy_calls_it(empty: Node, tmp_path: Path) -> None:
    """Released by whomever: the ipcache and the rows that deny it must use one number."""
    agent = Agent(empty, tmp_path, stored(DENY))
    prefix = IPv4Network("203.0.113.0/24")

    async def scenario() -> None:
        regeneration = agent.regeneration
        await regeneration.read_back()
        agent.endpoints.insert(agent.endpoint(5, 300, 105), "")
        await regeneration.flush()
        agent.load()
        regeneration.pending.policies.add(stored(DENY).name)
        await regeneration.flush()
        agent.clock += 61
        agent.cidrs.release_due()
        agent.load(stored(DENY))
        regeneration.pending.policies.add(stored(DENY).name)
        await regeneration.flush()
        row = regeneration.ipcache_rows.get(prefix)
        assert row is not None
        assert agent.calculation.labels_of(row.identity) == cidr_labels(prefix)
        assert (row.identity, True) in agent.rows_of(int(agent.row(105)["policy_slot"]))

    asyncio.run(scenario())


def test_a_policy_that_is_not_understood_opens_nothing(empty: Node, tmp_path: Path) -> None:
    """After a start nobody knows an older form of it. What is in force stays, the rest waits."""
    before = Agent(empty, tmp_path, stored(LOCK))

    async def first() -> None:
        await before.regeneration.read_back()
        before.endpoints.insert(before.endpoint(5, 300, 105), "")
        await before.regeneration.flush()

    asyncio.run(first())
    old = before.endpoints.get(EndpointID(5))
    assert before.open(105)
    assert old.ingress_enforced

    after = Agent(empty, tmp_path, NEWER)

    async def second() -> None:
        regeneration, calculation = after.regeneration, after.calculation
        await regeneration.read_back()
        restored = after.endpoint(5, 300, 105)
        subject = calculation.subject_of(restored)
        assert subject is not None
        assert calculation.slots.adopt(subject, old.slot)
        after.endpoints.insert(restored, "")
        after.endpoints.update(
            EndpointID(5), realised=subject, slot=old.slot, realised_identity=restored.identity
        )
        after.endpoints.insert(after.endpoint(6, 301, 106), "")
        for _ in range(2):
            await regeneration.flush()
            assert after.open(105)
            assert int(after.row(105)["policy_slot"]) == old.slot
            assert regeneration.policymap.maps.rev(old.slot)
            assert after.rows_of(old.slot) == before.rows_of(old.slot)
            assert not after.open(106)
            assert "lock" in after.endpoints.get(EndpointID(6)).message
        # Understood after all: everything is made current.
        after.load(stored(LOCK))
        regeneration.pending.policies.add(NEWER.name)
        await regeneration.flush()
        assert after.open(105)
        assert after.open(106)
        assert after.endpoints.get(EndpointID(6)).ingress_enforced
        assert not after.endpoints.get(EndpointID(6)).message

    asyncio.run(second())


def test_slots_that_rows_lead_to_are_not_given_away(empty: Node, tmp_path: Path) -> None:
    """An endpoint whose record says less than its row: nobody's policy but its own may be there."""
    before = Agent(empty, tmp_path, stored(LOCK))

    async def first() -> None:
        await before.regeneration.read_back()
        before.endpoints.insert(before.endpoint(5, 300, 105), "")
        await before.regeneration.flush()

    asyncio.run(first())
    slot = SlotIndex(int(before.row(105)["policy_slot"]))

    after = Agent(empty, tmp_path, stored(LOCK))

    async def second() -> None:
        await restored(after, tmp_path)
        after.endpoints.insert(after.endpoint(6, 301, 106), "")
        await after.regeneration.flush()
        assert after.endpoints.get(EndpointID(6)).slot != slot

    asyncio.run(second())


def test_numbers_of_prefixes_that_were_lost_are_not_given_again(
    empty: Node, tmp_path: Path
) -> None:
    """Policy is written before the ipcache: a packet would be judged by another prefix's rule."""
    before = Agent(empty, tmp_path, stored(DENY))

    async def first() -> None:
        await before.regeneration.read_back()
        await before.regeneration.flush()

    asyncio.run(first())
    known = before.regeneration.ipcache_rows.get(IPv4Network("203.0.113.0/24"))
    assert known is not None

    other = stored(DENY.replace("203.0.113.0/24", "198.51.100.0/24"))
    after = Agent(empty, tmp_path, other)

    async def second() -> None:
        await restored(after, tmp_path)
        await after.regeneration.flush()
        row = after.regeneration.ipcache_rows.get(IPv4Network("198.51.100.0/24"))
        assert row is not None
        assert row.identity > known.identity

    asyncio.run(second())


async def restored(agent: Agent, directory: Path) -> None:
    """The agent after a start that found no records."""
    await restore(
        records=EndpointRecords(directory / "endpoints"),
        endpoints=agent.endpoints,
        ipam=Ipam(IPv4Network("10.217.0.0/16"), IPv6Network("fd00:c111::/64")),
        allocator=IdentityAllocator(None),  # type: ignore[arg-type]  # nobody asks
        calculation=agent.calculation,
        regeneration=agent.regeneration,
        wiring=_NoWires(),  # type: ignore[arg-type]  # nothing is restored
        conntrack=None,  # type: ignore[arg-type]  # nothing is purged
        datapath=agent.kernel,  # type: ignore[arg-type]  # what it calls of it
    )


class _NoWires:
    def mark_synced(self) -> None:
        """There are none."""
