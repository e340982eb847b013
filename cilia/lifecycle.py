"""Start, run and stop of a service.

Parts start in the order in which they were added and stop in the reverse one. Before the first part
is stopped the `on_stopping` callbacks run, so that health says NOT_SERVING while everything still
works. SIGTERM and SIGINT ask for a stop; a second one ends the process at once.

All parts are started and stopped in one task, inside one root `TaskGroup`: a background task that
dies cancels that task, so the parts are still stopped in order, and the service exits with an
error.
"""

from __future__ import annotations

import asyncio
import enum
import inspect
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from functools import partial
from typing import Any, Protocol, TypeVar

import structlog

from cilia.controller import spawn
from cilia.errors import DomainError, InvalidError, Kind
from cilia.settings import LogSettings
from cilia.telemetry import fields
from cilia.telemetry.log import setup as set_up_log

log = structlog.get_logger()

Settings = TypeVar("Settings", bound=LogSettings)


class ExitCode(enum.IntEnum):
    """What a service's exit means to its supervisor; the last two are those of sysexits.h."""

    OK = 0  # asked to stop, and did
    FAILED = 1  # an operating error: a restart may help
    BUG = 70  # EX_SOFTWARE: an error of ours, the traceback is in the log
    CONFIG = 78  # EX_CONFIG: refused its configuration, a restart cannot help


class Part(Protocol):
    """Something with a beginning and an end."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


# A plain function, or one that returns something to await.
Callback = Callable[[], Awaitable[None] | None]


async def _call(callbacks: list[Callback]) -> None:
    for callback in callbacks:
        result = callback()
        if inspect.isawaitable(result):
            await result


class _Stopped(Exception):
    """Leaves the root task group."""


class Lifecycle:
    """The parts of one service, in order."""

    def __init__(self, service: str, *, stop_timeout_s: float = 10.0) -> None:
        self.service = service
        self._stop_timeout_s = stop_timeout_s
        self._parts: list[tuple[str, Part | AbstractAsyncContextManager[object]]] = []
        self._on_ready: list[Callback] = []
        self._on_stopping: list[Callback] = []
        self._stop = asyncio.Event()
        self._ready = asyncio.Event()
        self._group: asyncio.TaskGroup | None = None
        self.stop_reason = ""

    def add(self, name: str, part: Part | AbstractAsyncContextManager[object]) -> None:
        """Adds a part: an object with start() and stop(), or an async context manager."""
        assert self._group is None, "the service is running"
        self._parts.append((name, part))

    def add_task(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Adds a background task as a part: started in its turn, cancelled and awaited in its turn.

        If it fails the service stops with that error; it may return early.
        """
        self.add(name, _TaskPart(self, name, work))

    def on_ready(self, callback: Callback) -> None:
        """Called once all parts have started."""
        self._on_ready.append(callback)

    def on_stopping(self, callback: Callback) -> None:
        """Called when a stop begins, before the first part is stopped."""
        self._on_stopping.append(callback)

    def request_stop(self, reason: str) -> None:
        """Asks the service to stop; the first reason is kept."""
        if not self._stop.is_set():
            self.stop_reason = reason
            self._stop.set()

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    async def wait_ready(self) -> None:
        await self._ready.wait()

    @property
    def group(self) -> asyncio.TaskGroup:
        """The root task group, while the service runs."""
        assert self._group is not None, "the service is not running"
        return self._group

    async def run(self) -> None:
        """Starts the parts, waits for a stop, stops the parts.

        Raises what a part's start or a background task raised, alone or in an ExceptionGroup.
        """
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                try:
                    await self._run_parts()
                finally:
                    self._group = None
                # Ends what parts left running in the group.
                raise _Stopped
        except* _Stopped:
            pass

    async def _run_parts(self) -> None:
        async with AsyncExitStack() as stack:
            for name, part in self._parts:
                if self._stop.is_set():
                    break
                await self._start(stack, name, part)
            else:
                self._ready.set()
                await _call(self._on_ready)
                log.info("The service is ready.")
            # Innermost, so it runs before any part is stopped, whatever ends the wait.
            stack.push_async_callback(self._announce_stop)
            await self._stop.wait()

    async def _start(
        self, stack: AsyncExitStack, name: str, part: Part | AbstractAsyncContextManager[object]
    ) -> None:
        log.debug("A part is starting.", **{fields.PART: name})
        if isinstance(part, AbstractAsyncContextManager):
            await stack.enter_async_context(part)
        else:
            # Registered first: a part whose start failed half way is stopped too, so stop() must
            # cope with what was not started.
            stack.push_async_callback(self._stop_part, name, part)
            await part.start()

    async def _stop_part(self, name: str, part: Part) -> None:
        log.debug("A part is stopping.", **{fields.PART: name})
        try:
            async with asyncio.timeout(self._stop_timeout_s):
                await part.stop()
        except TimeoutError:
            log.warning(
                "A part did not stop in time and was left.",
                **{fields.PART: name, fields.DURATION_S: self._stop_timeout_s},
            )

    async def _announce_stop(self) -> None:
        self._stop.set()
        log.info("The service is stopping.", **{fields.REASON: self.stop_reason or "a failure"})
        await _call(self._on_stopping)


