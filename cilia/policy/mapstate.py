"""What one policy map holds: rows by peer identity and L4 prefix, and the lookup the kernel makes.

The rows and their precedence are those of ``struct policy_key`` in bpf/lib/types.h: L4 is a prefix
of the 24 bits protocol, port. A deny row wins; else the longest L4 prefix; on equal length the row
with the identity.

A map state is a snapshot. Its rows are kept per identity in blocks that are shared: peers that the
same selectors match have the same rows, so thousands of identities cost thousands of pointers, not
of rows. Snapshots of one live map copy nothing: they share its newest blocks, and what changed
since one was taken is found in a journal of the blocks that were replaced.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Final, NamedTuple
from weakref import WeakSet

from cilia.policy.api import L4, MAX_PORT, RuleID
from cilia.policy.l7 import L7Set

ANY_IDENTITY: Final = 0
PLEN_ANY: Final = 0
PLEN_PROTO: Final = 8
PLEN_PORT: Final = 24

# Match types, the numbers of bpf/lib/types.h
MATCH_NONE: Final = 0
MATCH_L3: Final = 1
MATCH_L3_L4: Final = 2
MATCH_L4: Final = 3
MATCH_ALL: Final = 4
MATCH_L3_PROTO: Final = 5
MATCH_PROTO: Final = 6


class PolicyKey(NamedTuple):
    """One row's key. `plen` is l4_plen of types.h; `port` is in host order and masked to it."""

    identity: int
    egress: bool
    proto: int
    port: int
    plen: int

    @property
    def match_type(self) -> int:
        if self.plen == PLEN_ANY:
            return MATCH_L3 if self.identity else MATCH_ALL
        if self.plen == PLEN_PROTO:
            return MATCH_L3_PROTO if self.identity else MATCH_PROTO
        return MATCH_L3_L4 if self.identity else MATCH_L4

    @property
    def last_port(self) -> int:
        """The highest port the row covers; `port` is the lowest."""
        return self.port | (MAX_PORT >> max(self.plen - PLEN_PROTO, 0))


@dataclass(frozen=True, slots=True)
class PolicyEntry:
    """One row's value. rule_id 0: an implicit allow. `rules`: all that say the same.

    `l7`: allowed only through the proxy that enforces this. `audit`: allowed, and reported as what
    policy would deny: by `rules`, which only audit, or where rule_id is 0 by default, because the
    subject is isolated by rules that only audit.
    """

    deny: bool
    rule_id: RuleID
    rules: tuple[RuleID, ...] = ()
    l7: L7Set | None = None
    audit: bool = False

    def same_effect(self, other: PolicyEntry) -> bool:
        """Whether a packet fares alike, whichever rules decided."""
        return (self.deny, self.audit, self.l7) == (other.deny, other.audit, other.l7)


class L4Key(NamedTuple):
    """A policy key without the identity."""

    egress: bool
    proto: int
    port: int
    plen: int


Block = Mapping[L4Key, PolicyEntry]


class Match(NamedTuple):
    key: PolicyKey
    entry: PolicyEntry


class Delta(NamedTuple):
    """Writes that turn one map state into another."""

    upserts: dict[PolicyKey, PolicyEntry]
    deletes: tuple[PolicyKey, ...]

    def __bool__(self) -> bool:
        return bool(self.upserts or self.deletes)


@lru_cache(maxsize=4096)
def port_prefixes(first: int, last: int) -> tuple[tuple[int, int], ...]:
    """The fewest (port, bits) prefixes that cover first..last exactly; bits 0 to 16."""
    if not 0 <= first <= last <= MAX_PORT:
        raise ValueError(f"{first}-{last} is not a range of ports")
    found = []
    while first <= last:
        size = 1 << 16 if first == 0 else first & -first
        while first + size - 1 > last:
            size >>= 1
        found.append((first, 17 - size.bit_length()))
        first += size
    return tuple(found)


@lru_cache(maxsize=16384)
def l4_keys(egress: bool, l4: L4) -> tuple[L4Key, ...]:
    """The rows that one range of ports takes."""
    return tuple(
        L4Key(egress, l4.proto, port, PLEN_PROTO + bits)
        for port, bits in port_prefixes(l4.first, l4.last)
    )


def any_l4(egress: bool) -> L4Key:
    return L4Key(egress, 0, 0, PLEN_ANY)


