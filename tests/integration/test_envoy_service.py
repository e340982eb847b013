"""The whole service with its Envoy, as the agent meets it: redirects in, states out, traffic."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos.xds.v1 import xds_pb2 as pb
from protos.xds.v1 import xds_pb2_grpc
from services.xds.envoy.process import Process
from tests.integration.envoynode import Wire, everything, http, redirect

pytestmark = pytest.mark.usefixtures("need_root", "need_netns", "need_nft")
ROOT = Path(__file__).resolve().parents[2]


class Agent:
    """The agent's side of Sync."""

    def __init__(self, channel: Any) -> None:
        self._requests: queue.Queue[pb.SyncRequest | None] = queue.Queue()
        self.states: dict[int, pb.RedirectState] = {}
        self._stub: Any = xds_pb2_grpc.RedirectServiceStub(channel)
        self._call: Any = self._stub.Sync(iter(self._requests.get, None))
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(grpc.RpcError):
            for response in self._call:
                for state in response.states:
                    self.states[state.port] = state

    def send(
        self, *redirects: pb.Redirect, synced: bool = False, removed: tuple[int, ...] = ()
    ) -> None:
        self._requests.put(
            pb.SyncRequest(
                node=pb.Node(name="n1"), synced=synced, upserts=redirects, removed=removed
            )
        )

    def wait(
        self, port: int, state: int, digest: str = "", within_s: float = 10
    ) -> pb.RedirectState:
        deadline = time.monotonic() + within_s
        while True:
            found = self.states.get(port)
            if (
                found is not None
                and found.state == state
                and found.digest in ("", digest or found.digest)
            ):
                return found
            assert time.monotonic() < deadline, f"port {port} is {found}"
            time.sleep(0.005)

    def close(self) -> None:
        self._requests.put(None)
        self._call.cancel()


