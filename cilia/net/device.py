"""Links, addresses, routes and neighbours of one network namespace.

A `Network` is one netlink socket in one namespace: open it, use it from one thread at a time, close
it.

    with Network() as host, Network(netns) as workload:
        pair = host.ensure_veth("cil00042", workload, "eth0", mtu=1500)
        with workload.together():
            workload.ensure_address(pair.peer_index, ip_interface("10.217.0.5/32"))
            workload.ensure_route(ip_network("10.217.0.1/32"), device=pair.peer_index)
            workload.ensure_neighbour(pair.peer_index, router, pair.host_mac)
"""

from __future__ import annotations

import dataclasses
import errno
import ipaddress
import re
import socket
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
)
from typing import Any, Final, Self

from cilia.errors import InvalidError
from cilia.net.errors import InterfaceExists, InterfaceGone
from cilia.net.netns import NetNS
from cilia.net.rtnl import (
    DELETE_ADDRESS,
    DELETE_LINK,
    DELETE_NEIGHBOUR,
    DELETE_ROUTE,
    GET_ADDRESS,
    GET_LINK,
    GET_NEIGHBOUR,
    GET_ROUTE,
    IFLA_GSO_IPV4_MAX_SIZE,
    NEW_ADDRESS,
    NEW_LINK,
    NEW_NEIGHBOUR,
    NEW_ROUTE,
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    Message,
    RouteSocket,
    as_text,
    as_u32,
    attributes,
)

Address = IPv4Address | IPv6Address
Interface = IPv4Interface | IPv6Interface
Network_ = IPv4Network | IPv6Network

# The longest TCP segment of devices without BIG TCP (bytes; GSO_LEGACY_MAX_SIZE of the kernel).
GSO_LEGACY_MAX: Final = 65536
# Marks the routes that we made, so that `cleanup` finds them (rt_protos of iproute2 leave it free).
ROUTE_PROTOCOL: Final = 193

_PUT: Final = NLM_F_CREATE | NLM_F_REPLACE
_SKIP_STATS: Final = ("IFLA_EXT_MASK", 8)  # RTEXT_FILTER_SKIP_STATS
_IFF_UP, _IFF_LOOPBACK, _IFF_LOWER_UP = 0x1, 0x8, 0x10000

_IFA_F_NODAD, _IFA_F_NOPREFIXROUTE = 0x02, 0x200

_RTNH_F_ONLINK = 4
_RTN_UNICAST = 1
RT_TABLE_MAIN: Final = 254
RT_TABLE_LOCAL: Final = 255
RT_SCOPE_UNIVERSE: Final = 0
RT_SCOPE_LINK: Final = 253
_RT_SCOPE_NOWHERE: Final = 255  # in a deletion: whatever the scope

_NUD_PERMANENT = 0x80

_IFINFOMSG: Final = struct.Struct("=BxHiII")  # family, type, index, flags, change
_IFADDRMSG: Final = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
# family, destination's length, source's length, tos, table, protocol, scope, type, flags
_RTMSG: Final = struct.Struct("=BBBBBBBBI")
_NDMSG: Final = struct.Struct("=BxxxiHBB")  # family, index, state, flags, type
_FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)
# linux/if_link.h, if_addr.h, rtnetlink.h, neighbour.h: what is read
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINK, _IFLA_MASTER = 1, 3, 4, 5, 10
_IFLA_LINKINFO, _IFLA_IFALIAS, _IFLA_LINK_NETNSID = 18, 20, 37
_IFLA_GSO_MAX_SIZE, _IFLA_TSO_MAX_SIZE = 41, 59
_IFLA_INFO_KIND = 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC, _RTA_TABLE = 1, 4, 5, 6, 7, 15
_NDA_DST, _NDA_LLADDR = 1, 2

_NAME: Final = re.compile(r"[^\s/:]{1,15}\Z")  # dev_valid_name() of the kernel


