"""The gRPC edge: pumps between a connection and a stream's state, and the service's own API.

    requests ─▶ read ─▶ Stream.receive ─▶ Hub.settle
                                             │ wake
    client  ◀─ write ◀─ Stream.send ◀────────┴──────── cache commits, timers

Requests arrive as bytes, so that a huge one is refused before it is parsed; responses leave as the
bytes that the cache holds.

Who a client is: on the unix socket, where only root and the group can connect, what its node says;
on TCP the node in its certificate, and on the proxy's own socket the proxy, whatever it says.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Final

import grpc
import grpc.aio
import structlog
from envoy.service.discovery.v3 import discovery_pb2
from google.protobuf.message import DecodeError

from cilia.controller import spawn
from cilia.errors import DomainError, Kind
from cilia.pki.files import identity_of
from cilia.rpc.server import peer_names
from cilia.telemetry import fields
from protos.xds.v1 import xds_pb2 as pb
from protos.xds.v1 import xds_pb2_grpc as pb_grpc
from services.xds.accesslog import AccessLog
from services.xds.hub import Attached, Hub, Peer
from services.xds.redirects import Redirects, Session
from services.xds.resources import (
    CDS,
    ECDS,
    EDS,
    LDS,
    NPDS,
    NPHDS,
    RDS,
    RTDS,
    SDS,
    SRDS,
    VHDS,
    NodeID,
    TypeURL,
    type_info,
)
from services.xds.status import StatusReader
from services.xds.stream import Stream, StreamRefused

log = structlog.get_logger()

Context = grpc.aio.ServicerContext[Any, Any]

_V3: Final = "envoy.service."
# Service, the name of what it streams, and the type; ADS has no type of its own.
SERVICES: Final[tuple[tuple[str, str, TypeURL | None], ...]] = (
    (_V3 + "discovery.v3.AggregatedDiscoveryService", "AggregatedResources", None),
    (_V3 + "listener.v3.ListenerDiscoveryService", "Listeners", LDS),
    (_V3 + "route.v3.RouteDiscoveryService", "Routes", RDS),
    (_V3 + "route.v3.ScopedRoutesDiscoveryService", "ScopedRoutes", SRDS),
    (_V3 + "route.v3.VirtualHostDiscoveryService", "VirtualHosts", VHDS),
    (_V3 + "cluster.v3.ClusterDiscoveryService", "Clusters", CDS),
    (_V3 + "endpoint.v3.EndpointDiscoveryService", "Endpoints", EDS),
    (_V3 + "secret.v3.SecretDiscoveryService", "Secrets", SDS),
    (_V3 + "extension.v3.ExtensionConfigDiscoveryService", "ExtensionConfigs", ECDS),
    (_V3 + "runtime.v3.RuntimeDiscoveryService", "Runtime", RTDS),
    ("cilium.NetworkPolicyDiscoveryService", "NetworkPolicies", NPDS),
    ("cilium.NetworkPolicyHostsDiscoveryService", "NetworkPolicyHosts", NPHDS),
)


# From so many resources on, only so many streams are written to at once, for so long each.
_LARGE: Final = 32
_LARGE_AT_ONCE: Final = 32
_TURN_S: Final = 1.0


class NodeUnknown(StreamRefused):
    """The client does not say who it is."""


class ClientDenied(DomainError):
    default_kind = Kind.DENIED


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeLimits:
    """What one client may ask of the edge."""

    request_bytes: int = 16 << 20
    node_bytes: int = 256 << 10
    """Envoy describes itself in about 60 KB."""
    requests_per_s: float = 2000.0
    burst: int = 10_000


class DiscoveryServer:
    """The discovery services, for one transport. `node` set: every client there is that node's.
    `reserved`: a node that nobody else may be, for what it accepts is believed to be enforced."""

    def __init__(
        self,
        *,
        hub: Hub,
        transport: str,
        node: NodeID | None = None,
        reserved: NodeID | None = None,
        limits: EdgeLimits | None = None,
    ) -> None:
        self._hub = hub
        self._transport = transport
        self._node = node
        self._reserved = reserved
        self._limits = limits or EdgeLimits()
        self._large = asyncio.Semaphore(_LARGE_AT_ONCE)
        self._closing = asyncio.Event()

    def register(self, server: grpc.aio.Server) -> None:
        for service, what, url in SERVICES:
            handlers = {
                f"{verb}{what}": grpc.stream_stream_rpc_method_handler(
                    self._handler(url, delta=verb == "Delta")
                )
                for verb in ("Stream", "Delta")
            }
            server.add_generic_rpc_handlers(
                (grpc.method_handlers_generic_handler(service, handlers),)
            )
            server.add_registered_method_handlers(service, handlers)  # type: ignore[attr-defined]  # not in the stubs

    def close(self) -> None:
        """Ends all streams; clients come back to whoever serves next."""
        self._closing.set()
        for attached in self._hub.streams.values():
            attached.wake()

    def _handler(self, url: TypeURL | None, *, delta: bool) -> Callable[..., Any]:
        async def handle(requests: AsyncIterator[bytes], context: Context) -> None:
            await self._serve(requests, context, url, delta=delta)

        return handle

    async def _serve(
        self,
        requests: AsyncIterator[bytes],
        context: Context,
        url: TypeURL | None,
        *,
        delta: bool,
    ) -> None:
        address = context.peer()  # while the call lives: it cannot be asked for later
        names = peer_names(context) if self._transport == "tcp" else ()
        iterator = aiter(requests)
        try:
            request = self._parse(await anext(iterator), url, delta=delta)
        except StopAsyncIteration:
            return
        wake = asyncio.Event()
        attached = self._attach(request, address, names, url, wake, delta=delta)
        stream = attached.stream
        log.info(
            "A client has connected.",
            **{
                fields.NODE: stream.node,
                fields.STREAM: attached.id,
                fields.PEER: address,
                fields.VERSION: attached.peer.user_agent,
            },
        )
        failure: DomainError | None = None
        try:
            async with asyncio.TaskGroup() as group:
                writer = spawn(group, self._write(attached, context, wake), "xds-writer")
                bucket = _Bucket(self._limits.requests_per_s, self._limits.burst)
                while True:
                    now = time.monotonic()
                    nacks = stream.nacks
                    stream.receive(request, now)
                    if stream.nacks != nacks:
                        _tell_refusal(attached, request)
                    self._hub.settle(attached, time.time())
                    if not stream.at_rest:
                        wake.set()
                    del request  # an Envoy's description of itself is large
                    if (pause_s := bucket.take(now)) > 0:
                        await asyncio.sleep(pause_s)
                    try:
                        data = await anext(iterator)
                    except StopAsyncIteration:
                        break
                    request = self._parse(data, url, delta=delta)
                writer.cancel()
        except* DomainError as errors:
            failure = _first(errors)
            log.warning(
                "A client's stream was ended.",
                **{
                    fields.NODE: stream.node,
                    fields.STREAM: attached.id,
                    fields.ERROR: failure.message,
                },
            )
        except* _Closing:
            pass
        finally:
            self._hub.detach(attached)
            log.info(
                "A client has gone.",
                **{fields.NODE: stream.node, fields.STREAM: attached.id},
            )
        if failure is not None:
            raise failure

    async def _write(self, attached: Attached, context: Context, wake: asyncio.Event) -> None:
        stream = attached.stream
        while True:
            wake.clear()
            if self._closing.is_set():
                raise _Closing
            if stream.backlog < _LARGE:
                await self._write_due(stream, context)
            else:
                await self._write_in_turn(stream, context)
            self._hub.settle(attached, time.time())
            if wake.is_set():
                continue
            if stream.wake_at is None:
                await wake.wait()
                continue
            try:
                async with asyncio.timeout(max(0.0, stream.wake_at - time.monotonic())):
                    await wake.wait()
            except TimeoutError:
                continue

    async def _write_due(self, stream: Stream, context: Context) -> None:
        for data in stream.send(time.monotonic()):
            await context.write(data)

    async def _write_in_turn(self, stream: Stream, context: Context) -> None:
        """A few at a time: gRPC copies what it is given, and after a restart everybody comes back
        at once. A client that reads slowly gives up its turn after a while."""
        async with asyncio.TaskGroup() as group, self._large:
            writing = spawn(group, self._write_due(stream, context), "xds-large-writer")
            await asyncio.wait([writing], timeout=_TURN_S)

    def _attach(
        self,
        request: Any,
        address: str,
        names: tuple[str, ...],
        url: TypeURL | None,
        wake: asyncio.Event,
        *,
        delta: bool,
    ) -> Attached:
        node = request.node
        if node.ByteSize() > self._limits.node_bytes:
            raise StreamRefused(
                f"the node describes itself in {node.ByteSize()} bytes, "
                f"above {self._limits.node_bytes}",
                kind=Kind.EXHAUSTED,
            )
        claimed = node.id[:256]
        if self._node is not None:
            known = str(self._node)
        elif self._transport == "tcp":
            known, _ = identity_of(names)
            if not known:
                raise ClientDenied(
                    "the client's certificate names no node",
                    cure="Issue one that does: cilia cert issue",
                )
        elif not claimed:
            raise NodeUnknown(
                "the first request names no node", cure="Set node.id in the client's bootstrap"
            )
        else:
            known = claimed
        if known == self._reserved:
            raise ClientDenied(
                f"the node {known} is the proxy of this service",
                cure="Give the client another node id, or the service another --proxy-node",
            )
        version = node.user_agent_version
        if node.HasField("user_agent_build_version"):
            number = node.user_agent_build_version.version
            version = f"{number.major_number}.{number.minor_number}.{number.patch}"
        peer = Peer(
            claimed_node=claimed if claimed != known else "",
            cluster=node.cluster[:256],
            user_agent=f"{node.user_agent_name[:64]} {version[:64]}".strip(),
            address=address,
            transport=self._transport,
            method=type_info(url).short if url else "ads",
        )
        return self._hub.attach(
            NodeID(known), delta=delta, peer=peer, wake=wake.set, time=time.time()
        )

    def _parse(self, data: bytes, url: TypeURL | None, *, delta: bool) -> Any:
        if len(data) > self._limits.request_bytes:
            raise StreamRefused(f"a request has {len(data)} bytes", kind=Kind.EXHAUSTED)
        kind: Any = discovery_pb2.DeltaDiscoveryRequest if delta else discovery_pb2.DiscoveryRequest
        try:
            request = kind.FromString(data)
        except DecodeError as error:
            raise StreamRefused(f"a request cannot be read: {error}") from error
        if url is not None:
            if request.type_url not in ("", url):
                raise StreamRefused(f"this service is of {url}, not of {request.type_url[:200]!r}")
            request.type_url = url
        return request


def _first(errors: BaseExceptionGroup[DomainError]) -> DomainError:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, DomainError)
    return error


class _Closing(Exception):
    """The service stops."""


class _Bucket:
    """Lets a burst pass, then so many a second: a client that floods is read more slowly."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate = rate
        self._burst = float(burst)
        self._left = float(burst)
        self._then = 0.0

    def take(self, now: float) -> float:
        """How long to wait before the next."""
        self._left = min(self._burst, self._left + (now - self._then) * self._rate) - 1
        self._then = now
        return max(0.0, -self._left / self._rate)


