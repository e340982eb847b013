"""System calls that libbpf 1.1 and the standard library do not offer."""

from __future__ import annotations

import ctypes as C
import errno
import functools
import os
import platform
from collections.abc import Callable
from typing import Any

from cilia.bpf.errors import BpfError

_BPF = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432  # one number on every architecture

_PROG_QUERY = 16
_FSCONFIG_CMD_CREATE = 6
CLONE_NEWNET = 0x40000000

_U32 = C.c_uint32
_U64 = C.c_uint64


class _QueryAttr(C.Structure):
    """The member `query` of union bpf_attr."""

    _fields_ = [
        ("target", _U32),
        ("attach_type", _U32),
        ("query_flags", _U32),
        ("attach_flags", _U32),
        ("prog_ids", _U64),
        ("count", _U32),
        ("pad", _U32),
        ("prog_attach_flags", _U64),
        ("link_ids", _U64),
        ("link_attach_flags", _U64),
        ("revision", _U64),
    ]


@functools.cache
def _libc() -> Any:
    return C.CDLL(None, use_errno=True)


def _syscall(operation: str, number: int, *arguments: Any) -> int:
    syscall: Callable[..., int] = _libc().syscall
    result = syscall(C.c_long(number), *arguments)
    if result < 0:
        raise BpfError(C.get_errno(), operation)
    return result


def query_tcx(ifindex: int, attach_type: int) -> list[tuple[int, int]]:
    """(program id, link id) of each tcx attachment in the order they run; link id 0: none.

    BpfError(EINVAL) where the kernel has no tcx (before 6.6).
    """
    room = 64
    programs, links = (_U32 * room)(), (_U32 * room)()
    attr = _QueryAttr(
        target=ifindex,
        attach_type=attach_type,
        count=room,
        prog_ids=C.addressof(programs),
        link_ids=C.addressof(links),
    )
    number = _BPF.get(platform.machine())
    if number is None:
        raise BpfError(errno.ENOSYS, "query tcx", detail=f"unknown machine {platform.machine()}")
    try:
        _syscall("query tcx", number, C.c_int(_PROG_QUERY), C.byref(attr), C.c_uint(C.sizeof(attr)))
    except BpfError as error:
        if error.errno == errno.ENOENT:  # nothing has ever been attached there
            return []
        raise
    return [(programs[n], links[n]) for n in range(min(attr.count, room))]


def detached_bpffs() -> int:
    """A bpffs that is mounted nowhere, as a directory descriptor; it goes when that is closed."""
    context = _syscall("open file system bpf", _FSOPEN, C.c_char_p(b"bpf"), C.c_uint(1))
    try:
        _syscall(
            "configure file system bpf",
            _FSCONFIG,
            C.c_int(context),
            C.c_uint(_FSCONFIG_CMD_CREATE),
            None,
            None,
            C.c_int(0),
        )
        return _syscall(
            "mount file system bpf", _FSMOUNT, C.c_int(context), C.c_uint(1), C.c_uint(0)
        )
    finally:
        os.close(context)


def unshare_net() -> None:
    """Give the calling thread a network namespace of its own. For threads that end soon after."""
    if _libc().unshare(C.c_int(CLONE_NEWNET)) < 0:
        raise BpfError(C.get_errno(), "unshare network namespace")
