"""Killing, restarting and replacing the agent while traffic flows; the identity service away."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from cilia import cleanup
from cilia.bpf import list_attached
from cilia.net.netns import NetNS, in_netns
from protos.agent.v1 import agent_pb2 as pb
from tests.integration.agentnode import AgentNode, Stream, eventually, refused, run
from tests.integration.test_agent_policy import ALLOW_FRIEND

pytestmark = pytest.mark.usefixtures("need_bpf", "need_netns", "need_bpffs", "need_objects")


@pytest.fixture
def node() -> Iterator[AgentNode]:
    with AgentNode("re") as node:
        yield node


def start_all(node: AgentNode) -> None:
    node.start("identity")
    node.start("agent")


def ready(node: AgentNode, *names: str) -> None:
    eventually(
        lambda: all(node.get(name).state == "ready" for name in names),
        within_s=30,
        what="endpoints are ready",
    )


def policy_revs(node: AgentNode) -> dict[str, int]:
    rows = [row for reply in node.datapath.DumpEndpoints(pb.DumpRequest()) for row in reply.rows]
    return {row.address: row.policy_rev for row in rows}


class Traffic:
    """Exchanges a byte over a stream as fast as it goes, and counts what failed."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.exchanges = 0
        self.error = ""

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                self._stream.exchange()
            except OSError as error:
                self.error = str(error)
                return
            self.exchanges += 1

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(timeout=10)

    def goes_on(self) -> None:
        before = self.exchanges
        eventually(
            lambda: self.exchanges > before + 10 or self.error, within_s=30, what="traffic flows"
        )
        assert not self.error

    def stalls(self) -> None:
        """Cut within a second: what is under way ends, and nothing follows."""
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            before = self.exchanges
            time.sleep(0.2)
            if self.exchanges == before:
                return
        raise AssertionError("traffic goes on")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_stream_and_policy_outlive_the_agent(node: AgentNode, how: signal.Signals) -> None:
    start_all(node)
    server = node.workload("server", "app=server")
    node.workload("friend", "app=friend")
    node.workload("stranger", "app=stranger")
    node.apply(ALLOW_FRIEND)
    with node.stream("friend", "server", server.ipv4) as stream, Traffic(stream) as traffic:
        traffic.goes_on()
        revs = policy_revs(node)
        node.stop("agent", how)
        traffic.goes_on()
        assert not node.ping("stranger", server.ipv4), "nothing opens while no agent runs"
        node.start("agent")
        ready(node, "server", "friend", "stranger")
        traffic.goes_on()
        assert policy_revs(node) == revs, "what did not differ was not written"
        again = node.get("server")
        assert (again.id, again.ipv4, again.ipv6, again.identity) == (
            server.id,
            server.ipv4,
            server.ipv6,
            server.identity,
        )
        assert node.ping("friend", server.ipv6)
        assert not node.ping("stranger", server.ipv6)
        # The calculation is the same one: what is revoked now is cut.
        node.delete_policies()
        assert node.ping("stranger", server.ipv4)
        traffic.goes_on()


def test_policy_deleted_while_the_agent_was_away_is_gone_afterwards(node: AgentNode) -> None:
    start_all(node)
    server = node.workload("server", "app=server")
    node.workload("friend", "app=friend")
    node.apply(ALLOW_FRIEND)
    deny = ALLOW_FRIEND.replace("app: friend", "app: nobody")
    with node.stream("friend", "server", server.ipv4) as stream:
        stream.exchange()
        node.apply(deny, wait=True)
        assert not stream.works()
    node.apply(ALLOW_FRIEND)
    node.stop("agent", signal.SIGKILL)
    node.start("agent")
    ready(node, "server", "friend")
    assert node.ping("friend", server.ipv4)


