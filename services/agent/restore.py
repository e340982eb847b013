"""After a start: what an earlier run left, taken over while traffic goes on.

    records  -> endpoints whose interface lives are taken back, the others removed
    pinned   -> the maps' content is the actual state; slots keep their subjects
    programs -> replaced in place on every hook
    then, once the policy set is known: the difference is written, and last what nobody wants goes

Nothing here writes a map. Until the policy set is known the kernel goes on with what it has.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import structlog

from cilia.telemetry import fields
from services.agent.calculation import Calculation
from services.agent.conntrack import Conntrack
from services.agent.datapath import Datapath
from services.agent.endpoint import Endpoint
from services.agent.endpointtable import Endpoints
from services.agent.hostpolicy import HOST_ID
from services.agent.identityalloc import IdentityAllocator
from services.agent.ipam import Ipam
from services.agent.record import EndpointRecords
from services.agent.regeneration import KernelRow, Regeneration
from services.agent.wiring import Wiring

log = structlog.get_logger()


@dataclass(slots=True)
class Restored:
    endpoints: int = 0
    vanished: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


async def restore(
    *,
    records: EndpointRecords,
    endpoints: Endpoints,
    ipam: Ipam,
    allocator: IdentityAllocator,
    calculation: Calculation,
    regeneration: Regeneration,
    wiring: Wiring,
    conntrack: Conntrack,
    datapath: Datapath,
) -> Restored:
    """Fill the tables from records and pinned maps."""
    result = Restored()
    kernel = {row.id: row for row in await regeneration.read_back()}

    def read() -> tuple[list[tuple[Endpoint, bool]], dict[str, int]]:
        records.prepare()
        host = datapath.host_network()
        return list(records.load()), {link.name: link.index for link in host.links()}

    found, links = await datapath.run(read)
    gone: list[Endpoint] = []
    for endpoint, creating in found:
        alive = links.get(endpoint.host_interface) == endpoint.ifindex and endpoint.ifindex
        if creating or not alive:
            gone.append(endpoint)
            if not creating:
                result.vanished.append(endpoint.qualified_name)
            continue
        _take_back(endpoint, kernel.get(endpoint.id), endpoints, ipam, allocator, calculation)
        wiring.adopt(endpoints.get(endpoint.id))
        result.endpoints += 1
    calculation.cidrs.avoid(regeneration.ipcache.identities())
    node = kernel.get(HOST_ID)
    if node is not None and node.open and node.slot:
        regeneration.adopt_node(node.slot)
    # Where record and row disagree the row's slot is not ours to name, nor to give to another.
    calculation.slots.hold(row.slot for row in kernel.values())
    known = {endpoint.host_interface for endpoint in endpoints}
    for endpoint in gone:
        if endpoint.host_interface not in known:
            await wiring.remove(endpoint)
        await conntrack.purge(endpoint.addresses)
        if endpoint.id not in endpoints.table:
            await datapath.run(records.remove, endpoint.id)
    wiring.mark_synced()
    result.problems = records.damaged
    if result.endpoints or gone:
        log.info(
            "Endpoints were restored.",
            **{fields.COUNT: result.endpoints, "removed": len(gone)},
        )
    return result


def _take_back(
    endpoint: Endpoint,
    row: KernelRow | None,
    endpoints: Endpoints,
    ipam: Ipam,
    allocator: IdentityAllocator,
    calculation: Calculation,
) -> None:
    for address in endpoint.addresses:
        pool = ipam.pool_of(address)
        if address in pool.network:
            pool.claim(address, endpoint.qualified_name)
        # An address of an earlier pool stays with its endpoint; it is not given to another.
    endpoint = replace(endpoint, wired=True)
    if endpoint.identity is not None:
        allocator.adopt(endpoint.identity_labels, endpoint.identity)
    subject = calculation.subject_of(endpoint)
    if row is not None and subject is not None:
        same = row.ifindex == endpoint.ifindex and row.identity == subject.identity
        if same and row.slot and calculation.slots.adopt(subject, row.slot):
            endpoint = replace(
                endpoint,
                realised_identity=row.identity,
                realised=subject if row.open else None,
                slot=row.slot,
            )
    endpoints.insert(endpoint, "Endpoint was read back after a start of the agent")
