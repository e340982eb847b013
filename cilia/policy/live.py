"""A program applied to the identities there are, and kept so as they and the program change.

Every identity that some selector of the program selects is of a *kind*: the selectors that match
it (and its port names, where rules name ports). Peers of one kind share one block of rows, so what
a change costs is a pointer an identity, and rows once a kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

from cilia.identity import HOST
from cilia.policy.l7 import L7Set, PortNames
from cilia.policy.mapstate import ANY_IDENTITY, Block, Journal, MapState, Shape
from cilia.policy.program import Contribution, Program, Unenforced
from cilia.policy.selectorcache import CacheSelector, SelectorCache

_MAX_IDLE: Final = 256

KindKey = tuple[tuple[int, ...], PortNames, bool]


class Kind:
    """What is the same for all peers that the same selectors match."""

    __slots__ = ("block", "conflicts", "slots", "users")

    def __init__(
        self, slots: tuple[int, ...], block: Block, conflicts: tuple[Unenforced, ...]
    ) -> None:
        self.slots: Final = slots
        self.block: Final = block
        self.conflicts: Final = conflicts
        self.users = 0


class Live:
    """The rows of everyone whom one program is about."""

    def __init__(
        self, program: Program, cache: SelectorCache[Live], names: dict[int, PortNames]
    ) -> None:
        self.program = program
        self.key: tuple[object, ...] = ()  # the engine's
        self._cache: Final = cache
        self._names: Final = names  # the engine's: named ports by identity
        self._slots: Final[dict[CacheSelector, int]] = {}
        self._said: Final[dict[int, tuple[Contribution, ...]]] = {}  # by slot
        self._free: Final[list[int]] = []
        self._next = 0
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
        matched: dict[int, list[int]] = {}
        for selector, said in program.selectors.items():
            slot = self._take(selector, said)
            for identity in cache.acquire(selector, self, slot):
                matched.setdefault(identity, []).append(slot)
        if program.host_allow:
            matched.setdefault(HOST, [])
        for identity, slots in matched.items():
            self._set(identity, tuple(slots))
        self._set_wildcard()

    def _take(self, selector: CacheSelector, said: tuple[Contribution, ...]) -> int:
        if self._free:
            slot = self._free.pop()
        else:
            slot = self._next
            self._next += 1
        self._slots[selector] = slot
        self._said[slot] = said
        return slot

    @property
    def slots(self) -> dict[CacheSelector, int]:
        """The selectors in use, and the number that each has here."""
        return self._slots

    # ---- identities

    def change(self, identity: int, slots: Iterable[int]) -> bool:
        """Set what selects an identity now. True when rows changed."""
        return self._set(identity, tuple(sorted(slots)))

    def rename(self, identity: int) -> bool:
        """An identity's port names changed. True when rows changed."""
        kind = self._kind_of.get(identity)
        return kind is not None and self._set(identity, kind.slots)

    def _set(self, identity: int, slots: tuple[int, ...]) -> bool:
        program = self.program
        host = identity == HOST and program.host_allow
        old = self._kind_of.get(identity)
        if not slots and not host:
            new = None
        else:
            names = self._names.get(identity, ()) if program.uses_names else ()
            key = slots, names, host
            new = self._kinds.get(key)
            if new is None:
                own = [c for slot in slots for c in self._said[slot]]
                new = self._kinds[key] = Kind(slots, *program.block(own, names, host))
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

        Costs what differs: peers of selectors that came, went, or say something else.
        """
        old, self.program = self.program, program
        slots, cache = self._slots, self._cache
        moved: dict[int, tuple[set[int], set[int]]] = {}  # identity -> slots that went, that came
        stale: set[int] = set()  # slots that say something else now
        gone: list[CacheSelector] = []
        freed: list[int] = []
        for selector in [x for x in slots if x not in program.selectors]:
            slot = slots.pop(selector)
            freed.append(slot)
            gone.append(selector)
            for identity in cache.selected(selector):
                moved.setdefault(identity, (set(), set()))[0].add(slot)
        for selector, said in program.selectors.items():
            known = slots.get(selector)
            if known is None:
                known = self._take(selector, said)
                for identity in cache.acquire(selector, self, known):
                    moved.setdefault(identity, (set(), set()))[1].add(known)
            elif self._said[known] != said:
                self._said[known] = said
                stale.add(known)
        outdated = stale.union(freed)
        for key in [k for k in self._kinds if not outdated.isdisjoint(k[0])]:
            del self._kinds[key]
        redo: set[int] = set()
        for selector in program.selectors if stale else ():
            if slots[selector] in stale:
                redo.update(cache.selected(selector))
        if old.host_allow != program.host_allow:
            redo.add(HOST)
        if old.uses_names != program.uses_names:
            redo.update(self._kind_of)
            self._kinds.clear()
        elif (
            old.everyone != program.everyone
            or old.wildcard != program.wildcard
            or (old.ingress_enforced, old.egress_enforced)
            != (program.ingress_enforced, program.egress_enforced)
        ):
            others = self._redo_kinds()
            redo.update(x for x, kind in self._kind_of.items() if kind in others)
        changed = self._set_wildcard()
        for identity in redo.union(moved):
            kind = self._kind_of.get(identity)
            now = set(kind.slots) if kind is not None else set()
            if (difference := moved.get(identity)) is not None:
                now = (now - difference[0]) | difference[1]
            changed |= self._set(identity, tuple(sorted(now)))
        for slot in freed:
            del self._said[slot]
        self._free.extend(freed)
        for selector in gone:
            cache.release(selector, self)
        return changed

    def _redo_kinds(self) -> set[Kind]:
        """What is said of everyone changed: the kinds whose rows are others now. Forgets them."""
        others = set()
        for key, kind in list(self._kinds.items()):
            slots, names, host = key
            own = [c for slot in slots for c in self._said[slot]]
            if self.program.block(own, names, host) != (kind.block, kind.conflicts):
                del self._kinds[key]
                others.add(kind)
        return others

    def close(self) -> None:
        for selector in self._slots:
            self._cache.release(selector, self)

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
