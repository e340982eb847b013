"""L7 rules by the real thing: agent, identity service, xds service and the Envoy it launches."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from collections.abc import Iterator

import pytest

from tests.integration.agentnode import AgentNode

EMPIRE = ("org=empire", "app=deathstar")
FIGHTER = ("org=empire", "app=tiefighter")
POLICY = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: rule1, namespace: default}
spec:
  endpointSelector: {matchLabels: {app: deathstar}}
  ingress:
  - fromEndpoints: [{matchLabels: {org: empire}}]
    toPorts:
    - ports: [{port: "8000", protocol: TCP}]
      rules:
        http:
        - {method: POST, path: %s}
"""


class Web:
    """A web server in a workload: 200 with what was asked."""

    def __init__(self, node: AgentNode, name: str, *, port: int = 8000) -> None:
        self._socket = node.socket(name, socket.AF_INET6)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self._socket.bind(("::", port))
        self._socket.listen(128)
        self.asked: list[str] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            stream = connection.makefile("rb")
            while line := stream.readline():
                self.asked.append(line.decode().strip())
                while stream.readline().strip():
                    pass
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def connect(
    node: AgentNode, name: str, address: str, port: int = 8000
) -> http.client.HTTPConnection:
    """An open connection. Raises OSError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    raw = node.socket(name, family)
    try:
        raw.settimeout(3)
        raw.connect((address, port))
    except BaseException:
        raw.close()
        raise
    connection = http.client.HTTPConnection(address, port)
    connection.sock = raw
    return connection


def ask(connection: http.client.HTTPConnection, method: str, path: str) -> tuple[int, str]:
    connection.request(method, path)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def once(node: AgentNode, name: str, address: str, method: str, path: str) -> tuple[int, str]:
    with contextlib.closing(connect(node, name, address)) as connection:
        return ask(connection, method, path)


@pytest.fixture(scope="module")
def node(
    need_objects: None, need_netns: None, need_nft: None, need_redirect_peer: None
) -> Iterator[AgentNode]:
    with AgentNode("proxy") as node:
        node.start("identity")
        node.start("xds", wait=True)
        node.start("agent")
        node.workload("deathstar", *EMPIRE)
        node.workload("tiefighter", *FIGHTER)
        web = Web(node, "deathstar")
        try:
            yield node
        finally:
            web.close()


def test_requests_are_judged(node: AgentNode) -> None:
    node.apply(POLICY % "/v1/request-landing")
    target = node.get("deathstar")
    for address in (target.ipv4, target.ipv6):
        assert once(node, "tiefighter", address, "POST", "/v1/request-landing") == (200, "ok")
        status, text = once(node, "tiefighter", address, "PUT", "/v1/exhaust-port")
        assert (status, text.strip()) == (403, "Access denied")
    assert node.component("proxy").state == "Ok", node.status()