class InvalidInterfaceName(InvalidError):
    """The kernel takes no such interface name."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name!r} cannot be the name of an interface",
            cure="Use 1 to 15 characters without blanks, slashes and colons",
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    index: int
    name: str
    kind: str  # "veth", "bridge", ...; "" for hardware and loopback
    mac: str  # "" without a link layer
    mtu: int
    up: bool
    carrier: bool
    loopback: bool
    master: int  # ifindex of the bridge or bond it is enslaved to; 0 none
    link: int  # ifindex of the other end of a veth, or of the parent; 0 none
    foreign_link: bool  # `link` counts in another namespace
    alias: str
    # Bytes of a segment that TCP may hand to the device; 0 where the kernel does not say.
    gso_max: int = 0  # of both families before Linux 6.3, of IPv6 since
    gso_ipv4_max: int = 0  # Linux 6.3
    tso_max: int = 0  # to which either may be raised, Linux 5.19


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeviceAddress:
    index: int
    interface: Interface
    scope: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    destination: Network_
    gateway: Address | None
    index: int  # ifindex of the device, 0 for multipath and such
    source: Address | None
    table: int
    protocol: int
    scope: int
    type: int  # RTN_: 1 unicast, 2 local, 3 broadcast, 6 blackhole, 7 unreachable, ...
    priority: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    index: int
    address: Address
    mac: str
    permanent: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VethPair:
    host_index: int
    host_mac: str
    peer_index: int
    peer_mac: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HostDevice:
    """A device of the node through which the world is reached."""

    index: int
    name: str
    mac: str
    mtu: int
    addresses: tuple[Interface, ...]
    default_route: bool
    kind: str
    gso_max: int = 0  # bytes of a segment, in the family that takes less


class Network:
    """The devices of one namespace; None is the namespace of the calling thread."""

    def __init__(self, netns: NetNS | None = None) -> None:
        self._netns = None if netns is None else netns.dup()
        self._where = "" if netns is None else f" in {netns.name}"
        try:
            self._nl = RouteSocket(self._netns)
        except BaseException:
            self._close_netns()
            raise

    @property
    def netns(self) -> NetNS | None:
        return self._netns

    def close(self) -> None:
        self._nl.close()
        self._close_netns()

    def _close_netns(self) -> None:
        if self._netns is not None:
            self._netns.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def together(self) -> Iterator[None]:
        """The block's changes are asked for at once, when it ends, and made in their order.

        Only for what is named by index, as nothing can be looked up meanwhile; what they return
        says nothing. All are tried; the first failure is raised.
        """
        with self._nl.together():
            yield

    # ---- links

    def links(self) -> list[Link]:
        found = self._nl.dump(GET_LINK, {}, [_SKIP_STATS], what="listing links")
        return [parse_link(message) for message in found]

    def find_link(self, device: str | int) -> Link | None:
        """By name or index; None when there is none."""
        fields, attrs = _named_or_index(device)
        message = self._nl.get(
            GET_LINK,
            fields,
            [*attrs, _SKIP_STATS],
            what=f"cannot look up {device}{self._where}",
            ignore=(errno.ENODEV, errno.ENOENT),
        )
        return None if message is None else parse_link(message)

    def link(self, device: str | int) -> Link:
        """Raises InterfaceGone."""
        found = self.find_link(device)
        if found is None:
            raise InterfaceGone(f"there is no interface {device}{self._where}")
        return found

    def ensure_veth(
        self,
        host_name: str,
        peer: Network,
        peer_name: str,
        *,
        mtu: int | None = None,
        host_mac: str | None = None,
        peer_mac: str | None = None,
        up: bool = True,
    ) -> VethPair:
        """A veth pair, one end here and the other in `peer`'s namespace (which may be this one).

        An existing pair of these names is adjusted. A host end of our name whose other end is not
        where it should be is left from a namespace that was replaced, and is made anew. `up` sets
        both ends up. Raises InterfaceExists when a name belongs to something else.
        """
        _named(peer_name)
        host_link = self.find_link(host_name)
        peer_link = peer.find_link(peer_name)
        if host_link is not None and host_link.kind != "veth":
            raise InterfaceExists(
                f"the interface {host_name}{self._where} exists and is not a veth device",
                cure=f"Remove it: `ip link delete {host_name}`",
            )
        if host_link is not None and not self._are_pair(host_link, peer, peer_link):
            self.delete_link(host_name)
            host_link = None
            peer_link = peer.find_link(peer_name)
        if host_link is None:
            if peer_link is not None:
                raise InterfaceExists(
                    f"the interface {peer_name}{peer._where} exists already",
                    cure="Choose another name for the endpoint's interface, or remove that one",
                )
            self._create_veth(host_name, peer, peer_name, mtu, host_mac, peer_mac)
            host_link = self.link(host_name)
            peer_link = peer.link(peer_name)
        assert peer_link is not None, "the other end of a pair is there"
        changed = self._change(host_link, mtu=mtu, mac=host_mac, up=up)
        changed |= peer._change(peer_link, mtu=mtu, mac=peer_mac, up=up)
        if changed:
            # Not before both are up: since Linux 6.8 a look at a link whose carrier just came
            # finishes its activation, and a link that is not active yet drops what is sent.
            host_link = self.link(host_name)
            peer_link = peer.link(peer_name)
        return VethPair(
            host_index=host_link.index,
            host_mac=host_link.mac,
            peer_index=peer_link.index,
            peer_mac=peer_link.mac,
        )

    def _are_pair(self, host_link: Link, peer: Network, peer_link: Link | None) -> bool:
        if peer_link is None or peer_link.kind != "veth":
            return False
        # Indexes alone may agree by chance, with ends in a third namespace.
        same_netns = self._netns_inode() == peer._netns_inode()
        return (
            host_link.link == peer_link.index
            and peer_link.link == host_link.index
            and host_link.foreign_link == peer_link.foreign_link == (not same_netns)
        )

    def _netns_inode(self) -> tuple[int, int]:
        if self._netns is not None:
            return self._netns.inode
        with NetNS.own() as own:
            return own.inode

    def _create_veth(
        self,
        host_name: str,
        peer: Network,
        peer_name: str,
        mtu: int | None,
        host_mac: str | None,
        peer_mac: str | None,
    ) -> None:
        def end(name: str, mac: str | None) -> list[tuple[str, Any]]:
            settings: list[tuple[str, Any]] = [("IFLA_IFNAME", _named(name))]
            if mtu is not None:
                settings.append(("IFLA_MTU", mtu))
            if mac is not None:
                settings.append(("IFLA_ADDRESS", _mac(mac)))
            return settings

        with peer._netns.dup() if peer._netns is not None else NetNS.own() as target:
            # Made in its final place under its final name, so no half-made pair shows.
            far = [*end(peer_name, peer_mac), ("IFLA_NET_NS_FD", target.fileno())]
            data = {"attrs": [("VETH_INFO_PEER", {"attrs": far})]}
            info = {"attrs": [("IFLA_INFO_KIND", "veth"), ("IFLA_INFO_DATA", data)]}
            self._nl.request(
                NEW_LINK,
                {},
                [*end(host_name, host_mac), ("IFLA_LINKINFO", info)],
                flags=NLM_F_CREATE | NLM_F_EXCL,
                what=f"cannot create the veth pair {host_name}/{peer_name}{peer._where}",
            )

    def ensure_host_pair(
        self, name: str = "cilia_host", peer_name: str = "cilia_net", *, mtu: int | None = None
    ) -> VethPair:
        """The pair whose first end holds the node's router addresses; both ends here and up."""
        return self.ensure_veth(name, self, peer_name, mtu=mtu)

    def _change(
        self,
        link: Link,
        *,
        mtu: int | None,
        mac: str | None,
        up: bool | None,
        gso_max: int | None = None,
    ) -> bool:
        """Changes what differs; False when nothing does."""
        fields: dict[str, Any] = {}
        settings: list[tuple[str, Any]] = []
        if mtu is not None and link.mtu != mtu:
            settings.append(("IFLA_MTU", mtu))
        if mac is not None and link.mac != _mac(mac):
            settings.append(("IFLA_ADDRESS", _mac(mac)))
        if gso_max is not None:
            settings += _gso_settings(link, gso_max)
        if up is not None and link.up != up:
            fields = {"flags": _IFF_UP if up else 0, "change": _IFF_UP}
        if not settings and not fields:
            return False
        what = f"cannot change {link.name}{self._where}"
        return self._nl.request(NEW_LINK, {"index": link.index, **fields}, settings, what=what)

    def ensure_link(
        self,
        name: str,
        *,
        mtu: int | None = None,
        mac: str | None = None,
        up: bool | None = None,
        gso_max: int | None = None,
    ) -> Link:
        """Makes an existing link have these settings. Raises InterfaceGone.

        `gso_max` is the longest segment (bytes) that TCP makes for the device. More than
        GSO_LEGACY_MAX is BIG TCP: a kernel, or a device, that has less of it gets what it has.
        """
        link = self.link(name)
        changed = self._change(link, mtu=mtu, mac=mac, up=up, gso_max=gso_max)
        return self.link(name) if changed else link

    def rename_link(self, device: str | int, name: str) -> None:
        """The link must be down on kernels before 6.2."""
        link = self.link(device)
        what = f"cannot rename {device} to {name}{self._where}"
        self._nl.request(
            NEW_LINK, {"index": link.index}, [("IFLA_IFNAME", _named(name))], what=what
        )

    def delete_link(self, device: str | int) -> bool:
        """Deletes the link, and its other end if it is a veth; False when it was absent."""
        fields, attrs = _named_or_index(device)
        return self._nl.request(
            DELETE_LINK,
            fields,
            attrs,
            what=f"cannot delete {device}{self._where}",
            ignore=(errno.ENODEV, errno.ENOENT),
        )

    def _index(self, device: str | int) -> int:
        return device if isinstance(device, int) else self.link(device).index

    # ---- addresses

    def addresses(self, device: str | int | None = None) -> list[DeviceAddress]:
        index = 0 if device is None else self._index(device)
        found = self._nl.dump(GET_ADDRESS, {}, what=f"listing addresses{self._where}")
        parsed = (parse_address(message) for message in found)
        return [a for a in parsed if a is not None and index in (0, a.index)]

    def ensure_address(
        self, device: str | int, address: Interface, *, prefix_route: bool = False
    ) -> None:
        """Gives the device the address. IPv6 is usable at once: no duplicate address detection.

        Without `prefix_route` the kernel adds no route for the address's prefix.
        """
        flags = _IFA_F_NODAD if address.version == 6 else 0
        if not prefix_route:
            flags |= _IFA_F_NOPREFIXROUTE
        attrs: list[tuple[str, Any]] = [
            ("IFA_ADDRESS", str(address.ip)),
            ("IFA_FLAGS", flags),
        ]
        if address.version == 4:
            attrs.append(("IFA_LOCAL", str(address.ip)))
        self._nl.request(
            NEW_ADDRESS,
            {
                "index": self._index(device),
                "family": _family(address),
                "prefixlen": address.network.prefixlen,
            },
            attrs,
            flags=_PUT,
            what=f"cannot add the address {address} to {device}{self._where}",
            # IPv4 of before 6.x answers this to a replacement that changes nothing.
            ignore=(errno.EEXIST,),
        )

    def delete_address(self, device: str | int, address: Interface) -> bool:
        """False when it was absent, or the device is."""
        link = self.find_link(device)
        if link is None:
            return False
        return self._nl.request(
            DELETE_ADDRESS,
            {
                "index": link.index,
                "family": _family(address),
                "prefixlen": address.network.prefixlen,
            },
            [("IFA_LOCAL", str(address.ip))],
            what=f"cannot remove the address {address} from {device}{self._where}",
            ignore=(errno.EADDRNOTAVAIL, errno.ENODEV),
        )

    # ---- routes

    def routes(self, *, table: int | None = RT_TABLE_MAIN) -> list[Route]:
        """Unicast and other routes of both families; `table` None lists every table."""
        found: list[Route] = []
        for family in (socket.AF_INET, socket.AF_INET6):
            messages = self._nl.dump(
                GET_ROUTE,
                {"family": family},
                # With a few hundred endpoints it is most of the work that the kernel picks it out.
                () if table is None else [("RTA_TABLE", table)],
                what=f"listing routes{self._where}",
                ignore=(errno.ENOENT,),  # no such table
            )
            for message in messages:
                route = parse_route(message)
                if route is not None:
                    found.append(route)
        return found

    def ensure_route(
        self,
        destination: Network_,
        *,
        device: str | int,
        gateway: Address | None = None,
        source: Address | None = None,
        table: int = RT_TABLE_MAIN,
        mtu: int | None = None,
        priority: int | None = None,
    ) -> None:
        """Sets the route to the destination, in place of another one of the same priority.

        A gateway is reached on-link, whatever the device's addresses are. `source` is the address
        that the node's own packets get.
        """
        fields, attrs = _route(destination, self._index(device), table, priority)
        if gateway is not None:
            fields["flags"] = _RTNH_F_ONLINK
            attrs.append(("RTA_GATEWAY", str(gateway)))
        if source is not None:
            attrs.append(("RTA_PREFSRC", str(source)))
        if mtu is not None:
            attrs.append(("RTA_METRICS", {"attrs": [("RTAX_MTU", mtu)]}))
        v4_on_link = destination.version == 4 and gateway is None
        fields |= {
            "type": _RTN_UNICAST,
            "proto": ROUTE_PROTOCOL,
            "scope": RT_SCOPE_LINK if v4_on_link else RT_SCOPE_UNIVERSE,
        }
        self._nl.request(
            NEW_ROUTE,
            fields,
            attrs,
            flags=_PUT,
            what=f"cannot set the route to {destination} by {device}{self._where}",
        )

    def delete_route(
        self,
        destination: Network_,
        *,
        device: str | int | None = None,
        table: int = RT_TABLE_MAIN,
        priority: int | None = None,
    ) -> bool:
        """False when it was absent, or the device is."""
        index = 0
        if device is not None:
            link = self.find_link(device)
            if link is None:
                return False
            index = link.index
        fields, attrs = _route(destination, index, table, priority)
        return self._nl.request(
            DELETE_ROUTE,
            fields | {"scope": _RT_SCOPE_NOWHERE},
            attrs,
            what=f"cannot remove the route to {destination}{self._where}",
            ignore=(errno.ESRCH, errno.ENOENT, errno.ENODEV),
        )

    # ---- neighbours

    def neighbours(self, device: str | int) -> list[Neighbour]:
        index = self._index(device)
        found: list[Neighbour] = []
        for family in (socket.AF_INET, socket.AF_INET6):
            for message in self._nl.dump(
                GET_NEIGHBOUR, {"family": family}, what=f"listing neighbours{self._where}"
            ):
                neighbour = _parse_neighbour(message)
                if neighbour is not None and neighbour.index == index:
                    found.append(neighbour)
        return found

    def ensure_neighbour(self, device: str | int, address: Address, mac: str) -> None:
        """A permanent entry: the address is never asked for on this device."""
        self._nl.request(
            NEW_NEIGHBOUR,
            {
                "ifindex": self._index(device),
                "family": _family(address),
                "state": _NUD_PERMANENT,
            },
            [("NDA_DST", str(address)), ("NDA_LLADDR", _mac(mac))],
            flags=_PUT,
            what=f"cannot set the neighbour {address} on {device}{self._where}",
        )

    def delete_neighbour(self, device: str | int, address: Address) -> bool:
        """False when it was absent, or the device is."""
        link = self.find_link(device)
        if link is None:
            return False
        return self._nl.request(
            DELETE_NEIGHBOUR,
            {"ifindex": link.index, "family": _family(address)},
            [("NDA_DST", str(address))],
            what=f"cannot remove the neighbour {address} from {device}{self._where}",
            ignore=(errno.ENOENT, errno.ENODEV),
        )

    # ---- the node

    def host_devices(
        self, *, exclude: Iterable[str] = ("cil", "cilia_", "lxc")
    ) -> list[HostDevice]:
        """The devices that are up and have a global address or a default route, by index.

        Not the loopback, not enslaved ones, and not those whose name starts with one of `exclude`.
        """
        prefixes = tuple(exclude)
        addresses: dict[int, list[Interface]] = {}
        for address in self.addresses():
            if address.scope == RT_SCOPE_UNIVERSE:
                addresses.setdefault(address.index, []).append(address.interface)
        defaults = {route.index for route in self.default_routes()}
        return [
            HostDevice(
                index=link.index,
                name=link.name,
                mac=link.mac,
                mtu=link.mtu,
                addresses=tuple(addresses.get(link.index, ())),
                default_route=link.index in defaults,
                kind=link.kind,
                gso_max=min(link.gso_max, link.gso_ipv4_max or GSO_LEGACY_MAX),
            )
            for link in sorted(self.links(), key=lambda link: link.index)
            if link.up
            and not link.loopback
            and not link.master
            and not link.name.startswith(prefixes)
            and (link.index in addresses or link.index in defaults)
        ]

    def default_routes(self) -> list[Route]:
        """The best one first, for each family."""
        found = [r for r in self.routes() if not r.destination.prefixlen and r.type == _RTN_UNICAST]
        return sorted(found, key=lambda route: (route.destination.version, route.priority))

    def overlapping_routes(
        self, pool: Network_, *, ignore_devices: Iterable[str | int] = ()
    ) -> list[Route]:
        """Routes of the main table that share addresses with the pool: others live there.

        The default route is none of them, nor are multicast and link-local routes, nor our own.
        """
        ignored = set()
        for device in ignore_devices:
            link = self.find_link(device)
            if link is not None:
                ignored.add(link.index)
        return [
            route
            for route in self.routes()
            if route.destination.version == pool.version
            and route.destination.prefixlen
            and route.protocol != ROUTE_PROTOCOL
            and route.index not in ignored
            and not route.destination.is_multicast
            and not route.destination.is_link_local
            and _overlap(route.destination, pool)
        ]


