"""Which connections two sets of policies decide differently, whatever their texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, Literal

from cilia.policy.api import PROTO_ICMP, PROTO_ICMPV6, PROTO_NAMES, Document
from cilia.policy.questions import ports
from cilia.policy.questions.inventory import Inventory
from cilia.policy.questions.matrix import (
    Name,
    alike,
    condition_shape,
    name_shape,
    names,
    of_family,
    order,
    outside,
)
from cilia.policy.questions.ports import PROTOCOLS, Pair, Ranges
from cilia.policy.questions.scene import Cell, Party, Scene, named_entities
from cilia.policy.questions.world import network

# opens: denied before, allowed after; closes: the other way round; requests: allowed in both, under
# other L7 rules
Kind = Literal["opens", "closes", "requests"]
Changes = tuple[tuple[int, int, tuple[Kind, Pair | None, Pair | None]], ...]
ChangedCell = tuple[Changes, ...]


@dataclass(frozen=True, slots=True)
class Flip:
    """What changes between two parties, on one protocol, in one way."""

    src: Name
    dst: Name
    proto: int
    ranges: tuple[tuple[int, int], ...]
    kind: Kind
    before: Pair | None
    after: Pair | None

    def shape(self) -> dict[str, Any]:
        """``{change, src, dst, protocol, ports | types[, l7_before][, l7]}``"""
        typed = self.proto in (PROTO_ICMP, PROTO_ICMPV6)
        shape: dict[str, Any] = {
            "change": self.kind,
            "src": name_shape(self.src),
            "dst": name_shape(self.dst),
            "protocol": PROTO_NAMES[self.proto],
            "types" if typed else "ports": ports.text(self.ranges),
        }
        if self.before is not None:
            shape["l7_before"] = condition_shape(self.before)
        if self.after is not None:
            shape["l7"] = condition_shape(self.after)
        return shape


class Difference:
    """Every connection between parties of an inventory that fares otherwise after than before."""

    def __init__(
        self,
        before: Iterable[Document],
        after: Iterable[Document],
        inventory: Inventory,
        *,
        make: Callable[..., Scene] = Scene,
    ) -> None:
        """`make` makes a scene, as Scene does, with the settings that verdicts depend on."""
        both = tuple(before), tuple(after)
        # Parties must be the same in both scenes, so each tells apart what either does.
        entities = named_entities(x for documents in both for x in documents)
        bare = [Scene(x, Inventory()).engine.cidr_prefixes() for x in both]
        self.before, self.after = (
            make(x, inventory, prefixes=bare[0] | bare[1], entities=entities) for x in both
        )
        self.cells: Final[dict[tuple[Name, Name], ChangedCell]] = {}
        self._memo: Final[dict[tuple[int, int], ChangedCell]] = {}
        self._twin: Final = {
            x.identity: y for x, y in zip(_parties(self.before), _parties(self.after), strict=True)
        }
        parties = (*self.before.endpoints, *self.before.entities)
        for source in parties:
            for destination in parties:
                if source.local or destination.local:
                    cell = self._changes(source, destination)
                    if any(cell):
                        for src in names(source):
                            for dst in names(destination):
                                if src != dst:
                                    self.cells[src, dst] = cell
        self._outside([x for x in parties if x.local])

    def _changes(self, source: Party, destination: Party) -> ChangedCell:
        old = self.before.connection(source, destination)
        new = self.after.connection(self._twin[source.identity], self._twin[destination.identity])
        key = (id(old), id(new))
        found = self._memo.get(key)
        if found is None:
            found = self._memo[key] = changes(old, new)
        return found

    def _outside(self, parties: list[Party]) -> None:
        def kind(party: Party) -> tuple[int, int]:
            twin = self._twin[party.identity]
            return id(self.before.state(party)), id(self.after.state(twin))

        def to(party: Party, region: Party) -> ChangedCell:
            return of_family(self._changes(party, region), region)

        def of(party: Party, region: Party) -> ChangedCell:
            return of_family(self._changes(region, party), region)

        for group in alike(parties, kind):
            called = [name for party in group for name in names(party)]
            for version, block, (cell,) in outside(self.before.regions, [group], to):
                if any(cell):
                    prefix = network(version, block)
                    self.cells.update({(name, prefix): cell for name in called})
            for version, block, (cell,) in outside(self.before.regions, [group], of):
                if any(cell):
                    prefix = network(version, block)
                    self.cells.update({(prefix, name): cell for name in called})

    def __bool__(self) -> bool:
        return bool(self.cells)

    def flips(self) -> Iterator[Flip]:
        """Every change, sorted by source, destination and protocol."""
        for src, dst in sorted(self.cells, key=lambda x: (order(x[0]), order(x[1]))):
            for proto, found in zip(PROTOCOLS, self.cells[src, dst], strict=True):
                by_way: dict[tuple[Kind, Pair | None, Pair | None], list[tuple[int, int]]] = {}
                for first, last, way in found:
                    by_way.setdefault(way, []).append((first, last))
                for (kind, before, after), ranges in by_way.items():
                    yield Flip(src, dst, proto, tuple(ranges), kind, before, after)


def _parties(scene: Scene) -> tuple[Party, ...]:
    return (*scene.endpoints, *scene.entities, *scene.regions)


def changes(old: Cell, new: Cell) -> ChangedCell:
    """What differs between two answers about one pair, protocol by protocol."""
    if old == new:
        return ((),) * len(PROTOCOLS)
    return tuple(_of_ranges(a, b) for a, b in zip(old, new, strict=True))


def _of_ranges(old: Ranges, new: Ranges) -> Changes:
    cuts = sorted({edge for part in (old, new) for a, b, _ in part for edge in (a, b + 1)})
    found: list[tuple[int, int, tuple[Kind, Pair | None, Pair | None]]] = []
    for first, end in pairwise(cuts):
        mine = _at(old, first)
        theirs = _at(new, first)
        if mine == theirs:
            continue
        if mine is None:
            assert theirs is not None
            found.append((first, end - 1, ("opens", None, theirs[0])))
        elif theirs is None:
            found.append((first, end - 1, ("closes", mine[0], None)))
        else:
            found.append((first, end - 1, ("requests", mine[0], theirs[0])))
    return ports.joined(found)


def _at(ranges: Ranges, number: int) -> tuple[Pair | None] | None:
    """The condition at a number, in a tuple; None where nothing is allowed."""
    for first, last, condition in ranges:
        if first <= number <= last:
            return (condition,)
    return None
