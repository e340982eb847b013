"""Numbers for things that repeat, found for whole arrays at once.

    keys (u64, n) ──▶ Index ──▶ slots (n)           Slots: which are in use, which may be reused
                        │ absent
                        └─▶ a fresh slot for each distinct key, told to the caller to fill

A row of the ring names a slot. A slot is given out again only when no row of the ring names it any
more: `last` holds, for each, a number no smaller than that of the newest row that does.

Keys are hashes under a secret of this process, so that nobody who sends packets can choose two that
collide; by chance two of 2^20 do once in 2^24 fillings.
"""

from __future__ import annotations

import secrets
from typing import Any, Final

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
AnyArray = npt.NDArray[Any]

_EMPTY: Final = np.uint64(0)
_DEAD: Final = np.uint64(1)
_LIVE_BIT: Final = np.uint64(1 << 63)  # every key has it, so none is empty or dead
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
_HALF: Final = np.uint64(0xFFFFFFFF)
_SHIFT: Final = np.uint64(32)


class Hasher:
    """Hashes rows of 64-bit words, under a secret: multilinear hashing, twice.

    Of the sum of each half word times a secret number, modulo 2^64, the upper 32 bits are strongly
    universal (Lemire and Kaser, "Strongly universal string hashing is fast", 2014): whoever does
    not know the secret finds no two rows that are more likely than others to meet. Mixing by shifts
    and multiplications is no such thing: a difference in the highest bit stays where it is, and a
    second word can cancel it.
    """

    def __init__(self, words: int = 16) -> None:
        self._low = [[np.uint64(secrets.randbits(64)) for _ in range(words)] for _ in range(2)]
        self._high = [[np.uint64(secrets.randbits(64)) for _ in range(words)] for _ in range(2)]
        self._plus = [np.uint64(secrets.randbits(64)) for _ in range(2)]

    def __call__(self, *words: U64) -> U64:
        """One key a row; `words` are the columns."""
        sums = [np.full(len(words[0]), plus) for plus in self._plus]
        for at, word in enumerate(words):
            low, high = word & _HALF, word >> _SHIFT
            for total, of_low, of_high in zip(sums, self._low, self._high, strict=True):
                total += low * of_low[at]
                total += high * of_high[at]
        key = sums[0] & ~_HALF
        key |= sums[1] >> _SHIFT
        key |= _LIVE_BIT
        return key


class Index:
    """Key to slot: open addressing over arrays, at most half full."""

    def __init__(self, bits: int = 12) -> None:
        self._clear(bits)

    def _clear(self, bits: int) -> None:
        self._mask = (1 << bits) - 1
        self._shift = np.uint64(64 - bits)
        self._keys = np.zeros(1 << bits, np.uint64)
        self._slots = np.zeros(1 << bits, np.int64)
        self._used = 0  # live or dead
        self._live = 0

    def __len__(self) -> int:
        return self._live

    def _home(self, keys: U64) -> I64:
        return ((keys * _GOLDEN) >> self._shift).astype(np.int64)

    def find(self, keys: U64) -> I64:
        """The slot of each key, -1 where there is none."""
        at = self._home(keys)
        there = self._keys[at]
        hit = there == keys
        found = self._slots[at]
        if hit.all():
            return found
        found[~hit] = -1
        pending = np.flatnonzero(~hit & (there != _EMPTY))
        while len(pending):
            at[pending] = (at[pending] + 1) & self._mask
            there = self._keys[at[pending]]
            hit = there == keys[pending]
            done = pending[hit]
            found[done] = self._slots[at[done]]
            pending = pending[~hit & (there != _EMPTY)]
        return found

    def insert(self, keys: U64, slots: I64) -> None:
        """Enters distinct keys that are not there."""
        if (self._used + len(keys)) * 2 > self._mask + 1:
            self._rebuild(len(keys))
        self._put(keys, slots)

    def _put(self, keys: U64, slots: I64) -> None:
        at = self._home(keys)
        pending = np.arange(len(keys))
        while len(pending):
            free = self._keys[at[pending]] <= _DEAD
            ready = pending[free]
            if len(ready):
                # Where two want one place, the first has it.
                places, first = np.unique(at[ready], return_index=True)
                winners = ready[first]
                self._used += int(np.count_nonzero(self._keys[places] == _EMPTY))
                self._keys[places] = keys[winners]
                self._slots[places] = slots[winners]
                self._live += len(winners)
                left = np.ones(len(keys), bool)
                left[winners] = False
                pending = pending[left[pending]]
            at[pending] = (at[pending] + 1) & self._mask

    def remove(self, keys: U64) -> None:
        """Forgets keys; an absent one is success."""
        at = self._home(keys)
        pending = np.arange(len(keys))
        while len(pending):
            there = self._keys[at[pending]]
            hit = there == keys[pending]
            places = at[pending[hit]]
            self._keys[places] = _DEAD
            self._live -= len(places)
            pending = pending[~hit & (there != _EMPTY)]
            at[pending] = (at[pending] + 1) & self._mask

    def _rebuild(self, more: int) -> None:
        live = self._keys > _DEAD
        keys, slots = self._keys[live], self._slots[live]
        bits = 12
        while 1 << bits < 4 * (len(keys) + more):
            bits += 1
        self._clear(bits)
        self._put(keys, slots)


