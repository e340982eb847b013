"""Flows of a lab, asked for as a user asks: by the command, by its options, through a relay."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import down
from tests.e2e.machine import REPOSITORY, Cilia, Lab, remains_of, remove_remains

LAB = """
name: flows
nodes: [{name: node1, flows: true, flows_args: [--exports, EXPORTS, --metrics, "drop flow policy"]}]
workloads:
  - {name: deathstar, labels: {org: empire, class: deathstar}, namespace: lab,
     command: python -m lab.httpd --name deathstar, ports: [80]}
  - {name: tiefighter, labels: {org: empire, class: tiefighter}, namespace: lab}
  - {name: xwing, labels: {org: alliance, class: xwing}, namespace: lab}
"""
POLICY = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: landing, namespace: lab}
spec:
  endpointSelector: {matchLabels: {class: deathstar}}
  ingress:
    - fromEndpoints: [{matchLabels: {org: empire}}]
      toPorts: [{ports: [{port: "80", protocol: TCP}]}]
"""


@pytest.fixture(scope="module")
def fleet(
    tmp_path_factory: pytest.TempPathFactory,
    need_root: None,
    need_netns: None,
    need_bpf: None,
    need_objects: None,
) -> Iterator[Lab]:
    """A lab with the flow service, a policy, and one attempt of each ship to land."""
    remove_remains()
    name = f"e2e{os.getpid()}-flows"
    path = tmp_path_factory.mktemp("flows") / "lab.yaml"
    exports = path.with_name("exports.yaml")
    exports.write_text(f"flowLogs: [{{name: all, filePath: {exports.with_name('flows.jsonl')}}}]")
    path.write_text(LAB.replace("EXPORTS", str(exports)))
    up = Cilia().run("lab", "up", str(path), "--name", name, "-o", "json", timeout_s=110)
    assert up.returncode == 0, up.stderr
    node = json.loads(up.stdout)["nodes"][0]
    env = {
        "CILIA_AGENT_SOCK": node["agent_socket"],
        "CILIA_IDENTITY_SOCK": node["identity_socket"],
        "CILIA_FLOWS_SERVER": f"unix://{node['flows_socket']}",
    }
    try:
        fleet = Lab(name, Cilia(env))
        fleet.cilia.ok("policy", "apply", "-", "--wait", stdin=POLICY)
        lands(fleet, "tiefighter")
        lands(fleet, "xwing")
        yield fleet
        written = [json.loads(x) for x in exports.with_name("flows.jsonl").open()]
        assert {"DROPPED", "FORWARDED"} <= {x["flow"]["verdict"] for x in written if "flow" in x}
    finally:
        down.down(name)
    assert remains_of(name) == []


def lands(fleet: Lab, ship: str) -> bool:
    done = fleet.cilia.run(
        "lab", "exec", "--lab", fleet.name, ship, "--",
        "python", "-m", "lab.httpc", "--json", "--timeout", "1",
        "POST", "http://deathstar/v1/request-landing",
    )  # fmt: skip
    return bool(json.loads(done.stdout)["status"] == 200)


def observed(fleet: Lab, *options: str) -> list[dict[str, Any]]:
    done = fleet.cilia.ok("flows", "observe", "-o", "json", "--all", *options)
    return [json.loads(line)["flow"] for line in done.splitlines() if '"flow"' in line]


def test_a_denied_flow_names_its_ends_its_reason_and_its_rule(fleet: Lab) -> None:
    flows = observed(fleet, "--verdict", "DROPPED", "--pod", "lab/xwing", "--to-port", "80")
    assert flows
    for flow in flows:
        assert flow["source"]["pod_name"] == "xwing"
        assert flow["source"]["namespace"] == "lab"
        assert flow["destination"]["pod_name"] == "deathstar"
        assert flow["drop_reason_desc"] == "POLICY_DENIED"
        (by,) = flow["ingress_denied_by"]
        assert (by["kind"], by["namespace"], by["name"]) == (
            "CiliumNetworkPolicy", "lab", "landing",
        )  # fmt: skip
        assert flow["Summary"] == "TCP Flags: SYN"


