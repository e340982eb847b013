"""How the store and the sessions stand, for `cilia store status` and the metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cilia.kv.backend import Backend, BackendStatus
from services.identity.keys import Kind
from services.identity.sessions import SessionInfo, Sessions
from services.identity.view import View


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusReport:
    store: BackendStatus
    sessions: Sequence[SessionInfo]
    identities: int
    quarantined: int


class Status:
    def __init__(self, *, backend: Backend, sessions: Sessions, view: View) -> None:
        self._backend = backend
        self._sessions = sessions
        self._view = view

    async def read(self) -> StatusReport:
        return StatusReport(
            store=await self._backend.status(),
            sessions=await self._sessions.list(),
            identities=self._view.count(Kind.IDENTITY),
            quarantined=self._view.quarantined,
        )
