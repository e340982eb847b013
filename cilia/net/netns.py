"""Network namespaces: opened by path or pid, checked, and entered by threads that do not come back.

setns(2) changes the calling thread only. `in_netns` therefore runs its function in a thread made
for it, which ends afterwards: no thread that others use is ever in a foreign namespace. A socket
made in a namespace belongs to it for good, so most work needs the namespace only for a moment.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, Self, TypeVar

from cilia.net.errors import NamespaceError, NamespaceGone, NetworkError

T = TypeVar("T")

_CLONE_NEWNET: Final = 0x40000000
_NS_GET_NSTYPE: Final = 0xB703  # ioctl_ns(2), Linux 4.11
_SO_NETNS_COOKIE: Final = 71  # Linux 5.14

_libc = ctypes.CDLL(None, use_errno=True)


class NetNS:
    """An open network namespace. It stays alive while this is open, even if its name is removed."""

    __slots__ = ("_fd", "inode", "name")

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self.name = name  # as the operator wrote it, for messages
        status = os.fstat(fd)
        # Identifies the namespace while it lives: nsfs has one inode a namespace.
        self.inode: tuple[int, int] = (status.st_dev, status.st_ino)

    @classmethod
    def open(cls, path: str | Path, *, allow_own: bool = False) -> Self:
        """Opens a namespace file such as /run/netns/x or /proc/1/ns/net.

        Raises NamespaceGone when there is no such file, and NamespaceError when it is not a network
        namespace, or is the one that this process lives in.
        """
        name = str(path)
        try:
            # Not blocking: the path may be a FIFO's.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError, ProcessLookupError):
            raise NamespaceGone(f"there is no network namespace {name}") from None
        except OSError as error:
            number = error.errno or errno.EIO
            raise NetworkError(f"cannot open the namespace {name}", number) from error
        try:
            _check(fd, name, allow_own=allow_own)
            return cls(fd, name)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def of_pid(cls, pid: int, *, allow_own: bool = False) -> Self:
        """The namespace that a process lives in. Raises like `open`."""
        path = f"/proc/{pid}/ns/net"
        try:
            return cls.open(path, allow_own=allow_own)
        except NamespaceGone:
            raise NamespaceGone(
                f"there is no process {pid}", cure="Check the pid: the workload must be running"
            ) from None
        except NamespaceError as error:
            message = error.message.replace(path, f"of process {pid}")
            raise NamespaceError(message, cure=error.cure) from None

    @classmethod
    def own(cls) -> Self:
        """The namespace of the calling thread."""
        return cls.open("/proc/thread-self/ns/net", allow_own=True)

    def fileno(self) -> int:
        assert self._fd >= 0, f"namespace {self.name} is closed"
        return self._fd

    def dup(self) -> NetNS:
        """A second handle, to be closed on its own."""
        return NetNS(fcntl.fcntl(self.fileno(), fcntl.F_DUPFD_CLOEXEC, 0), self.name)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def cookie(self) -> int | None:
        """The namespace's cookie, as eBPF programs see it; None before Linux 5.14."""
        return in_netns(self, netns_cookie)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NetNS) and self.inode == other.inode

    def __hash__(self) -> int:
        return hash(self.inode)

    def __repr__(self) -> str:
        return f"NetNS({self.name!r}, inode={self.inode[1]})"


def _check(fd: int, name: str, *, allow_own: bool) -> None:
    try:
        kind = fcntl.ioctl(fd, _NS_GET_NSTYPE)
    except OSError:
        kind = 0  # no namespace file at all
    if kind == 0:
        raise NamespaceError(
            f"{name} is not a network namespace",
            cure="Give a file as under /run/netns, whose namespace still exists, or use --pid",
        )
    if kind != _CLONE_NEWNET:
        raise NamespaceError(
            f"{name} is a namespace, but not a network namespace",
            cure="Give the file called `net`, as in /proc/PID/ns/net",
        )
    status = os.fstat(fd)
    own = Path("/proc/thread-self/ns/net").stat()
    if not allow_own and (status.st_dev, status.st_ino) == (own.st_dev, own.st_ino):
        raise NamespaceError(
            f"the network namespace {name} is the node's own",
            cure="An endpoint needs a namespace of its own: `ip netns add NAME`",
        )


def enter(netns: NetNS) -> None:
    """Moves the calling thread, which must be one made for it. Raises NetworkError."""
    if _libc.setns(netns.fileno(), _CLONE_NEWNET) != 0:
        raise NetworkError(f"cannot enter the namespace {netns.name}", ctypes.get_errno())


def in_netns(netns: NetNS | None, function: Callable[[], T]) -> T:
    """Runs `function` in the namespace and returns what it returns, or raises what it raises.

    Blocks. None is the caller's own namespace: the function is called as it is.
    """
    if netns is None:
        return function()
    results: list[T] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            enter(netns)
            results.append(function())
        except BaseException as error:  # carried to the caller's thread
            errors.append(error)

    thread = threading.Thread(target=body, name="in-netns", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def netns_cookie() -> int | None:
    """The cookie of the calling thread's namespace; None before Linux 5.14."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        try:
            value = probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
        except OSError as error:
            if error.errno in (errno.ENOPROTOOPT, errno.EINVAL):
                return None
            raise
    return int(struct.unpack("=Q", value)[0])
