"""Interfaces of endpoints, in the order that leaves no gap: made down, programs on, then up."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cilia.bpf.attach import filter_is_marked
from cilia.errors import DomainError, Kind
from cilia.identity import EndpointID
from cilia.net.netns import NetNS
from cilia.table import ReadTable, Table
from services.agent.datapath import Datapath
from services.agent.endpoint import Endpoint
from services.agent.host import HostNetwork
from services.agent.reconcilers.attach import AttachReconciler
from services.agent.reconcilers.link import LinkReconciler
from services.agent.rows import AttachRow, LinkRow


class WiringFailed(DomainError):
    """An interface could not be made, connected, or given its programs."""

    default_kind = Kind.PRECONDITION


@dataclass(frozen=True, slots=True)
class Made:
    ifindex: int
    mac: bytes
    node_mac: bytes


def _raw(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


class Wiring:
    """Owner of the links table; shares the attachments table with HostNetwork, by hook names."""

    def __init__(
        self,
        datapath: Datapath,
        host: HostNetwork,
        *,
        attachments: Table[str, AttachRow],
        attach: AttachReconciler,
        links: Table[EndpointID, LinkRow],
        link: LinkReconciler,
        quick: bool = False,
    ) -> None:
        """`quick`: programs come by filters first, and `fasten` makes links of them."""
        self._datapath = datapath
        self._host = host
        self._attachments = attachments
        self._attach = attach
        self._links = links
        self._link = link
        self._quick = quick

    @property
    def links(self) -> ReadTable[EndpointID, LinkRow]:
        return self._links.reader()

    async def check_netns(self, path: str) -> int:
        """The inode of the namespace. Raises NamespaceGone, NamespaceError."""

        def check() -> int:
            with NetNS.open(path) as netns:
                return netns.inode[1]

        return await self._datapath.run(check)

    async def create(self, endpoint: Endpoint) -> Made:
        """The pair, down, with programs on it. Raises DomainErrors."""

        def make() -> Made:
            host = self._datapath.host_network()
            with NetNS.open(endpoint.netns) as netns, self._link.opened(endpoint.id, netns) as peer:
                # A pair of ours under this name is left from a run that was killed.
                host.delete_link(endpoint.host_interface)
                pair = host.ensure_veth(
                    endpoint.host_interface,
                    peer,
                    endpoint.interface,
                    mtu=self._host.mtu,
                    up=False,
                )
                return Made(pair.host_index, _raw(pair.peer_mac), _raw(pair.host_mac))

        made = await self._datapath.run(make)
        await self.attach(endpoint, made.ifindex)
        return made

    def hooks(self, endpoint: Endpoint, ifindex: int, *, quick: bool = False) -> list[AttachRow]:
        name = endpoint.host_interface
        return [
            AttachRow(
                hook=f"{name}_ingress",
                interface=name,
                ifindex=ifindex,
                direction="ingress",
                program="from_endpoint",
                quick=quick,
            ),
            AttachRow(
                hook=f"{name}_egress",
                interface=name,
                ifindex=ifindex,
                direction="egress",
                program="to_endpoint",
                quick=quick,
            ),
        ]

    async def attach(self, endpoint: Endpoint, ifindex: int) -> None:
        """Programs on both hooks. Raises WiringFailed."""
        rows = self.hooks(endpoint, ifindex, quick=self._quick)
        self._attachments.upsert_all(rows)
        await self._attach.flush()
        errors = self._attach.errors
        for row in rows:
            if row.hook in errors:
                raise WiringFailed(
                    f"the programs cannot be attached to {endpoint.host_interface}: "
                    f"{errors[row.hook]}"
                )

    def link_row(self, endpoint: Endpoint) -> LinkRow:
        return LinkRow(
            id=endpoint.id,
            host_interface=endpoint.host_interface,
            interface=endpoint.interface,
            netns=endpoint.netns,
            netns_inode=endpoint.netns_inode,
            ifindex=endpoint.ifindex,
            mac=endpoint.mac,
            node_mac=endpoint.node_mac,
            ipv4=endpoint.ipv4,
            ipv6=endpoint.ipv6,
            mtu=self._host.mtu,
            gso_max=self._host.gso_max,
        )

    async def connect(self, endpoint: Endpoint) -> None:
        """Addresses, routes, neighbours; up. Raises WiringFailed."""
        self._links.upsert(self.link_row(endpoint))
        await self._link.flush()
        error = self._link.errors.get(endpoint.id)
        if error:
            raise WiringFailed(f"{endpoint.host_interface} cannot be connected: {error}")

    def adopt(self, endpoint: Endpoint) -> None:
        """A restored endpoint's wire and programs, to be made sure of at the next flush."""
        rows = self.hooks(endpoint, endpoint.ifindex)
        if self._quick:  # what an earlier run put there by filters stays so for now
            there = self._datapath.links_dir
            rows = [replace(row, quick=filter_is_marked(there / row.hook)) for row in rows]
        self._attachments.upsert_all(rows)
        self._links.upsert(self.link_row(endpoint))

    async def fasten(self) -> None:
        """Links in place of one endpoint's filters, if any has them still."""
        name = next((row.interface for row in self._attachments if row.quick), "")
        rows = [row for row in self._attachments if row.quick and row.interface == name]
        if rows:
            self._attachments.upsert_all(replace(row, quick=False) for row in rows)
            await self._attach.flush()

    async def remove(self, endpoint: Endpoint) -> None:
        """Nothing is left of the pair and its programs. Idempotent."""
        for row in self.hooks(endpoint, endpoint.ifindex):
            self._attachments.delete(row.hook)
        self._links.delete(endpoint.id)

        def erase() -> None:
            self._link.close(endpoint.id)
            host = self._datapath.host_network()
            host.delete_link(endpoint.host_interface)
            for row in self.hooks(endpoint, endpoint.ifindex):
                for name in (row.hook, f"{row.hook}_clsact"):
                    (self._datapath.links_dir / name).unlink(missing_ok=True)

        await self._datapath.run(erase)
        await self._link.flush()
        await self._attach.flush()

    async def alive(self) -> dict[str, int]:
        """Interfaces of the host and their indexes: an endpoint whose own is not there is gone."""

        def look() -> dict[str, int]:
            host = self._datapath.host_network()
            return {link.name: link.index for link in host.links()}

        return await self._datapath.run(look)

    async def flush(self) -> None:
        await self._attach.flush()
        await self._link.flush()

    def mark_synced(self) -> None:
        """All endpoints of an earlier run are known: what nobody wants may be pruned."""
        self._attachments.mark_synced()
        self._links.mark_synced()
