"""How the service and its clients are, read when asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from cilia.pki.files import CertificateInfo
from protos.xds.v1 import xds_pb2 as pb
from services.xds.accesslog import AccessLog
from services.xds.cache import ResourceCache
from services.xds.files import ResourceDirectory
from services.xds.hub import Attached, Hub, State
from services.xds.redirects import Redirects, Row
from services.xds.resources import NodeID, TypeURL, by_short_name, type_info
from services.xds.translator import Counters, RedirectCounters

_CHUNK: Final = 500
_MAX_POLICIES: Final = 10

_STATES: Final = {
    State.PENDING: pb.ResourceOnNode.PENDING,
    State.ACKED: pb.ResourceOnNode.ACKED,
    State.NACKED: pb.ResourceOnNode.NACKED,
}


class StatusReader:
    """`envoy` tells how the proxy that was launched from here is; None: none was. `sources` counts
    the proxies that send their access logs."""

    def __init__(
        self,
        *,
        cache: ResourceCache,
        hub: Hub,
        redirects: Redirects | None,
        directory: ResourceDirectory | None,
        access_log: AccessLog,
        certificates: Callable[[], list[CertificateInfo]],
        sources: Callable[[], int] = lambda: 0,
        counters: RedirectCounters | None = None,
        envoy: Callable[[], pb.EnvoyStatus] | None = None,
    ) -> None:
        self._cache = cache
        self._hub = hub
        self._redirects = redirects
        self._directory = directory
        self._access_log = access_log
        self._certificates = certificates
        self._sources = sources
        self._counters = counters
        self._envoy = envoy
        self._started_ns = time.time_ns()

    async def read(self) -> pb.StatusResponse:
        response = pb.StatusResponse(version=_version(), started_ns=self._started_ns)
        response.streams.extend(_stream(a) for a in self._hub.streams.values())
        for url, table in sorted(
            self._cache.tables.items(), key=lambda item: (type_info(item[0]).order, item[0])
        ):
            response.types.add(
                type_url=url, resources=table.count, bytes=table.size, changes=table.changes
            )
        for rejection in self._hub.rejections.values():
            response.rejections.add(
                node=rejection.node,
                type_url=rejection.url,
                name=rejection.name,
                version=rejection.version,
                reason=rejection.reason,
                time_ns=_ns(rejection.time),
            )
        if self._redirects is not None:
            counters = await self._counters.counters() if self._counters is not None else {}
            response.redirects.extend(
                _redirect(row, counters.get(port, Counters()))
                for port, row in sorted(self._redirects.rows.items())
            )
            session = self._redirects.session
            response.agent.synced = self._redirects.synced
            if session is not None:
                response.agent.connected = True
                response.agent.node = session.node.name
                response.agent.since_ns = _ns(session.since)
        if self._envoy is not None:
            response.envoy.CopyFrom(self._envoy())
        if self._directory is not None:
            for file in self._directory.files:
                response.files.add(
                    path=str(file.path),
                    resources=file.resources,
                    error=file.error,
                    loaded_ns=_ns(file.loaded),
                )
        for info in self._certificates():
            response.certificates.add(
                path=str(info.path),
                subject=info.subject,
                names=info.names,
                not_after_ns=_ns(info.not_after.timestamp()) if info.not_after else 0,
                error=info.error,
            )
        response.access_log.sources = self._sources()
        response.access_log.readers = self._access_log.readers
        response.access_log.records = self._access_log.records
        response.access_log.lost = self._access_log.lost
        return response

    def resources(self, wanted_type: str, wanted_node: str) -> Iterator[list[pb.ResourceStatus]]:
        """In chunks."""
        url = by_short_name(wanted_type) if wanted_type else None
        found: dict[tuple[TypeURL, str, str], pb.ResourceStatus] = {}
        for resource, node in self._cache.rows():
            if url is not None and resource.url != url:
                continue
            if wanted_node and node is not None and node != wanted_node:
                continue
            key = (resource.url, resource.name, resource.version)
            status = found.get(key)
            if status is None:
                status = found[key] = pb.ResourceStatus(
                    type_url=resource.url,
                    name=resource.name,
                    version=resource.version,
                    bytes=resource.size,
                )
            if node is not None:
                status.nodes.append(node)
        nodes = [NodeID(wanted_node)] if wanted_node else sorted(self._hub.nodes())
        chunk: list[pb.ResourceStatus] = []
        ordered = sorted(found, key=lambda key: (type_info(key[0]).order, *key))
        for key in ordered:
            status = found[key]
            for node in nodes:
                self._stand(status, node)
            chunk.append(status)
            if len(chunk) >= _CHUNK:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def _stand(self, status: pb.ResourceStatus, node: NodeID) -> None:
        if status.nodes and node not in status.nodes:
            return
        url = TypeURL(status.type_url)
        desired = self._cache.view(node).get(url, status.name)
        if desired is None or desired.version != status.version:
            return  # the node has one of its own under this name
        if not self._hub.asked(node, url, status.name):
            return
        standing = self._hub.standing(node, url, status.name)
        status.states.add(
            node=node,
            state=_STATES[standing.state],
            version=standing.version,
            reason=standing.reason,
        )


def _stream(attached: Attached) -> pb.Stream:
    stream, peer = attached.stream, attached.peer
    shown = pb.Stream(
        id=attached.id,
        node=stream.node,
        claimed_node=peer.claimed_node,
        cluster=peer.cluster,
        user_agent=peer.user_agent,
        peer=peer.address,
        transport=peer.transport,
        protocol="delta" if stream.delta else "sotw",
        method=peer.method,
        since_ns=_ns(attached.since),
        requests=stream.requests,
        responses=stream.responses,
        response_bytes=stream.response_bytes,
        acks=stream.acks,
        nacks=stream.nacks,
    )
    for sub in sorted(stream.subscriptions.values(), key=lambda s: (s.info.order, s.info.url)):
        shown.subscriptions.add(
            type_url=sub.info.url,
            wildcard=sub.wildcard,
            names=len(sub.names),
            resources=len(sub.held),
            sent_version=sub.sent_version,
            acked_version=sub.accepted_version,
            waiting=bool(sub.outstanding),
            nack=sub.reason,
            nack_ns=_ns(time.time() - time.monotonic() + sub.refused_at) if sub.reason else 0,
        )
    return shown


def _redirect(row: Row, counters: Counters) -> pb.RedirectStatus:
    sets = [row.redirect.rules]
    if row.redirect.HasField("ingress_rules"):
        sets.append(row.redirect.ingress_rules)
    rules = [rule for rule_set in sets for rule in rule_set.rules]
    policies = sorted({rule.policy for rule in rules if rule.policy})
    return pb.RedirectStatus(
        state=row.to_proto(),
        direction=row.redirect.direction,
        parser=row.redirect.rules.parser,
        rules=len(rules),
        requests=counters.requests,
        denied=counters.denied,
        connections=counters.connections,
        active=counters.active,
        policies=policies[:_MAX_POLICIES],
    )


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)


def _version() -> str:
    try:
        return version("cilia")
    except PackageNotFoundError:
        return "unknown"
