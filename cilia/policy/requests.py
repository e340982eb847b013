"""What a proxy must enforce: kinds of requests, TLS contexts, parsers. The kernel sees none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from cilia.policy.selectors import dns_matches

Mismatch = Literal["", "LOG", "ADD", "DELETE", "REPLACE"]


@dataclass(frozen=True, slots=True)
class HeaderMatch:
    """A header that must be there, with this value if one is given.

    `secret` (namespace, name) holds the value instead. `mismatch` says what happens to a request
    without it; empty: the request does not match.
    """

    name: str
    value: str = ""
    mismatch: Mismatch = ""
    secret: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class HTTPRule:
    """One kind of request. Method, path and host are RE2, matched whole; empty: any.

    `headers` are ``Name: value``, or ``Name`` for its presence.
    """

    method: str = ""
    path: str = ""
    host: str = ""
    headers: tuple[str, ...] = ()
    header_matches: tuple[HeaderMatch, ...] = ()


@dataclass(frozen=True, slots=True)
class KafkaRule:
    """One kind of Kafka request; empty: any. A role stands for the API keys it needs."""

    role: str = ""  # produce | consume
    api_key: str = ""  # lower case
    api_version: str = ""  # a number
    client_id: str = ""
    topic: str = ""


@dataclass(frozen=True, slots=True)
class DNSRule:
    """Names that may be asked for: one, or those of a pattern; lower case, no trailing dot."""

    match_name: str = ""
    match_pattern: str = ""

    def matches_name(self, name: str) -> bool:
        return dns_matches(self.match_name, self.match_pattern, name)


@dataclass(frozen=True, slots=True)
class GenericRule:
    """Fields for a parser that only the proxy knows; none: every request."""

    fields: tuple[tuple[str, str], ...] = ()  # sorted


L7Rule = HTTPRule | KafkaRule | DNSRule | GenericRule


@dataclass(frozen=True, slots=True)
class TLSContext:
    """A secret (namespace, name) and the names of the files in it.

    An empty name means the usual one, if the secret has it: ca.crt, tls.crt, tls.key.
    """

    secret: tuple[str, str]
    trusted_ca: str = ""
    certificate: str = ""
    private_key: str = ""


# Parsers of port rules that name no requests but still need the proxy.
PARSER_TLS: Final = "tls"  # TLS contexts or server names only
PARSER_LISTENER: Final = "listener"  # a listener of somebody's own Envoy configuration


@dataclass(frozen=True, slots=True)
class L7Rules:
    """What a proxy must enforce on a port: any of the rules is enough, and without one no request
    passes.

    `parser` is http, kafka, dns, tls, listener, or the l7proto. Under tls and listener there are no
    requests to judge, so there they have no rules and the connection as such is allowed.
    """

    parser: str
    rules: tuple[L7Rule, ...] = ()
    originating_tls: TLSContext | None = None
    terminating_tls: TLSContext | None = None
    server_names: tuple[str, ...] = ()  # of TLS; empty: any
    listener: str = ""  # canonical JSON, for the parser of that name
