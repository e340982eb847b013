"""Exports: files that rotate, a collector that really listens, and a file that lists them."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2, logs_service_pb2_grpc
from opentelemetry.proto.collector.metrics.v1 import (
    metrics_service_pb2,
    metrics_service_pb2_grpc,
)

from services.flows import convert
from services.flows.encoder import Encoder
from services.flows.exporters.jsonlines import RotatedFile
from services.flows.exporters.manager import Exports
from services.flows.exporters.pump import SinkFailed
from services.flows.exporters.settings import ExportsInvalid, read_exports
from services.flows.metrics import FlowMetrics, parse_spec
from services.flows.rows import Rows
from services.flows.store import Store
from tests.unit.flows.flowworld import OFFSET_NS, meaning, random_events


@pytest.fixture
def store() -> Store:
    store = Store(capacity=4096, run=4, cel=convert.compile_cel, encode_flows=Encoder().flows)
    store.learn(meaning())
    return store


def put(store: Store, count: int, seed: int = 1) -> None:
    start = 1_000_000_000 + store.counters.seen * 1_000_000
    for seen in random_events(random.Random(seed), count, start_ns=start):
        if seen.l7 is None:
            store.take(seen.event(), wall_offset_ns=OFFSET_NS)
        else:
            store.take_l7([seen.l7_event()], wall_offset_ns=OFFSET_NS)


async def until(reached: Callable[[], bool], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not reached():  # noqa: ASYNC110  # another thread's doing
            await asyncio.sleep(0.01)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---- files


async def test_a_file_gets_what_its_filters_choose(store: Store, tmp_path: Path) -> None:
    out = tmp_path / "log" / "drops.jsonl"
    config = tmp_path / "exports.yaml"
    config.write_text(
        f"flowLogs:\n"
        f"- {{name: drops, filePath: {out}, includeFilters: [{{verdict: [DROPPED]}}],\n"
        f"   excludeFilters: [{{source_pod: [lab/xwing]}}],\n"
        f"   fieldMask: [verdict, source.pod_name]}}\n"
    )
    exports = Exports(store, config, version="v0")
    await exports.start()
    try:
        await asyncio.sleep(0)
        put(store, 400)
        wanted = store.query(
            convert.flows_request(
                _request(['{"verdict": ["DROPPED"]}'], ['{"source_pod": ["lab/xwing"]}'])
            )[0]
        )
        expected = sum(len(item) for item in wanted.read() if isinstance(item, Rows))
        await until(lambda: len(lines(out)) >= expected)
    finally:
        await exports.stop()
    found = lines(out)
    assert len(found) == expected > 20
    assert {line["flow"]["verdict"] for line in found} == {"DROPPED"}
    assert {key for line in found for key in line["flow"]} <= {"verdict", "source"}
    assert {line["node_name"] for line in found} == {"default/node1"}


def _request(allow: list[str], deny: list[str]) -> Any:
    from google.protobuf import json_format

    from protos.hubble.v1 import observer_pb2

    return json_format.ParseDict(
        {"whitelist": [json.loads(x) for x in allow], "blacklist": [json.loads(x) for x in deny]},
        observer_pb2.GetFlowsRequest(),
    )


async def test_exports_come_and_go_with_their_file(store: Store, tmp_path: Path) -> None:
    first, second, config = tmp_path / "1", tmp_path / "2", tmp_path / "exports.yaml"
    config.write_text(f"flowLogs: [{{name: a, filePath: {first}}}]")
    changed = asyncio.Event()
    exports = Exports(store, config, version="v0", on_change=changed.set)
    await exports.start()
    try:
        await asyncio.sleep(0)
        put(store, 5)
        await until(lambda: len(lines(first)) == 5)
        config.write_text(f"flowLogs: [{{name: b, filePath: {second}}}]")
        async with asyncio.timeout(10):
            await changed.wait()
        await asyncio.sleep(0)
        put(store, 3)
        await until(lambda: len(lines(second)) == 3)
        assert len(lines(first)) == 5
        changed.clear()
        config.write_text("flowLogs: [{name: b}]")
        async with asyncio.timeout(10):
            await changed.wait()
        assert "flowLogs[1].filePath: is missing" in exports.problem
        put(store, 2)
        await until(lambda: len(lines(second)) == 5)
    finally:
        await exports.stop()


async def test_a_full_disk_loses_nothing_once_there_is_room(store: Store, tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a directory should be")
    config = tmp_path / "exports.yaml"
    config.write_text(f"flowLogs: [{{name: a, filePath: {blocked}/out}}]")
    exports = Exports(store, config, version="v0")
    await exports.start()
    try:
        await asyncio.sleep(0)
        put(store, 20)
        (pump,) = exports.pumps
        await until(lambda: bool(pump.error))
        blocked.unlink()
        await until(lambda: pump.exported == 20)
        assert len(lines(blocked / "out")) == 20
        assert pump.lost == 0
    finally:
        await exports.stop()


def test_rotation(tmp_path: Path) -> None:
    path = tmp_path / "out"
    out = RotatedFile(path, max_bytes=100, backups=2)
    for number in range(10):
        out.write([b"%039d\n" % number])
    out.close()
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["out", "out.1", "out.2"]
    kept = [int(line) for name in ("out.2", "out.1", "out") for line in (tmp_path / name).open()]
    assert kept == [4, 5, 6, 7, 8, 9]


def test_rotation_compresses(tmp_path: Path) -> None:
    out = RotatedFile(tmp_path / "out", max_bytes=50, backups=3, compress=True)
    out.write([b"%040d\n" % number for number in range(3)])
    out.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.1.gz", "out.2.gz"]
    assert int(gzip.decompress((tmp_path / "out.2.gz").read_bytes())) == 0


def test_a_half_line_of_a_killed_run_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b'{"whole": 1}\n{"half": ')
    out = RotatedFile(path, max_bytes=1000)
    out.write([b"{}\n"])
    out.close()
    assert path.read_bytes() == b'{"whole": 1}\n{"half": \n{}\n'


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(SinkFailed, match="cannot write"):
        RotatedFile(tmp_path / "out", max_bytes=10).write([b"x\n"])


# ---- a collector


class Collector(
    logs_service_pb2_grpc.LogsServiceServicer, metrics_service_pb2_grpc.MetricsServiceServicer
):
    """What an OpenTelemetry collector's receiver is: both services on one port."""

    def __init__(self) -> None:
        self.records: list[Any] = []
        self.metrics: dict[str, float] = {}
        self.refuse = threading.Event()
        self.server = grpc.server(futures.ThreadPoolExecutor(2))
        for module, name, servicer in (
            (logs_service_pb2_grpc, "LogsService", self),
            (metrics_service_pb2_grpc, "MetricsService", _Metrics(self)),
        ):
            getattr(module, f"add_{name}Servicer_to_server")(servicer, self.server)
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()

    def Export(self, request: Any, context: Any) -> Any:
        if self.refuse.is_set():
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not now")
        for resource in request.resource_logs:
            for scope in resource.scope_logs:
                self.records += scope.log_records
        return logs_service_pb2.ExportLogsServiceResponse()


