"""The agent killed at any moment, or started, under load: nothing forbidden passes, nothing allowed
is lost, and what is stored is what is enforced afterwards."""

from __future__ import annotations

import contextlib
import random
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator

import grpc
import pytest

from cilia.net.netns import NetNS, in_netns
from protos.agent.v1 import agent_pb2 as pb
from protos.agent.v1 import agent_pb2_grpc
from tests.integration.agentnode import WORLD4, AgentNode, eventually
from tests.integration.test_agent_restart import Traffic, ready

pytestmark = pytest.mark.usefixtures("need_bpf", "need_netns", "need_bpffs", "need_objects")

STREAM, FORBIDDEN = 8080, 3000
EITHER = (1000, 2000)


def only(port: int) -> str:
    """The port, and that of the stream which both policies allow."""
    return f"""
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {{name: ports}}
spec:
  endpointSelector: {{matchLabels: {{app: server}}}}
  ingress:
  - fromEndpoints: [{{matchLabels: {{app: client}}}}]
    toPorts: [{{ports: [{{port: "{port}", protocol: TCP}}, {{port: "{STREAM}", protocol: TCP}}]}}]
"""


@pytest.fixture
def node() -> Iterator[AgentNode]:
    with AgentNode("storm") as node:
        node.start("identity")
        node.start("agent")
        yield node


class Forbidden:
    """Tries port 3000 all the time: new connections, and two flows that were allowed before."""

    def __init__(self, node: AgentNode, server4: str, server6: str) -> None:
        self._netns = node.path("client")
        self._address = server4
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=work, daemon=True) for work in (self._connect, self._send)
        ]
        self.tries = 0
        self.passed: set[str] = set()
        self._held = contextlib.ExitStack()
        keep = self._held.enter_context
        listener = keep(node.socket("server"))
        listener.bind(("0.0.0.0", FORBIDDEN))
        listener.listen(4096)
        self._near = keep(node.socket("client"))
        self._near.connect((server4, FORBIDDEN))
        self._far = keep(listener.accept()[0])
        self._datagrams = keep(node.socket("server", socket.AF_INET6, socket.SOCK_DGRAM))
        self._datagrams.bind(("::", FORBIDDEN))
        self._sender = keep(node.socket("client", socket.AF_INET6, socket.SOCK_DGRAM))
        self._sender.connect((server6, FORBIDDEN))
        self._near.sendall(b"x")
        self._sender.send(b"x")
        for end in (self._far, self._datagrams):
            end.settimeout(5)
            assert end.recv(16) == b"x", "nothing is forbidden yet"
        self._far.setblocking(False)
        self._datagrams.setblocking(False)

    def __enter__(self) -> Forbidden:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(timeout=30)
        self._held.close()

    def _connect(self) -> None:
        def work() -> None:
            while not self._over.is_set():
                with socket.socket() as probe, contextlib.suppress(OSError):
                    probe.settimeout(0.02)
                    probe.connect((self._address, FORBIDDEN))
                    self.passed.add("a new connection")
                    return
                self.tries += 1

        with NetNS.open(self._netns) as netns:
            in_netns(netns, work)

    def _send(self) -> None:
        while not self._over.wait(0.001):
            with contextlib.suppress(OSError):
                self._sender.send(b"y")
            self._near.setblocking(False)
            with contextlib.suppress(OSError):
                self._near.send(b"y")
            for end, what in ((self._far, "a segment"), (self._datagrams, "a datagram")):
                with contextlib.suppress(BlockingIOError):
                    end.recv(4096)
                    self.passed.add(what)


class Alternating:
    """Applies one policy after the other as fast as it goes, while `go` is set."""

    def __init__(self, node: AgentNode) -> None:
        path = node.run_dir / "agent.sock"
        self._channel = grpc.insecure_channel(
            f"unix:{path}",
            options=[
                ("grpc.default_authority", "localhost"),
                ("grpc.max_reconnect_backoff_ms", 100),
                ("grpc.initial_reconnect_backoff_ms", 50),
            ],
        )
        stub: type = agent_pb2_grpc.PolicyServiceStub
        self._policy = stub(self._channel)
        self.go = threading.Event()
        self.idle = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.applied = 0

    def _run(self) -> None:
        turn = 0
        while not self._over.is_set():
            self.idle.set()
            self.go.wait()
            self.idle.clear()
            turn += 1
            request = pb.ApplyRequest(
                documents=[pb.Document(source="t.yaml", text=only(EITHER[turn % 2]).encode())],
                wait=turn % 3 == 0,
            )
            with contextlib.suppress(grpc.RpcError):
                self._policy.Apply(request, timeout=5)
                self.applied += 1

    def __enter__(self) -> Alternating:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.go.set()
        self._thread.join(timeout=10)
        self._channel.close()

    def pause(self) -> None:
        self.go.clear()
        assert self.idle.wait(timeout=10)


