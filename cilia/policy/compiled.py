"""Many questions about the same policies: who may reach whom, a million at a time.

`PolicyEngine.verdict` explains; this only answers. Endpoints are given numbers. Once a question is
asked, every selector of every program is looked up for each endpoint once, by the labels that it
is filed under; from then on a question is two intersections of small sets (the selectors of one
end's rules, and those that select the other end) and a look into tables of ports that were judged
before. Nothing here follows the engine: when that has changed, compile anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final

from cilia.labels import Labels
from cilia.policy.l7 import PortNames, port_names
from cilia.policy.mapstate import Block, lookup_blocks
from cilia.policy.program import Contribution, Program, is_host
from cilia.policy.selectorcache import CacheSelector, SelectorCache

if TYPE_CHECKING:
    from cilia.policy.engine import Mode, PolicyEngine

Question = tuple[int, int, int, int]  # source, destination, protocol number, port


class _Table:
    """What one end's rules say of one kind of peer, by direction and port, as far as asked."""

    __slots__ = ("egress", "ingress", "own", "wildcard")

    def __init__(self, own: Block, wildcard: Block) -> None:
        self.own: Final = own
        self.wildcard: Final = wildcard
        self.ingress: Final[dict[int, bool]] = {}
        self.egress: Final[dict[int, bool]] = {}

    def judge(self, egress: bool, l4: int) -> bool:
        match = lookup_blocks(self.own, self.wildcard, -1, egress, l4 >> 16, l4 & 0xFFFF)
        allowed = match is not None and not match.entry.deny
        (self.egress if egress else self.ingress)[l4] = allowed
        return allowed


class _Side:
    """One program, asked about peers."""

    __slots__ = ("numbers", "program", "said", "tables")

    def __init__(self, program: Program) -> None:
        self.program: Final = program
        self.numbers: frozenset[int] = frozenset()  # of its selectors
        self.said: dict[int, tuple[Contribution, ...]] = {}
        self.tables: Final[dict[object, _Table]] = {}


_MAX_TABLES: Final = 1 << 16


class CompiledPolicy:
    """Answers as the engine would have given when this was made."""

    def __init__(self, engine: PolicyEngine, *, mode: Mode | None = None) -> None:
        self._engine: Final = engine
        self._mode: Final = mode
        self.version: Final = engine.version
        self._ends: Final[dict[tuple[Labels, PortNames], int]] = {}
        self._sides: Final[list[_Side | None]] = []
        self._kinds: Final[list[frozenset[int]]] = []  # numbers of the selectors that select it
        self._hosts: Final[list[bool]] = []
        self._names: Final[list[PortNames]] = []
        self._by_program: Final[dict[int, _Side]] = {}
        self._numbers: Final[dict[CacheSelector, int]] = {}
        self._filed: Final[SelectorCache[int, int]] = SelectorCache()
        self._complete = True

    @property
    def current(self) -> bool:
        """Whether the engine still gives these answers."""
        return self.version == self._engine.version

    def add(
        self,
        labels: Labels,
        named_ports: Mapping[str, tuple[int, int]] | PortNames | None = None,
    ) -> int:
        """The number of an endpoint, or of any other peer, to ask about."""
        names = port_names(named_ports)
        number = self._ends.get((labels, names))
        if number is not None:
            return number
        number = self._ends[labels, names] = len(self._sides)
        side = None
        if self._engine.judges(labels):
            program = self._engine.program(labels, mode=self._mode, named_ports=names)
            side = self._by_program.get(id(program))
            if side is None:
                side = self._by_program[id(program)] = _Side(program)
                for selector, said in program.selectors().items():
                    known = self._numbers.setdefault(selector, len(self._numbers))
                    side.said[known] = said
                    self._filed.acquire(selector, 0, known)
                side.numbers = frozenset(side.said)
        self._sides.append(side)
        self._kinds.append(frozenset())
        self._hosts.append(is_host(labels))
        self._names.append(names)
        self._complete = False
        return number

    def _complete_kinds(self) -> None:
        numbers = self._numbers
        interned: dict[frozenset[int], frozenset[int]] = {}
        for (labels, _), end in self._ends.items():
            kind = frozenset(numbers[selector] for selector in self._filed.matching(labels))
            self._kinds[end] = interned.setdefault(kind, kind)
        self._complete = True

    def allows(self, source: int, destination: int, proto: int, port: int) -> bool:
        """Whether both ends allow it (requests that L7 rules restrict count as allowed)."""
        return self.allows_many(((source, destination, proto, port),))[0]

    def allows_many(self, questions: Iterable[Question]) -> list[bool]:
        """An answer for each question, in their order. Raises IndexError for an unknown number."""
        if not self._complete:
            self._complete_kinds()
        sides, kinds = self._sides, self._kinds
        plain = not any(self._hosts) and not any(self._names)
        answers: list[bool] = []
        for source, destination, proto, port in questions:
            l4 = proto << 16 | port
            allowed = True
            side = sides[source]
            if side is not None:
                met = side.numbers & kinds[destination]
                table = side.tables.get(met) if plain else None
                if table is None:
                    table = self._table(side, met, destination, plain)
                found = table.egress.get(l4)
                allowed = table.judge(True, l4) if found is None else found
            if allowed:
                side = sides[destination]
                if side is not None:
                    met = side.numbers & kinds[source]
                    table = side.tables.get(met) if plain else None
                    if table is None:
                        table = self._table(side, met, source, plain)
                    found = table.ingress.get(l4)
                    allowed = table.judge(False, l4) if found is None else found
            answers.append(allowed)
        return answers

    def _table(self, side: _Side, met: frozenset[int], peer: int, plain: bool) -> _Table:
        program = side.program
        names = self._names[peer] if program.uses_names else ()
        key = met if plain else (met, self._hosts[peer], names)
        table = side.tables.get(key)
        if table is None:
            own = {c for number in met for c in side.said[number]}
            block, _ = program.block(own, names, self._hosts[peer])
            if len(side.tables) >= _MAX_TABLES:
                side.tables.clear()
            table = side.tables[key] = _Table(block, program.wildcard)
        return table
