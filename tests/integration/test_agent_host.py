"""Policy of the node itself: its own sockets, its devices, its endpoints, its agent's ends."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator

import grpc
import pytest

from protos.agent.v1 import agent_pb2 as pb
from tests.integration.agentnode import WORLD4, WORLD6, AgentNode, Stream, eventually

pytestmark = pytest.mark.usefixtures("need_bpf", "need_netns", "need_bpffs", "need_objects")

NODE4, NODE6 = "192.168.77.2", "fd77::2"
OPEN, SHUT, KEPT = 2222, 3333, 4444

INGRESS = f"""
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {{name: node}}
spec:
  nodeSelector: {{matchLabels: {{role: edge}}}}
  ingress:
    - fromEntities: [world]
      toPorts: [{{ports: [{{port: "{OPEN}", protocol: TCP}}]}}]
    - fromEndpoints: [{{matchLabels: {{app: friend}}}}]
"""
EGRESS = """
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: node}
spec:
  nodeSelector: {matchLabels: {role: edge}}
  egress: [{toEntities: [cluster]}]
"""


@pytest.fixture(scope="module")
def running() -> Iterator[AgentNode]:
    with AgentNode("host") as node:
        node.flags = ("--node-label", "role=edge", "--host-control-port", f"tcp/{KEPT}")
        node.start("identity")
        node.start("agent")
        yield node


@pytest.fixture
def node(running: AgentNode) -> AgentNode:
    running.delete_policies()
    return running


def listener(node: AgentNode, port: int) -> socket.socket:
    found = node.socket("node", socket.AF_INET6)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    found.bind(("::", port))
    found.listen()
    found.settimeout(3)
    return found


@contextlib.contextmanager
def session(node: AgentNode, port: int, address: str = NODE4) -> Iterator[Stream]:
    """The world is connected to a socket of the node."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with listener(node, port) as server, node.socket("world", family) as near:
        near.settimeout(3)
        near.connect((address, port))
        far, _ = server.accept()
        with far:
            yield Stream(near, far)


