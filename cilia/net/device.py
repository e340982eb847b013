"""Links, addresses, routes and neighbours of one network namespace.

A `Network` is one netlink socket in one namespace, with a thread of its own: open it, use it from
one thread at a time, close it.

    with Network() as host, Network(netns) as workload:
        pair = host.ensure_veth("cil00042", workload, "eth0", mtu=1500)
        workload.ensure_address("eth0", ip_interface("10.217.0.5/32"))
        workload.ensure_route(ip_network("10.217.0.1/32"), device="eth0")
        workload.ensure_route(ip_network("0.0.0.0/0"), device="eth0", gateway=router)
        workload.ensure_neighbour("eth0", router, pair.host_mac)
"""

from __future__ import annotations

import dataclasses
import errno
import ipaddress
import re
import socket
from collections.abc import Iterable
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
from cilia.net.rtnl import RouteSocket

Address = IPv4Address | IPv6Address
Interface = IPv4Interface | IPv6Interface
Network_ = IPv4Network | IPv6Network

# Marks the routes that we made, so that `cleanup` finds them (rt_protos of iproute2 leave it free).
ROUTE_PROTOCOL: Final = 193

_GET_LINK: Final = (18, 0x1)  # RTM_GETLINK, NLM_F_REQUEST: no acknowledgement after the answer
_RTEXT_FILTER_SKIP_STATS: Final = 8
# RTM_GETROUTE, NLM_F_REQUEST | NLM_F_DUMP: for pyroute2's "dump" a table is for itself to pick out,
# this way the kernel does. With a few hundred endpoints that is most of the work.
_DUMP_ROUTES: Final = (26, 0x1 | 0x300)
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

    # ---- links

    def links(self) -> list[Link]:
        found = self._nl.dump("link", what="listing links", ext_mask=_RTEXT_FILTER_SKIP_STATS)
        return [parse_link(message) for message in found]

    def find_link(self, device: str | int) -> Link | None:
        """By name or index; None when there is none."""
        message = self._nl.get(
            "link",
            _GET_LINK,
            what=f"cannot look up {device}{self._where}",
            ignore=(errno.ENODEV, errno.ENOENT),
            ext_mask=_RTEXT_FILTER_SKIP_STATS,
            **_named_or_index(device),
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
        def end(name: str, mac: str | None) -> dict[str, Any]:
            settings: dict[str, Any] = {"ifname": _named(name)}
            if mtu is not None:
                settings["mtu"] = mtu
            if mac is not None:
                settings["address"] = _mac(mac)
            return settings

        with peer._netns.dup() if peer._netns is not None else NetNS.own() as target:
            # Made in its final place under its final name, so no half-made pair shows.
            self._nl.request(
                "link",
                "add",
                what=f"cannot create the veth pair {host_name}/{peer_name}{peer._where}",
                kind="veth",
                peer=end(peer_name, peer_mac) | {"net_ns_fd": target.fileno()},
                **end(host_name, host_mac),
            )

    def ensure_host_pair(
        self, name: str = "cilia_host", peer_name: str = "cilia_net", *, mtu: int | None = None
    ) -> VethPair:
        """The pair whose first end holds the node's router addresses; both ends here and up."""
        return self.ensure_veth(name, self, peer_name, mtu=mtu)

    def _change(self, link: Link, *, mtu: int | None, mac: str | None, up: bool | None) -> bool:
        """Changes what differs; False when nothing does."""
        settings: dict[str, Any] = {}
        if mtu is not None and link.mtu != mtu:
            settings["mtu"] = mtu
        if mac is not None and link.mac != _mac(mac):
            settings["address"] = _mac(mac)
        if up is not None and link.up != up:
            settings["state"] = "up" if up else "down"
        if not settings:
            return False
        what = f"cannot change {link.name}{self._where}"
        return self._nl.request("link", "set", what=what, index=link.index, **settings)

    def ensure_link(
        self, name: str, *, mtu: int | None = None, mac: str | None = None, up: bool | None = None
    ) -> Link:
        """Makes an existing link have these settings. Raises InterfaceGone."""
        link = self.link(name)
        return self.link(name) if self._change(link, mtu=mtu, mac=mac, up=up) else link

    def rename_link(self, device: str | int, name: str) -> None:
        """The link must be down on kernels before 6.2."""
        link = self.link(device)
        what = f"cannot rename {device} to {name}{self._where}"
        self._nl.request("link", "set", what=what, index=link.index, ifname=_named(name))

    def delete_link(self, device: str | int) -> bool:
        """Deletes the link, and its other end if it is a veth; False when it was absent."""
        return self._nl.request(
            "link",
            "del",
            what=f"cannot delete {device}{self._where}",
            ignore=(errno.ENODEV, errno.ENOENT),
            **_named_or_index(device),
        )

    def _index(self, device: str | int) -> int:
        return device if isinstance(device, int) else self.link(device).index

    # ---- addresses

    def addresses(self, device: str | int | None = None) -> list[DeviceAddress]:
        index = 0 if device is None else self._index(device)
        found = self._nl.dump("addr", what=f"listing addresses{self._where}")
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
        self._nl.request(
            "addr",
            "replace",
            what=f"cannot add the address {address} to {device}{self._where}",
            # IPv4 of before 6.x answers this to a replacement that changes nothing.
            ignore=(errno.EEXIST,),
            index=self._index(device),
            family=_family(address),
            address=str(address.ip),
            prefixlen=address.network.prefixlen,
            flags=flags,
        )

    def delete_address(self, device: str | int, address: Interface) -> bool:
        """False when it was absent, or the device is."""
        link = self.find_link(device)
        if link is None:
            return False
        return self._nl.request(
            "addr",
            "del",
            what=f"cannot remove the address {address} from {device}{self._where}",
            ignore=(errno.EADDRNOTAVAIL, errno.ENODEV),
            index=link.index,
            family=_family(address),
            local=str(address.ip),
            prefixlen=address.network.prefixlen,
        )

    # ---- routes

    def routes(self, *, table: int | None = RT_TABLE_MAIN) -> list[Route]:
        """Unicast and other routes of both families; `table` None lists every table."""
        found: list[Route] = []
        for family in (socket.AF_INET, socket.AF_INET6):
            spec = {} if table is None else {"table": table}
            messages = self._nl.dump(
                "route",
                _DUMP_ROUTES,
                what=f"listing routes{self._where}",
                ignore=(errno.ENOENT,),  # no such table
                family=family,
                **spec,
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
        spec = self._route_spec(destination, self._index(device), table, priority)
        if gateway is not None:
            spec |= {"gateway": str(gateway), "flags": _RTNH_F_ONLINK}
        if source is not None:
            spec["prefsrc"] = str(source)
        if mtu is not None:
            spec["metrics"] = {"mtu": mtu}
        v4_on_link = destination.version == 4 and gateway is None
        self._nl.request(
            "route",
            "replace",
            what=f"cannot set the route to {destination} by {device}{self._where}",
            type=_RTN_UNICAST,
            proto=ROUTE_PROTOCOL,
            scope=RT_SCOPE_LINK if v4_on_link else RT_SCOPE_UNIVERSE,
            **spec,
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
        return self._nl.request(
            "route",
            "del",
            what=f"cannot remove the route to {destination}{self._where}",
            ignore=(errno.ESRCH, errno.ENOENT, errno.ENODEV),
            scope=_RT_SCOPE_NOWHERE,
            **self._route_spec(destination, index, table, priority),
        )

    def _route_spec(
        self, destination: Network_, index: int, table: int, priority: int | None
    ) -> dict[str, Any]:
        spec: dict[str, Any] = {
            "family": _family(destination),
            "dst_len": destination.prefixlen,
            "table": table,
        }
        if destination.prefixlen:
            spec["dst"] = str(destination.network_address)
        if index:
            spec["oif"] = index
        if priority is not None:
            spec["priority"] = priority
        return spec

    # ---- neighbours

    def neighbours(self, device: str | int) -> list[Neighbour]:
        index = self._index(device)
        found: list[Neighbour] = []
        for family in (socket.AF_INET, socket.AF_INET6):
            for message in self._nl.dump(
                "neigh", what=f"listing neighbours{self._where}", family=family
            ):
                neighbour = _parse_neighbour(message)
                if neighbour is not None and neighbour.index == index:
                    found.append(neighbour)
        return found

    def ensure_neighbour(self, device: str | int, address: Address, mac: str) -> None:
        """A permanent entry: the address is never asked for on this device."""
        self._nl.request(
            "neigh",
            "replace",
            what=f"cannot set the neighbour {address} on {device}{self._where}",
            ifindex=self._index(device),
            family=_family(address),
            dst=str(address),
            lladdr=_mac(mac),
            state=_NUD_PERMANENT,
        )

    def delete_neighbour(self, device: str | int, address: Address) -> bool:
        """False when it was absent, or the device is."""
        link = self.find_link(device)
        if link is None:
            return False
        return self._nl.request(
            "neigh",
            "del",
            what=f"cannot remove the neighbour {address} from {device}{self._where}",
            ignore=(errno.ENOENT, errno.ENODEV),
            ifindex=link.index,
            family=_family(address),
            dst=str(address),
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


def _named_or_index(device: str | int) -> dict[str, Any]:
    return {"index": device} if isinstance(device, int) else {"ifname": _named(device)}


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


def _mac_text(value: str | None) -> str:
    return value if value and len(value) == 17 else ""  # other link layers have other lengths


def _address(value: str | None) -> Address | None:
    return None if value is None else ipaddress.ip_address(value)


def parse_link(message: Any) -> Link:
    """Of pyroute2's ifinfmsg."""
    flags = message["flags"]
    info = message.get_attr("IFLA_LINKINFO")
    return Link(
        index=message["index"],
        name=message.get_attr("IFLA_IFNAME") or "",
        kind=(info and info.get_attr("IFLA_INFO_KIND")) or "",
        mac=_mac_text(message.get_attr("IFLA_ADDRESS")),
        mtu=message.get_attr("IFLA_MTU") or 0,
        up=bool(flags & _IFF_UP),
        carrier=bool(flags & _IFF_LOWER_UP),
        loopback=bool(flags & _IFF_LOOPBACK),
        master=message.get_attr("IFLA_MASTER") or 0,
        link=message.get_attr("IFLA_LINK") or 0,
        foreign_link=message.get_attr("IFLA_LINK_NETNSID") is not None,
        alias=message.get_attr("IFLA_IFALIAS") or "",
    )


def parse_address(message: Any) -> DeviceAddress | None:
    """Of pyroute2's ifaddrmsg; None for another family."""
    if message["family"] not in (socket.AF_INET, socket.AF_INET6):
        return None
    # On point-to-point links IFA_ADDRESS is the other end; IPv6 has IFA_LOCAL only then.
    address = _address(message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS"))
    if address is None:
        return None
    interface = ipaddress.ip_interface((address, message["prefixlen"]))
    return DeviceAddress(index=message["index"], interface=interface, scope=message["scope"])


def parse_route(message: Any) -> Route | None:
    """Of pyroute2's rtmsg; None for another family."""
    family = message["family"]
    if family not in (socket.AF_INET, socket.AF_INET6):
        return None
    destination = _address(message.get_attr("RTA_DST"))
    if destination is None:
        destination = IPv4Address(0) if family == socket.AF_INET else IPv6Address(0)
    table = message.get_attr("RTA_TABLE")
    return Route(
        destination=ipaddress.ip_network((destination, message["dst_len"]), strict=False),
        gateway=_address(message.get_attr("RTA_GATEWAY")),
        index=message.get_attr("RTA_OIF") or 0,
        source=_address(message.get_attr("RTA_PREFSRC")),
        table=message["table"] if table is None else table,
        protocol=message["proto"],
        scope=message["scope"],
        type=message["type"],
        priority=message.get_attr("RTA_PRIORITY") or 0,
    )


def _parse_neighbour(message: Any) -> Neighbour | None:
    address = _address(message.get_attr("NDA_DST"))
    if address is None:
        return None
    return Neighbour(
        index=message["ifindex"],
        address=address,
        mac=_mac_text(message.get_attr("NDA_LLADDR")),
        permanent=bool(message["state"] & _NUD_PERMANENT),
    )