def test_an_allowed_flow_names_its_rule(fleet: Lab) -> None:
    flows = observed(
        fleet, "--type", "policy-verdict", "--verdict", "FORWARDED", "--from-pod", "lab/tiefighter",
        "--traffic-direction", "ingress",
    )  # fmt: skip
    assert flows
    (by,) = flows[0]["ingress_allowed_by"]
    assert by["name"] == "landing"
    assert "cilia:rule=spec.ingress[0]" in by["labels"]


def test_lines_for_people(fleet: Lab) -> None:
    text = fleet.cilia.ok("flows", "observe", "--verdict", "DROPPED", "--last", "1")
    assert "lab/xwing:" in text
    assert "-> lab/deathstar:80" in text or "<> lab/deathstar:80" in text
    assert "CiliumNetworkPolicy lab/landing" in text
    table = fleet.cilia.ok("flows", "observe", "--last", "3", "-o", "table")
    assert table.splitlines()[0].split()[:3] == ["TIMESTAMP", "SOURCE", "DESTINATION"]
    block = fleet.cilia.ok("flows", "observe", "--last", "1", "-o", "dict")
    assert "VERDICT: " in block


def test_sums(fleet: Lab) -> None:
    drops = fleet.cilia.json("flows", "top", "drops")
    assert drops["rows"][0]["source"] == "lab/xwing"
    assert "isolated by CiliumNetworkPolicy lab/landing" in drops["rows"][0]["policy"]
    pairs = fleet.cilia.json("flows", "history", "--since", "1h", "--group-by", "source,verdict")
    assert {"lab/xwing", "lab/tiefighter"} <= {row["source"] for row in pairs["rows"]}


def test_stats_and_losses(fleet: Lab) -> None:
    stats = fleet.cilia.json("flows", "stats")
    assert stats["watching"]
    assert stats["seen"] > 0
    lost = fleet.cilia.json("flows", "lost")
    assert lost["watching"]


def test_export(fleet: Lab, tmp_path: Path) -> None:
    path = tmp_path / "drops.jsonl"
    fleet.cilia.ok("flows", "export", str(path), "--verdict", "DROPPED")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines
    assert {line["flow"]["verdict"] for line in lines} == {"DROPPED"}
    again = fleet.cilia.run("flows", "export", str(path))
    assert again.returncode == 6
    assert "exists" in again.stderr


def test_following(fleet: Lab) -> None:
    watch = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "cli",
            "flows",
            "observe",
            "-f",
            "--verdict",
            "DROPPED",
            "-o",
            "json",
        ],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, **fleet.cilia.env},
    )
    try:
        deadline = time.monotonic() + 20
        while fleet.cilia.json("flows", "stats")["followers"] < 1:
            assert time.monotonic() < deadline
        assert not lands(fleet, "xwing")
        assert watch.stdout is not None
        flow = json.loads(watch.stdout.readline())["flow"]
        assert flow["source"]["pod_name"] == "xwing"
    finally:
        watch.send_signal(signal.SIGINT)
        assert watch.wait(10) == 0


class Service:
    """A flow service of the test's own, besides the lab's."""

    def __init__(self, directory: Path, name: str, *options: str) -> None:
        self.run_dir = directory / name
        self.run_dir.mkdir(exist_ok=True)
        words = ["--run-dir", str(self.run_dir), "--state-dir", str(self.run_dir), *options]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "services.flows", *words],
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(how)
        self.process.wait(20)


def told(fleet: Lab, relay: Path, *options: str) -> tuple[list[dict[str, Any]], str]:
    """What a relay answers: flows with the time at their outside, and what it says on stderr."""
    done = fleet.cilia.run(
        "flows",
        "observe",
        "-o",
        "json",
        "--server",
        f"unix://{relay}",
        *(options or ("--all",)),
    )
    responses = [json.loads(line) for line in done.stdout.splitlines()]
    return responses, done.stderr


def whole(time_text: str) -> str:
    """A time with all nine digits: protobuf's JSON leaves out those that are zero."""
    seconds, _, fraction = time_text.removesuffix("Z").partition(".")
    return f"{seconds}.{fraction:0<9}"