_PROBES: Final = (*range(PLEN_PORT, PLEN_PROTO - 1, -1), PLEN_ANY)


def lookup_blocks(
    mine: Block, any_: Block, identity: int, egress: bool, proto: int, port: int
) -> Match | None:
    """The kernel's lookup in the rows of one identity and of every identity."""
    best: Match | None = None
    for plen in _PROBES:
        masked = port >> (PLEN_PORT - plen) << (PLEN_PORT - plen) if plen > PLEN_PROTO else 0
        key = L4Key(egress, proto if plen else 0, masked, plen)
        for owner, block in ((identity, mine), (ANY_IDENTITY, any_)):
            entry = block.get(key)
            if entry is None:
                continue
            match = Match(PolicyKey(owner, *key), entry)
            if entry.deny:
                return match
            best = best or match
    return best


_EMPTY: Final[Block] = {}


class Shape(NamedTuple):
    """What is known of a map as a whole."""

    size: int  # rows
    # (plens_id, plens_any) of struct policy_meta, each (ingress, egress), without HAS_DENY
    masks: tuple[tuple[int, int], tuple[int, int]]
    has_deny: bool
    l7: frozenset[L7Set]  # what proxies must enforce


def shape_of(blocks: Mapping[int, Block]) -> Shape:
    distinct = {id(block): block for identity, block in blocks.items() if identity}
    mine, any_ = [0, 0], [0, 0]
    for block in distinct.values():
        for key in block:
            mine[key.egress] |= 1 << key.plen
    everyone = blocks.get(ANY_IDENTITY, _EMPTY)
    for key in everyone:
        any_[key.egress] |= 1 << key.plen
    return Shape(
        sum(map(len, blocks.values())),
        ((mine[0], mine[1]), (any_[0], any_[1])),
        any(e.deny for block in (*distinct.values(), everyone) for e in block.values()),
        frozenset(
            e.l7
            for block in (*distinct.values(), everyone)
            for e in block.values()
            if e.l7 is not None
        ),
    )


