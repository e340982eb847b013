"""The identity service as the agent's domain sees it: values in, values out, DomainErrors raised.

`IdentityClient` is what the domain depends on; `GrpcIdentityClient` speaks to the service over its
unix socket. Messages of the watch are turned into values here, so that nothing inside knows protos.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from cilia.errors import Kind, UnavailableError
from cilia.identity import NumericIdentity
from cilia.labels import Labels
from cilia.rpc.channel import connect
from cilia.rpc.convert import labels_from_proto, labels_to_proto
from cilia.rpc.errors import RpcError
from protos.common.v1 import common_pb2
from protos.identity.v1 import identity_pb2, identity_pb2_grpc
from services.agent.clusterwatch import (
    Bookmark,
    ClusterEvents,
    IdentityEntry,
    IpEntry,
    PolicyEntry,
    PolicyName,
    Reset,
    Synced,
    WatchMessage,
    Where,
)


class IdentityUnavailable(UnavailableError):
    default_cure = "Start the identity service; the agent tries again by itself"

    def __init__(self, why: str) -> None:
        super().__init__(f"the identity service is not available: {why}")


@dataclass(frozen=True, slots=True)
class SessionState:
    store_id: int
    lease_id: int
    lease_ttl_s: int
    lease_new: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    kind: str
    namespace: str
    name: str
    change: Literal["unchanged", "created", "configured", "deleted"]


class IdentityClient(Protocol):
    async def allocate(self, labels: Labels) -> NumericIdentity: ...
    async def release(self, identity: NumericIdentity) -> None: ...
    async def announce(self, put: Sequence[IpEntry] = (), withdraw: Sequence[str] = ()) -> None: ...
    async def apply_policies(
        self, policies: Sequence[PolicyEntry], *, dry_run: bool = False
    ) -> tuple[int, tuple[Outcome, ...]]: ...
    async def delete_policies(
        self, names: Sequence[PolicyName], *, everything: bool = False
    ) -> tuple[int, tuple[Outcome, ...]]: ...
    def session(self, *, lease_ttl_s: int) -> AsyncIterator[SessionState]: ...
    def watch(self, *, store_id: int, revision: int) -> AsyncIterator[WatchMessage]: ...
    async def close(self) -> None: ...


_CHANGES: dict[int, Literal["unchanged", "created", "configured", "deleted"]] = {
    identity_pb2.Outcome.UNCHANGED: "unchanged",
    identity_pb2.Outcome.CREATED: "created",
    identity_pb2.Outcome.CONFIGURED: "configured",
    identity_pb2.Outcome.DELETED: "deleted",
}


class GrpcIdentityClient:
    """Speaks to services/identity. One per process; safe to use from many tasks."""

    def __init__(self, socket: Path, *, node: str, timeout_s: float) -> None:
        self._node = node
        self._timeout_s = timeout_s
        self._channel = connect(socket, service="identity", deadline_s=timeout_s)
        self._stub = identity_pb2_grpc.IdentityServiceStub(self._channel)

    async def close(self) -> None:
        await self._channel.close(grace=0.2)

    async def allocate(self, labels: Labels) -> NumericIdentity:
        request = identity_pb2.AllocateRequest(node=self._node, labels=labels_to_proto(labels))
        try:
            reply = await self._stub.Allocate(request, timeout=self._timeout_s)
        except RpcError as error:
            raise _translated(error) from error
        return NumericIdentity(reply.identity.id)

    async def release(self, identity: NumericIdentity) -> None:
        request = identity_pb2.ReleaseRequest(node=self._node, id=identity)
        try:
            await self._stub.Release(request, timeout=self._timeout_s)
        except RpcError as error:
            raise _translated(error) from error

    async def announce(self, put: Sequence[IpEntry] = (), withdraw: Sequence[str] = ()) -> None:
        request = identity_pb2.AnnounceRequest(
            node=self._node,
            put=[
                identity_pb2.IpEntry(
                    prefix=entry.prefix,
                    identity=entry.identity,
                    node=entry.node,
                    host_ip=entry.host_ip,
                    namespace=entry.namespace,
                    workload=entry.workload,
                )
                for entry in put
            ],
            withdraw=withdraw,
        )
        try:
            await self._stub.Announce(request, timeout=self._timeout_s)
        except RpcError as error:
            raise _translated(error) from error

    async def apply_policies(
        self, policies: Sequence[PolicyEntry], *, dry_run: bool = False
    ) -> tuple[int, tuple[Outcome, ...]]:
        request = identity_pb2.ApplyPoliciesRequest(
            policies=[
                identity_pb2.Policy(
                    kind=policy.name.kind,
                    namespace=policy.name.namespace,
                    name=policy.name.name,
                    document=policy.document,
                    origin=_origin(policy.origin),
                    rule_origins=[
                        identity_pb2.RuleOrigin(path=path, origin=_origin(origin))
                        for path, origin in policy.rule_origins
                    ],
                )
                for policy in policies
            ],
            dry_run=dry_run,
        )
        try:
            reply = await self._stub.ApplyPolicies(request, timeout=self._timeout_s)
        except RpcError as error:
            raise _translated(error) from error
        return reply.revision, _outcomes(reply.outcomes)

    async def delete_policies(
        self, names: Sequence[PolicyName], *, everything: bool = False
    ) -> tuple[int, tuple[Outcome, ...]]:
        request = identity_pb2.DeletePoliciesRequest(
            names=[
                identity_pb2.PolicyName(kind=n.kind, namespace=n.namespace, name=n.name)
                for n in names
            ],
            all=everything,
        )
        try:
            reply = await self._stub.DeletePolicies(request, timeout=self._timeout_s)
        except RpcError as error:
            raise _translated(error) from error
        return reply.revision, _outcomes(reply.outcomes)

    async def session(self, *, lease_ttl_s: int) -> AsyncIterator[SessionState]:
        """Opens the node's session and keeps its lease alive; yields each answer.

        Ends by raising IdentityUnavailable when the service goes away.
        """
        interval_s = lease_ttl_s / 3

        async def requests() -> AsyncIterator[identity_pb2.SessionRequest]:
            yield identity_pb2.SessionRequest(node=self._node, lease_ttl_s=lease_ttl_s)
            while True:
                await asyncio.sleep(min(interval_s, 60.0))
                yield identity_pb2.SessionRequest()

        call = self._stub.Session(requests())
        try:
            async for reply in call:
                if reply.lease_ttl_s:
                    interval_s = reply.lease_ttl_s / 3
                yield SessionState(
                    reply.store_id, reply.lease_id, reply.lease_ttl_s, reply.lease_new
                )
        except RpcError as error:
            raise _translated(error) from error
        finally:
            call.cancel()
        raise IdentityUnavailable("it ended the session")

    async def watch(self, *, store_id: int, revision: int) -> AsyncIterator[WatchMessage]:
        """Identities, addresses and policies: a snapshot, SYNCED, then changes.

        Ends by raising IdentityUnavailable.
        """
        request = identity_pb2.WatchRequest(
            kinds=[
                identity_pb2.KIND_IDENTITY,
                identity_pb2.KIND_IP,
                identity_pb2.KIND_POLICY,
            ],
            store_id=store_id,
            resume_revision=revision,
        )
        call = self._stub.Watch(request)
        try:
            async for message in call:
                yield _watch_message(message)
        except RpcError as error:
            raise _translated(error) from error
        finally:
            call.cancel()
        raise IdentityUnavailable("it ended the watch")


def _origin(origin: Where) -> common_pb2.Origin:
    source, line, column = origin
    return common_pb2.Origin(source=source, line=line, column=column)


def _outcomes(messages: Iterable[identity_pb2.Outcome]) -> tuple[Outcome, ...]:
    return tuple(
        Outcome(message.kind, message.namespace, message.name, _CHANGES[message.change])
        for message in messages
    )


def _watch_message(message: identity_pb2.WatchResponse) -> WatchMessage:
    body = message.WhichOneof("body")
    match body:
        case "synced":
            return Synced(message.store_id, message.revision)
        case "bookmark":
            return Bookmark(message.store_id, message.revision)
        case "reset":
            return Reset(message.store_id, message.revision, message.reset.reason)
        case "batch":
            events = ClusterEvents(message.store_id, message.revision, message.batch.more)
            for event in message.batch.events:
                gone = event.type == identity_pb2.Event.DELETE
                match event.WhichOneof("value"):
                    case "identity":
                        number = NumericIdentity(event.identity.id)
                        events.identities[number] = (
                            None
                            if gone
                            else IdentityEntry(number, labels_from_proto(event.identity.labels))
                        )
                    case "ip":
                        ip = event.ip
                        events.ips[ip.prefix] = (
                            None
                            if gone
                            else IpEntry(
                                prefix=ip.prefix,
                                identity=NumericIdentity(ip.identity),
                                node=ip.node,
                                host_ip=ip.host_ip,
                                namespace=ip.namespace,
                                workload=ip.workload,
                            )
                        )
                    case "policy":
                        policy = event.policy
                        name = PolicyName(policy.kind, policy.namespace, policy.name)
                        events.policies[name] = (
                            None
                            if gone
                            else PolicyEntry(
                                name,
                                policy.document,
                                (policy.origin.source, policy.origin.line, policy.origin.column),
                                tuple(
                                    (o.path, (o.origin.source, o.origin.line, o.origin.column))
                                    for o in policy.rule_origins
                                ),
                                policy.revision,
                            )
                        )
                    case _:
                        continue  # a kind that a later service sends
            return events
        case _:
            return Bookmark(message.store_id, message.revision)


def _translated(error: RpcError) -> Exception:
    """The service's absence as IdentityUnavailable; its refusals stay what they are."""
    # Our session begins a moment after we do, and again after the service was away.
    no_session = error.reason == "NoSession"
    if no_session or error.kind in (Kind.UNAVAILABLE, Kind.DEADLINE):
        return IdentityUnavailable(error.message)
    return error
