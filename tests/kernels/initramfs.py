"""The first file system of a guest: a busybox, the modules that reach the host's files, and /init.

It mounts the host's root read-only over 9p with a RAM overlay above it, so the guest has this
machine's programs, may write everywhere, and leaves nothing. This tree travels as a copy in the
archive: 9p caches sizes and names, and a file that is edited meanwhile would come torn.
"""

from __future__ import annotations

import gzip
import lzma
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from tests.kernels.packages import REPOSITORY, Kernel

# What must be there before the host's files are; all else is loaded on demand by modprobe.
MODULES: Final = ("virtio_pci", "9pnet_virtio", "9p", "overlay")

_INIT: Final = """#!/bin/busybox sh
export PATH=/bin
die() { echo "init: $*"; busybox poweroff -f; }
busybox mount -t devtmpfs dev /dev
busybox mount -t proc proc /proc
for module in @MODULES@; do busybox insmod "/modules/$module" || die "insmod $module"; done
busybox mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=512000,cache=loose host /host \\
    || die "cannot mount the host's root"
busybox mount -t tmpfs -o size=75% rw /rw
busybox mkdir /rw/upper /rw/work
busybox mount -t overlay -o lowerdir=/host,upperdir=/rw/upper,workdir=/rw/work root /root \\
    || die "cannot mount the overlay"
cd /root
busybox mount -t proc proc proc
busybox mount -t sysfs sys sys
busybox mount -t devtmpfs dev dev
busybox mkdir -p dev/pts dev/shm
busybox mount -t devpts pts dev/pts
for each in tmp run dev/shm; do busybox mount -t tmpfs tmpfs $each; done
busybox mkdir -p run/netns
busybox mount -t cgroup2 cgroup sys/fs/cgroup
busybox mkdir -p lib/modules/@RELEASE@
busybox mount -o bind /host@TREE@ lib/modules/@RELEASE@
busybox mkdir -p /tree/.venv
busybox mount -o bind /host@REPOSITORY@/.venv /tree/.venv
busybox mkdir -p .@REPOSITORY@  # it may lie below what was mounted over
busybox mount -o rbind /tree .@REPOSITORY@
busybox ln -sf /proc/self/fd dev/fd
busybox ip link set lo up
busybox hostname guest
exec busybox chroot . /bin/bash -c "$(busybox cat /command)" </dev/null
"""


def _closure(kernel: Kernel, names: Iterable[str]) -> list[Path]:
    """Files of the modules and of all they need, each after what it needs (modules.dep)."""
    needs: dict[str, list[str]] = {}
    by_name: dict[str, str] = {}
    for line in (kernel.modules / "modules.dep").read_text().splitlines():
        path, _, rest = line.partition(":")
        needs[path] = rest.split()
        by_name[Path(path).name.split(".")[0].replace("-", "_")] = path
    builtin = (kernel.modules / "modules.builtin").read_text().splitlines()
    inside = {Path(path).name.split(".")[0].replace("-", "_") for path in builtin}
    order: list[str] = []
    for name in names:
        if name in inside:
            continue
        path = by_name[name]
        # modules.dep lists what is needed deepest last
        for each in (*reversed(needs[path]), path):
            if each not in order:
                order.append(each)
    return [kernel.modules / path for path in order]


def _plain(path: Path) -> tuple[str, bytes]:
    """A module's name and bytes, decompressed: busybox's insmod takes no other."""
    data = path.read_bytes()
    if path.suffix == ".xz":
        data = lzma.decompress(data)
    return path.name.split(".ko")[0] + ".ko", data


class _Entry(NamedTuple):
    name: str
    mode: int
    data: bytes = b""
    mtime_s: int = 0


def _cpio(entries: Iterable[_Entry]) -> bytes:
    """An archive in the "newc" format (kernel: Documentation/driver-api/early-userspace)."""
    out = bytearray()
    for number, (name, mode, data, mtime_s) in enumerate((*entries, _Entry("TRAILER!!!", 0)), 1):
        encoded = os.fsencode(name) + b"\0"
        fields = (number, mode, 0, 0, 1, mtime_s, len(data), 0, 0, 0, 0, len(encoded), 0)
        out += b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        out += bytes(-len(out) % 4) + data
        out += bytes(-len(out) % 4)
    return bytes(out)


_LEFT_OUT: Final = {".git", ".venv", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis"}


def _tree() -> Iterator[_Entry]:
    """This tree as it is now, without what is cached or large; of build/, only the objects."""
    for directory, names, files in os.walk(REPOSITORY):
        here = Path(directory)
        at = here.relative_to(REPOSITORY)
        names[:] = [name for name in names if name not in _LEFT_OUT]
        if at == Path("build"):
            names[:], files = ["bpf"], []
        yield _Entry(str("tree" / at), stat.S_IFDIR | 0o755)
        for name in files:
            try:
                found, data = (here / name).lstat(), (here / name).read_bytes()
            except FileNotFoundError:  # gone since it was listed
                continue
            # the time matters: compiled Python and make compare it
            yield _Entry(
                str("tree" / at / name), stat.S_IFREG | found.st_mode & 0o777, data,
                int(found.st_mtime),
            )  # fmt: skip


def build(kernel: Kernel, busybox: Path, command: str) -> bytes:
    """An initramfs that runs `command` with bash among the host's files."""
    modules = [_plain(path) for path in _closure(kernel, MODULES)]
    init = (
        _INIT.replace("@MODULES@", " ".join(name for name, _ in modules))
        .replace("@RELEASE@", kernel.release)
        .replace("@TREE@", str(kernel.modules))
        .replace("@REPOSITORY@", str(REPOSITORY))
    )
    directories = ("bin", "dev", "proc", "host", "rw", "root", "modules")
    return gzip.compress(
        _cpio(
            [
                *(_Entry(name, stat.S_IFDIR | 0o755) for name in directories),
                _Entry("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes()),
                *(_Entry(f"modules/{name}", stat.S_IFREG | 0o644, data) for name, data in modules),
                _Entry("init", stat.S_IFREG | 0o755, init.encode()),
                _Entry("command", stat.S_IFREG | 0o644, command.encode()),
                *_tree(),
            ]
        ),
        compresslevel=1,
    )