class Journal:
    """A map's blocks as they are now, and what each change replaced.

    Bounded: when it grows long, the older half is dropped, and snapshots that reach back further
    get a copy of what they need.
    """

    LIMIT: Final = 1 << 14

    def __init__(self) -> None:
        self.blocks: Final[dict[int, Block]] = {}  # none of them empty
        self._replaced: Final[list[tuple[int, Block]]] = []
        self._base = 0  # version of the first entry
        self._snapshots: Final[WeakSet[MapState]] = WeakSet()

    @property
    def version(self) -> int:
        return self._base + len(self._replaced)

    def put(self, identity: int, block: Block) -> None:
        before = self.blocks.get(identity, _EMPTY)
        if before is block:
            return
        if block:
            self.blocks[identity] = block
        else:
            self.blocks.pop(identity, None)
        if not self._snapshots:  # nobody looks back
            self._base += 1 + len(self._replaced)
            self._replaced.clear()
            return
        self._replaced.append((identity, before))
        if len(self._replaced) > max(self.LIMIT, 2 * len(self.blocks)):
            self._trim(len(self._replaced) // 2)

    def _trim(self, count: int) -> None:
        for snapshot in list(self._snapshots):
            if snapshot.version < self._base + count:
                snapshot.detach()
        del self._replaced[:count]
        self._base += count

    def snapshot(self, shape: Shape) -> MapState:
        state = MapState({}, journal=self, shape=shape)
        self._snapshots.add(state)
        return state

    def since(self, version: int) -> list[tuple[int, Block]]:
        """What was replaced since, oldest first. The version must be that of a snapshot."""
        return self._replaced[version - self._base :] if version != self.version else []

    def between(self, low: int, high: int) -> set[int]:
        """The identities whose block was replaced from one version to a later one."""
        return {x for x, _ in self._replaced[low - self._base : high - self._base]}


class MapState(Mapping[PolicyKey, PolicyEntry]):
    """The rows of one policy map, as a read-only mapping; `len` is the room they need."""

    def __init__(
        self,
        blocks: Mapping[int, Block],
        *,
        journal: Journal | None = None,
        shape: Shape | None = None,
    ) -> None:
        # With a journal: only the blocks that were replaced since; the others are the journal's.
        self._own: dict[int, Block] = dict(blocks)
        self._journal = journal
        self.version: Final = journal.version if journal is not None else 0
        self._read = self.version
        self._shape = shape

    # A snapshot is itself: nobody compares thousands of rows by accident. `dict()` compares rows.
    __hash__ = object.__hash__
    __eq__ = object.__eq__

    @cached_property
    def shape(self) -> Shape:
        return self._shape or shape_of(self._blocks())

    def detach(self) -> None:
        """Stand alone, without the journal."""
        blocks = dict(self._blocks())
        self._journal, self._own = None, blocks

    def _refresh(self) -> Journal | None:
        """Fetch what was replaced since the last look."""
        journal = self._journal
        if journal is not None and self._read != journal.version:
            for identity, block in journal.since(self._read):
                self._own.setdefault(identity, block)
            self._read = journal.version
        return journal

    def _blocks(self) -> Mapping[int, Block]:
        journal = self._refresh()
        if journal is None:
            return self._own
        if not self._own:
            return journal.blocks
        return {k: block for k, block in {**journal.blocks, **self._own}.items() if block}

    def __len__(self) -> int:
        return self.shape.size

    def __iter__(self) -> Iterator[PolicyKey]:
        for identity, block in self._blocks().items():
            for key in block:
                yield PolicyKey(identity, *key)

    def __getitem__(self, key: PolicyKey) -> PolicyEntry:
        return self.block(key.identity)[L4Key(*key[1:])]

    def identities(self) -> frozenset[int]:
        """The peers that have rows of their own; 0 stands for everyone."""
        return frozenset(self._blocks())

    def blocks(self) -> Mapping[int, Block]:
        """Rows by identity; many identities share one block. Not to be kept: it may move."""
        return self._blocks()

    def block(self, identity: int) -> Block:
        journal = self._refresh()
        found = self._own.get(identity)
        if found is None and journal is not None:
            found = journal.blocks.get(identity)
        return found if found is not None else _EMPTY

    @property
    def has_deny(self) -> bool:
        return self.shape.has_deny

    @property
    def masks(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(plens_id, plens_any) of struct policy_meta, each (ingress, egress), without HAS_DENY."""
        return self.shape.masks

    @property
    def l7(self) -> frozenset[L7Set]:
        """What proxies must enforce for it."""
        return self.shape.l7

    def follows(self, old: MapState) -> bool:
        """Whether both are snapshots of one live map, so that `delta` costs what changed."""
        return old._journal is not None and old._journal is self._journal

    def lookup(self, identity: int, egress: bool, proto: int, port: int) -> Match | None:
        """What the kernel finds for a packet; None is a miss, which drops.

        `port` is the destination port of the connection's first packet; of ICMP, the type.
        """
        any_ = self.block(ANY_IDENTITY)
        mine = self.block(identity) if identity != ANY_IDENTITY else _EMPTY
        return lookup_blocks(mine, any_, identity, egress, proto, port)

    def allows(self, identity: int, egress: bool, proto: int, port: int) -> bool:
        match = self.lookup(identity, egress, proto, port)
        return match is not None and not match.entry.deny

    def moved(self, old: MapState | None) -> Iterator[tuple[int, Block, Block]]:
        """(identity, its rows in `old`, its rows here) of the peers whose block is another.

        Between two snapshots of one live map the cost is that of what changed in between.
        """
        if old is self:
            return
        touched: Collection[int]
        if old is not None and self.follows(old) and self._journal is not None:
            touched = self._journal.between(*sorted((old.version, self.version)))
        else:
            before = old._blocks() if old is not None else {}
            touched = self._blocks().keys() | before.keys()
        for identity in touched:
            new_block = self.block(identity)
            old_block = old.block(identity) if old is not None else _EMPTY
            if new_block is not old_block:
                yield identity, old_block, new_block

    def delta(self, old: MapState | None) -> Delta:
        """The writes that turn `old` (None: an empty map) into this; costs as `moved` does."""
        upserts: dict[PolicyKey, PolicyEntry] = {}
        deletes: list[PolicyKey] = []
        for identity, old_block, new_block in self.moved(old):
            for key, entry in new_block.items():
                if old_block.get(key) != entry:
                    upserts[PolicyKey(identity, *key)] = entry
            deletes += [PolicyKey(identity, *key) for key in old_block if key not in new_block]
        return Delta(upserts, tuple(deletes))