def _overlap(one: Network_, other: Network_) -> bool:
    return isinstance(one, IPv4Network) == isinstance(other, IPv4Network) and one.overlaps(other)


def _named(name: str) -> str:
    if not _NAME.match(name) or name in (".", ".."):
        raise InvalidInterfaceName(name)
    return name


def _family(address: Address | Interface | Network_) -> int:
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


def _named_or_index(device: str | int) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    """Fields and attributes of a message about one link."""
    if isinstance(device, int):
        return {"index": device}, []
    return {}, [("IFLA_IFNAME", _named(device))]


def _route(
    destination: Network_, index: int, table: int, priority: int | None
) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    """Fields and attributes that name a route."""
    fields: dict[str, Any] = {"family": _family(destination), "dst_len": destination.prefixlen}
    attrs: list[tuple[str, Any]] = [("RTA_TABLE", table)]  # the field of the header has 8 bits
    if destination.prefixlen:
        attrs.append(("RTA_DST", str(destination.network_address)))
    if index:
        attrs.append(("RTA_OIF", index))
    if priority is not None:
        attrs.append(("RTA_PRIORITY", priority))
    return fields, attrs


def mac_bytes(mac: str) -> bytes:
    """Raises InvalidError."""
    try:
        packed = bytes.fromhex(mac.replace(":", ""))
    except ValueError:
        packed = b""
    if len(packed) != 6:
        raise InvalidError(f"{mac!r} is not a MAC address", cure="Write it as 02:00:00:00:00:01")
    return packed