class Slots:
    """A table of columns whose rows are given out by key and taken back when unused.

    Slot 0 is never given out, so that 0 can mean none.
    """

    def __init__(self, dtype: dict[str, str], *, size: int = 1024) -> None:
        self._dtype = dtype
        self.columns: dict[str, AnyArray] = {n: np.zeros(size, t) for n, t in dtype.items()}
        self.last = np.zeros(size, np.uint64)  # the newest row that may name it, plus one
        self.born = np.zeros(size, np.uint64)  # counts allocations: tells a slot's contents apart
        self._keys = np.zeros(size, np.uint64)
        self._index = Index()
        self._free: I64 = np.arange(size - 1, 0, -1)
        self._in_use = np.zeros(size, bool)
        self.births = 0

    @property
    def size(self) -> int:
        return len(self.last)

    @property
    def used(self) -> int:
        return self.size - 1 - len(self._free)

    def intern(self, keys: U64, *, head: int, tail: int) -> tuple[I64, I64, I64]:
        """The slot of each key; which slots are new, and where in `keys` each new one first occurs.

        The caller fills the columns of the new ones. `tail` is the oldest row of the ring, `head`
        the number that the last of the rows being written will have, plus one.
        """
        slots = self._index.find(keys)
        missing = np.flatnonzero(slots < 0)
        if len(missing):
            distinct, first, inverse = np.unique(
                keys[missing], return_index=True, return_inverse=True
            )
            # What this very batch names is in use as well.
            self.last[slots[slots > 0]] = head
            new = self._allocate(len(distinct), tail)
            self._keys[new] = distinct
            self._index.insert(distinct, new)
            slots[missing] = new[inverse]
            where = missing[first]
        else:
            new = where = np.zeros(0, np.int64)
        self.last[slots] = head
        return slots, new, where

    def add(self, count: int, *, head: int, tail: int) -> I64:
        """Slots without a key, for what is not looked up."""
        new = self._allocate(count, tail)
        self._keys[new] = 0
        self.last[new] = head
        return new

    def retire(self, slots: I64) -> None:
        """Let no key lead to these any more; rows that name them keep them."""
        keys = self._keys[slots]
        self._index.remove(keys[keys > _DEAD])
        self._keys[slots] = 0

    def live(self) -> I64:
        """Slots that a key leads to."""
        return np.flatnonzero(self._keys > _DEAD)

    def _allocate(self, count: int, tail: int) -> I64:
        spare = count + self.size // 4  # so that taking back pays for itself
        if len(self._free) < spare:
            self._reclaim(tail)
        if len(self._free) < spare:
            self._grow(count)
        new = self._free[len(self._free) - count :]
        self._free = self._free[: len(self._free) - count]
        self._in_use[new] = True
        self.born[new] = np.arange(self.births + 1, self.births + 1 + count, dtype=np.uint64)
        self.births += count
        return new.copy()

    def _reclaim(self, tail: int) -> None:
        gone = np.flatnonzero(self._in_use & (self.last <= np.uint64(tail)))
        self.retire(gone)
        self._in_use[gone] = False
        self._free = np.concatenate([self._free, gone])

    def _grow(self, count: int) -> None:
        old = self.size
        size = old
        while size - old < count or size == old:
            size *= 2
        for name, column in self.columns.items():
            self.columns[name] = _longer(column, size)
        self.last = _longer(self.last, size)
        self.born = _longer(self.born, size)
        self._keys = _longer(self._keys, size)
        self._in_use = _longer(self._in_use, size)
        self._free = np.concatenate([np.arange(size - 1, old - 1, -1), self._free])


def _longer(array: AnyArray, size: int) -> AnyArray:
    longer = np.zeros(size, array.dtype)
    longer[: len(array)] = array
    return longer
