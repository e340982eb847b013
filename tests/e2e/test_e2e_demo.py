"""The demo: green, and gone without a trace; also after SIGKILL and Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from lab import down
from tests.e2e.machine import REPOSITORY, remains_of, remove_remains, traces_of_ours


@pytest.fixture
def name(need_root: None, need_bpf: None, need_objects: None) -> Iterator[str]:
    remove_remains()
    name = f"e2e{os.getpid()}-demo"
    yield name
    down.down(name)


def demo(name: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lab.demo", "--name", name],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
    )


def until(run: subprocess.Popen[str], text: str) -> str:
    """Read until a line has the text; returns what was read."""
    read = ""
    assert run.stdout is not None
    for line in run.stdout:
        read += line
        if text in line:
            return read
    raise AssertionError(f"the demo never said {text!r}:\n{read}")


def test_every_expectation_holds_and_nothing_is_left(name: str) -> None:
    before = traces_of_ours()
    with demo(name) as run:
        out, _ = run.communicate(timeout=100)
    assert run.returncode == 0, out
    assert "FAILED" not in out
    assert "\x1b[" not in out  # no terminal, no colours
    assert out.count("examples/policies/star-wars/l3-l4.yaml:") >= 9
    assert "it is dead" in out
    assert "To try next" in out
    assert remains_of(name) == []
    assert traces_of_ours() - before == set()


def test_killed_then_cleaned_by_the_next_then_interrupted(name: str) -> None:
    with demo(name) as first:
        until(first, "Act 1")
        first.kill()
    assert remains_of(name)
    with demo(name) as second:
        until(second, "removed what an earlier demo left")
        until(second, "Act 3")
        second.send_signal(signal.SIGINT)
        out, _ = second.communicate(timeout=60)
    assert second.returncode == 130, out
    assert "Traceback" not in out
    assert remains_of(name) == []
