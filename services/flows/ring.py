"""The newest flows, in columns: 2^20 rows by default, the oldest overwritten.

Rows are numbered from 0 for the life of the process; row n lies at n modulo the capacity. Whoever
remembers a number can tell how many rows were overwritten since.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from services.flows.interning import AnyArray
from services.flows.rows import ROW

CHUNK: Final = 1 << 16


class Ring:
    """Single writer; readers copy before the next write."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1024 or capacity & (capacity - 1):
            raise ValueError(f"capacity {capacity} is no power of two from 1024")
        self.capacity = capacity
        self.columns: dict[str, AnyArray] = {n: np.zeros(capacity, t) for n, t in ROW.items()}
        self.head = 0  # the next row's number
        self._chunk = min(CHUNK, capacity)
        chunks = capacity // self._chunk
        self._oldest = np.zeros(chunks, np.int64)
        self._newest = np.zeros(chunks, np.int64)

    @property
    def tail(self) -> int:
        """The oldest row's number."""
        return max(0, self.head - self.capacity)

    def __len__(self) -> int:
        return min(self.head, self.capacity)

    def write(self, values: dict[str, Any], count: int) -> None:
        """Appends rows, at most a capacity of them; a scalar stands for a whole column."""
        done = 0
        while done < count:
            at = self.head & (self.capacity - 1)
            # Up to the end of the chunk, whose bounds are kept.
            room = self._chunk - (at & (self._chunk - 1))
            take = min(room, count - done)
            for name, column in self.columns.items():
                value = values[name]
                column[at : at + take] = (
                    value[done : done + take] if isinstance(value, np.ndarray) else value
                )
            times = self.columns["time_ns"][at : at + take]
            chunk = at // self._chunk
            low, high = int(times.min()), int(times.max())
            if at & (self._chunk - 1):
                low = min(low, int(self._oldest[chunk]))
                high = max(high, int(self._newest[chunk]))
            self._oldest[chunk], self._newest[chunk] = low, high
            self.head += take
            done += take

    def spans(self, start: int, end: int) -> list[tuple[int, int]]:
        """Rows start to end cut at chunks, as (first row, rows): each contiguous in the columns."""
        spans = []
        while start < end:
            take = min(self._chunk - (start & (self._chunk - 1)), end - start)
            spans.append((start, take))
            start += take
        return spans

    def bounds(self, row: int) -> tuple[int, int]:
        """The oldest and newest time in the row's chunk; wider when that is being overwritten."""
        chunk = (row & (self.capacity - 1)) // self._chunk
        newest = self.head - 1
        if (
            row // self._chunk != newest // self._chunk
            and chunk == (newest & (self.capacity - 1)) // self._chunk
        ):
            return -(1 << 62), 1 << 62  # being overwritten: what is kept are the new rows' bounds
        return int(self._oldest[chunk]), int(self._newest[chunk])

    def slice(self, first: int, count: int) -> dict[str, AnyArray]:
        """Views of contiguous rows, not copies."""
        at = first & (self.capacity - 1)
        return {name: column[at : at + count] for name, column in self.columns.items()}

    def oldest_time(self) -> int:
        return int(self.columns["time_ns"][self.tail & (self.capacity - 1)]) if self.head else 0

    def newest_time(self) -> int:
        return int(self.columns["time_ns"][(self.head - 1) & (self.capacity - 1)])
