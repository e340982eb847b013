"""The addresses outside, as the fewest disjoint prefixes that policies can tell apart."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Mapping
from ipaddress import IPv4Network, IPv6Network

from cilia.policy.api import Network

Block = tuple[int, int]  # first address, prefix length


def network(version: int, block: Block) -> Network:
    """The block as a network; made for the blocks that are shown only, for it takes its time."""
    return IPv4Network(block) if version == 4 else IPv6Network(block)


def partition(
    version: int, everywhere: Hashable, inside: Mapping[Network, Hashable]
) -> list[tuple[Block, Hashable]]:
    """Cover all addresses of a family with disjoint prefixes, each of one value.

    An address has the value of the longest prefix of `inside` that holds it, else `everywhere`.
    Neighbours of equal value are one prefix wherever they make one, so there are as few as can be.
    """
    bits = 32 if version == 4 else 128
    known = sorted(
        (int(prefix.network_address), prefix.prefixlen, value)
        for prefix, value in ((p, _Value(v)) for p, v in inside.items())
        if prefix.version == version
    )
    starts = [(address, length) for address, length, _ in known]

    def walk(address: int, length: int, value: Hashable) -> list[tuple[int, int, Hashable]]:
        # The prefixes inside are neighbours in the sorted list; this one itself comes first.
        low = bisect_left(starts, (address, length))
        high = bisect_left(starts, (address + (1 << (bits - length)), 0))
        if low < high and starts[low] == (address, length):
            value = known[low][2].value
            low += 1
        if low >= high:
            return [(address, length, value)]
        left = walk(address, length + 1, value)
        right = walk(address + (1 << (bits - length - 1)), length + 1, value)
        if len(left) == len(right) == 1 and left[0][2] == right[0][2]:
            return [(address, length, left[0][2])]
        return left + right

    return [((address, length), value) for address, length, value in walk(0, 0, everywhere)]


class _Value:
    """Carried through the sort without being compared: no two prefixes are equal."""

    __slots__ = ("value",)

    def __init__(self, value: Hashable) -> None:
        self.value = value

    def __lt__(self, other: object) -> bool:
        return False
