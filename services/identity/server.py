"""The gRPC edge: convert, call the domain, convert. Decides nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass

from protos.identity.v1 import identity_pb2 as pb
from protos.identity.v1 import identity_pb2_grpc as pb_grpc
from services.identity import convert
from services.identity.announcements import Announcements
from services.identity.identities import Identities, Identity
from services.identity.policies import Policies
from services.identity.sessions import NodeLease, Sessions
from services.identity.status import Status
from services.identity.storecopy import StoreCopies
from services.identity.watch import Hub

Context = grpc.aio.ServicerContext[Any, Any]


class IdentityServer(pb_grpc.IdentityServiceServicer):
    def __init__(
        self,
        *,
        sessions: Sessions,
        identities: Identities,
        announcements: Announcements,
        policies: Policies,
        hub: Hub,
        store_id: int,
        node_lease_ttl_s: int,
    ) -> None:
        self._sessions = sessions
        self._identities = identities
        self._announcements = announcements
        self._policies = policies
        self._hub = hub
        self._store_id = store_id
        self._node_lease_ttl_s = node_lease_ttl_s

    async def Session(
        self, request_iterator: AsyncIterator[pb.SessionRequest], context: Context
    ) -> AsyncIterator[pb.SessionResponse]:
        connection = None
        ttl_s = self._node_lease_ttl_s
        try:
            async for request in request_iterator:
                if connection is None:
                    node = convert.node(request.node)
                    ttl_s = convert.lease_ttl_s(request.lease_ttl_s, self._node_lease_ttl_s)
                    connection = self._sessions.connect(node)
                elif request.node and request.node != connection.node:
                    raise convert.refuse("node", "a session is of one node")
                yield self._session_response(await self._sessions.renew(connection, ttl_s))
        finally:
            if connection is not None:
                self._sessions.disconnect(connection)

    def _session_response(self, lease: NodeLease) -> pb.SessionResponse:
        return pb.SessionResponse(
            store_id=self._store_id,
            lease_id=lease.lease,
            lease_ttl_s=lease.ttl_s,
            lease_new=lease.is_new,
        )

    async def Allocate(self, request: pb.AllocateRequest, context: Context) -> pb.AllocateResponse:
        node = convert.node(request.node)
        labels = convert.required_labels(request.labels)
        allocation = await self._identities.allocate(node, labels)
        return pb.AllocateResponse(
            identity=convert.identity_to_proto(Identity(allocation.id, labels)),
            is_new=allocation.is_new,
            revision=allocation.revision,
        )

    async def Release(self, request: pb.ReleaseRequest, context: Context) -> pb.ReleaseResponse:
        node = convert.node(request.node)
        number = convert.identity_number(request.id)
        return pb.ReleaseResponse(revision=await self._identities.release(node, number))

    async def Get(self, request: pb.GetRequest, context: Context) -> pb.GetResponse:
        match request.WhichOneof("by"):
            case "id":
                found, nodes = await self._identities.by_id(convert.identity_number(request.id))
            case "labels":
                labels = convert.required_labels(request.labels.labels, "labels.labels")
                found, nodes = await self._identities.by_labels(labels)
            case _:
                raise convert.refuse("by", "an id or labels are required")
        return pb.GetResponse(identity=convert.identity_to_proto(found), nodes=nodes)

    async def List(self, request: pb.ListRequest, context: Context) -> pb.ListResponse:
        found, revision = await self._identities.list(convert.labels(request.labels))
        return pb.ListResponse(
            identities=[convert.identity_to_proto(identity) for identity in found],
            revision=revision,
        )

    async def Announce(self, request: pb.AnnounceRequest, context: Context) -> pb.AnnounceResponse:
        node, put, withdraw = convert.announcement(request)
        revision = await self._announcements.announce(node, put, withdraw)
        return pb.AnnounceResponse(revision=revision)

    async def ApplyPolicies(
        self, request: pb.ApplyPoliciesRequest, context: Context
    ) -> pb.ApplyPoliciesResponse:
        revision, outcomes = await self._policies.apply(
            convert.policies(request.policies), dry_run=request.dry_run
        )
        return pb.ApplyPoliciesResponse(
            revision=revision, outcomes=[convert.outcome_to_proto(o) for o in outcomes]
        )

    async def DeletePolicies(
        self, request: pb.DeletePoliciesRequest, context: Context
    ) -> pb.DeletePoliciesResponse:
        if request.all:
            if request.names:
                raise convert.refuse("names", "give names or all, not both")
            revision, outcomes = await self._policies.delete_all()
        else:
            revision, outcomes = await self._policies.delete(convert.policy_names(request.names))
        return pb.DeletePoliciesResponse(
            revision=revision, outcomes=[convert.outcome_to_proto(o) for o in outcomes]
        )

    async def Watch(  # type: ignore[override]  # bytes: serialised once, for all who watch
        self, request: pb.WatchRequest, context: Context
    ) -> AsyncIterator[bytes]:
        async for frame in self._hub.stream(
            kinds=convert.kinds(request.kinds),
            from_store=request.store_id,
            resume=convert.resume_revision(request.resume_revision),
        ):
            yield frame


class StoreServer(pb_grpc.StoreServiceServicer):
    def __init__(self, *, status: Status, copies: StoreCopies) -> None:
        self._status = status
        self._copies = copies

    async def Status(self, request: pb.StatusRequest, context: Context) -> pb.StatusResponse:
        return convert.status_to_proto(await self._status.read())

    async def Backup(
        self, request: pb.BackupRequest, context: Context
    ) -> AsyncIterator[pb.BackupChunk]:
        async for data in self._copies.stream():
            yield pb.BackupChunk(data=data)


def register(server: grpc.aio.Server, identity: IdentityServer, store: StoreServer) -> None:
    """As generated code does, but Watch hands its bytes through."""
    services = pb.DESCRIPTOR.services_by_name
    _add(server, services["IdentityService"], identity, ready_made=frozenset({"Watch"}))
    _add(server, services["StoreService"], store, ready_made=frozenset())


def _add(
    server: grpc.aio.Server,
    service: ServiceDescriptor,
    servicer: object,
    *,
    ready_made: frozenset[str],
) -> None:
    makers: dict[tuple[bool, bool], Any] = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    handlers = {
        method.name: makers[method.client_streaming, method.server_streaming](
            getattr(servicer, method.name),
            request_deserializer=GetMessageClass(method.input_type).FromString,
            response_serializer=(
                bytes
                if method.name in ready_made
                else GetMessageClass(method.output_type).SerializeToString
            ),
        )
        for method in service.methods
    }
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service.full_name, handlers),)
    )
    server.add_registered_method_handlers(service.full_name, handlers)  # type: ignore[attr-defined]  # not in the stubs
