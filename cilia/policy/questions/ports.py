"""What is allowed of one protocol, as disjoint ranges of ports (of ICMP, of types).

A range's value says under which condition: `None`, or the L7 rules that every request must pass.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Iterable
from typing import Final, TypeVar

from cilia.policy.api import (
    MAX_PORT,
    PROTO_ICMP,
    PROTO_ICMPV6,
    PROTO_SCTP,
    PROTO_TCP,
    PROTO_UDP,
)
from cilia.policy.mapstate import PLEN_ANY, PLEN_PROTO, Block, L4Key
from cilia.policy.questions.conditions import Condition, condition_of

MAX_TYPE: Final = 255
PROTOCOLS: Final = (PROTO_TCP, PROTO_UDP, PROTO_SCTP, PROTO_ICMP, PROTO_ICMPV6)
_ICMP: Final = (PROTO_ICMP, PROTO_ICMPV6)

# The L7 rules of the source's egress and of the destination's ingress.
Pair = tuple[Condition | None, Condition | None]
C = TypeVar("C", bound=Hashable)
Side = tuple[tuple[int, int, Condition | None], ...]  # what one end allows
Ranges = tuple[tuple[int, int, Pair | None], ...]  # what both ends allow


def bounds(proto: int) -> tuple[int, int]:
    """The first and last number that traffic of a protocol has.

    Port 0 is left out: it is reserved in TCP, UDP and SCTP (RFC 6335, section 6), and in a rule it
    means every port.
    """
    return (0, MAX_TYPE) if proto in _ICMP else (1, MAX_PORT)


def allowed(mine: Block, everyone: Block, egress: bool, proto: int) -> Side:
    """What the rows of one peer and of everyone together allow, as the kernel looks them up.

    A deny row wins; else the longest L4 prefix; on equal length the row of the peer.
    """
    low, high = bounds(proto)
    allows: list[tuple[int, int, int, int, Condition | None]] = []
    denies: list[tuple[int, int]] = []
    cuts = {low, high + 1}
    for owner, block in ((0, everyone), (1, mine)):
        for key, entry in block.items():
            if key.egress != egress or (key.plen != PLEN_ANY and key.proto != proto):
                continue
            first, last = span(key)
            first, last = max(first, low), min(last, high)
            if first > last:
                continue
            cuts.update((first, last + 1))
            if entry.deny:
                denies.append((first, last))
            else:
                allows.append((key.plen, owner, first, last, condition_of(entry)))
    if not allows:
        return ()
    edges = sorted(cuts)
    # Longer prefixes are painted over shorter ones, denials over all.
    painted: list[tuple[Condition | None] | None] = [None] * (len(edges) - 1)
    allows.sort(key=lambda x: x[:2])
    strokes: list[tuple[int, int, tuple[Condition | None] | None]] = [
        (first, last, (condition,)) for _, _, first, last, condition in allows
    ]
    strokes += [(first, last, None) for first, last in denies]
    for first, last, value in strokes:
        i, j = bisect_left(edges, first), bisect_left(edges, last + 1)
        painted[i:j] = [value] * (j - i)
    return joined(
        (edges[i], edges[i + 1] - 1, value[0])
        for i, value in enumerate(painted)
        if value is not None
    )


def span(key: L4Key) -> tuple[int, int]:
    """The ports a row covers."""
    if key.plen <= PLEN_PROTO:
        return 0, MAX_PORT
    return key.port, key.port | (MAX_PORT >> (key.plen - PLEN_PROTO))


def joined(ranges: Iterable[tuple[int, int, C]]) -> tuple[tuple[int, int, C], ...]:
    """Neighbours of equal condition as one; the ranges come in order."""
    found: list[tuple[int, int, C]] = []
    for first, last, condition in ranges:
        if found and found[-1][1] + 1 == first and found[-1][2] == condition:
            found[-1] = (found[-1][0], last, condition)
        else:
            found.append((first, last, condition))
    return tuple(found)


def both(one: Side, other: Side) -> Ranges:
    """What both allow; the condition is the pair of theirs, None when neither has one."""
    found: list[tuple[int, int, Pair | None]] = []
    i = j = 0
    while i < len(one) and j < len(other):
        first, last = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if first <= last:
            pair = (one[i][2], other[j][2])
            found.append((first, last, None if pair == (None, None) else pair))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return joined(found)


def less(
    one: tuple[tuple[int, int, C], ...], other: tuple[tuple[int, int, C], ...]
) -> tuple[tuple[int, int, C], ...]:
    """Where `one` allows and `other` does not, or not under the same condition."""
    found: list[tuple[int, int, C]] = []
    for first, last, condition in one:
        at = first
        for start, end, theirs in other:
            if end < at or start > last or theirs != condition:
                continue
            if start > at:
                found.append((at, start - 1, condition))
            at = end + 1
        if at <= last:
            found.append((at, last, condition))
    return joined(found)


def text(ranges: Iterable[tuple[int, int]]) -> str:
    """`1-79,81-65535`."""
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)
