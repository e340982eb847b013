"""Documents and endpoints together: one engine that knows every party of a question.

A *party* is who may talk: endpoints of equal labels and port names count as one, the host and the
other entities that policies name, and the regions outside. A connection is judged at both ends, at
each by what the engine would program into that end's policy map.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv4Address, IPv6Address, ip_network
from typing import Final, Literal

from cilia.identity import (
    HOST,
    LOCAL_SCOPE,
    RESERVED_BY_NAME,
    WORLD_IPV4,
    WORLD_IPV6,
    cidr_labels,
    reserved_labels,
)
from cilia.labels import SOURCE_RESERVED, Labels
from cilia.policy.api import Document, EndpointSelector, EntitySelector, Network, Rule
from cilia.policy.engine import Mode, PolicyEngine, ResolvedPolicy, is_node, is_subject
from cilia.policy.l7 import ALL_PARSERS
from cilia.policy.mapstate import Block, MapState
from cilia.policy.questions import ports
from cilia.policy.questions.inventory import (
    DEFAULT_CLUSTER,
    EndpointPort,
    Inventory,
    InventoryEndpoint,
    port_names,
)
from cilia.policy.questions.ports import PROTOCOLS, Ranges, Side

_FIRST_ENDPOINT: Final = 1 << 8
# They are the world, which is shown as prefixes.
_OUTSIDE: Final = frozenset(("world", "world-ipv4", "world-ipv6"))
WORLDS: Final = (ip_network("0.0.0.0/0"), ip_network("::/0"))

# What a connection may use: the ranges of each of PROTOCOLS, in that order.
Cell = tuple[Ranges, ...]
HalfCell = tuple[Side, ...]
OPEN: Final[HalfCell] = tuple(((*ports.bounds(proto), None),) for proto in PROTOCOLS)
CLOSED: Final[Cell] = ((),) * len(PROTOCOLS)
Kind = Literal["endpoint", "entity", "prefix"]


@dataclass(frozen=True, slots=True, eq=False)
class Party:
    """Who may talk. Parties of one scene are equal only to themselves."""

    kind: Kind
    identity: int
    labels: Labels
    members: tuple[InventoryEndpoint, ...] = ()
    ports: tuple[EndpointPort, ...] = ()
    mode: Mode | None = None  # None: the scene's
    entity: str = ""
    prefix: Network | None = None

    @property
    def local(self) -> bool:
        """Whether the node sees its traffic whoever the other end is."""
        return self.kind == "endpoint" or self.entity == "host"


@dataclass(frozen=True, slots=True, eq=False)
class PlacedRule:
    """A rule and the document it stands in."""

    document: Document
    rule: Rule


class Scene:
    """An engine with documents, and every party entered into it."""

    def __init__(
        self,
        documents: Iterable[Document],
        inventory: Inventory,
        *,
        mode: Mode = "default",
        allow_localhost: bool = True,
        cluster_name: str = DEFAULT_CLUSTER,
        parsers: Iterable[str] | None = None,
        prefixes: Iterable[Network] = (),
        entities: Iterable[str] = (),
    ) -> None:
        """`parsers` are those whose L7 rules somebody enforces; None: whoever would be needed is
        taken to be there. `prefixes` and `entities` are told apart beside those that the documents
        name.
        """
        self.inventory: Final = inventory
        documents = tuple(documents)
        if parsers is None:
            parsers = ALL_PARSERS | {
                port.l7.parser
                for document in documents
                for rule in document.rules
                for element in rule.elements
                for port in element.ports or ()
                if port.l7 is not None
            }
        self.engine: Final = PolicyEngine(mode, allow_localhost, cluster_name, enforcers=parsers)
        self.engine.set_documents(documents)
        self.endpoints: Final = self._grouped()
        self.host: Final = Party("entity", HOST, inventory.host, entity="host")
        names = {*named_entities(self.engine.documents()), *entities} - {"host"}
        self.entities: tuple[Party, ...] = (
            self.host,
            *(
                Party("entity", number, reserved_labels(number), entity=name)
                for name, number in RESERVED_BY_NAME.items()
                if name in names
            ),
        )
        known = {x for x in (*self.engine.cidr_prefixes(), *prefixes) if x.prefixlen}
        order = sorted(known, key=lambda x: (x.version, int(x.network_address), x.prefixlen))
        self.regions: Final = (
            Party("prefix", WORLD_IPV4, reserved_labels(WORLD_IPV4), prefix=WORLDS[0]),
            Party("prefix", WORLD_IPV6, reserved_labels(WORLD_IPV6), prefix=WORLDS[1]),
            *(
                Party("prefix", LOCAL_SCOPE + 1 + i, cidr_labels(prefix), prefix=prefix)
                for i, prefix in enumerate(order)
            ),
        )
        for party in (*self.endpoints, *self.entities, *self.regions):
            self._introduce(party)
        self._next: int = _FIRST_ENDPOINT + len(self.endpoints)
        self._guests: Final[dict[tuple[Labels, tuple[EndpointPort, ...]], Party]] = {}
        self._policies: Final[dict[int, ResolvedPolicy | None]] = {}
        # By the identity of the blocks, which are kept so that no other takes their place.
        self._decoded: Final[dict[tuple[int, int, bool], tuple[HalfCell, Block, Block]]] = {}
        self._sides: Final[dict[HalfCell, HalfCell]] = {OPEN: OPEN}
        self._met: Final[dict[tuple[int, int], Cell]] = {}
        self._cells: Final[dict[Cell, Cell]] = {CLOSED: CLOSED}

    def _grouped(self) -> tuple[Party, ...]:
        groups: dict[
            tuple[Labels, tuple[EndpointPort, ...], Mode | None], list[InventoryEndpoint]
        ] = {}
        for endpoint in self.inventory.endpoints:
            named = tuple(sorted({x for x in endpoint.ports if x.name}))
            groups.setdefault((endpoint.labels, named, endpoint.mode), []).append(endpoint)
        return tuple(
            Party("endpoint", _FIRST_ENDPOINT + i, labels, tuple(members), named, mode)
            for i, ((labels, named, mode), members) in enumerate(groups.items())
        )

    # ---- who is asked about

    def party_of(self, endpoint: InventoryEndpoint) -> Party:
        """The party that an endpoint of the inventory is a member of."""
        return next(x for x in self.endpoints if endpoint in x.members)

    def entity(self, name: str) -> Party | None:
        """The party of a reserved identity; None for a name that is none."""
        if name in ("world-ipv4", "world-ipv6"):
            return self.regions[name == "world-ipv6"]
        number = RESERVED_BY_NAME.get(name)
        if number is None:
            return None
        found = next((x for x in self.entities if x.entity == name), None)
        if found is None:
            found = Party("entity", number, reserved_labels(number), entity=name)
            self._enter(found)
            self.entities = (*self.entities, found)
        return found

    def region(self, address: IPv4Address | IPv6Address) -> Party:
        """What an address outside belongs to: the longest prefix that rules name, or the world."""
        inside = (
            x
            for x in self.regions
            if x.prefix is not None and x.prefix.version == address.version and address in x.prefix
        )
        return max(inside, key=lambda x: x.prefix.prefixlen if x.prefix is not None else 0)

    def guest(
        self, labels: Labels, named: tuple[EndpointPort, ...] = (), mode: Mode | None = None
    ) -> Party:
        """A party known by its labels only, of the inventory if somebody there has just these."""
        for party in (*self.endpoints, *self.entities):
            if (
                party.labels == labels
                and (party.ports == named or not named)
                and (party.mode == mode or not mode)
            ):
                return party
        found = self._guests.get((labels, named))
        if found is None:
            found = self._guests[labels, named] = Party("endpoint", self._next, labels, (), named)
            self._next += 1
            self._enter(found)
        return found

    def _introduce(self, party: Party) -> None:
        self.engine.add_identity(party.identity, party.labels)
        if party.ports:
            self.engine.set_port_names(party.identity, port_names(party.ports))

    def _enter(self, party: Party) -> None:
        self._introduce(party)
        self._policies.clear()  # snapshots from before do not know it

    # ---- rules

    def judges(self, placed: PlacedRule, party: Party) -> bool:
        """Whether a rule is about a party's traffic."""
        if party.kind == "prefix" or placed.rule.node != is_node(party.labels):
            return False
        return (placed.rule.node or is_subject(party.labels)) and placed.rule.selector.matches(
            party.labels
        )

    @cached_property
    def rules(self) -> tuple[PlacedRule, ...]:
        """Every rule of every document."""
        return tuple(PlacedRule(x, rule) for x in self.engine.documents() for rule in x.rules)

    # ---- answers

    def policy(self, party: Party) -> ResolvedPolicy | None:
        """What policy means for a party; None when no policy judges its traffic."""
        if party.identity not in self._policies:
            judged = party.kind != "prefix" and self.engine.judges(party.labels)
            self._policies[party.identity] = (
                self.engine.resolve(
                    party.labels, mode=party.mode, named_ports=port_names(party.ports)
                )
                if judged
                else None
            )
        return self._policies[party.identity]

    def state(self, party: Party) -> MapState | None:
        """The rows of a party's policy map; parties of equal rows may share the object."""
        policy = self.policy(party)
        return policy.mapstate if policy is not None else None

    def side(self, party: Party, peer: Party, *, egress: bool) -> HalfCell:
        """What one end lets pass."""
        state = self.state(party)
        if state is None:
            return OPEN
        mine, everyone = state.block(peer.identity), state.block(0)
        key = (id(mine), id(everyone), egress)
        if (known := self._decoded.get(key)) is not None:
            return known[0]
        cell = tuple(ports.allowed(mine, everyone, egress, proto) for proto in PROTOCOLS)
        cell = self._sides.setdefault(cell, cell)
        self._decoded[key] = cell, mine, everyone
        return cell

    def connection(self, source: Party, destination: Party) -> Cell:
        """What both ends let pass. Equal answers of one scene are the same object."""
        out = self.side(source, destination, egress=True)
        in_ = self.side(destination, source, egress=False)
        key = (id(out), id(in_))
        cell = self._met.get(key)
        if cell is None:
            cell = tuple(ports.both(a, b) for a, b in zip(out, in_, strict=True))
            cell = self._met[key] = self._cells.setdefault(cell, cell)
        return cell


def named_entities(documents: Iterable[Document]) -> frozenset[str]:
    """The reserved identities that rules name one by one, the world's aside."""
    found: set[str] = set()
    for document in documents:
        for rule in document.rules:
            for element in rule.elements:
                for peer in (*(element.peers or ()), *(element.requires or ())):
                    match peer:
                        case EntitySelector(entity):
                            found.add(entity)
                        case EndpointSelector(requirements):
                            found.update(
                                x.key
                                for x in requirements
                                if x.source == SOURCE_RESERVED and x.positive
                            )
                        case _:
                            pass
    return frozenset(found & set(RESERVED_BY_NAME)) - _OUTSIDE
