"""What an HTTP policy costs at the proxy: requests a second and Envoy's CPU for each, against the
same Envoy without a policy, in turns; and how soon a change of rules is in force.

Envoy has one worker, so that its CPU is what limits. The load is wrk's (apt-get install wrk), the
server behind is another Envoy that answers by itself. Netfilter redirects, in both cases alike.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from envoy.config.listener.v3 import listener_pb2
from envoy.config.route.v3 import route_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import (
    http_connection_manager_pb2 as hcm_pb2,
)

from protos.xds.v1 import xds_pb2 as pb
from services.xds.envoy.process import binary
from services.xds.resources import LDS, RDS
from services.xds.translate.model import NodeSettings
from tests.bench.figure import figure, percentile
from tests.integration.envoynode import EnvoyNode, http, read_answer, redirect

ROUNDS = 7
ROUND_S = 2
CHANGES = 200
PATH = "/v1/orders/1234?full=1"
# The fourth rule is the one that matches; the others are asked before.
RULES = (
    http(1, method="GET|HEAD", path="/public/.*"),
    http(2, method="POST", path="/v1/request-landing"),
    http(3, path="/v[12]/teams/[a-z0-9-]+", headers=["X-Team: red"]),
    http(4, method="GET", path=r"/v1/orders/\d+(\?.*)?"),
)
WITH, WITHOUT = 0, 1


def _plain(node: EnvoyNode, number: int) -> None:
    """A redirect without a policy: no rule filters, no care for paths; the log stays."""
    items = {item.url: item.value for item in node.translator.translate(redirect(number)).items}
    listener, routes = items[LDS], items[RDS]
    assert isinstance(listener, listener_pb2.Listener)
    assert isinstance(routes, route_pb2.RouteConfiguration)
    packed = listener.default_filter_chain.filters[0].typed_config
    manager = hcm_pb2.HttpConnectionManager()
    packed.Unpack(manager)
    router = manager.http_filters[-1]
    del manager.http_filters[:-1]
    assert router.name == "router"
    manager.ClearField("normalize_path")
    manager.ClearField("merge_slashes")
    manager.ClearField("path_with_escaped_slashes_action")
    packed.Pack(manager)
    routes.typed_per_filter_config.clear()
    del routes.virtual_hosts[0].routes[:-1]
    node.redirects[10_000 + number] = redirect(number)
    with node.cache.transaction() as change:
        change.put(LDS, listener.name, listener)
        change.put(RDS, routes.name, routes)


@contextlib.contextmanager
def _server(node: EnvoyNode) -> Iterator[None]:
    """An Envoy that answers 200 to everything at port 80."""
    chain = {
        "filters": [
            {
                "name": "http",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.filters.network."
                    "http_connection_manager.v3.HttpConnectionManager",
                    "stat_prefix": "server",
                    "route_config": {
                        "virtual_hosts": [
                            {
                                "name": "all",
                                "domains": ["*"],
                                "routes": [
                                    {
                                        "match": {"prefix": "/"},
                                        "direct_response": {
                                            "status": 200,
                                            "body": {"inline_string": "ok"},
                                        },
                                    }
                                ],
                            }
                        ]
                    },
                    "http_filters": [
                        {
                            "name": "router",
                            "typed_config": {
                                "@type": "type.googleapis.com/envoy.extensions.filters.http."
                                "router.v3.Router"
                            },
                        }
                    ],
                },
            }
        ]
    }
    address = {"socket_address": {"address": "0.0.0.0", "port_value": 80}}
    config = node.run_dir / "server.json"
    config.write_text(
        json.dumps({"static_resources": {"listeners": [
            {"name": "server", "address": address, "filter_chains": [chain]}
        ]}})
    )  # fmt: skip
    process = subprocess.Popen(
        node.inside(
            str(binary()), "-c", str(config), "--concurrency", "1", "--disable-hot-restart",
            "-l", "off",
        ),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _first(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, f"wrk said: {text}"
    return match[1]


def _load(node: EnvoyNode, number: int, seconds: int) -> tuple[float, float, float]:
    """Requests a second, Envoy's CPU microseconds a request, and wrk's median latency in us."""
    pid = node.supervisor.state.pid
    address = f"10.9.{number}.1"
    url = f"http://{address}{PATH}"
    began = _cpu_s(pid)
    out = subprocess.run(
        node.inside("wrk", "-t1", "-c16", f"-d{seconds}s", "--latency", url),
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    if "Non-2xx" in out:
        raise RuntimeError(f"requests were denied: {out}")
    done = int(_first(r"(\d+) requests in", out))
    rate = float(_first(r"Requests/sec: +([\d.]+)", out))
    half = re.search(r"50%\s+([\d.]+)(us|ms|s)", out)
    assert half is not None
    unit = {"us": 1.0, "ms": 1e3, "s": 1e6}[half[2]]
    return rate, (_cpu_s(pid) - began) * 1e6 / done, float(half[1]) * unit


async def _compare(*, access_log: bool) -> list[dict[str, Any]]:
    if shutil.which("wrk") is None:
        raise RuntimeError("needs wrk: apt-get install wrk")
    name = "log" if access_log else "nolog"
    settings = NodeSettings(access_log=access_log)
    async with EnvoyNode(f"bench{name}", settings) as node:
        node.records = _Sink()  # what is kept here would only be memory
        with _server(node):
            _plain(node, WITHOUT)
            await node.apply(redirect(WITH, *RULES))
            await asyncio.sleep(0.5)
            for number in (WITH, WITHOUT):
                await asyncio.to_thread(_load, node, number, 1)
            ours: list[tuple[float, float, float]] = []
            theirs: list[tuple[float, float, float]] = []
            for round_ in range(ROUNDS):
                turns = [(WITH, ours), (WITHOUT, theirs)]
                for number, results in turns if round_ % 2 else reversed(turns):
                    results.append(await asyncio.to_thread(_load, node, number, ROUND_S))

    def ratio(which: int) -> float:
        return statistics.median(a[which] / b[which] for a, b in zip(ours, theirs, strict=True))

    def median(found: list[tuple[float, float, float]], which: int) -> float:
        return statistics.median(x[which] for x in found)

    tail = "with the log" if access_log else "no log"
    return [
        figure(
            f"L7 policy requests/s, {tail}", median(ours, 0), "1/s",
            baseline=median(theirs, 0), ratio=ratio(0), goal=0.9,
        ),
        figure(
            f"L7 policy Envoy CPU, {tail}", median(ours, 1), "us",
            baseline=median(theirs, 1), ratio=ratio(1), goal=1.15, less_is_better=True,
        ),
    ]  # fmt: skip


class _Sink(list[pb.L7Record]):
    """Forgets what it is given."""

    def extend(self, _records: object) -> None:
        pass


def bench_envoy_policy() -> list[dict[str, Any]]:
    return [
        *asyncio.run(_compare(access_log=True)),
        *asyncio.run(_compare(access_log=False)),
    ]


def bench_envoy_change() -> list[dict[str, Any]]:
    """From the change at the control plane to the first request that the new rule decides, on a
    connection that is open and busy."""

    async def measure() -> list[float]:
        took: list[float] = []
        request = b"GET /switch HTTP/1.1\r\nHost: a\r\n\r\n"
        async with EnvoyNode("benchchange") as node:
            node.backend()
            rules = {True: http(1, path="/switch"), False: http(1, path="/other")}
            await node.apply(redirect(0, rules[True]))
            with node.connect() as sock:

                def until_is(code: bytes) -> float:
                    while True:
                        sock.sendall(request)
                        if read_answer(sock).startswith(b"HTTP/1.1 " + code):
                            return time.perf_counter()

                for number in range(CHANGES):
                    allowed = number % 2 == 1
                    code = b"200" if allowed else b"403"
                    began = time.perf_counter()
                    node.put(redirect(0, rules[allowed]))
                    ended = await asyncio.to_thread(until_is, code)
                    took.append((ended - began) * 1e3)
        return took

    took = asyncio.run(measure())
    return [
        figure("L7 rule change enforced, p50", percentile(took, 50), "ms"),
        figure(
            "L7 rule change enforced, p99", percentile(took, 99), "ms", goal=20, less_is_better=True
        ),
    ]


def bench_envoy_latency() -> list[dict[str, Any]]:
    """What the way through Envoy adds to a request on an open connection, one at a time."""

    async def measure() -> tuple[list[float], list[float]]:
        request = b"GET %s HTTP/1.1\r\nHost: a\r\n\r\n" % PATH.encode()
        async with EnvoyNode("benchlatency") as node:
            with _server(node):
                await node.apply(redirect(WITH, *RULES))
                await asyncio.sleep(0.5)

                def times(address: str) -> list[float]:
                    found = []
                    with node.make_socket() as sock:
                        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                        sock.settimeout(5)
                        sock.connect((address, 80))
                        for _ in range(3000):
                            began = time.perf_counter()
                            sock.sendall(request)
                            read_answer(sock)
                            found.append((time.perf_counter() - began) * 1e6)
                    return found

                through = await asyncio.to_thread(times, "10.9.0.1")
                direct = await asyncio.to_thread(times, "10.9.255.1")  # is not redirected
        return through, direct

    through, direct = asyncio.run(measure())
    return [
        figure(
            "L7 redirect latency added, p50",
            percentile(through, 50) - percentile(direct, 50), "us",
        ),
        figure("no redirect latency, p50", percentile(direct, 50), "us"),
    ]  # fmt: skip