def test_killed_in_the_middle_of_adding_leaves_nothing_half_made(node: AgentNode) -> None:
    start_all(node)
    node.workload("first", "app=first")
    node.netns("second")
    for delay_s in (0.005, 0.015, 0.03):
        adding = threading.Thread(target=lambda: refused_or_not(node, "second"), daemon=True)
        adding.start()
        time.sleep(delay_s)  # somewhere inside: each point must be safe
        node.stop("agent", signal.SIGKILL)
        adding.join(timeout=30)
        node.start("agent")
        ready(node, "first")
        names = [e.name for e in node.endpoints.List(pb.ListEndpointsRequest()).endpoints]
        links = subprocess.run(
            ["ip", "-n", f"{node.base}-node", "-br", "link"], capture_output=True, text=True
        ).stdout
        assert links.count("cil0") == len(names), (names, links)
        if "second" in names:
            node.delete("second")


def refused_or_not(node: AgentNode, name: str) -> None:
    with contextlib.suppress(grpc.RpcError):
        node.add(name, f"app={name}")


def test_namespace_gone_while_away(node: AgentNode) -> None:
    start_all(node)
    gone = node.workload("gone", "app=gone")
    stays = node.workload("stays", "app=stays")
    node.stop("agent")
    subprocess.run(["ip", "netns", "del", f"{node.base}-gone"], check=True)
    node.namespaces.remove(f"{node.base}-gone")
    node.start("agent")
    ready(node, "stays")
    assert refused(lambda: node.get("gone"))[0] is grpc.StatusCode.NOT_FOUND
    eventually(
        lambda: set(policy_revs(node)) == {stays.ipv4, stays.ipv6},
        within_s=30,
        what=f"rows of {gone.ipv4} are pruned",
    )


def wired(node: AgentNode) -> bool:
    """Whether every endpoint's wire was looked after since the start."""
    tables = {table.name: table for table in node.status().tables}
    rows = tables["link-status"].rows
    return bool(rows) and all("Done" in row.cells for row in rows)


def test_a_namespace_of_the_same_name_is_another(node: AgentNode) -> None:
    """The endpoint lives on in its namespace, which lost its name; who has the name now is left
    alone, although it has an interface that is called alike."""
    start_all(node)
    lives = node.workload("recycled", "app=lives")
    held = subprocess.Popen(node.inside("recycled", "sleep", "600"))
    try:
        node.stop("agent")
        full = f"{node.base}-recycled"
        subprocess.run(["ip", "netns", "del", full], check=True)
        subprocess.run(["ip", "netns", "add", full], check=True)
        pair = ["link", "add", "eth0", "type", "veth", "peer", "name", "other"]
        subprocess.run(["ip", "-n", full, *pair], check=True)
        node.start("agent")
        ready(node, "recycled")
        eventually(lambda: wired(node), within_s=30, what="wires are made sure of")
        found = subprocess.run(
            ["ip", "-n", full, "addr", "show", "dev", "eth0"], check=True, capture_output=True
        )
        assert lives.ipv4 not in found.stdout.decode()
        assert b"UP" not in found.stdout.split(b">")[0]
    finally:
        held.kill()
        held.wait()


def test_without_identity_service_and_without_saved_policy_endpoints_drop(
    node: AgentNode,
) -> None:
    node.start("agent")
    node.netns("a")
    endpoint = node.add("a", "app=a", no_wait=True)
    assert endpoint.state == "waiting-for-identity"
    assert not node.ping("a", "10.217.0.1")
    assert not node.ping("node", endpoint.ipv4)
    policy = node.component("policy")
    assert policy.state == "Failure"
    assert "identity service" in policy.message
    assert "identity service" in node.get("a").message
    node.start("identity")
    ready(node, "a")
    assert node.ping("a", "10.217.0.1")
    eventually(lambda: node.status().state == "Ok", within_s=30, what="status is Ok")


