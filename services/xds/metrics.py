"""The service's metrics. Gauges are read when they are scraped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from cilia.pki.files import CertificateInfo
from protos.xds.v1 import xds_pb2 as pb
from services.xds.accesslog import AccessLog
from services.xds.cache import ResourceCache
from services.xds.hub import Hub
from services.xds.redirects import Redirects
from services.xds.resources import type_info

_MAX_TYPES = 32


class Collector:
    """A prometheus_client collector over what the parts count anyway."""

    def __init__(
        self,
        *,
        cache: ResourceCache,
        hub: Hub,
        redirects: Redirects | None,
        access_log: AccessLog,
        certificates: Callable[[], list[CertificateInfo]],
    ) -> None:
        self._cache = cache
        self._hub = hub
        self._redirects = redirects
        self._access_log = access_log
        self._certificates = certificates

    def collect(self) -> Iterator[Metric]:
        hub = self._hub
        resources = GaugeMetricFamily(
            "cilia_xds_resources", "Resources that are served.", labels=["type"]
        )
        # Files may hold any type: only so many become labels.
        for url, table in list(self._cache.tables.items())[:_MAX_TYPES]:
            resources.add_metric([type_info(url).short], table.count)
        yield resources
        streams = GaugeMetricFamily("cilia_xds_streams", "Open streams.", labels=["protocol"])
        deltas = sum(attached.stream.delta for attached in hub.streams.values())
        streams.add_metric(["delta"], deltas)
        streams.add_metric(["sotw"], len(hub.streams) - deltas)
        yield streams
        yield GaugeMetricFamily(
            "cilia_xds_rejections", "Resources that clients refuse.", value=len(hub.rejections)
        )
        answers = CounterMetricFamily(
            "cilia_xds_answers_total", "Responses answered, by outcome.", labels=["outcome"]
        )
        answers.add_metric(["ack"], hub.acks)
        answers.add_metric(["nack"], hub.nacks)
        yield answers
        if self._redirects is not None:
            states = Counter(row.state for row in self._redirects.rows.values())
            redirects = GaugeMetricFamily(
                "cilia_xds_redirects", "Redirects by state.", labels=["state"]
            )
            for number, name in (
                (pb.RedirectState.PENDING, "pending"),
                (pb.RedirectState.ACKED, "acked"),
                (pb.RedirectState.FAILED, "failed"),
            ):
                redirects.add_metric([name], states[number])
            yield redirects
        for name, text, value in (
            ("access_log_records_total", "Records made.", self._access_log.records),
            ("access_log_lost_total", "Records that readers lost.", self._access_log.lost),
        ):
            yield CounterMetricFamily(f"cilia_xds_{name}", text, value=value)
        ends = [c.not_after.timestamp() for c in self._certificates() if c.not_after is not None]
        if ends:
            yield GaugeMetricFamily(
                "cilia_xds_certificate_expiry_timestamp_seconds",
                "When the certificate in use ends.",
                value=min(ends),
            )
