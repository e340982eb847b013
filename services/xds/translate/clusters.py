"""Where redirected requests go: to where the client's connection went, marked as the proxy's."""

from __future__ import annotations

import socket
from typing import Final

from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.core.v3 import address_pb2, socket_option_pb2
from envoy.extensions.upstreams.http.v3 import http_protocol_options_pb2
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message

from services.xds.translate.model import Direction, NodeSettings

HTTP_OPTIONS: Final = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_UNBOUNDED: Final = 0xFFFF_FFFF
SO_MARK: Final = 36  # asm-generic/socket.h; the socket module of Python 3.11 lacks it


def cluster_name(direction: Direction) -> str:
    # Of both ends' rules the server is local: the connection is one of its end.
    one = Direction.EGRESS if direction is Direction.EGRESS else Direction.INGRESS
    return f"original-dst-{one.value}"


def duration(seconds: float) -> duration_pb2.Duration:
    result = duration_pb2.Duration()
    result.FromNanoseconds(round(seconds * 1e9))
    return result


def packed(message: Message) -> any_pb2.Any:
    result = any_pb2.Any()
    result.Pack(message, deterministic=True)
    return result


def mark_option(mark: int) -> socket_option_pb2.SocketOption:
    return socket_option_pb2.SocketOption(
        description="SO_MARK",
        level=socket.SOL_SOCKET,
        name=SO_MARK,
        int_value=mark,
        state=socket_option_pb2.SocketOption.STATE_PREBIND,
    )


def keepalive_options(idle_s: int) -> list[socket_option_pb2.SocketOption]:
    """Of a listener: what it accepts inherits them (tcp(7))."""
    wanted = (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle_s),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, idle_s // 10)),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    )
    return [
        socket_option_pb2.SocketOption(
            description="keepalive",
            level=level,
            name=name,
            int_value=value,
            state=socket_option_pb2.SocketOption.STATE_PREBIND,
        )
        for level, name, value in wanted
    ]


def bind_config(settings: NodeSettings, direction: Direction) -> address_pb2.BindConfig:
    config = address_pb2.BindConfig()
    sources = settings.sources(direction)
    for number, source in enumerate(sources):
        address = config.source_address if number == 0 else None
        if address is None:
            address = config.extra_source_addresses.add().address
        address.address = source
        address.port_value = 0
    config.socket_options.append(mark_option(settings.mark(direction)))
    return config


def original_dst(
    settings: NodeSettings, direction: Direction, *, name: str = ""
) -> cluster_pb2.Cluster:
    """The cluster of a direction: the client's own destination, spoken to as the client spoke."""
    cluster = cluster_pb2.Cluster(
        name=name or cluster_name(direction),
        type=cluster_pb2.Cluster.ORIGINAL_DST,
        lb_policy=cluster_pb2.Cluster.CLUSTER_PROVIDED,
        connect_timeout=duration(settings.connect_timeout_s),
        upstream_bind_config=bind_config(settings, direction),
    )
    cluster.per_connection_buffer_limit_bytes.value = settings.buffer_limit_bytes
    # The defaults (1024 of each) are for a cluster of one service; this one is for all of them.
    thresholds = cluster.circuit_breakers.thresholds.add()
    thresholds.max_connections.value = _UNBOUNDED
    thresholds.max_pending_requests.value = _UNBOUNDED
    thresholds.max_requests.value = _UNBOUNDED
    thresholds.max_retries.value = _UNBOUNDED
    keepalive = cluster.upstream_connection_options.tcp_keepalive
    keepalive.keepalive_time.value = settings.keepalive_s
    keepalive.keepalive_interval.value = max(1, settings.keepalive_s // 10)
    keepalive.keepalive_probes.value = 3
    cluster.typed_extension_protocol_options[HTTP_OPTIONS].CopyFrom(packed(_http(settings)))
    return cluster


def _http(settings: NodeSettings) -> http_protocol_options_pb2.HttpProtocolOptions:
    options = http_protocol_options_pb2.HttpProtocolOptions()
    options.common_http_protocol_options.idle_timeout.CopyFrom(
        duration(settings.upstream_idle_timeout_s)
    )
    spoken = options.use_downstream_protocol_config
    spoken.http_protocol_options.SetInParent()
    spoken.http2_protocol_options.allow_connect = True  # WebSocket over HTTP/2, RFC 8441
    return options
