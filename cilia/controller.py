"""Work that may fail: named loops that run, retry and tell how they fare. The only place tasks are
made.

A `Controller` runs its function at once, again whenever triggered, and again every `resync_s`.
Triggers coalesce: any number of them while a run is under way cause one more run. A failed run is
repeated after n * `retry_s` for the n-th failure in a row, with jitter, at most `retry_max_s`; a
trigger shortens that wait to `retry_s`, so news is acted upon soon and a broken dependency is not
hammered.

A plain background task that dies must take the service down: start it with `spawn`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Hashable
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import structlog

from cilia.errors import DomainError
from cilia.telemetry import fields

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

log = structlog.get_logger()


def spawn(group: asyncio.TaskGroup, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
    """Starts a task whose failure ends the whole group; the name shows in tracebacks and dumps."""
    return group.create_task(work, name=name)


def linear_backoff(failures: int, base_s: float, cap_s: float, jitter: float = 0.1) -> float:
    """How long to wait after the n-th failure in a row: n * base, at most cap, +-`jitter` of
    itself.

    Linear as Cilium's controllers are; the cap and the jitter are ours, so that many nodes that
    lost one store do not return to it in step.
    """
    wait = min(failures * base_s, cap_s)
    return wait * (1 + jitter * random.uniform(-1, 1))


def describe(error: BaseException) -> str:
    """One line that says what failed, never empty."""
    if isinstance(error, DomainError):
        return error.explain()
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ControllerStatus:
    """How a controller fares. Times are Unix seconds, 0 when it never happened."""

    name: str
    success_count: int
    failure_count: int
    consecutive_failures: int
    last_error: str  # "" when the last run succeeded
    last_error_s: float
    last_success_s: float
    running: bool

    @property
    def healthy(self) -> bool:
        return self.consecutive_failures == 0

    @classmethod
    def table_header(cls) -> tuple[str, ...]:
        return ("Name", "Last success", "Last error", "Count", "Message")

    def table_row(self) -> tuple[str, ...]:
        now_s = time.time()
        return (
            self.name,
            _ago(now_s, self.last_success_s),
            _ago(now_s, self.last_error_s),
            str(self.consecutive_failures),
            self.last_error or "no error",
        )


def _ago(now_s: float, then_s: float) -> str:
    return f"{max(0, int(now_s - then_s))}s ago" if then_s else "never"


class Controller:
    """One named function kept done.

    `min_interval_s` is the least time between the starts of two runs. `resync_s` counts from the
    end of a successful run; None runs only when triggered. `timeout_s` limits a run. `on_stop` runs
    when the controller is stopped, after a run under way was cancelled.
    """

    def __init__(
        self,
        name: str,
        fn: Callable[[], Awaitable[None]],
        *,
        min_interval_s: float = 0.0,
        retry_s: float = 1.0,
        retry_max_s: float = 60.0,
        resync_s: float | None = None,
        timeout_s: float | None = None,
        jitter: float = 0.1,
        on_stop: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        assert retry_s > 0, "a controller must not spin"
        self.name = name
        self._fn = fn
        self._min_interval_s = min_interval_s
        self._retry_s = retry_s
        self._retry_max_s = retry_max_s
        self._resync_s = resync_s
        self._timeout_s = timeout_s
        self._jitter = jitter
        self._on_stop = on_stop
        self._triggered = asyncio.Event()
        self._finished = asyncio.Event()  # set and renewed at the end of every run
        self._running = False
        self._started_runs = 0
        self._ended_run = 0  # the number of the last run that ended in success
        self._success_count = 0
        self._failure_count = 0
        self._consecutive_failures = 0
        self._last_error = ""
        self._last_error_s = 0.0
        self._last_success_s = 0.0

    def trigger(self) -> None:
        """Asks for a run that starts after now."""
        self._triggered.set()

    def status(self) -> ControllerStatus:
        return ControllerStatus(
            name=self.name,
            success_count=self._success_count,
            failure_count=self._failure_count,
            consecutive_failures=self._consecutive_failures,
            last_error=self._last_error,
            last_error_s=self._last_error_s,
            last_success_s=self._last_success_s,
            running=self._running,
        )

    async def wait_success(self) -> None:
        """Triggers a run and returns when one that started after this call has succeeded.

        Failures are waited through: bound it with asyncio.timeout and read `status().last_error`.
        """
        wanted = self._started_runs + 1
        self.trigger()
        while self._ended_run < wanted:
            await self._finished.wait()

    async def run(self) -> None:
        """Runs for ever; cancel it to stop."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                self._triggered.clear()
                started = loop.time()
                failed = not await self._run_once()
                ended = loop.time()
                not_before = started + self._min_interval_s
                due: float | None
                if failed:
                    due = ended + linear_backoff(
                        self._consecutive_failures, self._retry_s, self._retry_max_s, self._jitter
                    )
                    not_before = max(not_before, min(due, ended + self._retry_s))
                else:
                    due = None if self._resync_s is None else ended + self._resync_s
                try:
                    async with asyncio.timeout_at(due):
                        await self._triggered.wait()
                except TimeoutError:
                    pass
                if (wait := not_before - loop.time()) > 0:
                    await asyncio.sleep(wait)
        finally:
            self._running = False
            if self._on_stop is not None:
                await self._on_stop()

    async def _run_once(self) -> bool:
        self._started_runs += 1
        self._running = True
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._fn()
        except Exception as error:
            message = describe(error)
            if isinstance(error, TimeoutError) and not str(error):
                message = (
                    f"did not finish within {self._timeout_s:g} s" if self._timeout_s else message
                )
            self._failure_count += 1
            self._consecutive_failures += 1
            if message != self._last_error:  # once an error, not once a retry
                log.warning(
                    "A controller failed and will be retried.",
                    **{fields.CONTROLLER: self.name, fields.ERROR: message},
                    # A bug is worth a traceback; what the world does to us is not.
                    exc_info=not isinstance(error, DomainError | OSError),
                )
            self._last_error = message
            self._last_error_s = time.time()
            return False
        else:
            if self._consecutive_failures:
                log.info(
                    "A controller recovered.",
                    **{
                        fields.CONTROLLER: self.name,
                        fields.FAILURES: self._consecutive_failures,
                    },
                )
            self._success_count += 1
            self._consecutive_failures = 0
            self._last_error = ""
            self._last_success_s = time.time()
            self._ended_run = self._started_runs
            return True
        finally:
            self._running = False
            self._finished.set()
            self._finished = asyncio.Event()


