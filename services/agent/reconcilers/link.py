"""The wire of an endpoint: a veth pair with addresses, routes and permanent neighbours.

    workload's namespace                         node
    eth0  10.217.0.5/32, fd00:c111::5/128  ────  cil00042  (programs)
      10.217.0.1 dev eth0                          10.217.0.5 dev cil00042 src 10.217.0.1
      default via 10.217.0.1 dev eth0              10.217.0.5 lladdr <eth0> permanent
      10.217.0.1 lladdr <cil00042> permanent

Neither side ever asks for the other's link layer address, and duplicate address detection is off:
the addresses are ours to give.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_interface, ip_network
from typing import Final

from cilia.identity import EndpointID
from cilia.net import sysctl
from cilia.net.device import Network
from cilia.net.errors import NamespaceGone
from cilia.net.netns import NetNS
from cilia.reconcile import Reconciler
from cilia.table import ReadTable
from services.agent.datapath import Datapath
from services.agent.rows import LinkRow

Address = IPv4Address | IPv6Address

_DEFAULT4: Final = IPv4Network("0.0.0.0/0")
_DEFAULT6: Final = IPv6Network("::/0")


class LinkReconciler(Reconciler[EndpointID, LinkRow]):
    """Brings wires up and keeps them so. The veth itself is made by Wiring, before its programs."""

    def __init__(
        self,
        desired: ReadTable[EndpointID, LinkRow],
        datapath: Datapath,
        *,
        router4: IPv4Address,
        router6: IPv6Address,
    ) -> None:
        super().__init__("link", desired)
        self._datapath = datapath
        self._router4 = router4
        self._router6 = router6
        self._networks: dict[EndpointID, Network] = {}

    @contextmanager
    def opened(self, number: EndpointID, netns: NetNS) -> Iterator[Network]:
        """A socket in the workload's namespace, kept until `close`: one is enough for an add."""
        network = self._networks.get(number)
        if network is None:
            network = self._networks[number] = Network(netns)
        yield network

    def close(self, number: EndpointID) -> None:
        """Done with the namespace; nothing open is success."""
        network = self._networks.pop(number, None)
        if network is not None:
            network.close()

    async def update(self, row: LinkRow) -> None:
        def connect() -> None:
            try:
                self._connect(row)
            finally:
                self.close(row.id)

        await self._datapath.run(connect)

    def _addresses(self, row: LinkRow) -> list[tuple[Address, Address, IPv4Network | IPv6Network]]:
        found: list[tuple[Address, Address, IPv4Network | IPv6Network]] = []
        if row.ipv4 is not None:
            found.append((row.ipv4, self._router4, _DEFAULT4))
        if row.ipv6 is not None:
            found.append((row.ipv6, self._router6, _DEFAULT6))
        return found

    def _connect(self, row: LinkRow) -> None:
        host = self._datapath.host_network()
        sysctl.set_device(row.host_interface, sysctl.HOST_SIDE)
        host.ensure_link(row.host_interface, mtu=row.mtu, up=True, gso_max=row.gso_max)
        try:
            self._connect_workload(row)
        except NamespaceGone:
            # Its name is gone, or another's; the namespace lives while the pair does, and is as we
            # made it.
            host.link(row.host_interface)
        with host.together():
            for address, router, _ in self._addresses(row):
                host.ensure_route(ip_network(address), device=row.ifindex, source=router)
                host.ensure_neighbour(row.ifindex, address, row.mac.hex(":"))

    def _connect_workload(self, row: LinkRow) -> None:
        with NetNS.open(row.netns) as netns, self.opened(row.id, netns) as workload:
            if netns.inode[1] != row.netns_inode:
                raise NamespaceGone(f"the name {row.netns} is that of another namespace now")
            sysctl.set_device(row.interface, sysctl.WORKLOAD, netns=netns)
            link = workload.ensure_link(row.interface, mtu=row.mtu, up=True, gso_max=row.gso_max)
            with workload.together():
                for address, router, default in self._addresses(row):
                    workload.ensure_address(link.index, ip_interface(address))
                    workload.ensure_route(ip_network(router), device=link.index)
                    workload.ensure_neighbour(link.index, router, row.node_mac.hex(":"))
                    workload.ensure_route(default, device=link.index, gateway=router)

    async def delete(self, row: LinkRow) -> None:
        def erase() -> None:
            host = self._datapath.host_network()
            host.delete_link(row.host_interface)

        await self._datapath.run(erase)
