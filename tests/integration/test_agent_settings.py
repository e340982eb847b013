"""What the agent's settings and surroundings change for packets that are already flowing."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator

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
        assert stream.works()
        node.stop("agent", signal.SIGKILL)
        node.start("agent", "--enable-policy", "always")
        # Nothing selects the two, so now nothing is allowed, to who talks already neither.
        eventually(lambda: not stream.works(), within_s=10, what="the stream is cut")
    assert node.status().enforcement_mode == "always"
    assert node.ping("node", server.ipv4)


def test_an_address_comes_without_its_last_owners_connections(node: AgentNode) -> None:
    node.start("agent")
    first = node.workload("first", "app=first")
    other = node.workload("other", "app=other")
    with node.stream("first", "other", other.ipv4) as stream:
        assert stream.works()
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
