"""What one policy map holds: rows by peer identity and L4 prefix, and the lookup the kernel makes.

The rows and their precedence are those of ``struct policy_key`` in bpf/lib/types.h: L4 is a prefix
of the 24 bits protocol, port. A deny row wins; else the longest L4 prefix; on equal length the row
with the identity.

A map state is a snapshot. Its rows are kept per identity in blocks that are shared: peers that the
same selectors match have the same rows, so thousands of identities cost thousands of pointers, not
of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Final, NamedTuple

from cilia.policy.api import L4, MAX_PORT, RuleID

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
    """One row's value. rule_id 0: an implicit allow. `rules`: all that say the same."""

    deny: bool
    rule_id: RuleID
    proxy_port: int = 0
    rules: tuple[RuleID, ...] = ()


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


class MapState(Mapping[PolicyKey, PolicyEntry]):
    """The rows of one policy map, as a read-only mapping; `len` is the room they need."""

    def __init__(
        self,
        blocks: Mapping[int, Block],
        *,
        log: Sequence[int] | None = None,
        seen: int = 0,
    ) -> None:
        self._blocks: Final = blocks
        # The journal of identities that changed, shared by the snapshots of one live state, and how
        # much of it this snapshot has seen: between two of them only those identities can differ.
        self._log: Final = log
        self._seen: Final = seen

    @cached_property
    def _size(self) -> int:
        return sum(map(len, self._blocks.values()))

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[PolicyKey]:
        for identity, block in self._blocks.items():
            for key in block:
                yield PolicyKey(identity, *key)

    def __getitem__(self, key: PolicyKey) -> PolicyEntry:
        return self._blocks[key.identity][L4Key(*key[1:])]

    def identities(self) -> frozenset[int]:
        """The peers that have rows of their own; 0 stands for everyone."""
        return frozenset(self._blocks)

    def block(self, identity: int) -> Block:
        return self._blocks.get(identity, _EMPTY)

    @cached_property
    def has_deny(self) -> bool:
        distinct = {id(block): block for block in self._blocks.values()}
        return any(entry.deny for block in distinct.values() for entry in block.values())

    @cached_property
    def masks(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(plens_id, plens_any) of struct policy_meta, each (ingress, egress), without HAS_DENY."""
        distinct = {
            id(block): block for identity, block in self._blocks.items() if identity
        }.values()
        mine, any_ = [0, 0], [0, 0]
        for block in distinct:
            for key in block:
                mine[key.egress] |= 1 << key.plen
        for key in self.block(ANY_IDENTITY):
            any_[key.egress] |= 1 << key.plen
        return (mine[0], mine[1]), (any_[0], any_[1])

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

    def delta(self, old: MapState | None) -> Delta:
        """The writes that turn `old` (None: an empty map) into this.

        Between two snapshots of one live state the cost is that of what changed in between.
        """
        before: Mapping[int, Block] = {} if old is None else old._blocks
        touched: set[int] | frozenset[int]
        if old is not None and self._log is not None and self._log is old._log:
            low, high = sorted((old._seen, self._seen))
            touched = set(self._log[low:high])
        else:
            touched = self._blocks.keys() | before.keys()
        upserts: dict[PolicyKey, PolicyEntry] = {}
        deletes: list[PolicyKey] = []
        for identity in touched:
            new_block = self._blocks.get(identity, _EMPTY)
            old_block = before.get(identity, _EMPTY)
            if new_block is old_block:
                continue
            for key, entry in new_block.items():
                if old_block.get(key) != entry:
                    upserts[PolicyKey(identity, *key)] = entry
            deletes += [PolicyKey(identity, *key) for key in old_block if key not in new_block]
        return Delta(upserts, tuple(deletes))