def connects(node: AgentNode, address: str, port: int, within_s: float) -> bool:
    with node.socket("client") as near:
        near.settimeout(within_s)
        try:
            near.connect((address, port))
        except TimeoutError:
            return False
    return True


@pytest.mark.parametrize("rounds", [5, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.timeout(300)
def test_killed_at_any_moment_while_policies_alternate(node: AgentNode, rounds: int) -> None:
    """Two kills a round: one while policies change, one at some point of the start."""
    server = node.workload("server", "app=server")
    node.workload("client", "app=client")
    chance = random.Random(rounds)
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(node.stream("client", "server", server.ipv6))
        traffic = stack.enter_context(Traffic(stream))
        for port in EITHER:
            listener = stack.enter_context(node.socket("server"))
            listener.bind(("0.0.0.0", port))
            listener.listen(4096)
        forbidden = Forbidden(node, server.ipv4, server.ipv6)
        node.apply(only(EITHER[0]))
        stack.enter_context(forbidden)
        applying = stack.enter_context(Alternating(node))
        for number in range(rounds):
            applying.go.set()
            time.sleep(chance.uniform(0.0, 0.4))
            node.stop("agent", signal.SIGKILL)
            node.start("agent", wait=False)
            time.sleep(chance.uniform(0.0, 1.5))
            node.stop("agent", signal.SIGKILL)
            node.start("agent")
            applying.pause()
            ready(node, "server", "client")
            eventually(lambda: converged(node), within_s=30, what="what is stored is enforced")
            stored = node.policy.Get(pb.GetPoliciesRequest(), timeout=10).policies[0].document
            for port in EITHER:
                allowed = f'"{port}"'.encode() in stored
                found = connects(node, server.ipv4, port, 2.0 if allowed else 0.1)
                assert found is allowed, (number, port, stored)
            assert not forbidden.passed
            traffic.goes_on()
        assert applying.applied > rounds
        assert forbidden.tries > 10 * rounds
        assert not forbidden.passed
        assert not traffic.error


def converged(node: AgentNode) -> bool:
    status = node.status()
    return status.realised_revision == status.policy_revision and status.state == "Ok"


class Flood:
    """`ping -f`, 20 000 packets at a time, as long as it is wanted."""

    def __init__(self, node: AgentNode, client: str, address: str) -> None:
        self._words = node.inside(client, "ping", "-f", "-q", "-c", "20000", address)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.floods: list[tuple[int, int]] = []  # sent and answered
        self.said = ""

    def _run(self) -> None:
        while not self._over.is_set():
            done = subprocess.run(self._words, capture_output=True, text=True, check=False)
            self.said = done.stdout + done.stderr
            found = re.search(r"(\d+) packets transmitted, (\d+) received", self.said)
            if not found:
                return
            self.floods.append((int(found[1]), int(found[2])))

    def __enter__(self) -> Flood:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(timeout=60)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_programs_are_replaced_under_a_flood_without_loss(
    node: AgentNode, how: signal.Signals
) -> None:
    server = node.workload("server", "app=server")
    client = node.workload("client", "app=client")
    node.workload("third", "app=third")  # two floods of one namespace miscount each other's end
    with (
        Flood(node, "client", server.ipv4) as there,
        Flood(node, "server", client.ipv6) as back,
        Flood(node, "third", WORLD4) as out,  # through the programs of the node's device
    ):
        node.stop("agent", how)
        node.start("agent")  # within what a start may take
        ready(node, "server", "client")
    for flood in (there, back, out):
        assert flood.floods, flood.said
        assert all(counts == (20_000, 20_000) for counts in flood.floods), flood.floods
