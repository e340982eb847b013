"""Controllers in virtual time: retry, backoff, coalescing, resync, stop."""

from __future__ import annotations

import asyncio

import pytest

from cilia.controller import Controller, ControllerSet, KeyedWorkers, linear_backoff
from cilia.errors import UnavailableError

pytestmark = pytest.mark.looptime


class Work:
    """Notes when it ran; fails while `broken`; takes `takes_s`."""

    def __init__(self, broken: str = "", takes_s: float = 0.0) -> None:
        self.broken = broken
        self.takes_s = takes_s
        self.ran_at: list[float] = []

    async def __call__(self) -> None:
        self.ran_at.append(asyncio.get_running_loop().time())
        await asyncio.sleep(self.takes_s)
        if self.broken:
            raise UnavailableError(self.broken, cure="Wait")


@pytest.fixture
def controllers() -> ControllerSet:
    # Entered by the tests: a task group must be left by the task that entered it.
    return ControllerSet()


async def test_runs_at_once_and_when_triggered(controllers: ControllerSet) -> None:
    work = Work()
    async with controllers:
        controller = controllers.add(Controller("c", work))
        await asyncio.sleep(100)
        assert work.ran_at == [0]
        controller.trigger()
        controller.trigger()
        await asyncio.sleep(100)
        assert work.ran_at == [0, 100]
        assert controller.status().success_count == 2


async def test_triggers_during_a_run_cause_one_more(controllers: ControllerSet) -> None:
    work = Work(takes_s=10)
    async with controllers:
        controller = controllers.add(Controller("c", work))
        for _ in range(5):
            await asyncio.sleep(1)
            controller.trigger()
        await asyncio.sleep(100)
        assert work.ran_at == [0, 10]


async def test_minimum_interval_folds_triggers(controllers: ControllerSet) -> None:
    work = Work()
    async with controllers:
        controller = controllers.add(Controller("c", work, min_interval_s=5))
        for _ in range(12):
            await asyncio.sleep(1)
            controller.trigger()
        await asyncio.sleep(20)
        assert work.ran_at == pytest.approx([0, 5, 10, 15])


async def test_failures_back_off_linearly_to_a_cap_and_heal(controllers: ControllerSet) -> None:
    work = Work(broken="no store")
    async with controllers:
        controller = controllers.add(
            Controller("c", work, retry_s=1, retry_max_s=3, jitter=0, resync_s=60)
        )
        await asyncio.sleep(12.5)
        assert work.ran_at == pytest.approx([0, 1, 3, 6, 9, 12])
        status = controller.status()
        assert (status.failure_count, status.consecutive_failures) == (6, 6)
        assert status.last_error == "no store. Wait"
        assert not status.healthy
        work.broken = ""
        await asyncio.sleep(5)
        status = controller.status()
        assert (status.success_count, status.consecutive_failures, status.last_error) == (1, 0, "")
        assert status.failure_count == 6
        assert status.last_success_s >= status.last_error_s > 0
        await asyncio.sleep(60)
        assert work.ran_at[-2:] == pytest.approx([15, 75])


async def test_a_trigger_shortens_the_backoff_to_its_base(controllers: ControllerSet) -> None:
    work = Work(broken="no store")
    async with controllers:
        controller = controllers.add(Controller("c", work, retry_s=1, jitter=0))
        await asyncio.sleep(6.1)  # ran at 0, 1, 3, 6; the next is due at 10
        controller.trigger()
        await asyncio.sleep(1)
        assert work.ran_at == pytest.approx([0, 1, 3, 6, 7])


async def test_a_run_that_hangs_is_ended(controllers: ControllerSet) -> None:
    work = Work(takes_s=1000)
    async with controllers:
        controller = controllers.add(Controller("c", work, timeout_s=5))
        await asyncio.sleep(5.5)
        assert controller.status().last_error == "did not finish within 5 s"


async def test_a_bug_is_retried_and_described(controllers: ControllerSet) -> None:
    async def buggy() -> None:
        raise KeyError("x")

    async with controllers:
        controller = controllers.add(Controller("c", buggy))
        await asyncio.sleep(0.5)
        assert controller.status().last_error == "KeyError: 'x'"


async def test_wait_success_means_a_run_that_began_later(controllers: ControllerSet) -> None:
    work = Work(takes_s=10)
    async with controllers:
        controller = controllers.add(Controller("c", work))
        await asyncio.sleep(5)
        await controller.wait_success()
        assert work.ran_at == [0, 10]
        assert asyncio.get_running_loop().time() == pytest.approx(20)


async def test_remove_cancels_and_runs_the_stop_function(controllers: ControllerSet) -> None:
    stopped: list[bool] = []

    async def on_stop() -> None:
        stopped.append(True)

    async with controllers:
        controllers.add(Controller("c", Work(takes_s=1000), on_stop=on_stop))
        controllers.add(Controller("b", Work()))
        await asyncio.sleep(1)
        assert [(s.name, s.running) for s in controllers.statuses()] == [("b", False), ("c", True)]
        await controllers.remove("c")
        await controllers.remove("c")
        assert stopped == [True]
        assert [s.name for s in controllers.statuses()] == ["b"]
    assert asyncio.get_running_loop().time() == pytest.approx(1)


def test_backoff_is_bounded_with_jitter() -> None:
    waits = [linear_backoff(10**6, 1, 60, 0.1) for _ in range(200)]
    assert 54 <= min(waits) < max(waits) <= 66


async def test_keyed_workers_keep_order_within_a_key() -> None:
    done: list[str] = []

    def job(name: str, takes_s: float):  # type: ignore[no-untyped-def]
        async def work() -> None:
            await asyncio.sleep(takes_s)
            done.append(name)

        return work

    async with asyncio.TaskGroup() as group:
        workers: KeyedWorkers[str] = KeyedWorkers(group, name="w")
        workers.submit("a", job("a1", 10))
        workers.submit("a", job("a2", 1))
        workers.submit("b", job("b1", 5))
        assert workers.busy == 2
        await asyncio.sleep(12)
        assert done == ["b1", "a1", "a2"]
        assert workers.busy == 0
        workers.submit("a", job("a3", 1))
    assert done[-1] == "a3"
