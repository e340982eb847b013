"""Requests that an endpoint's annotation asks to see, by the real thing: they are told of, and
nothing is opened or closed for it, whatever becomes of the proxy."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from protos.agent.v1 import agent_pb2 as pb
from tests.integration.agentnode import AgentNode, eventually, run
from tests.integration.test_agent_proxy import (
    FIREWALL,
    USUAL,
    ask,
    connect,
    envoy_of,
    listening,
    once,
    redirects,
    served,
)

KEY = "io.cilium.proxy-visibility"
SEEN = "<Ingress/8000/TCP/HTTP>"
DENY = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: shut, namespace: default}
spec:
  endpointSelector: {matchLabels: {app: deathstar}}
  ingress: [{}]
"""


@pytest.fixture(scope="module")
def seen(
    need_objects: None, need_netns: None, need_nft: None, need_redirect_peer: None
) -> Iterator[AgentNode]:
    with served("seen", annotations={KEY: SEEN.lower()}) as node:
        yield node


class Requests:
    """What the monitor tells of requests while it is watched."""

    def __init__(self, node: AgentNode) -> None:
        self._stream: Any = node.monitor.Monitor(pb.MonitorRequest(types=["l7"]), timeout=60)
        self.events: list[pb.MonitorEvent] = []
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> Requests:
        self._thread.start()
        self._stream.initial_metadata()
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.cancel()
        self._thread.join(timeout=5)

    def _read(self) -> None:
        with contextlib.suppress(grpc.RpcError):
            for event in self._stream:
                if event.type == "l7":
                    self.events.append(event)

    def of(self, path: str, code: int = 0) -> list[pb.MonitorEvent]:
        """Those that tell of a path; of its answer, if a code is given."""
        found = [e for e in self.events if e.l7.http.url.endswith(path)]
        return [e for e in found if e.l7.http.code == code] if code else found

    def told(self, path: str, code: int = 0) -> pb.MonitorEvent:
        found: list[pb.MonitorEvent] = eventually(
            lambda: self.of(path, code), within_s=5, what=f"{path} is told of: {self.events}"
        )
        return found[0]


def configure(node: AgentNode, value: str) -> pb.Endpoint:
    found: pb.Endpoint = node.endpoints.SetConfig(
        pb.SetConfigRequest(ref=pb.EndpointRef(name="deathstar"), options={"visibility": value}),
        timeout=20,
    )
    return found


def in_force(node: AgentNode) -> None:
    """The proxy's word may come after the endpoint is open: nothing waits for it."""
    eventually(
        lambda: not node.get("deathstar").not_shown,
        within_s=10,
        what=f"requests are shown: {node.get('deathstar')}",
    )


def test_requests_are_seen(seen: AgentNode) -> None:
    target = seen.get("deathstar")
    assert target.visibility == SEEN
    in_force(seen)
    with Requests(seen) as requests:
        for address in (target.ipv4, target.ipv6):
            path = f"/v1/{'six' if ':' in address else 'four'}"
            assert once(seen, "tiefighter", address, "POST", path) == (200, "ok")
            event = requests.told(path)
            assert (event.verdict, event.l7.http.method) == ("FORWARDED", "POST")
            assert event.source.name == "default/tiefighter"
            assert event.destination.name == "default/deathstar"
            requests.told(path, 200)
    assert not target.ingress_enforced


def test_policy_that_denies_denies(seen: AgentNode) -> None:
    in_force(seen)
    seen.apply(DENY)
    try:
        target = seen.get("deathstar")
        assert list(target.not_shown) == [f"{SEEN}: policy isolates this direction"]
        assert "not shown: default/deathstar" in seen.component("proxy").message
        for address in (target.ipv4, target.ipv6):
            with pytest.raises(TimeoutError):
                connect(seen, "tiefighter", address, within_s=0.3)
    finally:
        seen.delete_policies()
    in_force(seen)
    assert once(seen, "tiefighter", target.ipv4, "GET", "/again")[0] == 200


