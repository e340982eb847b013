"""TLS that is opened at the proxy: the certificate shown to the client, and how the server's is
checked.

Certificates and keys go to Envoy as secrets of their own, over the control plane's socket: Envoy's
user can read none of the files, and its dumps redact them. A secret that lacks what it must have is
refused; there is no connection without it.
"""

from __future__ import annotations

from typing import Final

from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.listener.v3 import listener_components_pb2
from envoy.extensions.transport_sockets.tls.v3 import common_pb2, secret_pb2, tls_pb2
from envoy.extensions.upstreams.http.v3 import http_protocol_options_pb2

from cilia.policy.api import TLSContext
from services.xds.translate.clusters import HTTP_OPTIONS, duration, original_dst, packed
from services.xds.translate.model import (
    NodeSettings,
    Redirect,
    RuleRefused,
    RuleSet,
    SecretReader,
)
from services.xds.translate.sources import ads

CERTIFICATE: Final = "tls.crt"
KEY: Final = "tls.key"
AUTHORITY: Final = "ca.crt"
_ALPN: Final = ("h2", "http/1.1")


def terminating(redirect: Redirect) -> RuleSet | None:
    """The rule set that brings the certificate for clients, if any."""
    return next((rules for _, rules in redirect.sets if rules.terminating_tls is not None), None)


def originating(redirect: Redirect) -> RuleSet | None:
    """The rule set that wants TLS towards the server, if any."""
    return next((rules for _, rules in redirect.sets if rules.originating_tls is not None), None)


def secrets_of(redirect: Redirect, read: SecretReader) -> list[secret_pb2.Secret]:
    """Raises RuleRefused for a secret that is missing, or lacks an item."""
    found: list[secret_pb2.Secret] = []
    if (rules := terminating(redirect)) and (context := rules.terminating_tls):
        items = _items(redirect, context, read)
        secret = secret_pb2.Secret(name=certificate_name(context))
        certificate = secret.tls_certificate
        certificate.certificate_chain.inline_bytes = _item(
            redirect, context, items, context.certificate or CERTIFICATE
        )
        certificate.private_key.inline_bytes = _item(
            redirect, context, items, context.private_key or KEY
        )
        found.append(secret)
    if (rules := originating(redirect)) and (context := rules.originating_tls):
        items = _items(redirect, context, read)
        secret = secret_pb2.Secret(name=authority_name(context))
        secret.validation_context.trusted_ca.inline_bytes = _item(
            redirect, context, items, context.trusted_ca or AUTHORITY
        )
        found.append(secret)
    return found


def _items(redirect: Redirect, context: TLSContext, read: SecretReader) -> dict[str, bytes]:
    items = read(context.secret)
    if items is None:
        namespace, name = context.secret
        raise RuleRefused(
            f"redirect {redirect.port}: the secret {namespace}/{name} cannot be read",
            cure="Put its files into the certificates directory, under namespace and name",
        )
    return dict(items)


def _item(redirect: Redirect, context: TLSContext, items: dict[str, bytes], name: str) -> bytes:
    if not items.get(name):
        secret = "/".join(context.secret)
        raise RuleRefused(
            f"redirect {redirect.port}: the secret {secret} has no {name}",
            cure=f"Add the file {name} to it",
        )
    return items[name]


def certificate_name(context: TLSContext) -> str:
    namespace, name = context.secret
    return f"certificate:{namespace}/{name}/{context.certificate or CERTIFICATE}"


def authority_name(context: TLSContext) -> str:
    namespace, name = context.secret
    return f"authority:{namespace}/{name}/{context.trusted_ca or AUTHORITY}"


def open_to_client(
    chain: listener_components_pb2.FilterChain, context: TLSContext, server_names: tuple[str, ...]
) -> None:
    """Makes a filter chain one of TLS: Envoy is the server that the client sees."""
    chain.filter_chain_match.transport_protocol = "tls"
    chain.filter_chain_match.server_names.extend(server_names)
    downstream = tls_pb2.DownstreamTlsContext()
    common = downstream.common_tls_context
    common.alpn_protocols.extend(_ALPN)
    common.tls_params.tls_minimum_protocol_version = common_pb2.TlsParameters.TLSv1_2
    common.tls_certificate_sds_secret_configs.add(name=certificate_name(context), sds_config=ads())
    chain.transport_socket.name = "tls"
    chain.transport_socket.typed_config.CopyFrom(packed(downstream))
    chain.transport_socket_connect_timeout.CopyFrom(duration(10))


def cluster(redirect: Redirect, settings: NodeSettings) -> cluster_pb2.Cluster | None:
    """Where a redirect with originating TLS sends its requests; None: it has none."""
    rules = originating(redirect)
    if rules is None or rules.originating_tls is None:
        return None
    result = original_dst(settings, redirect.direction, name=f"tls-{redirect.name}")
    upstream = tls_pb2.UpstreamTlsContext()
    common = upstream.common_tls_context
    common.tls_params.tls_minimum_protocol_version = common_pb2.TlsParameters.TLSv1_2
    common.validation_context_sds_secret_config.name = authority_name(rules.originating_tls)
    common.validation_context_sds_secret_config.sds_config.CopyFrom(ads())
    result.transport_socket.name = "tls"
    result.transport_socket.typed_config.CopyFrom(packed(upstream))

    # The server proves to be the host that the request names; which HTTP it speaks, ALPN tells.
    options = http_protocol_options_pb2.HttpProtocolOptions()
    options.common_http_protocol_options.idle_timeout.CopyFrom(
        duration(settings.upstream_idle_timeout_s)
    )
    options.upstream_http_protocol_options.auto_sni = True
    options.upstream_http_protocol_options.auto_san_validation = True
    options.auto_config.http_protocol_options.SetInParent()
    options.auto_config.http2_protocol_options.SetInParent()
    result.typed_extension_protocol_options[HTTP_OPTIONS].CopyFrom(packed(options))
    return result
