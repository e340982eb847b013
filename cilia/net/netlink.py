"""rtnetlink(7): the wire format that we need of it, and a blocking socket in any namespace.

    struct nlmsghdr  len:u32 type:u16 flags:u16 seq:u32 pid:u32     then the family's own header,
    struct nlattr    len:u16 type:u16 payload, padded to 4          then attributes, which may nest

Our own few lines instead of pyroute2, which adds 14 MB and 0.1 s to every process that imports it
and runs an event loop of its own behind each blocking call. Everything is in host byte
order, addresses are in network order (linux/rtnetlink.h, linux/if_link.h).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator, Sequence
from typing import Final, Self

from cilia.net.errors import NetworkError
from cilia.net.netns import NetNS, in_netns

_HEADER: Final = struct.Struct("=IHHII")
_ATTRIBUTE: Final = struct.Struct("=HH")

NLMSG_ERROR: Final = 2
NLMSG_DONE: Final = 3
NLM_F_REQUEST: Final = 0x1
NLM_F_ACK: Final = 0x4
NLM_F_DUMP: Final = 0x300
NLM_F_REPLACE: Final = 0x100
NLM_F_EXCL: Final = 0x200
NLM_F_CREATE: Final = 0x400
_NLM_F_DUMP_INTR: Final = 0x10
_NLM_F_CAPPED: Final = 0x100
_NLM_F_ACK_TLVS: Final = 0x200
_NLMSGERR_ATTR_MSG: Final = 1
_NLA_TYPE_MASK: Final = 0x3FFF
_NLA_F_NESTED: Final = 0x8000

_SOL_NETLINK: Final = 270
_NETLINK_EXT_ACK: Final = 11  # Linux 4.12: errors come with a sentence
_NETLINK_GET_STRICT_CHK: Final = 12  # Linux 4.20: dumps honour the filter in their header

_RECEIVE_BYTES: Final = 1 << 16
_DUMP_TRIES: Final = 8


def attribute(kind: int, payload: bytes) -> bytes:
    """One attribute, padded."""
    length = _ATTRIBUTE.size + len(payload)
    return _ATTRIBUTE.pack(length, kind) + payload + b"\0" * (-length % 4)


def nested(kind: int, *attributes: bytes) -> bytes:
    return attribute(kind | _NLA_F_NESTED, b"".join(attributes))


def u32(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


def u8(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=B", value))


def text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def parse_attributes(data: bytes) -> dict[int, bytes]:
    """Attributes by kind; of a kind given twice the last stays. Stops at a malformed one."""
    found: dict[int, bytes] = {}
    offset = 0
    while offset + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < _ATTRIBUTE.size or offset + length > len(data):
            break
        found[kind & _NLA_TYPE_MASK] = data[offset + _ATTRIBUTE.size : offset + length]
        offset += length + (-length % 4)
    return found


def as_text(payload: bytes | None) -> str:
    return "" if payload is None else payload.rstrip(b"\0").decode(errors="replace")


def as_u32(payload: bytes | None, default: int = 0) -> int:
    return default if payload is None else int.from_bytes(payload[:4], sys.byteorder)


def messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """(type, flags, seq, body) of every message in a datagram."""
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, flags, seq, _ = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size or offset + length > len(data):
            break
        yield kind, flags, seq, data[offset + _HEADER.size : offset + length]
        offset += length + (-length % 4)


class NetlinkSocket:
    """A blocking rtnetlink socket. Not for use by two threads at a time."""

    def __init__(self, netns: NetNS | None = None, *, timeout_s: float = 30.0) -> None:
        self._socket = in_netns(netns, _open)
        self._socket.settimeout(timeout_s)
        self._seq = 0

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def request(
        self, kind: int, body: bytes, *, what: str, flags: int = 0, ignore: Sequence[int] = ()
    ) -> bool:
        """Asks for a change and waits for the answer.

        Raises NetworkError with `what` before the kernel's reason. Errors listed in `ignore` return
        False.
        """
        seq = self._send(kind, NLM_F_REQUEST | NLM_F_ACK | flags, body)
        for answer, answer_flags, payload in self._answers(seq, what):
            if answer == NLMSG_ERROR:
                number, detail = _error_of(payload, answer_flags)
                if number == 0:
                    return True
                if number in ignore:
                    return False
                raise NetworkError(what, number, detail)
        raise NetworkError(what, errno.EPROTO)

    def get(self, kind: int, body: bytes, *, what: str, ignore: Sequence[int] = ()) -> bytes | None:
        """Asks for one object; its body, or None for an error listed in `ignore`."""
        seq = self._send(kind, NLM_F_REQUEST | NLM_F_ACK, body)
        found: bytes | None = None
        for answer, answer_flags, payload in self._answers(seq, what):
            if answer == NLMSG_ERROR:
                number, detail = _error_of(payload, answer_flags)
                if number == 0:
                    return found
                if number in ignore:
                    return None
                raise NetworkError(what, number, detail)
            found = payload
        return found

    def dump(self, kind: int, body: bytes, *, what: str) -> list[bytes]:
        """All objects of a kind. A dump that a change disturbed is made again, a few times."""
        found: list[bytes] = []
        for _ in range(_DUMP_TRIES):
            seq = self._send(kind, NLM_F_REQUEST | NLM_F_DUMP, body)
            found = []
            disturbed = False
            for answer, flags, payload in self._answers(seq, what):
                disturbed = disturbed or bool(flags & _NLM_F_DUMP_INTR)
                if answer == NLMSG_DONE:
                    status = struct.unpack_from("=i", payload)[0] if len(payload) >= 4 else 0
                    if status < 0:
                        raise NetworkError(what, -status)
                    break
                if answer == NLMSG_ERROR:
                    number, detail = _error_of(payload, flags)
                    raise NetworkError(what, number, detail)
                found.append(payload)
            if not disturbed:
                return found
        return found

    def _send(self, kind: int, flags: int, body: bytes) -> int:
        self._seq = (self._seq + 1) & 0xFFFFFFFF
        header = _HEADER.pack(_HEADER.size + len(body), kind, flags, self._seq, 0)
        self._socket.send(header + body)
        return self._seq

    def _answers(self, seq: int, what: str) -> Iterator[tuple[int, int, bytes]]:
        while True:
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except TimeoutError:
                raise NetworkError(what, errno.ETIMEDOUT) from None
            for kind, flags, answered, payload in messages(data):
                if answered == seq:  # not the rest of a request that was given up
                    yield kind, flags, payload


def _open() -> socket.socket:
    sock = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
    )
    try:
        sock.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
        sock.setsockopt(_SOL_NETLINK, _NETLINK_GET_STRICT_CHK, 1)
        sock.bind((0, 0))
    except BaseException:
        sock.close()
        raise
    return sock


def open_watcher(netns: NetNS | None, groups: int) -> socket.socket:
    """A non-blocking socket that hears the multicast `groups` (RTMGRP_ bits) of a namespace."""

    def make() -> socket.socket:
        sock = socket.socket(
            socket.AF_NETLINK,
            socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
            socket.NETLINK_ROUTE,
        )
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            sock.bind((0, groups))
        except BaseException:
            sock.close()
            raise
        return sock

    return in_netns(netns, make)


def _error_of(payload: bytes, flags: int) -> tuple[int, str]:
    """The errno of an NLMSG_ERROR, 0 for an acknowledgement, and the kernel's sentence about it."""
    number = -struct.unpack_from("=i", payload)[0]
    detail = ""
    if number and flags & _NLM_F_ACK_TLVS:
        # The failed request follows the errno: its header only, or all of it (linux/netlink.h).
        request_length = struct.unpack_from("=I", payload, 4)[0]
        offset = 4 + (_HEADER.size if flags & _NLM_F_CAPPED else request_length)
        offset += -offset % 4
        detail = as_text(parse_attributes(payload[offset:]).get(_NLMSGERR_ATTR_MSG))
    return number, f"{os.strerror(number)}: {detail}" if detail else ""
