"""Start in order, stop in reverse, exit codes; signals against a real process."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from cilia.errors import ConflictError, InvalidError
from cilia.lifecycle import ExitCode, Lifecycle, run


class Part:
    def __init__(self, name: str, log: list[str], fails: Exception | None = None) -> None:
        self.name = name
        self.log = log
        self.fails = fails

    async def start(self) -> None:
        if self.fails:
            raise self.fails
        self.log.append(f"+{self.name}")

    async def stop(self) -> None:
        self.log.append(f"-{self.name}")


def test_order() -> None:
    log: list[str] = []

    @asynccontextmanager
    async def context() -> AsyncIterator[None]:
        log.append("+context")
        yield
        log.append("-context")

    async def note(text: str) -> None:
        log.append(text)

    async def build(life: Lifecycle) -> None:
        life.add("a", Part("a", log))
        life.add("context", context())
        life.add("b", Part("b", log))
        life.on_ready(lambda: log.append("ready"))
        life.on_ready(lambda: life.request_stop("test"))
        life.on_stopping(lambda: note("stopping"))

    assert run(build, service="test") == ExitCode.OK
    assert log == ["+a", "+context", "+b", "ready", "stopping", "-b", "-context", "-a"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConflictError("in use"), ExitCode.FAILED),
        (InvalidError("no such option"), ExitCode.CONFIG),
        (KeyError("bug"), ExitCode.BUG),
    ],
)
def test_a_part_that_fails_to_start_stops_those_before(error: Exception, code: ExitCode) -> None:
    log: list[str] = []

    async def build(life: Lifecycle) -> None:
        life.add("a", Part("a", log))
        life.add("b", Part("b", log, error))
        life.add("c", Part("c", log))

    assert run(build, service="test") == code
    assert log == ["+a", "-b", "-a"]


def test_a_dead_task_takes_the_service_down_in_order() -> None:
    log: list[str] = []

    async def dies() -> None:
        raise ConflictError("gone")

    async def forever() -> None:
        await asyncio.Event().wait()

    async def build(life: Lifecycle) -> None:
        life.add("a", Part("a", log))
        life.add_task("forever", forever)
        life.add_task("dies", dies)
        life.add("b", Part("b", log))
        life.on_stopping(lambda: log.append("stopping"))

    assert run(build, service="test") == ExitCode.FAILED
    assert log == ["+a", "+b", "stopping", "-b", "-a"]


def test_what_parts_left_running_is_ended() -> None:
    async def forever() -> None:
        await asyncio.Event().wait()

    async def build(life: Lifecycle) -> None:
        def start() -> None:
            life.group.create_task(forever())
            life.request_stop("test")

        life.on_ready(start)

    assert run(build, service="test") == ExitCode.OK


@pytest.mark.looptime
async def test_a_part_that_does_not_stop_is_left() -> None:
    log: list[str] = []

    class Stuck(Part):
        async def stop(self) -> None:
            await asyncio.Event().wait()

    life = Lifecycle("test", stop_timeout_s=5)
    life.add("a", Part("a", log))
    life.add("stuck", Stuck("stuck", log))
    life.on_ready(lambda: life.request_stop("test"))
    await life.run()
    assert log == ["+a", "+stuck", "-a"]


_PROGRAM = """
import asyncio, sys
from cilia.lifecycle import Lifecycle, run
class P:
    async def start(self): pass
    async def stop(self):
        print("stopping", flush=True)
        if "hang" in sys.argv: await asyncio.Event().wait()
async def build(life):
    life.add("p", P())
    life.on_ready(lambda: print("ready", flush=True))
sys.exit(run(build, service="x"))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_stop_it(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", _PROGRAM], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while b"ready" not in process.stdout.readline():
            pass
        process.send_signal(number)
        assert b"stopping" in process.stdout.read()
        assert process.wait(10) == 0


def test_a_second_signal_ends_it_at_once() -> None:
    command = [sys.executable, "-c", _PROGRAM, "hang"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for word in (b"ready", b"stopping"):
            while not process.stdout.readline().startswith(word):
                pass
            process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM
