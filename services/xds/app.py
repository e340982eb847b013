"""The service, wired.

          unix socket                 the proxy's own            TCP, mutual TLS
   ┌───────────┴──────────────┐        ┌────────┴───────┐               │
 Sync, Records, Status     ADS, …     ADS         access logs         ADS, …
   │                          │                 │                       │
Redirects ─▶ Translator    DiscoveryServer    AccessLogReceiver    DiscoveryServer
   │              │           │                 │                       │
   │ standings    ▼           ▼                 ▼                       │
   │◀────────── cache ─▶ Hub ─▶ Streams      AccessLog ─▶ Records       │
   │              ▲           ▲─────────────────────────────────────────┘
   │      ResourceDirectory   │ of their nodes' resources each
   │       every reload_s     │
   └──────────────────── Envoy ◀── Supervisor
"""

from __future__ import annotations

import contextlib
import socket as sockets
import stat
from collections.abc import Callable
from pathlib import Path

import grpc.aio

from cilia.controller import Controller, ControllerSet
from cilia.lifecycle import Lifecycle, Serving
from cilia.pki.files import CertificateInfo, Credentials
from cilia.rpc.server import Server, TlsServer
from cilia.telemetry.metrics import Exposition, Registration, parse_address
from protos.xds.v1 import xds_pb2 as pb
from protos.xds.v1 import xds_pb2_grpc as pb_grpc
from services.xds import metrics
from services.xds.accesslog import AccessLog
from services.xds.cache import ResourceCache
from services.xds.config import XdsConfig
from services.xds.counters import EnvoyCounters, LogCounters
from services.xds.envoy.accesslog import AccessLogReceiver
from services.xds.envoy.process import account, binary
from services.xds.envoy.supervisor import EnvoySettings, Supervisor
from services.xds.files import ResourceDirectory
from services.xds.hub import Hub
from services.xds.redirects import Redirects
from services.xds.resources import NodeID
from services.xds.server import (
    AccessLogServer,
    DiscoveryServer,
    RedirectServer,
    StatusServer,
)
from services.xds.status import StatusReader
from services.xds.stream import Limits
from services.xds.translate.http import HttpTranslator, with_addresses
from services.xds.translate.model import LOOPBACKS, NodeSettings
from services.xds.translate.secretfiles import SecretFiles
from services.xds.translator import RedirectCounters, Translator

SECRETS_CHECK_S = 5.0


async def build(config: XdsConfig, lifecycle: Lifecycle) -> None:
    """Makes the parts and adds them, in the order in which they start."""
    cache = ResourceCache()
    hub = Hub(
        cache,
        limits=Limits(names=config.max_names, patience_s=config.patience_s, retry_s=config.retry_s),
        max_streams=config.max_streams,
        max_streams_a_node=config.max_streams_a_node,
    )
    access_log = AccessLog(capacity=config.log_capacity)
    controllers = ControllerSet()
    # An Envoy that was started elsewhere comes to the socket of everybody.
    own_node = NodeID(config.proxy_node) if config.redirects else None
    discovery = DiscoveryServer(
        hub=hub, transport="unix", reserved=own_node if config.launch_proxy else None
    )
    local: list[Callable[[grpc.aio.Server], None]] = [discovery.register]

    directory = None
    if config.resources is not None:
        directory = ResourceDirectory(config.resources, cache)
        directory.prepare()
        controllers.add(
            Controller("resources", directory.sync, resync_s=config.reload_s, retry_s=1.0)
        )

    redirects = None
    supervisor = proxy_server = own = receiver = None
    counters: RedirectCounters | None = None
    if config.redirects:
        redirects = _redirects(config, cache, hub, controllers)
        receiver = AccessLogReceiver(publish=access_log.publish, find=redirects.find)
        redirects.on_removed(receiver.forget)
        counters = LogCounters(receiver)
        redirect_server = RedirectServer(redirects)
        local += [
            receiver.add_to_server,
            lambda target: pb_grpc.add_RedirectServiceServicer_to_server(redirect_server, target),
        ]
        if config.launch_proxy:
            supervisor = Supervisor(_envoy_settings(config))
            counters = EnvoyCounters(supervisor.admin)
            own = DiscoveryServer(hub=hub, transport="unix", node=redirects.node)
            proxy_server = Server(
                socket=config.proxy_socket_path,
                services=[own.register, receiver.add_to_server],
                group=account(config.proxy_user).gid,
                grace_s=1.0,
            )

    credentials = Credentials(config.tls_dir) if config.tls_address else None

    def certificates() -> list[CertificateInfo]:
        return [credentials.info()] if credentials is not None else []

    status_server = StatusServer(
        StatusReader(
            cache=cache,
            hub=hub,
            redirects=redirects,
            directory=directory,
            access_log=access_log,
            certificates=certificates,
            sources=lambda: receiver.sources if receiver is not None else 0,
            counters=counters,
            envoy=_envoy_status(supervisor) if supervisor is not None else None,
        )
    )
    access_log_server = AccessLogServer(access_log)
    local += [
        lambda target: pb_grpc.add_AccessLogServiceServicer_to_server(access_log_server, target),
        lambda target: pb_grpc.add_XdsStatusServiceServicer_to_server(status_server, target),
    ]

    collector = metrics.Collector(
        cache=cache, hub=hub, redirects=redirects, access_log=access_log, certificates=certificates
    )
    lifecycle.add("metrics", Registration(collector))
    if config.metrics_address:
        lifecycle.add("exposition", Exposition(parse_address(config.metrics_address)))
    lifecycle.add("controllers", controllers)
    server = Server(socket=config.socket_path, services=local, group=config.group, grace_s=1.0)
    lifecycle.add("server", server)
    servers: list[Server | TlsServer] = [server]
    lifecycle.on_stopping(access_log.close)
    lifecycle.on_stopping(discovery.close)
    if credentials is not None:
        remote = DiscoveryServer(hub=hub, transport="tcp", reserved=own_node)
        tls_server = TlsServer(
            address=config.tls_address,
            credentials=credentials,
            services=[remote.register],
            grace_s=1.0,
        )
        lifecycle.add("tls-server", tls_server)
        lifecycle.on_stopping(remote.close)
        servers.append(tls_server)
    if supervisor is not None and proxy_server is not None and own is not None:
        lifecycle.add("proxy-server", proxy_server)
        lifecycle.on_stopping(own.close)
        servers.append(proxy_server)
        lifecycle.add("proxy-path", _Passable(config.run_dir))
        lifecycle.add_task("envoy", supervisor.run)
    lifecycle.add("serving", Serving(*servers))


