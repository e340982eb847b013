"""Somebody writes into the maps: it is found, told and mended, row by row."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from cilia.bpf import Map
from cilia.bpf.layout import (
    ENDPOINT,
    IPCACHE_KEY,
    POLICY_KEY,
    POLICY_META,
    POLICY_VALUE,
    plen_egress,
    to_addr,
)
from protos.agent.v1 import agent_pb2 as pb
from protos.identity.v1 import identity_pb2
from tests.integration.agentnode import ROOT, AgentNode, eventually
from tests.integration.test_agent_policy import ALLOW_FRIEND

pytestmark = pytest.mark.usefixtures("need_bpf", "need_netns", "need_bpffs", "need_objects")


@pytest.fixture(scope="module")
def running() -> Iterator[AgentNode]:
    with AgentNode("kaud") as node:
        node.flags = ("--resync-interval", "3600")  # only when asked
        node.start("identity")
        node.start("agent")
        for name in ("server", "friend", "stranger"):
            node.workload(name, f"app={name}")
        node.apply(ALLOW_FRIEND)
        yield node


@pytest.fixture
def node(running: AgentNode) -> Iterator[AgentNode]:
    assert audit(running).drifted == 0  # as the test before left it
    yield running
    assert audit(running).drifted == 0


def audit(node: AgentNode) -> pb.AuditKernelResponse:
    found: pb.AuditKernelResponse = node.policy.AuditKernel(pb.AuditKernelRequest(), timeout=30)
    return found


@contextlib.contextmanager
def pinned(node: AgentNode, name: str) -> Iterator[Map]:
    with contextlib.closing(
        Map.open_pinned(node.run_dir / "bpf" / "cilia" / "maps" / name)
    ) as found:
        yield found


def slot_of(node: AgentNode, name: str) -> int:
    with pinned(node, "cilia_lxc") as lxc:
        raw = lxc.lookup(to_addr(node.get(name).ipv4))
        assert raw is not None
        return int(np.frombuffer(raw, ENDPOINT)[0]["policy_slot"])


@contextlib.contextmanager
def rows_of(node: AgentNode, slot: int) -> Iterator[Map]:
    with pinned(node, "cilia_policy") as outer:
        inner_id = outer.inner_id(slot)
        assert inner_id is not None
        with contextlib.closing(Map.from_id(inner_id)) as inner:
            yield inner


def policy_row(identity: int, **fields: int) -> tuple[bytes, bytes]:
    key, value = np.zeros(1, POLICY_KEY), np.zeros(1, POLICY_VALUE)
    key["identity"] = identity
    key["l4_plen_egress"] = plen_egress(0, False)
    for name, what in fields.items():
        value[name] = what
    return key.tobytes(), value.tobytes()


def test_a_whole_node_agrees(node: AgentNode) -> None:
    report = audit(node)
    assert (report.drifted, report.repaired, list(report.skipped)) == (0, True, [])
    assert report.policies >= 3
    assert report.rows > 10
    assert report.cells > 50


def test_a_row_that_lets_a_stranger_in(node: AgentNode) -> None:
    server, stranger = node.get("server"), node.get("stranger")
    slot = slot_of(node, "server")
    with rows_of(node, slot) as rows:
        rows.update(*policy_row(stranger.identity))
    with node.stream("stranger", "server", server.ipv4) as stream:
        assert stream.works(within_s=10)
        report = audit(node)
        assert (report.drifted, report.repaired) == (1, True)
        (row,) = report.drifts
        assert row.map == "cilia_policy"
        assert row.row == f"slot {slot} ingress from identity {stranger.identity} on any port"
        assert (row.expected, row.found) == ("absent", "allow, no rule")
        assert list(row.endpoints) == ["default/server"]
        # What the row had admitted is cut, although nobody changed a policy.
        assert not stream.works()
    status = node.component("kernel-proof")
    assert status.state == "Warning"
    assert "repaired" in status.message
    assert not node.ping("stranger", server.ipv4)
    assert node.ping("friend", server.ipv4)


def test_a_row_that_is_gone_names_its_rule(node: AgentNode) -> None:
    server = node.get("server")
    with rows_of(node, slot_of(node, "server")) as rows:
        keys, _ = rows.items_np(POLICY_KEY, POLICY_VALUE)
        named = [k for k in keys if k["identity"] == node.get("friend").identity]
        assert named
        for key in named:
            rows.delete(key.tobytes())
    assert not node.ping("friend", server.ipv4)
    report = audit(node)
    assert report.repaired
    assert {drift.found for drift in report.drifts} == {"absent"}
    assert {drift.rule.policy for drift in report.drifts} == {"CiliumNetworkPolicy default/friends"}
    assert {drift.rule.path for drift in report.drifts} == {"spec.ingress[0]"}
    assert node.ping("friend", server.ipv4)


@pytest.mark.parametrize("field", ["rev", "plens_any", "flags"])
def test_a_meta_row(node: AgentNode, field: str) -> None:
    slot = slot_of(node, "server")
    with pinned(node, "cilia_policy_meta") as metas:
        raw = metas.lookup(slot.to_bytes(4, "little"))
        assert raw is not None
        meta = np.frombuffer(raw, POLICY_META).copy()
        before = int(meta[0]["rev"])
        meta[field] = 77 if field == "rev" else 1
        metas.update(slot.to_bytes(4, "little"), meta.tobytes())
        report = audit(node)
        assert [drift.map for drift in report.drifts] == ["cilia_policy_meta"]
        assert report.repaired
        raw = metas.lookup(slot.to_bytes(4, "little"))
        assert raw is not None
        assert int(np.frombuffer(raw, POLICY_META)[0]["rev"]) > max(before, 77)
    assert not node.ping("stranger", node.get("server").ipv4)


def ipcache_key(address: str) -> bytes:
    key = np.zeros(1, IPCACHE_KEY)
    key["prefixlen"] = 128
    key["addr"] = np.void(to_addr(ipaddress.ip_address(address)))
    return key.tobytes()


def test_an_ipcache_row(node: AgentNode) -> None:
    stranger, friend = node.get("stranger"), node.get("friend")
    with pinned(node, "cilia_ipcache") as ipcache:
        real = ipcache.lookup(ipcache_key(stranger.ipv4))
        fake = ipcache.lookup(ipcache_key(friend.ipv4))
        assert real is not None
        assert fake is not None
        assert real != fake
        ipcache.update(ipcache_key(stranger.ipv4), fake)
        ipcache.delete(ipcache_key(friend.ipv4))
        ipcache.update(ipcache_key("192.0.2.77"), fake)
        report = audit(node)
        assert report.repaired
        assert sorted((d.map, d.row, d.found) for d in report.drifts) == sorted(
            [
                ("cilia_ipcache", f"{stranger.ipv4}/32", f"identity {friend.identity}"),
                ("cilia_ipcache", f"{friend.ipv4}/32", "absent"),
                ("cilia_ipcache", "192.0.2.77/32", f"identity {friend.identity}"),
            ]
        )
        assert ipcache.lookup(ipcache_key(stranger.ipv4)) == real
        assert ipcache.lookup(ipcache_key(friend.ipv4)) == fake
        assert ipcache.lookup(ipcache_key("192.0.2.77")) == ipcache.lookup(
            ipcache_key("192.0.2.78")
        )


@pytest.mark.parametrize("how", ["identity", "closed", "gone", "by interface"])
def test_an_endpoint_row(node: AgentNode, how: str) -> None:
    server = node.get("server")
    key = to_addr(ipaddress.ip_address(server.ipv4))
    name = "cilia_lxc"
    with pinned(node, "cilia_lxc") as lxc:
        raw = lxc.lookup(key)
        assert raw is not None
    row = np.frombuffer(raw, ENDPOINT).copy()
    if how == "identity":
        row["identity"] = 4711
    elif how == "closed":
        row["flags"] = 0
    elif how == "by interface":
        name, key = "cilia_ifindex", int(row[0]["ifindex"]).to_bytes(4, "little")
        row["policy_slot"] = slot_of(node, "stranger")
    with pinned(node, name) as table:
        if how == "gone":
            table.delete(key)
        else:
            table.update(key, row.tobytes())
        report = audit(node)
        assert [drift.map for drift in report.drifts] == [name]
        assert report.repaired
        assert table.lookup(key) == raw
    assert node.ping("friend", server.ipv4)


def test_a_policy_that_was_swapped(node: AgentNode) -> None:
    """Another map in the slot, as whole as its own."""
    slot, other = slot_of(node, "server"), slot_of(node, "stranger")
    with pinned(node, "cilia_policy") as outer, rows_of(node, other) as open_to_all:
        outer.set_inner(slot, open_to_all)
    assert not node.ping("friend", node.get("server").ipv4)
    report = audit(node)
    assert report.repaired
    assert {drift.map for drift in report.drifts} == {"cilia_policy"}
    assert node.ping("friend", node.get("server").ipv4)
    assert node.ping("stranger", node.get("friend").ipv4)  # whose map it was has it still


ONLY_AUDITS = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata:
  name: tried
  namespace: default
  annotations: {cilia.io/audit: "true"}
spec:
  endpointSelector: {matchLabels: {app: stranger}}
  ingress: [{fromEndpoints: [{matchLabels: {app: friend}}]}]
"""