def _mac(mac: str) -> str:
    """In the one spelling that pyroute2 takes. Raises InvalidError."""
    return mac_bytes(mac).hex(":")


def _mac_text(value: bytes | None) -> str:
    return value.hex(":") if value and len(value) == 6 else ""  # other link layers, other lengths


def _address(value: bytes | None) -> Address | None:
    return None if value is None else ipaddress.ip_address(value)


def parse_link(message: Message) -> Link:
    """Of an RTM_NEWLINK or RTM_DELLINK."""
    _, _, index, flags, _ = _IFINFOMSG.unpack_from(message.body)
    found = attributes(message.body, _IFINFOMSG.size)
    info = attributes(found.get(_IFLA_LINKINFO, b""))
    return Link(
        index=index,
        name=as_text(found.get(_IFLA_IFNAME)),
        kind=as_text(info.get(_IFLA_INFO_KIND)),
        mac=_mac_text(found.get(_IFLA_ADDRESS)),
        mtu=as_u32(found.get(_IFLA_MTU)),
        up=bool(flags & _IFF_UP),
        carrier=bool(flags & _IFF_LOWER_UP),
        loopback=bool(flags & _IFF_LOOPBACK),
        master=as_u32(found.get(_IFLA_MASTER)),
        link=as_u32(found.get(_IFLA_LINK)),
        foreign_link=_IFLA_LINK_NETNSID in found,
        alias=as_text(found.get(_IFLA_IFALIAS)),
        gso_max=as_u32(found.get(_IFLA_GSO_MAX_SIZE)),
        gso_ipv4_max=as_u32(found.get(IFLA_GSO_IPV4_MAX_SIZE)),
        tso_max=as_u32(found.get(_IFLA_TSO_MAX_SIZE)),
    )


