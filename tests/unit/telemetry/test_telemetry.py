"""Logs in both shapes, metric names, and the exposition over real sockets."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from prometheus_client import CollectorRegistry

from cilia.errors import InvalidError
from cilia.telemetry import fields
from cilia.telemetry import log as log_setup
from cilia.telemetry.metrics import Exposition, Metrics, parse_address


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


def test_json_lines_have_an_order() -> None:
    out = io.StringIO()
    logger = structlog.get_logger()  # made before the setup, as modules do
    log_setup.setup("agent", stream=out)
    logger.info("An endpoint was added.", **{fields.ENDPOINT_ID: 7, fields.IPV4: "10.0.0.1"})
    logger.debug("Not shown.")
    logging.getLogger("grpc").warning("from %s", "a library")
    first, second = (json.loads(line) for line in out.getvalue().splitlines())
    assert list(first) == ["time", "level", "service", "msg", "endpoint_id", "ipv4"]
    assert (first["service"], first["msg"]) == ("agent", "An endpoint was added.")
    assert (second["msg"], second["logger"], second["level"]) == (
        "from a library",
        "grpc",
        "warning",
    )


def test_tracebacks_are_in_the_line() -> None:
    out = io.StringIO()
    log_setup.setup("agent", stream=out)
    structlog.get_logger().error("It broke.", exc_info=ZeroDivisionError("x"))
    [line] = out.getvalue().splitlines()
    assert "ZeroDivisionError" in json.loads(line)["exception"]


def test_people_get_plain_lines_and_levels_are_checked() -> None:
    out = io.StringIO()
    log_setup.setup("agent", level="debug", json=False, stream=out)
    structlog.get_logger().debug("A row changed.", count=3)
    assert "A row changed." in out.getvalue()
    assert "count=3" in out.getvalue()
    with pytest.raises(InvalidError, match="unknown log level 'loud'"):
        log_setup.setup("agent", level="loud")


def test_metric_names_are_checked() -> None:
    metrics = Metrics("ipcache", registry=CollectorRegistry())
    with pytest.raises(AssertionError):
        metrics.counter("errors", "Counts.")
    with pytest.raises(AssertionError):
        metrics.gauge("Entries", "Counts.")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/run/m.sock", Path("/run/m.sock")),
        ("127.0.0.1:9", ("127.0.0.1", 9)),
        ("[::1]:9", ("::1", 9)),
        (":9", ("localhost", 9)),
    ],
)
def test_addresses(text: str, expected: object) -> None:
    assert parse_address(text) == expected


@pytest.mark.parametrize("text", ["", "x", "host:", "host:99999", "host:-1", "host:²"])
def test_bad_addresses(text: str) -> None:
    with pytest.raises(InvalidError):
        parse_address(text)


async def test_exposition(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    Metrics("ipcache", registry=registry).gauge("entries", "Rows.").set(3)

    async def ask(address: Path | tuple[str, int], request: bytes) -> bytes:
        if isinstance(address, Path):
            reader, writer = await asyncio.open_unix_connection(address)
        else:
            reader, writer = await asyncio.open_connection(*address)
        writer.write(request)
        writer.write_eof()
        answer = await reader.read()
        writer.close()
        return answer

    for wanted in (tmp_path / "m.sock", ("127.0.0.1", 0)):
        exposition = Exposition(wanted, registry=registry)
        await exposition.start()
        try:
            async with asyncio.timeout(10):
                answer = await ask(exposition.address, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
                head, _, body = answer.partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 200 OK")
                assert b"cilia_ipcache_entries 3.0" in body
                assert f"Content-Length: {len(body)}".encode() in head
                for request, code in (
                    (b"GET /x HTTP/1.1\r\n\r\n", b"404"),
                    (b"POST / HTTP/1.1\r\n\r\n", b"405"),
                    (b"garbage\r\n\r\n", b"400"),
                    (b"x" * 20000, b"400"),
                    (b"", b"400"),
                ):
                    assert (await ask(exposition.address, request)).split()[1] == code
        finally:
            await exposition.stop()
    assert not (tmp_path / "m.sock").exists()


async def test_the_exposition_socket_is_private(tmp_path: Path) -> None:
    exposition = Exposition(tmp_path / "m.sock", registry=CollectorRegistry())
    await exposition.start()
    assert stat.S_IMODE((tmp_path / "m.sock").stat().st_mode) == 0o600
    await exposition.stop()
