"""Logs: a constant sentence in the past tense, plus fields named in fields.py.

On a terminal the lines are for people; otherwise each is one JSON object whose keys come in a fixed
order: time, level, service, msg, then the event's own. What the standard library's loggers say
(grpc, asyncio) comes out in the same shape.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any, Final, TextIO

import structlog

from cilia.errors import InvalidError
from cilia.telemetry import fields

LEVELS: Final = ("debug", "info", "warning", "error")
_ORDER: Final = (fields.TIME, fields.LEVEL, fields.SERVICE, fields.MESSAGE)


def setup(
    service: str,
    *,
    level: str = "info",
    json: bool | None = None,
    stream: TextIO | None = None,
) -> None:
    """Sets up logging for the process; `json` None means: unless the stream is a terminal.

    Raises InvalidError for an unknown level.
    """
    if level not in LEVELS:
        raise InvalidError(f"unknown log level {level!r}", cure=f"Use one of {', '.join(LEVELS)}")
    out = sys.stderr if stream is None else stream
    threshold = logging.getLevelNamesMapping()[level.upper()]
    as_json = not out.isatty() if json is None else json

    def add_service(
        _: object, __: str, event: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        event[fields.SERVICE] = service
        return event

    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key=fields.TIME),
        add_service,
    ]
    render: list[structlog.typing.Processor]
    if as_json:
        render = [
            structlog.processors.format_exc_info,
            structlog.processors.EventRenamer(fields.MESSAGE),
            _reorder,
            structlog.processors.JSONRenderer(default=str, ensure_ascii=False),
        ]
    else:
        render = [
            structlog.dev.ConsoleRenderer(
                colors=out.isatty(),
                timestamp_key=fields.TIME,
                exception_formatter=structlog.dev.plain_traceback,
            )
        ]
    structlog.configure(
        processors=[*shared, *render],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.WriteLoggerFactory(out),
        # Not cached: loggers are made when modules are imported, before this runs.
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, _add_logger],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    # Libraries chatter at DEBUG about every packet of theirs.
    root.setLevel(max(threshold, logging.WARNING))


def _add_logger(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    record = event.get("_record")
    if record is not None:
        event[fields.LOGGER] = record.name
    return event


def _reorder(_: object, __: str, event: MutableMapping[str, Any]) -> dict[str, Any]:
    ordered = {key: event[key] for key in _ORDER if key in event}
    return ordered | {key: value for key, value in event.items() if key not in _ORDER}
