"""What Envoy writes, as lines of our own log.

Envoy writes to a file, not to a pipe: it outlives this service, and a pipe that nobody reads would
stop it. The file is read as it grows and emptied when it is large. A line that is none of Envoy's
log (of a stack trace, say) is passed on as it is.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any, Final

import structlog

from cilia.telemetry import fields

log = structlog.get_logger()

FORMAT: Final = '{"level":"%l","logger":"%n","msg":"%j"}'
MAX_FILE: Final = 4 << 20
MAX_LINE: Final = 4096
_READ: Final = 256 << 10
_LEVELS: Final = {"critical": "error", "error": "error", "warning": "warning", "warn": "warning"}


class LogFile:
    """Follows the file. Lines that were there before are skipped."""

    def __init__(self, path: Path, *, poll_s: float = 0.25) -> None:
        self.path = path
        self._poll_s = poll_s
        self._offset = path.stat().st_size if path.exists() else 0
        self._rest = b""

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            self.read()

    def read(self) -> int:
        """Passes on what is new; returns how many lines."""
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return 0
        try:
            size = os.fstat(fd).st_size
            if size < self._offset:
                self._offset, self._rest = 0, b""
            data = os.pread(fd, _READ, self._offset)
            self._offset += len(data)
            if self._offset == size > MAX_FILE:
                # Envoy appends, so its next line goes to the new end.
                os.ftruncate(fd, 0)
                self._offset = 0
        finally:
            os.close(fd)
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[-MAX_LINE:]
        for line in lines:
            if line.strip():
                _pass_on(line[:MAX_LINE])
        return len(lines)


def _pass_on(line: bytes) -> None:
    event = parse(line)
    # Envoy calls routine what we would not note: one step down.
    write = {"error": log.error, "warning": log.warning}.get(event.pop("level"), log.debug)
    write("Envoy wrote.", **event)


def parse(line: bytes) -> dict[str, Any]:
    """`level`, and the fields of our line."""
    text = line.decode(errors="replace")
    try:
        found = json.loads(text)
        level, message = str(found["level"]), str(found["msg"])
        logger = str(found["logger"])
    except (ValueError, KeyError, TypeError):
        return {"level": "warning", fields.LINE: text}
    return {
        "level": _LEVELS.get(level, "debug"),
        fields.LOGGER: f"envoy.{logger}",
        fields.LINE: message,
    }