class ControllerSet:
    """The controllers of a service: starts and stops them, and lists how they fare.

    An async context manager, and a lifecycle part; leaving it stops all, last started first.
    """

    def __init__(self) -> None:
        self._group: asyncio.TaskGroup | None = None
        self._running: dict[str, tuple[Controller, asyncio.Task[None] | None]] = {}

    def add(self, controller: Controller) -> Controller:
        """Starts the controller, or keeps it for the start of the set. Names are unique."""
        assert controller.name not in self._running, f"controller {controller.name} exists"
        self._running[controller.name] = (controller, self._launch(controller))
        return controller

    def _launch(self, controller: Controller) -> asyncio.Task[None] | None:
        if self._group is None:
            return None
        return spawn(self._group, controller.run(), controller.name)

    def get(self, name: str) -> Controller | None:
        entry = self._running.get(name)
        return entry[0] if entry else None

    def trigger(self, name: str) -> None:
        """Triggers the controller of that name; an absent one is no error."""
        if entry := self._running.get(name):
            entry[0].trigger()

    async def remove(self, name: str) -> None:
        """Cancels the controller's run and returns when it has ended; an absent one is success."""
        entry = self._running.pop(name, None)
        if entry is not None and entry[1] is not None:
            entry[1].cancel()
            await asyncio.wait([entry[1]])

    def statuses(self) -> tuple[ControllerStatus, ...]:
        """By name."""
        return tuple(self._running[name][0].status() for name in sorted(self._running))

    async def start(self) -> None:
        assert self._group is None, "started already"
        group = asyncio.TaskGroup()
        await group.__aenter__()
        self._group = group
        for name, (controller, _) in list(self._running.items()):
            self._running[name] = (controller, self._launch(controller))

    async def stop(self) -> None:
        group, self._group = self._group, None
        for name in reversed(list(self._running)):
            await self.remove(name)
        if group is not None:
            await group.__aexit__(None, None, None)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()


class KeyedWorkers(Generic[K]):
    """Order within a key, parallelism between keys: one worker a key, gone when it is idle.

    `submit(key, job)` runs the jobs of a key one after the other. A job that raises takes the group
    down, so a job that may fail handles its own errors. At most `limit` jobs run at once.
    """

    def __init__(self, group: asyncio.TaskGroup, *, name: str, limit: int = 16) -> None:
        self._group = group
        self._name = name
        self._slots = asyncio.Semaphore(limit)
        self._queues: dict[K, list[Callable[[], Awaitable[None]]]] = {}

    @property
    def busy(self) -> int:
        """How many keys have work."""
        return len(self._queues)

    def submit(self, key: K, job: Callable[[], Awaitable[None]]) -> None:
        queue = self._queues.get(key)
        if queue is not None:
            queue.append(job)
            return
        self._queues[key] = [job]
        spawn(self._group, self._work(key), f"{self._name}-{key}")

    async def _work(self, key: K) -> None:
        queue = self._queues[key]
        try:
            while queue:
                async with self._slots:
                    await queue[0]()
                del queue[0]
        finally:
            del self._queues[key]
