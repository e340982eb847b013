"""rtnetlink(7): a blocking socket in any namespace. pyroute2 writes the messages, we read them.

    struct nlmsghdr  len:u32 type:u16 flags:u16 seq:u32 pid:u32     then the family's own header,
    struct nlattr    len:u16 type:u16 payload, padded to 4          then attributes, which may nest

pyroute2's message classes know how each attribute is written. Its sockets are not used: they run an
event loop and a thread each, and its reader takes half a millisecond for a link, where a node with
a hundred endpoints lists a hundred. Everything is in host byte order, addresses are in network
order (linux/rtnetlink.h).

pyroute2 is imported by the first request, not by this module: docs/adr/0010-pyroute2-for-netlink.md
has what it costs.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Self

from cilia.net.errors import NetworkError
from cilia.net.netns import NetNS, in_netns

NEW_LINK: Final = 16
DELETE_LINK: Final = 17
GET_LINK: Final = 18
NEW_ADDRESS: Final = 20
DELETE_ADDRESS: Final = 21
GET_ADDRESS: Final = 22
NEW_ROUTE: Final = 24
DELETE_ROUTE: Final = 25
GET_ROUTE: Final = 26
NEW_NEIGHBOUR: Final = 28
DELETE_NEIGHBOUR: Final = 29
GET_NEIGHBOUR: Final = 30
NEW_RULE: Final = 32
DELETE_RULE: Final = 33
GET_RULE: Final = 34
NEW_QDISC: Final = 36
DELETE_QDISC: Final = 37
NEW_FILTER: Final = 44
DELETE_FILTER: Final = 45
GET_FILTER: Final = 46

IFLA_GSO_IPV4_MAX_SIZE: Final = 63

NLM_F_REPLACE: Final = 0x100
NLM_F_EXCL: Final = 0x200
NLM_F_CREATE: Final = 0x400
_NLM_F_REQUEST: Final = 0x1
_NLM_F_ACK: Final = 0x4
_NLM_F_DUMP: Final = 0x300
_NLM_F_DUMP_INTR: Final = 0x10
_NLM_F_CAPPED: Final = 0x100
_NLM_F_ACK_TLVS: Final = 0x200
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_NLMSGERR_ATTR_MSG: Final = 1
_NLA_TYPE_MASK: Final = 0x3FFF
_SOL_NETLINK: Final = 270
_NETLINK_EXT_ACK: Final = 11  # Linux 4.12: errors come with a sentence
_NETLINK_GET_STRICT_CHK: Final = 12  # Linux 4.20: dumps honour the filter in their header

_HEADER: Final = struct.Struct("=IHHII")
_ATTRIBUTE: Final = struct.Struct("=HH")
_RECEIVE_BYTES: Final = 1 << 16
_WATCH_BYTES: Final = 1 << 20  # of the kernel's buffer: a node's restart adds hundreds of links
_ANSWER_S: Final = 30.0
_DUMP_TRIES: Final = 8


@dataclass(frozen=True, slots=True)
class Message:
    """What the kernel said: RTM_ type, NLM_F_ flags, sequence, and all after the header."""

    kind: int
    flags: int
    sequence: int
    body: bytes


def messages(datagram: bytes) -> Iterator[Message]:
    """Those of one datagram; stops at a malformed one."""
    offset = 0
    while offset + _HEADER.size <= len(datagram):
        length, kind, flags, sequence, _ = _HEADER.unpack_from(datagram, offset)
        if length < _HEADER.size or offset + length > len(datagram):
            break
        yield Message(kind, flags, sequence, datagram[offset + _HEADER.size : offset + length])
        offset += length + (-length % 4)


def attributes(data: bytes, offset: int = 0) -> dict[int, bytes]:
    """Attributes by kind; of a kind given twice the last stays. Stops at a malformed one."""
    found: dict[int, bytes] = {}
    end = len(data)
    while offset + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < 4 or offset + length > end:
            break
        found[kind & _NLA_TYPE_MASK] = data[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    return found


def as_text(payload: bytes | None) -> str:
    return "" if payload is None else payload.rstrip(b"\0").decode(errors="replace")


def as_u32(payload: bytes | None) -> int:
    return 0 if payload is None else int.from_bytes(payload[:4], sys.byteorder)


@dataclass(frozen=True, slots=True)
class _Asked:
    what: str
    ignore: Sequence[int]


class RouteSocket:
    """A blocking rtnetlink socket. It may be used from any thread, by one at a time."""

    def __init__(self, netns: NetNS | None = None) -> None:
        # A socket belongs to the namespace that it was made in, whoever uses it.
        self._socket = in_netns(netns, _open)
        self._sequence = 0
        self._together: list[tuple[bytes, int, _Asked]] | None = None

    def close(self) -> None:
        """May be repeated."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def request(
        self,
        kind: int,
        fields: Mapping[str, Any],
        attrs: Sequence[tuple[str, Any]] = (),
        *,
        what: str,
        flags: int = 0,
        ignore: Sequence[int] = (),
    ) -> bool:
        """Asks for a change and waits for the answer.

        `fields` and `attrs` are those of pyroute2's class for the kind of message. Raises
        NetworkError with `what` before the kernel's reason. Errors listed in `ignore` return False.
        """
        data, sequence = self._encode(kind, _NLM_F_ACK | flags, fields, attrs)
        asked = _Asked(what, ignore)
        if self._together is not None:
            self._together.append((data, sequence, asked))
            return True
        return self._converse(data, {sequence: asked})

    @contextmanager
    def together(self) -> Iterator[None]:
        """The block's requests are sent as one when it ends, and answered in their order.

        The kernel goes on after one that fails; the first failure is raised.
        """
        assert self._together is None, "together is not for use within itself"
        queue = self._together = []
        try:
            yield
        finally:
            self._together = None
        if queue:
            self._converse(
                b"".join(data for data, _, _ in queue), {number: a for _, number, a in queue}
            )

    def _converse(self, data: bytes, waiting: dict[int, _Asked]) -> bool:
        """Sends requests and takes every answer; False when an ignored error was among them."""
        failure: NetworkError | None = None
        good = True
        self._send(data, next(iter(waiting.values())).what)
        while waiting:
            for message in self._receive(next(iter(waiting.values())).what):
                if message.kind != _NLMSG_ERROR or message.sequence not in waiting:
                    continue  # the rest of a request that was given up
                asked = waiting.pop(message.sequence)
                number, detail = _error_of(message)
                if number == 0:
                    continue
                good = False
                if number not in asked.ignore and failure is None:
                    failure = NetworkError(asked.what, number, detail)
        if failure is not None:
            raise failure
        return good

    def get(
        self,
        kind: int,
        fields: Mapping[str, Any],
        attrs: Sequence[tuple[str, Any]] = (),
        *,
        what: str,
        ignore: Sequence[int] = (),
    ) -> Message | None:
        """Asks for one object; None for an error listed in `ignore`."""
        assert self._together is None, "an answer is needed at once"
        data, sequence = self._encode(kind, 0, fields, attrs)
        self._send(data, what)
        while True:
            for message in self._receive(what):
                if message.sequence != sequence:
                    continue
                if message.kind != _NLMSG_ERROR:
                    return message
                number, detail = _error_of(message)
                if number in ignore:
                    return None
                raise NetworkError(what, number, detail)

    def dump(
        self,
        kind: int,
        fields: Mapping[str, Any],
        attrs: Sequence[tuple[str, Any]] = (),
        *,
        what: str,
        ignore: Sequence[int] = (),
    ) -> list[Message]:
        """All objects of a kind; none for an error listed in `ignore`.

        A dump that a change disturbed is made again, a few times.
        """
        assert self._together is None, "an answer is needed at once"
        found: list[Message] = []
        for _ in range(_DUMP_TRIES):
            data, sequence = self._encode(kind, _NLM_F_DUMP, fields, attrs)
            self._send(data, what)
            found, number, detail = self._dumped(sequence, what)
            if number in ignore:
                return []
            if number:
                raise NetworkError(what, number, detail)
            if not any(message.flags & _NLM_F_DUMP_INTR for message in found):
                break
        return found

    def _dumped(self, sequence: int, what: str) -> tuple[list[Message], int, str]:
        """The objects, and how it ended: an errno with its sentence, or 0."""
        found: list[Message] = []
        while True:
            for message in self._receive(what):
                if message.sequence != sequence:
                    continue
                if message.kind == _NLMSG_DONE:
                    number, _ = _error_of(message) if len(message.body) >= 4 else (0, "")
                    if message.flags & _NLM_F_DUMP_INTR:
                        found.append(message)  # nothing of it is read: the dump is made again
                    return found, number, ""
                if message.kind == _NLMSG_ERROR:
                    return found, *_error_of(message)
                found.append(message)

    def _encode(
        self, kind: int, flags: int, fields: Mapping[str, Any], attrs: Sequence[tuple[str, Any]]
    ) -> tuple[bytes, int]:
        self._sequence = self._sequence % 0xFFFFFFFF + 1
        message = _classes()[kind & ~3]()
        message["header"]["type"] = kind
        message["header"]["flags"] = _NLM_F_REQUEST | flags
        message["header"]["sequence_number"] = self._sequence
        message.update(fields)
        message["attrs"] = list(attrs)
        message.encode()
        data = bytes(message.data)
        return data + bytes(-len(data) % 4), self._sequence

    def _send(self, data: bytes, what: str) -> None:
        try:
            self._socket.send(data)
        except OSError as error:
            raise NetworkError(what, error.errno or errno.EIO) from error

    def _receive(self, what: str) -> Iterator[Message]:
        try:
            return messages(self._socket.recv(_RECEIVE_BYTES))
        except TimeoutError:
            raise NetworkError(what, errno.ETIMEDOUT) from None
        except OSError as error:
            raise NetworkError(what, error.errno or errno.EIO) from error


