"""What passed through each redirect: from Envoy's own statistics, or, where others started it, from
its access log."""

from __future__ import annotations

import re
from typing import Final

from services.xds.envoy.accesslog import AccessLogReceiver
from services.xds.envoy.admin import AdminClient, AdminUnavailable
from services.xds.translator import Counters

_FILTER: Final = (
    r"^http\.redirect-\d+\.(downstream_rq_total|downstream_cx_total|downstream_cx_active"
    r"|rbac\..*denied)$"
)
_NAME: Final = re.compile(r"http\.redirect-(\d+)\.(.+)")
# The connection manager's own names (docs: HTTP connection manager statistics).
_FIELDS: Final = {
    "downstream_rq_total": "requests",
    "downstream_cx_total": "connections",
    "downstream_cx_active": "active",
}


class LogCounters:
    """A RedirectCounters that knows of requests only, and of those that were logged."""

    def __init__(self, receiver: AccessLogReceiver) -> None:
        self._receiver = receiver

    async def counters(self) -> dict[int, Counters]:
        return {
            port: Counters(requests=counts.requests, denied=counts.denied)
            for port, counts in self._receiver.counts.items()
        }


class EnvoyCounters:
    """A RedirectCounters."""

    def __init__(self, admin: AdminClient) -> None:
        self._admin = admin

    async def counters(self) -> dict[int, Counters]:
        """Nothing, while Envoy is away."""
        try:
            stats = await self._admin.stats(_FILTER)
        except AdminUnavailable:
            return {}
        found: dict[int, dict[str, int]] = {}
        for name, value in stats.items():
            if (match := _NAME.fullmatch(name)) is None:
                continue
            row = found.setdefault(int(match[1]), {})
            field = _FIELDS.get(match[2], "denied")
            row[field] = row.get(field, 0) + value
        return {port: Counters(**row) for port, row in found.items()}
