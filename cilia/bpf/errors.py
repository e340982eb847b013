"""What can go wrong between us and the kernel, said so that an operator can act on it.

Every failure carries the operation that was tried, the object it was tried on, the errno and, where
one is known, the cure.
"""

from __future__ import annotations

import errno as _errno
import os
from pathlib import Path

# The kernel's own ENOTSUPP (include/linux/errno.h) leaks from bpf(2) and has no name in libc.
ENOTSUPP = 524

_CURES = {
    _errno.EPERM: (
        "run as root, or give the process CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON (CAP_SYS_ADMIN to "
        "mount bpffs); on kernels before 5.11 RLIMIT_MEMLOCK may be too low as well"
    ),
    _errno.ENOMEM: "the kernel is out of memory for this process: lower the map sizes or raise the "
    "memory limit of its cgroup",
    _errno.ENOSPC: "the kernel has no room left for it: raise the map's size, or remove what is "
    "not used any more",
    _errno.E2BIG: "it is larger than the kernel takes: lower the size that was asked for",
    _errno.EEXIST: "something of that name or place is there already: remove it, or replace it",
    _errno.ENODEV: "the network device is gone: check that its index belongs to this namespace",
}


def errno_text(code: int) -> str:
    """`code` as people read it."""
    if code == ENOTSUPP:
        return "Operation not supported by the kernel (ENOTSUPP)"
    name = _errno.errorcode.get(code)
    return f"{os.strerror(code)} ({name})" if name else f"errno {code}"


class BpfError(OSError):
    """An operation on eBPF objects failed.

    `errno` is the kernel's (positive). `operation` is a verb phrase ("update map"), `subject` the
    name of the object, `cure` what an operator can do, or None.
    """

    def __init__(
        self,
        code: int,
        operation: str,
        subject: str = "",
        *,
        detail: str = "",
        cure: str | None = None,
    ) -> None:
        super().__init__(code, errno_text(code))
        self.operation = operation
        self.subject = subject
        self.detail = detail
        self.cure = cure if cure is not None else _CURES.get(code)

    def brief(self) -> str:
        """What happened, without the cure."""
        text = self.operation
        if self.subject:
            text += f" {self.subject}"
        text += f": {errno_text(self.errno or 0)}"
        if self.detail:
            text += f": {self.detail}"
        return text

    def __str__(self) -> str:
        text = self.brief()
        if self.cure:
            text += f" [cure: {self.cure}]"
        return text


class LayoutError(BpfError):
    """A structure of ours is not what the object file says it is: nothing may be loaded."""

    def __init__(self, subject: str, struct_name: str, field: str | None, detail: str) -> None:
        where = f"struct {struct_name}" + (f", field {field}" if field else "")
        super().__init__(
            _errno.EINVAL,
            "check layouts of",
            subject,
            detail=f"{where}: {detail}",
            cure="the object and the agent are of different builds: rebuild the objects (make bpf)",
        )
        self.struct_name = struct_name
        self.field = field


class VerifierError(BpfError):
    """The kernel's verifier refused a program. What ran before still runs.

    `log` is the whole log, `program` the name of the refused program, `saved` the file that holds
    the log, if it could be written.
    """

    TAIL_LINES = 25

    def __init__(
        self,
        code: int,
        subject: str,
        *,
        program: str,
        log: str,
        saved: Path | None,
        detail: str = "",
    ) -> None:
        super().__init__(code, "load", subject, detail=detail)
        self.program = program
        self.log = log
        self.saved = saved
        if code != _errno.EPERM or log:
            self.cure = None

    def tail(self) -> str:
        """The end of the log, where the reason is."""
        return "\n".join(self.log.rstrip().splitlines()[-self.TAIL_LINES :])

    def __str__(self) -> str:
        text = f"{super().__str__()}: the verifier refused program {self.program or '(unknown)'}"
        if self.saved:
            text += f" (full log: {self.saved})"
        if self.log:
            text += "\n" + self.tail()
        return text


class MigrationRefused(BpfError):
    """A pinned map cannot be carried over to its new definition; nothing was changed."""

    def __init__(self, name: str, detail: str) -> None:
        super().__init__(
            _errno.EINVAL,
            "migrate pinned map",
            name,
            detail=detail,
            cure="give the map a converter, or allow its contents to be reset",
        )
