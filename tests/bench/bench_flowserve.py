"""What it costs to serve flows, and what arrives of a flood.

Streams are read by flowclient.c, which counts messages and decodes nothing. The baseline of a
stream is grpcio serving bytes that are ready; of a second follower, the first.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from protos.hubble.v1 import flow_pb2, observer_pb2
from services.flows.http2.client import Channel
from services.flows.relay.merge import time_ns
from tests.bench.figure import figure, percentile
from tests.bench.node import ROOT, Node, command, inside

GET_FLOWS = "/observer.Observer/GetFlows"
ALL = (1 << 64) - 1
ROWS = 1 << 20
BASELINE = 40_000
LIVE_RATE = 200_000
LIVE_S = 5
SLOW_RATE = 10_000
SLOW_S = 4

POLICY = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: closed}
spec:
  endpointSelector: {matchLabels: {app: server}}
  ingress: [{fromEndpoints: [{matchLabels: {app: nobody}}]}]
"""


class Server:
    """tests.bench.flowserve in a process of its own."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.socket = directory / "flows.sock"
        self.socket.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.flowserve", str(self.socket), *options],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._until("ready")

    def _until(self, word: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line
        raise RuntimeError("the server ended early")

    def used(self) -> tuple[float, int]:
        """Processor seconds so far, and flows taken in."""
        self.process.send_signal(signal.SIGUSR1)
        _, seconds, taken = self._until("used").split()
        return float(seconds), int(taken)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def _served(directory: Path, *options: str) -> Iterator[Server]:
    server = Server(directory, *options)
    try:
        yield server
    finally:
        server.close()


def _client(directory: Path) -> Path:
    program = directory / "flowclient"
    if not program.exists():
        command("clang", "-O2", "-o", program, Path(__file__).with_name("flowclient.c"))
    return program


def _read(client: Path, socket: Path, count: int, **request: Any) -> float:
    """Seconds from the first message to the last."""
    asked = observer_pb2.GetFlowsRequest(**request).SerializeToString().hex()
    out = command(client, socket, GET_FLOWS, asked, str(count))
    messages, _, seconds = out.split()[1:]
    assert int(messages) == count, out
    return float(seconds)


def bench_stream() -> list[dict[str, Any]]:
    """All flows in memory to one client; one follower and ten."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        client = _client(directory)
        with _served(directory, "--grpcio", "--rows", str(BASELINE)) as server:
            baseline = BASELINE / _read(client, server.socket, BASELINE, number=1)
        with _served(directory) as server:
            _read(client, server.socket, ROWS, number=ALL)
            before, _ = server.used()
            rates = [ROWS / _read(client, server.socket, ROWS, number=ALL) for _ in range(3)]
            cpu = (server.used()[0] - before) / (3 * ROWS) * 1e6
        one, ten = (_followers(directory, client, number) for number in (1, 10))
    return [
        figure("flows_stream_rate", max(rates), "1/s", goal=1_200_000, floor=600_000),
        figure("flows_stream_over_grpcio", max(rates), "1/s", baseline=baseline),
        figure("flows_stream_cpu", cpu, "us/flow", goal=0.6, floor=1.2, less_is_better=True),
        figure("flows_ten_followers", ten, "us/flow", baseline=one,
               goal=2, floor=2, less_is_better=True),
    ]  # fmt: skip


def _followers(directory: Path, client: Path, number: int) -> float:
    """Processor time of the server a flow taken in, while so many follow all of them."""
    rate, seconds = 50_000, 4
    count = int(rate * seconds * 0.9)
    asked = observer_pb2.GetFlowsRequest(follow=True).SerializeToString().hex()
    options = ("--rows", "4096", "--rate", str(rate), "--followers", str(number))
    with _served(directory, *options) as server:
        before, taken = server.used()
        clients = [
            subprocess.Popen(
                [str(client), str(server.socket), GET_FLOWS, asked, str(count)],
                stdout=subprocess.DEVNULL,
            )
            for _ in range(number)
        ]
        for process in clients:
            if process.wait(60):
                raise RuntimeError("a follower did not get all")
        used, total = server.used()
        return (used - before) / (total - taken) * 1e6


