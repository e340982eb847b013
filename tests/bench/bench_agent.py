"""What an agent costs at 100 endpoints: adding one, coming back, memory."""

from __future__ import annotations

import contextlib
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench.figure import figure, percentile
from tests.bench.node import Node

ENDPOINTS = 100
ADDS = 100  # measured, at ENDPOINTS
RESTARTS = 3

POLICY = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: bench}
spec:
  endpointSelector: {matchLabels: {tier: backend}}
  ingress:
    - fromEndpoints: [{matchLabels: {tier: frontend}}]
      toPorts: [{ports: [{port: "80", protocol: TCP}]}]
"""


def _labels(number: int) -> tuple[str, str]:
    """Every endpoint has an identity of its own: adding one costs an allocation each time."""
    return f"app=app{number}", f"tier={'backend' if number % 2 else 'frontend'}"


@contextlib.contextmanager
def _full_node() -> Iterator[tuple[Node, list[float]]]:
    """A node with ENDPOINTS endpoints, and how long each of them took (s)."""
    with Node() as node:
        node.apply(POLICY)
        taken = []
        for number in range(ENDPOINTS):
            netns = node.namespace(f"e{number}")
            started = time.perf_counter()
            node.add(f"e{number}", netns, *_labels(number))
            taken.append(time.perf_counter() - started)
        node.wait_ready(ENDPOINTS)
        yield node, taken


def _resident_mb(pid: int) -> float:
    """Memory of a process without what maps the kernel's ring buffers (10^6 bytes)."""
    total, counted = 0, True
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            counted = "bpf-map" not in line
        elif counted and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total / 1e6


def bench_agent() -> list[dict[str, Any]]:
    """`endpoint add` until policy is in force, start to ready, memory of agent and identity."""
    with _full_node() as (node, filling):
        spare = node.namespace("spare")
        taken = []
        for number in range(ADDS):
            started = time.perf_counter()
            endpoint = node.add("spare", spare, *_labels(ENDPOINTS + number))
            taken.append(time.perf_counter() - started)
            node.delete(endpoint.id)
        memory = _resident_mb(node.pid("agent")) + _resident_mb(node.pid("identity"))

        starts = []
        for number in range(RESTARTS):
            # By turns an orderly stop and a kill: what is pinned is read back either way.
            node.stop("agent", how=signal.SIGKILL if number % 2 else signal.SIGTERM)
            started = time.perf_counter()
            node.start("agent")
            node.wait_ready(ENDPOINTS)
            starts.append(time.perf_counter() - started)
    return [
        figure("agent_endpoint_add_p50", percentile(taken, 50) * 1e3, "ms"),
        figure("agent_endpoint_add_p99", percentile(taken, 99) * 1e3, "ms",
               goal=100, floor=100, less_is_better=True),
        figure("agent_endpoint_add_filling_p99", percentile(filling, 99) * 1e3, "ms"),
        figure("agent_restart_ready", max(starts), "s", goal=3, floor=3, less_is_better=True),
        figure("agent_identity_rss", memory, "MB", goal=100, floor=150, less_is_better=True),
    ]  # fmt: skip
