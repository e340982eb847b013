"""Records and sums for an OpenTelemetry collector, by its SDK over gRPC.

The SDK's own processors make batches of their own and drop what does not fit; a pump's batches are
to be answered for, so the exporter is called directly.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.exporter.otlp.proto.grpc._log_exporter import OTLPLogExporter
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk._logs import ReadWriteLogRecord
from opentelemetry.sdk._logs.export import LogRecordExportResult
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from services.flows.exporters.pump import SinkFailed
from services.flows.exporters.settings import OtlpExport

Attributes = dict[str, str | int | bool]
SCOPE: Final = InstrumentationScope("cilia.flows")
_TIMEOUT_S: Final = 10.0
_BAD: Final = ("DROPPED", "ERROR")


def resource_of(node: str, version: str) -> Resource:
    return Resource.create(
        {"service.name": "cilia-flows", "service.version": version, "host.name": node}
    )


class OtlpLogs:
    """A sink: each flow a log record. What the collector does not take is tried again."""

    def __init__(
        self,
        export: OtlpExport,
        resource: Resource,
        record: Callable[[bytes], tuple[int, str, Attributes]],
    ) -> None:
        self._name = export.endpoint
        self._resource = resource
        self._record = record
        self._exporter = OTLPLogExporter(
            endpoint=export.endpoint,
            insecure=export.endpoint.startswith("http://"),
            headers=export.headers or None,
            timeout=_TIMEOUT_S,
        )

    def write(self, messages: Sequence[bytes]) -> None:
        batch = [self._log(message) for message in messages]
        result = self._exporter.export(batch)
        if result is not LogRecordExportResult.SUCCESS:
            raise SinkFailed(f"{self._name} takes no records")

    def _log(self, message: bytes) -> Any:
        time_ns, body, attributes = self._record(message)
        bad = attributes.get("flow.verdict") in _BAD
        record = LogRecord(
            timestamp=time_ns,
            observed_timestamp=time_ns,
            severity_number=SeverityNumber.WARN if bad else SeverityNumber.INFO,
            severity_text="WARN" if bad else "INFO",
            body=body,
            attributes=attributes,
        )
        return ReadWriteLogRecord(
            log_record=record, resource=self._resource, instrumentation_scope=SCOPE
        )

    def close(self) -> None:
        self._exporter.shutdown()


class OtlpMetrics:
    """The counters of the Prometheus page, sent every so often."""

    def __init__(
        self,
        export: OtlpExport,
        resource: Resource,
        sums: Callable[[], Iterable[tuple[str, str, dict[str, str], float]]],
    ) -> None:
        """`sums` gives (name, help, labels, value) of every series; called in a thread."""
        self._sums = sums
        self._lock = threading.Lock()
        self._known: set[str] = set()
        exporter = OTLPMetricExporter(
            endpoint=export.endpoint,
            insecure=export.endpoint.startswith("http://"),
            headers=export.headers or None,
            timeout=_TIMEOUT_S,
        )
        self._provider = MeterProvider(
            resource=resource,
            metric_readers=[
                PeriodicExportingMetricReader(
                    exporter, export_interval_millis=export.interval_s * 1000
                )
            ],
            shutdown_on_exit=False,
        )
        self._meter = self._provider.get_meter(SCOPE.name)
        self.discover()

    def discover(self) -> None:
        """Take up the names that there are now."""
        with self._lock:
            for name, text, _, _ in self._sums():
                if name not in self._known:
                    self._known.add(name)
                    self._meter.create_observable_counter(
                        name, callbacks=[self._observe(name)], description=text
                    )

    def _observe(self, name: str) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(_: CallbackOptions) -> Iterable[Observation]:
            return [
                Observation(value, labels)
                for found, _, labels, value in self._sums()
                if found == name
            ]

        return observe

    def close(self) -> None:
        self._provider.shutdown(timeout_millis=int(_TIMEOUT_S * 1000))
