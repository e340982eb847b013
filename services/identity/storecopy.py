"""Backup of the running store, and restore of a stopped one."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

from cilia import kv
from cilia.errors import DomainError, Kind
from cilia.kv.backend import SupportsBackup

CHUNK_BYTES = 256 * 1024
_DRAFT = "backup-*.tmp"


class BackupBusy(DomainError):
    default_kind = Kind.EXHAUSTED

    def __init__(self) -> None:
        super().__init__("a backup is under way", cure="Try again when it has finished")


class StoreCopies:
    """Makes a copy in `directory` and streams it; one at a time, it costs the store's size."""

    def __init__(self, *, backend: SupportsBackup, directory: Path) -> None:
        self._backend = backend
        self._directory = directory
        self._busy = False

    def sweep(self) -> None:
        """Removes what a killed process left."""
        for draft in self._directory.glob(_DRAFT):
            draft.unlink(missing_ok=True)

    async def stream(self) -> AsyncIterator[bytes]:
        """The copy's bytes: a SQLite database. Raises BackupBusy, BackendUnavailable."""
        if self._busy:
            raise BackupBusy
        self._busy = True
        draft = self._directory / _DRAFT.replace("*", secrets.token_hex(4))
        try:
            await self._backend.backup(draft)
            with draft.open("rb") as copy:
                # From here on it lives as long as it is open, whatever happens to us.
                draft.unlink()
                while data := await asyncio.to_thread(copy.read, CHUNK_BYTES):
                    yield data
        finally:
            draft.unlink(missing_ok=True)
            self._busy = False


def restore(backup_path: Path, state_dir: Path) -> Path | None:
    """Puts a backup in the place of the store below `state_dir`, while no service runs on it.

    Returns where the old store was moved to. See cilia.kv.restore for the errors.
    """
    return kv.restore(backup_path, state_dir / "identity" / "store.sqlite")
