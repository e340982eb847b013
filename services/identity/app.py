"""The service, wired.

               unix socket
                    │
                 server ──────────── convert (checks all that comes in)
Session      Allocate, Get, …   Announce   Apply/DeletePolicies    Watch      Status, Backup
   │                │              │               │                 │              │
Sessions ◀──── Identities    Announcements     Policies             Hub       Status, StoreCopies
   │                │              │               │                 │
   │            Allocator          │               │               View ◀── one watch ──┐
   │                │              │               │                                    │
   └────────────────┴──────┬───────┴───────────────┘                                    │
                           ▼                                                            │
               EmbeddedBackend (in memory, store.sqlite) ───────────────────────────────┘
                           ▲
                       Collector  every gc_interval_s: sweeps identities without references
"""

from __future__ import annotations

import structlog

from cilia.controller import Controller, ControllerSet
from cilia.kv.allocator import Allocator, AllocatorStats, Collector
from cilia.kv.backend import Retention
from cilia.kv.embedded import EmbeddedBackend
from cilia.lifecycle import Lifecycle, Serving
from cilia.rpc.server import Server
from cilia.telemetry import fields
from cilia.telemetry.metrics import Exposition, Registration, parse_address
from services.identity import convert, metrics
from services.identity.announcements import Announcements
from services.identity.config import IdentityConfig
from services.identity.identities import Identities
from services.identity.policies import Policies
from services.identity.server import IdentityServer, StoreServer, register
from services.identity.sessions import Sessions
from services.identity.status import Status
from services.identity.storecopy import StoreCopies
from services.identity.view import View
from services.identity.watch import Hub, Message

log = structlog.get_logger()


async def build(config: IdentityConfig, lifecycle: Lifecycle) -> None:
    """Makes the parts and adds them, in the order in which they start."""
    backend = await EmbeddedBackend.open(
        config.store_path,
        retention=Retention(revisions=config.history_revisions, age_s=config.history_age_s),
    )
    lifecycle.add("store", backend)
    log.info(
        "The store was opened.",
        **{fields.PATH: str(config.store_path), fields.REVISION: backend.revision},
    )

    stats = AllocatorStats()
    view = View(graves=config.watch_graves)
    sessions = Sessions(backend)
    identities = Identities(
        backend=backend,
        allocator=Allocator(backend=backend, taken=view, stats=stats),
        sessions=sessions,
    )
    announcements = Announcements(backend=backend, sessions=sessions)
    policies = Policies(backend=backend)
    copies = StoreCopies(backend=backend, directory=config.store_path.parent)
    copies.sweep()

    def encode(message: Message) -> bytes:
        return convert.message_to_proto(message, backend.store_id).SerializeToString()

    hub = Hub(
        backend=backend,
        view=view,
        encode=encode,
        bookmark_s=config.bookmark_s,
        max_watches=config.max_watches,
    )
    lifecycle.add_task("hub", hub.run)

    async def collect() -> None:
        if swept := await collector.collect():
            log.info("Identities without references were deleted.", **{fields.COUNT: swept})

    collector = Collector(backend=backend, quarantine_s=config.quarantine_s, stats=stats)
    controllers = ControllerSet()
    controllers.add(
        Controller("collect-identities", collect, resync_s=config.gc_interval_s, retry_s=5.0)
    )
    lifecycle.add("controllers", controllers)

    identity_server = IdentityServer(
        sessions=sessions,
        identities=identities,
        announcements=announcements,
        policies=policies,
        hub=hub,
        store_id=backend.store_id,
        node_lease_ttl_s=config.node_lease_ttl_s,
    )
    store_server = StoreServer(
        status=Status(backend=backend, sessions=sessions, view=view), copies=copies
    )
    lifecycle.add(
        "metrics",
        Registration(
            metrics.Collector(backend=backend, stats=stats, sessions=sessions, view=view, hub=hub)
        ),
    )
    if config.metrics_address:
        lifecycle.add("exposition", Exposition(parse_address(config.metrics_address)))
    server = Server(
        socket=config.socket_path,
        services=[lambda target: register(target, identity_server, store_server)],
        group=config.group,
    )
    lifecycle.add("server", server)
    lifecycle.add("serving", _Serving(server, hub))
    lifecycle.on_stopping(hub.stop)


class _Serving(Serving):
    """And once the view is current."""

    def __init__(self, server: Server, hub: Hub) -> None:
        super().__init__(server)
        self._hub = hub

    async def start(self) -> None:
        await self._hub.wait_ready()
        await super().start()