class _Metrics(metrics_service_pb2_grpc.MetricsServiceServicer):
    def __init__(self, collector: Collector) -> None:
        self._collector = collector

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_metrics:
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    self._collector.metrics[metric.name] = sum(
                        p.as_double or p.as_int for p in metric.sum.data_points
                    )
        return metrics_service_pb2.ExportMetricsServiceResponse()


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.server.stop(0)


@pytest.fixture
async def exporting(store: Store, collector: Collector, tmp_path: Path) -> AsyncIterator[Exports]:
    config = tmp_path / "exports.yaml"
    config.write_text(
        f"otlp: [{{name: c, endpoint: 'http://127.0.0.1:{collector.port}', metrics: true,"
        " intervalSeconds: 1}]"
    )
    metrics = FlowMetrics([parse_spec("flow"), parse_spec("drop")])
    put(store, 10)
    metrics.count(store.rows(0, 10))
    exports = Exports(store, config, version="v0", metrics=metrics)
    await exports.start()
    await asyncio.sleep(0)
    yield exports
    await exports.stop()


async def test_flows_as_log_records(store: Store, collector: Collector, exporting: Exports) -> None:
    put(store, 50, seed=2)
    await until(lambda: len(collector.records) == 50)
    attributes = [
        {a.key: a.value.string_value or a.value.int_value for a in record.attributes}
        for record in collector.records
    ]
    assert all(record.time_unix_nano > OFFSET_NS for record in collector.records)
    assert {a["flow.verdict"] for a in attributes} >= {"FORWARDED", "DROPPED"}
    severities = {
        (a["flow.verdict"], record.severity_text)
        for a, record in zip(attributes, collector.records, strict=True)
    }
    assert ("DROPPED", "WARN") in severities
    assert ("FORWARDED", "INFO") in severities


async def test_a_collector_that_refuses_gets_them_again(
    store: Store, collector: Collector, exporting: Exports
) -> None:
    collector.refuse.set()
    put(store, 7, seed=2)
    (pump,) = exporting.pumps
    await until(lambda: pump.failures > 0)
    assert not collector.records
    collector.refuse.clear()
    await until(lambda: len(collector.records) == 7)
    assert pump.lost == 0


async def test_sums_as_metrics(collector: Collector, exporting: Exports) -> None:
    await until(lambda: "hubble_flows_processed" in collector.metrics)
    assert collector.metrics["hubble_flows_processed"] == 10


# ---- what the file may say


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[", "is not YAML"),
        ("logs: []", "only flowLogs and otlp"),
        ("flowLogs: {}", None),
        ("flowLogs: [1]", "flowLogs\\[1\\] is no mapping"),
        ("flowLogs: [{name: a, filePath: rel}]", "filePath: an absolute path"),
        ("flowLogs: [{name: a, filePath: /a, fileMaxSizeMb: 0}]", "fileMaxSizeMb: between"),
        ("flowLogs: [{name: a, filePath: /a, colour: 1}]", "unknown field colour"),
        ("flowLogs: [{name: a, filePath: /a}, {name: b, filePath: /a}]", "one file"),
        ("flowLogs: [{name: a, filePath: /a, end: soon}]", "end: a time"),
        ("otlp: [{name: a, endpoint: 'localhost:1'}]", "endpoint: http://"),
        ("otlp: [{name: a, endpoint: 'http://h:1', logs: 1}]", "logs: true or false"),
    ],
)
def test_files_that_make_no_sense(tmp_path: Path, text: str, words: str | None) -> None:
    path = tmp_path / "exports.yaml"
    path.write_text(text)
    if words is None:
        assert read_exports(path) == ()
        return
    with pytest.raises(ExportsInvalid, match=words):
        read_exports(path)


async def test_a_filter_that_is_none_stops_the_start(store: Store, tmp_path: Path) -> None:
    config = tmp_path / "exports.yaml"
    config.write_text("flowLogs: [{name: a, filePath: /a, includeFilters: [{colour: [red]}]}]")
    exports = Exports(store, config, version="v0")
    with pytest.raises(ExportsInvalid, match="export a: includeFilters"):
        await exports.start()