def _tell_refusal(attached: Attached, request: Any) -> None:
    stream = attached.stream
    sub = stream.subscriptions.get(TypeURL(request.type_url))
    log.warning(
        "A client refused a response.",
        **{
            fields.NODE: stream.node,
            fields.STREAM: attached.id,
            fields.TYPE_URL: request.type_url,
            fields.REASON: sub.reason if sub else "",
        },
    )


# ---- the service's own API, on the unix socket only


class RedirectServer(pb_grpc.RedirectServiceServicer):
    def __init__(self, redirects: Redirects) -> None:
        self._redirects = redirects

    async def Sync(  # type: ignore[override]  # the stubs know generators only
        self, request_iterator: AsyncIterator[pb.SyncRequest], context: Context
    ) -> None:
        wake = asyncio.Event()
        session = None
        failure: DomainError | None = None
        try:
            async with asyncio.TaskGroup() as group:
                writer = None
                async for request in request_iterator:
                    if session is None:
                        session = self._redirects.open(request.node, wake.set, time.time())
                        writer = spawn(
                            group, self._write(session, context, wake), "redirect-writer"
                        )
                        log.info("The agent has connected.", **{fields.NODE: session.node.name})
                    self._redirects.apply(session, request)
                    wake.set()
                if writer is not None:
                    writer.cancel()
        except* DomainError as errors:
            failure = _first(errors)
        finally:
            if session is not None:
                self._redirects.close(session)
        if failure is not None:
            raise failure

    async def _write(self, session: Session, context: Context, wake: asyncio.Event) -> None:
        while True:
            await wake.wait()
            wake.clear()
            if states := self._redirects.news(session):
                await context.write(pb.SyncResponse(states=states))


class AccessLogServer(pb_grpc.AccessLogServiceServicer):
    def __init__(self, access_log: AccessLog) -> None:
        self._log = access_log

    async def Records(
        self, request: pb.RecordsRequest, context: Context
    ) -> AsyncIterator[pb.L7Batch]:
        async for batch in self._log.read():
            yield batch


class StatusServer(pb_grpc.XdsStatusServiceServicer):
    def __init__(self, status: StatusReader) -> None:
        self._status = status

    async def Status(self, request: pb.StatusRequest, context: Context) -> pb.StatusResponse:
        return await self._status.read()

    async def Resources(
        self, request: pb.ResourcesRequest, context: Context
    ) -> AsyncIterator[pb.ResourcesResponse]:
        for chunk in self._status.resources(request.type_url, request.node):
            yield pb.ResourcesResponse(resources=chunk)
