"""The admin client, against servers that answer well, badly, endlessly and not at all."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.xds.envoy import admin
from services.xds.envoy.admin import AdminClient, AdminUnavailable


@contextlib.asynccontextmanager
async def answering(path: Path, *answers: bytes, close: bool = True) -> AsyncIterator[list[bytes]]:
    """Answers the questions in turn, and remembers them."""
    asked: list[bytes] = []
    left = list(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readuntil(b"\r\n")).strip())
        with contextlib.suppress(ConnectionError):
            writer.write(left.pop(0))
            await writer.drain()
            if not close:
                await reader.read()
        writer.close()

    server = await asyncio.start_unix_server(serve, path=path)
    try:
        yield asked
    finally:
        server.close()


def answer(body: bytes, code: int = 200) -> bytes:
    return b"HTTP/1.1 %d OK\r\nContent-Length: %d\r\n\r\n%s" % (code, len(body), body)


def chunked(*chunks: bytes) -> bytes:
    body = b"".join(b"%x;x=y\r\n%s\r\n" % (len(c), c) for c in (*chunks, b""))
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body


async def test_it_reads_what_envoy_says(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    client = AdminClient(path)
    stats = b'{"stats":[{"name":"a.b","value":3},{"histograms":{}},{"name":"t","value":"x"}]}'
    async with answering(
        path,
        answer(b"LIVE\n"),
        answer(b"INITIALIZING\n", 503),
        chunked(b'{"version":"9e558093/1.40.0', b'/Clean/RELEASE/BoringSSL"}'),
        chunked(stats),
        answer(b"{}"),
    ) as asked:
        assert await client.ready()
        assert not await client.ready()
        assert await client.version() == "1.40.0"
        assert await client.stats(r"^http\.") == {"a.b": 3}
        assert await client.config_dump("dynamic_listeners") == {}
    assert asked[3] == rb"GET /stats?format=json&filter=%5Ehttp%5C. HTTP/1.1"


async def test_what_is_no_answer_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin, "MAX_ANSWER", 1000)
    client = AdminClient(tmp_path / "admin.sock", timeout_s=0.2)
    with pytest.raises(AdminUnavailable, match="is away"):
        await client.version()
    assert not await client.ready()
    big, path = b"x" * 2000, tmp_path / "admin.sock"
    for bad in (
        b"",
        b"SSH-2.0-x\r\n\r\n",
        b"HTTP/1.1 200",
        answer(b"not json"),
        answer(b"[]"),
        answer(b"{}", 500),
        answer(big),
        chunked(big),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000,
    ):
        path.unlink(missing_ok=True)
        async with answering(path, bad):
            with pytest.raises(AdminUnavailable):
                await client.version()
    path.unlink()
    async with answering(path, b"HTTP/1.1 200 OK\r\n", close=False):
        with pytest.raises(AdminUnavailable, match=r"within 0\.2 s"):
            await client.version()
