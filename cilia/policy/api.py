"""What a policy document says, as domain types: selectors, elements, rules, documents, and their
faults.

Everything here is frozen and free of input and output, and knows nothing of text: that becomes
these types in `language`, and only there. What they mean together is decided in `engine`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from ipaddress import IPv4Network, IPv6Network
from typing import Any, Final, Literal, NewType, Self

from cilia.identity import cidr_prefix
from cilia.labels import (
    CLUSTER_KEY,
    NAMESPACE_KEY,
    SOURCE_ANY,
    SOURCE_CIDR,
    SOURCE_K8S,
    SOURCE_RESERVED,
    Labels,
)

RuleID = NewType("RuleID", int)
Network = IPv4Network | IPv6Network

PROTO_ICMP: Final = 1
PROTO_TCP: Final = 6
PROTO_UDP: Final = 17
PROTO_ICMPV6: Final = 58
PROTO_SCTP: Final = 132
PROTO_NAMES: Final[Mapping[int, str]] = {
    0: "ANY",
    PROTO_ICMP: "ICMP",
    PROTO_TCP: "TCP",
    PROTO_UDP: "UDP",
    PROTO_ICMPV6: "ICMPv6",
    PROTO_SCTP: "SCTP",
}
PROTO_BY_NAME: Final[Mapping[str, int]] = {name.upper(): n for n, name in PROTO_NAMES.items()}
MAX_PORT: Final = 65535


class Kind(StrEnum):
    CNP = "CiliumNetworkPolicy"
    CCNP = "CiliumClusterwideNetworkPolicy"
    NP = "NetworkPolicy"
    RULES = "Rules"


@dataclass(frozen=True, slots=True, order=True)
class Origin:
    """Where something was written. Line and column count from 1; 0: unknown."""

    source: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass(frozen=True, slots=True, order=True)
class Fault:
    """One fault of a document, or one warning about it."""

    document: str  # "CiliumNetworkPolicy default/rule1", or "document 2"
    path: str  # spec.ingress[0].toPorts[0].ports[0].port
    message: str
    origin: Origin

    def __str__(self) -> str:
        column = f":{self.origin.column}" if self.origin.column else ""
        path = f"{self.path}: " if self.path else ""
        return f"{self.origin}{column}: {self.document}: {path}{self.message}"


# ---- selectors

Operator = Literal["In", "NotIn", "Exists", "DoesNotExist"]


@dataclass(frozen=True, slots=True)
class Requirement:
    """One condition on one label. Source ``any`` is satisfied by a label of every source."""

    source: str
    key: str
    operator: Operator
    values: tuple[str, ...] = ()  # sorted

    def matches(self, labels: Labels) -> bool:
        label = labels.get(self.key, self.source)
        match self.operator:
            case "In":
                return label is not None and label.value in self.values
            case "NotIn":  # also when the key is absent, as in Kubernetes
                return label is None or label.value not in self.values
            case "Exists":
                return label is not None
            case "DoesNotExist":
                return label is None

    @property
    def positive(self) -> bool:
        """Whether only labels that have the key can match."""
        return self.operator in ("In", "Exists")

    def __str__(self) -> str:
        name = self.key if self.source == SOURCE_ANY else f"{self.source}:{self.key}"
        match self.operator:
            case "In" if len(self.values) == 1:
                return f"{name}={self.values[0]}" if self.values[0] else name
            case "In":
                return f"{name} in ({', '.join(self.values)})"
            case "NotIn":
                return f"{name} not in ({', '.join(self.values)})"
            case "Exists":
                return f"{name} exists"
            case "DoesNotExist":
                return f"{name} does not exist"


@dataclass(frozen=True, slots=True)
class EndpointSelector:
    """All requirements together. Without any it selects everything, the world included."""

    requirements: tuple[Requirement, ...] = ()
    _hash: int = field(default=0, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        # Selectors are looked up far more often than made.
        object.__setattr__(self, "_hash", hash(self.requirements))

    def __hash__(self) -> int:
        return self._hash

    @classmethod
    def equal(cls, key: str, value: str = "", source: str = SOURCE_ANY) -> Self:
        return cls((Requirement(source, key, "In", (value,)),))

    @classmethod
    def reserved(cls, name: str) -> Self:
        return cls.equal(name, source=SOURCE_RESERVED)

    def matches(self, labels: Labels) -> bool:
        return all(requirement.matches(labels) for requirement in self.requirements)

    def plus(self, *requirements: Requirement) -> EndpointSelector:
        added = tuple(x for x in requirements if x not in self.requirements)
        return EndpointSelector(self.requirements + added) if added else self

    def mentions(self, key: str, *sources: str) -> bool:
        """Whether some requirement is about this key, under one of these sources (if given)."""
        return any(x.key == key and (not sources or x.source in sources) for x in self.requirements)

    def mentions_source(self, source: str) -> bool:
        return any(x.source == source for x in self.requirements)

    @property
    def wildcard(self) -> bool:
        return not self.requirements

    def __str__(self) -> str:
        return ", ".join(str(x) for x in self.requirements) or "everything"


@dataclass(frozen=True, slots=True)
class CidrSelector:
    """A prefix without its exceptions: CIDR identities and the world, no managed peer."""

    prefix: Network
    excepts: tuple[Network, ...] = ()
    # Exceptions by length, then by address: a list may hold tens of thousands.
    _holes: Mapping[int, frozenset[int]] = field(init=False, compare=False, repr=False)
    _hash: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        holes: dict[int, set[int]] = {}
        for network in self.excepts:
            holes.setdefault(network.prefixlen, set()).add(int(network.network_address))
        frozen = {length: frozenset(found) for length, found in holes.items()}
        object.__setattr__(self, "_holes", frozen)
        object.__setattr__(self, "_hash", hash((self.prefix, self.excepts)))

    def __hash__(self) -> int:
        return self._hash

    def matches(self, labels: Labels) -> bool:
        network = cidr_prefix(labels)
        return network is not None and self.contains(network)

    def contains(self, network: Network) -> bool:
        """Whether all of the network is selected: inside the prefix, inside no exception."""
        prefix = self.prefix
        if network.version != prefix.version or network.prefixlen < prefix.prefixlen:
            return False
        bits, address = prefix.max_prefixlen, int(network.network_address)
        if (address ^ int(prefix.network_address)) >> (bits - prefix.prefixlen):
            return False
        return not any(
            length <= network.prefixlen and (address >> (bits - length) << (bits - length)) in found
            for length, found in self._holes.items()
        )

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.excepts[:3])) + (", ..." if len(self.excepts) > 3 else "")
        return f"{self.prefix}{f' except {shown}' if self.excepts else ''}"


_RESERVED_ENTITIES: Final = (
    "host",
    "remote-node",
    "world",
    "world-ipv4",
    "world-ipv6",
    "init",
    "unmanaged",
    "health",
    "ingress",
    "kube-apiserver",
)
ENTITIES: Final = (*_RESERVED_ENTITIES, "cluster", "all", "none")


@dataclass(frozen=True, slots=True)
class EntitySelector:
    """A name for a group of peers; what it selects depends on the name of the cluster."""

    entity: str

    def expand(self, cluster_name: str) -> tuple[EndpointSelector, ...]:
        """The selectors it stands for; any of them is enough."""
        match self.entity:
            case "all":
                return (EndpointSelector(),)
            case "none":
                return ()
            case "cluster":
                names = (
                    "host",
                    "remote-node",
                    "init",
                    "unmanaged",
                    "health",
                    "ingress",
                    "kube-apiserver",
                )
                return (
                    *(EndpointSelector.reserved(name) for name in names),
                    EndpointSelector.equal(CLUSTER_KEY, cluster_name, SOURCE_K8S),
                    # Endpoints that were never given a cluster's name are of this one: a foreign
                    # endpoint always carries the name of its own.
                    EndpointSelector(
                        (
                            Requirement(SOURCE_K8S, NAMESPACE_KEY, "Exists"),
                            Requirement(SOURCE_K8S, CLUSTER_KEY, "DoesNotExist"),
                        )
                    ),
                )
            case name:
                return (EndpointSelector.reserved(name),)

    def __str__(self) -> str:
        return f"entity {self.entity}"


@dataclass(frozen=True, slots=True)
class FQDNSelector:
    """The addresses that DNS answered for a name, or for the names of a pattern.

    Exactly one of the two is given, in lower case, without the trailing dot. Labels match it never:
    only a table of DNS answers says who it selects.
    """

    match_name: str = ""
    match_pattern: str = ""

    def matches_name(self, name: str) -> bool:
        """Whether a DNS name is meant, in any case, with or without the trailing dot."""
        return dns_matches(self.match_name, self.match_pattern, name)

    def matches(self, labels: Labels) -> bool:
        return False

    def __str__(self) -> str:
        return f"FQDN {self.match_name or self.match_pattern}"


@dataclass(frozen=True, slots=True)
class ServiceSelector:
    """The backends of services: one by name, or all whose labels a selector matches.

    An empty namespace means every namespace. Labels match it never: only a table of services says
    who it selects.
    """

    namespace: str = ""
    name: str = ""
    selector: EndpointSelector | None = None  # of the services' own labels; instead of the name

    def matches(self, labels: Labels) -> bool:
        return False

    def __str__(self) -> str:
        what = self.name if self.selector is None else f"with {self.selector}"
        return f"service {self.namespace + '/' if self.namespace else ''}{what}"


@dataclass(frozen=True, slots=True)
class AbsentSelector:
    """Peers that nothing can resolve (groups of a cloud, nodes by label): they select nobody."""

    what: str  # toGroups
    text: str  # as written, canonical JSON

    def matches(self, labels: Labels) -> bool:
        return False

    def __str__(self) -> str:
        return f"{self.what} {self.text}"


PeerSelector = (
    EndpointSelector
    | CidrSelector
    | EntitySelector
    | FQDNSelector
    | ServiceSelector
    | AbsentSelector
)


def dns_matches(match_name: str, match_pattern: str, name: str) -> bool:
    """Whether a DNS name is the name, or of the pattern (the one of them that is not empty).

    In a pattern ``*`` stands for any characters of one label, or none; alone it is every name.
    ``**.`` at the start stands for one or more labels.
    """
    name = name.lower().removesuffix(".")
    if match_name:
        return name == match_name
    if match_pattern == "*":
        return True
    head, rest = ("", match_pattern)
    if match_pattern.startswith("**."):
        head, rest = r"([-a-z0-9_]+\.)+", match_pattern[3:]
    parts = (re.escape(part) for part in re.split(r"\*+", rest))
    return re.fullmatch(head + "[-a-z0-9_]*".join(parts), name) is not None


# ---- L4


@dataclass(frozen=True, slots=True, order=True)
class L4:
    """A range of destination ports of one protocol; of ICMP, a range of types."""

    proto: int
    first: int = 0
    last: int = MAX_PORT

    def contains(self, proto: int, port: int) -> bool:
        return self.proto == proto and self.first <= port <= self.last

    def __str__(self) -> str:
        name = PROTO_NAMES.get(self.proto, str(self.proto))
        if (self.first, self.last) == (0, MAX_PORT):
            return f"every port/{name}"
        what = "type " if self.proto in (PROTO_ICMP, PROTO_ICMPV6) else ""
        ports = str(self.first) if self.first == self.last else f"{self.first}-{self.last}"
        return f"{what}{ports}/{name}"


@dataclass(frozen=True, slots=True, order=True)
class NamedPort:
    """A port by the name that the destination endpoint gave it; protocol 0 is any of its own."""

    name: str
    proto: int

    def __str__(self) -> str:
        return f"{self.name}/{PROTO_NAMES.get(self.proto, str(self.proto))}"


# ---- L7: carried to the proxies, which enforce it

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


# ---- rules


@dataclass(frozen=True, slots=True)
class PortRule:
    """Ports, and what a proxy must enforce on them: one entry of toPorts or icmps.

    Its origin is that of its element, unless it has L7 rules.
    """

    l4: tuple[L4, ...] = ()
    named: tuple[NamedPort, ...] = ()
    l7: L7Rules | None = None
    path: str = ""
    origin: Origin = field(default_factory=lambda: Origin(""))


def unenforced_parts(rule: PortRule) -> tuple[str, ...]:
    """What of a port rule nobody enforces without a proxy, each as why."""
    if rule.l7 is not None:
        what = {PARSER_TLS: "TLS contexts and server names", PARSER_LISTENER: "listeners"}
        parser = what.get(rule.l7.parser, f"{rule.l7.parser} rules")
        return (f"{parser} have no proxy to enforce them yet",)
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Element:
    """One entry of ingress, egress, ingressDeny or egressDeny: peers AND ports."""

    egress: bool
    deny: bool
    path: str
    origin: Origin
    peers: tuple[PeerSelector, ...] | None = None  # None: no peer kind given; (): nobody
    ports: tuple[PortRule, ...] | None = None  # None: no ports given; (): no traffic
    requires: tuple[EndpointSelector, ...] | None = None
    unenforced: str = ""  # why the whole element allows nothing, if so

    @property
    def l4(self) -> tuple[L4, ...] | None:
        """The ports that need neither a proxy nor a name resolved. None: no ports given."""
        if self.ports is None:
            return None
        return tuple(dict.fromkeys(x for rule in self.ports if rule.l7 is None for x in rule.l4))

    @property
    def grants_nothing(self) -> bool:
        """Whether it selects no traffic whatever the peers: then it only isolates."""
        if self.unenforced or self.l4 == () or self.peers == ():
            return True
        return self.peers is None and (self.ports is None or self.requires is not None)

    def peers_text(self) -> str:
        if self.peers is None:
            return "everyone"
        return " or ".join(str(x) for x in self.peers) or "nobody"

    def l4_text(self) -> str:
        if self.l4 is None:
            return "everything"
        return ", ".join(str(x) for x in self.l4) or "nothing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One spec: the endpoints it is about and what it says of them.

    With `node` it is about the nodes themselves that the selector matches (host policy), and about
    no endpoint.
    """

    selector: EndpointSelector
    node: bool = False
    elements: tuple[Element, ...]
    path: str
    origin: Origin
    # Where each isolating list begins; None: the rule does not isolate in that direction.
    isolates_ingress: tuple[str, Origin] | None = None
    isolates_egress: tuple[str, Origin] | None = None
    labels: Labels = field(default_factory=Labels)
    description: str = ""

    def isolates(self, egress: bool) -> tuple[str, Origin] | None:
        return self.isolates_egress if egress else self.isolates_ingress


