"""Who may talk to whom on what: every pair of parties, under all policies at once.

A connection is in the matrix when the egress of its source and the ingress of its destination allow
it; what is missing is denied. Pairs of which no end is an endpoint or the host are not asked about:
no policy judges them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from cilia.policy.api import PROTO_ICMP, PROTO_ICMPV6, PROTO_NAMES, Network
from cilia.policy.questions import ports
from cilia.policy.questions.ports import PROTOCOLS, Pair
from cilia.policy.questions.scene import CLOSED, WORLDS, Cell, Party, Scene
from cilia.policy.questions.world import Block, network, partition

Name = str | Network
A = TypeVar("A", bound=Hashable)
T = TypeVar("T")
# Prefixes times parties, up to which all parties share one split of the outside.
MAX_SHARED: Final = 100_000
_TYPED: Final = (PROTO_ICMP, PROTO_ICMPV6)
_FOREIGN: Final = {4: PROTO_ICMPV6, 6: PROTO_ICMP}


@dataclass(frozen=True, slots=True)
class Row:
    """What one party may send another: ports of one protocol, under one condition."""

    src: Name
    dst: Name
    proto: int
    ranges: tuple[tuple[int, int], ...]
    condition: Pair | None = None

    def shape(self) -> dict[str, Any]:
        """``{src, dst, protocol, ports | types[, l7]}``, the documented form."""
        shape: dict[str, Any] = {
            "src": name_shape(self.src),
            "dst": name_shape(self.dst),
            "protocol": PROTO_NAMES[self.proto],
            "types" if self.proto in _TYPED else "ports": ports.text(self.ranges),
        }
        if self.condition is not None:
            shape["l7"] = condition_shape(self.condition)
        return shape


def name_shape(name: Name) -> str | dict[str, str]:
    """``namespace/name``, ``reserved:host``, or ``{cidr}``."""
    return name if isinstance(name, str) else {"cidr": str(name)}


def condition_shape(condition: Pair) -> list[dict[str, Any]]:
    """The L7 rules of each end that has some; a request must pass all of them."""
    return [
        {"direction": direction, **found.shape()}
        for direction, found in zip(("egress", "ingress"), condition, strict=True)
        if found is not None
    ]


class Matrix:
    """The answer: a cell for each pair of names, those where nothing is allowed left out."""

    def __init__(self, scene: Scene) -> None:
        self.scene: Final = scene
        self.cells: Final[dict[tuple[Name, Name], Cell]] = {}
        #: Whether all rows have the same prefixes, disjoint over the whole matrix.
        self.shared = True
        parties = (*scene.endpoints, *scene.entities)
        for source in parties:
            for destination in parties:
                if source.local or destination.local:
                    self._put(source, destination)
        self.prefixes: Final = self._regions([x for x in parties if x.local])
        self._local: Final = {name for x in parties if x.local for name in names(x)}
        self.parties: Final[tuple[Name, ...]] = (
            *sorted((name for x in parties for name in names(x)), key=order),
            *self.prefixes,
        )

    def asked(self, src: Name, dst: Name) -> bool:
        """Whether policy judges connections between the two at all."""
        return src != dst and (src in self._local or dst in self._local)

    def _put(self, source: Party, destination: Party) -> None:
        cell = self.scene.connection(source, destination)
        if cell is CLOSED:
            return
        for src in names(source):
            for dst in names(destination):
                if src != dst:
                    self.cells[src, dst] = cell

    def _regions(self, parties: list[Party]) -> tuple[Network, ...]:
        """Connections from and to outside; gives the prefixes that the outside was split into."""
        scene = self.scene

        def to(party: Party, region: Party) -> Cell:
            return of_family(scene.connection(party, region), region)

        def of(party: Party, region: Party) -> Cell:
            return of_family(scene.connection(region, party), region)

        groups = alike(parties, lambda party: id(scene.state(party)))
        called = [[name for party in group for name in names(party)] for group in groups]
        split = list(outside(scene.regions, groups, lambda a, b: (to(a, b), of(a, b))))
        if len(split) * sum(map(len, called)) <= MAX_SHARED:
            found = [(network(version, block), answers) for version, block, answers in split]
            for prefix, answers in found:
                for mine, (out, in_) in zip(called, answers, strict=True):
                    self._outside(mine, prefix, out, in_)
            return tuple(prefix for prefix, _ in found)
        self.shared = False
        used: dict[Network, None] = {}
        for group, mine in zip(groups, called, strict=True):
            for answer, away in ((to, True), (of, False)):
                for version, block, (cell,) in outside(scene.regions, [group], answer):
                    if any(cell):
                        prefix = network(version, block)
                        self._outside(mine, prefix, cell if away else (), () if away else cell)
                        used[prefix] = None
        return tuple(sorted(used, key=order))

    def _outside(self, mine: list[Name], prefix: Network, out: Cell, in_: Cell) -> None:
        for name in mine:
            if any(out):
                self.cells[name, prefix] = out
            if any(in_):
                self.cells[prefix, name] = in_

    def rows(self) -> Iterator[Row]:
        """Every row, sorted by source, destination and protocol."""
        tails: dict[int, list[tuple[int, tuple[tuple[int, int], ...], Pair | None]]] = {}
        for src, dst in sorted(self.cells, key=lambda x: (order(x[0]), order(x[1]))):
            cell = self.cells[src, dst]
            found = tails.get(id(cell))
            if found is None:
                found = tails[id(cell)] = list(_tails(cell))
            for proto, ranges, condition in found:
                yield Row(src, dst, proto, ranges, condition)


def _tails(cell: Cell) -> Iterator[tuple[int, tuple[tuple[int, int], ...], Pair | None]]:
    for proto, ranges in zip(PROTOCOLS, cell, strict=True):
        by_condition: dict[Pair | None, list[tuple[int, int]]] = {}
        for first, last, condition in ranges:
            by_condition.setdefault(condition, []).append((first, last))
        plain = by_condition.pop(None, None)
        if plain:
            yield proto, tuple(plain), None
        for condition, found in by_condition.items():
            yield proto, tuple(found), condition


def alike(parties: list[Party], kind: Callable[[Party], Hashable]) -> list[list[Party]]:
    """Parties in groups of one kind: who is under the same rows has the same answers about
    everybody outside."""
    groups: dict[Hashable, list[Party]] = {}
    for party in parties:
        groups.setdefault(kind(party), []).append(party)
    return list(groups.values())


def outside(
    regions: Iterable[Party], groups: list[list[Party]], answer: Callable[[Party, Party], A]
) -> Iterator[tuple[int, Block, tuple[A, ...]]]:
    """The outside in as few blocks as have different answers: (version, block, answer of every
    group)."""
    numbers: dict[Hashable, int] = {}
    meanings: list[tuple[A, ...]] = []
    by_prefix: dict[Network, int] = {}
    for region in regions:
        found = tuple(answer(group[0], region) for group in groups)
        if found not in numbers:
            numbers[found] = len(meanings)
            meanings.append(found)
        assert region.prefix is not None
        by_prefix[region.prefix] = numbers[found]
    for world in WORLDS:
        for block, number in partition(world.version, by_prefix.pop(world), by_prefix):
            assert isinstance(number, int)
            yield world.version, block, meanings[number]


def of_family(cell: tuple[tuple[T, ...], ...], region: Party) -> tuple[tuple[T, ...], ...]:
    """Without the ICMP of the other family."""
    foreign = _FOREIGN[region.prefix.version if region.prefix is not None else 4]
    return tuple(
        () if proto == foreign else ranges for proto, ranges in zip(PROTOCOLS, cell, strict=True)
    )


def names(party: Party) -> tuple[Name, ...]:
    """How a party's members are called in answers."""
    match party.kind:
        case "endpoint":
            return tuple(x.ref for x in party.members)
        case "entity":
            return (f"reserved:{party.entity}",)
        case "prefix":
            assert party.prefix is not None
            return (party.prefix,)


def order(name: Name) -> tuple[int, str, int, int, int]:
    if isinstance(name, str):
        return (1 if name.startswith("reserved:") else 0, name, 0, 0, 0)
    return (2, "", name.version, int(name.network_address), name.prefixlen)
