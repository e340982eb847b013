"""The agent, wired by hand. Sources fill tables, one calculation, reconcilers write the kernel.

  identity service            gRPC: cli, CNI          netlink           pinned maps, records
        │                          │                     │                     │ (once, at start)
  session, watch              EndpointLives          HostNetwork            restore
        │                     │    │    │                │ │                   │
   ClusterView ◀─ saved ──┐   │  Ipam  IdentityAllocator │ └─▶ devices ──▶ DeviceReconciler
   identities, ips,       │   │         (known numbers)  │                       │
   policies               │   ▼                          │ host addresses        │
        │           Endpoints (states, logs, records) ◀──┼───────────────────────┘
        │                 │        │                     │
        ▼                 ▼        └─▶ Wiring ─▶ links ──┴▶ LinkReconciler, AttachReconciler
   ┌─ Regeneration.flush ─────────────────────────────────────────────────────────────┐
   │  Calculation (PolicyEngine, CidrIdentities, Slots)            pure                │
   │    ─▶ policymap ─▶ ipcache ─▶ announce ─▶ endpointmap ─▶ epoch ─▶ freed slots     │
   └──────────────────────────────────────────────────────────────────────────────────┘
        │        │ what needs a proxy               ▲ ports that enforce it
        │        └─▶ Proxy (Redirects) ─▶ xds ──────┘   nft table, rules, cilia_proxy_pair
        │ what the programs write
   cilia_events ─▶ Monitor ─▶ subscribers          Conntrack: GC, purge before an address is reused

Start: lock, programs and maps, host devices, restore, sources, reconcilers, server, serving.
Stop is the reverse, and leaves everything that is pinned: traffic goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import structlog

from cilia import statefile
from cilia.bpf import probe
from cilia.bpf.attach import has_tcx
from cilia.controller import Controller, ControllerSet
from cilia.errors import DomainError, Kind
from cilia.identity import EndpointID, is_cluster
from cilia.labels import LabelFilter
from cilia.lifecycle import Lifecycle, Serving
from cilia.rpc.server import Server
from cilia.table import Table, TableDump
from cilia.telemetry import fields
from cilia.telemetry.metrics import Exposition, parse_address
from services.agent import metrics, server
from services.agent.calculation import Calculation
from services.agent.clients import GrpcIdentityClient
from services.agent.clusterwatch import Changes, ClusterView
from services.agent.config import AgentConfig
from services.agent.confirmation import Confirmation
from services.agent.conntrack import Conntrack
from services.agent.datapath import Datapath
from services.agent.dumps import Dumps
from services.agent.endpoint import CLOSING, EndpointState
from services.agent.endpointtable import Endpoints
from services.agent.eventmeta import EventMeaning
from services.agent.firewall import Firewall
from services.agent.host import HostNetwork
from services.agent.hostpolicy import (
    HostConnections,
    control_ports,
    control_ports_row,
    node_labels,
)
from services.agent.identityalloc import CidrIdentities, IdentityAllocator
from services.agent.ipam import Ipam
from services.agent.kernelaudit import BUDGET_S, KernelAudit
from services.agent.l7 import L7Log
from services.agent.lives import EndpointLives
from services.agent.monitor import Decoder, Monitor
from services.agent.notifications import Notifier
from services.agent.policydocs import PolicyDocuments
from services.agent.policystate import PolicyStateFile
from services.agent.proxy import ENFORCED, Proxy
from services.agent.reconcilers.attach import AttachReconciler
from services.agent.reconcilers.device import DeviceReconciler
from services.agent.reconcilers.link import LinkReconciler
from services.agent.record import EndpointRecords
from services.agent.regeneration import Regeneration
from services.agent.restore import Restored, restore
from services.agent.rows import AttachRow, LinkRow
from services.agent.session import Announcer, Session, Watch
from services.agent.status import Status
from services.agent.wiring import Wiring
from services.agent.xdsclient import XdsClient

log = structlog.get_logger()


class KernelTooOld(DomainError):
    """A feature that nothing can replace is missing."""

    default_kind = Kind.PRECONDITION


class NotPrivileged(DomainError):
    """The agent was started by somebody who may not load programs."""

    default_kind = Kind.DENIED
    default_cure = "Start it as root."


async def build(config: AgentConfig, lifecycle: Lifecycle) -> None:
    """Makes the parts and adds them, in the order in which they start."""
    problems: list[str] = []

    # ---- what is owned: directory, kernel, tables
    lifecycle.add("lock", statefile.DirectoryLock(config.agent_dir, owner=f"agent {config.node}"))
    datapath = Datapath(
        config,
        control_ports=control_ports_row(
            control_ports(config.control_ports, config.metrics_address)
        ),
    )
    endpoints = Endpoints()
    view = ClusterView()
    ipam = Ipam(config.pool4, config.pool6)
    records = EndpointRecords(config.agent_dir / "endpoints")
    saved = PolicyStateFile(config.agent_dir)
    attachments: Table[str, AttachRow] = Table("attachments", key=lambda row: row.hook)
    links: Table[EndpointID, LinkRow] = Table("links", key=lambda row: row.id)
    controllers = ControllerSet()
    notifier = Notifier()
    monitor = Monitor(datapath)
    notifier.listen(monitor.notify)
    conntrack = Conntrack(datapath)

    # ---- the identity service
    client = GrpcIdentityClient(
        config.identity_socket_path, node=config.node, timeout_s=config.identity_timeout_s
    )
    allocator = IdentityAllocator(client)

    def on_new_lease() -> None:
        allocator.lease_lost()
        announcer.forget()
        controllers.trigger("identity-references")
        controllers.trigger("announcements")
        for endpoint in endpoints:
            if endpoint.identity is None:
                controllers.trigger(f"resolve-identity-{endpoint.id}")

    session = Session(client, lease_ttl_s=config.lease_ttl_s, on_new_lease=on_new_lease)
    announcer = Announcer(client, endpoints, session, node=config.node)

    # ---- the proxy of L7 rules
    def policy_text(rule_id: int) -> str:
        try:
            return str(calculation.engine.rule(rule_id))
        except KeyError:
            return ""  # the implicit allow of the local host, or of a document that is gone

    routers = (config.pool4.network_address + 1, config.pool6.network_address + 1)
    xds = XdsClient(config.xds_socket_path, node=config.node, addresses=[str(a) for a in routers])
    proxy = Proxy(
        datapath,
        xds,
        directory=config.agent_dir,
        ports=range(config.proxy_port_min, config.proxy_port_max + 1),
        release_delay_s=config.proxy_release_delay_s,
        policy_text=policy_text,
    )

    # ---- the calculation and what it feeds
    cidrs = CidrIdentities(
        config.agent_dir / "cidr-identities.json", release_delay_s=config.cidr_release_delay_s
    )
    calculation = Calculation(
        mode=config.enforcement,
        audit=config.policy_audit,
        allow_localhost=config.allow_localhost == "always",
        cluster=config.cluster,
        slots=config.map_sizes.policy_slots,
        cidrs=cidrs,
        router=routers,
        ports=proxy.redirects.port,
        enforcers=ENFORCED,
    )

    async def announce() -> None:
        await announcer.try_push()

    regeneration = Regeneration(
        node=config.node,
        view=view,
        endpoints=endpoints,
        calculation=calculation,
        datapath=datapath,
        notifier=notifier,
        saved=saved,
        announce=announce,
        node_labels=node_labels(config.node_labels),
        before_node=HostConnections(datapath, config.conntrack).enter,
        settle_proxies=proxy.settle,
        policy_limit=config.map_sizes.policy,
    )
    confirmation = Confirmation(config.agent_dir / "policy-on-trial.json", client=client, view=view)
    regenerate = Controller("regenerate", regeneration.flush, retry_s=0.5, retry_max_s=10.0)
    regeneration.trigger_by(regenerate.trigger)

    def on_proxies_moved(digests: frozenset[str]) -> None:
        calculation.proxies_changed(digests)
        regenerate.trigger()

    proxy.on_moved(on_proxies_moved)
    proxy.in_force_by(regeneration.in_force)
    proxy.trigger_by(lambda: controllers.trigger("proxy-routing"))
    proxy.on_nftables(lambda: controllers.trigger("host-firewall"))
    policy_known = asyncio.Condition()
    policy_changed = asyncio.Event()

    def on_cluster_change(changes: Changes) -> None:
        for number in changes.identities:
            entry = view.identities.get(number)
            if entry is not None and is_cluster(number):
                allocator.learn(entry.labels, number)
        if regeneration.changed(changes):
            regenerate.trigger()
        if changes.identities:
            controllers.trigger("save-identities")
        policy_changed.set()

    watch = Watch(client, view, on_cluster_change)

    # ---- the node's network
    def on_addresses(addresses: frozenset[IPv4Address | IPv6Address]) -> None:
        announcer.host_ip = host.node_ip
        if regeneration.set_host_addresses(addresses):
            regenerate.trigger()

    def on_gone(name: str) -> None:
        # Most go because we deleted them: those are no reason to look at all.
        if any(e.wired and e.state not in CLOSING for e in endpoints.named_interface(name)):
            controllers.trigger("vanished-endpoints")

    host = HostNetwork(
        config,
        datapath,
        ipam,
        attachments=attachments,
        on_addresses=on_addresses,
        on_gone=on_gone,
    )
    device_reconciler = DeviceReconciler(host.devices, datapath)
    attach_mode = config.attach if config.attach != "auto" else "tcx" if has_tcx() else "clsact"
    attach_reconciler = AttachReconciler(attachments.reader(), datapath, mode=attach_mode)
    link_reconciler = LinkReconciler(
        links.reader(),
        datapath,
        router4=config.pool4.network_address + 1,
        router6=config.pool6.network_address + 1,
    )
    wiring = Wiring(
        datapath,
        host,
        attachments=attachments,
        attach=attach_reconciler,
        links=links,
        link=link_reconciler,
        quick=config.attach == "auto" and attach_mode == "tcx",
    )

    firewall = Firewall(lambda: [device.name for device in host.devices])

    # ---- endpoints
    lives = EndpointLives(
        endpoints=endpoints,
        ipam=ipam,
        records=records,
        allocator=allocator,
        regeneration=regeneration,
        regenerate=regenerate,
        controllers=controllers,
        wiring=wiring,
        datapath=datapath,
        conntrack=conntrack,
        announcer=announcer,
        notifier=notifier,
        label_filter=LabelFilter.parse(" ".join(config.label_rules)),
        cluster=config.cluster,
        add_timeout_s=config.endpoint_add_timeout_s,
        identity_retry_s=config.identity_retry_s,
    )

    async def take_over() -> None:
        """Everything an earlier run left, before any source speaks."""

        def load() -> None:
            cidrs_path = config.agent_dir / "cidr-identities.json"
            try:
                cidrs.load()
            except statefile.StateFileDamaged as error:
                kept = statefile.set_aside(cidrs_path)
                problems.append(f"{error.message}; it was kept as {kept}")
            try:
                confirmation.load()
            except statefile.StateFileDamaged as error:
                kept = statefile.set_aside(confirmation.path)
                problems.append(f"{error.message}; it was kept as {kept}")
            saved.load_into(view)
            problems.extend(proxy.load())

        await datapath.run(load)
        problems.extend(saved.damaged)
        for entry in view.identities.values():
            allocator.learn(entry.labels, entry.id)
        found: Restored = await restore(
            records=records,
            endpoints=endpoints,
            ipam=ipam,
            allocator=allocator,
            calculation=calculation,
            regeneration=regeneration,
            wiring=wiring,
            conntrack=conntrack,
            datapath=datapath,
        )
        problems.extend(found.problems)
        await attach_reconciler.flush()  # running programs are replaced in place
        await device_reconciler.flush()
        for endpoint in endpoints:
            wanted = lives.identity_labels(endpoint.namespace, endpoint.labels)
            if endpoint.identity is None or wanted != endpoint.identity_labels:
                lives.retry_identity(endpoint.id)

    l7_log = L7Log(
        xds,
        monitor,
        conntrack=conntrack,
        endpoints=endpoints,
        calculation=calculation,
        ipcache=regeneration.ipcache_rows,
        redirects=proxy.redirects,
        policy_text=policy_text,
    )

    # ---- work that may fail, by name
    async def save_identities() -> None:
        known = {
            number: entry.labels for number, entry in view.identities.items() if is_cluster(number)
        }
        known.update((number, labels) for labels, number in allocator.held.items())
        await datapath.run(saved.save_identities, known)

    async def settle_references() -> None:
        if session.live:
            for labels, _, number in await allocator.settle():
                lives.identity_moved(labels, number)

    async def push_announcements() -> None:
        if session.live:
            await announcer.push()

    async def keep_wires() -> None:
        await wiring.flush()
        await device_reconciler.flush()

    kernel_audit = KernelAudit(
        regeneration=regeneration,
        calculation=calculation,
        datapath=datapath,
        monitor=monitor,
        interval_s=config.resync_interval_s,
    )

    async def resync() -> None:
        attach_reconciler.trigger_resync()
        device_reconciler.trigger_resync()
        await attach_reconciler.flush()
        await device_reconciler.flush()
        await kernel_audit.compare(budget_s=BUDGET_S)
        regeneration.look_at_all()
        regenerate.trigger()

    async def look_at_firewall() -> None:
        await firewall.look()
        proxy.watch(not firewall.drops_to_proxy)

    async def refresh_host() -> None:
        await host.refresh()
        await device_reconciler.flush()
        await attach_reconciler.flush()

    async def count() -> None:
        _count(endpoints, view, ipam)

    every = config.resync_interval_s
    for controller in (
        regenerate,
        Controller("identity-session", session.keep, retry_s=0.5, retry_max_s=2.0, resync_s=0.1),
        Controller("identity-watch", watch.follow, retry_s=0.5, retry_max_s=2.0, resync_s=0.1),
        Controller("identity-references", settle_references, retry_s=1.0, resync_s=300.0),
        Controller("announcements", push_announcements, retry_s=1.0, resync_s=300.0),
        Controller("save-identities", save_identities, min_interval_s=5.0),
        Controller("proxy-sync", proxy.sync, retry_s=0.2, retry_max_s=1.0, resync_s=0.1),
        Controller("proxy-log", l7_log.follow, retry_s=0.2, retry_max_s=1.0, resync_s=0.1),
        Controller("proxy-routing", proxy.keep_routing, min_interval_s=0.2, resync_s=10.0),
        Controller("proxy-release", proxy.release, resync_s=5.0),
        Controller("host-firewall", look_at_firewall, min_interval_s=5.0, resync_s=60.0),
        Controller("host-devices", refresh_host, min_interval_s=0.2, resync_s=every),
        Controller("wires", keep_wires, resync_s=every),
        # One at a time and not at once: it holds the kernel's lock that adding endpoints needs.
        Controller("program-links", wiring.fasten, min_interval_s=0.5, resync_s=0.5),
        Controller("vanished-endpoints", lives.end_vanished, resync_s=every),
        Controller("address-quarantine", lives.release_quarantine, resync_s=every),
        Controller("conntrack-gc", conntrack.collect, resync_s=config.conntrack_gc_interval_s),
        Controller("resync", resync, resync_s=every),
        Controller("policy-confirmation", confirmation.check, retry_s=1.0, resync_s=1.0),
        Controller("kernel-proof", kernel_audit.step, resync_s=1.0),
        Controller("count", count, resync_s=5.0),
    ):
        controllers.add(controller)

    async def tell_policy_waiters() -> None:
        while True:
            await policy_changed.wait()
            policy_changed.clear()
            async with policy_known:
                policy_known.notify_all()

    # ---- what is asked of us
    def all_tables() -> tuple[TableDump, ...]:
        tables: tuple[Any, ...] = (
            endpoints.table,
            *regeneration.tables,
            regeneration.policymap.statuses,
            regeneration.ipcache.statuses,
            regeneration.endpointmap.statuses,
            attachments,
            attach_reconciler.statuses,
            links,
            link_reconciler.statuses,
            host.devices,
        )
        return tuple(table.dump() for table in tables)

    status = Status(
        view=view,
        session=session,
        watch=watch,
        allocator=allocator,
        endpoints=endpoints,
        regeneration=regeneration,
        datapath=datapath,
        ipam=ipam,
        host=host,
        monitor=monitor,
        proxy=proxy,
        firewall=firewall,
        controllers=controllers,
        tables=all_tables,
        kernel_audit=kernel_audit,
        problems=problems,
    )
    policy_documents = PolicyDocuments(
        confirmation=confirmation,
        client=client,
        view=view,
        regeneration=regeneration,
        changed=policy_known,
        wait_timeout_s=config.policy_wait_timeout_s,
    )
    dumps = Dumps(datapath, calculation)
    rpc = Server(
        socket=config.socket,
        group=config.socket_group,
        grace_s=config.stop_grace_s,
        services=[
            lambda target: server.register(
                target,
                endpoint=server.EndpointServer(
                    config=config,
                    endpoints=endpoints,
                    lives=lives,
                    regeneration=regeneration,
                    view=view,
                ),
                policy=server.PolicyServer(
                    documents=policy_documents,
                    view=view,
                    regeneration=regeneration,
                    calculation=calculation,
                    endpoints=endpoints,
                    kernel_audit=kernel_audit,
                ),
                datapath=server.DatapathServer(
                    dumps=dumps,
                    endpoints=endpoints,
                    datapath=datapath,
                    monitor=monitor,
                ),
                monitor=server.MonitorServer(
                    monitor=monitor,
                    decoder=Decoder(calculation, endpoints),
                    meaning=EventMeaning(
                        node=config.node,
                        cluster=config.cluster,
                        endpoints=endpoints,
                        calculation=calculation,
                        view=view,
                    ),
                ),
                status=server.StatusServer(config=config, status=status, attach_mode=attach_mode),
            )
        ],
    )

    lifecycle.add("kernel", _Step(_refuse_old_kernel))
    lifecycle.add("pools", _Step(host.refuse_overlap))
    lifecycle.add("datapath", datapath)
    lifecycle.add("host", host)
    lifecycle.add("restore", _Step(take_over))
    lifecycle.add("proxy", proxy)
    lifecycle.add("monitor", monitor)
    lifecycle.add("identity-client", _Closing(client.close))
    lifecycle.add_task("policy-waiters", tell_policy_waiters)
    lifecycle.add("controllers", controllers)
    lifecycle.add_task(
        "host-watch", lambda: host.watch(lambda: controllers.trigger("host-devices"))
    )
    if config.metrics_address:
        lifecycle.add("exposition", Exposition(parse_address(config.metrics_address)))
    lifecycle.add("first-flush", _Step(regenerate.wait_success))
    lifecycle.add("server", rpc)
    lifecycle.add("serving", Serving(rpc))
    lifecycle.on_ready(notifier.agent_started)


def _count(endpoints: Endpoints, view: ClusterView, ipam: Ipam) -> None:
    states = [endpoint.shown_state for endpoint in endpoints]
    for state in (*EndpointState, "not-ready"):
        if state:
            metrics.ENDPOINTS.labels(str(state)).set(states.count(str(state)))
    metrics.POLICIES.set(len(view.policies))
    metrics.POLICY_REVISION.set(view.policy_revision)
    for pool in ipam.pools:
        metrics.IPAM_ADDRESSES.labels(f"ipv{pool.network.version}").set(pool.status().allocated)


async def _refuse_old_kernel() -> None:
    """Asks the kernel by doing; names what is missing and the cure. Raises KernelTooOld,
    NotPrivileged."""
    missing = [
        feature for feature in await asyncio.to_thread(probe.features) if not feature.present
    ]
    # Without a right everything else is refused as well, and no kernel would help.
    for feature in sorted(missing, key=lambda feature: not feature.name.startswith("CAP_")):
        if feature.required and feature.name.startswith("CAP_"):
            raise NotPrivileged(f"the agent has no {feature.name} here, so {feature.effect}")
        if feature.required:
            raise KernelTooOld(
                f"this kernel lacks {feature.name} ({feature.detail}): {feature.effect}",
                cure=feature.cure,
            )
        log.warning(
            "A kernel feature is missing.",
            **{fields.FEATURE: feature.name, fields.REASON: feature.effect},
        )


class _Step:
    """Something done once at its place in the start."""

    def __init__(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._work = work

    async def start(self) -> None:
        await self._work()

    async def stop(self) -> None:
        """Nothing to undo."""


class _Closing:
    """Something closed at its place in the stop."""

    def __init__(self, close: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._close = close

    async def start(self) -> None:
        """Open since it was made."""

    async def stop(self) -> None:
        await self._close()
