"""One node, real workloads: what policy says is what packets meet, from the first one on."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator

import grpc
import pytest

from protos.agent.v1 import agent_pb2 as pb
from protos.identity.v1 import identity_pb2
from tests.integration.agentnode import WORLD4, WORLD6, AgentNode, eventually, refused

pytestmark = pytest.mark.usefixtures("need_bpf", "need_netns", "need_bpffs", "need_objects")

ALLOW_FRIEND = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: friends}
spec:
  endpointSelector: {matchLabels: {app: server}}
  ingress:
  - fromEndpoints:
    - matchLabels: {app: friend}
"""


@pytest.fixture(scope="module")
def running() -> Iterator[AgentNode]:
    with AgentNode("pol") as node:
        node.start("identity")
        node.start("agent")
        node.workload("server", "app=server")
        node.workload("friend", "app=friend")
        node.workload("stranger", "app=stranger")
        node.workload("pod", "k8s:role=pod")
        node.workload("peer", "k8s:role=peer")
        yield node


@pytest.fixture
def node(running: AgentNode) -> Iterator[AgentNode]:
    yield running
    running.delete_policies()


def addresses(endpoint: pb.Endpoint) -> tuple[str, str]:
    return endpoint.ipv4, endpoint.ipv6


def test_without_policy_all_reach_all_in_both_families(node: AgentNode) -> None:
    server = node.get("server")
    assert server.state == "ready"
    assert not server.ingress_enforced
    for address in addresses(server):
        assert node.ping("friend", address)
        assert node.ping("stranger", address)


def test_policy_allows_the_friend_and_denies_the_stranger(node: AgentNode) -> None:
    server = node.get("server")
    applied = node.apply(ALLOW_FRIEND)
    assert applied.realised
    for address in addresses(server):
        assert node.ping("friend", address)
        assert not node.ping("stranger", address)
    assert node.get("server").ingress_enforced


def test_world_is_reached_by_masquerade_and_gateway_answers(node: AgentNode) -> None:
    assert node.ping("friend", WORLD4)
    assert node.ping("friend", WORLD6)
    assert node.ping("friend", "10.217.0.1")


def test_node_reaches_its_endpoints_whatever_policy_says(node: AgentNode) -> None:
    node.apply(ALLOW_FRIEND)
    for address in addresses(node.get("server")):
        assert node.ping("node", address)


def test_deleting_the_rule_cuts_a_live_stream_and_restoring_it_mends_new_ones(
    node: AgentNode,
) -> None:
    node.apply(ALLOW_FRIEND)
    deny_all = ALLOW_FRIEND.replace("app: friend", "app: nobody")
    with node.stream("friend", "server", node.get("server").ipv4) as stream:
        stream.exchange()
        node.apply(deny_all)
        assert not stream.works()
    node.apply(ALLOW_FRIEND)
    with node.stream("friend", "server", node.get("server").ipv6) as stream:
        stream.exchange()


def test_relabelling_the_peer_cuts_a_live_stream(node: AgentNode) -> None:
    node.apply(ALLOW_FRIEND)
    before = node.get("friend").identity
    with node.stream("friend", "server", node.get("server").ipv4) as stream:
        stream.exchange()
        node.relabel("friend", add=("app=enemy",))
        try:
            assert node.get("friend").identity != before
            assert not stream.works()
            assert not node.ping("friend", node.get("server").ipv6)
        finally:
            node.relabel("friend", add=("app=friend",))
    assert node.get("friend").identity == before
    assert node.ping("friend", node.get("server").ipv4)


def test_enforcement_option_of_one_endpoint(node: AgentNode) -> None:
    ref = pb.EndpointRef(name="server")
    node.endpoints.SetConfig(
        pb.SetConfigRequest(ref=ref, options={"PolicyEnforcement": "always"}), timeout=10
    )
    assert not node.ping("friend", node.get("server").ipv4)
    node.endpoints.SetConfig(
        pb.SetConfigRequest(ref=ref, options={"PolicyEnforcement": "node"}), timeout=10
    )
    assert node.ping("friend", node.get("server").ipv4)


def test_audit_reports_and_lets_pass(node: AgentNode) -> None:
    node.apply(ALLOW_FRIEND)
    ref = pb.EndpointRef(name="server")
    node.endpoints.SetConfig(
        pb.SetConfigRequest(ref=ref, options={"PolicyAudit": "Enabled"}), timeout=10
    )
    try:
        assert node.ping("stranger", node.get("server").ipv4)
    finally:
        node.endpoints.SetConfig(
            pb.SetConfigRequest(ref=ref, options={"PolicyAudit": "node"}), timeout=10
        )
    assert not node.ping("stranger", node.get("server").ipv4)


