"""The service, wired.

     agent (MonitorService.Events)                     hubble, cilia flows, relays, UIs
       │ batches of raw events, meanings, losses          │ unix socket, TCP with mTLS
     Ingest ─────────────▶ Notes ──────────────────┐   GrpcServer (HTTP/2)
       │                                           ▼      │
       ▼                                       FlowServer ┤ Health, reflection
     Store ──▶ Ring (memory) ──▶ Cursor ──▶ Rows ──▶ Encoder
       │ │        │ spill            ▲
       │ │        ▼                  │                 FlowMetrics (a follower)
       │ │     Segments (Parquet) ───┘
       │ └──▶ Ledger (what is missing)         Exports (followers): JSON lines, OTLP
       └──▶ LiveDimensions (pairs, metas, L7) ◀── World (who is who now)

What a server, an exporter or a metric needs of the store:

    cursor = store.query(FlowQuery(...))          see query.py: read(), state, wait_for_rows
    Encoder(FieldMask(paths)).encode(rows)        framed GetFlowsResponse messages, in one piece
    convert.flows_request(message)                GetFlowsRequest -> (FlowQuery, FieldMask), strict
    convert.loss_to_response(loss, node_name)     a gap as clients know it

With --relay none of this runs: `relay/` asks the nodes and merges what they answer.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import structlog

from cilia import statefile
from cilia.controller import Controller, ControllerSet
from cilia.lifecycle import Lifecycle, Serving
from cilia.telemetry import fields
from cilia.telemetry.metrics import REGISTRY, Exposition, parse_address
from services.flows import convert
from services.flows.clients import GrpcAgentClient
from services.flows.config import FlowsConfig
from services.flows.encoder import Encoder
from services.flows.filterspec import FlowQuery
from services.flows.history import History
from services.flows.http2 import GrpcServer
from services.flows.http2.standard import Health, reflection_handlers
from services.flows.ingest import Ingest
from services.flows.ledger import Ledger
from services.flows.metrics import FlowMetrics, parse_spec
from services.flows.notes import Notes
from services.flows.query import State
from services.flows.relay.peers import Peers
from services.flows.relay.server import RelayObserver
from services.flows.rows import Rows
from services.flows.segments import Segments
from services.flows.server import FLOWS, HUBBLE_HEALTH, OBSERVER, PEER, About, FlowServer
from services.flows.store import Store
from services.flows.uuids import new_run
from services.flows.world import World

if TYPE_CHECKING:
    from services.flows.exporters.manager import Exports

log = structlog.get_logger()


async def build(config: FlowsConfig, lifecycle: Lifecycle) -> None:
    """Makes the parts and adds them, in the order in which they start."""
    if config.metrics_address:
        lifecycle.add("exposition", Exposition(parse_address(config.metrics_address)))
    if config.relay:
        _build_relay(config, lifecycle)
    else:
        _build_node(config, lifecycle)


def _build_node(config: FlowsConfig, lifecycle: Lifecycle) -> None:
    run = new_run()
    segments: Segments | None = None
    ledger = Ledger(run=run)
    if config.history_mb:
        lifecycle.add("lock", statefile.DirectoryLock(config.flows_dir, owner="flows"))
        segments = Segments(
            config.flows_dir / "segments",
            max_bytes=config.history_mb << 20,
            max_age_s=config.history_age_s,
        )
        ledger = Ledger(config.flows_dir / "ledger.jsonl", run=run)
    store = Store(
        capacity=config.ring_rows,
        world=World(node=config.node),
        segments=segments,
        ledger=ledger,
        run=run,
        cel=convert.compile_cel,
        encode_flows=Encoder().flows,
    )
    notes = Notes()
    ingest = Ingest(GrpcAgentClient(config.agent_socket_path), store, notes)
    controllers = ControllerSet()
    controllers.add(Controller("agent-events", ingest.follow, retry_s=0.2, retry_max_s=2.0))

    async def tick() -> None:
        store.tick(time.monotonic())
        store.note_namespaces(time.monotonic())
        ingest.tick()

    controllers.add(Controller("tick", tick, resync_s=2.0))
    if segments is not None:
        history = History(
            store,
            segments,
            directory=config.flows_dir,
            segment_rows=config.segment_rows,
            segment_age_s=config.segment_age_s,
        )
        # Stops after all that fills the store: what is not on disk then is written.
        lifecycle.add("history", history)
        controllers.add(Controller("spill", history.spill_due, retry_s=1.0, resync_s=2.0))

    metrics: FlowMetrics | None = None
    if config.metrics:
        metrics = FlowMetrics(
            [parse_spec(text) for text in config.metrics.split()], lost=lambda: ledger.totals
        )
        REGISTRY.register(metrics)
        lifecycle.add_task("metrics", partial(_count, store, metrics))
    exports: Exports | None = None
    if config.exports is not None:
        # OpenTelemetry's SDK takes a second and 30 MB: only who exports pays.
        from services.flows.exporters.manager import Exports

        exports = Exports(store, config.exports, version=_version(), metrics=metrics)
        lifecycle.add("exports", exports)
    server = FlowServer(
        store,
        notes,
        About(
            version=_version(),
            node_name=lambda: store.world.node_name,
            address=config.advertise or (config.listen.split(",")[0] if config.listen else ""),
            disk_bytes=config.history_mb << 20,
            watching=lambda: ingest.problem,
            degraded=lambda: exports.problem if exports is not None else "",
        ),
    )
    services = (OBSERVER, PEER, FLOWS)
    health = Health((*services, HUBBLE_HEALTH))
    grpc = GrpcServer(
        {**server.handlers(), **health.handlers(), **reflection_handlers(services)},
        socket=config.socket_path,
        listen=config.addresses,
        tls=config.tls(),
        group=config.group,
    )
    server.clients = lambda: grpc.connections
    lifecycle.add("controllers", controllers)
    lifecycle.add("server", grpc)
    lifecycle.add("serving", Serving(health))


def _build_relay(config: FlowsConfig, lifecycle: Lifecycle) -> None:
    peers = Peers(file=config.peers_file, service=config.peer_service, tls=config.client_tls())
    lifecycle.add("peers", peers)
    observer = RelayObserver(peers, version=_version())
    health = Health((OBSERVER, HUBBLE_HEALTH))
    lifecycle.add(
        "server",
        GrpcServer(
            {**observer.handlers(), **health.handlers(), **reflection_handlers((OBSERVER,))},
            socket=config.socket_path,
            listen=config.addresses,
            tls=config.tls(),
            group=config.group,
        ),
    )
    lifecycle.add("serving", Serving(health))


async def _count(store: Store, metrics: FlowMetrics) -> None:
    """A follower of everything, which counts."""
    cursor = store.query(FlowQuery(follow=True))
    while True:
        for item in cursor.read():
            if isinstance(item, Rows):
                metrics.count(item)
        if cursor.state is State.WAITING:
            await store.wait_for_rows(cursor)
        await asyncio.sleep(0)


def _version() -> str:
    try:
        return f"cilia v{version('cilia')}"
    except PackageNotFoundError:
        log.warning("The version is not known.", **{fields.REASON: "not installed"})
        return "cilia v0.0.0"