def connects(node: AgentNode, where: str, address: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with node.socket(where, family) as near:
        near.settimeout(0.3)
        try:
            near.connect((address, port))
        except TimeoutError:
            return False
        return True


def said(node: AgentNode) -> str:
    return node.component("host-policy").message


def test_the_world_and_the_node(node: AgentNode) -> None:
    assert said(node) == "no policy selects this node"
    with listener(node, OPEN), listener(node, SHUT), listener(node, KEPT):
        assert connects(node, "world", NODE4, SHUT)
        node.apply(INGRESS)
        assert said(node).startswith("ingress enforced, egress open")
        for address in (NODE4, NODE6):
            assert connects(node, "world", address, OPEN)
            assert not connects(node, "world", address, SHUT)
            assert connects(node, "world", address, KEPT)  # a control port
            assert not node.ping("world", address)
        assert node.ping("node", WORLD4)
        assert node.ping("node", WORLD6)
        node.apply(EGRESS)
        assert said(node).startswith("ingress open, egress enforced")
        assert connects(node, "world", NODE4, SHUT)
        assert node.ping("world", NODE6)
        assert not node.ping("node", WORLD4)
        assert not node.ping("node", WORLD6)
        node.delete_policies()
        assert said(node) == "no policy selects this node"
        assert node.ping("node", WORLD4)


def test_sessions_that_are_open_when_policy_comes(node: AgentNode) -> None:
    """The node speaks first: what counts is who connected, and whether that is allowed."""
    with session(node, OPEN) as allowed, session(node, SHUT, NODE6) as denied:
        assert allowed.works(within_s=10)
        assert denied.works(within_s=10)
        node.apply(INGRESS)
        allowed.far.sendall(b"node first")
        assert allowed.near.recv(64) == b"node first"
        assert allowed.works(within_s=10)
        denied.far.sendall(b"node first")
        denied.near.settimeout(0.5)
        with pytest.raises(TimeoutError):
            denied.near.recv(64)
        # The way back is there: what was under way arrives.
        node.delete_policies()
        assert denied.near.recv(64) == b"node first"


def test_endpoints_and_the_node(node: AgentNode) -> None:
    friend = node.workload("friend", "app=friend")
    node.workload("stranger", "app=stranger")
    node.apply(INGRESS)
    for gateway in ("10.217.0.1", "fd00:c111::1"):
        assert node.ping("friend", gateway)
        assert not node.ping("stranger", gateway)
    assert node.ping("stranger", WORLD4)  # by masquerade: answers are not the node's
    assert node.ping("stranger", friend.ipv4)
    assert node.ping("node", friend.ipv6)


def test_policy_outlives_the_agent(node: AgentNode) -> None:
    node.apply(INGRESS)
    with listener(node, SHUT), session(node, OPEN) as stream:
        node.stop("agent", signal.SIGKILL)
        assert stream.works(within_s=10)
        assert not connects(node, "world", NODE4, SHUT)
        node.stop("identity")
        node.start("agent")  # by the policies as saved
        assert stream.works(within_s=10)
        assert not connects(node, "world", NODE4, SHUT)
        node.start("identity")
        eventually(lambda: node.component("identity").state == "Ok", within_s=30, what="session")
        node.delete_policies()
        assert connects(node, "world", NODE4, SHUT)


def test_what_is_denied_is_told(node: AgentNode) -> None:
    node.apply(INGRESS)
    stream = node.monitor.Monitor(pb.MonitorRequest(types=["drop"]), timeout=20)
    stream.initial_metadata()
    assert not node.ping("world", NODE4)
    event = next(stream)
    stream.cancel()
    assert event.direction == "ingress"
    assert event.reason_code == 133
    assert [label.key for label in event.destination.labels] == ["host"]


def test_a_node_that_is_not_selected_or_not_enforced(node: AgentNode) -> None:
    node.apply(INGRESS.replace("role: edge", "role: inner"))
    assert said(node) == "no policy selects this node"
    node.apply(INGRESS)
    assert not node.ping("world", NODE4)
    node.stop("agent")
    node.start("agent", "--enable-policy", "never")
    eventually(lambda: node.ping("world", NODE4), within_s=30, what="nothing is enforced")
    node.stop("agent")
    node.start("agent", "--policy-audit-mode", "on")
    assert node.ping("world", NODE4)
    assert said(node).endswith("audited only")


def test_a_policy_that_isolates_the_node_is_confirmed_or_goes_back(node: AgentNode) -> None:
    text = """
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: on-trial}
spec:
  nodeSelector: {}
  ingress: [{fromEntities: [cluster]}]
"""
    with pytest.raises(grpc.RpcError, match="would isolate this node on ingress"):
        node.apply(text, keep=False)
    assert node.status().policies == 0
    dry = node.apply(text, keep=False, dry_run=True)
    assert any("--confirm is needed" in x.message for x in dry.warnings)
    request = pb.ApplyRequest(
        documents=[pb.Document(source="trial.yaml", text=text.encode())], wait=True, confirm=True
    )
    assert node.policy.Apply(request, timeout=20).confirm_within_s == 60
    found = node.policy.Confirm(pb.ConfirmRequest(), timeout=10)
    assert [x.name for x in found.names] == ["on-trial"]
    with pytest.raises(grpc.RpcError, match="no policy waits"):
        node.policy.Confirm(pb.ConfirmRequest(), timeout=10)
    # In force, it isolates nobody anew: the same, and more in that direction, need no trial.
    more = text.replace("on-trial", "more").replace("[cluster]", "[world]")
    assert node.apply(more, keep=False).confirm_within_s == 0
    with pytest.raises(grpc.RpcError, match="on egress"):
        node.apply(text.replace("ingress:", "egress:").replace("from", "to"), keep=False)
