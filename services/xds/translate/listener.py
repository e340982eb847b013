"""The listener of a redirect: plumbing that denies by itself, and never changes with the rules."""

from __future__ import annotations

import ipaddress
from typing import Final

from envoy.config.accesslog.v3 import accesslog_pb2
from envoy.config.core.v3 import config_source_pb2
from envoy.config.listener.v3 import listener_components_pb2, listener_pb2
from envoy.extensions.access_loggers.grpc.v3 import als_pb2
from envoy.extensions.filters.http.router.v3 import router_pb2
from envoy.extensions.filters.listener.original_dst.v3 import original_dst_pb2
from envoy.extensions.filters.listener.tls_inspector.v3 import tls_inspector_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import (
    http_connection_manager_pb2 as hcm_pb2,
)

from services.xds.translate import headers, rbac, tls
from services.xds.translate.clusters import duration, keepalive_options, mark_option, packed
from services.xds.translate.model import Direction, NodeSettings, Redirect
from services.xds.translate.sources import ads

LOG_NAME: Final = "cilia"
PORT_TAG: Final = "cilia.port"
_METADATA: Final = "cilia"
_SLASHES: Final = {
    "reject": hcm_pb2.HttpConnectionManager.REJECT_REQUEST,
    "keep": hcm_pb2.HttpConnectionManager.KEEP_UNCHANGED,
}


def listener(redirect: Redirect, settings: NodeSettings) -> listener_pb2.Listener:
    """Raises RuleRefused."""
    result = listener_pb2.Listener(name=redirect.name, stat_prefix=redirect.name)
    for number, host in enumerate(settings.listen):
        address = result.address if number == 0 else result.additional_addresses.add().address
        address.socket_address.address = host
        address.socket_address.port_value = redirect.port
    result.transparent.value = True
    # One socket for all workers: before Linux 6.6 the datapath can deliver to no shared port.
    result.enable_reuse_port.value = False
    result.per_connection_buffer_limit_bytes.value = settings.buffer_limit_bytes
    result.traffic_direction = 2 if redirect.direction is Direction.EGRESS else 1
    result.socket_options.extend(keepalive_options(settings.keepalive_s))
    result.socket_options.append(
        mark_option(settings.listener_mark(redirect.direction, redirect.port))
    )
    result.metadata.filter_metadata[_METADATA]["port"] = str(redirect.port)
    result.listener_filters.add(
        name="original_dst", typed_config=packed(original_dst_pb2.OriginalDst())
    )
    # Who connects to the port itself was not redirected: his "original destination" would be this
    # listener again. A chain without filters closes.
    itself = result.filter_chains.add(name="itself")
    for host in settings.listen:
        network = ipaddress.ip_network(host)
        itself.filter_chain_match.prefix_ranges.add(
            address_prefix=host
        ).prefix_len.value = network.prefixlen
    plain = _chain("http", redirect, settings)
    rules = tls.terminating(redirect)
    if rules is not None and rules.terminating_tls is not None:
        result.listener_filters.add(
            name="tls_inspector", typed_config=packed(tls_inspector_pb2.TlsInspector())
        )
        opened = _chain("https", redirect, settings)
        tls.open_to_client(opened, rules.terminating_tls, rules.server_names)
        result.filter_chains.append(opened)
        if rules.server_names:  # TLS for another name: nothing here can read it
            result.filter_chains.add(
                name="other-names"
            ).filter_chain_match.transport_protocol = "tls"
    result.default_filter_chain.CopyFrom(plain)
    return result


def _chain(
    name: str, redirect: Redirect, settings: NodeSettings
) -> listener_components_pb2.FilterChain:
    chain = listener_components_pb2.FilterChain(name=name)
    chain.filters.add(name="http", typed_config=packed(http_manager(redirect, settings)))
    return chain


