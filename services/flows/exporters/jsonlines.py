"""A file of lines, rotated: file, file.1 (the newest), file.2 ..., compressed if asked to."""

from __future__ import annotations

import contextlib
import gzip
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

from services.flows.exporters.pump import SinkFailed


class RotatedFile:
    """Appends lines; a line is never split between files, and one too long gets its own."""

    def __init__(
        self, path: Path, *, max_bytes: int, backups: int = 5, compress: bool = False
    ) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._backups = backups
        self._compress = compress
        self._out: IO[bytes] | None = None
        self._size = 0

    def write(self, lines: Iterable[bytes]) -> None:
        """Raises SinkFailed; lines before the failure may have been written."""
        try:
            for line in lines:
                out = self._open()
                if self._size and self._size + len(line) > self._max_bytes:
                    self._rotate()
                    out = self._open()
                out.write(line)
                self._size += len(line)
            if self._out is not None:
                self._out.flush()
        except OSError as error:
            self.close()
            raise SinkFailed(f"cannot write {self._path}: {error.strerror or error}") from error

    def close(self) -> None:
        out, self._out = self._out, None
        if out is not None:
            with contextlib.suppress(OSError):
                out.close()

    def _open(self) -> IO[bytes]:
        if self._out is not None:
            return self._out
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(
            self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640
        )
        self._out = os.fdopen(descriptor, "ab", buffering=1 << 18)
        self._size = os.fstat(descriptor).st_size
        self._end_half_line(descriptor)
        return self._out

    def _end_half_line(self, descriptor: int) -> None:
        """A run that was killed may have left a line without its end."""
        if not self._size:
            return
        with self._path.open("rb") as written:
            written.seek(-1, os.SEEK_END)
            if written.read(1) != b"\n":
                os.write(descriptor, b"\n")
                self._size += 1

    def _rotate(self) -> None:
        self.close()
        if not self._backups:
            self._path.unlink(missing_ok=True)
            return
        for number in range(self._backups, 0, -1):
            for suffix in ("", ".gz"):
                old = self._backup(number, suffix)
                if number == self._backups:
                    old.unlink(missing_ok=True)
                elif old.exists():
                    old.rename(self._backup(number + 1, suffix))
        first = self._backup(1, "")
        self._path.rename(first)
        if self._compress:
            packed = self._backup(1, ".gz")
            with first.open("rb") as source, gzip.open(packed, "wb") as target:
                shutil.copyfileobj(source, target)
            first.unlink()

    def _backup(self, number: int, suffix: str) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}{suffix}")


class JsonLines:
    """A sink that writes what `line` makes of each message."""

    def __init__(self, out: RotatedFile, line: Callable[[bytes], bytes]) -> None:
        self._out = out
        self._line = line

    def write(self, messages: Iterable[bytes]) -> None:
        self._out.write([self._line(message) for message in messages])

    def close(self) -> None:
        self._out.close()