@cache
def _classes() -> dict[int, Any]:
    """pyroute2's message classes, by the RTM_NEW number of their kind."""
    from pyroute2.netlink.rtnl.fibmsg import fibmsg
    from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
    from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
    from pyroute2.netlink.rtnl.ndmsg import ndmsg
    from pyroute2.netlink.rtnl.rtmsg import rtmsg
    from pyroute2.netlink.rtnl.tcmsg import tcmsg

    class LinkMessage(ifinfmsg):  # type: ignore[misc]  # pyroute2 is untyped
        """With the attributes of Linux 6.3 (linux/if_link.h), of which pyroute2 has no names."""

        nla_map = (
            *((kind, *entry) for kind, entry in enumerate(ifinfmsg.nla_map)),
            (IFLA_GSO_IPV4_MAX_SIZE, "IFLA_GSO_IPV4_MAX_SIZE", "uint32"),
        )

    return {
        NEW_LINK: LinkMessage,
        NEW_ADDRESS: ifaddrmsg,
        NEW_ROUTE: rtmsg,
        NEW_NEIGHBOUR: ndmsg,
        NEW_RULE: fibmsg,
        NEW_QDISC: tcmsg,
        NEW_FILTER: tcmsg,
    }


def _error_of(message: Message) -> tuple[int, str]:
    """The errno of an NLMSG_ERROR, 0 for an acknowledgement, and the kernel's sentence about it."""
    number = -struct.unpack_from("=i", message.body)[0]
    detail = ""
    if number and message.flags & _NLM_F_ACK_TLVS:
        # The failed request follows the errno: its header only, or all of it (linux/netlink.h).
        request_length = struct.unpack_from("=I", message.body, 4)[0]
        offset = 4 + (_HEADER.size if message.flags & _NLM_F_CAPPED else request_length)
        offset += -offset % 4
        detail = as_text(attributes(message.body, offset).get(_NLMSGERR_ATTR_MSG))
    return number, f"{os.strerror(number)}: {detail}" if detail else ""


def _open() -> socket.socket:
    sock = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
    )
    try:
        sock.settimeout(_ANSWER_S)
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
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _WATCH_BYTES)
            sock.bind((0, groups))
        except BaseException:
            sock.close()
            raise
        return sock

    return in_netns(netns, make)


def receive(watcher: socket.socket) -> Iterator[Message]:
    """The next datagram's messages. Raises BlockingIOError when there is none, OSError of ENOBUFS
    when some were lost."""
    return messages(watcher.recv(_RECEIVE_BYTES))