@dataclass(frozen=True, slots=True, order=True)
class DocumentKey:
    kind: str
    namespace: str  # "" for what has none
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace + '/' if self.namespace else ''}{self.name}"


@dataclass(frozen=True, kw_only=True)
class Document:
    """One policy document.

    `body` is the document as given, as compact JSON; `origins` says where its rules and elements
    stood, by path. The two and the name are all that is stored: `rules` follows from them.
    """

    kind: str
    namespace: str | None
    name: str
    rules: tuple[Rule, ...] = field(compare=False, repr=False)
    body: bytes = field(repr=False)
    origin: Origin
    origins: tuple[tuple[str, Origin], ...] = field(default=(), repr=False)
    # Only report what its rules would deny by default (annotation cilia.io/audit: "true").
    audit: bool = False

    @cached_property
    def key(self) -> DocumentKey:
        return DocumentKey(self.kind, self.namespace or "", self.name)

    @property
    def ref(self) -> str:
        """``CiliumNetworkPolicy default/rule1``."""
        return str(self.key)

    def to_json(self) -> bytes:
        """Everything, origins too; document_from_json() gives an equal document back."""
        envelope: dict[str, Any] = {
            "kind": self.kind,
            "namespace": self.namespace,
            "name": self.name,
            "source": self.origin.source,
            "origin": [self.origin.line, self.origin.column],
            "origins": {path: [o.line, o.column] for path, o in self.origins},
        }
        head = json.dumps(envelope, separators=(",", ":"))
        return b'%s,"body":%s}' % (head[:-1].encode(), self.body)