class Service(Wire):
    """`python -m services.xds` in the namespace."""

    process: subprocess.Popen[bytes]
    channel: Any

    def start(self) -> None:
        with (self.run_dir / "xds.log").open("ab") as log:
            self.process = subprocess.Popen(
                self.inside(
                    sys.executable, "-m", "services.xds", "--run-dir", str(self.run_dir),
                    "--log-level", "debug", "--proxy-concurrency", "1",
                ),
                cwd=ROOT, stdout=log, stderr=log,
            )  # fmt: skip
        self.channel = grpc.insecure_channel(
            f"unix:{self.run_dir}/xds.sock",
            options=[
                ("grpc.default_authority", "localhost"),
                ("grpc.initial_reconnect_backoff_ms", 50),
                ("grpc.max_reconnect_backoff_ms", 200),
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )
        try:
            grpc.channel_ready_future(self.channel).result(timeout=15)
        except grpc.FutureTimeoutError:
            pytest.fail((self.run_dir / "xds.log").read_text()[-3000:])

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        self.channel.close()
        self.process.send_signal(how)
        return self.process.wait(timeout=15)

    def status(self) -> pb.StatusResponse:  # type: ignore[override]  # of the service, not of a path
        stub: Any = xds_pb2_grpc.XdsStatusServiceStub(self.channel)
        answer: pb.StatusResponse = stub.Status(pb.StatusRequest(), timeout=20)
        return answer

    def code(self, path: str, number: int = 0) -> int:
        return super().status(path, number)

    def envoys(self) -> list[int]:
        found = Process.find(self.run_dir / "envoy")
        for process in found:
            process.close()
        return [process.pid for process in found]


@pytest.fixture
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    made = Service(f"svc{abs(hash(request.node.name)) % 1000}")
    try:
        made.make()
        made.start()
        yield made
    finally:
        with contextlib.suppress(Exception):
            made.stop(signal.SIGKILL)
        made.remove()


def eventually(check: Callable[[], object], what: str, within_s: float = 30) -> None:
    deadline = time.monotonic() + within_s
    while not check():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def test_a_redirect_is_acknowledged_when_it_is_enforced(service: Service) -> None:
    service.backend()
    agent = Agent(service.channel)
    agent.send(redirect(0, http(1, path="/a")), synced=True)
    state = agent.wait(10_000, pb.RedirectState.ACKED)
    assert service.code("/a") == 200
    assert service.code("/b") == 403
    assert state.version

    # New rules on the port, in force when they are said to be; rules that cannot be are refused,
    # by name, and change nothing.
    changed = redirect(0, http(1, path="/b"), everything(2))
    changed.rules.rules.pop()
    changed.digest = "changed"
    agent.send(changed)
    assert agent.wait(10_000, pb.RedirectState.ACKED, "changed").version != state.version
    assert (service.code("/a"), service.code("/b")) == (403, 200)
    bad = redirect(0, http(77, path="/[a-z]{1000}"))
    bad.digest = "bad"
    agent.send(bad)
    assert "rule 77" in agent.wait(10_000, pb.RedirectState.FAILED, "bad").message
    assert (service.code("/a"), service.code("/b")) == (403, 200)

    # Ports that another process has: Envoy refuses the listener, and the agent hears why.
    taken = service.make_socket()
    taken.bind(("127.0.0.1", 10_001))
    taken.listen()
    agent.send(redirect(1, everything()))
    failed = agent.wait(10_001, pb.RedirectState.FAILED)
    assert "10001" in failed.message
    taken.close()

    eventually(
        lambda: (
            [(r.requests, r.denied) for r in service.status().redirects if r.state.port == 10_000]
            == [(6, 3)]
        ),
        "Envoy's counters",
    )
    # It serves before it is asked whether it does.
    eventually(lambda: service.status().envoy.state == "running", "Envoy runs")
    assert service.status().envoy.version == "1.40.0"

    agent.send(removed=(10_000,))
    agent.wait(10_000, pb.RedirectState.REMOVED)
    agent.close()
    assert service.stop() == 0
    assert service.envoys() == []


def test_the_log_is_read_as_it_is_written(service: Service) -> None:
    service.backend()
    agent = Agent(service.channel)
    agent.send(redirect(0, http(5, path="/a")), synced=True)
    agent.wait(10_000, pb.RedirectState.ACKED)
    records: list[pb.L7Record] = []
    stub: Any = xds_pb2_grpc.AccessLogServiceStub(service.channel)
    call = stub.Records(pb.RecordsRequest())

    def read() -> None:
        with contextlib.suppress(grpc.RpcError):
            for batch in call:
                records.extend(batch.records)

    threading.Thread(target=read, daemon=True).start()
    eventually(lambda: service.status().access_log.readers == 1, "the reader is there")
    assert (service.code("/a"), service.code("/b")) == (200, 403)
    eventually(lambda: len(records) == 3, "records")
    assert sorted((r.http.path, r.rule_id, r.verdict) for r in records) == [
        ("/a", 5, pb.L7Record.FORWARDED),
        ("/a", 5, pb.L7Record.FORWARDED),
        ("/b", 0, pb.L7Record.DENIED),
    ]
    call.cancel()
    agent.close()


def test_killed_and_started_again_it_finds_its_envoy_and_sends_it_nothing(
    service: Service,
) -> None:
    service.backend()
    wanted = [redirect(n, http(n + 1, path=f"/{n}")) for n in range(5)]
    agent = Agent(service.channel)
    agent.send(*wanted, synced=True)
    for n in range(5):
        agent.wait(10_000 + n, pb.RedirectState.ACKED)
    (envoy,) = service.envoys()
    service.stop(signal.SIGKILL)
    assert service.envoys() == [envoy]
    assert (service.code("/0"), service.code("/1")) == (200, 403)

    service.start()
    eventually(lambda: service.status().streams, "Envoy is back")
    # Nothing is said to it before the agent has said everything: it enforces what it has.
    assert (service.code("/0"), service.code("/1")) == (200, 403)
    agent = Agent(service.channel)
    agent.send(*wanted, synced=True)
    for n in range(5):
        agent.wait(10_000 + n, pb.RedirectState.ACKED)
    assert service.envoys() == [envoy]
    (stream,) = service.status().streams
    assert stream.response_bytes < 2000, stream  # not one resource again
    assert (service.code("/0"), service.code("/1")) == (200, 403)
    eventually(lambda: service.status().access_log.records >= 3, "the log comes here now")

    # Envoy's turn to be killed.
    os.kill(envoy, signal.SIGKILL)
    eventually(lambda: service.envoys() not in ([], [envoy]), "another Envoy", within_s=30)

    def serves() -> bool:
        with contextlib.suppress(OSError), service.connect(within_s=0.1):
            return True
        return False

    eventually(serves, "it listens", within_s=30)
    assert (service.code("/0"), service.code("/1")) == (200, 403)
    agent.close()
