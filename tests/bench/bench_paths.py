"""Endpoint to endpoint on one node, policy and conntrack on, against plain kernel routing.

    ours    a:eth0 == veth == [node: programs, policy, conntrack] == veth == b:eth0
    theirs  a:eth1 == veth == [router: net.ipv4.ip_forward]       == veth == b:eth1

The two workload namespaces are the same, and so are the client and the server, so that only what
lies between differs. Rounds are short and taken in turns, and which goes first changes with every
round. Both namespaces use Reno: BBR, where a machine has it as default, sends by the clock and not
by what the path can take. Bulk has a processor for either end, as on one or on two it is half as
fast or twice, and the scheduler would choose.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.figure import paired
from tests.bench.node import Node, background, command, inside

ROUNDS = 9
SECONDS = 1.0
BULK_SECONDS = 1  # whole seconds: iperf3 takes no others
PORT = 7777
BULK_PORT = 5201

POLICY = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: bench-server}
spec:
  endpointSelector: {matchLabels: {app: server}}
  ingress:
    - fromEndpoints: [{matchLabels: {app: client}}]
      toPorts: [{ports: [{port: "7777", protocol: TCP}, {port: "5201", protocol: TCP}]}]
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: bench-client}
spec:
  endpointSelector: {matchLabels: {app: client}}
  egress:
    - toEndpoints: [{matchLabels: {app: server}}]
      toPorts: [{ports: [{port: "7777", protocol: TCP}, {port: "5201", protocol: TCP}]}]
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Paths:
    """Both ways from a to b."""

    a: str
    b: str
    ours: str
    theirs: str
    meter: Path


def _join_by_routing(router: str, a: str, b: str) -> None:
    """A second interface in each, and a router between them that runs no program."""
    for number, netns in enumerate((a, b), 1):
        port = f"r{number}"
        command("ip", "-n", router, "link", "add", port, "type", "veth", "peer", "name", "eth1",
                "netns", netns)  # fmt: skip
        command("ip", "-n", router, "addr", "add", f"198.19.{number}.1/24", "dev", port)
        command("ip", "-n", router, "link", "set", port, "up")
        command("ip", "-n", netns, "addr", "add", f"198.19.{number}.2/24", "dev", "eth1")
        command("ip", "-n", netns, "link", "set", "eth1", "up")
        command("ip", "-n", netns, "route", "add", f"198.19.{3 - number}.0/24",
                "via", f"198.19.{number}.1")  # fmt: skip
    command(*inside(router, "sysctl", "-qw", "net.ipv4.ip_forward=1"))


@contextlib.contextmanager
def _paths(*, big_tcp: bool = False) -> Iterator[Paths]:
    with tempfile.TemporaryDirectory() as directory, Node(big_tcp=big_tcp) as node:
        meter = Path(directory) / "rr"
        command("clang", "-O2", "-o", meter, Path(__file__).with_name("rr.c"))
        a, b, router = (node.namespace(suffix) for suffix in ("a", "b", "router"))
        for netns in (a, b):
            command(*inside(netns, "sysctl", "-qw", "net.ipv4.tcp_congestion_control=reno"))
        node.apply(POLICY)
        node.add("a", a, "app=client")
        server = node.add("b", b, "app=server")
        _join_by_routing(router, a, b)
        yield Paths(a=a, b=b, ours=server.ipv4, theirs="198.19.2.2", meter=meter)


def _in_turns(measure: Callable[[str], float], paths: Paths) -> tuple[list[float], list[float]]:
    found: dict[str, list[float]] = {paths.ours: [], paths.theirs: []}
    for address in found:  # caches, neighbours, the server's first accept
        measure(address)
    for number in range(ROUNDS):
        order = [paths.ours, paths.theirs]
        for address in order if number % 2 else reversed(order):
            found[address].append(measure(address))
    return found[paths.ours], found[paths.theirs]


def _transactions(paths: Paths, mode: str) -> tuple[list[float], list[float]]:
    def measure(address: str) -> float:
        line = command(*inside(paths.a, paths.meter, mode, address, str(PORT), str(SECONDS)))
        count, seconds, _, _ = line.split()
        return int(count) / float(seconds)

    with background(*inside(paths.b, paths.meter, "serve", str(PORT)), ready="ready"):
        return _in_turns(measure, paths)


def _bulk(paths: Paths) -> tuple[list[float], list[float]]:
    cpus = os.sched_getaffinity(0)

    def measure(address: str) -> float:
        client = inside(paths.a, "iperf3", "-J", "-c", address, "-p", str(BULK_PORT))
        client += ["-t", str(BULK_SECONDS), "-A", f"{min(cpus)},{max(cpus)}"]
        report = json.loads(command(*client))
        return float(report["end"]["sum_received"]["bits_per_second"]) / 1e9

    server = inside(paths.b, "iperf3", "-s", "-p", str(BULK_PORT), "--forceflush")
    with background(*server, ready="listening"):
        return _in_turns(measure, paths)


def bench_paths() -> list[dict[str, Any]]:
    """Request/response, connect/request/close and bulk, TCP over IPv4.

    Bulk a second time on a node whose devices take BIG TCP; the routing beside it stays as the
    kernel makes it.
    """
    with _paths() as paths:
        figures = [
            paired("paths_tcp_rr", *_transactions(paths, "rr"), "1/s", goal=1.1, floor=1.0),
            paired("paths_tcp_crr", *_transactions(paths, "crr"), "1/s", goal=0.95, floor=0.9),
        ]
        bulk = paired("paths_bulk", *_bulk(paths), "Gbit/s", goal=1.05, floor=1.0)
    with _paths(big_tcp=True) as paths:
        big = paired("paths_bulk_big_tcp", *_bulk(paths), "Gbit/s", goal=1.05, floor=1.0)
    return [*figures, bulk, big]