class DocumentError(ValueError):
    """Stored bytes that are no valid document; `faults` says why."""

    def __init__(self, faults: tuple[Fault, ...]) -> None:
        super().__init__("; ".join(map(str, faults[:5])))
        self.faults = faults


@dataclass(frozen=True, slots=True)
class ParseResult:
    """All or nothing: with faults, there are no documents."""

    documents: tuple[Document, ...] = ()
    faults: tuple[Fault, ...] = ()
    warnings: tuple[Fault, ...] = ()


@dataclass(frozen=True, slots=True, order=True)
class RuleRef:
    """A rule as people find it: the policy, the place in it, and the file and line."""

    rule_id: RuleID
    policy: str
    path: str
    origin: Origin

    def __str__(self) -> str:
        return f"{self.policy} {self.path} ({self.origin})"


__all__ = [
    "ENTITIES",
    "L4",
    "MAX_PORT",
    "PARSER_LISTENER",
    "PARSER_TLS",
    "PROTO_BY_NAME",
    "PROTO_NAMES",
    "SOURCE_CIDR",
    "AbsentSelector",
    "CidrSelector",
    "DNSRule",
    "Document",
    "DocumentError",
    "DocumentKey",
    "Element",
    "EndpointSelector",
    "EntitySelector",
    "FQDNSelector",
    "Fault",
    "GenericRule",
    "HTTPRule",
    "HeaderMatch",
    "KafkaRule",
    "Kind",
    "L7Rule",
    "L7Rules",
    "NamedPort",
    "Network",
    "Origin",
    "ParseResult",
    "PeerSelector",
    "PortRule",
    "Requirement",
    "Rule",
    "RuleID",
    "RuleRef",
    "ServiceSelector",
    "TLSContext",
    "dns_matches",
    "unenforced_parts",
]