def test_asked_for_and_no_more(seen: AgentNode) -> None:
    """Open connections go on, where they began; what is new is seen, or is not."""
    in_force(seen)
    address = seen.get("deathstar").ipv4
    with (
        Requests(seen) as requests,
        contextlib.closing(connect(seen, "tiefighter", address)) as proxied,
    ):
        assert ask(proxied, "GET", "/proxied")[0] == 200
        assert configure(seen, "none").visibility == ""
        assert ask(proxied, "GET", "/goes-on")[0] == 200
        with contextlib.closing(connect(seen, "tiefighter", address)) as direct:
            assert ask(direct, "GET", "/direct")[0] == 200
            assert configure(seen, SEEN).visibility == SEEN
            in_force(seen)
            assert ask(direct, "GET", "/still-direct")[0] == 200
        assert ask(proxied, "GET", "/as-ever")[0] == 200
        assert once(seen, "tiefighter", address, "GET", "/seen-again")[0] == 200
        requests.told("/seen-again")
        requests.told("/as-ever")
        assert not requests.of("direct")
    audit = seen.policy.AuditKernel(pb.AuditKernelRequest(), timeout=20)
    assert (audit.drifted, list(audit.skipped)) == (0, [])


def test_envoy_is_not_there(seen: AgentNode) -> None:
    """Killed, and nobody to start it again: what only is to be seen passes at once."""
    in_force(seen)
    address = seen.get("deathstar").ipv6
    (port,) = {x.port for x in redirects(seen) if x.enforced and listening(seen, x.port)}
    xds, envoy = seen.processes["xds"], envoy_of(seen)
    xds.send_signal(signal.SIGSTOP)
    try:
        os.kill(envoy, signal.SIGKILL)
        eventually(lambda: not listening(seen, port), within_s=5, what="Envoy is gone")
        assert once(seen, "tiefighter", address, "GET", "/without") == (200, "ok")
    finally:
        xds.send_signal(signal.SIGCONT)
    with Requests(seen) as requests:

        def again() -> list[pb.MonitorEvent]:
            assert once(seen, "tiefighter", address, "GET", "/with")[0] == 200
            return requests.of("/with")

        eventually(again, within_s=15, what="requests are seen again")


def test_no_xds_service_and_another_agent(seen: AgentNode) -> None:
    """What an endpoint asked for is kept; without a proxy's word it is not in force, and passes."""
    seen.stop("agent")
    seen.stop("xds")
    (seen.state_dir / "agent" / "redirects.json").unlink()
    seen.start("agent")
    target = seen.get("deathstar")
    assert target.visibility == SEEN
    (line,) = target.not_shown
    assert "the proxy is not there" in line
    assert once(seen, "tiefighter", target.ipv4, "GET", "/x") == (200, "ok")
    assert f"not shown: default/deathstar {line}" in seen.component("proxy").message
    seen.start("xds")
    in_force(seen)


def test_a_firewall_in_the_way_closes_nothing(seen: AgentNode) -> None:
    """It would drop what goes to the proxy: nothing is sent there, until a rule lets it pass."""
    in_force(seen)
    address = seen.get("deathstar").ipv4
    rules = FIREWALL % USUAL
    subprocess.run(seen.inside("node", "nft", "-f", "-"), input=rules, text=True, check=True)
    try:
        eventually(
            lambda: seen.get("deathstar").not_shown, within_s=10, what="the firewall is seen"
        )
        assert once(seen, "tiefighter", address, "GET", "/walled") == (200, "ok")
        assert seen.component("firewall").state == "Warning" or "L7 rules will need" in (
            seen.component("firewall").message
        )
    finally:
        run(*seen.inside("node", "nft", "delete", "table", "inet", "firewall"))
    in_force(seen)


def test_refused(seen: AgentNode) -> None:
    for text, why in ((f"{SEEN},<Ingress/8000/TCP/Kafka>", "is http already"), ("x", "is not <")):
        with pytest.raises(grpc.RpcError) as caught:
            configure(seen, text)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert why in str(caught.value.details())
    assert seen.get("deathstar").visibility == SEEN
    with pytest.raises(grpc.RpcError, match="means nothing here"):
        seen.add("other", "app=x", netns=seen.path("deathstar"), annotations={"a": "b"})
