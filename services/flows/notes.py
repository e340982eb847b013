"""What the agent told of itself lately, in order, for those who ask and those who follow."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Final

KEPT: Final = 4096


@dataclass(frozen=True, slots=True)
class Note:
    time_ns: int  # wall clock
    event: bytes  # a serialised flow.AgentEvent


class Notes:
    """Owned by the event loop. Notes are numbered from 0."""

    def __init__(self, kept: int = KEPT) -> None:
        self._notes: deque[Note] = deque(maxlen=kept)
        self.head = 0
        self._news = asyncio.Event()

    @property
    def tail(self) -> int:
        return self.head - len(self._notes)

    def add(self, notes: Iterable[Note]) -> None:
        for note in notes:
            self._notes.append(note)
            self.head += 1
        self._news.set()
        self._news = asyncio.Event()

    def since(self, number: int) -> tuple[Note, ...]:
        """Those from this number on, as far as they are kept."""
        return tuple(islice(self._notes, max(0, number - self.tail), None))

    async def wait_beyond(self, number: int) -> None:
        """Returns when there are notes from this number on."""
        while self.head <= number:
            await self._news.wait()