def loopbacks() -> tuple[str, ...]:
    """The loopback addresses there are: Envoy refuses a listener on one that there is not, and a
    host may have IPv6 switched off.
    """
    found = []
    for address in LOOPBACKS:
        family = sockets.AF_INET6 if ":" in address else sockets.AF_INET
        with contextlib.suppress(OSError), sockets.socket(family, sockets.SOCK_STREAM) as probe:
            probe.bind((address, 0))
            found.append(address)
    return tuple(found)


def _redirects(
    config: XdsConfig, cache: ResourceCache, hub: Hub, controllers: ControllerSet
) -> Redirects:
    settings = NodeSettings(
        listen=loopbacks(),
        denied_body=config.denied_body,
        access_log=config.access_log,
        access_log_headers=tuple(
            name.strip() for name in config.access_log_headers.split(",") if name.strip()
        ),
    )
    secrets = SecretFiles(config.secrets)

    def make_translator(node: pb.Node) -> Translator:
        return HttpTranslator(with_addresses(settings, node.ipv4, node.ipv6), secrets)

    redirects = Redirects(
        cache=cache, hub=hub, make_translator=make_translator, node=NodeID(config.proxy_node)
    )
    redirects.prepare()

    async def check_secrets() -> None:
        if secrets.changed():
            redirects.refresh()

    controllers.add(Controller("secrets", check_secrets, resync_s=SECRETS_CHECK_S, retry_s=5.0))
    return redirects


def _envoy_settings(config: XdsConfig) -> EnvoySettings:
    return EnvoySettings(
        binary=config.proxy_binary or binary(),
        run_dir=config.run_dir,
        node_id=config.proxy_node,
        ads_socket=config.proxy_socket_path,
        user=config.proxy_user,
        concurrency=config.proxy_concurrency,
        log_level=config.proxy_log_level,
        keep=config.keep_proxy,
    )


def _envoy_status(supervisor: Supervisor) -> Callable[[], pb.EnvoyStatus]:
    def status() -> pb.EnvoyStatus:
        state = supervisor.state
        return pb.EnvoyStatus(
            state=state.state,
            pid=state.pid,
            version=state.version,
            started_ns=state.started_ns,
            restarts=state.restarts,
            message=state.message,
        )

    return status


class _Passable:
    """Envoy's user must pass through the run directory to its own below; what else is in there has
    modes of its own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    async def start(self) -> None:
        mode = self._directory.stat().st_mode
        self._directory.chmod(stat.S_IMODE(mode) | stat.S_IXOTH)

    async def stop(self) -> None:
        pass
