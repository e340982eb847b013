"""bpffs and cgroup2: where they are, and how to have a bpffs of one's own.

`ip netns exec` gives its command a fresh /sys, where /sys/fs/bpf is an empty directory, so ours is
mounted elsewhere (under /run) and is found by asking the file system what it is.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import sys
from pathlib import Path
from typing import Final

from cilia.errors import PreconditionError
from cilia.net.errors import NetworkError

_BPF_FS_MAGIC: Final = 0xCAFE4A11
_CGROUP2_MAGIC: Final = 0x63677270
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_RELATIME = 0x2, 0x4, 0x8, 1 << 21
_MNT_DETACH: Final = 2

_libc = ctypes.CDLL(None, use_errno=True)


class MountError(PreconditionError):
    """A file system cannot be mounted where it was asked for."""


def filesystem_magic(path: Path) -> int | None:
    """f_type of statfs(2) for the path; None when there is no such path."""
    buffer = ctypes.create_string_buffer(256)  # struct statfs: 120 bytes, f_type first
    if _libc.statfs(os.fsencode(path), buffer) != 0:
        number = ctypes.get_errno()
        if number in (errno.ENOENT, errno.ENOTDIR):
            return None
        raise NetworkError(f"cannot examine {path}", number)
    return int.from_bytes(buffer.raw[:4], sys.byteorder)


def is_bpffs(path: Path) -> bool:
    return filesystem_magic(path) == _BPF_FS_MAGIC


def mount_bpffs(path: Path, *, mode: int = 0o700) -> bool:
    """Makes the directory a bpffs, readable by root only; True when it was mounted now.

    Raises MountError for a directory that holds files, which a mount would hide.
    """
    if is_bpffs(path):
        return False
    try:
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise MountError(
                f"cannot mount a bpffs on {path}: the directory is not empty",
                cure="Give an empty directory, or one that is a bpffs",
            )
    except OSError as error:
        raise MountError(
            f"cannot create {path} for a bpffs: {error.strerror}",
            cure="Choose a directory that can be written",
        ) from error
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC | _MS_RELATIME
    if _libc.mount(b"bpf", os.fsencode(path), b"bpf", flags, f"mode={mode:o}".encode()) != 0:
        raise NetworkError(f"cannot mount a bpffs on {path}", ctypes.get_errno())
    return True


def umount_bpffs(path: Path) -> bool:
    """Unmounts the bpffs that is mounted exactly there, with all that is pinned in it.

    False when there is none: a directory inside a bpffs is not unmounted.
    """
    if not is_bpffs(path) or not path.is_mount():
        return False
    name = os.fsencode(path)
    if _libc.umount2(name, 0) == 0:
        return True
    number = ctypes.get_errno()
    # Somebody stands in it: take it out of sight now, it ends when they leave.
    if number == errno.EBUSY and _libc.umount2(name, _MNT_DETACH) == 0:
        return True
    raise NetworkError(f"cannot unmount {path}", number)


def find_cgroup2(mountinfo: Path = Path("/proc/self/mountinfo")) -> Path:
    """The mount point of cgroup2: its root if it is mounted more than once. Raises MountError."""
    found: list[tuple[int, str]] = []
    for line in mountinfo.read_text().splitlines():
        # "36 35 98:0 /root /mount/point options [optional ...] - type source superoptions"
        # (proc(5))
        before, _, after = line.partition(" - ")
        words, kind = before.split(), after.split(maxsplit=1)[:1]
        if kind == ["cgroup2"] and len(words) >= 5:
            found.append((len(words[3]), _unescape(words[4])))
    for _, point in sorted(found):
        if filesystem_magic(Path(point)) == _CGROUP2_MAGIC:
            return Path(point)
    raise MountError(
        "cgroup2 is not mounted",
        cure="mount -t cgroup2 none /sys/fs/cgroup/unified",
    )


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
