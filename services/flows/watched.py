"""Files that people write in YAML, and that are read again when they change."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from cilia.errors import DomainError

_MAX_BYTES: Final = 1 << 20
_CHECK_S: Final = 1.0


def read_yaml(path: Path, invalid: type[DomainError]) -> Any:
    """What the file says. Raises `invalid`, with a sentence, where it says nothing that is YAML."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise invalid(f"cannot read {path}: {error.strerror}") from error
    if len(text) > _MAX_BYTES:
        raise invalid(f"{path} is larger than {_MAX_BYTES} bytes")
    try:
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError, RecursionError) as error:
        raise invalid(f"{path} is not YAML: {str(error).splitlines()[0]}") from error


async def changes(path: Path) -> AsyncIterator[None]:
    """Each time the file is another than before: written, replaced, made, or removed."""

    def stamp() -> tuple[int, int, int] | None:
        try:
            status = path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino, status.st_size

    seen = stamp()
    while True:
        await asyncio.sleep(_CHECK_S)
        now = stamp()
        if now != seen:
            seen = now
            yield
