"""What Envoy is started with: who it is, where its control plane is, and what bounds it."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Final

from envoy.config.bootstrap.v3 import bootstrap_pb2
from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.core.v3 import config_source_pb2
from envoy.extensions.resource_monitors.downstream_connections.v3 import (
    downstream_connections_pb2,
)
from envoy.extensions.upstreams.http.v3 import http_protocol_options_pb2
from google.protobuf import any_pb2, json_format

XDS_CLUSTER: Final = "xds"
_HTTP_OPTIONS: Final = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"

# What is counted; all else would cost memory for every listener.
_STATS: Final = (
    r"(server|listener_manager|cluster_manager|control_plane|overload|access_logs)\..*"
    r"|cluster\.xds\..*"
    r"|http\.redirect-\d+\.(downstream_(cx|rq)_(total|active)|downstream_cx_protocol_error"
    r"|rbac\..*(allowed|denied))"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BootstrapSettings:
    """What the bootstrap depends on."""

    node_id: str
    node_cluster: str = "cilia"
    ads_socket: Path
    admin_directory: Path
    max_connections: int = 100_000
    """Downstream connections at once; those above are closed."""
    max_program_size: int = 1000
    """Of a regular expression; as the translation checks it, which see."""


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """The text, its digest, and the admin socket that it names."""

    text: str
    digest: str
    admin_socket: Path


def build(settings: BootstrapSettings, *, salt: str = "") -> Bootstrap:
    """Equal settings give equal text. What else makes a process another one goes into the salt."""
    digest = blake2b(f"{_text(settings, Path('admin'))}{salt}".encode(), digest_size=6).hexdigest()
    # A socket of its own for each digest: while one process replaces another both have theirs.
    socket = admin_socket(settings.admin_directory, digest)
    return Bootstrap(_text(settings, socket), digest, socket)


def admin_socket(directory: Path, digest: str) -> Path:
    return directory / f"admin-{digest}.sock"


def _text(settings: BootstrapSettings, admin_socket: Path) -> str:
    return json_format.MessageToJson(
        _message(settings, admin_socket), preserving_proto_field_name=True, sort_keys=True
    )


def _message(settings: BootstrapSettings, admin_socket: Path) -> bootstrap_pb2.Bootstrap:
    message = bootstrap_pb2.Bootstrap()
    message.node.id = settings.node_id
    message.node.cluster = settings.node_cluster
    message.admin.address.pipe.path = str(admin_socket)
    message.admin.address.pipe.mode = 0o600
    message.admin.ignore_global_conn_limit = True

    dynamic = message.dynamic_resources
    for source in (dynamic.lds_config, dynamic.cds_config):
        source.resource_api_version = config_source_pb2.V3
        source.ads.SetInParent()
    ads = dynamic.ads_config
    ads.api_type = config_source_pb2.ApiConfigSource.DELTA_GRPC
    ads.transport_api_version = config_source_pb2.V3
    ads.set_node_on_first_message_only = True  # it is 60 kB: every extension is listed
    ads.grpc_services.add().envoy_grpc.cluster_name = XDS_CLUSTER

    message.static_resources.clusters.append(_xds_cluster(settings.ads_socket))
    message.stats_config.stats_matcher.inclusion_list.patterns.add().safe_regex.regex = _STATS
    message.stats_flush_on_admin = True

    layer = message.layered_runtime.layers.add(name="static").static_layer
    layer["re2.max_program_size.error_level"] = settings.max_program_size
    # Rules allow. Of a header that stands there twice, one fitting value would be enough for Envoy
    # 1.40 by default; compared as one text, all of them must be what the rule says.
    layer["envoy.reloadable_features.rbac_match_headers_individually"] = False
    _bound(message, settings)
    return message


def _xds_cluster(socket: Path) -> cluster_pb2.Cluster:
    cluster = cluster_pb2.Cluster(name=XDS_CLUSTER, type=cluster_pb2.Cluster.STATIC)
    cluster.connect_timeout.seconds = 1
    cluster.load_assignment.cluster_name = XDS_CLUSTER
    endpoint = cluster.load_assignment.endpoints.add().lb_endpoints.add().endpoint
    endpoint.address.pipe.path = str(socket)
    options = http_protocol_options_pb2.HttpProtocolOptions()
    http2 = options.explicit_http_config.http2_protocol_options
    # A control plane that hangs is noticed; one that is gone closes the socket.
    http2.connection_keepalive.interval.seconds = 30
    http2.connection_keepalive.timeout.seconds = 20
    packed = any_pb2.Any()
    packed.Pack(options, deterministic=True)
    cluster.typed_extension_protocol_options[_HTTP_OPTIONS].CopyFrom(packed)
    return cluster


def _bound(message: bootstrap_pb2.Bootstrap, settings: BootstrapSettings) -> None:
    monitor = message.overload_manager.resource_monitors.add(
        name="envoy.resource_monitors.global_downstream_max_connections"
    )
    limit = downstream_connections_pb2.DownstreamConnectionsConfig(
        max_active_downstream_connections=settings.max_connections
    )
    monitor.typed_config.Pack(limit, deterministic=True)
    for watchdog in (
        message.watchdogs.main_thread_watchdog,
        message.watchdogs.worker_watchdog,
    ):
        # A thread that hangs ends the process, which is then started again.
        watchdog.kill_timeout.seconds = 60
