"""The node's standing with the identity service: one session, its lease, and what hangs on it.

    session  --lease_new-->  references and announcements are put again
    watch    --messages--->  ClusterView  --changes-->  Regeneration

Both run in controllers: when the service goes away they say so, keep what is known in force, and
come back by themselves. Nothing is flushed because the service is away.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cilia.identity import EndpointID, NumericIdentity
from services.agent.clients import IdentityClient, IdentityUnavailable, SessionState
from services.agent.clusterwatch import Changes, ClusterView, IpEntry
from services.agent.endpoint import CLOSING, Endpoint
from services.agent.endpointtable import Endpoints
from services.agent.ipam import host_prefix


class Session:
    """Keeps the lease. `live` is true between the service's first answer and its going away."""

    def __init__(
        self, client: IdentityClient, *, lease_ttl_s: int, on_new_lease: Callable[[], None]
    ) -> None:
        self._client = client
        self._lease_ttl_s = lease_ttl_s
        self._on_new_lease = on_new_lease
        self.state: SessionState | None = None
        self._last_lease = 0

    @property
    def live(self) -> bool:
        return self.state is not None

    async def keep(self) -> None:
        """Runs until the service goes away; raises IdentityUnavailable then."""
        try:
            async for state in self._client.session(lease_ttl_s=self._lease_ttl_s):
                fresh = self.state is None
                self.state = state
                if fresh or state.lease_new or state.lease_id != self._last_lease:
                    self._last_lease = state.lease_id
                    self._on_new_lease()
        finally:
            self.state = None


class Watch:
    """Feeds the view; tells who must hear of changes."""

    def __init__(
        self, client: IdentityClient, view: ClusterView, on_change: Callable[[Changes], None]
    ) -> None:
        self._client = client
        self._view = view
        self._on_change = on_change
        self.connected = False

    async def follow(self) -> None:
        """Runs until the service goes away; raises IdentityUnavailable then."""
        store_id, revision = self._view.resume_point()
        self._view.begin()
        try:
            async for message in self._client.watch(store_id=store_id, revision=revision):
                self.connected = True
                changes = self._view.feed(message)
                if changes:
                    self._on_change(changes)
        finally:
            self.connected = False


class Announcer:
    """ip -> identity of our endpoints, published under the node's lease: only what differs."""

    def __init__(
        self, client: IdentityClient, endpoints: Endpoints, session: Session, *, node: str
    ) -> None:
        self._client = client
        self._endpoints = endpoints
        self._session = session
        self._node = node
        self._announced: dict[str, NumericIdentity] = {}
        self._wanted: dict[str, tuple[NumericIdentity, Endpoint]] = {}  # by prefix
        self._prefixes: dict[EndpointID, tuple[str, ...]] = {}  # that are in it
        self._due: set[str] = set()  # which may differ
        self._seen: int | None = None  # the revision of the endpoints that is in all of them
        self._lock = asyncio.Lock()
        self.host_ip = ""
        self.error = ""

    def forget(self) -> None:
        """The lease is new: nothing of ours is published."""
        self._announced.clear()
        self._due.update(self._wanted)

    async def push(self) -> None:
        """Make the service's picture of us current. Raises IdentityUnavailable."""
        async with self._lock:
            self._look()
            put = [
                IpEntry(
                    prefix=prefix,
                    identity=identity,
                    node=self._node,
                    host_ip=self.host_ip,
                    namespace=endpoint.namespace,
                    workload=endpoint.name,
                )
                for prefix in sorted(self._due & self._wanted.keys())
                for identity, endpoint in (self._wanted[prefix],)
                if self._announced.get(prefix) != identity
            ]
            gone = sorted((self._due & self._announced.keys()) - self._wanted.keys())
            told, self._due = self._due, set()
            try:
                if put or gone:
                    await self._client.announce(put, gone)
            except BaseException:
                self._due |= told
                raise
            self._announced.update((entry.prefix, entry.identity) for entry in put)
            for prefix in gone:
                self._announced.pop(prefix, None)

    def _look(self) -> None:
        """Take up what changed among the endpoints."""
        batch = self._endpoints.table.changes(self._seen)
        self._seen = batch.revision
        changed = {change.key: change.row for change in batch.changes}
        if batch.reset:
            changed.update((number, None) for number in self._prefixes if number not in changed)
        for number in changed:
            for prefix in self._prefixes.pop(number, ()):
                if (mine := self._wanted.get(prefix)) and mine[1].id == number:
                    del self._wanted[prefix]
                self._due.add(prefix)
        for number, endpoint in changed.items():
            if endpoint is None or endpoint.state in CLOSING:
                continue
            # One that drops everything still is announced with the identity it is going to have.
            identity = endpoint.realised_identity or endpoint.identity
            if identity is None:
                continue
            prefixes = tuple(host_prefix(address) for address in endpoint.addresses)
            self._prefixes[number] = prefixes
            self._due.update(prefixes)
            for prefix in prefixes:
                self._wanted[prefix] = (identity, endpoint)

    async def try_push(self) -> bool:
        """As push, but the service's absence, or slowness, is no reason to hold a flush."""
        if not self._session.live:
            return False
        try:
            async with asyncio.timeout(1.0):
                await self.push()
        except (IdentityUnavailable, TimeoutError):
            return False
        return True
