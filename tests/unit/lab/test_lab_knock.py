"""The client of `policy test --level live`, on loopback."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from cli.policy_live import judged
from lab.knock import _checksum, ask, knock


@pytest.fixture
def port() -> Iterator[int]:
    """A port where somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        found: int = sock.getsockname()[1]
        return found


def test_who_listens_is_open_and_who_does_not_refuses(port: int) -> None:
    assert knock("tcp", "127.0.0.1", port, 2)["outcome"] == "open"
    assert knock("tcp", "127.0.0.1", free_port(), 2)["outcome"] == "refused"
    assert knock("udp", "127.0.0.1", free_port(), 2)["outcome"] == "refused"


def test_who_says_nothing_is_silent() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        assert knock("udp", "127.0.0.1", sock.getsockname()[1], 0.1)["outcome"] == "silent"


def test_requests_have_a_status() -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            good = (self.headers["Host"], self.headers["X-A"]) == ("b.org", "1")
            self.send_response(204 if good and self.path == "/x" else 400)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        seen = ask("PUT", "/x", "b.org", ["X-A: 1"], "127.0.0.1", server.server_port, 2)
        thread.join()
    assert seen == {"outcome": "open", "detail": "status 204", "status": 204}


def test_checksum_of_rfc_1071() -> None:
    data = bytes.fromhex("0001f203f4f5f6f7")
    assert _checksum(data) == 0xFFFF - 0xDDF2


@pytest.mark.parametrize(
    ("outcome", "status", "requested", "allowed"),
    [
        ("open", None, False, True),
        ("open", 200, True, True),
        ("open", 404, True, True),
        ("open", 403, True, False),
        ("refused", None, False, True),
        ("refused", None, True, None),
        ("silent", None, False, False),
        ("unreachable", None, False, None),
    ],
)
def test_what_an_outcome_says(
    outcome: str, status: int | None, requested: bool, allowed: bool | None
) -> None:
    answer = {"outcome": outcome, "detail": "", "status": status}
    assert judged(answer, requested).allowed is allowed
