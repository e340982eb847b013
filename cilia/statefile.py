"""Files that survive a crash, and directories that have one owner.

`write` leaves either the old or the new content, whole, whatever happens: the data goes to a
temporary file beside the target, is synced, renamed over it, and the directory is synced. What a
crash leaves behind is a `.name.*.tmp` file, which `sweep` removes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cilia.errors import DomainError, Kind


class StateFileDamaged(DomainError):
    """A state file cannot be understood. It is left as it is."""

    default_kind = Kind.DATA_LOSS

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(
            f"the state file {path} is damaged: {why}",
            cure="Restore it from a backup, or move it away to start without it",
        )
        self.path = path


class StateFileUnreadable(DomainError):
    """The system refuses to read or write a state file."""

    default_kind = Kind.PRECONDITION

    def __init__(self, path: Path, error: OSError, *, verb: str = "read") -> None:
        super().__init__(
            f"cannot {verb} the state file {path}: {error.strerror or error}",
            cure="Check the permissions and the free space of the state directory",
        )
        self.path = path


class StateDirectoryLocked(DomainError):
    """Another process owns the directory."""

    default_kind = Kind.CONFLICT

    def __init__(self, path: Path, pid: int | None, owner: str) -> None:
        holder = f"process {pid}" if pid else "another process"
        if owner:
            holder += f" ({owner})"
        super().__init__(
            f"the directory {path} is in use by {holder}",
            cure="Stop that process first, or give this one a directory of its own",
        )
        self.path = path
        self.pid = pid


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def ensure_directory(path: Path, *, mode: int = 0o700) -> None:
    """Creates a directory and its parents; the mode is for what is created here only."""
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
    except OSError as error:
        raise StateFileUnreadable(path, error, verb="create") from error


def write(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replaces the file's content atomically and durably; returns when it is on the disk."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view) :]
                os.fsync(fd)
            finally:
                os.close(fd)
            temporary.rename(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)
    except OSError as error:
        raise StateFileUnreadable(path, error, verb="write") from error


def append(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Adds to the end of a file, durably. A crash may leave a part of it."""
    try:
        known = path.exists()
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, mode)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        if not known:
            sync_directory(path.parent)
    except OSError as error:
        raise StateFileUnreadable(path, error, verb="write") from error


def read(path: Path) -> bytes | None:
    """The file's content; None when there is no such file."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StateFileUnreadable(path, error) from error


def write_json(path: Path, value: object, *, mode: int = 0o600) -> None:
    write(path, json.dumps(value, indent=1, sort_keys=True).encode() + b"\n", mode=mode)


def read_json(path: Path) -> Any:
    """The file's JSON value; None when there is no such file.

    Raises StateFileDamaged when it is not JSON: an empty file is damage too.
    """
    data = read(path)
    if data is None:
        return None
    if not data.strip():
        raise StateFileDamaged(path, "it is empty")
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise StateFileDamaged(path, f"byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise StateFileDamaged(
            path, f"line {error.lineno}, column {error.colno}: {error.msg}"
        ) from error


def remove(path: Path) -> None:
    """Removes a file durably; an absent one is success."""
    try:
        path.unlink(missing_ok=True)
        if path.parent.is_dir():
            sync_directory(path.parent)
    except OSError as error:
        raise StateFileUnreadable(path, error, verb="remove") from error


def set_aside(path: Path) -> Path:
    """Renames a damaged file to `<name>.damaged-N`, a new name each time; returns the new path."""
    number = 1
    while True:
        target = path.with_name(f"{path.name}.damaged-{number}")
        try:
            os.link(path, target)
        except FileExistsError:
            number += 1
            continue
        except OSError as error:
            raise StateFileUnreadable(path, error, verb="set aside") from error
        remove(path)
        return target


def sweep(directory: Path) -> int:
    """Removes what interrupted writes left in the directory; returns how many files."""
    count = 0
    for leftover in directory.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
        count += 1
    return count


class DirectoryLock:
    """Exclusive ownership of a directory, for as long as the process lives.

    The lock is the kernel's (flock on `<directory>/lock`), so a killed owner leaves none. The file
    holds the owner's pid and name, for the message that the second one is refused with.
    """

    def __init__(self, directory: Path, *, owner: str) -> None:
        self.directory = directory
        self.owner = owner
        self._fd = -1

    def acquire(self) -> None:
        """Raises StateDirectoryLocked when another process holds it."""
        assert self._fd < 0, "the lock is held already"
        ensure_directory(self.directory)
        path = self.directory / "lock"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StateFileUnreadable(path, error, verb="open") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid, owner = _holder(os.pread(fd, 200, 0))
            os.close(fd)
            raise StateDirectoryLocked(self.directory, pid, owner) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()} {self.owner}\n".encode(), 0)
        self._fd = fd

    def release(self) -> None:
        if self._fd >= 0:
            # The file stays: removing it would let two processes lock two files of one name.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, 0)
            os.close(self._fd)
            self._fd = -1

    async def start(self) -> None:
        self.acquire()

    async def stop(self) -> None:
        self.release()

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


def _holder(content: bytes) -> tuple[int | None, str]:
    words = content.decode(errors="replace").split(maxsplit=1)
    if not words or not words[0].isdigit():
        return None, ""
    return int(words[0]), words[1].strip() if len(words) > 1 else ""