class Serves(Protocol):
    """A server that can be asked for its health."""

    async def set_serving(self, serving: bool) -> None: ...


class Serving:
    """The last part: says SERVING once all others run."""

    def __init__(self, *servers: Serves) -> None:
        self._servers = servers

    async def start(self) -> None:
        for server in self._servers:
            await server.set_serving(True)

    async def stop(self) -> None:
        for server in self._servers:
            await server.set_serving(False)


class _TaskPart:
    def __init__(
        self, lifecycle: Lifecycle, name: str, work: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        self._lifecycle = lifecycle
        self._name = name
        self._work = work
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = spawn(self._lifecycle.group, self._work(), self._name)

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])


def main(
    service: str,
    parse: Callable[[Sequence[str], Mapping[str, str]], Settings],
    build: Callable[[Settings, Lifecycle], Awaitable[None]],
) -> int:
    """A service from its command line to its end; returns the process's exit code.

    `parse(arguments, environment)` makes the settings and raises InvalidError for those that cannot
    be, which are told on stderr; `build(settings, lifecycle)` makes the parts and adds them.
    """
    try:
        settings = parse(sys.argv[1:], os.environ)
        as_json = None if settings.log_format == "auto" else settings.log_format == "json"
        set_up_log(service, level=settings.log_level, json=as_json)
    except InvalidError as error:
        sys.stderr.write(f"{service}: {error.explain()}\n")
        return ExitCode.CONFIG
    return run(partial(build, settings), service=service)


def run(build: Callable[[Lifecycle], Awaitable[None]], *, service: str) -> int:
    """Builds and runs a service until it is told to stop; returns the process's exit code.

    `build(lifecycle)` makes the parts and adds them. Logging must be set up before.
    """
    try:
        asyncio.run(_main(build, service))
    except BaseExceptionGroup as group:
        return _report(_first_cause(group))
    except (Exception, KeyboardInterrupt) as error:  # the last line of defence: log, and say so
        return _report(error)
    log.info("The service has stopped.", **{fields.EXIT_CODE: int(ExitCode.OK)})
    return ExitCode.OK


async def _main(build: Callable[[Lifecycle], Awaitable[None]], service: str) -> None:
    lifecycle = Lifecycle(service)
    loop = asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        if lifecycle.stopping:
            # The first one was heard and the stop hangs: do as the operator says.
            sys.stderr.flush()
            os._exit(128 + number)
        lifecycle.request_stop(number.name)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    try:
        await build(lifecycle)
        await lifecycle.run()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _first_cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _report(error: BaseException) -> int:
    if isinstance(error, DomainError):
        code = ExitCode.CONFIG if error.kind is Kind.INVALID else ExitCode.FAILED
        log.error(
            "The service failed.",
            **{fields.ERROR: error.message, fields.CURE: error.cure, fields.EXIT_CODE: int(code)},
        )
        return code
    log.error(
        "The service crashed.",
        **{fields.ERROR: f"{type(error).__name__}: {error}", fields.EXIT_CODE: int(ExitCode.BUG)},
        exc_info=error,
    )
    return ExitCode.BUG