def test_without_identity_service_but_with_saved_policy_it_is_enforced(node: AgentNode) -> None:
    start_all(node)
    server = node.workload("server", "app=server")
    node.workload("friend", "app=friend")
    node.workload("stranger", "app=stranger")
    node.apply(ALLOW_FRIEND)
    saved = node.state_dir / "agent" / "policies.json"
    eventually(
        lambda: saved.exists() and b"friends" in saved.read_bytes(), within_s=30, what="saved"
    )
    node.stop("agent", signal.SIGKILL)
    node.stop("identity", signal.SIGKILL)
    node.start("agent")
    ready(node, "server", "friend", "stranger")
    assert node.ping("friend", server.ipv4)
    assert not node.ping("stranger", server.ipv4)
    assert "as last saved" in node.component("policy").message
    # A label set that is known starts; one that is not waits, and starts later.
    node.netns("friend2")
    known = node.add("friend2", "app=friend")
    assert known.identity == node.get("friend").identity
    assert node.ping("friend2", server.ipv4)
    node.netns("new")
    assert node.add("new", "app=new", no_wait=True).state == "waiting-for-identity"
    code, message = refused(lambda: node.apply(ALLOW_FRIEND))
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "identity" in message
    node.start("identity")
    ready(node, "new")
    assert not node.ping("new", server.ipv4)
    assert node.ping("friend", server.ipv4)


def test_identity_service_restart_flushes_nothing(node: AgentNode) -> None:
    start_all(node)
    server = node.workload("server", "app=server")
    node.workload("friend", "app=friend")
    node.apply(ALLOW_FRIEND)
    with node.stream("friend", "server", server.ipv4) as stream, Traffic(stream) as traffic:
        node.stop("identity", signal.SIGKILL)
        traffic.goes_on()
        eventually(
            lambda: node.component("identity").state == "Warning", within_s=30, what="it is told"
        )
        node.start("identity")
        eventually(lambda: node.component("identity").state == "Ok", within_s=30, what="it is back")
        traffic.goes_on()
        assert node.apply(ALLOW_FRIEND).realised
        traffic.goes_on()


def test_revocation_cuts_a_stream_with_packets_under_way_both_ways(node: AgentNode) -> None:
    start_all(node)
    server = node.workload("server", "app=server")
    node.workload("friend", "app=friend")
    node.apply(ALLOW_FRIEND)
    with node.stream("friend", "server", server.ipv4) as stream, Traffic(stream) as traffic:
        traffic.goes_on()
        node.apply(ALLOW_FRIEND.replace("app: friend", "app: nobody"))
        traffic.stalls()


def attached(node: AgentNode, device: str) -> set[tuple[str, str, str]]:
    """Direction, kind and name of the programs on a device of the node."""
    with NetNS.open(node.path("node")) as netns:
        found = in_netns(netns, lambda: list_attached(socket.if_nametoindex(device)))
    return {(a.direction, a.kind, a.prog_name) for a in found}


def test_cleanup_leaves_no_trace(node: AgentNode) -> None:
    start_all(node)
    node.workload("a", "app=a")
    assert attached(node, "up0") == {
        ("ingress", "tcx", "from_netdev"),
        ("egress", "tcx", "to_netdev"),
    }

    def inside() -> list[cleanup.Trace]:
        return cleanup.cleanup(node.run_dir, node.state_dir)

    with NetNS.open(node.path("node")) as netns:
        with pytest.raises(cleanup.AgentRunning):
            in_netns(netns, inside)
        node.stop("agent")
        met = in_netns(netns, inside)
        assert met
        assert [str(trace) for trace in met if trace.error] == []
        assert in_netns(netns, lambda: cleanup.find(node.run_dir, node.state_dir)) == []
    assert not attached(node, "up0")
    links = subprocess.run(
        ["ip", "-n", f"{node.base}-node", "-br", "link"], capture_output=True, text=True
    ).stdout
    assert "cil" not in links
    assert not (node.run_dir / "bpf").exists()
    assert str(node.run_dir) not in Path("/proc/self/mountinfo").read_text()


