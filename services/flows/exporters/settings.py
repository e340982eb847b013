"""What to export: Hubble's `flowLogs`, and `otlp` beside them.

flowLogs:
  - name: drops
    filePath: /var/log/cilia/drops.jsonl
    includeFilters: [{verdict: [DROPPED]}]
    excludeFilters: []
    fieldMask: [time, verdict, source, destination]
    fileMaxSizeMb: 10
    fileMaxBackups: 5
    fileCompress: false
    end: 2026-12-31T00:00:00Z
otlp:
  - name: collector
    endpoint: http://127.0.0.1:4317
    logs: true
    metrics: true
    includeFilters: [{verdict: [DROPPED]}]
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from cilia.errors import InvalidError
from services.flows.watched import read_yaml

_MAX_EXPORTS: Final = 64


class ExportsInvalid(InvalidError):
    """The file that says what to export cannot be followed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which flows, and which of their fields; filters as Hubble writes FlowFilter in JSON."""

    include: tuple[str, ...] = ()  # JSON
    exclude: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    end_ns: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FileExport:
    name: str
    path: Path
    selection: Selection
    max_bytes: int = 10 << 20
    backups: int = 5
    compress: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class OtlpExport:
    name: str
    endpoint: str
    selection: Selection
    logs: bool = True
    metrics: bool = False
    headers: tuple[tuple[str, str], ...] = ()
    interval_s: float = 15.0  # between metrics


Export = FileExport | OtlpExport


def read_exports(path: Path) -> tuple[Export, ...]:
    """Raises ExportsInvalid, naming the entry and the field."""
    document = read_yaml(path, ExportsInvalid)
    if document is None:
        return ()
    if not isinstance(document, dict) or set(document) - {"flowLogs", "otlp"}:
        raise ExportsInvalid(f"{path}: only flowLogs and otlp are known")
    exports: list[Export] = []
    for key, make in (("flowLogs", _file), ("otlp", _otlp)):
        entries = document.get(key) or []
        if not isinstance(entries, list) or len(entries) > _MAX_EXPORTS:
            raise ExportsInvalid(f"{path}: {key} is no list of at most {_MAX_EXPORTS}")
        for number, entry in enumerate(entries, 1):
            if not isinstance(entry, dict):
                raise ExportsInvalid(f"{path}: {key}[{number}] is no mapping")
            exports.append(make(_Entry(f"{path}: {key}[{number}]", entry)))
    names = [(type(export), export.name) for export in exports]
    paths = [export.path for export in exports if isinstance(export, FileExport)]
    if len(set(names)) != len(names) or len(set(paths)) != len(paths):
        raise ExportsInvalid(f"{path}: two entries have one name, or one file")
    return tuple(exports)


class _Entry:
    """One entry, field by field; what nobody asked for is refused at the end."""

    def __init__(self, where: str, fields: Mapping[Any, Any]) -> None:
        self._where = where
        self._left = dict(fields)

    def fail(self, field: str, expected: str) -> ExportsInvalid:
        return ExportsInvalid(f"{self._where}.{field}: {expected}")

    def take(self, field: str, kind: type | tuple[type, ...], expected: str, default: Any) -> Any:
        value = self._left.pop(field, None)
        if value is None:
            if default is _NEEDED:
                raise self.fail(field, f"is missing; {expected}")
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.fail(field, expected)
        return value

    def number(self, field: str, default: float, low: float, high: float) -> float:
        value: float = self.take(field, (int, float), "a number", default)
        if not low <= value <= high:
            raise self.fail(field, f"between {low:g} and {high:g}")
        return value

    def text(self, field: str, default: Any = "") -> str:
        value: str = self.take(field, str, "a text", default)
        return value

    def truth(self, field: str, default: bool) -> bool:
        value: bool = self.take(field, bool, "true or false", default)
        return value

    def filters(self, field: str) -> tuple[str, ...]:
        value: Sequence[Any] = self.take(field, list, "a list of filters", [])
        if not all(isinstance(item, dict) for item in value):
            raise self.fail(field, "a list of filters")
        return tuple(json.dumps(item, sort_keys=True, default=str) for item in value)

    def texts(self, field: str) -> tuple[str, ...]:
        value: Sequence[Any] = self.take(field, list, "a list of texts", [])
        if not all(isinstance(item, str) for item in value):
            raise self.fail(field, "a list of texts")
        return tuple(value)

    def time_ns(self, field: str) -> int | None:
        value = self._left.pop(field, None)
        if value is None:
            return None
        if isinstance(value, str):
            try:
                value = datetime.fromisoformat(value)
            except ValueError:
                raise self.fail(field, "a time such as 2026-12-31T00:00:00Z") from None
        if not isinstance(value, datetime):
            raise self.fail(field, "a time such as 2026-12-31T00:00:00Z")
        moment = value if value.tzinfo else value.replace(tzinfo=UTC)
        return int(moment.timestamp()) * 1_000_000_000

    def selection(self) -> Selection:
        return Selection(
            include=self.filters("includeFilters"),
            exclude=self.filters("excludeFilters"),
            paths=self.texts("fieldMask"),
            end_ns=self.time_ns("end"),
        )

    def done(self) -> None:
        if self._left:
            raise ExportsInvalid(f"{self._where} has an unknown field {min(map(str, self._left))}")


_NEEDED: Final = object()


def _file(entry: _Entry) -> FileExport:
    path = Path(entry.text("filePath", _NEEDED))
    if not path.is_absolute():
        raise entry.fail("filePath", "an absolute path")
    export = FileExport(
        name=entry.text("name", _NEEDED),
        path=path,
        selection=entry.selection(),
        max_bytes=int(entry.number("fileMaxSizeMb", 10, 0.01, 100_000) * (1 << 20)),
        backups=int(entry.number("fileMaxBackups", 5, 0, 1000)),
        compress=entry.truth("fileCompress", False),
    )
    entry.done()
    return export


def _otlp(entry: _Entry) -> OtlpExport:
    endpoint = entry.text("endpoint", _NEEDED)
    if not endpoint.startswith(("http://", "https://")):
        raise entry.fail("endpoint", "http://HOST:PORT, or https:// with TLS")
    headers = entry.take("headers", dict, "names and values", {})
    export = OtlpExport(
        name=entry.text("name", _NEEDED),
        endpoint=endpoint,
        selection=entry.selection(),
        logs=entry.truth("logs", True),
        metrics=entry.truth("metrics", False),
        headers=tuple((str(key).lower(), str(value)) for key, value in headers.items()),
        interval_s=entry.number("intervalSeconds", 15, 1, 3600),
    )
    entry.done()
    return export
