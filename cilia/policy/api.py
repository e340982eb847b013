"""What a policy document says, as domain types: selectors, elements, rules, documents, and their
faults.

Everything here is frozen and free of input and output. Text becomes these types in `language`, and
only there; what they mean together is decided in `engine`.
"""

from __future__ import annotations

import json
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
class AbsentSelector:
    """Peers that nothing can resolve yet (FQDNs, services, groups): they select nobody."""

    what: str  # toFQDNs
    text: str  # as written, canonical JSON

    def matches(self, labels: Labels) -> bool:
        return False

    def __str__(self) -> str:
        return f"{self.what} {self.text}"


PeerSelector = EndpointSelector | CidrSelector | EntitySelector | AbsentSelector


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


@dataclass(frozen=True, slots=True)
class CarriedPorts:
    """A port rule whose enforcer is not there: it allows nothing until one is."""

    why: str  # "http rules", "named port \"web\""
    l4: tuple[L4, ...]
    text: str  # the port rule as written, canonical JSON


# ---- rules


@dataclass(frozen=True, slots=True, kw_only=True)
class Element:
    """One entry of ingress, egress, ingressDeny or egressDeny: peers AND ports."""

    egress: bool
    deny: bool
    path: str
    origin: Origin
    peers: tuple[PeerSelector, ...] | None = None  # None: no peer kind given; (): nobody
    l4: tuple[L4, ...] | None = None  # None: no ports given; (): no traffic
    requires: tuple[EndpointSelector, ...] | None = None
    carried: tuple[CarriedPorts, ...] = ()
    unenforced: str = ""  # why the whole element allows nothing, if so

    @property
    def grants_nothing(self) -> bool:
        """Whether it selects no traffic whatever the peers: then it only isolates."""
        if self.unenforced or self.l4 == () or self.peers == ():
            return True
        return self.peers is None and (self.l4 is None or self.requires is not None)

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
    """One spec: the endpoints it is about and what it says of them."""

    selector: EndpointSelector
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

    @cached_property
    def key(self) -> DocumentKey:
        return DocumentKey(self.kind, self.namespace or "", self.name)

    @property
    def ref(self) -> str:
        """``CiliumNetworkPolicy default/rule1``."""
        return str(self.key)

    def to_json(self) -> bytes:
        """Everything, origins too; from_json() gives an equal document back."""
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

    @staticmethod
    def from_json(data: bytes | str) -> Document:
        """Undo to_json(). Raises DocumentError when the stored bytes are not a valid document."""
        from cilia.policy.language import document_from_json

        return document_from_json(data)

    @staticmethod
    def from_parts(
        *,
        kind: str,
        namespace: str | None,
        name: str,
        body: bytes,
        origin: Origin,
        origins: Mapping[str, Origin] | tuple[tuple[str, Origin], ...] = (),
    ) -> Document:
        """Build from stored parts. Raises DocumentError."""
        from cilia.policy.language import document_from_parts

        return document_from_parts(
            kind=kind,
            namespace=namespace,
            name=name,
            body=body,
            origin=origin,
            origins=dict(origins),
        )


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
    "PROTO_BY_NAME",
    "PROTO_NAMES",
    "SOURCE_CIDR",
    "AbsentSelector",
    "CarriedPorts",
    "CidrSelector",
    "Document",
    "DocumentError",
    "DocumentKey",
    "Element",
    "EndpointSelector",
    "EntitySelector",
    "Fault",
    "Kind",
    "Network",
    "Origin",
    "ParseResult",
    "PeerSelector",
    "Requirement",
    "Rule",
    "RuleID",
    "RuleRef",
]
