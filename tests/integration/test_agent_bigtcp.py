"""BIG TCP: segments beyond 64 KiB between workloads, where kernel and devices take them."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from cilia.net.device import GSO_LEGACY_MAX, Network
from cilia.net.netns import NetNS
from tests.integration.agentnode import WORLD4, WORLD6, AgentNode, eventually, run

pytestmark = pytest.mark.usefixtures("need_bpf", "need_netns", "need_bpffs", "need_objects")

BIG = 192 * 1024
POLICY = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: uploads}
spec:
  endpointSelector: {matchLabels: {app: b}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: a}}]
    toPorts:
    - ports: [{port: "8000", protocol: TCP}]
      rules: {http: [{method: POST, path: /upload}]}
"""
BYTES = 64 * 1024 * 1024
ROUTER4, ROUTER6 = "10.217.0.1", "fd00:c111::1"


def sizes(node: AgentNode, name: str, device: str) -> tuple[int, int]:
    """What TCP may make for the device: IPv4, IPv6 (bytes)."""
    with NetNS.open(node.path(name)) as netns, Network(netns) as network:
        link = network.link(device)
        return link.gso_ipv4_max or link.gso_max, link.gso_max


def raise_device(node: AgentNode, name: str, device: str) -> None:
    """As an administrator does it for a network card that takes long segments."""
    with NetNS.open(node.path(name)) as netns, Network(netns) as network:
        link = network.ensure_link(device, gso_max=BIG)
        if not link.gso_ipv4_max:
            pytest.skip("BIG TCP of IPv4 needs Linux 6.3")


def sent(node: AgentNode, name: str, device: str) -> tuple[int, int]:
    """Packets and bytes that the device has sent."""
    text = run(*node.inside(name, "ip", "-s", "-j", "link", "show", "dev", device))
    counted = json.loads(text)[0]["stats64"]["tx"]
    return counted["packets"], counted["bytes"]


class Uploads:
    """A web server in a workload: 200 with the digest of what was posted."""

    def __init__(self, node: AgentNode, name: str) -> None:
        self._socket = node.socket(name, socket.AF_INET6)
        self._socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self._socket.bind(("::", 8000))
        self._socket.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                with connection, connection.makefile("rb") as stream:
                    length = 0
                    while line := stream.readline().strip().lower():
                        if line.startswith(b"content-length:"):
                            length = int(line.split()[1])
                    body = hashlib.sha256(stream.read(length)).hexdigest().encode()
                    head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\n\r\n"
                    connection.sendall(head.encode() + body)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def carry(node: AgentNode, client: str, server: str, address: str) -> float:
    """Send BYTES and compare them; the mean length of what the client's device sent (bytes)."""
    block = os.urandom(1 << 20)
    packets, count = sent(node, client, "eth0")
    with node.stream(client, server, address) as stream:
        stream.near.settimeout(30)
        stream.far.settimeout(30)

        def send() -> None:
            for _ in range(BYTES // len(block)):
                stream.near.sendall(block)
            stream.near.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        digest, got = hashlib.sha256(), 0
        while piece := stream.far.recv(1 << 20):
            digest.update(piece)
            got += len(piece)
        sender.join()
    assert got == BYTES
    assert digest.digest() == hashlib.sha256(block * (BYTES // len(block))).digest()
    after, total = sent(node, client, "eth0")
    return (total - count) / (after - packets)


def post(node: AgentNode, client: str, address: str, path: str, body: bytes) -> tuple[int, str]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.closing(http.client.HTTPConnection(address, 8000)) as connection:
        connection.sock = node.socket(client, family)
        connection.sock.settimeout(20)
        connection.sock.connect((address, 8000))
        connection.request("POST", path, body)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


@pytest.fixture
def node() -> Iterator[AgentNode]:
    with AgentNode("bigtcp") as node:
        node.start("identity")
        yield node


def test_long_segments_where_every_device_takes_them(node: AgentNode) -> None:
    raise_device(node, "node", "up0")
    raise_device(node, "world", "w0")
    node.start("agent")
    a, b = node.workload("a", "app=a"), node.workload("b", "app=b")
    for name in ("a", "b"):
        assert sizes(node, name, "eth0") == (BIG, BIG)
    assert sizes(node, "node", a.host_interface) == (BIG, BIG)
    # Another endpoint, the node, the world (masqueraded), and what the node sends.
    for address in (b.ipv4, b.ipv6):
        assert carry(node, "a", "b", address) > GSO_LEGACY_MAX
    for address in (ROUTER4, ROUTER6):
        assert carry(node, "a", "node", address) > GSO_LEGACY_MAX
    for address in (WORLD4, WORLD6):
        assert carry(node, "a", "world", address) > GSO_LEGACY_MAX


def test_long_segments_to_the_proxy_and_from_it(node: AgentNode, need_nft: None) -> None:
    raise_device(node, "node", "up0")
    node.start("xds")
    node.start("agent")
    node.workload("a", "app=a")
    b = node.workload("b", "app=b")
    node.apply(POLICY)
    body = os.urandom(1 << 20) * 16
    digest = hashlib.sha256(body).hexdigest()
    with contextlib.closing(Uploads(node, "b")):
        for address in (b.ipv4, b.ipv6):
            packets, count = sent(node, "a", "eth0")
            assert post(node, "a", address, "/upload", body) == (200, digest)
            after, total = sent(node, "a", "eth0")
            assert (total - count) / (after - packets) > GSO_LEGACY_MAX
            assert post(node, "a", address, "/other", b"")[0] == 403


def becomes(node: AgentNode, wanted: tuple[int, int]) -> None:
    """An agent that answers may have its endpoints' devices before it still."""
    eventually(lambda: sizes(node, "a", "eth0") == wanted, within_s=30, what=f"it is {wanted}")


def test_no_longer_than_the_least_of_the_devices_takes(node: AgentNode) -> None:
    node.start("agent")
    node.workload("a", "app=a")
    assert sizes(node, "a", "eth0") == (GSO_LEGACY_MAX, GSO_LEGACY_MAX)
    raise_device(node, "node", "up0")
    node.stop("agent")
    node.start("agent")
    becomes(node, (BIG, BIG))
    node.stop("agent")
    node.start("agent", "--big-tcp", "off")
    becomes(node, (GSO_LEGACY_MAX, GSO_LEGACY_MAX))