def bench_live() -> list[dict[str, Any]]:
    """Events from the kernel's ring through agent and flows to a follower."""
    with tempfile.TemporaryDirectory() as name, Node() as node:
        client = _client(Path(name))
        a, b = node.namespace("a"), node.namespace("b")
        node.apply(POLICY)
        source = node.add("a", a, "app=client")
        destination = node.add("b", b, "app=server")
        node.wait_ready(2)
        node.start("flows")
        socket = node.directory / "hubble.sock"
        _until_there(socket)
        time.sleep(2)
        idle = _cpu_s(node.pid("flows")), time.monotonic()
        time.sleep(4)
        idle_share = (_cpu_s(node.pid("flows")) - idle[0]) / (time.monotonic() - idle[1]) * 100

        links = command("ip", "-n", node.netns, "-o", "link")
        number, mac = next(
            (line.split(":")[0], line.split("link/ether ")[1].split()[0])
            for line in links.splitlines()
            if source.host_interface in line
        )
        pinned = node.directory / "bpf" / "cilia" / "progs" / "from_endpoint"
        load = inside(node.netns, sys.executable, "-m", "tests.bench.ringload", pinned, number,
                      source.ipv4, destination.ipv4, source.mac, mac)  # fmt: skip
        latencies = asyncio.run(_latencies(socket, [*load, str(SLOW_RATE), str(SLOW_S)]))
        wanted = LIVE_RATE * LIVE_S
        asked = observer_pb2.GetFlowsRequest(
            follow=True, whitelist=[flow_pb2.FlowFilter(drop_reason_desc=[flow_pb2.POLICY_DENIED])]
        )
        follower = subprocess.Popen(
            [str(client), str(socket), GET_FLOWS, asked.SerializeToString().hex(), str(wanted)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert follower.stdout is not None
        follower.stdout.readline()
        time.sleep(0.5)
        done = command(*load, str(LIVE_RATE), str(LIVE_S)).split()
        try:
            out, _ = follower.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            follower.kill()
            out, _ = follower.communicate()
        arrived = int(out.split()[0]) if out.split() else 0
    return [
        figure("flows_live_rate", int(done[0]) / float(done[1]), "1/s",
               goal=LIVE_RATE * 0.98, floor=LIVE_RATE * 0.98),
        figure("flows_live_lost", wanted - arrived, "flows", goal=0, floor=0, less_is_better=True),
        figure("flows_live_latency_p50", percentile(latencies, 50), "ms"),
        figure("flows_live_latency_p99", percentile(latencies, 99), "ms",
               goal=50, floor=50, less_is_better=True),
        figure("flows_idle_cpu", idle_share, "%", goal=1, floor=1, less_is_better=True),
    ]  # fmt: skip


def _until_there(socket: Path) -> None:
    deadline = time.monotonic() + 20
    while not socket.exists():
        if time.monotonic() > deadline:
            raise RuntimeError("the flow service did not start")
        time.sleep(0.05)


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


async def _latencies(socket: Path, load: list[str]) -> list[float]:
    """Milliseconds from the kernel's time of each flow to its arrival here."""
    channel = await Channel.connect(f"unix://{socket}")
    request = observer_pb2.GetFlowsRequest(follow=True)
    response = channel.call(GET_FLOWS, request.SerializeToString())
    await response.began.wait()
    await asyncio.sleep(0.5)
    process = await asyncio.create_subprocess_exec(*load, stdout=asyncio.subprocess.DEVNULL)
    found: list[float] = []
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(SLOW_S + 5):
            async for messages in response:
                now = time.time_ns()
                found += [(now - at) / 1e6 for at in map(time_ns, messages) if at is not None]
                if len(found) >= SLOW_RATE * SLOW_S * 0.98:
                    break
    await process.wait()
    channel.close()
    return found
