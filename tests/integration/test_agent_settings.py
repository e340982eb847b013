"""What the agent's settings and surroundings change for packets that are already flowing."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator

import grpc
import pytest

from protos.agent.v1 import agent_pb2 as pb
from tests.integration.agentnode import ROOT, WORLD4, WORLD6, AgentNode, eventually
from tests.integration.test_agent_policy import ALLOW_FRIEND

pytestmark = pytest.mark.usefixtures("need_bpf", "need_netns", "need_bpffs", "need_objects")


@pytest.fixture
def node() -> Iterator[AgentNode]:
    with AgentNode("set") as node:
        node.start("identity")
        yield node


def conntrack(node: AgentNode, address: str) -> list[pb.ConntrackRow]:
    return [
        row
        for reply in node.datapath.DumpConntrack(pb.DumpRequest(), timeout=10)
        for row in reply.rows
        if address in (row.source, row.destination)
    ]


def test_the_node_itself_by_policy_and_another_enforcement_mode(node: AgentNode) -> None:
    node.start("agent", "--allow-localhost", "policy")
    server = node.workload("server", "app=server")
    friend = node.workload("friend", "app=friend")
    node.workload("stranger", "app=stranger")
    node.apply(ALLOW_FRIEND)
    for address in (server.ipv4, server.ipv6):
        assert not node.ping("node", address)
        assert node.ping("friend", address)
    with node.stream("stranger", "friend", friend.ipv4) as stream:
        assert stream.works(within_s=10)
        node.stop("agent", signal.SIGKILL)
        node.start("agent", "--enable-policy", "always")
        # Nothing selects the two, so now nothing is allowed, to who talks already neither.
        eventually(lambda: not stream.works(), within_s=30, what="the stream is cut")
    assert node.status().enforcement_mode == "always"
    assert node.ping("node", server.ipv4)


def test_an_address_comes_without_its_last_owners_connections(node: AgentNode) -> None:
    node.start("agent")
    first = node.workload("first", "app=first")
    other = node.workload("other", "app=other")
    with node.stream("first", "other", other.ipv4) as stream:
        assert stream.works(within_s=10)
        assert conntrack(node, first.ipv4)
        node.delete("first")
        second = node.add("first", "app=second", ipv4=first.ipv4)
        assert second.ipv4 == first.ipv4
        assert second.identity != first.identity
        assert conntrack(node, first.ipv4) == []


def test_programs_that_are_refused_leave_the_old_ones(node: AgentNode) -> None:
    broken = node.run_dir / "objects"
    shutil.copytree(ROOT / "build/bpf", broken)
    whole = (broken / "bpf_lxc.o").read_bytes()
    (broken / "bpf_lxc.o").write_bytes(whole[: len(whole) // 2])
    # With nothing to fall back on, the agent says so and ends.
    words = [sys.executable, "-m", "services.agent", "--run-dir", str(node.run_dir)]
    words += ["--state-dir", str(node.state_dir), "--object-dir", str(broken)]
    done = subprocess.run(
        node.inside("node", *words), cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 1
    assert "bpf_lxc.o" in done.stderr
    node.start("agent")
    server = node.workload("server", "app=server")
    node.workload("friend", "app=friend")
    node.workload("stranger", "app=stranger")
    node.apply(ALLOW_FRIEND)
    node.stop("agent", signal.SIGKILL)
    node.start("agent", "--object-dir", str(broken))
    datapath = node.component("datapath")
    assert datapath.state == "Warning"
    assert "the old ones stay in place" in datapath.message
    assert node.ping("friend", server.ipv4)
    assert not node.ping("stranger", server.ipv4)


FIREWALL = """
table inet firewall {
  chain incoming {
    type filter hook input priority 0; policy drop;
    ct state established,related accept
    icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
  }
  chain through { type filter hook forward priority 0; policy drop; }
}
"""


def test_a_host_whose_firewall_drops_what_it_does_not_know(node: AgentNode, need_nft: None) -> None:
    """As of ufw and dockerd. What endpoints send to the host itself is the firewall's to judge."""
    subprocess.run(
        node.inside("node", "nft", "-f", "-"), input=FIREWALL, text=True, check=True, timeout=10
    )
    node.start("agent")
    first = node.workload("first", "app=first")
    node.workload("second", "app=second")
    for address in (first.ipv4, first.ipv6):
        assert node.ping("second", address)
        assert node.ping("node", address)
    for address in (WORLD4, WORLD6):
        assert node.ping("first", address)
    assert not node.ping("first", "192.168.77.2")
    tables = subprocess.run(
        node.inside("node", "nft", "list", "tables"), capture_output=True, text=True, check=True
    )
    assert tables.stdout.split() == ["table", "inet", "firewall"]


NAMED = """
- endpointSelector: {matchLabels: {app: server}}
  ingress: [{toPorts: [{ports: [{port: web, protocol: TCP}]}]}]
- endpointSelector: {matchLabels: {app: client}}
  egress: [{toPorts: [{ports: [{port: web}]}]}]
"""


def state(node: AgentNode, name: str) -> tuple[str, str]:
    """A component of the node's status."""
    (found,) = [x for x in node.status().components if x.name == name]
    return found.state, found.message


def policy_rows(node: AgentNode, name: str) -> set[tuple[str, int, int]]:
    """(direction, identity, port) of the rows that the kernel has for an endpoint's ports."""
    request = pb.DumpPolicyRequest(ref=pb.EndpointRef(name=name))
    return {
        (row.direction, row.identity, row.port)
        for reply in node.datapath.DumpPolicy(request, timeout=10)
        for row in reply.rows
        if row.port
    }


def test_ports_by_name_are_the_destinations_own(node: AgentNode) -> None:
    """Also after a restart, and in the kernel's rows of both ends."""
    node.start("agent")
    ports = [pb.NamedPort(name="web", port=8080, protocol="TCP")]
    server = node.workload("server", "app=server", ports=ports)
    node.workload("other", "app=server", "color=blue")
    client = node.workload("client", "app=client")
    assert [(x.name, x.port, x.protocol) for x in server.ports] == [("web", 8080, "TCP")]
    node.apply(NAMED)

    def check() -> None:
        assert policy_rows(node, "server") == {("ingress", 0, 8080)}
        assert policy_rows(node, "other") == set()
        wanted = {("egress", server.identity, 8080)}
        eventually(
            lambda: policy_rows(node, "client") == wanted,
            within_s=30,
            what="the client may go to the server's port",
        )

    check()
    source, destination = (
        pb.Subject(endpoint=pb.EndpointRef(name=name)) for name in ("client", "server")
    )
    for port, allowed in ((8080, True), (8081, False)):
        trace = node.policy.Trace(
            pb.TraceRequest(source=source, destination=destination, port=port, protocol="TCP"),
            timeout=10,
        )
        assert trace.allowed is allowed
    node.stop("agent", signal.SIGKILL)
    node.start("agent")
    check()
    assert client.identity
    assert "the endpoint has no port named 'web'" in state(node, "policy")[1]
    node.delete("other")
    eventually(
        lambda: state(node, "policy") == ("Ok", "1 document in force, live"),
        within_s=30,
        what="every rule allows something",
    )
    node.apply(NAMED.replace("port: web}", "port: nobody}"))
    found, message = state(node, "policy")
    assert found == "Warning"
    assert "no endpoint has a port named 'nobody'" in message
    with pytest.raises(grpc.RpcError, match="outside 1 to 65535"):
        node.workload("bad", "app=bad", ports=[pb.NamedPort(name="web")])
