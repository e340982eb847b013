"""eBPF filters of a device's clsact qdisc: listed, put there, taken away (tc-bpf(8)).

Without waiting for anything: the kernel needs no grace period where there was no filter before.
"""

from __future__ import annotations

import errno
import socket as socket_module
import struct
from dataclasses import dataclass
from typing import Final, Literal

from cilia.net.rtnl import (
    DELETE_FILTER,
    DELETE_QDISC,
    GET_FILTER,
    NEW_FILTER,
    NEW_QDISC,
    NLM_F_CREATE,
    NLM_F_EXCL,
    Message,
    RouteSocket,
    as_text,
    as_u32,
    attributes,
)

Direction = Literal["ingress", "egress"]

# TC_H_CLSACT with TC_H_MIN_INGRESS or TC_H_MIN_EGRESS (linux/pkt_sched.h).
PARENT: Final = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}

_TCMSG: Final = struct.Struct("=BxxxiIII")  # family, device, handle, parent, priority and protocol
_TCA_KIND, _TCA_OPTIONS = 1, 2
_TCA_BPF_NAME, _TCA_BPF_ID = 7, 11
_DIRECT_ACTION: Final = 1  # what the program returns is the verdict
_QDISC: Final = 0xFFFF0000  # the handle that clsact, and ingress, always have
_TC_H_CLSACT: Final = 0xFFFFFFF1
_ALL_PROTOCOLS: Final = socket_module.htons(3)  # ETH_P_ALL
# No such device, or no qdisc where we look.
_NOTHING: Final = (errno.ENODEV, errno.ENOENT, errno.EINVAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """One filter; `prog_id` is 0 and `name` empty where it is no eBPF program."""

    handle: int
    prio: int
    name: str
    prog_id: int


def filters(socket: RouteSocket, ifindex: int, direction: Direction) -> list[Filter]:
    """Those of a hook, in the order they run; none without a device or a qdisc. One dump."""
    found = socket.dump(
        GET_FILTER,
        {"index": ifindex, "parent": PARENT[direction]},
        what=f"cannot list filters of device {ifindex} {direction}",
        ignore=_NOTHING,
    )
    parsed = (_parse(message) for message in found)
    # The head of a priority is listed as well, and has no handle.
    return sorted((x for x in parsed if x.handle), key=lambda x: x.prio)


def _parse(message: Message) -> Filter:
    _, _, handle, _, info = _TCMSG.unpack_from(message.body)
    attrs = attributes(message.body, _TCMSG.size)
    program = as_text(attrs.get(_TCA_KIND)) == "bpf"
    options = attributes(attrs.get(_TCA_OPTIONS, b"")) if program else {}
    return Filter(
        handle=handle,
        prio=info >> 16,
        name=as_text(options.get(_TCA_BPF_NAME)),
        prog_id=as_u32(options.get(_TCA_BPF_ID)),
    )


def ensure_clsact(socket: RouteSocket, ifindex: int) -> None:
    """The qdisc that has the filters of both directions. Raises NetworkError."""
    socket.request(
        NEW_QDISC,
        {"index": ifindex, "handle": _QDISC, "parent": _TC_H_CLSACT},
        [("TCA_KIND", "clsact")],
        flags=NLM_F_CREATE | NLM_F_EXCL,
        what=f"cannot give device {ifindex} a clsact qdisc",
        ignore=(errno.EEXIST,),
    )


def delete_clsact(socket: RouteSocket, ifindex: int) -> None:
    """Takes the qdisc away, with all filters in it; one of another kind stays where it is."""
    socket.request(
        DELETE_QDISC,
        {"index": ifindex, "handle": _QDISC, "parent": _TC_H_CLSACT},
        [("TCA_KIND", "clsact")],  # another is refused with EINVAL
        what=f"cannot take the clsact qdisc from device {ifindex}",
        ignore=_NOTHING,
    )


def _named(ifindex: int, direction: Direction, handle: int, prio: int) -> dict[str, int]:
    """The fields that name a filter."""
    info = prio << 16 | _ALL_PROTOCOLS
    return {"index": ifindex, "parent": PARENT[direction], "handle": handle, "info": info}


def put_filter(
    socket: RouteSocket,
    ifindex: int,
    direction: Direction,
    *,
    handle: int,
    prio: int,
    program_fd: int,
    name: str,
) -> None:
    """Puts a program there, in place of the one of the same handle and priority."""
    socket.request(
        NEW_FILTER,
        _named(ifindex, direction, handle, prio),
        [
            ("TCA_KIND", "bpf"),
            (
                "TCA_OPTIONS",
                {
                    "attrs": [
                        ("TCA_BPF_FD", program_fd),
                        ("TCA_BPF_NAME", name),
                        ("TCA_BPF_FLAGS", _DIRECT_ACTION),
                    ]
                },
            ),
        ],
        flags=NLM_F_CREATE,
        what=f"cannot put a filter on device {ifindex} {direction}",
    )


def delete_filter(
    socket: RouteSocket, ifindex: int, direction: Direction, *, handle: int, prio: int
) -> None:
    """Deleting what is absent is success."""
    socket.request(
        DELETE_FILTER,
        _named(ifindex, direction, handle, prio),
        [("TCA_KIND", "bpf")],
        what=f"cannot take a filter from device {ifindex} {direction}",
        ignore=_NOTHING,
    )
