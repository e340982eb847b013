"""What a policy document says, as domain types: elements, rules, documents, and their faults.

The types of `selectors` and `requests` are here too, by name.

Everything here is frozen and free of input and output, and knows nothing of text: that becomes
these types in `language`, and only there. What they mean together is decided in `engine`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any, Final, NewType

from cilia.labels import SOURCE_CIDR, Labels
from cilia.policy.requests import (
    PARSER_LISTENER,
    PARSER_TLS,
    DNSRule,
    GenericRule,
    HeaderMatch,
    HTTPRule,
    KafkaRule,
    L7Rule,
    L7Rules,
    Mismatch,
    TLSContext,
)
from cilia.policy.selectors import (
    ENTITIES,
    AbsentSelector,
    CidrSelector,
    EndpointSelector,
    EntitySelector,
    FQDNSelector,
    Network,
    Operator,
    PeerSelector,
    Requirement,
    ServiceSelector,
    dns_matches,
)

RuleID = NewType("RuleID", int)

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
    "Mismatch",
    "NamedPort",
    "Network",
    "Operator",
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
