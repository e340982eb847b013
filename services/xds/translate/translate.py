"""A redirect to the resources that Envoy gets for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from google.protobuf.message import Message

from services.xds.translate import clusters, listener, routes, tls
from services.xds.translate.model import (
    HTTP,
    Direction,
    NodeSettings,
    Redirect,
    RuleRefused,
    SecretReader,
    no_secrets,
)

LISTENER: Final = "type.googleapis.com/envoy.config.listener.v3.Listener"
ROUTES: Final = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
CLUSTER: Final = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
SECRET: Final = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"


@dataclass(frozen=True, slots=True)
class Resource:
    """One resource. Those of equal type and name are equal, whichever redirect brought them."""

    type_url: str
    name: str
    message: Message


def base(settings: NodeSettings) -> tuple[Resource, ...]:
    """What every redirect refers to."""
    made = (
        clusters.original_dst(settings, direction)
        for direction in (Direction.INGRESS, Direction.EGRESS)
    )
    return tuple(Resource(CLUSTER, cluster.name, cluster) for cluster in made)


def translate(
    redirect: Redirect, settings: NodeSettings, secrets: SecretReader = no_secrets
) -> tuple[Resource, ...]:
    """What the redirect needs beside `base()`, in the order in which Envoy should hear of it.

    Raises RuleRefused when a rule cannot be expressed.
    """
    for _, rules in redirect.sets:
        if rules.parser != HTTP:
            raise RuleRefused(
                f"redirect {redirect.port} has rules of parser {rules.parser!r}, "
                f"and Envoy enforces {HTTP!r} only"
            )
    made: list[Resource] = []
    cluster = clusters.cluster_name(redirect.direction)
    if (own := tls.cluster(redirect, settings)) is not None:
        cluster = own.name
        made.append(Resource(CLUSTER, own.name, own))
    made += [Resource(SECRET, x.name, x) for x in tls.secrets_of(redirect, secrets)]
    config = routes.route_configuration(redirect, settings, secrets, cluster)
    plumbing = listener.listener(redirect, settings)
    made.append(Resource(ROUTES, config.name, config))
    made.append(Resource(LISTENER, plumbing.name, plumbing))
    return tuple(made)
