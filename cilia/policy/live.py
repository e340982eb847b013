"""A program applied to the identities there are, and kept so as they and the program change.

What the rules say of a peer is a set of contributions. Peers of whom they say the same (and who
call their ports alike, where rules name ports) are of one *kind* and share one block of rows: fifty
thousand prefixes of one rule are fifty thousand pointers to one block. A change of rules is the
layers that went and those that came: it costs the peers that these select.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

from cilia.identity import HOST
from cilia.labels import Labels
from cilia.policy.api import CidrSelector, EndpointSelector
from cilia.policy.l7 import L7Set, PortNames
from cilia.policy.mapstate import ANY_IDENTITY, Block, Journal, MapState, Shape
from cilia.policy.program import Contribution, Layer, Program, Unenforced
from cilia.policy.selectorcache import CacheSelector, SelectorCache

_MAX_IDLE: Final = 256

Said = tuple[Contribution, ...]
Own = frozenset[Contribution]  # all that is said of a peer
KindKey = tuple[Own, PortNames, bool]
# Of a prefix without an identity: its family's world, and the selectors of prefixes that select it.
Newcomer = tuple[Labels, list[CidrSelector]]

_NOTHING: Final[Own] = frozenset()


class Kind:
    """What is the same for all peers of whom the same is said."""

    __slots__ = ("block", "conflicts", "key", "users")

    def __init__(self, key: KindKey, block: Block, conflicts: tuple[Unenforced, ...]) -> None:
        self.key: Final = key
        self.block: Final = block
        self.conflicts: Final = conflicts
        self.users = 0


class Live:
    """The rows of everyone whom one program is about."""

    def __init__(
        self, program: Program, cache: SelectorCache[Live, Said], names: dict[int, PortNames]
    ) -> None:
        self.program = program
        self.key: tuple[object, ...] = ()  # the engine's
        self._cache: Final = cache
        self._names: Final = names  # the engine's: named ports by identity
        self._kinds: Final[dict[KindKey, Kind]] = {}
        self._idle = 0  # kinds that were left by their last peer since the unused were thrown away
        self._kind_of: Final[dict[int, Kind]] = {}
        self._journal: Final = Journal()
        self._rows = 0
        # How many kinds in use have rows of a prefix length (ingress, then egress), or that deny.
        self._plens: Final[tuple[Counter[int], Counter[int]]] = (Counter(), Counter())
        self._denies = 0
        self._l7: Final[Counter[L7Set]] = Counter()
        self.conflicts: Final[Counter[Unenforced]] = Counter()
        self._snapshot: MapState | None = None
        self._shape: Shape | None = None  # as it was, if only the number of rows may differ now
        self._swap((), program.layers)
        if program.host_allow:
            self._set(HOST, self._own(HOST))
        self._set_wildcard()

    # ---- identities

    def change(self, identity: int, said: Iterable[Said]) -> bool:
        """Set what is said of an identity, selector by selector. True when rows changed."""
        return self._set(identity, _NOTHING.union(*said))

    def rename(self, identity: int) -> bool:
        """An identity's port names changed. True when rows changed."""
        return identity in self._kind_of and self._set(identity, self._own(identity))

    def _own(self, identity: int) -> Own:
        kind = self._kind_of.get(identity)
        return kind.key[0] if kind is not None else _NOTHING

    def _set(self, identity: int, own: Own) -> bool:
        program = self.program
        host = identity == HOST and program.host_allow
        old = self._kind_of.get(identity)
        if not own and not host:
            new = None
        else:
            names = self._names.get(identity, ()) if program.uses_names else ()
            key = own, names, host
            new = self._kinds.get(key)
            if new is None:
                new = self._kinds[key] = Kind(key, *program.block(*key))
        if new is old:
            return False
        if new is not None:
            self._kind_of[identity] = new
            self._use(new)
        if old is not None:
            if new is None:
                del self._kind_of[identity]
            self._drop(old)
        before: Block = old.block if old is not None else {}
        after: Block = new.block if new is not None else {}
        if before == after:
            return False
        self._rows += len(after) - len(before)
        self._journal.put(identity, after)
        self._snapshot = None
        return True

    def _use(self, kind: Kind) -> None:
        kind.users += 1
        if kind.users == 1:
            self._count(kind.block, 1)
            self.conflicts.update(kind.conflicts)

    def _drop(self, kind: Kind) -> None:
        kind.users -= 1
        if kind.users == 0:
            self._count(kind.block, -1)
            for conflict in kind.conflicts:
                self.conflicts[conflict] -= 1
                if not self.conflicts[conflict]:
                    del self.conflicts[conflict]
            self._idle += 1
            if self._idle > max(_MAX_IDLE, len(self._kind_of)):
                self._idle = 0
                for key in [k for k, x in self._kinds.items() if not x.users]:
                    del self._kinds[key]

    def _count(self, block: Block, by: int) -> None:
        self._shape = None
        for key, entry in block.items():
            self._plens[key.egress][key.plen] += by
            if entry.deny:
                self._denies += by
            if entry.l7 is not None:
                self._l7[entry.l7] += by
                if not self._l7[entry.l7]:
                    del self._l7[entry.l7]

    def _set_wildcard(self) -> bool:
        old = self._journal.blocks.get(ANY_IDENTITY, {})
        new = self.program.wildcard
        if old == new:
            return False
        self._rows += len(new) - len(old)
        self._journal.put(ANY_IDENTITY, new)
        self._snapshot = self._shape = None
        return True

    # ---- rules

    def update(self, program: Program) -> bool:
        """Take another program in the place of this one. True when rows changed.

        Costs what differs: the peers of layers that went or came.
        """
        old, self.program = self.program, program
        redo: set[int] = set()
        if not program.same_base(old):
            if old.host_allow != program.host_allow:
                redo.add(HOST)
            if old.uses_names != program.uses_names:
                redo.update(self._kind_of)
                self._kinds.clear()
            elif others := self._redo_kinds():
                redo.update(x for x, kind in self._kind_of.items() if kind in others)
        changed = self._set_wildcard()
        changed |= self._swap(*_difference(old, program))
        for identity in redo:
            changed |= self._set(identity, self._own(identity))
        return changed

    def _swap(self, gone: Iterable[Layer], came: Iterable[Layer]) -> bool:
        """Layers for layers. True when rows changed."""
        cache = self._cache
        lost = _NOTHING.union(*(layer.said for layer in gone))
        touched: dict[int, list[Contribution]] = {}
        renewed: set[CacheSelector] = set()
        for layer in came:
            for selector, said in layer.selectors.items():
                before = cache.word(selector, self)
                if lost and selector not in renewed:
                    renewed.add(selector)
                    before = tuple(c for c in before or () if c not in lost)
                word = (*before, *said) if before else said
                for identity in cache.acquire(selector, self, word):
                    touched.setdefault(identity, []).extend(said)
        left: dict[CacheSelector, None] = {}
        for layer in gone:
            left.update(dict.fromkeys(layer.selectors))
        for selector in left:
            for identity in cache.selected(selector):
                touched.setdefault(identity, [])
            if selector in renewed:
                continue
            rest = tuple(c for c in cache.users(selector)[self] if c not in lost)
            if rest:
                cache.acquire(selector, self, rest)
            else:
                cache.release(selector, self)
        changed = False
        for identity, added in touched.items():
            changed |= self._set(identity, (self._own(identity) - lost).union(added))
        return changed

    def _redo_kinds(self) -> set[Kind]:
        """What is said of everyone changed: the kinds whose rows are others now. Forgets them."""
        others = set()
        for key, kind in list(self._kinds.items()):
            if self.program.block(*key) != (kind.block, kind.conflicts):
                del self._kinds[key]
                others.add(kind)
        return others

    def close(self) -> None:
        selectors: dict[CacheSelector, None] = {}
        for layer in self.program.layers:
            selectors.update(dict.fromkeys(layer.selectors))
        for selector in selectors:
            self._cache.release(selector, self)

    def rows_under(self, program: Program, fresh: Mapping[int, Newcomer]) -> int:
        """How many rows there would be under another program, and with identities for prefixes
        that have none yet, under numbers that nobody has. Changes nothing; costs what differs.

        Selectors that name a prefix as a label are not looked for among the new ones.
        """
        gone, came = _difference(self.program, program)
        lost = _NOTHING.union(*(layer.said for layer in gone))
        touched: dict[int, list[Contribution]] = {}
        added: dict[CacheSelector, list[Contribution]] = {}
        for layer in came:
            for selector, said in layer.selectors.items():
                added.setdefault(selector, []).extend(said)
                for identity in self._cache.search(selector):
                    touched.setdefault(identity, []).extend(said)
        for layer in gone:
            for selector in layer.selectors:
                touched.update((x, []) for x in self._cache.selected(selector) if x not in touched)

        def told(selectors: Iterable[CacheSelector]) -> list[Contribution]:
            found = []
            for selector in selectors:
                found += [c for c in self._cache.word(selector, self) or () if c not in lost]
                found += added.get(selector, ())
            return found

        worlds: dict[Labels, list[Contribution]] = {}
        for number, (world, selectors) in fresh.items():
            if world not in worlds:
                others = [x for x in added if isinstance(x, EndpointSelector) and x.matches(world)]
                worlds[world] = told({*self._cache.matching(world), *others})
            touched[number] = [*worlds[world], *told(dict.fromkeys(selectors))]
        same = program.same_base(self.program)
        if program.host_allow:
            touched.setdefault(HOST, [])
        if program.uses_names != self.program.uses_names:
            touched.update((x, []) for x in self._names if x not in touched)
        sizes: dict[KindKey, int] = {}

        def size(key: KindKey) -> int:
            own, _, host = key
            if not own and not host:
                return 0
            kind = self._kinds.get(key) if same else None
            if kind is not None:
                return len(kind.block)
            if key not in sizes:
                sizes[key] = len(program.block(*key)[0])
            return sizes[key]

        left: Counter[Kind] = Counter()  # those of its peers that are counted one by one
        for identity in touched:
            if (kind := self._kind_of.get(identity)) is not None:
                left[kind] += 1
        if same:
            rows = self._rows - sum(len(kind.block) * n for kind, n in left.items())
        else:
            rows = len(program.wildcard)
            for kind in self._kinds.values():
                if kind.users > left[kind]:
                    rows += (kind.users - left[kind]) * size(kind.key)
        for identity, said_of in touched.items():
            names = self._names.get(identity, ()) if program.uses_names else ()
            own = (self._own(identity) - lost).union(said_of)
            rows += size((own, names, identity == HOST and program.host_allow))
        return rows

    # ---- results

    def kind(self, identity: int) -> Kind | None:
        return self._kind_of.get(identity)

    def snapshot(self) -> MapState:
        """The rows as they are now. Copies nothing."""
        if self._snapshot is None:
            shape = self._shape
            if shape is None:
                shape = self._shape = self._look()
            self._snapshot = self._journal.snapshot(shape._replace(size=self._rows))
        return self._snapshot

    def _look(self) -> Shape:
        wildcard = self.program.wildcard
        mine, any_ = [0, 0], [0, 0]
        for direction, counts in enumerate(self._plens):
            for plen, count in counts.items():
                if count:
                    mine[direction] |= 1 << plen
        for key in wildcard:
            any_[key.egress] |= 1 << key.plen
        denies = self._denies > 0 or any(e.deny for e in wildcard.values())
        l7 = frozenset((*self._l7, *(e.l7 for e in wildcard.values() if e.l7 is not None)))
        return Shape(self._rows, ((mine[0], mine[1]), (any_[0], any_[1])), denies, l7)

    def unenforced(self) -> tuple[Unenforced, ...]:
        """What some rules of the program do not allow, for want of who would enforce it."""
        program = self.program
        return tuple(dict.fromkeys((*program.unenforced, *program.conflicts, *self.conflicts)))


def _difference(old: Program, new: Program) -> tuple[tuple[Layer, ...], tuple[Layer, ...]]:
    """The layers that are only in the one, and those that are only in the other."""
    before, after = frozenset(old.layers), frozenset(new.layers)
    return (
        tuple(x for x in old.layers if x not in after),
        tuple(x for x in new.layers if x not in before),
    )
