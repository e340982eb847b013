"""Prometheus metrics: one registry, checked names, and an exposition for a scraper or for curl.

Names are `cilia_<subsystem>_<noun>_<unit>`; each subsystem declares its own in its `metrics.py`.
Labels are bounded: never an address, an identity or a name that a user chose.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import structlog
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from cilia.errors import ConflictError, InvalidError
from cilia.telemetry import fields

log = structlog.get_logger()

REGISTRY: Final = CollectorRegistry(auto_describe=True)
ProcessCollector(registry=REGISTRY)

# The last word of a name: what is counted is `_total`; the rest are units, or counts of things.
_NAME: Final = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*\Z")
_LATENCY_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """The metrics of one subsystem."""

    def __init__(self, subsystem: str, *, registry: CollectorRegistry = REGISTRY) -> None:
        assert _NAME.match(subsystem), subsystem
        self._subsystem = subsystem
        self._registry = registry

    def _name(self, name: str) -> str:
        assert _NAME.match(name), name
        return f"cilia_{self._subsystem}_{name}"

    def counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        """`name` ends in `_total`."""
        assert name.endswith("_total"), name
        return Counter(self._name(name), text, labels, registry=self._registry)

    def gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(self._name(name), text, labels, registry=self._registry)

    def histogram(
        self,
        name: str,
        text: str,
        labels: Sequence[str] = (),
        *,
        buckets: Sequence[float] = _LATENCY_S,
    ) -> Histogram:
        """`name` ends in its unit, `_seconds` or `_bytes` or a counted noun."""
        return Histogram(self._name(name), text, labels, registry=self._registry, buckets=buckets)


def parse_address(text: str) -> Path | tuple[str, int]:
    """`/a/path` is a unix socket, `host:port`, `[v6]:port` and `:port` (loopback) are TCP.

    Raises InvalidError.
    """
    if text.startswith("/"):
        return Path(text)
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or not 0 <= int(port) <= 65535:
        raise InvalidError(
            f"{text!r} is not an address for metrics", cure="Use /a/path, host:port or [::1]:port"
        )
    return host.removeprefix("[").removesuffix("]") or "localhost", int(port)


class Exposition:
    """Serves GET /metrics, over a unix socket (0600) or TCP; a lifecycle part.

    A responder of forty lines: prometheus_client's own runs a thread and an http.server for it. It
    answers one request a connection, of at most 8 KiB and within 5 s.
    """

    def __init__(
        self, address: Path | tuple[str, int], *, registry: CollectorRegistry = REGISTRY
    ) -> None:
        self.address = address
        self._registry = registry
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        try:
            if isinstance(self.address, Path):
                if self.address.is_socket():
                    self.address.unlink()  # metrics are read by whoever asks: nobody to protect
                self._server = await asyncio.start_unix_server(
                    self._serve, path=self.address, limit=8192
                )
                self.address.chmod(0o600)
            else:
                host, port = self.address
                self._server = await asyncio.start_server(self._serve, host, port, limit=8192)
                self.address = (host, int(self._server.sockets[0].getsockname()[1]))
        except OSError as error:
            raise ConflictError(
                f"cannot serve metrics on {self.address}: {error.strerror or error}",
                cure="Choose another --metrics-address",
            ) from error
        log.info("Metrics are served.", **{fields.ADDRESS: str(self.address)})

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
            if isinstance(self.address, Path):
                self.address.unlink(missing_ok=True)
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(5):
                try:
                    head = await reader.readuntil(b"\r\n\r\n")
                except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                    head = b""
                status, kind, body = self._answer(head)
                writer.write(
                    f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n"
                    f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
                )
                writer.write(body)
                await writer.drain()
        except (TimeoutError, ConnectionError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _answer(self, head: bytes) -> tuple[str, str, bytes]:
        words = head.split(b"\r\n", 1)[0].split()
        plain = "text/plain; charset=utf-8"
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return "400 Bad Request", plain, b"not an HTTP/1 request\n"
        if words[0] != b"GET":
            return "405 Method Not Allowed", plain, b"only GET\n"
        if words[1].split(b"?")[0] not in (b"/metrics", b"/"):
            return "404 Not Found", plain, b"there is only /metrics\n"
        return "200 OK", CONTENT_TYPE_LATEST, generate_latest(self._registry)


class Registration:
    """The collector's place in the registry, as a lifecycle part."""

    def __init__(self, collector: Collector) -> None:
        self._collector = collector

    async def start(self) -> None:
        REGISTRY.register(self._collector)

    async def stop(self) -> None:
        REGISTRY.unregister(self._collector)
