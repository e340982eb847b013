"""Processes: known by pid and start time, never confused with another one."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import process
from lab.process import Place, Process

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[Process]:
    started = process.spawn(
        "sleeper", SLEEP, place=Place(), env=dict(os.environ), log=tmp_path / "log"
    )
    yield started
    process.kill_all([started.pid], timeout_s=5)


def test_a_recycled_pid_is_neither_alive_nor_hit(sleeper: Process) -> None:
    other = dataclasses.replace(sleeper, start_ticks=sleeper.start_ticks + 1)
    assert process.alive(sleeper)
    assert not process.alive(other)
    assert not process.send(other, signal.SIGKILL)
    assert process.wait_gone(other, 0.0)
    assert process.alive(sleeper)


def test_send_and_wait(sleeper: Process) -> None:
    assert not process.wait_gone(sleeper, 0.01)
    assert process.send(sleeper, signal.SIGTERM)
    assert process.wait_gone(sleeper, 5.0)
    assert not process.alive(sleeper)
    assert not process.send(sleeper, signal.SIGTERM)


def test_kill_all_waits_and_reaps(sleeper: Process) -> None:
    assert process.kill_all([sleeper.pid, 1 << 22], timeout_s=5) == []
    assert process.start_ticks(sleeper.pid) is None
    assert not Path(f"/proc/{sleeper.pid}").exists()


def test_output_goes_to_the_log_in_a_session_of_its_own(sleeper: Process, tmp_path: Path) -> None:
    assert os.getsid(sleeper.pid) == sleeper.pid
    process.send(sleeper, signal.SIGTERM)
    process.wait_gone(sleeper, 5.0)
    assert process.tail(tmp_path / "log", 3) in ("", "up")
    assert process.tail(tmp_path / "absent") == ""


def test_a_command_name_with_brackets_does_not_fool_the_parser(tmp_path: Path) -> None:
    program = tmp_path / "a) R 1 (b"
    program.symlink_to("/bin/sleep")
    started = process.spawn(
        "odd", [str(program), "60"], place=Place(), env=dict(os.environ), log=tmp_path / "log"
    )
    try:
        assert started.start_ticks > 1
        assert process.alive(started)
    finally:
        process.kill_all([started.pid], timeout_s=5)
