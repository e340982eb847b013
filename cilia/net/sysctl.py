"""Settings under /proc/sys/net, of a device in any network namespace.

The files show the namespace of the thread that opens them, so they are opened in the right one.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from cilia.net.errors import InterfaceGone, NetworkError
from cilia.net.netns import NetNS, in_netns

_ROOT: Final = Path("/proc/sys/net")
_LONGEST: Final = 4096  # bytes of a setting

# For the workload's end: it has one address of ours, which nobody needs to detect or advertise. A
# container engine may have IPv6 disabled in its namespaces.
WORKLOAD: Final[Mapping[str, str]] = {
    "ipv6/disable_ipv6": "0",
    "ipv6/accept_ra": "0",
    "ipv6/accept_dad": "0",
    "ipv6/dad_transmits": "0",
    "ipv6/autoconf": "0",
}

# For the host's end: replies may come by another device than the route back, and the source check
# is the eBPF program's. The kernel uses the greater of conf/all and conf/DEVICE of rp_filter.
HOST_SIDE: Final[Mapping[str, str]] = {
    "ipv4/rp_filter": "0",
    "ipv4/forwarding": "1",
    "ipv4/accept_local": "1",
    "ipv4/send_redirects": "0",
    "ipv6/disable_ipv6": "0",
    "ipv6/forwarding": "1",
    "ipv6/accept_ra": "0",
    "ipv6/accept_dad": "0",
    "ipv6/dad_transmits": "0",
    "ipv6/autoconf": "0",
}


def set_device(device: str, values: Mapping[str, str], *, netns: NetNS | None = None) -> None:
    """Sets `family/name` to a value for one device; only what differs is written.

    A family that the kernel does not have (IPv6 switched off) is passed over. Raises InterfaceGone
    or NetworkError.
    """
    where = "" if netns is None else f" in {netns.name}"

    def apply() -> None:
        for name, value in values.items():
            family, _, leaf = name.partition("/")
            directory = f"{_ROOT}/{family}/conf"
            try:
                _write(f"{directory}/{device}/{leaf}", value, f"{name} of {device}{where}")
            except NetworkError as error:
                if error.errno != errno.ENOENT or Path(directory, device).exists():
                    raise
                if Path(directory).exists():
                    raise InterfaceGone(f"there is no interface {device}{where}") from error

    in_netns(netns, apply)


def get_device(device: str, name: str, *, netns: NetNS | None = None) -> str | None:
    """The value of `family/name` for a device; None when there is no such setting."""
    family, _, leaf = name.partition("/")
    return read(f"{family}/conf/{device}/{leaf}", netns=netns)


def read(name: str, *, netns: NetNS | None = None) -> str | None:
    """The setting at a path under /proc/sys/net; None when there is no such setting."""

    def get() -> str | None:
        try:
            return (_ROOT / name).read_text().strip()
        except (FileNotFoundError, NotADirectoryError):
            return None

    return in_netns(netns, get)


def write(name: str, value: str, *, netns: NetNS | None = None) -> None:
    """Sets a path under /proc/sys/net. Raises NetworkError."""
    in_netns(netns, lambda: _write(f"{_ROOT}/{name}", value, name))


def _write(path: str, value: str, what: str) -> None:
    try:
        if _read(path).split() != value.split():
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, value.encode())
            finally:
                os.close(fd)
    except OSError as error:
        raise NetworkError(f"cannot set {what} to {value}", error.errno or errno.EIO) from error


def _read(path: str) -> str:
    # An endpoint has a dozen: pathlib's reader and its buffers cost more than the kernel.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, _LONGEST).decode()
    finally:
        os.close(fd)
