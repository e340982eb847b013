"""nftables, by its own program and its JSON (libnftables-json(5)).

One call of `apply` is one transaction: all of its commands take effect, at once, or none.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any, Final

from cilia.errors import DomainError, Kind

_TIMEOUT_S: Final = 20.0

Command = Mapping[str, Any]


class NftError(DomainError):
    """nft is not there, or refused; the message has its words."""

    default_kind = Kind.PRECONDITION


def available() -> bool:
    return shutil.which("nft") is not None


def apply(commands: Sequence[Command]) -> None:
    """Runs commands in the calling thread's network namespace. Raises NftError."""
    _run("-j", "-f", "-", text=json.dumps({"nftables": commands}))


def table(family: str, name: str) -> list[dict[str, Any]] | None:
    """What a table holds, without the handles that the kernel numbers; None when there is none.

    Raises NftError.
    """
    try:
        output = _run("-j", "list", "table", family, name)
    except NftError as error:
        if "No such file or directory" in error.message:
            return None
        raise
    found = json.loads(output)["nftables"]
    return [_without_handles(item) for item in found if "metainfo" not in item]


def _without_handles(item: dict[str, Any]) -> dict[str, Any]:
    return {
        kind: {key: value for key, value in what.items() if key != "handle"}
        for kind, what in item.items()
    }


def _run(*arguments: str, text: str = "") -> str:
    try:
        done = subprocess.run(
            ["nft", *arguments],
            input=text,
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT_S,
        )
    except FileNotFoundError:
        raise NftError(
            "the program nft is not installed",
            cure="Install nftables (Debian, Ubuntu: apt-get install nftables)",
        ) from None
    except subprocess.TimeoutExpired:
        raise NftError(f"nft {' '.join(arguments)} did not end within {_TIMEOUT_S:g} s") from None
    if done.returncode:
        said = " ".join(done.stderr.split())[:500]
        raise NftError(f"nft {' '.join(arguments)}: {said or f'exit code {done.returncode}'}")
    return done.stdout