def until(reached: Callable[[], bool], within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.timeout(240)
def test_a_relay_over_two_services(fleet: Lab, tmp_path: Path) -> None:
    """Merged in the order of time; one is killed and comes back, and its absence is shown."""
    agent = ("--agent-socket", fleet.cilia.env["CILIA_AGENT_SOCK"], "--history-mb", "0")
    first = fleet.cilia.env["CILIA_FLOWS_SERVER"]
    second = tmp_path / "second" / "hubble.sock"
    peers = tmp_path / "peers.yaml"
    peers.write_text(
        f"- {{name: first, address: '{first}'}}\n- {{name: second, address: 'unix://{second}'}}\n"
    )
    relay = tmp_path / "relay" / "relay.sock"
    services = [
        Service(tmp_path, "second", *agent),
        Service(tmp_path, "relay", "--relay", "--peers-file", str(peers)),
    ]

    def reports(state: str) -> list[str]:
        responses, _ = told(fleet, relay, "--last", "1")
        return [
            name
            for r in responses
            if r.get("node_status", {}).get("state_change") == state
            for name in r["node_status"].get("node_names", [])
        ]

    try:
        until(lambda: relay.exists() and sorted(reports("NODE_CONNECTED")) == ["first", "second"])
        lands(fleet, "tiefighter")
        # Both services hear one agent: what is new is told twice, what is old by the first alone.
        until(lambda: len(told(fleet, second)[0]) > 0)
        apart = len(observed(fleet)) + len(told(fleet, second)[0])
        responses, _ = told(fleet, relay)
        times = [whole(r["time"]) for r in responses if "flow" in r]
        assert times == sorted(times)
        assert len(times) >= apart
        services[0].end(signal.SIGKILL)
        until(lambda: reports("NODE_UNAVAILABLE") == ["second"])
        assert told(fleet, relay)[0]
        services[0] = Service(tmp_path, "second", *agent)
        until(lambda: sorted(reports("NODE_CONNECTED")) == ["first", "second"])
    finally:
        for service in services:
            service.end()


def test_mistakes(fleet: Lab) -> None:
    nothing = fleet.cilia.run("flows", "observe", "--pod", "lab/nobody")
    assert (nothing.returncode, nothing.stdout) == (0, "")
    assert nothing.stderr == "No flow that is kept matches.\n"
    assert fleet.cilia.run("flows", "observe", "--last", "1").stderr == ""
    wrong = fleet.cilia.run("flows", "observe", "--http-path", "(")
    assert wrong.returncode == 4
    assert "http_path" in wrong.stderr
    away = Cilia({"CILIA_FLOWS_SERVER": "unix:///run/cilia-nowhere/hubble.sock"})
    gone = away.run("flows", "observe")
    assert gone.returncode == 3
    assert "not reachable" in gone.stderr


@pytest.mark.skipif(
    not shutil.which(os.environ.get("HUBBLE_BIN", "hubble")),
    reason="no hubble binary: put one on PATH, or name it in HUBBLE_BIN",
)
@pytest.mark.parametrize(
    "words",
    [
        ["status"],
        ["list", "nodes"],
        ["list", "namespaces"],
        ["observe", "--last", "5"],
        ["observe", "--last", "5", "-o", "jsonpb"],
        ["observe", "--verdict", "DROPPED", "--pod", "lab/xwing", "-o", "dict"],
        ["observe", "--not", "--verdict", "FORWARDED", "--type", "policy-verdict"],
        ["observe", "agent-events"],
    ],
)
def test_the_real_hubble(fleet: Lab, words: list[str]) -> None:
    hubble = shutil.which(os.environ.get("HUBBLE_BIN", "hubble"))
    assert hubble
    done = subprocess.run(
        [hubble, "--server", fleet.cilia.env["CILIA_FLOWS_SERVER"], *words],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_agent_goes(fleet: Lab) -> None:
    """The last test of the lab: what is kept is still told, and that nobody watches."""
    before = observed(fleet)
    (lab,) = json.loads(fleet.cilia.ok("lab", "status", fleet.name, "-o", "json"))
    agent = next(s for s in lab["nodes"][0]["services"] if s["name"] == "agent")
    os.kill(agent["pid"], signal.SIGKILL)
    deadline = time.monotonic() + 20
    while fleet.cilia.json("flows", "stats")["watching"]:
        assert time.monotonic() < deadline
    assert "agent" in fleet.cilia.json("flows", "stats")["message"]
    assert observed(fleet)[: len(before)] == before
