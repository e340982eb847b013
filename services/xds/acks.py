"""Waiting until clients have what they should have.

    outcome = await acks.acknowledged("envoy-1", {LDS: ["l"], RDS: ["r"]}, timeout_s=5)

A resource that was removed counts as acknowledged once the node's clients have let go of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from services.xds.cache import Key
from services.xds.hub import Hub, Standing, State
from services.xds.resources import NodeID, TypeURL


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it when the waiting ended."""

    standings: Mapping[Key, Standing]

    @property
    def ok(self) -> bool:
        return all(s.state is State.ACKED for s in self.standings.values())

    @property
    def refusals(self) -> dict[Key, str]:
        return {k: s.reason for k, s in self.standings.items() if s.state is State.NACKED}

    @property
    def pending(self) -> tuple[Key, ...]:
        return tuple(k for k, s in self.standings.items() if s.state is State.PENDING)


class Acknowledgements:
    """Lets coroutines wait for a node."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._waiting: dict[NodeID, set[asyncio.Event]] = {}
        hub.watch(self._on_news)

    def _on_news(self, node: NodeID) -> None:
        for event in self._waiting.get(node, ()):
            event.set()

    def outcome(self, node: str, wanted: Mapping[TypeURL, Collection[str]]) -> Outcome:
        """How it stands now."""
        found = {
            (url, name): self._hub.standing(NodeID(node), url, name)
            for url, names in wanted.items()
            for name in names
        }
        return Outcome(found)

    async def acknowledged(
        self,
        node: str,
        wanted: Mapping[TypeURL, Collection[str]],
        *,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Returns when nothing is pending any more, accepted or refused, or when time is up."""
        event = asyncio.Event()
        waiting = self._waiting.setdefault(NodeID(node), set())
        waiting.add(event)
        try:
            async with asyncio.timeout(timeout_s):
                while (outcome := self.outcome(node, wanted)).pending:
                    event.clear()
                    await event.wait()
        except TimeoutError:
            return self.outcome(node, wanted)
        finally:
            waiting.discard(event)
            if not waiting:
                self._waiting.pop(NodeID(node), None)
        return outcome
