"""What is translated: redirects, their rule sets, and what holds for every redirect of a node.

A redirect is one listener on one port. Its port names it and its resources, so that other rules
on the same port are a change of one route configuration, enforced on open connections.
"""

from __future__ import annotations

import enum
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from cilia.errors import InvalidError
from cilia.policy.api import HTTPRule, TLSContext

# What Envoy may be asked to compile. RE2 matches in time linear in the text, and in memory that
# grows with the program: the bound is on memory, and on how long a rule set takes to load.
MAX_PROGRAM_SIZE: Final = 1000
MAX_RULES: Final = 10_000
HTTP: Final = "http"

# (namespace, name) of a secret to its items; None when it cannot be read.
SecretReader = Callable[[tuple[str, str]], Mapping[str, bytes] | None]


class RuleRefused(InvalidError):
    """A rule that Envoy cannot be given. Names the rule."""

    default_cure = "Change the rule; until then nothing that it would allow passes"


def no_secrets(_secret: tuple[str, str]) -> None:
    """A SecretReader for who has no secrets."""


class Direction(enum.Enum):
    INGRESS = "ingress"
    EGRESS = "egress"
    BOTH = "both"  # egress rules of the client's end and ingress rules of the server's


@dataclass(frozen=True, slots=True)
class Rule:
    """One L7 rule. `http` None allows every request, as a plain L4 rule does."""

    rule_id: int
    http: HTTPRule | None = None
    policy: str = ""  # for people


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleSet:
    """A request is allowed when one rule matches it. Without rules none is."""

    parser: str = HTTP
    rules: tuple[Rule, ...] = ()
    originating_tls: TLSContext | None = None
    terminating_tls: TLSContext | None = None
    server_names: tuple[str, ...] = ()
    digest: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Redirect:
    """One listener. `rules` are those of its direction, of BOTH those of egress."""

    port: int
    direction: Direction
    rules: RuleSet
    ingress_rules: RuleSet | None = None  # of BOTH only
    digest: str = ""

    @property
    def name(self) -> str:
        """Of the listener and of its route configuration."""
        return f"redirect-{self.port}"

    @property
    def sets(self) -> tuple[tuple[Direction, RuleSet], ...]:
        """The rule sets that must all allow a request, and whose they are."""
        if self.direction is Direction.BOTH:
            assert self.ingress_rules is not None, "a redirect of both directions has two sets"
            return ((Direction.EGRESS, self.rules), (Direction.INGRESS, self.ingress_rules))
        return ((self.direction, self.rules),)


LOOPBACKS: Final = ("127.0.0.1", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    """What holds for all redirects of a node. Times in seconds; 0 switches a limit off."""

    listen: tuple[str, ...] = LOOPBACKS
    """Loopback only: TPROXY brings the packets there, and nothing else can."""
    ingress_mark: int = 0xA00
    egress_mark: int = 0xB00
    """SO_MARK of all of Envoy's sockets: "from the proxy". Those of a listener have its port in the
    upper half besides: the datapath hands a connection to no other socket."""
    ingress_sources: tuple[str, ...] = ()
    egress_sources: tuple[str, ...] = ()
    """Addresses, one a family, from which Envoy connects; empty: as the route says."""

    denied_body: str = "Access denied\r\n"
    access_log: bool = True
    access_log_cluster: str = "xds"
    access_log_headers: tuple[str, ...] = ("user-agent", "x-request-id", "x-forwarded-for")

    connect_timeout_s: float = 2.0
    request_timeout_s: float = 3600.0
    stream_idle_timeout_s: float = 0.0
    connection_idle_timeout_s: float = 0.0
    request_headers_timeout_s: float = 60.0
    upstream_idle_timeout_s: float = 60.0
    keepalive_s: int = 300
    retries: int = 3
    max_headers_kib: int = 60
    max_headers: int = 100
    max_streams: int = 1024
    buffer_limit_bytes: int = 262_144
    upgrades: tuple[str, ...] = ("websocket",)
    escaped_slashes: str = "reject"
    """`reject` or `keep`: whether %2F and %5C may stand in a path."""

    def mark(self, direction: Direction) -> int:
        # Both ends: the server is local, so the connection is one to a local endpoint.
        return self.egress_mark if direction is Direction.EGRESS else self.ingress_mark

    def listener_mark(self, direction: Direction, port: int) -> int:
        """Of a listener and of what it accepts: names the listener, too (bpf/lib/proxy.h).

        As setsockopt(2) takes it, a signed number of 32 bits.
        """
        mark = self.mark(direction) | socket.htons(port) << 16
        return mark - (mark >> 31 << 32)

    def sources(self, direction: Direction) -> tuple[str, ...]:
        return self.egress_sources if direction is Direction.EGRESS else self.ingress_sources