def _gso_settings(link: Link, wanted: int) -> list[tuple[str, Any]]:
    """What differs. Of IPv6 first: a value of up to GSO_LEGACY_MAX is that of IPv4 too."""
    size = min(wanted, link.tso_max or GSO_LEGACY_MAX)
    settings: list[tuple[str, Any]] = []
    if link.gso_max and link.gso_max != size:
        settings.append(("IFLA_GSO_MAX_SIZE", size))
    if link.gso_ipv4_max and link.gso_ipv4_max != size:
        settings.append(("IFLA_GSO_IPV4_MAX_SIZE", size))
    return settings


def parse_address(message: Message) -> DeviceAddress | None:
    """Of an RTM_NEWADDR or RTM_DELADDR; None for another family."""
    family, length, _, scope, index = _IFADDRMSG.unpack_from(message.body)
    if family not in _FAMILIES:
        return None
    found = attributes(message.body, _IFADDRMSG.size)
    # On point-to-point links IFA_ADDRESS is the other end; IPv6 has IFA_LOCAL only then.
    address = _address(found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS))
    if address is None:
        return None
    interface = ipaddress.ip_interface((address, length))
    return DeviceAddress(index=index, interface=interface, scope=scope)


def is_ours(route: Message) -> bool:
    """Whether an RTM_NEWROUTE or RTM_DELROUTE is about a route that we made."""
    return len(route.body) >= _RTMSG.size and _RTMSG.unpack_from(route.body)[5] == ROUTE_PROTOCOL


