"""What makes the node's stack deliver marked packets to the listeners of a proxy.

    nft table inet cilia, prerouting   mark 0x200|port<<16 -> the connection's socket, or the
                                       listener's on 127.0.0.1:port or [::1]:port
    ip rule 9: fwmark 0x200/0xf00      -> table 2004
    table 2004: local default dev lo   so that any address is the node's own for them

For both families. The table is written whole and at once, so there is no moment without it, nor
with half of it. Marks: bpf/lib/types.h; the datapath gives each packet its socket as well, so
nothing of this decides what may pass.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Collection
from ipaddress import ip_network
from typing import Any, Final

from cilia.bpf.constants import MARK_MAGIC_MASK, MARK_TO_PROXY
from cilia.net import nft
from cilia.net.device import ROUTE_PROTOCOL
from cilia.net.errors import NetworkError
from cilia.net.rtnl import (
    DELETE_ROUTE,
    DELETE_RULE,
    GET_ROUTE,
    GET_RULE,
    NEW_ROUTE,
    NEW_RULE,
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    RouteSocket,
    as_u32,
    attributes,
)

FAMILY: Final = "inet"
TABLE: Final = "cilia"
ROUTE_TABLE: Final = 2004
RULE_PRIORITY: Final = 9

_LISTENERS: Final = "listeners"
_CHAIN: Final = "prerouting"
_MANGLE: Final = -150  # NF_IP_PRI_MANGLE, where other users of tproxy are too
_FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)
_WRITES: Final = 5
_LO: Final = 1  # the kernel gives it this index in every namespace

_FR_ACT_TO_TBL: Final = 1
_RTN_LOCAL: Final = 2
_RT_SCOPE_HOST: Final = 254
_FRA_PRIORITY, _FRA_FWMARK, _FRA_TABLE, _FRA_FWMASK = 6, 10, 15, 16
_RTA_DST, _RTA_OIF, _RTA_TABLE = 1, 4, 15
_RTMSG: Final = struct.Struct("=BBBBBBBBI")  # struct rtmsg, and struct fib_rule_hdr in its shape


def mark_of(port: int) -> int:
    """The mark of packets for the listener on a port: its number in network order, above ours."""
    return MARK_TO_PROXY | socket.htons(port) << 16


# ---- the table


def commands(ports: Collection[int]) -> list[nft.Command]:
    """One transaction: whatever table of this name there is becomes ours."""

    def rule(*expressions: dict[str, Any]) -> nft.Command:
        where = {"family": FAMILY, "table": TABLE, "chain": _CHAIN}
        return {"add": {"rule": {**where, "expr": list(expressions)}}}

    def deliver(nfproto: str, family: str, address: str) -> nft.Command:
        listener = {"map": {"key": {"meta": {"key": "mark"}}, "data": f"@{_LISTENERS}"}}
        return rule(
            _equals({"meta": {"key": "nfproto"}}, nfproto),
            _equals({"meta": {"key": "l4proto"}}, "tcp"),
            {"tproxy": {"family": family, "addr": address, "port": listener}},
            {"accept": None},
        )

    ours = {"table": {"family": FAMILY, "name": TABLE}}
    listeners: dict[str, Any] = {
        "family": FAMILY,
        "table": TABLE,
        "name": _LISTENERS,
        "type": "mark",
        "map": "inet_service",
    }
    if ports:
        listeners["elem"] = [[mark_of(port), port] for port in sorted(ports)]
    return [
        {"add": ours},  # so that there is one to delete
        {"delete": ours},
        {"add": ours},
        {"add": {"map": listeners}},
        {
            "add": {
                "chain": {
                    "family": FAMILY,
                    "table": TABLE,
                    "name": _CHAIN,
                    "type": "filter",
                    "hook": "prerouting",
                    "prio": _MANGLE,
                    "policy": "accept",
                }
            }
        },
        rule(
            {
                "match": {
                    "op": "!=",
                    "left": {"&": [{"meta": {"key": "mark"}}, MARK_MAGIC_MASK]},
                    "right": MARK_TO_PROXY,
                }
            },
            {"accept": None},
        ),
        deliver("ipv4", "ip", "127.0.0.1"),
        deliver("ipv6", "ip6", "::1"),
    ]


def _equals(left: dict[str, Any], right: str) -> dict[str, Any]:
    return {"match": {"op": "==", "left": left, "right": right}}


def write_table(ports: Collection[int]) -> list[dict[str, Any]]:
    """Make the table what it should be. Returns how nft shows it. Raises NftError."""
    for _ in range(_WRITES):
        nft.apply(commands(ports))
        found = read_table()
        # Somebody may have changed it in between: that is not to be taken for ours.
        if found is not None and _is_whole(found, ports):
            return found
    raise nft.NftError(f"somebody keeps changing the nft table {FAMILY} {TABLE}")


def _is_whole(found: list[dict[str, Any]], ports: Collection[int]) -> bool:
    wanted = commands(ports)
    elements = [tuple(x) for item in found if "map" in item for x in item["map"].get("elem", ())]
    return (
        sum("rule" in item for item in found) == sum("rule" in c.get("add", ()) for c in wanted)
        and any(item.get("chain", {}).get("hook") == "prerouting" for item in found)
        and sorted(elements) == sorted((mark_of(port), port) for port in ports)
    )


def read_table() -> list[dict[str, Any]] | None:
    """What of ours is there, comparable; None: nothing. Raises NftError."""
    return nft.table(FAMILY, TABLE)


def delete_table() -> None:
    """Deleting what is absent is success. Raises NftError."""
    ours = {"table": {"family": FAMILY, "name": TABLE}}
    nft.apply([{"add": ours}, {"delete": ours}])


# ---- rules and routes


def missing_routing(host: RouteSocket) -> list[str]:
    """What of rules and routes is not there, for people. Raises NetworkError."""
    missing = []
    for family in _families(host):
        name = "IPv6" if family == socket.AF_INET6 else "IPv4"
        if not _has_rule(host, family):
            missing.append(f"the {name} rule")
        if not _has_route(host, family):
            missing.append(f"the {name} route")
    return missing


def any_routing(host: RouteSocket) -> bool:
    """Whether anything of rules and routes is there. Raises NetworkError."""
    return any(_has_rule(host, f) or _has_route(host, f) for f in _families(host))


def ensure_routing(host: RouteSocket) -> None:
    """Rules and routes of both families. Raises NetworkError."""
    for family in _families(host):
        if not _has_route(host, family):
            _change_route(host, family, NEW_ROUTE)
        if not _has_rule(host, family):
            _change_rule(host, family, NEW_RULE)


def delete_routing(host: RouteSocket) -> None:
    """Deleting what is absent is success. Raises NetworkError."""
    for family in _families(host):
        while _has_rule(host, family):
            _change_rule(host, family, DELETE_RULE)
        if _has_route(host, family):
            _change_route(host, family, DELETE_ROUTE)


def _families(host: RouteSocket) -> list[int]:
    """Those that the kernel has: IPv6 may be switched off."""
    return [
        family
        for family in _FAMILIES
        if host.dump(
            GET_RULE,
            {"family": family},
            what="cannot list rules",
            ignore=(errno.EAFNOSUPPORT, errno.EOPNOTSUPP),
        )
    ]


def _has_rule(host: RouteSocket, family: int) -> bool:
    for message in host.dump(GET_RULE, {"family": family}, what="cannot list rules"):
        if len(message.body) < _RTMSG.size or message.body[0] != family:
            continue
        header = _RTMSG.unpack_from(message.body)
        found = attributes(message.body, _RTMSG.size)
        if (
            header[7] == _FR_ACT_TO_TBL
            and not header[1]  # any destination
            and not header[2]  # any source
            and as_u32(found.get(_FRA_PRIORITY)) == RULE_PRIORITY
            and as_u32(found.get(_FRA_FWMARK)) == MARK_TO_PROXY
            and as_u32(found.get(_FRA_FWMASK)) == MARK_MAGIC_MASK
            and as_u32(found.get(_FRA_TABLE)) == ROUTE_TABLE
        ):
            return True
    return False


def _change_rule(host: RouteSocket, family: int, kind: int) -> None:
    host.request(
        kind,
        {"family": family, "action": _FR_ACT_TO_TBL, "table": 0},
        [
            ("FRA_PRIORITY", RULE_PRIORITY),
            ("FRA_FWMARK", MARK_TO_PROXY),
            ("FRA_FWMASK", MARK_MAGIC_MASK),
            ("FRA_TABLE", ROUTE_TABLE),
            ("FRA_PROTOCOL", ROUTE_PROTOCOL),
        ],
        what=f"cannot change the rule for packets marked {MARK_TO_PROXY:#x}",
        flags=NLM_F_CREATE | NLM_F_EXCL if kind == NEW_RULE else 0,
        ignore=(errno.EEXIST,) if kind == NEW_RULE else (errno.ENOENT,),
    )


def _has_route(host: RouteSocket, family: int) -> bool:
    for message in host.dump(
        GET_ROUTE,
        {"family": family},
        [("RTA_TABLE", ROUTE_TABLE)],
        what=f"cannot list the routes of table {ROUTE_TABLE}",
        ignore=(errno.ENOENT,),  # there is no such table
    ):
        if len(message.body) < _RTMSG.size or message.body[0] != family:
            continue
        header = _RTMSG.unpack_from(message.body)
        found = attributes(message.body, _RTMSG.size)
        if (
            header[7] == _RTN_LOCAL
            and not header[1]
            and as_u32(found.get(_RTA_OIF)) == _LO
            and as_u32(found.get(_RTA_TABLE)) == ROUTE_TABLE
        ):
            return True
    return False


def _change_route(host: RouteSocket, family: int, kind: int) -> None:
    everything = ip_network("::/0" if family == socket.AF_INET6 else "0.0.0.0/0")
    try:
        host.request(
            kind,
            {
                "family": family,
                "dst_len": everything.prefixlen,
                "table": 0,
                "proto": ROUTE_PROTOCOL,
                "scope": _RT_SCOPE_HOST,
                "type": _RTN_LOCAL,
            },
            [("RTA_TABLE", ROUTE_TABLE), ("RTA_OIF", _LO)],
            what=f"cannot change the local route of table {ROUTE_TABLE}",
            flags=NLM_F_CREATE | NLM_F_REPLACE if kind == NEW_ROUTE else 0,
            ignore=() if kind == NEW_ROUTE else (errno.ESRCH,),
        )
    except NetworkError as error:
        if error.errno != errno.ENETDOWN:
            raise
        raise NetworkError(
            f"cannot change the local route of table {ROUTE_TABLE}: lo is down", error.errno
        ) from error


# ---- changes by others

_SOL_NETLINK: Final = 270
_NETLINK_ADD_MEMBERSHIP: Final = 1
_NETLINK_NETFILTER: Final = 12
_NFNLGRP_NFTABLES: Final = 7
_RTNLGRP: Final = (7, 8, 11, 19)  # IPv4 routes and rules, IPv6 routes and rules
_DRAIN: Final = 4096


class Watcher:
    """Tells of changes of nftables, rules and routes, by whomever. Not what changed: look again."""

    def __init__(self) -> None:
        """Raises NetworkError."""
        self._sockets: list[socket.socket] = []
        try:
            for protocol, groups in (
                (_NETLINK_NETFILTER, (_NFNLGRP_NFTABLES,)),
                (socket.NETLINK_ROUTE, _RTNLGRP),
            ):
                kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
                watcher = socket.socket(socket.AF_NETLINK, kind, protocol)
                self._sockets.append(watcher)
                watcher.bind((0, 0))
                for group in groups:
                    watcher.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
        except OSError as error:
            self.close()
            raise NetworkError(
                "cannot watch nftables and rules", error.errno or errno.EIO
            ) from error

    @property
    def table(self) -> socket.socket:
        return self._sockets[0]

    @property
    def routing(self) -> socket.socket:
        return self._sockets[1]

    @staticmethod
    def drain(watcher: socket.socket) -> None:
        """Take all that was said; that some of it was lost is no matter."""
        for _ in range(_DRAIN):
            try:
                watcher.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise

    def close(self) -> None:
        """May be repeated."""
        for watcher in self._sockets:
            watcher.close()
