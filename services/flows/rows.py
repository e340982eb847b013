"""Rows of flows as columns: what a reader is handed, from memory or from a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from services.flows.dimensions import Dimensions
from services.flows.interning import I64, U64, AnyArray

ROW: Final[dict[str, str]] = {
    "time_ns": "i8",  # wall clock
    "pair": "u4",
    "meta": "u4",
    "sport": "u2",  # ICMP: the type
    "dport": "u2",  # ICMP: the code
    "length": "u4",  # bytes on the wire
    "l7": "u4",  # 0: none
}


@dataclass(frozen=True, slots=True)
class Rows:
    """Some flows, oldest first. `dimensions` holds until the next event is taken in: encode, or
    take what is needed, before anything is awaited.
    """

    run: int  # which run of the service numbered them
    numbers: U64
    columns: Mapping[str, AnyArray]
    dimensions: Dimensions

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def times(self) -> I64:
        times: I64 = self.columns["time_ns"]
        return times

    def take(self, which: npt.NDArray[np.bool_] | I64 | slice) -> Rows:
        return Rows(
            self.run,
            self.numbers[which],
            {name: column[which] for name, column in self.columns.items()},
            self.dimensions,
        )
