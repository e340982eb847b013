"""The service's metrics. Gauges are read when they are scraped."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from cilia.kv.allocator import AllocatorStats
from cilia.kv.backend import Backend
from services.identity.keys import Kind
from services.identity.sessions import Sessions
from services.identity.view import View
from services.identity.watch import Hub


class Collector:
    """A prometheus_client collector over what the parts count anyway."""

    def __init__(
        self,
        *,
        backend: Backend,
        stats: AllocatorStats,
        sessions: Sessions,
        view: View,
        hub: Hub,
    ) -> None:
        self._backend = backend
        self._stats = stats
        self._sessions = sessions
        self._view = view
        self._hub = hub

    def collect(self) -> Iterator[Metric]:
        view, hub, stats = self._view, self._hub, self._stats
        rows = GaugeMetricFamily("cilia_identity_rows", "Rows in the store.", labels=["kind"])
        for kind in Kind:
            rows.add_metric([kind.value], view.count(kind))
        yield rows
        for name, text, value in (
            ("quarantined_ids", "Freed identities kept back.", view.quarantined),
            ("sessions", "Nodes with a live stream.", self._sessions.connected),
            ("watches", "Open watches.", hub.watches),
            ("store_revision", "Newest durable revision.", self._backend.revision),
            ("store_compacted_revision", "Oldest readable one.", self._backend.compacted),
        ):
            yield GaugeMetricFamily(f"cilia_identity_{name}", text, value=value)
        allocations = CounterMetricFamily(
            "cilia_identity_allocations_total", "Allocations by outcome.", labels=["outcome"]
        )
        for outcome in ("created", "reused", "conflicts", "released", "swept", "kept"):
            allocations.add_metric([outcome], getattr(stats, outcome))
        yield allocations
        for name, text, value in (
            ("watch_frames_total", "Watch messages serialised.", hub.encoded),
            ("watch_resets_total", "Clients told to begin anew.", hub.resets),
        ):
            yield CounterMetricFamily(f"cilia_identity_{name}", text, value=value)
