"""A denied connection of the demo's lab, explained; and the proposed edit applied as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from lab import down
from tests.e2e.machine import REPOSITORY, Cilia, Lab, remains_of, remove_remains

POLICY = "examples/policies/star-wars/l3-l4.yaml"
LANDING = "http://deathstar-1/v1/request-landing"
INGRESS_LINE = 21


@pytest.fixture(scope="module")
def fleet(need_root: None, need_netns: None, need_bpf: None, need_objects: None) -> Iterator[Lab]:
    """The lab of the README and the demo."""
    remove_remains()
    name = f"e2e{os.getpid()}-why"
    up = Cilia().run(
        "lab", "up", "examples/lab/star-wars.yaml", "--name", name, "-o", "json", timeout_s=110
    )
    assert up.returncode == 0, up.stderr
    node = json.loads(up.stdout)["nodes"][0]
    env = {
        "CILIA_AGENT_SOCK": node["agent_socket"],
        "CILIA_IDENTITY_SOCK": node["identity_socket"],
    }
    try:
        yield Lab(name, Cilia(env))
    finally:
        down.down(name)
    assert remains_of(name) == []


@pytest.fixture
def policy(fleet: Lab) -> Iterator[str]:
    """The landing rule, in force for the test."""
    fleet.cilia.ok("policy", "apply", POLICY, "--wait")
    yield POLICY
    fleet.cilia.run("policy", "delete", "--all", "--wait")


def lands(fleet: Lab, ship: str, timeout_s: float = 3.0) -> bool:
    done = fleet.cilia.run(
        "lab", "exec", "--lab", fleet.name, ship, "--",
        "python", "-m", "lab.httpc", "--json", "--timeout", str(timeout_s), "POST", LANDING,
    )  # fmt: skip
    return bool(json.loads(done.stdout)["status"] == 200)


def denied_flow(fleet: Lab, ship: str) -> dict[str, Any]:
    """The first denial that the monitor shows while a ship tries to land."""
    monitor = subprocess.Popen(
        [sys.executable, "-m", "cli", "monitor", "--type", "drop", "-o", "json", "-n", "1"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, **fleet.cilia.env},
    )
    try:
        assert monitor.stdout is not None
        for _ in range(20):  # until the monitor listens
            assert not lands(fleet, ship, timeout_s=0.7)
            if monitor.poll() is not None:
                break
        line = monitor.stdout.readline()
    finally:
        monitor.kill()
        monitor.wait()
    flow: dict[str, Any] = json.loads(line)
    assert flow["destination"]["port"] == 80
    return flow


def test_the_proposed_edit_allows_the_flow(fleet: Lab, policy: str) -> None:
    flow = denied_flow(fleet, "xwing")
    told = fleet.cilia.run("why", "-o", "json", stdin=json.dumps(flow))
    assert told.returncode == 1, told.stderr
    answer = json.loads(told.stdout)
    assert answer["verdict"] == "denied"
    (denial,) = answer["denials"]
    assert denial["direction"] == "ingress"
    (isolated,) = denial["default_deny"]
    assert (isolated["file"], isolated["line"]) == (POLICY, INGRESS_LINE)
    assert isolated["path"] == "spec.ingress"
    nearest = denial["near_misses"][0]
    assert nearest["rule"]["path"] == "spec.ingress[0]"
    assert nearest["failed"] == [{"condition": "peers", "text": "default/xwing is not org=empire"}]
    (step,) = answer["edit"]["steps"]
    assert (step["file"], step["path"]) == (POLICY, "spec.ingress[0].fromEndpoints")
    edited = fleet.cilia.run("why", "-o", "yaml", stdin=json.dumps(flow))
    assert edited.stdout == answer["edit"]["documents"][0]["text"]

    fleet.cilia.ok("policy", "apply", "-", "--wait", stdin=edited.stdout)

    assert lands(fleet, "xwing")
    assert lands(fleet, "tiefighter")
    now = fleet.cilia.run("why", stdin=json.dumps(flow))
    assert now.returncode == 0, now.stdout
    assert "ALLOWED" in now.stdout


@pytest.mark.parametrize("level", ["engine", "kernel", "live"])
def test_one_table_at_three_levels(fleet: Lab, policy: str, level: str) -> None:
    table = "examples/expectations/star-wars.yaml"
    flags = ["--lab", fleet.name] if level == "live" else []
    done = fleet.cilia.run("policy", "test", table, "--level", level, *flags, "-o", "json")
    shape = json.loads(done.stdout)
    assert [x for x in shape["tests"] if x["passed"] is False] == []
    assert done.returncode == 0, done.stderr
    assert (shape["level"], shape["failed"]) == (level, 0)
    assert shape["passed"] + shape["untried"] == len(shape["tests"]) == 19
    assert shape["untried"] == (1 if level == "live" else 0)


def test_a_table_that_is_wrong_fails_at_every_level(fleet: Lab, tmp_path: Any) -> None:
    """Without the policy in force, connections say otherwise than the table."""
    table = tmp_path / "table.yaml"
    table.write_text(
        "tests:\n- {name: closed, from: xwing, to: deathstar-1, port: 80, expect: deny}\n"
    )
    for level in ("engine", "kernel", "live"):
        flags = ["--lab", fleet.name] if level == "live" else []
        done = fleet.cilia.run("policy", "test", str(table), "--level", level, *flags)
        assert done.returncode == 1, done.stdout + done.stderr
        assert "expected deny" in done.stdout


def test_questions_about_what_is_in_force(fleet: Lab, policy: str, tmp_path: Any) -> None:
    cilia = fleet.cilia
    people = cilia.run("why", "xwing", "deathstar-1", "--dport", "80/tcp")
    assert people.returncode == 1, people.stderr
    assert f"{POLICY}:{INGRESS_LINE}" in people.stdout
    assert "+        - matchLabels:" in people.stdout
    rows = cilia.json("policy", "matrix")
    to_star = [x for x in rows if x["dst"] == "default/deathstar-1"]
    assert {
        "src": "default/tiefighter",
        "dst": "default/deathstar-1",
        "protocol": "TCP",
        "ports": "80",
    } in to_star
    assert not [x for x in to_star if x["src"] == "default/xwing"]
    wider = (REPOSITORY / POLICY).read_text().replace('"80"', '"81"')
    (tmp_path / "wider.yaml").write_text(wider)
    flips = cilia.run("policy", "whatif", str(tmp_path / "wider.yaml"), "-o", "json")
    assert flips.returncode == 1, flips.stderr
    changes = json.loads(flips.stdout)["changes"]
    assert {
        "change": "opens",
        "src": "default/tiefighter",
        "dst": "default/deathstar-1",
        "protocol": "TCP",
        "ports": "81",
    } in changes
