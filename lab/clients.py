"""The lab's edge to the services: gRPC in, frozen values out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import grpc

from cilia.errors import Kind
from cilia.labels import Label
from cilia.rpc.channel import Channel, connect
from cilia.rpc.errors import RpcError
from lab.errors import LabError
from protos.agent.v1 import agent_pb2, agent_pb2_grpc
from protos.common.v1 import common_pb2
from protos.flows.v1 import flows_pb2, flows_pb2_grpc
from protos.identity.v1 import identity_pb2, identity_pb2_grpc
from protos.xds.v1 import xds_pb2, xds_pb2_grpc

CALL_TIMEOUT_S = 40.0
PING_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointInfo:
    """What the lab needs of an endpoint."""

    id: int
    name: str
    namespace: str
    identity: int
    ipv4: str
    ipv6: str
    state: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentStatus:
    """Ok, or the first thing that is not."""

    state: str
    message: str

    @property
    def ok(self) -> bool:
        return self.state.lower() == "ok"


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleInfo:
    """A rule as an event names it."""

    rule_id: int
    policy: str
    path: str
    file: str
    line: int

    @property
    def place(self) -> str:
        """file:line"""
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A verdict or drop event."""

    type: str
    verdict: str
    direction: str
    reason: str
    reason_code: int
    source: str
    source_port: int
    source_identity: int
    destination: str
    destination_port: int
    destination_identity: int
    protocol: str
    rule: RuleInfo | None
    default_deny: tuple[RuleInfo, ...]
    explanation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request that the proxy judged."""

    verdict: str
    direction: str
    source: str
    source_port: int
    source_identity: int
    destination: str
    destination_port: int
    destination_identity: int
    method: str
    url: str
    code: int
    grpc_status: int
    policy: str  # the rule that let it pass, or those that might have: with file and line


class AgentClient:
    """The agent of one node."""

    def __init__(self, socket: str) -> None:
        self.socket = socket
        self._connection = Channel(Path(socket), service="agent", deadline_s=CALL_TIMEOUT_S)
        self._channel = cast(grpc.aio.Channel, self._connection)
        self._endpoint = agent_pb2_grpc.EndpointServiceStub(self._channel)
        self._policy = agent_pb2_grpc.PolicyServiceStub(self._channel)
        self._monitor = agent_pb2_grpc.MonitorServiceStub(self._channel)
        self._status = agent_pb2_grpc.StatusServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        # A busy agent may be slow with the handshake; an absent one is found out by the first call.
        if self._connection.socket.exists():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PING_TIMEOUT_S):
                    await self._connection.wait_ready()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._channel.close(None)

    async def status(self) -> AgentStatus | None:
        """None when the agent does not answer. Raises LabError when it answers with an error."""
        try:
            reply = await self._status.Status(agent_pb2.StatusRequest(), timeout=PING_TIMEOUT_S)
        except RpcError as error:
            if error.kind in (Kind.UNAVAILABLE, Kind.DEADLINE, Kind.CANCELLED):
                return None
            raise _lab_error("status", error) from error
        message = reply.message
        for component in reply.components:
            if component.state.lower() not in ("ok", "disabled"):
                message = f"{component.name}: {component.message or component.state}"
                break
        return AgentStatus(state=reply.state, message=message)

    async def add(
        self,
        *,
        name: str,
        namespace: str,
        labels: Sequence[str],
        netns: str,
        annotations: Mapping[str, str],
    ) -> EndpointInfo:
        """Add an endpoint and wait until its policy is in force. Raises LabError."""
        request = agent_pb2.AddEndpointRequest(
            name=name,
            namespace=namespace,
            labels=[_label(text) for text in labels],
            netns_path=netns,
            annotations=annotations,
        )
        try:
            return _endpoint(await self._endpoint.Add(request, timeout=CALL_TIMEOUT_S))
        except RpcError as error:
            raise _lab_error(f"endpoint {namespace}/{name}", error) from error

    async def endpoints(self) -> list[EndpointInfo]:
        """Raises LabError."""
        try:
            reply = await self._endpoint.List(
                agent_pb2.ListEndpointsRequest(), timeout=CALL_TIMEOUT_S
            )
        except RpcError as error:
            raise _lab_error("endpoints", error) from error
        return [_endpoint(item) for item in reply.endpoints]

    async def apply(self, paths: Sequence[Path], *, names: Sequence[str] = ()) -> int:
        """Apply policy files and wait until they are enforced; returns the revision.

        `names`: what the files are called in events, instead of their paths. Raises LabError.
        """
        shown = list(names) or [str(path) for path in paths]
        request = agent_pb2.ApplyRequest(
            documents=[
                agent_pb2.Document(source=name, text=path.read_bytes())
                for name, path in zip(shown, paths, strict=True)
            ],
            wait=True,
        )
        try:
            reply = await self._policy.Apply(request, timeout=CALL_TIMEOUT_S)
        except RpcError as error:
            raise _lab_error("policy", error) from error
        if not reply.realised:
            raise LabError(f"policy revision {reply.revision} was stored but is not enforced")
        return reply.revision

    async def verdicts(self, listening: Callable[[], None]) -> AsyncIterator[Verdict]:
        """Verdicts and drops; nothing is missed after `listening` was called. Ends when the agent
        goes away."""
        stream = self._monitor.Monitor(agent_pb2.MonitorRequest(types=["verdict", "drop"]))
        try:
            # The agent sends its headers once it has subscribed us.
            await stream.initial_metadata()
            listening()
            async for item in stream:
                if item.type in ("verdict", "drop"):
                    yield _verdict(item)
        except RpcError:
            return
        finally:
            stream.cancel()

    async def requests(self, listening: Callable[[], None]) -> AsyncIterator[Request]:
        """What the proxy judges; nothing is missed after `listening` was called. Ends when the
        agent goes away."""
        stream = self._monitor.Monitor(agent_pb2.MonitorRequest(types=["l7"]))
        try:
            await stream.initial_metadata()
            listening()
            async for item in stream:
                if item.type == "l7":
                    yield _request(item)
        except RpcError:
            return
        finally:
            stream.cancel()


async def identity_answers(socket: str) -> bool:
    """True when the identity service answers."""
    async with connect(Path(socket), service="identity") as channel:
        stub = identity_pb2_grpc.StoreServiceStub(channel)
        try:
            await stub.Status(identity_pb2.StatusRequest(), timeout=PING_TIMEOUT_S)
        except RpcError:
            return False
        return True


async def _flows_stats(socket: str) -> flows_pb2.StatsResponse | None:
    """What the flow service says of itself; None when it does not answer."""
    async with connect(Path(socket), service="flows") as channel:
        stub = flows_pb2_grpc.FlowsServiceStub(channel)
        try:
            return await stub.Stats(flows_pb2.StatsRequest(), timeout=PING_TIMEOUT_S)
        except RpcError:
            return None


async def flows_watch(socket: str) -> bool:
    """True when the flow service hears its agent."""
    stats = await _flows_stats(socket)
    return stats is not None and stats.watching


async def flow_followers(socket: str) -> int:
    """How many clients follow flows now; -1 when the service does not answer."""
    stats = await _flows_stats(socket)
    return stats.followers if stats is not None else -1


async def xds_answers(socket: str) -> bool:
    """True when the xDS service answers."""
    async with connect(Path(socket), service="xds") as channel:
        stub = xds_pb2_grpc.XdsStatusServiceStub(channel)
        try:
            await stub.Status(xds_pb2.StatusRequest(), timeout=PING_TIMEOUT_S)
        except RpcError:
            return False
        return True


def _label(text: str) -> common_pb2.Label:
    label = Label.parse(text)
    return common_pb2.Label(source=label.source, key=label.key, value=label.value)


def _endpoint(item: agent_pb2.Endpoint) -> EndpointInfo:
    return EndpointInfo(
        id=item.id,
        name=item.name,
        namespace=item.namespace,
        identity=item.identity,
        ipv4=item.ipv4,
        ipv6=item.ipv6,
        state=item.state,
    )


def _rule(item: agent_pb2.RuleRef) -> RuleInfo:
    return RuleInfo(
        rule_id=item.rule_id,
        policy=item.policy,
        path=item.path,
        file=item.origin.source,
        line=item.origin.line,
    )


def _verdict(item: agent_pb2.MonitorEvent) -> Verdict:
    named = item.rule.rule_id or item.rule.policy
    return Verdict(
        type=item.type,
        verdict=item.verdict,
        direction=item.direction,
        reason=item.reason,
        reason_code=item.reason_code,
        source=item.source.address,
        source_port=item.source.port,
        source_identity=item.source.identity,
        destination=item.destination.address,
        destination_port=item.destination.port,
        destination_identity=item.destination.identity,
        protocol=item.protocol,
        rule=_rule(item.rule) if named else None,
        default_deny=tuple(_rule(r) for r in item.default_deny),
        explanation=item.explanation,
    )


def _request(item: agent_pb2.MonitorEvent) -> Request:
    http = item.l7.http
    return Request(
        verdict=item.verdict,
        direction=item.direction,
        source=item.source.address,
        source_port=item.source.port,
        source_identity=item.source.identity,
        destination=item.destination.address,
        destination_port=item.destination.port,
        destination_identity=item.destination.identity,
        method=http.method,
        url=http.url,
        code=http.code,
        grpc_status=http.grpc_status,
        policy=item.l7.policy,
    )


def _lab_error(what: str, error: RpcError) -> LabError:
    faults = "".join(
        f"\n  {f.origin.source}:{f.origin.line}: {f.path}: {f.message}"
        for f in error.faults
        if f.origin is not None
    )
    return LabError(f"{what}: {error.message}{faults}", cure=error.cure)
