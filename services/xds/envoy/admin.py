"""Envoy's admin interface: a few questions over HTTP/1.1 on a unix socket.

A connection a question. Answers are bounded in size and time, and an Envoy that does not answer is
an `AdminUnavailable`, never a hang.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from cilia.errors import UnavailableError

_MAX_HEAD: Final = 16 << 10
MAX_ANSWER: Final = 64 << 20


class AdminUnavailable(UnavailableError):
    """Envoy's admin interface did not answer, or not with what was asked for."""

    default_cure = "See whether Envoy runs: cilia xds status"


class AdminClient:
    """Asks one Envoy."""

    def __init__(self, socket: Path, *, timeout_s: float = 5.0) -> None:
        self.socket = socket
        self._timeout_s = timeout_s

    async def ready(self) -> bool:
        """Whether it has initialised: its control plane spoke, and its listeners are up."""
        try:
            status, _ = await self._ask("GET", "/ready")
        except AdminUnavailable:
            return False
        return status == 200

    async def version(self) -> str:
        """`1.40.0`. Raises AdminUnavailable."""
        info = await self._json("/server_info")
        # <commit>/<version>/Clean/RELEASE/BoringSSL
        parts = str(info.get("version", "")).split("/")
        return parts[1] if len(parts) > 1 else parts[0]

    async def stats(self, pattern: str) -> dict[str, int]:
        """Counters and gauges whose names the regular expression finds. Raises AdminUnavailable."""
        answer = await self._json(f"/stats?format=json&filter={quote(pattern, safe='')}")
        found: dict[str, int] = {}
        for entry in answer.get("stats", []):
            if isinstance(entry, dict) and isinstance(entry.get("value"), int):
                found[str(entry["name"])] = entry["value"]
        return found

    async def config_dump(self, resource: str = "") -> Any:
        """Its configuration, secrets redacted; `resource` narrows it. Raises AdminUnavailable."""
        query = f"?resource={quote(resource, safe='')}" if resource else ""
        return await self._json(f"/config_dump{query}")

    async def stop_listening(self) -> None:
        """Has it close its listeners, and serve the connections that it has. Raises
        AdminUnavailable."""
        status, _ = await self._ask("POST", "/drain_listeners")
        if status != 200:
            raise AdminUnavailable(f"Envoy answered {status} to closing its listeners")

    async def _json(self, path: str) -> Any:
        status, body = await self._ask("GET", path)
        if status != 200:
            raise AdminUnavailable(f"Envoy answered {status} to {path}")
        try:
            answer = json.loads(body)
        except ValueError as error:
            raise AdminUnavailable(f"Envoy's answer to {path} is not JSON: {error}") from error
        if not isinstance(answer, dict):
            raise AdminUnavailable(f"Envoy's answer to {path} is no object")
        return answer

    async def _ask(self, method: str, path: str) -> tuple[int, bytes]:
        try:
            async with asyncio.timeout(self._timeout_s):
                reader, writer = await asyncio.open_unix_connection(
                    str(self.socket), limit=_MAX_HEAD
                )
                try:
                    writer.write(
                        f"{method} {path} HTTP/1.1\r\nHost: envoy\r\nConnection: close\r\n"
                        "Content-Length: 0\r\n\r\n".encode()
                    )
                    return await _answer(reader)
                finally:
                    writer.close()
                    with contextlib.suppress(OSError):
                        await writer.wait_closed()
        except TimeoutError as error:
            raise AdminUnavailable(
                f"Envoy did not answer {path} within {self._timeout_s:g} s"
            ) from error
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            raise AdminUnavailable(
                f"Envoy's admin interface at {self.socket} is away: {error}"
            ) from error


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.split("\r\n")
    words = first.split()
    if len(words) < 2 or not words[1].isdigit():
        raise AdminUnavailable(f"Envoy's admin interface answered {first[:80]!r}")
    headers = {
        name.strip().lower(): value.strip()
        for name, _, value in (line.partition(":") for line in lines if line)
    }
    if headers.get("transfer-encoding", "").lower() == "chunked":
        return int(words[1]), await _chunks(reader)
    if length := headers.get("content-length"):
        if not length.isdigit() or int(length) > MAX_ANSWER:
            raise AdminUnavailable(f"Envoy's answer has a length of {length[:20]}")
        return int(words[1]), await reader.readexactly(int(length))
    return int(words[1]), await reader.read(MAX_ANSWER)


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    body = bytearray()
    while True:
        line = (await reader.readuntil(b"\r\n")).strip().split(b";")[0]
        try:
            size = int(line, 16)
        except ValueError:
            raise AdminUnavailable("Envoy's answer is not chunked as it says") from None
        if size == 0:
            return bytes(body)
        if len(body) + size > MAX_ANSWER:
            raise AdminUnavailable(f"Envoy's answer is longer than {MAX_ANSWER} bytes")
        body += await reader.readexactly(size)
        await reader.readexactly(2)
