"""A tiny HTTP server for workloads: `python -m lab.httpd [--name NAME] [--port 80]`.

Standard library only, IPv4 and IPv6 on one socket, a thread a connection. Routes of the Star Wars
scene: GET / and /v1, POST /v1/request-landing, PUT /v1/exhaust-port; and GET
/v1/plans?bytes=N&rate=R, which sends N bytes in chunks at R bytes a second (0: as fast as it can).
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from lab import plans

MAX_PLANS = 1 << 34  # bytes


class Server(ThreadingHTTPServer):
    """Dual stack where the machine has IPv6, IPv4 alone where it has not."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, name: str, port: int) -> None:
        self.name = name
        self.address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        super().__init__(("", port), Handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # Not HTTPServer's: it looks up the host's name, which may ask a resolver and hang.
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.name, self.server_address[1]


class Handler(BaseHTTPRequestHandler):
    """The routes."""

    protocol_version = "HTTP/1.1"
    server: Server
    timeout = 60

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        match url.path:
            case "/" | "/v1":
                about = {
                    "name": self.server.name,
                    "you": self.client_address[0].removeprefix("::ffff:"),
                    "endpoints": ["POST /v1/request-landing", "PUT /v1/exhaust-port",
                                  "GET /v1/plans?bytes=N&rate=R"],
                }  # fmt: skip
                self._answer(200, json.dumps(about) + "\n", kind="application/json")
            case "/v1/plans":
                self._plans(parse_qs(url.query))
            case _:
                self._answer(404, "No such place\n")

    def do_POST(self) -> None:
        self._discard_body()
        if urlsplit(self.path).path == "/v1/request-landing":
            self._answer(200, "Ship landed\n")
        else:
            self._answer(404, "No such place\n")

    def do_PUT(self) -> None:
        self._discard_body()
        if urlsplit(self.path).path == "/v1/exhaust-port":
            self._answer(503, "Panic: deathstar exploded\n")
        else:
            self._answer(404, "No such place\n")

    def _discard_body(self) -> None:
        left = int(self.headers.get("Content-Length") or 0)
        while left > 0:
            part = self.rfile.read(min(left, 65536))
            if not part:
                return
            left -= len(part)

    def _answer(self, status: int, text: str, *, kind: str = "text/plain") -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _plans(self, query: dict[str, list[str]]) -> None:
        try:
            size = int(query.get("bytes", ["1048576"])[0])
            rate = int(query.get("rate", ["0"])[0])
        except ValueError:
            size = rate = -1
        if not 0 <= size <= MAX_PLANS or rate < 0:
            self._answer(400, f"bytes must be 0 to {MAX_PLANS}, rate 0 or more\n")
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        started, sent = time.monotonic(), 0
        for block in plans.blocks(size):
            self.wfile.write(b"%x\r\n%b\r\n" % (len(block), block))
            sent += len(block)
            if rate:
                time.sleep(max(0.0, started + sent / rate - time.monotonic()))
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: object) -> None:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        peer = self.client_address[0].removeprefix("::ffff:")
        sys.stdout.write(f"{stamp} {peer} {format % args}\n")
        sys.stdout.flush()


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(prog="python -m lab.httpd", description=__doc__)
    parser.add_argument("--name", default=socket.gethostname(), help="what GET / answers")
    parser.add_argument("--port", type=int, default=80)
    options = parser.parse_args()
    try:
        server = Server(options.name, options.port)
    except OSError as error:
        sys.exit(f"cannot listen on port {options.port}: {error}")
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    main()
