"""Secrets in files: `<directory>/<namespace>/<name>/<item>`, as Kubernetes mounts them.

Read when a redirect is translated. `changed()` tells when a file that was read differs now, so that
redirects can be translated anew.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

MAX_ITEM: Final = 256 << 10
MAX_ITEMS: Final = 64
_NAME: Final = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,251}[A-Za-z0-9])?")

_Stamp = tuple[tuple[str, int, int], ...] | None


class SecretFiles:
    """A SecretReader."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._read: dict[tuple[str, str], _Stamp] = {}

    def __call__(self, secret: tuple[str, str]) -> Mapping[str, bytes] | None:
        path = self._path(secret)
        if path is None:
            return None
        self._read[secret] = _stamp(path)
        try:
            names = sorted(entry.name for entry in path.iterdir() if not _hidden(entry.name))
        except OSError:
            return None
        if len(names) > MAX_ITEMS:
            return None
        found: dict[str, bytes] = {}
        for name in names:
            content = _content(path / name)
            if content is not None:
                found[name] = content
        return found

    def changed(self) -> bool:
        """Whether something that was read has changed since; says so once."""
        now = {
            secret: _stamp(path)
            for secret in self._read
            if (path := self._path(secret)) is not None
        }
        if now == self._read:
            return False
        self._read = dict(now)
        return True

    def _path(self, secret: tuple[str, str]) -> Path | None:
        # The names come from policies: none may lead out of the directory.
        if not all(_NAME.fullmatch(part) and ".." not in part for part in secret):
            return None
        return self._directory.joinpath(*secret)


def _hidden(name: str) -> bool:
    return name.startswith(".")  # ..data and ..<time> of a mounted secret


def _stamp(path: Path) -> _Stamp:
    try:
        entries = [
            (entry.name, status.st_mtime_ns, status.st_ino)
            for entry in path.iterdir()
            if not _hidden(entry.name)
            for status in (entry.stat(),)
        ]
    except OSError:
        return None
    return tuple(sorted(entries))


def _content(path: Path) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return None
        content = os.read(fd, MAX_ITEM + 1)
    except OSError:
        return None
    finally:
        os.close(fd)
    return content if len(content) <= MAX_ITEM else None
