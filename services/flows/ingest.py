"""Hearing the agent: what it streams goes into the store, and what it did not say into the ledger.

AgentClient.batches ──▶ meaning, new ─▶ Store.learn
                        events, L7  ──▶ Store.take, take_l7
                        meaning, old ─▶ Store.forget
                        losses ───────▶ Ledger
                        notifications ▶ Notes
no agent ─────────────────────────────▶ Ledger: nobody was watching, from when to when
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

import structlog

from cilia.errors import DomainError, UnavailableError
from cilia.telemetry import fields
from services.flows.interning import AnyArray
from services.flows.ledger import Cause
from services.flows.notes import Note, Notes
from services.flows.store import L7Event, Store
from services.flows.world import Meaning

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentBatch:
    """One message of the stream."""

    events: AnyArray
    wall_offset_ns: int
    lost_ring: int = 0
    lost_transport: int = 0
    lost_l7: int = 0
    meaning: Meaning | None = None
    notes: tuple[Note, ...] = ()
    l7: tuple[L7Event, ...] = ()


class AgentClient(Protocol):
    def batches(self) -> AsyncIterator[AgentBatch]:
        """For as long as the agent runs. Raises DomainError when it does not, or stops."""
        ...


class AgentAway(UnavailableError):
    """The agent's stream ended."""


class Ingest:
    """`follow` is the work of a controller, which tries again."""

    def __init__(self, client: AgentClient, store: Store, notes: Notes) -> None:
        self._client = client
        self._store = store
        self._notes = notes
        self._away_since: int | None = None
        self.problem = "the agent was not heard yet"
        self.batches = 0

    @property
    def watching(self) -> bool:
        return not self.problem

    async def follow(self) -> None:
        """Takes in what the agent says, until it says no more. Raises DomainError."""
        heard = False
        try:
            async for batch in self._client.batches():
                if not heard:
                    heard = True
                    self._back()
                self.take(batch)
            raise AgentAway("the agent ended its stream of events")
        except DomainError as error:
            self._gone(error.message)
            raise

    def take(self, batch: AgentBatch) -> None:
        store = self._store
        self.batches += 1
        if batch.meaning is not None:
            store.learn(batch.meaning)
        if batch.lost_ring:
            store.lose(Cause.KERNEL, batch.lost_ring)
        if batch.lost_transport:
            store.lose(Cause.TRANSPORT, batch.lost_transport)
        if batch.lost_l7:
            store.lose(Cause.TRANSPORT, batch.lost_l7, detail="requests that proxies told of")
        if len(batch.events):
            store.take(batch.events, wall_offset_ns=batch.wall_offset_ns)
        if batch.l7:
            store.take_l7(batch.l7, wall_offset_ns=batch.wall_offset_ns)
        if batch.meaning is not None:
            store.forget(batch.meaning)
        if batch.notes:
            self._notes.add(batch.notes)

    def tick(self) -> None:
        """Lets the gap that is open reach to now."""
        if self._away_since is not None:
            self._store.ledger.extend(Cause.AGENT, time.time_ns())

    def _back(self) -> None:
        self.tick()
        if self._away_since is not None:
            log.info("The agent is heard again.")
        self._away_since = None
        self.problem = ""

    def _gone(self, why: str) -> None:
        self.problem = why
        if self._away_since is None:
            self._away_since = time.time_ns()
            self._store.lose(Cause.AGENT, None, detail=why, since_ns=self._away_since)
            log.warning("The agent is not heard.", **{fields.REASON: why})
