"""A reader of the store that hands batches to a sink until it takes them.

A sink that fails gets the same batch again, with growing pauses: at least once. Meanwhile the ring
goes on; what is overwritten before the pump comes to it is counted as lost to this export.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import structlog

from cilia.telemetry import fields
from services.flows.filterspec import FlowQuery
from services.flows.query import Cursor, State
from services.flows.rows import Rows
from services.flows.store import Store

log = structlog.get_logger()

_BATCH: Final = 2048
_PAUSES_S: Final = (0.2, 1.0, 5.0, 15.0)


class SinkFailed(Exception):
    """The sink did not take the batch."""


class Sink(Protocol):
    """Takes serialised GetFlowsResponses; called in a thread, one batch at a time."""

    def write(self, messages: Sequence[bytes]) -> None:
        """Raises SinkFailed."""

    def close(self) -> None: ...


class Pump:
    """One export under way."""

    def __init__(
        self,
        name: str,
        store: Store,
        query: FlowQuery,
        encode: Callable[[Rows], list[bytes]],
        sink: Sink,
    ) -> None:
        self.name = name
        self._store = store
        self._query = query
        self._encode = encode
        self._sink = sink
        self.exported = 0
        self.lost = 0
        self.failures = 0
        self.error = ""

    async def run(self) -> None:
        """Until it is cancelled, or the query ends."""
        cursor: Cursor = self._store.query(self._query)
        try:
            while True:
                items = (
                    await asyncio.to_thread(cursor.read)
                    if cursor.state is State.DISK
                    else cursor.read()
                )
                messages: list[bytes] = []
                for item in items:
                    if isinstance(item, Rows):
                        messages += self._encode(item)
                    else:
                        self.lost += item.count or 0
                for at in range(0, len(messages), _BATCH):
                    await self._deliver(messages[at : at + _BATCH])
                if cursor.state is State.DONE:
                    return
                if cursor.state is State.WAITING:
                    await self._store.wait_for_rows(cursor)
                else:
                    await asyncio.sleep(0)
        finally:
            await asyncio.to_thread(self._sink.close)

    async def _deliver(self, messages: list[bytes]) -> None:
        attempts = 0
        while True:
            try:
                await asyncio.to_thread(self._sink.write, messages)
            except SinkFailed as error:
                self.failures += 1
                if str(error) != self.error:
                    log.warning(
                        "An export fails, and is tried again.",
                        **{fields.PART: self.name, fields.ERROR: str(error)},
                    )
                self.error = str(error)
                await asyncio.sleep(_PAUSES_S[min(attempts, len(_PAUSES_S) - 1)])
                attempts += 1
            else:
                self.error = ""
                self.exported += len(messages)
                return
