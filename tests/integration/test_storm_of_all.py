"""Agent, identity service, xds service and Envoy are killed in any order while rules change hands:
no request that is forbidden reaches a server, and what is allowed comes back."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import grpc
import pytest

from tests.integration.agentnode import AgentNode, eventually
from tests.integration.test_agent_proxy import Web, ask, connect, once
from tests.integration.test_agent_restart import ready

POLICY = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: %s, namespace: default}
spec:
  endpointSelector: {matchLabels: {app: deathstar}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: %s}}]
    toPorts:
    - ports: [{port: "8000", protocol: TCP}]
      rules: {http: [{path: "/%s[?].*"}]}
"""
# Whose rules are whose changes; that nobody has another's does not.
TURNS = (
    POLICY % ("one", "tiefighter", "tie") + "---" + POLICY % ("two", "xwing", "wing"),
    POLICY % ("one", "xwing", "wing") + "---" + POLICY % ("two", "tiefighter", "(tie|ties)"),
    POLICY % ("one", "xwing", "wings") + "---" + POLICY % ("two", "xwing", "wing"),
)
OWN = {"tiefighter": ("tie", "ties"), "xwing": ("wing", "wings")}


@pytest.fixture
def node(
    need_objects: None, need_netns: None, need_nft: None, need_redirect_peer: None
) -> Iterator[AgentNode]:
    with AgentNode("all") as node:
        node.start("identity")
        node.start("xds")
        node.start("agent")
        yield node


class Trespasser:
    """Asks for what only the other may ask for, on connections that it keeps as long as it can."""

    def __init__(self, node: AgentNode, name: str, addresses: tuple[str, ...]) -> None:
        self._node, self._name = node, name
        (other,) = OWN.keys() - {name}
        self._paths = [*OWN[other], "nobodys"]
        self._over = threading.Event()
        self.tries = 0
        self._threads = [
            threading.Thread(target=self._run, args=(address, kept), daemon=True)
            for address in addresses
            for kept in (False, True)
        ]

    def __enter__(self) -> Trespasser:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(timeout=5)

    def _run(self, address: str, kept: bool) -> None:
        chance = random.Random(address)
        while not self._over.is_set():
            with (
                contextlib.suppress(OSError),
                contextlib.closing(
                    connect(self._node, self._name, address, within_s=0.2)
                ) as connection,
            ):
                while not self._over.is_set():
                    self.tries += 1
                    ask(connection, "GET", f"/{chance.choice(self._paths)}?{self._name}")
                    if not kept:
                        break
            self._over.wait(0.01)


def envoys(node: AgentNode) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if b"--config-path\0" + os.fsencode(node.run_dir) in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def kill(node: AgentNode, name: str) -> None:
    if name != "envoy":
        node.stop(name, signal.SIGKILL)
        return
    for pid in envoys(node):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("rounds", [3, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.timeout(600)
def test_whoever_is_killed_nobody_has_anothers_rules(node: AgentNode, rounds: int) -> None:
    target = node.workload("deathstar", "app=deathstar")
    for name in OWN:
        node.workload(name, f"app={name}")
    chance = random.Random(rounds)
    with contextlib.ExitStack() as stack:
        web = stack.enter_context(contextlib.closing(Web(node, "deathstar")))
        node.apply(TURNS[0])
        trespassers = [
            stack.enter_context(Trespasser(node, name, (target.ipv4, target.ipv6))) for name in OWN
        ]
        for number in range(rounds):
            with contextlib.suppress(grpc.RpcError):
                node.apply(TURNS[(number + 1) % len(TURNS)], wait=False)
            time.sleep(chance.uniform(0.0, 0.1))
            killed = chance.sample(("agent", "identity", "xds", "envoy"), chance.randint(1, 4))
            for name in killed:
                kill(node, name)
                time.sleep(chance.choice((0.0, chance.uniform(0.0, 0.2))))
            for name in chance.sample(killed, len(killed)):
                if name != "envoy":
                    node.start(name, wait=False)
                    time.sleep(chance.uniform(0.0, 0.3))
            for name in killed:
                if name != "envoy":
                    node.wait_serving(name)
            assert not trespasses(web)
        ready(node, *OWN, "deathstar")
        node.apply(TURNS[0])
        for name, (own, _) in OWN.items():
            eventually(
                partial(answered, node, name, target.ipv6, f"/{own}?{name}"),
                within_s=20,
                what=f"{name} is answered",
            )
    assert not trespasses(web)
    assert all(trespasser.tries > rounds for trespasser in trespassers)


def answered(node: AgentNode, name: str, address: str, path: str) -> bool:
    try:
        return once(node, name, address, "GET", path)[0] == 200
    except OSError:
        return False


def trespasses(web: Web) -> list[str]:
    """Requests of one that only the other may make, or nobody."""
    wrong = []
    for line in list(web.asked):
        path, _, who = line.split()[1].removeprefix("/").partition("?")
        if path not in OWN[who]:
            wrong.append(line)
    return wrong
