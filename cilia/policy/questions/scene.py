"""Documents and endpoints together: one engine that knows every party of a question.

A *party* is who may talk: endpoints of equal labels and port names count as one, the host and the
other entities that policies name, and the regions outside. A connection is judged at both ends, at
each by what the engine would program into that end's policy map.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_network
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
from cilia.policy.api import Document, EndpointSelector, EntitySelector, Network
from cilia.policy.engine import Mode, PolicyEngine, is_subject
from cilia.policy.mapstate import MapState
from cilia.policy.questions import ports
from cilia.policy.questions.inventory import EndpointPort, Inventory, InventoryEndpoint
from cilia.policy.questions.ports import PROTOCOLS, Ranges

_FIRST_ENDPOINT: Final = 1 << 8
# They are the world, which is shown as prefixes.
_OUTSIDE: Final = frozenset(("world", "world-ipv4", "world-ipv6"))
WORLDS: Final = (ip_network("0.0.0.0/0"), ip_network("::/0"))

# What a connection may use: the ranges of each of PROTOCOLS, in that order.
Cell = tuple[Ranges, ...]
OPEN: Final[Cell] = tuple(((*ports.bounds(proto), None),) for proto in PROTOCOLS)
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
    entity: str = ""
    prefix: Network | None = None

    @property
    def local(self) -> bool:
        """Whether the node sees its traffic whoever the other end is."""
        return self.kind == "endpoint" or self.entity == "host"


class Scene:
    """An engine with documents, and every party entered into it."""

    def __init__(
        self,
        documents: Iterable[Document],
        inventory: Inventory,
        *,
        mode: Mode = "default",
        allow_localhost: bool = True,
        prefixes: Iterable[Network] = (),
        entities: Iterable[str] = (),
    ) -> None:
        """`prefixes` and `entities` are told apart beside those that the documents name."""
        self.inventory: Final = inventory
        self.engine: Final = PolicyEngine(mode, allow_localhost)
        self.engine.set_documents(documents)
        self.endpoints: Final = self._grouped()
        self.host: Final = Party("entity", HOST, inventory.host, entity="host")
        names = {*named_entities(self.engine.documents()), *entities} - {"host"}
        self.entities: Final = (
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
            self.engine.add_identity(party.identity, party.labels)
        self._states: Final[dict[int, MapState | None]] = {}
        self._decoded: Final[dict[tuple[int, int, bool], Cell]] = {}
        self._met: Final[dict[tuple[int, int], Cell]] = {}
        self._cells: Final[dict[Cell, Cell]] = {OPEN: OPEN, CLOSED: CLOSED}

    def _grouped(self) -> tuple[Party, ...]:
        groups: dict[tuple[Labels, tuple[EndpointPort, ...]], list[InventoryEndpoint]] = {}
        for endpoint in self.inventory.endpoints:
            named = tuple(sorted({x for x in endpoint.ports if x.name}))
            groups.setdefault((endpoint.labels, named), []).append(endpoint)
        return tuple(
            Party("endpoint", _FIRST_ENDPOINT + i, labels, tuple(members), named)
            for i, ((labels, named), members) in enumerate(groups.items())
        )

    def state(self, party: Party) -> MapState | None:
        """What would be in the party's policy map; None when no policy judges its traffic."""
        if party.identity not in self._states:
            judged = party.kind != "prefix" and is_subject(party.labels)
            self._states[party.identity] = (
                self.engine.resolve(party.labels).mapstate if judged else None
            )
        return self._states[party.identity]

    def side(self, party: Party, peer: Party, *, egress: bool) -> Cell:
        """What one end lets pass."""
        state = self.state(party)
        if state is None:
            return OPEN
        mine, everyone = state.block(peer.identity), state.block(0)
        key = (id(mine), id(everyone), egress)
        cell = self._decoded.get(key)
        if cell is None:
            cell = tuple(ports.allowed(mine, everyone, egress, proto) for proto in PROTOCOLS)
            cell = self._decoded[key] = self._cells.setdefault(cell, cell)
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