def test_a_policy_that_only_audits(node: AgentNode) -> None:
    """Its denials pass and are told; the kernel's answers are the engine's all the same."""
    node.apply(ONLY_AUDITS)
    stranger, server = node.get("stranger"), node.get("server")
    stream = node.monitor.Monitor(
        pb.MonitorRequest(types=["verdict"], endpoint_ids=[stranger.id]), timeout=20
    )
    stream.initial_metadata()
    assert node.ping("server", stranger.ipv4)
    found = next(event for event in stream if event.direction == "ingress")
    stream.cancel()
    assert (found.verdict, found.reason_code) == ("AUDIT", 133)
    assert found.source.identity == server.identity
    assert not node.ping("stranger", server.ipv4)  # by the other policy, which is enforced
    assert audit(node).drifted == 0
    node.policy.Delete(
        pb.DeleteRequest(
            names=[
                identity_pb2.PolicyName(
                    kind="CiliumNetworkPolicy", namespace="default", name="tried"
                )
            ],
            wait=True,
        ),
        timeout=20,
    )


def test_by_itself_and_by_the_command_line() -> None:
    with AgentNode("kaub") as node:
        node.flags = ("--resync-interval", "1", "--policy-audit-mode", "on")
        node.start("identity")
        node.start("agent")
        node.workload("server", "app=server")
        node.apply(ALLOW_FRIEND)
        eventually(
            lambda: "cells answer as the engine" in node.component("kernel-proof").message,
            within_s=30,
            what="a round over all cells ends",
        )
        # What is only audited is tried, and heard.
        eventually(
            lambda: "default/server" in node.component("audit-mode").message,
            within_s=30,
            what="the self-test is heard",
        )
        assert "was reported" in node.component("audit-mode").message
        stream = node.monitor.Monitor(pb.MonitorRequest(types=["verdict"]), timeout=20)
        event = next(event for event in stream if "self-test" in event.explanation)
        stream.cancel()
        assert event.verdict == "AUDIT"
        assert "default/server" in (event.source.name, event.destination.name)

        slot = slot_of(node, "server")
        with rows_of(node, slot) as rows:
            key, value = next(iter(rows.items()))
            rows.delete(key)

        def mended() -> bool:
            with rows_of(node, slot) as rows:  # a map of its own by then
                return rows.lookup(key) == value

        eventually(mended, within_s=30, what="the row is written again")
        words = [sys.executable, "-m", "cli", "--agent-socket", str(node.run_dir / "agent.sock")]
        done = subprocess.run(
            [*words, "policy", "audit-kernel", "-o", "json"],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert (said["drifted"], said["repaired"], said["drifts"]) == (0, None, [])
        assert "was reported" in said["selftest"]
        assert node.component("kernel-proof").state == "Warning"  # of what was repaired
