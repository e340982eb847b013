"""The node's own network: the router device, the devices that lead to the world, and what changes.

    cilia_host ──── cilia_net       one veth pair; cilia_host carries the router addresses, so that
    10.217.0.1/32                   the node's packets to endpoints have a source that is answered
    fd00:c111::1/128

Settings are per device and on our devices only. No global sysctl is changed and no netfilter rule
is made: what leaves or reaches an endpoint is redirected by the programs, past the FORWARD hook.
One consequence: IPv6 "time exceeded" for an endpoint's packets is not sent by the kernel unless
net.ipv6.conf.all.forwarding is on, as ip6_forward() asks that switch first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv6Address,
    IPv6Interface,
    ip_interface,
)
from typing import Final

from cilia.net import sysctl
from cilia.net.device import GSO_LEGACY_MAX, DeviceAddress, HostDevice, Link, Network, Route
from cilia.net.errors import InterfaceGone
from cilia.net.watch import NetworkEvent, watch_network
from cilia.table import ReadTable, Table
from services.agent.config import AgentConfig
from services.agent.datapath import Datapath
from services.agent.ipam import Ipam, PoolOverlap
from services.agent.rows import AttachRow, DeviceRow

HOST_DEVICE: Final = "cilia_host"
_HOST_PEER: Final = "cilia_net"
_OWN_PREFIXES: Final = ("cil", "lxc")
_DEFAULT_MTU: Final = 1500
_BIG_TCP_BYTES: Final = 192 * 1024


@dataclass(frozen=True, slots=True)
class HostView:
    """What was found by looking once."""

    devices: tuple[HostDevice, ...]
    addresses: frozenset[IPv4Address | IPv6Address]
    links: tuple[Link, ...]


class HostNetwork:
    """Prepares the node's devices and keeps two tables about them."""

    def __init__(
        self,
        config: AgentConfig,
        datapath: Datapath,
        ipam: Ipam,
        *,
        attachments: Table[str, AttachRow],
        on_addresses: Callable[[frozenset[IPv4Address | IPv6Address]], None],
        on_gone: Callable[[str], None],
    ) -> None:
        self._config = config
        self._datapath = datapath
        self._ipam = ipam
        self._attachments = attachments
        self._on_addresses = on_addresses
        self._on_gone = on_gone  # told the names of interfaces that went
        self._devices: Table[int, DeviceRow] = Table("devices", key=lambda row: row.ifindex)
        self._names: frozenset[str] = frozenset()
        self._own: set[int] = set()  # indexes of endpoints' interfaces
        self.mtu = config.mtu or _DEFAULT_MTU
        self.gso_max = GSO_LEGACY_MAX
        self.node_ip = ""

    @property
    def devices(self) -> ReadTable[int, DeviceRow]:
        return self._devices.reader()

    async def refuse_overlap(self) -> None:
        """Before anything is made of this node. Raises PoolOverlap, NetworkError."""
        await asyncio.to_thread(self._refuse_overlap)

    async def start(self) -> None:
        """Raises NetworkError."""
        view = await self._datapath.run(self._look)
        self._take(view)
        device = await self._datapath.run(self._ensure_host_pair)
        self._attachments.upsert(
            AttachRow(
                hook=f"{HOST_DEVICE}_ingress",
                interface=HOST_DEVICE,
                ifindex=device.index,
                direction="ingress",
                program="assign_socket",
            )
        )
        await self._datapath.set_host_device(
            device.index, bytes.fromhex(device.mac.replace(":", ""))
        )
        await self.refresh()

    async def stop(self) -> None:
        """Everything stays: endpoints go on without us."""

    def _refuse_overlap(self) -> None:
        with Network() as host:
            for pool in self._ipam.pools:
                for route in host.overlapping_routes(
                    pool.network, ignore_devices=(HOST_DEVICE, _HOST_PEER)
                ):
                    link = host.find_link(route.index) if route.index else None
                    if link is not None and link.name.startswith(_OWN_PREFIXES):
                        continue
                    via = f" via {route.gateway}" if route.gateway else ""
                    device = f" dev {link.name}" if link else ""
                    raise PoolOverlap(pool.network, f"route {route.destination}{via}{device}")

    def _ensure_host_pair(self) -> Link:
        host = self._datapath.host_network()
        host.ensure_host_pair(HOST_DEVICE, _HOST_PEER, mtu=self.mtu)
        for name in (HOST_DEVICE, _HOST_PEER):
            sysctl.set_device(name, sysctl.HOST_SIDE)
        wanted: set[IPv4Interface | IPv6Interface] = set()
        for pool in self._ipam.pools:
            address = ip_interface(pool.router)
            wanted.add(address)
            host.ensure_address(HOST_DEVICE, address)
        for found in host.addresses(HOST_DEVICE):
            # Of an earlier run with another pool.
            if found.interface not in wanted and not found.interface.is_link_local:
                host.delete_address(HOST_DEVICE, found.interface)
        device = host.find_link(HOST_DEVICE)
        if device is None:
            raise InterfaceGone(f"{HOST_DEVICE} went while it was set up")
        return device

    def _look(self) -> HostView:
        host = self._datapath.host_network()
        devices = tuple(host.host_devices(exclude=_OWN_PREFIXES))
        addresses = frozenset(
            found.interface.ip
            for found in host.addresses()
            if not found.interface.is_loopback and not found.interface.is_link_local
        )
        return HostView(devices, addresses, tuple(host.links()))

    async def refresh(self) -> None:
        """Look again and act on what changed."""
        view = await self._datapath.run(self._look)
        self._take(view)
        self._on_addresses(view.addresses)
        names = frozenset(link.name for link in view.links)
        for name in self._names - names:
            self._on_gone(name)
        self._names = names
        self._own = {
            link.index
            for link in view.links
            if link.name.startswith(_OWN_PREFIXES) and link.name not in (HOST_DEVICE, _HOST_PEER)
        }

    def _take(self, view: HostView) -> None:
        chosen = [
            device
            for device in view.devices
            if not self._config.devices or device.name in self._config.devices
        ]
        default = [device for device in chosen if device.default_route] or chosen
        if not self._config.mtu:
            self.mtu = min((device.mtu for device in default), default=_DEFAULT_MTU)
        if self._config.big_tcp:
            # A device that takes less has longer segments cut to packets by this node's processors.
            taken = min((device.gso_max for device in view.devices), default=_BIG_TCP_BYTES)
            self.gso_max = max(min(taken, _BIG_TCP_BYTES), GSO_LEGACY_MAX)
        self._devices.replace_all(_device_row(device) for device in chosen)
        self._devices.mark_synced()
        addresses = [row.ipv4 for row in self._devices if row.ipv4 is not None]
        self.node_ip = str(addresses[0]) if addresses else ""
        hooks = {row.hook: row for device in chosen for row in _hooks(device)}
        for row in self._attachments:
            if row.hook.startswith("netdev_") and row.hook not in hooks:
                self._attachments.delete(row.hook)
        self._attachments.upsert_all(hooks.values())

    async def watch(self, trigger: Callable[[], None]) -> None:
        """Calls `trigger` whenever links, addresses or routes change; runs for ever."""
        async with watch_network(own_routes=False) as batches:
            trigger()
            async for batch in batches:
                # Each is looked at: own interfaces are learned on the way.
                concerning = [event for event in batch.events if self._concerns(event)]
                if batch.overrun or concerning:
                    trigger()

    def _concerns(self, event: NetworkEvent) -> bool:
        """Whether it may change what is kept here. What happens to endpoints' interfaces does not;
        that one of them went is told on."""
        match event.what:
            case Link() as link if link.name.startswith(_OWN_PREFIXES):
                self._own.add(link.index)
                if event.deleted:
                    self._own.discard(link.index)
                    self._on_gone(link.name)
                return False
            case Link():
                return True
            case DeviceAddress() | Route():
                return event.what.index not in self._own


def _hooks(device: HostDevice) -> tuple[AttachRow, AttachRow]:
    return (
        AttachRow(
            hook=f"netdev_{device.index}",
            interface=device.name,
            ifindex=device.index,
            direction="ingress",
            program="from_netdev",
        ),
        AttachRow(
            hook=f"netdev_{device.index}_egress",
            interface=device.name,
            ifindex=device.index,
            direction="egress",
            program="to_netdev",
        ),
    )


def _device_row(device: HostDevice) -> DeviceRow:
    def best(version: int) -> Iterable[IPv4Address | IPv6Address]:
        return (
            a.ip
            for a in device.addresses
            if a.version == version and not a.is_link_local and not a.is_loopback
        )

    ipv4 = next(iter(best(4)), None)
    ipv6 = next(iter(best(6)), None)
    return DeviceRow(
        name=device.name,
        ifindex=device.index,
        ipv4=ipv4 if isinstance(ipv4, IPv4Address) else None,
        ipv6=ipv6 if isinstance(ipv6, IPv6Address) else None,
        mac=bytes.fromhex(device.mac.replace(":", "")) if device.mac else bytes(6),
        l3=not device.mac,
    )
