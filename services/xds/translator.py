"""What turns the agent's rule sets into Envoy's resources: the seam between the two halves of this
service.

A translator is pure: the same redirect gives the same bytes, so that a restart of this service
changes nothing at the proxy. Rules belong into a resource of their own (RDS or ECDS), not into the
listener: Envoy keeps old listeners' filters alive for connections that are open, while new routes
are in force on them at once.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from google.protobuf.message import Message

from cilia.errors import InvalidError
from protos.xds.v1 import xds_pb2 as pb
from services.xds.resources import TypeURL


class Untranslatable(InvalidError):
    """A redirect that cannot be enforced; the agent is told, and nothing changes at the proxy."""


@dataclass(frozen=True, slots=True)
class Item:
    """A resource to be: a message, or its bytes."""

    url: TypeURL
    name: str
    value: Message | bytes


@dataclass(frozen=True, slots=True)
class Translation:
    """What enforces one redirect. It is acknowledged when all `items` are.

    Items of several redirects may share a name if they are equal (secrets). `rules` is the name of
    the item whose version stands for the rules.
    """

    items: tuple[Item, ...]
    rules: tuple[TypeURL, str]


class Translator(Protocol):
    """Implemented in services/xds/translate; made anew when the agent says that its node's
    addresses are others."""

    def base(self) -> Collection[Item]:
        """Resources that are there always: clusters, and what every listener uses."""
        ...

    def translate(self, redirect: pb.Redirect) -> Translation:
        """Raises Untranslatable. Names must be the port's own: `ingress-10001`."""
        ...


@dataclass(frozen=True, slots=True)
class Counters:
    """What passed through one redirect since its listener was made."""

    requests: int = 0
    denied: int = 0
    connections: int = 0
    active: int = 0


class RedirectCounters(Protocol):
    """Who counts: the access log's receiver, or Envoy's own statistics."""

    async def counters(self) -> dict[int, Counters]:
        """By port; ports that nothing is known of are absent."""
        ...
