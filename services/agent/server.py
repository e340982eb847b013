"""The gRPC edge: convert, call the domain, convert. Decides nothing.

DomainErrors raised below become status codes in the interceptor of cilia.rpc.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import aclosing
from importlib.metadata import PackageNotFoundError, version
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, TypeVar, cast

import grpc

from cilia.bpf import constants as k
from cilia.bpf import probe
from cilia.labels import Labels
from cilia.policy import PROTO_BY_NAME
from cilia.policy.l7 import PortNames
from cilia.rpc.convert import labels_to_proto
from protos.agent.v1 import agent_pb2, agent_pb2_grpc
from services.agent import convert
from services.agent.calculation import Calculation
from services.agent.clusterwatch import ClusterView
from services.agent.config import AgentConfig
from services.agent.datapath import Datapath, wall_offset_ns
from services.agent.dumps import CHUNK_ROWS, Dumps
from services.agent.endpoint import Endpoint
from services.agent.endpointtable import Endpoints
from services.agent.eventmeta import EventMeaning
from services.agent.hostpolicy import node_labels
from services.agent.kernelaudit import KernelAudit
from services.agent.lives import EndpointLives
from services.agent.monitor import Decoder, Monitor
from services.agent.policydocs import PolicyDocuments
from services.agent.proxy import ENFORCED
from services.agent.regeneration import Regeneration
from services.agent.status import Status

T = TypeVar("T")
Stream = TypeVar("Stream", bound=Callable[..., Any])

_EVENT_TYPES = {"drop": k.EVENT_DROP, "trace": k.EVENT_TRACE, "verdict": k.EVENT_VERDICT}
if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
else:
    Context = grpc.aio.ServicerContext


def _version() -> str:
    try:
        return version("cilia")
    except PackageNotFoundError:
        return "not installed"  # run from a source tree


def _find(endpoints: Endpoints, ref: agent_pb2.EndpointRef) -> Endpoint:
    match ref.WhichOneof("ref"):
        case "id":
            return endpoints.find(number=ref.id)
        case "name":
            return endpoints.find(name=ref.name)
        case "address":
            return endpoints.find(address=ref.address)
        case _:
            raise convert.RequestInvalid(
                "no endpoint was named", cure="Give an id, a name or an address"
            )


def _written(method: Stream) -> Stream:
    """Serve an async generator as a coroutine that writes what it yields.

    When a client goes away grpc.aio drops a generator handler and leaves it to the garbage
    collector, which finishes it after the call it speaks of is freed. A coroutine is cancelled
    while its call still is.
    """

    async def serve(self: object, request: object, context: Context) -> None:
        async with aclosing(method(self, request, context)) as messages:
            async for message in messages:
                await context.write(message)

    return cast(Stream, serve)


def _chunks(rows: Iterable[T], size: int = CHUNK_ROWS) -> Iterator[list[T]]:
    chunk: list[T] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


class EndpointServer(agent_pb2_grpc.EndpointServiceServicer):
    def __init__(
        self,
        *,
        config: AgentConfig,
        endpoints: Endpoints,
        lives: EndpointLives,
        regeneration: Regeneration,
        view: ClusterView,
    ) -> None:
        self._config = config
        self._endpoints = endpoints
        self._lives = lives
        self._regeneration = regeneration
        self._view = view

    def _proto(self, endpoint: Endpoint) -> agent_pb2.Endpoint:
        return convert.endpoint_to_proto(
            endpoint,
            realised=self._regeneration.revision_of(endpoint),
            desired=self._view.policy_revision,
            mode=self._config.enforcement,
            audit=self._config.policy_audit,
            not_shown=self._regeneration.not_shown(endpoint),
        )

    async def Add(
        self, request: agent_pb2.AddEndpointRequest, context: Context
    ) -> agent_pb2.Endpoint:
        return self._proto(await self._lives.add(convert.add_request(request)))

    async def Delete(
        self, request: agent_pb2.DeleteEndpointRequest, context: Context
    ) -> agent_pb2.DeleteEndpointResponse:
        endpoint = _find(self._endpoints, request.ref)
        return agent_pb2.DeleteEndpointResponse(errors=await self._lives.delete(endpoint.id))

    async def List(
        self, request: agent_pb2.ListEndpointsRequest, context: Context
    ) -> agent_pb2.ListEndpointsResponse:
        wanted = convert.labels_of(request.labels)
        return agent_pb2.ListEndpointsResponse(
            endpoints=[
                self._proto(endpoint)
                for endpoint in sorted(self._endpoints, key=lambda e: e.id)
                if all(
                    label in endpoint.labels or label in endpoint.identity_labels
                    for label in wanted
                )
            ]
        )

    async def Get(self, request: agent_pb2.EndpointRef, context: Context) -> agent_pb2.Endpoint:
        return self._proto(_find(self._endpoints, request))

    async def SetLabels(
        self, request: agent_pb2.SetLabelsRequest, context: Context
    ) -> agent_pb2.Endpoint:
        endpoint = _find(self._endpoints, request.ref)
        return self._proto(
            await self._lives.set_labels(
                endpoint.id,
                add=convert.labels_of(request.add),
                remove=convert.labels_of(request.remove),
                wait=not request.no_wait,
            )
        )

    async def SetConfig(
        self, request: agent_pb2.SetConfigRequest, context: Context
    ) -> agent_pb2.Endpoint:
        endpoint = _find(self._endpoints, request.ref)
        return self._proto(await self._lives.set_options(endpoint.id, dict(request.options)))

    async def Regenerate(
        self, request: agent_pb2.EndpointRef, context: Context
    ) -> agent_pb2.Endpoint:
        endpoint = _find(self._endpoints, request)
        return self._proto(await self._lives.regenerate(endpoint.id))

    async def Log(self, request: agent_pb2.EndpointRef, context: Context) -> agent_pb2.EndpointLog:
        endpoint = _find(self._endpoints, request)
        return convert.log_to_proto(self._endpoints.log_of(endpoint.id).newest_first())


class PolicyServer(agent_pb2_grpc.PolicyServiceServicer):
    def __init__(
        self,
        *,
        documents: PolicyDocuments,
        view: ClusterView,
        regeneration: Regeneration,
        calculation: Calculation,
        endpoints: Endpoints,
        kernel_audit: KernelAudit,
    ) -> None:
        self._kernel_audit = kernel_audit
        self._documents = documents
        self._view = view
        self._regeneration = regeneration
        self._calculation = calculation
        self._endpoints = endpoints

    async def Apply(
        self, request: agent_pb2.ApplyRequest, context: Context
    ) -> agent_pb2.ApplyResponse:
        applied = await self._documents.apply(
            convert.sources(request),
            default_namespace=request.default_namespace,
            dry_run=request.dry_run,
            wait=request.wait,
            confirm=request.confirm,
        )
        return convert.applied_to_proto(applied)

    async def Confirm(
        self, request: agent_pb2.ConfirmRequest, context: Context
    ) -> agent_pb2.ConfirmResponse:
        return convert.confirmed_to_proto(self._documents.confirm())

    async def Delete(
        self, request: agent_pb2.DeleteRequest, context: Context
    ) -> agent_pb2.DeleteResponse:
        revision, outcomes = await self._documents.delete(
            [convert.policy_name(name) for name in request.names],
            everything=request.all,
            wait=request.wait,
        )
        return agent_pb2.DeleteResponse(
            revision=revision, outcomes=convert.outcomes_to_proto(outcomes)
        )

    async def Get(
        self, request: agent_pb2.GetPoliciesRequest, context: Context
    ) -> agent_pb2.GetPoliciesResponse:
        wanted = [convert.policy_name(name) for name in request.names]
        found = [
            entry
            for name, entry in sorted(self._view.policies.items())
            if not wanted or name in wanted
        ]
        return agent_pb2.GetPoliciesResponse(
            policies=[convert.policy_to_proto(entry) for entry in found],
            revision=self._view.policy_revision,
            realised_revision=self._regeneration.realised_revision,
        )

    async def AuditKernel(
        self, request: agent_pb2.AuditKernelRequest, context: Context
    ) -> agent_pb2.AuditKernelResponse:
        report = await self._kernel_audit.everything()
        return convert.audit_to_proto(
            report, self._calculation.rule_of, str(self._kernel_audit.selftest)
        )

    async def Trace(
        self, request: agent_pb2.TraceRequest, context: Context
    ) -> agent_pb2.TraceResponse:
        source = self._subject(request.source, "source")
        destination = self._subject(request.destination, "destination")
        protocol = (request.protocol or "TCP").upper()
        if protocol not in PROTO_BY_NAME:
            raise convert.RequestInvalid(
                f"{request.protocol!r} is not a protocol",
                cure=f"Use one of {', '.join(PROTO_BY_NAME)}",
            )
        if request.port > 65535:
            raise convert.RequestInvalid(f"port {request.port} is outside 0 to 65535")
        trace = self._calculation.engine.trace(
            source,
            destination,
            protocol,
            request.port,
            dst_ports=self._ports_of(request.destination),
        )
        return agent_pb2.TraceResponse(
            allowed=trace.allowed,
            egress=convert.verdict_to_proto(trace.egress),
            ingress=convert.verdict_to_proto(trace.ingress),
        )

    def _ports_of(self, subject: agent_pb2.Subject) -> PortNames:
        """What an endpoint of this node calls its ports."""
        if subject.WhichOneof("subject") != "endpoint":
            return ()
        return _find(self._endpoints, subject.endpoint).ports

    def _subject(self, subject: agent_pb2.Subject, which: str) -> Labels:
        match subject.WhichOneof("subject"):
            case "endpoint":
                return _find(self._endpoints, subject.endpoint).identity_labels
            case "identity":
                labels = self._calculation.labels_of(convert.identity_of(subject.identity))
                if labels is None:
                    raise convert.RequestInvalid(f"identity {subject.identity} is not known here")
                return labels
            case "labels":
                return convert.labels_of(subject.labels.labels)
            case "address":
                return self._labels_of_address(subject.address)
            case _:
                raise convert.RequestInvalid(
                    f"no {which} was given",
                    cure="Give an endpoint, an identity, labels or an address",
                )

    def _labels_of_address(self, text: str) -> Labels:
        try:
            address = ip_address(text)
        except ValueError as error:
            raise convert.RequestInvalid(f"{text!r} is not an address") from error
        best = max(
            (
                row
                for row in self._regeneration.ipcache_rows
                if row.prefix.version == address.version and address in row.prefix
            ),
            key=lambda row: row.prefix.prefixlen,
            default=None,
        )
        labels = self._calculation.labels_of(best.identity) if best is not None else None
        if labels is None:
            raise convert.RequestInvalid(f"nothing is known of {text}")
        return labels


class DatapathServer(agent_pb2_grpc.DatapathServiceServicer):
    def __init__(
        self,
        *,
        dumps: Dumps,
        endpoints: Endpoints,
        datapath: Datapath,
        monitor: Monitor,
    ) -> None:
        self._dumps = dumps
        self._endpoints = endpoints
        self._datapath = datapath
        self._monitor = monitor

    @_written
    async def DumpPolicy(
        self, request: agent_pb2.DumpPolicyRequest, context: Context
    ) -> AsyncIterator[agent_pb2.PolicyRows]:
        if request.HasField("ref"):
            slots = [int(_find(self._endpoints, request.ref).slot)]
        else:
            slots = await self._dumps.policy_slots()
        left = request.limit or None
        for slot in slots:
            rows = list(await self._dumps.policy(slot, left))
            for chunk in _chunks(rows):
                yield agent_pb2.PolicyRows(rows=[convert.policy_row(row) for row in chunk])
            if left is not None:
                left -= len(rows)
                if left <= 0:
                    return

    @_written
    async def DumpConntrack(
        self, request: agent_pb2.DumpRequest, context: Context
    ) -> AsyncIterator[agent_pb2.ConntrackRows]:
        rows, truncated = await self._dumps.conntrack(request.limit or None)
        for chunk in _chunks(rows):
            yield agent_pb2.ConntrackRows(rows=[convert.conntrack_row(row) for row in chunk])
        if truncated:
            yield agent_pb2.ConntrackRows(truncated=True)

    @_written
    async def DumpIpcache(
        self, request: agent_pb2.DumpRequest, context: Context
    ) -> AsyncIterator[agent_pb2.IpcacheRows]:
        rows, truncated = await self._dumps.ipcache(request.limit or None)
        for chunk in _chunks(rows):
            yield agent_pb2.IpcacheRows(rows=[convert.ipcache_row(row) for row in chunk])
        if truncated:
            yield agent_pb2.IpcacheRows(truncated=True)

    @_written
    async def DumpEndpoints(
        self, request: agent_pb2.DumpRequest, context: Context
    ) -> AsyncIterator[agent_pb2.EndpointRows]:
        rows, truncated = await self._dumps.endpoints(request.limit or None)
        for chunk in _chunks(rows):
            yield agent_pb2.EndpointRows(rows=[convert.endpoint_row(row) for row in chunk])
        if truncated:
            yield agent_pb2.EndpointRows(truncated=True)

    async def Metrics(
        self, request: agent_pb2.MetricsRequest, context: Context
    ) -> agent_pb2.MetricsResponse:
        return agent_pb2.MetricsResponse(
            rows=[convert.metric_row(row) for row in await self._dumps.metrics()],
            events_lost=self._monitor.lost,
        )

    async def Probe(
        self, request: agent_pb2.ProbeRequest, context: Context
    ) -> agent_pb2.ProbeResponse:
        found = await self._datapath.run(probe.features)
        return agent_pb2.ProbeResponse(
            features=[convert.feature_to_proto(feature) for feature in found]
        )


class MonitorServer(agent_pb2_grpc.MonitorServiceServicer):
    def __init__(self, *, monitor: Monitor, decoder: Decoder, meaning: EventMeaning) -> None:
        self._monitor = monitor
        self._decoder = decoder
        self._meaning = meaning

    @_written
    async def Events(
        self, request: agent_pb2.EventsRequest, context: Context
    ) -> AsyncIterator[agent_pb2.EventBatch]:
        with self._monitor.subscribe() as subscription:
            await context.send_initial_metadata(())  # the subscriber may act: it misses nothing now
            teller = self._meaning.teller()
            if told := teller.tell():
                yield agent_pb2.EventBatch(
                    meaning=convert.meaning_to_proto(told), wall_offset_ns=wall_offset_ns()
                )
            async for delivery in subscription:
                told = teller.tell()
                yield agent_pb2.EventBatch(
                    meaning=convert.meaning_to_proto(told) if told else None,
                    wall_offset_ns=wall_offset_ns(),
                    events=b"".join(
                        batch.events.tobytes()
                        for batch in delivery.items
                        if batch.events is not None
                    ),
                    lost_ring=sum(batch.lost for batch in delivery.items),
                    lost_transport=delivery.lost,
                    notifications=[
                        convert.notification_to_proto(batch.note)
                        for batch in delivery.items
                        if batch.note is not None
                    ],
                    l7=[record for batch in delivery.items for record in batch.l7],
                    lost_l7=sum(batch.lost_l7 for batch in delivery.items),
                )

    @_written
    async def Monitor(
        self, request: agent_pb2.MonitorRequest, context: Context
    ) -> AsyncIterator[agent_pb2.MonitorEvent]:
        types = {word.lower() for word in request.types}
        unknown = types - {*_EVENT_TYPES, "l7", "agent"}
        if unknown:
            raise convert.RequestInvalid(
                f"{', '.join(sorted(unknown))}: no such type of event",
                cure="Use drop, trace, verdict, l7 or agent",
            )
        kinds = [_EVENT_TYPES[word] for word in types if word in _EVENT_TYPES]
        agent = not types or "agent" in types
        l7 = not types or "l7" in types
        with self._monitor.subscribe() as subscription:
            await context.send_initial_metadata(())
            async for delivery in subscription:
                if delivery.lost:
                    yield agent_pb2.MonitorEvent(
                        type="lost",
                        lost=delivery.lost,
                        explanation=f"{delivery.lost} events were lost: this reader is too slow",
                    )
                for batch in delivery.items:
                    if batch.lost:
                        yield agent_pb2.MonitorEvent(
                            type="lost",
                            lost=batch.lost,
                            explanation=f"{batch.lost} events were lost: the ring was full",
                        )
                    if batch.note is not None and agent and not request.verdicts_denied_only:
                        yield convert.notification_event(batch.note)
                    if batch.lost_l7 and l7:
                        yield agent_pb2.MonitorEvent(
                            type="lost",
                            lost=batch.lost_l7,
                            explanation=f"{batch.lost_l7} requests were lost by the proxy's log",
                        )
                    for record in batch.l7 if l7 else ():
                        if convert.l7_concerns(
                            record,
                            endpoints=request.endpoint_ids,
                            denied_only=request.verdicts_denied_only,
                        ):
                            yield convert.l7_event(record)
                    if batch.events is None or (types and not kinds):
                        continue
                    chosen = self._decoder.select(
                        batch.events,
                        types=kinds,
                        endpoints=list(request.endpoint_ids),
                        denied_only=request.verdicts_denied_only,
                    )
                    for event in chosen:
                        yield convert.event_to_proto(self._decoder.decode(event))


class StatusServer(agent_pb2_grpc.StatusServiceServicer):
    def __init__(self, *, config: AgentConfig, status: Status, attach_mode: str) -> None:
        self._config = config
        self._status = status
        self._attach_mode = attach_mode

    async def Status(
        self, request: agent_pb2.StatusRequest, context: Context
    ) -> agent_pb2.StatusResponse:
        config = self._config
        return convert.status_to_proto(
            self._status.look(tables=request.tables),
            policy=agent_pb2.PolicySettings(
                l7_parsers=sorted(ENFORCED),
                allow_localhost=config.allow_localhost == "always",
                cluster=config.cluster,
                node_labels=labels_to_proto(node_labels(config.node_labels)),
            ),
            node=self._config.node,
            version=_version(),
            attach_mode=self._attach_mode,
            enforcement_mode=self._config.enforcement,
            started_ns=self._status.started_ns,
            all_controllers=request.all_controllers,
        )


def register(
    server: grpc.aio.Server,
    *,
    endpoint: EndpointServer,
    policy: PolicyServer,
    datapath: DatapathServer,
    monitor: MonitorServer,
    status: StatusServer,
) -> None:
    agent_pb2_grpc.add_EndpointServiceServicer_to_server(endpoint, server)
    agent_pb2_grpc.add_PolicyServiceServicer_to_server(policy, server)
    agent_pb2_grpc.add_DatapathServiceServicer_to_server(datapath, server)
    agent_pb2_grpc.add_MonitorServiceServicer_to_server(monitor, server)
    agent_pb2_grpc.add_StatusServiceServicer_to_server(status, server)
