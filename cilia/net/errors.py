"""What can go wrong with the network, named for the operator."""

from __future__ import annotations

import errno
import os
from typing import Final

from cilia.errors import DomainError, InvalidError, Kind, PreconditionError


class NamespaceError(InvalidError):
    """What was named is not a network namespace that an endpoint can live in."""


class NamespaceGone(PreconditionError):
    """The namespace, or the process that was to name it, does not exist (any more)."""

    default_kind = Kind.NOT_FOUND
    default_cure = "Check that the workload is running: `ip netns list`, `lsns -t net`"


class InterfaceExists(DomainError):
    """An interface of that name is there and is not ours to change."""

    default_kind = Kind.CONFLICT


class InterfaceGone(DomainError):
    """No interface of that name or index."""

    default_kind = Kind.NOT_FOUND


class NetworkError(DomainError):
    """The kernel refused a change; the message names the thing and the kernel's reason."""

    default_kind = Kind.PRECONDITION

    def __init__(self, what: str, number: int, detail: str = "") -> None:
        reason = detail or os.strerror(number)
        name = errno.errorcode.get(number, str(number))
        super().__init__(
            f"{what}: {reason} ({name})",
            cure=_CURES.get(number, ""),
            kind=_KINDS.get(number, Kind.PRECONDITION),
        )
        self.errno = number


_CURES: Final = {
    errno.EPERM: "It takes root, or CAP_NET_ADMIN and CAP_SYS_ADMIN",
    errno.EACCES: "It takes root, or CAP_NET_ADMIN and CAP_SYS_ADMIN",
    errno.EROFS: "/proc/sys is mounted read-only here: remount it read-write for the container",
    errno.EOPNOTSUPP: "The kernel was built without it: see `cilia bpf probe`",
    errno.EAFNOSUPPORT: "The kernel has this address family disabled",
}
_KINDS: Final = {
    errno.EPERM: Kind.DENIED,
    errno.EACCES: Kind.DENIED,
    errno.EEXIST: Kind.CONFLICT,
    errno.ENODEV: Kind.NOT_FOUND,
    errno.EINVAL: Kind.INVALID,
    errno.ENOSPC: Kind.EXHAUSTED,
    errno.ENOMEM: Kind.EXHAUSTED,
    errno.EOPNOTSUPP: Kind.UNIMPLEMENTED,
}
