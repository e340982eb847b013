"""eBPF filters of a device's clsact qdisc, as the kernel lists them (tc-bpf(8))."""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass
from typing import Final, Literal

from cilia.net.rtnl import GET_FILTER, Message, RouteSocket, as_text, as_u32, attributes

# TC_H_CLSACT with TC_H_MIN_INGRESS or TC_H_MIN_EGRESS (linux/pkt_sched.h).
PARENT: Final = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}

_TCMSG: Final = struct.Struct("=BxxxiIII")  # family, device, handle, parent, priority and protocol
_TCA_KIND, _TCA_OPTIONS = 1, 2
_TCA_BPF_NAME, _TCA_BPF_ID = 7, 11
# No such device, or no qdisc where we look.
_NOTHING: Final = (errno.ENODEV, errno.ENOENT, errno.EINVAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """One filter; `prog_id` is 0 and `name` empty where it is no eBPF program."""

    handle: int
    prio: int
    name: str
    prog_id: int


def filters(
    socket: RouteSocket, ifindex: int, direction: Literal["ingress", "egress"]
) -> list[Filter]:
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
