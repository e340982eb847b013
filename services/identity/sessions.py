"""Nodes and their leases.

A node has one lease, found under `session/<node>`, which hangs on the lease itself: both vanish
together. Whoever says it is that node again, after a broken stream, its own restart or ours, gets
the same lease while it lives, so a restart loses nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import structlog

from cilia.errors import DomainError, Kind
from cilia.kv.backend import Backend, KeyValue, LeaseID, LeaseNotFound, Put, Span, Txn, absent
from cilia.telemetry import fields
from services.identity.keys import SESSION_PREFIX, node_of_session, session_key

log = structlog.get_logger()

_ATTEMPTS = 8


class NoSession(DomainError):
    """The node has no lease to keep what it asks for under."""

    default_kind = Kind.PRECONDITION

    def __init__(self, node: str) -> None:
        super().__init__(
            f"node {node} has no session, or its lease ended",
            cure="Open a session (the agent does at start), then repeat the request",
        )


class SessionTakenOver(DomainError):
    """A newer stream speaks for the node."""

    default_kind = Kind.ABORTED

    def __init__(self, node: str) -> None:
        super().__init__(
            f"another session of node {node} has taken over",
            cure="Give every agent a node name of its own if this repeats",
        )


@dataclass(frozen=True, slots=True)
class NodeLease:
    """`is_new`: what hung on an older lease is gone, the node must put it again."""

    lease: LeaseID
    ttl_s: int
    is_new: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionInfo:
    node: str
    lease: LeaseID
    ttl_s: int
    remaining_s: float
    connected: bool


class Connection:
    """One stream that speaks for a node; the newest one counts."""

    __slots__ = ("node",)

    def __init__(self, node: str) -> None:
        self.node = node


class Sessions:
    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._leases: dict[str, LeaseID] = {}
        self._connections: dict[str, Connection] = {}

    @property
    def connected(self) -> int:
        return len(self._connections)

    def connect(self, node: str) -> Connection:
        connection = Connection(node)
        if node in self._connections:
            log.warning("A session was taken over by a newer one.", **{fields.NODE: node})
        self._connections[node] = connection
        return connection

    def disconnect(self, connection: Connection) -> None:
        if self._connections.get(connection.node) is connection:
            del self._connections[connection.node]

    async def renew(self, connection: Connection, ttl_s: int) -> NodeLease:
        """Full time for the node's lease, or a new lease of `ttl_s`.

        A lease that lives keeps the time it was granted with. Raises SessionTakenOver.
        """
        node = connection.node
        if self._connections.get(node) is not connection:
            raise SessionTakenOver(node)
        for _ in range(_ATTEMPTS):
            if (held := await self._find(node)) is not None:
                try:
                    lease = await self._backend.keepalive(held)
                except LeaseNotFound:
                    # The session key goes with the lease; a little later it is not there.
                    self._leases.pop(node, None)
                else:
                    self._leases[node] = held
                    return NodeLease(held, lease.ttl_s, False)
            granted = (await self._backend.grant(ttl_s)).id
            key = session_key(node)
            value = json.dumps({"lease": granted, "ttl_s": ttl_s}).encode()
            result = await self._backend.txn(
                Txn((absent(key),), success=(Put(key, value, granted),))
            )
            if result.succeeded:
                self._leases[node] = granted
                log.info(
                    "A node got a new lease.",
                    **{
                        fields.NODE: node,
                        fields.LEASE_ID: granted,
                        fields.LEASE_TTL_S: ttl_s,
                    },
                )
                return NodeLease(granted, ttl_s, True)
            await self._backend.revoke(granted)
        raise NoSession(node)

    async def lease_of(self, node: str) -> LeaseID:
        """The lease of a node that has a session, also one opened with another instance or
        before our restart. Raises NoSession."""
        if (lease := await self._find(node)) is None:
            raise NoSession(node)
        return lease

    def forget(self, node: str) -> NoSession:
        """For when the store says that the lease is gone; returns the error to raise."""
        self._leases.pop(node, None)
        return NoSession(node)

    async def list(self) -> list[SessionInfo]:
        """By node."""
        kvs = (await self._backend.range(Span.prefix(SESSION_PREFIX))).kvs
        found = []
        for kv in kvs:
            node = node_of_session(kv.key)
            try:
                lease = await self._backend.lease(kv.lease)
            except LeaseNotFound:
                continue
            found.append(
                SessionInfo(
                    node=node,
                    lease=lease.id,
                    ttl_s=lease.ttl_s,
                    remaining_s=lease.remaining_s,
                    connected=node in self._connections,
                )
            )
        return found

    async def _find(self, node: str) -> LeaseID | None:
        if (lease := self._leases.get(node)) is not None:
            return lease
        kv: KeyValue | None = await self._backend.get(session_key(node))
        if kv is None:
            return None
        self._leases[node] = kv.lease
        return kv.lease
