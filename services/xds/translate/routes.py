"""The route configuration of a redirect: its rules, and the one way for what they allow."""

from __future__ import annotations

from typing import Final

from envoy.config.route.v3 import route_components_pb2, route_pb2

from services.xds.translate import headers, rbac
from services.xds.translate.clusters import duration, packed
from services.xds.translate.model import NodeSettings, Redirect, SecretReader

# What Envoy's normalization leaves alone, and some servers read as a step up or as the end of the
# path: dot segments with parameters (RFC 3986 section 3.3 lets a segment have them; servlet
# containers cut them off before they resolve dots) or with blanks around them, dots and slashes
# that are encoded twice, NUL and backslashes. And what is no UTF-8 but was read as such: a byte C0
# or C1, or zeros in front (RFC 3629 section 10), and %u with a character of ASCII.
_BLANK: Final = r"(%09|%0a|%0b|%0c|%0d|%20)*"
TRICKS: Final = (
    rf"(?i).*(/{_BLANK}(\.|%2e){{1,2}}{_BLANK}((;|/|%3b).*)?"
    r"|(%25(2e|2f|5c|25)|%00|%c[01]%[89ab]|%e0%[89]|%f0%8|%u00|\\).*)"
)


def route_configuration(
    redirect: Redirect, settings: NodeSettings, secrets: SecretReader, cluster: str
) -> route_pb2.RouteConfiguration:
    """Raises RuleRefused."""
    config = route_pb2.RouteConfiguration(name=redirect.name)
    for direction, rules in redirect.sets:
        allowed = rbac.per_route(rbac.to_rbac(direction, rules, secrets))
        config.typed_per_filter_config[rbac.filter_name(direction)].CopyFrom(packed(allowed))
    for name, action in headers.actions(redirect, secrets):
        config.typed_per_filter_config[name].CopyFrom(packed(action))

    host = config.virtual_hosts.add(name="all", domains=["*"])
    for trick in _tricks():
        route = host.routes.add(name="trick", match=trick)
        route.direct_response.status = 403
        for direction, _ in redirect.sets:
            closed = rbac.per_route(rbac.deny_all(direction))
            route.typed_per_filter_config[rbac.filter_name(direction)].CopyFrom(packed(closed))

    # "OPTIONS *" has no path and no route: it is not passed on.
    route = host.routes.add(name="original-destination")
    route.match.prefix = "/"
    route.route.cluster = cluster
    route.route.timeout.CopyFrom(duration(settings.request_timeout_s))
    if settings.retries:
        # Only what never reached the server: a request is not repeated behind a client's back.
        route.route.retry_policy.retry_on = "connect-failure,refused-stream,reset-before-request"
        route.route.retry_policy.num_retries.value = settings.retries
    return config


def _tricks() -> list[route_components_pb2.RouteMatch]:
    path = route_components_pb2.RouteMatch()
    path.safe_regex.regex = TRICKS
    # Envoy joins several Host headers to one; RFC 9112 section 3.2 has such a request refused.
    hosts = route_components_pb2.RouteMatch(prefix="/")
    hosts.headers.add(name=":authority").string_match.contains = ","
    return [path, hosts]
