"""Labs come and go: side by side, half made, killed; nothing is ever left."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import down, host
from lab.errors import LabError
from tests.e2e.machine import REPOSITORY, Cilia, remains_of, remove_remains, traces_of_ours

TWO = """\
name: placeholder
workloads:
  - {name: a, labels: {app: a}, command: python -m lab.httpd --name a, ports: [80]}
  - {name: b, labels: {app: b}, annotations: {io.cilium.proxy-visibility: <Egress/80/TCP/HTTP>}}
"""


@pytest.fixture
def name(need_root: None, need_bpf: None, need_objects: None) -> Iterator[str]:
    remove_remains()
    name = f"e2e{os.getpid()}-x"
    yield name
    down.down(name)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "lab.yaml"
    path.write_text(TWO)
    return path


def test_two_labs_with_equal_addresses(name: str, file: Path) -> None:
    before = traces_of_ours()
    other = f"{name}2"
    cilia = Cilia()
    try:
        first = cilia.json("lab", "up", str(file), "--name", name)["workloads"]
        second = cilia.json("lab", "up", str(file), "--name", other)["workloads"]
        assert {w["ipv4"] for w in first} == {w["ipv4"] for w in second}
        cilia.fails(6, "lab", "up", str(file), "--name", name)
        cilia.fails(5, "lab", "exec", "a", "true")  # which lab?
        cilia.ok("lab", "down", other)
        assert remains_of(other) == []
        # The one that stays is untouched.
        assert cilia.json("lab", "status", name)[0]["healthy"] is True
        done = cilia.run(
            "lab", "exec", "--lab", name, "b", "--", "python", "-m", "lab.httpc", "http://a/"
        )
        assert json.loads(done.stdout)["name"] == "a"
        socket = cilia.json("lab", "status", name)[0]["nodes"][0]["agent_socket"]
        shown = cilia.json("--agent-socket", socket, "endpoint", "get", "b")["visibility"]
        assert shown["annotation"] == "<Egress/80/TCP/HTTP>"
        assert ["the proxy is not there" in line for line in shown["not_shown"]] == [True]
    finally:
        down.down(other)
        cilia.ok("lab", "down", name)
    assert remains_of(name) == []
    assert traces_of_ours() - before == set()
    cilia.fails(5, "lab", "down", name)


def test_down_after_everything_was_killed(name: str, file: Path) -> None:
    cilia = Cilia()
    shape = cilia.json("lab", "up", str(file), "--name", name)
    pids = [s["pid"] for s in shape["nodes"][0]["services"]]
    node = shape["nodes"][0]
    with subprocess.Popen(
        [sys.executable, "-m", "cli", "--agent-socket", node["agent_socket"], "monitor"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    ) as monitor:
        assert monitor.stderr is not None
        assert "Listening" in monitor.stderr.readline()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert "went away" in monitor.stderr.readline()
        monitor.kill()
    text = cilia.fails(3, "--agent-socket", node["agent_socket"], "status")
    assert "nobody answers" in text
    assert f"`cilia lab down {name}` and up again" in text  # not: start it with python -m ...
    table = cilia.run("lab", "status", name).stdout
    assert table.count("unknown") == table.count("default/") > 0  # nobody says they are missing
    status = cilia.run("lab", "status", name, "-o", "json")
    assert status.returncode == 1
    assert json.loads(status.stdout)[0]["healthy"] is False
    cilia.ok("lab", "down", name)
    assert remains_of(name) == []


@pytest.mark.parametrize("said", ["network: ", "identity and agent answer", "endpoints: "])
def test_down_after_up_was_killed(name: str, file: Path, said: str) -> None:
    """SIGKILL of `up` between any two of its steps."""
    up = subprocess.Popen(
        [sys.executable, "-m", "cli", "lab", "up", str(file), "--name", name],
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )
    with up:
        assert up.stderr is not None
        for line in up.stderr:
            if said in line:
                break
        up.kill()
    assert remains_of(name)
    Cilia().ok("lab", "down", name)
    assert remains_of(name) == []


def test_up_again_after_up_was_killed_and_the_state_file_is_gone(name: str, file: Path) -> None:
    cilia = Cilia()
    shape = cilia.json("lab", "up", str(file), "--name", name)
    state = Path(shape["nodes"][0]["run_dir"]).parent / "state.json"
    state.write_text("{")
    assert name in cilia.run("lab", "status").stderr  # remains, not a lab
    again = cilia.run("lab", "up", str(file), "--name", name, "-o", "json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["healthy"] is True
    cilia.ok("lab", "down", name)
    assert remains_of(name) == []


def test_a_failed_up_says_why_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    path = tmp_path / "lab.yaml"
    path.write_text(
        "name: x\nworkloads:\n"
        "- {name: a, labels: {app: a}, command: sh -c 'echo sorry; exit 3', ports: [80]}\n"
    )
    text = Cilia().fails(1, "lab", "up", str(path), "--name", name)
    assert "default/a ended before it listened on 80" in text
    assert "sorry" in text
    assert remains_of(name) == []


def test_down_without_root_touches_nothing(
    name: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state_file = Path(Cilia().json("lab", "up", str(file), "--name", name)["nodes"][0]["run_dir"])
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 1000)
        with pytest.raises(LabError, match="needs root"):
            down.down(name)
    assert state_file.exists()
    assert Cilia().json("lab", "status", name)[0]["healthy"] is True


def test_an_invalid_lab_file_touches_nothing(name: str, tmp_path: Path) -> None:
    path = tmp_path / "lab.yaml"
    path.write_text("name: x\nworkloads:\n- {name: A}\n")
    text = Cilia().fails(4, "lab", "up", str(path), "--name", name)
    assert f"{path}:3: workloads[0].name: must be lower case" in text
    assert remains_of(name) == []


def test_cleanup_leaves_no_trace_on_the_node(name: str, file: Path) -> None:
    cilia = Cilia()
    node = cilia.json("lab", "up", str(file), "--name", name)["nodes"][0]
    run_dir = Path(node["run_dir"])
    state_dir = run_dir / "state"
    inside = ("lab", "exec", "--lab", name, node["name"], "--")
    cleanup = (
        *inside, "python", "-m", "cli", "cleanup", "--force", "--store",
        "--run-dir", str(run_dir), "--state-dir", str(state_dir),
    )  # fmt: skip
    for service in node["services"]:
        os.kill(service["pid"], signal.SIGKILL)
        wait_for_end(service["pid"])
    assert "cil0" in cilia.ok(*inside, "ip", "-br", "link")
    kinds = {trace["kind"] for trace in json.loads(cilia.ok(*cleanup, "-o", "json"))}
    assert {"filter", "interface", "map", "mount", "state", "store"} <= kinds
    links = cilia.ok(*inside, "ip", "-br", "link")
    assert "cil" not in links
    assert "bpf" not in cilia.ok(*inside, "tc", "filter", "show", "dev", "eth0", "ingress")
    assert "proto 193" not in cilia.ok(*inside, "ip", "route", "show", "table", "all")
    assert not host.mounts_below(run_dir)
    assert not (state_dir / "agent").exists()
    assert not (state_dir / "identity").exists()
    assert "Nothing of Cilia is left" in cilia.ok(*cleanup)


def wait_for_end(pid: int) -> None:
    """Wait until a process that is not our child has ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    select.select([fd], [], [], 10)
    os.close(fd)
