"""Requests that the proxy told of, with their ends named: identities, endpoints, labels, rules.

    xds access log --batches--> L7Log --named--> Monitor --> flows, cilia monitor

Identities are the kernel's: the conntrack entry of the client's connection says for whom each end's
policy admitted it. Where it is gone, addresses say. Records are messages of the xds service, filled
in and handed on; while nobody listens they are counted only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any, Final

from cilia.identity import HOST, WORLD_IPV4, WORLD_IPV6, NumericIdentity
from cilia.rpc.convert import labels_to_proto
from cilia.table import ReadTable
from services.agent import metrics
from services.agent.calculation import Calculation
from services.agent.conntrack import Conntrack, Tuple
from services.agent.endpointtable import Endpoints
from services.agent.monitor import Monitor
from services.agent.redirects import Redirects
from services.agent.rows import IpcacheRow, Network
from services.agent.xdsclient import XdsClient

_TEXTS: Final = 3  # rules that are named of a refusal
_VERDICTS: Final = {1: "forwarded", 2: "denied", 3: "error"}
_DENIED: Final = 2

Address = IPv4Address | IPv6Address


class L7Log:
    """Follows the proxy's access log for as long as the agent runs."""

    def __init__(
        self,
        client: XdsClient,
        monitor: Monitor,
        *,
        conntrack: Conntrack,
        endpoints: Endpoints,
        calculation: Calculation,
        ipcache: ReadTable[Network, IpcacheRow],
        redirects: Redirects,
        policy_text: Callable[[int], str],
    ) -> None:
        self._client = client
        self._monitor = monitor
        self._conntrack = conntrack
        self._endpoints = endpoints
        self._calculation = calculation
        self._ipcache = ipcache
        self._redirects = redirects
        self._policy_text = policy_text

    async def follow(self) -> None:
        """Runs until the xds service goes away; raises XdsUnavailable then."""
        async for batch in self._client.records():
            for record in batch.records:
                metrics.L7_RECORDS.labels(_VERDICTS.get(record.verdict, "unknown")).inc()
            metrics.L7_LOST.inc(batch.lost)
            if self._monitor.listened:
                await self._name(batch.records)
                self._monitor.publish_l7(tuple(batch.records), batch.lost)

    async def _name(self, records: Sequence[Any]) -> None:
        tuples = [_tuple_of(record) for record in records]
        known = await self._conntrack.identities({t for t in tuples if t is not None})
        for record, key in zip(records, tuples, strict=True):
            source, destination = known.get(key, (0, 0)) if key is not None else (0, 0)
            self._name_end(record.source, source)
            self._name_end(record.destination, destination)
            if record.HasField("upstream"):
                self._name_end(record.upstream, 0)
            if not record.policy:
                record.policy = self._policies(record)

    def _name_end(self, peer: Any, identity: int) -> None:
        try:
            address = ip_address(peer.address)
        except ValueError:
            return
        found = self._endpoints.table.by("address", address)
        if found:
            peer.endpoint_id = found[0].id
            peer.endpoint_name = found[0].qualified_name
            identity = identity or found[0].realised_identity or 0
        peer.identity = identity or self._identity_of(address)
        labels = self._calculation.labels_of(NumericIdentity(peer.identity))
        if labels is not None:
            peer.labels.extend(labels_to_proto(labels))

    def _identity_of(self, address: Address) -> int:
        if address in self._calculation.host_addresses:
            return HOST
        row = self._ipcache.get(ip_network(address))
        if row is not None:
            return row.identity
        return WORLD_IPV4 if address.version == 4 else WORLD_IPV6

    def _policies(self, record: Any) -> str:
        """Of a request that was let pass the rule that did; else those that might have."""
        if record.rule_id:
            return self._policy_text(record.rule_id)
        listener = self._redirects.listeners.get(record.proxy_port)
        if listener is None or record.verdict != _DENIED:
            return ""
        numbers: Iterable[int] = (
            entry.rule_id
            for rules in (listener.egress, listener.ingress)
            if rules is not None
            for entry in rules.rules
        )
        texts = sorted({self._policy_text(number) for number in numbers} - {""})
        more = f" and {len(texts) - _TEXTS} more" if len(texts) > _TEXTS else ""
        return "; ".join(texts[:_TEXTS]) + more


def _tuple_of(record: Any) -> Tuple | None:
    try:
        source, destination = (
            ip_address(record.source.address),
            ip_address(record.destination.address),
        )
    except ValueError:
        return None
    return (source, record.source.port, destination, record.destination.port)
