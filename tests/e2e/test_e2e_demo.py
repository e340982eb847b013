"""The demo: green, and gone without a trace; also after SIGKILL and Ctrl-C."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import demo as scene
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


@pytest.mark.timeout(240)
def test_every_expectation_holds_and_nothing_is_left(name: str) -> None:
    before = traces_of_ours()
    with demo(name) as run:
        out, _ = run.communicate(timeout=200)
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


OPEN = """\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: open}
spec:
  endpointSelector: {matchLabels: {class: deathstar}}
  ingress:
    - fromEndpoints: [{}]
"""


@pytest.mark.slow  # it plays all acts but in vain: a minute and a half
def test_it_fails_when_the_kernel_does_otherwise(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a policy that lets everybody in, the demo must say so, and not be green."""
    policy = tmp_path / "open.yaml"
    policy.write_text(OPEN)
    monkeypatch.setattr(scene, "POLICY", policy)
    monkeypatch.setattr(scene, "PLANS_BYTES", 6 << 20)
    monkeypatch.setattr(scene, "EVENT_TIMEOUT_S", 0.3)
    out = io.StringIO()
    assert scene.play(scene.Screen(out, color=True), name=name, keep=False) == 1
    text = out.getvalue()
    assert "EXPECTED OTHERWISE" in text
    for family in (4, 6):
        assert f"act 2: the xwing (org=alliance) is dropped over IPv{family}; seen: 0 of 2" in text
    assert "without an agent, the xwing is still dropped; seen: 0 of 2" in text
    assert "\x1b[" in text
    assert remains_of(name) == []
