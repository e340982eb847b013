"""Exports that come, change and go with the file that lists them. A lifecycle part."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import structlog
from opentelemetry.sdk.resources import Resource

from cilia.controller import spawn
from cilia.errors import InvalidError
from cilia.telemetry import fields
from services.flows.encoder import Encoder
from services.flows.exporters.convert import json_line, log_record, query_of
from services.flows.exporters.jsonlines import JsonLines, RotatedFile
from services.flows.exporters.otlp import OtlpLogs, OtlpMetrics, resource_of
from services.flows.exporters.pump import Pump, Sink
from services.flows.exporters.settings import Export, FileExport, OtlpExport, read_exports
from services.flows.metrics import FlowMetrics
from services.flows.store import Store
from services.flows.watched import changes

log = structlog.get_logger()


@dataclass(slots=True)
class _Running:
    pump: Pump | None
    task: asyncio.Task[None] | None
    metrics: OtlpMetrics | None


class Exports:
    """Owned by the event loop."""

    def __init__(
        self,
        store: Store,
        file: Path,
        *,
        version: str,
        metrics: FlowMetrics | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._store = store
        self._file = file
        self._version = version
        self._metrics = metrics
        self._on_change = on_change
        self._running: dict[Export, _Running] = {}
        self._group: asyncio.TaskGroup | None = None
        self._watch: asyncio.Task[None] | None = None
        self.problem = ""

    @property
    def pumps(self) -> tuple[Pump, ...]:
        return tuple(r.pump for r in self._running.values() if r.pump is not None)

    async def start(self) -> None:
        """Raises ExportsInvalid: a service that is told nonsense at its start says so."""
        exports = read_exports(self._file)
        group = asyncio.TaskGroup()
        await group.__aenter__()
        self._group = group
        await self._follow(exports)
        self._watch = spawn(group, self._watch_file(), "exports-file")

    async def stop(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        await self._follow(())
        group, self._group = self._group, None
        if group is not None:
            await group.__aexit__(None, None, None)

    async def _watch_file(self) -> None:
        async for _ in changes(self._file):
            try:
                await self._follow(read_exports(self._file))
                self.problem = ""
            except InvalidError as error:
                self.problem = error.message
                log.warning("Exports stay as they were.", **{fields.ERROR: error.message})
            self._on_change()

    async def _follow(self, exports: Iterable[Export]) -> None:
        """Raises InvalidError before anything is changed."""
        wanted = tuple(exports)
        fresh = {
            export: query_of(export.name, export.selection)
            for export in wanted
            if export not in self._running
        }
        for export in [known for known in self._running if known not in wanted]:
            await self._end(self._running.pop(export))
        for export, (query, mask) in fresh.items():
            running = self._running[export] = _Running(None, None, None)
            sink = self._sink(export)
            if isinstance(export, OtlpExport) and export.metrics and self._metrics is not None:
                running.metrics = OtlpMetrics(export, self._resource(), self._metrics.sums)
            if sink is not None and self._group is not None:
                running.pump = Pump(export.name, self._store, query, Encoder(mask).messages, sink)
                running.task = spawn(self._group, running.pump.run(), f"export-{export.name}")

    def _resource(self) -> Resource:
        return resource_of(self._store.world.node_name, self._version)

    def _sink(self, export: Export) -> Sink | None:
        match export:
            case FileExport():
                out = RotatedFile(
                    export.path,
                    max_bytes=export.max_bytes,
                    backups=export.backups,
                    compress=export.compress,
                )
                return JsonLines(out, json_line)
            case OtlpExport():
                return OtlpLogs(export, self._resource(), log_record) if export.logs else None

    async def _end(self, running: _Running) -> None:
        if running.task is not None:
            running.task.cancel()
            await asyncio.wait([running.task])
        if running.metrics is not None:
            await asyncio.to_thread(running.metrics.close)