def parse_route(message: Message) -> Route | None:
    """Of an RTM_NEWROUTE or RTM_DELROUTE; None for another family."""
    family, length, _, _, table, protocol, scope, kind, _ = _RTMSG.unpack_from(message.body)
    if family not in _FAMILIES:
        return None
    found = attributes(message.body, _RTMSG.size)
    destination = _address(found.get(_RTA_DST))
    if destination is None:
        destination = IPv4Address(0) if family == socket.AF_INET else IPv6Address(0)
    return Route(
        destination=ipaddress.ip_network((destination, length), strict=False),
        gateway=_address(found.get(_RTA_GATEWAY)),
        index=as_u32(found.get(_RTA_OIF)),
        source=_address(found.get(_RTA_PREFSRC)),
        table=as_u32(found[_RTA_TABLE]) if _RTA_TABLE in found else table,
        protocol=protocol,
        scope=scope,
        type=kind,
        priority=as_u32(found.get(_RTA_PRIORITY)),
    )


def _parse_neighbour(message: Message) -> Neighbour | None:
    _, index, state, _, _ = _NDMSG.unpack_from(message.body)
    found = attributes(message.body, _NDMSG.size)
    address = _address(found.get(_NDA_DST))
    if address is None:
        return None
    return Neighbour(
        index=index,
        address=address,
        mac=_mac_text(found.get(_NDA_LLADDR)),
        permanent=bool(state & _NUD_PERMANENT),
    )
