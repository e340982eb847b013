"""Whom rules are about, and their peers: by labels, prefixes, entities, names and services."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network
from typing import Final, Literal, Self

from cilia.identity import cidr_prefix
from cilia.labels import (
    CLUSTER_KEY,
    NAMESPACE_KEY,
    SOURCE_ANY,
    SOURCE_K8S,
    SOURCE_RESERVED,
    Labels,
)

Network = IPv4Network | IPv6Network

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
        return self.contains_bits(network.version, int(network.network_address), network.prefixlen)

    def contains_bits(self, version: int, address: int, size: int) -> bool:
        """As `contains`, of a network given by its first address and length."""
        prefix = self.prefix
        if version != prefix.version or size < prefix.prefixlen:
            return False
        bits = prefix.max_prefixlen
        if (address ^ int(prefix.network_address)) >> (bits - prefix.prefixlen):
            return False
        return not any(
            length <= size and (address >> (bits - length) << (bits - length)) in found
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