def test_monitor_explains_an_allow_and_a_default_deny(node: AgentNode) -> None:
    node.apply(ALLOW_FRIEND)
    server = node.get("server")
    stream = node.monitor.Monitor(
        pb.MonitorRequest(types=["verdict"], endpoint_ids=[server.id]), timeout=20
    )
    stream.initial_metadata()
    node.ping("friend", server.ipv4)
    node.ping("stranger", server.ipv4)
    found: dict[str, pb.MonitorEvent] = {}
    for event in stream:
        if event.direction == "ingress":
            found.setdefault(event.verdict, event)
        if {"ALLOWED", "DENIED"} <= found.keys():
            break
    stream.cancel()
    allowed, denied = found["ALLOWED"], found["DENIED"]
    assert allowed.source.name == "default/friend"
    assert allowed.destination.name == "default/server"
    assert allowed.source.identity == node.get("friend").identity
    assert allowed.rule.policy == "CiliumNetworkPolicy default/friends"
    assert (allowed.rule.path, allowed.rule.origin.source) == ("spec.ingress[0]", "test.yaml")
    assert allowed.rule.rule_id
    assert denied.source.name == "default/stranger"
    assert denied.reason_code == 133
    assert denied.default_deny[0].policy == "CiliumNetworkPolicy default/friends"
    assert "denied by default" in denied.explanation


def test_policy_changes_are_notifications_of_the_monitor(node: AgentNode) -> None:
    stream = node.monitor.Monitor(pb.MonitorRequest(types=["agent"]), timeout=20)
    stream.initial_metadata()
    node.apply(ALLOW_FRIEND)
    subtypes = []
    for event in stream:
        subtypes.append(event.notification.subtype)
        assert json.loads(event.notification.json)
        if 5 in subtypes and 3 in subtypes:
            break
    stream.cancel()


def test_raw_events_come_in_whole_events(node: AgentNode) -> None:
    stream = node.monitor.Events(pb.EventsRequest(from_now=True), timeout=20)
    stream.initial_metadata()
    node.ping("friend", node.get("server").ipv4)
    batch = next(batch for batch in stream if batch.events)
    stream.cancel()
    assert len(batch.events) % 128 == 0
    assert batch.lost_ring == 0


def test_raw_events_come_with_what_their_numbers_mean(node: AgentNode) -> None:
    node.apply(ALLOW_FRIEND)
    stream = node.monitor.Events(pb.EventsRequest(from_now=True), timeout=20)
    first = next(stream)
    server = node.get("server")
    assert first.meaning.reset
    assert abs(first.wall_offset_ns - (time.time_ns() - time.monotonic_ns())) < 5_000_000_000
    told = {endpoint.id: endpoint for endpoint in first.meaning.endpoints}[server.id]
    assert (told.name, told.namespace, told.identity) == ("server", "default", server.identity)
    assert server.ipv4 in told.addresses
    rules = {rule.rule_id: rule for rule in first.meaning.rules}
    assert told.ingress_enforced
    assert [rules[number].policy for number in told.ingress_isolated_by] == [
        "CiliumNetworkPolicy default/friends"
    ]
    numbers = {identity.id for identity in first.meaning.identities}
    assert {1, 2, server.identity} <= numbers
    # A change comes with the first events after it, and only the change.
    node.apply(ALLOW_FRIEND.replace("friends", "others"))
    assert node.ping("friend", server.ipv4)
    news = next(batch.meaning for batch in stream if batch.meaning.rules)
    stream.cancel()
    assert not news.reset
    assert {rule.policy for rule in news.rules} == {"CiliumNetworkPolicy default/others"}


def test_invalid_document_changes_nothing_and_names_every_fault(node: AgentNode) -> None:
    node.apply(ALLOW_FRIEND)
    bad = ALLOW_FRIEND + (
        "---\napiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: bad}\n"
        "spec:\n  endpointSelector: {}\n  ingress:\n  - fromCIDR: [not-an-address]\n"
        "    toPorts: [{ports: [{port: '99999'}]}]\n"
    )
    code, message = refused(lambda: node.apply(bad))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "spec.ingress[0]" in message
    kept = node.policy.Get(pb.GetPoliciesRequest(), timeout=10)
    assert [policy.name for policy in kept.policies] == ["friends"]


def test_a_network_policy_of_kubernetes_is_enforced_and_stored(node: AgentNode) -> None:
    text = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: friends, namespace: default}