def test_filters_instead_of_links_and_the_change_from_one_to_the_other(node: AgentNode) -> None:
    node.start("identity")
    node.start("agent", "--attach", "clsact")
    server = node.workload("server", "app=server")
    node.workload("friend", "app=friend")
    node.workload("stranger", "app=stranger")
    node.apply(ALLOW_FRIEND)
    assert node.status().attach_mode == "clsact"
    assert attached(node, "up0") == {
        ("ingress", "clsact", "cilia-from_netdev"),
        ("egress", "clsact", "cilia-to_netdev"),
    }
    with node.stream("friend", "server", server.ipv4) as stream, Traffic(stream) as traffic:
        traffic.goes_on()
        assert not node.ping("stranger", server.ipv4)
        node.stop("agent", signal.SIGKILL)
        node.start("agent", "--attach", "auto")
        ready(node, "server", "friend", "stranger")
        traffic.goes_on()
        assert {where[1] for where in attached(node, "up0")} == {"tcx"}
        assert node.ping("friend", server.ipv6)
        assert not node.ping("stranger", server.ipv6)


def test_filters_of_a_new_endpoint_become_links(node: AgentNode, need_tcx: None) -> None:
    """Filters need no grace period, links are nobody else's to take off. Killed in between, too."""
    start_all(node)
    node.apply(ALLOW_FRIEND)
    first = []
    for name in ("friend", "stranger", "server"):
        endpoint = node.workload(name, f"app={name}")
        first.append(attached(node, endpoint.host_interface))
    server = node.get("server")
    # A link may be quicker than this test, but not three of them.
    assert {
        ("ingress", "clsact", "cilia-from_endpoint"),
        ("egress", "clsact", "cilia-to_endpoint"),
    } in first
    with node.stream("friend", "server", server.ipv4) as stream, Traffic(stream) as traffic:
        traffic.goes_on()
        node.stop("agent", signal.SIGKILL)
        traffic.goes_on()
        node.start("agent")
        ready(node, "server", "friend", "stranger")
        traffic.goes_on()
        links = {("ingress", "tcx", "from_endpoint"), ("egress", "tcx", "to_endpoint")}
        devices = [node.get(name).host_interface for name in ("server", "friend", "stranger")]
        eventually(
            lambda: all(attached(node, device) == links for device in devices),
            within_s=15,
            what="all have links",
        )
        traffic.goes_on()
        assert node.ping("friend", server.ipv6)
        assert not node.ping("stranger", server.ipv6)


@pytest.mark.parametrize("mode", ["tcx", "clsact"])
def test_programs_that_somebody_takes_off_are_put_back(
    node: AgentNode, need_tcx: None, mode: str
) -> None:
    node.start("identity")
    node.start("agent", "--attach", mode, "--resync-interval", "1")
    server = node.workload("server", "app=server")
    node.workload("friend", "app=friend")
    node.workload("stranger", "app=stranger")
    node.apply(ALLOW_FRIEND)
    devices = ("up0", server.host_interface, node.get("stranger").host_interface)
    before = {device: attached(node, device) for device in devices}
    assert {len(found) for found in before.values()} == {2}

    def there() -> bool:
        return {device: attached(node, device) for device in devices} == before

    agent = node.processes["agent"]
    agent.send_signal(signal.SIGSTOP)
    try:
        if mode == "tcx":
            for pin in (node.run_dir / "bpf" / "cilia" / "links").iterdir():
                pin.unlink()  # with its pin a link goes, soon
        else:
            # One filter, one hook, all.
            for words in (
                f"filter del dev {devices[0]} ingress",
                f"filter del dev {devices[1]} egress",
                f"qdisc del dev {devices[2]} clsact",
            ):
                run(*node.inside("node", "tc", *words.split()))
        eventually(lambda: not there(), within_s=5, what="programs are gone")
    finally:
        agent.send_signal(signal.SIGCONT)
    eventually(there, within_s=10, what="programs are back")
    assert node.ping("friend", server.ipv4)
    assert not node.ping("stranger", server.ipv4)
