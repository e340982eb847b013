"""The workloads' server and client, over real sockets of both families."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator

import pytest

from lab import httpc, plans
from lab.httpd import Server


@pytest.fixture
def port() -> Iterator[int]:
    server = Server("deathstar", 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def fetch(method: str, url: str, **options: float) -> dict[str, object]:
    return httpc.fetch(
        method,
        url,
        family=socket.AF_UNSPEC,
        timeout_s=options.get("timeout_s", 5.0),
        stall_s=options.get("stall_s", 5.0),
        progress=False,
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_landing_over_both_families(port: int, host: str) -> None:
    if host == "[::1]" and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    result = fetch("POST", f"http://{host}:{port}/v1/request-landing")
    assert (result["status"], result["body"], result["exit"]) == (200, "Ship landed\n", 0)
    assert result["local_port"]


def test_other_routes(port: int) -> None:
    about = fetch("GET", f"http://127.0.0.1:{port}/v1")
    assert json.loads(str(about["body"]))["name"] == "deathstar"
    assert json.loads(str(about["body"]))["you"] == "127.0.0.1"
    boom = fetch("PUT", f"http://127.0.0.1:{port}/v1/exhaust-port")
    assert (boom["status"], boom["exit"]) == (503, httpc.STATUS)
    assert fetch("GET", f"http://127.0.0.1:{port}/nowhere")["status"] == 404
    assert fetch("GET", f"http://127.0.0.1:{port}/v1/plans?bytes=-1")["status"] == 400


@pytest.mark.parametrize("size", [0, 1, plans.BLOCK, plans.BLOCK + 1, 1_000_003])
def test_plans_arrive_whole(port: int, size: int) -> None:
    result = fetch("GET", f"http://127.0.0.1:{port}/v1/plans?bytes={size}")
    assert result["bytes"] == size
    assert result["sha256"] == plans.digest(size)


def test_plans_differ_from_block_to_block() -> None:
    first, second = plans.blocks(2 * plans.BLOCK)
    assert first != second


def test_failures_have_curls_numbers(port: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        refused = fetch("GET", f"http://127.0.0.1:{free.getsockname()[1]}/")
    assert (refused["exit"], refused["status"]) == (httpc.REFUSED, None)
    assert fetch("GET", "http://no.such.host.invalid/")["exit"] == httpc.NAME
    with socket.create_server(("127.0.0.1", 0)) as silent:
        stalled = fetch("GET", f"http://127.0.0.1:{silent.getsockname()[1]}/", stall_s=0.05)
    assert stalled["exit"] == httpc.TIMEOUT


def test_a_cut_answer_is_broken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")

        thread = threading.Thread(target=serve)
        thread.start()
        result = fetch("GET", f"http://127.0.0.1:{server.getsockname()[1]}/")
        thread.join()
    assert result["exit"] == httpc.BROKEN