spec:
  podSelector: {matchLabels: {role: pod}}
  ingress:
  - from: [{podSelector: {matchLabels: {role: peer}}}]
"""
    node.apply(text)
    pod = node.get("pod")
    assert pod.ingress_enforced
    assert not pod.egress_enforced
    for address in addresses(pod):
        assert node.ping("peer", address)
        assert not node.ping("stranger", address)
    (kept,) = node.policy.Get(pb.GetPoliciesRequest(), timeout=10).policies
    assert (kept.kind, kept.namespace, kept.name) == ("NetworkPolicy", "default", "friends")
    assert [x.change for x in node.apply(text).outcomes] == [identity_pb2.Outcome.UNCHANGED]


def test_what_is_probably_not_meant_is_said_by_apply(node: AgentNode) -> None:
    first = node.apply(ALLOW_FRIEND, dry_run=True)
    assert [x.message.partition(":")[0] for x in first.warnings] == [
        "puts default/server in default deny"
    ]
    assert first.warnings[0].origin.line == 7
    node.apply(ALLOW_FRIEND)
    again = node.apply(
        ALLOW_FRIEND.replace("friends", "more").replace("app: friend", "app: nobody")
    )
    assert [x.message for x in again.warnings] == [
        "a peer selects none of the endpoints: app=nobody, k8s:io.kubernetes.pod.namespace=default"
    ]


def test_deleting_an_unknown_policy_is_refused(node: AgentNode) -> None:
    name = identity_pb2.PolicyName(kind="CiliumNetworkPolicy", namespace="default", name="none")
    code, message = refused(
        lambda: node.policy.Delete(pb.DeleteRequest(names=[name], wait=True), timeout=10)
    )
    assert code is grpc.StatusCode.NOT_FOUND
    assert "default/none" in message


def test_cidr_rule_reaches_only_its_prefix(node: AgentNode) -> None:
    node.apply(
        """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: egress}
spec:
  endpointSelector: {matchLabels: {app: friend}}
  egress:
  - toCIDR: [192.168.77.1/32]
"""
    )
    assert node.ping("friend", WORLD4)
    assert not node.ping("friend", WORLD6)
    rows = [row for reply in node.datapath.DumpIpcache(pb.DumpRequest()) for row in reply.rows]
    local = {row.prefix: row.identity for row in rows if row.identity > 1 << 24}
    assert list(local) == ["192.168.77.1/32"]


def test_dumps_name_what_they_show(node: AgentNode) -> None:
    node.apply(ALLOW_FRIEND)
    server = node.get("server")
    assert node.ping("friend", server.ipv4)
    rows = [
        row
        for reply in node.datapath.DumpPolicy(
            pb.DumpPolicyRequest(ref=pb.EndpointRef(id=server.id))
        )
        for row in reply.rows
    ]
    friend = next(row for row in rows if row.identity == node.get("friend").identity)
    assert friend.rule.policy == "CiliumNetworkPolicy default/friends"
    ct = [row for reply in node.datapath.DumpConntrack(pb.DumpRequest()) for row in reply.rows]
    assert any(row.destination == server.ipv4 and row.protocol == "ICMP" for row in ct)
    held = [row for reply in node.datapath.DumpEndpoints(pb.DumpRequest()) for row in reply.rows]
    assert {row.address for row in held if row.id == server.id} == {server.ipv4, server.ipv6}
    assert all(list(row.flags) == ["open"] for row in held)


def test_trace_says_what_packets_meet(node: AgentNode) -> None:
    node.apply(ALLOW_FRIEND)
    for name, allowed in (("friend", True), ("stranger", False)):
        reply = node.policy.Trace(
            pb.TraceRequest(
                source=pb.Subject(endpoint=pb.EndpointRef(name=name)),
                destination=pb.Subject(address=node.get("server").ipv4),
                port=80,
                protocol="TCP",
            ),
            timeout=10,
        )
        assert reply.allowed is allowed, reply.ingress.reason


def test_endpoint_that_vanishes_with_its_namespace_is_removed(node: AgentNode) -> None:
    node.workload("brief", "app=brief")
    name = f"{node.base}-brief"
    subprocess.run(["ip", "netns", "del", name], check=True)
    node.namespaces.remove(name)
    eventually(lambda: refused_or_none(node, "brief"), within_s=30, what="the endpoint is removed")


def refused_or_none(node: AgentNode, name: str) -> bool:
    try:
        node.get(name)
    except grpc.RpcError:
        return True
    return False
