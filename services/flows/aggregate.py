"""Sums over flows, by columns."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cilia.errors import ExhaustedError
from services.flows.grouping import Column, keys_of, unmix
from services.flows.rows import Rows


class TooManyGroups(ExhaustedError):
    default_cure = "Group by fewer columns, or ask for less time"


@dataclass(slots=True)
class Group:
    flows: int = 0
    bytes: int = 0  # on the wire
    first_ns: int = 0
    last_ns: int = 0


class Sums:
    """Add rows, then ask for the largest groups."""

    def __init__(self, columns: Sequence[Column], *, limit: int) -> None:
        self._columns = tuple(columns)
        self._limit = limit
        self._groups: dict[tuple[str, ...], Group] = {}
        self.flows = 0
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._groups)

    def add(self, rows: Rows) -> None:
        """Raises TooManyGroups."""
        if not len(rows):
            return
        mixed, texts = keys_of(self._columns, rows)
        distinct, inverse = np.unique(mixed, return_inverse=True)
        count = len(distinct)
        flows = np.bincount(inverse, minlength=count)
        octets = np.bincount(inverse, weights=rows.columns["length"], minlength=count)
        times = rows.times
        # Of several assignments to one place the last one stays, and rows are in order of time.
        last = np.empty(count, np.int64)
        last[inverse] = times
        first = np.empty(count, np.int64)
        first[inverse[::-1]] = times[::-1]
        for at, number in enumerate(distinct.tolist()):
            keys = unmix(number, texts)
            group = self._groups.get(keys)
            if group is None:
                if len(self._groups) >= self._limit:
                    raise TooManyGroups(f"there are more than {self._limit} groups")
                group = self._groups[keys] = Group(first_ns=int(first[at]), last_ns=int(last[at]))
            group.flows += int(flows[at])
            group.bytes += int(octets[at])
            group.first_ns = min(group.first_ns, int(first[at]))
            group.last_ns = max(group.last_ns, int(last[at]))
        self.flows += len(rows)
        self.bytes += int(rows.columns["length"].sum(dtype=np.int64))

    def largest(self, number: int) -> list[tuple[tuple[str, ...], Group]]:
        """Most flows first; equal ones by their keys."""
        return heapq.nsmallest(
            number, self._groups.items(), key=lambda item: (-item[1].flows, item[0])
        )