def http_manager(redirect: Redirect, settings: NodeSettings) -> hcm_pb2.HttpConnectionManager:
    manager = hcm_pb2.HttpConnectionManager(
        stat_prefix=redirect.name,
        codec_type=hcm_pb2.HttpConnectionManager.AUTO,
        # What a server sees is what the client sent.
        server_header_transformation=hcm_pb2.HttpConnectionManager.PASS_THROUGH,
        skip_xff_append=True,
        proxy_100_continue=True,
        # What a rule sees is what the server will.
        merge_slashes=True,
        path_with_escaped_slashes_action=_SLASHES[settings.escaped_slashes],
    )
    manager.normalize_path.value = True
    # X-Forwarded-* pass as they came. No addresses are named as internal, so nobody counts as such,
    # and no x-envoy-* header that a client sends is obeyed.
    manager.use_remote_address.value = False
    manager.generate_request_id.value = False
    manager.rds.config_source.CopyFrom(ads())
    manager.rds.route_config_name = redirect.name
    _limits(manager, settings)

    for direction, _ in redirect.sets:
        manager.http_filters.add(
            name=rbac.filter_name(direction), typed_config=packed(rbac.deny_all(direction))
        )
    for name in headers.filter_names(redirect):
        manager.http_filters.add(name=name, typed_config=packed(headers.idle_filter()))
    manager.http_filters.add(
        name="router", typed_config=packed(router_pb2.Router(suppress_envoy_headers=True))
    )
    for upgrade in settings.upgrades:
        manager.upgrade_configs.add(upgrade_type=upgrade)
    _denied(manager, settings.denied_body)
    if settings.access_log:
        manager.access_log.append(_access_log(settings))
    return manager


def _limits(manager: hcm_pb2.HttpConnectionManager, settings: NodeSettings) -> None:
    manager.stream_idle_timeout.CopyFrom(duration(settings.stream_idle_timeout_s))
    manager.request_headers_timeout.CopyFrom(duration(settings.request_headers_timeout_s))
    common = manager.common_http_protocol_options
    common.idle_timeout.CopyFrom(duration(settings.connection_idle_timeout_s))
    common.max_headers_count.value = settings.max_headers
    manager.max_request_headers_kb.value = settings.max_headers_kib
    manager.http_protocol_options.accept_http_10 = True
    http2 = manager.http2_protocol_options
    http2.max_concurrent_streams.value = settings.max_streams
    http2.initial_stream_window_size.value = settings.buffer_limit_bytes
    http2.initial_connection_window_size.value = 4 * settings.buffer_limit_bytes
    http2.allow_connect = "websocket" in settings.upgrades


def _denied(manager: hcm_pb2.HttpConnectionManager, body: str) -> None:
    """The text of a 403 that Envoy gives; one that a server gives keeps its own."""
    mapper = manager.local_reply_config.mappers.add()
    comparison = mapper.filter.status_code_filter.comparison
    comparison.op = accesslog_pb2.ComparisonFilter.EQ
    comparison.value.default_value = 403
    comparison.value.runtime_key = "cilia.none"
    text = body if body.endswith("\n") else body + "\r\n"
    mapper.body_format_override.text_format_source.inline_string = text.replace("%", "%%")


def _access_log(settings: NodeSettings) -> accesslog_pb2.AccessLog:
    """The same for every listener: Envoy then has one stream a worker, not one a listener."""
    grpc = als_pb2.HttpGrpcAccessLogConfig()
    common = grpc.common_config
    common.log_name = LOG_NAME
    common.transport_api_version = config_source_pb2.V3
    common.grpc_service.envoy_grpc.cluster_name = settings.access_log_cluster
    common.buffer_flush_interval.CopyFrom(duration(0.2))
    common.buffer_size_bytes.value = 65_536
    common.custom_tags.add(tag=PORT_TAG, value=f"%METADATA(LISTENER:{_METADATA}:port)%")
    grpc.additional_request_headers_to_log.extend(settings.access_log_headers)
    grpc.additional_response_headers_to_log.append("grpc-status")
    grpc.additional_response_trailers_to_log.append("grpc-status")
    return accesslog_pb2.AccessLog(name="als", typed_config=packed(grpc))
