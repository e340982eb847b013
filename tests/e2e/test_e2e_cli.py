"""Every verb of `cilia` against a real lab: what it does, its JSON, its exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.machine import REPOSITORY, Cilia, Lab

POLICY = """\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: e2e-server}
spec:
  endpointSelector: {matchLabels: {app: server}}
  ingress:
    - fromEndpoints: [{matchLabels: {app: client}}]
      toPorts:
        - ports: [{port: "80", protocol: TCP}]
"""
INGRESS_LINE = 6

ENDPOINT_KEYS = {
    "id", "name", "namespace", "state", "message", "labels", "identity", "identity_labels",
    "ipv4", "ipv6", "mac", "host_interface", "interface", "netns", "policy", "options", "health",
    "ports", "visibility",
}  # fmt: skip


@pytest.fixture
def policy(lab: Lab) -> Iterator[str]:
    """The policy, in force for the test."""
    lab.cilia.ok("policy", "apply", "-", "--wait", stdin=POLICY)
    yield "e2e-server"
    lab.cilia.run("policy", "delete", "--all", "--wait")


@pytest.fixture
def netns() -> Iterator[str]:
    name = f"cilt-{os.getpid()}-e2e"
    subprocess.run(["ip", "netns", "add", name], check=True)
    yield name
    subprocess.run(["ip", "netns", "del", name], check=True)


def test_status(lab: Lab) -> None:
    shape = lab.cilia.json("status")
    assert shape["state"] == "Ok"
    assert shape["endpoint_states"]["ready"] >= 4
    assert shape["ipam"]["ipv4"]["pool"] == "10.217.0.0/16"
    assert shape["ipam"]["ipv6"]["allocated"] >= 4
    assert shape["controllers"]
    assert lab.cilia.ok("status", "--brief") == "OK\n"
    text = lab.cilia.ok("status", "--all-controllers")
    assert "CONTROLLER" in text


def test_status_tables(lab: Lab) -> None:
    tables = lab.cilia.json("status", "--tables")["tables"]
    assert tables
    for table in tables:
        assert all(len(row) == len(table["header"]) for row in table["rows"]), table["name"]
    assert "Table " in lab.cilia.ok("status", "--tables")


def test_endpoint_list_and_get(lab: Lab) -> None:
    items = lab.cilia.json("endpoint", "list")
    assert {"server", "client", "other", "far"} <= {item["name"] for item in items}
    assert all(set(item) == ENDPOINT_KEYS for item in items)
    by_label = lab.cilia.json("endpoint", "list", "-l", "app=server")
    assert {(e["namespace"], e["name"]) for e in by_label} == {
        ("default", "server"),
        ("test", "far"),
    }
    server = lab.cilia.json("endpoint", "get", "server")
    for ref in (str(server["id"]), "default/server", server["ipv4"], server["ipv6"]):
        assert lab.cilia.json("endpoint", "get", ref)["id"] == server["id"]
    assert "k8s:io.kubernetes.pod.namespace=default" in server["identity_labels"]
    assert "ENDPOINT" in lab.cilia.ok("endpoint", "list")
    assert "server" in lab.cilia.ok("endpoint", "get", "server")
    lab.cilia.fails(5, "endpoint", "get", "nobody")
    lab.cilia.fails(5, "endpoint", "get", "10.217.255.254")


def test_endpoint_life(lab: Lab, netns: str) -> None:
    added = lab.cilia.json(
        "endpoint", "add", "--netns", netns, "--name", "guest", "-l", "app=guest", "-l", "tier=x",
        "--annotation", "io.cilium.proxy-visibility=<Ingress/80/ANY/HTTP>",
    )  # fmt: skip
    try:
        assert added["state"] == "ready"
        assert added["interface"] == "eth0"
        again = lab.cilia.fails(
            6, "endpoint", "add", "--netns", netns, "--name", "guest", "-l", "app=guest"
        )
        assert "guest" in again or "eth0" in again
        busy = lab.cilia.fails(
            6, "endpoint", "add", "--netns", netns, "--name", "guest2", "--interface", "eth1",
            "-l", "a=b", "--ipv4", added["ipv4"],
        )  # fmt: skip
        assert added["ipv4"] in busy
        changed = lab.cilia.json("endpoint", "labels", "guest", "--add", "k8s:tier=y")
        assert "k8s:tier=y" in changed["labels"]
        assert changed["identity"] != added["identity"]
        assert "k8s:tier=y" in lab.cilia.ok("endpoint", "labels", "guest")
        options = lab.cilia.json("endpoint", "config", "guest", "PolicyEnforcement=always")
        assert options["PolicyEnforcement"] == "always"
        assert "PolicyEnforcement" in lab.cilia.ok("endpoint", "config", "guest")
        lab.cilia.fails(4, "endpoint", "config", "guest", "PolicyEnforcement=perhaps")
        lab.cilia.fails(4, "endpoint", "config", "guest", "NoSuchOption=1")
        assert added["visibility"]["annotation"] == "<Ingress/80/TCP/HTTP>"
        assert "policy isolates this direction" in lab.cilia.ok("endpoint", "get", "guest")
        text = lab.cilia.fails(4, "endpoint", "config", "guest", "visibility=<Ingress/53/UDP/DNS>")
        assert "dns is seen on egress only" in text
        options = lab.cilia.json("endpoint", "config", "guest", "visibility=none")
        assert options["Visibility"] == "none"
        lab.cilia.fails(4, "endpoint", "add", "--netns", netns, "--name", "x", "--annotation", "a")
        assert lab.cilia.json("endpoint", "get", "guest")["policy"]["ingress_enforced"]
        log = lab.cilia.json("endpoint", "log", "guest")
        assert {"time", "code", "state", "message"} == set(log[0])
        assert [entry["time"] for entry in log] == sorted(
            (entry["time"] for entry in log), reverse=True
        )
        health = lab.cilia.json("endpoint", "health", "guest")
        assert health["overall"] == "OK"
        assert health["connected"] is True
        assert lab.cilia.json("endpoint", "regenerate", "guest")["state"] == "ready"
    finally:
        lab.cilia.ok("endpoint", "delete", "guest")
    lab.cilia.fails(5, "endpoint", "get", "guest")
    lab.cilia.fails(5, "endpoint", "delete", "guest")


def test_endpoint_add_by_pid(lab: Lab, netns: str) -> None:
    with subprocess.Popen(
        ["nsenter", f"--net=/run/netns/{netns}", "sh", "-c", "echo up; exec sleep 60"],
        stdout=subprocess.PIPE,
    ) as sleeper:
        try:
            assert sleeper.stdout is not None
            assert sleeper.stdout.readline() == b"up\n"
            added = lab.cilia.json(
                "endpoint", "add", "--pid", str(sleeper.pid), "--name", "by-pid", "-l", "app=x"
            )
            assert added["state"] == "ready"
            lab.cilia.ok("endpoint", "delete", "by-pid")
        finally:
            sleeper.kill()


def test_endpoint_add_refusals(lab: Lab, netns: str) -> None:
    gone = lab.cilia.fails(5, "endpoint", "add", "--netns", "cilt-no-such", "--name", "x")
    assert "ip netns add" in gone
    reserved = lab.cilia.fails(
        4, "endpoint", "add", "--netns", netns, "--name", "x", "-l", "reserved:host"
    )
    assert "reserved" in reserved
    outside = lab.cilia.run(
        "endpoint", "add", "--netns", netns, "--name", "x", "-l", "a=b", "--ipv4", "192.0.2.99"
    )
    assert outside.returncode != 0
    assert "192.0.2.99" in outside.stderr


def test_identity(lab: Lab) -> None:
    items = lab.cilia.json("identity", "list")
    assert {1, 2, 9, 10} <= {item["id"] for item in items}
    mine = lab.cilia.json("identity", "list", "app=client")
    assert len(mine) == 1
    got = lab.cilia.json("identity", "get", str(mine[0]["id"]))
    assert got["labels"] == mine[0]["labels"]
    assert got["nodes"] == ["node1"]
    flags = [part for text in got["labels"] for part in ("-l", text)]
    assert lab.cilia.json("identity", "get", *flags)["id"] == got["id"]
    assert "reserved:host" in lab.cilia.ok("identity", "list")
    lab.cilia.fails(4, "identity", "get", "x")
    lab.cilia.fails(5, "identity", "get", "65000")


def test_policy_is_enforced_explained_and_taken_back(lab: Lab, tmp_path: Path) -> None:
    path = tmp_path / "server.yaml"
    path.write_text(POLICY)
    assert lab.http("other", "http://server/")["exit"] == 0
    dry = lab.cilia.json("policy", "apply", str(path), "--dry-run")
    assert dry["outcomes"][0]["change"] == "created"
    assert lab.cilia.json("policy", "get")["policies"] == []
    applied = lab.cilia.json("policy", "apply", str(path), "--wait")
    assert applied["realised"] is True
    try:
        for flag in ("-4", "-6"):
            assert lab.http("client", "http://server/", flag)["exit"] == 0
            assert lab.http("other", "http://server/", flag, timeout_s=0.7)["exit"] == 28
            # The policy is of namespace default: the server in `test` is not its subject.
            assert lab.http("other", "http://far.test/", flag)["exit"] == 0
        again = lab.cilia.json("policy", "apply", str(path))
        assert again["outcomes"][0]["change"] == "unchanged"
        got = lab.cilia.json("policy", "get", "e2e-server")["policies"]
        assert got[0]["file"] == str(path)
        assert got[0]["document"]["kind"] == "CiliumNetworkPolicy"
        assert "e2e-server" in lab.cilia.ok("policy", "get")
        assert "endpointSelector" in lab.cilia.ok("policy", "get", "default/e2e-server")
        lab.cilia.fails(5, "policy", "get", "nothing")
    finally:
        deleted = lab.cilia.json("policy", "delete", "-f", str(path), "--wait")
    assert deleted["outcomes"][0]["change"] == "deleted"
    assert deleted["realised"] is True
    assert lab.http("other", "http://server/")["exit"] == 0


def test_invalid_policy_changes_nothing(lab: Lab, policy: str, tmp_path: Path) -> None:
    before = lab.cilia.json("policy", "get")
    path = tmp_path / "bad.yaml"
    path.write_text(POLICY.replace('"80"', '"99999"').replace("TCP", "TPC"))
    text = lab.cilia.fails(4, "policy", "apply", str(path))
    assert text.count(f"{path}:9:") == 2
    assert "spec.ingress[0].toPorts[0].ports[0].port: " in text
    assert "nothing was changed" in text
    done = lab.cilia.run("policy", "apply", str(path), "-o", "json")
    error = json.loads(done.stderr)["error"]
    assert (done.returncode, error["code"], len(error["faults"])) == (4, "invalid", 2)
    assert lab.cilia.json("policy", "get") == before


def test_every_one_of_many_faults_is_told(lab: Lab, tmp_path: Path) -> None:
    """More than fit into the answer's header."""
    path = tmp_path / "bad.yaml"
    path.write_text(
        "---\n".join(
            POLICY.replace("e2e-server", f"bad-{n}").replace('"80"', f'"{70000 + n}"')
            for n in range(100)
        )
    )
    text = lab.cilia.fails(4, "policy", "apply", str(path))
    missing = [n for n in range(100) if f"'{70000 + n}' is above 65535" not in text]
    assert missing == []
    assert "invalid policy: 100 faults; nothing was changed" in text
    assert lab.cilia.json("policy", "get")["policies"] == []


def test_policy_trace(lab: Lab, policy: str) -> None:
    server = lab.cilia.json("endpoint", "get", "server")
    client = lab.cilia.json("endpoint", "get", "client")
    ways = [
        ("client", "server"),
        (f"identity:{client['identity']}", f"endpoint:{server['id']}"),
        (client["ipv4"], server["ipv6"]),
    ]
    for src, dst in ways:
        shape = lab.cilia.json("policy", "trace", "-s", src, "-d", dst, "-p", "80/tcp")
        assert shape["verdict"] == "allowed", (src, dst)
        rule = shape["ingress"]["rules"][0]
        assert rule["name"] == f"CiliumNetworkPolicy default/{policy}"
        assert (rule["file"], rule["line"]) == ("-", INGRESS_LINE + 1)
    denied = ("policy", "trace", "-s", "other", "-d", "server", "-p", "80/tcp")
    shape = lab.cilia.json(*denied)
    assert shape["verdict"] == "denied"
    assert shape["egress"]["verdict"] == "allowed"
    assert shape["ingress"]["default_deny"][0]["line"] == INGRESS_LINE
    assert "Final verdict: DENIED" in lab.cilia.ok(*denied)
    lab.cilia.fails(1, *denied, "--exit-code")
    lab.cilia.fails(5, "policy", "trace", "-s", "nobody", "-d", "server")


def test_bpf_dumps(lab: Lab, policy: str) -> None:
    assert lab.http("client", "http://server/")["exit"] == 0
    server = lab.cilia.json("endpoint", "get", "server")
    client = lab.cilia.json("endpoint", "get", "client")
    rows = lab.cilia.json("bpf", "policy", "list", "server")
    allowed = [r for r in rows if r["identity"] == client["identity"]]
    assert [(r["direction"], r["protocol"], r["port"], r["deny"]) for r in allowed] == [
        ("ingress", "TCP", 80, False)
    ]
    assert allowed[0]["rule"]["name"].endswith(policy)
    assert len(lab.cilia.json("bpf", "policy", "list")) > len(rows)
    tracked = lab.cilia.json("bpf", "ct", "list")
    assert any(r["source"] == client["ipv4"] or r["source"] == client["ipv6"] for r in tracked)
    assert len(lab.cilia.json("bpf", "ct", "list", "--limit", "1")) == 1
    ipcache = {r["prefix"]: r["identity"] for r in lab.cilia.json("bpf", "ipcache", "list")}
    assert ipcache["0.0.0.0/0"] == 9
    assert ipcache["::/0"] == 10
    assert ipcache[f"{server['ipv4']}/32"] == server["identity"]
    endpoints = {r["address"]: r for r in lab.cilia.json("bpf", "endpoint", "list")}
    assert endpoints[server["ipv6"]]["id"] == server["id"]
    assert "open" in endpoints[server["ipv6"]]["flags"]
    metrics = lab.cilia.json("bpf", "metrics", "list")
    assert any(r["reason"] == 0 and r["packets"] for r in metrics["metrics"])
    assert lab.http("client", "http://server/")["exit"] == 0  # a closed connection is not kept long
    for noun in ("ct", "policy", "ipcache", "endpoint", "metrics"):
        assert lab.cilia.ok("bpf", noun, "list").splitlines()[1:]


def test_bpf_probe_needs_no_agent() -> None:
    nobody = Cilia({"CILIA_AGENT_SOCK": "/nonexistent/agent.sock"})
    done = nobody.run("bpf", "probe", "-o", "json")
    features = {f["name"]: f for f in json.loads(done.stdout)}
    assert features["ringbuf"]["present"] is True
    missing = [f for f in features.values() if f["required"] and not f["present"]]
    assert done.returncode == (1 if missing else 0)


def _monitor(lab: Lab, *flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cli", "monitor", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, **lab.cilia.env},
    )


def _events(monitor: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    assert monitor.stdout is not None
    for line in monitor.stdout:
        yield json.loads(line)


def test_monitor_json_has_identities_and_rules(lab: Lab, policy: str) -> None:
    client = lab.cilia.json("endpoint", "get", "client")
    other = lab.cilia.json("endpoint", "get", "other")
    server = lab.cilia.json("endpoint", "get", "server")
    with _monitor(lab, "-t", "verdict", "-t", "drop", "-o", "json") as monitor:
        try:
            allowed = denied = None
            # The first requests may be made before the monitor listens: ask until it reports.
            for _ in range(10):
                lab.http("client", "http://server/", "-4")
                lab.http("other", "http://server/", "-4", timeout_s=0.5)
                for event in _events(monitor):
                    if event["direction"] != "ingress":
                        continue
                    if event["verdict"] == "ALLOWED":
                        allowed = event
                    elif event["type"] == "drop":
                        denied = event
                        break
                if allowed and denied:
                    break
        finally:
            monitor.terminate()
    assert allowed is not None
    assert denied is not None
    assert allowed["source"]["identity"] == client["identity"]
    assert allowed["destination"]["identity"] == server["identity"]
    assert allowed["rule"]["id"]
    assert allowed["rule"]["name"] == f"CiliumNetworkPolicy default/{policy}"
    assert (allowed["rule"]["file"], allowed["rule"]["line"]) == ("-", INGRESS_LINE + 1)
    assert denied["source"]["identity"] == other["identity"]
    assert (denied["reason"], denied["reason_code"]) == ("Policy denied", 133)
    assert denied["default_deny"][0]["line"] == INGRESS_LINE


def test_monitor_for_people_and_agent_notifications(lab: Lab) -> None:
    with _monitor(lab, "-t", "agent", "-n", "1") as monitor:
        assert monitor.stderr is not None
        assert "Listening" in monitor.stderr.readline()
        lab.cilia.ok("policy", "apply", "-", "--wait", stdin=POLICY)
        try:
            out, _ = monitor.communicate(timeout=20)
        finally:
            monitor.kill()
            lab.cilia.ok("policy", "delete", "--all", "--wait")
    assert out.startswith(">> agent ")
    assert monitor.returncode == 0


def test_monitor_ends_on_ctrl_c(lab: Lab) -> None:
    with _monitor(lab, "-t", "drop") as monitor:
        assert monitor.stderr is not None
        assert "Listening" in monitor.stderr.readline()
        monitor.send_signal(signal.SIGINT)
        _, err = monitor.communicate(timeout=20)
    assert monitor.returncode == 0
    assert "Disconnected" in err


def test_store(lab: Lab, tmp_path: Path) -> None:
    shape = lab.cilia.json("store", "status")
    assert shape["backend"] == "embedded"
    assert [s["node"] for s in shape["sessions"]] == ["node1"]
    assert "embedded" in lab.cilia.ok("store", "status")
    path = tmp_path / "backup.sqlite"
    assert lab.cilia.json("store", "backup", str(path))["size_bytes"] == path.stat().st_size
    lab.cilia.fails(6, "store", "backup", str(path))
    lab.cilia.ok("store", "backup", str(path), "--force")
    state = tmp_path / "state"
    first = lab.cilia.json("store", "restore", str(path), "--state-dir", str(state))
    assert first["kept"] is None
    assert Path(first["file"]).is_file()
    second = lab.cilia.json("store", "restore", str(path), "--state-dir", str(state))
    assert Path(second["kept"]).is_file()


def test_store_is_not_exchanged_under_a_running_service(lab: Lab, tmp_path: Path) -> None:
    path = tmp_path / "backup.sqlite"
    lab.cilia.ok("store", "backup", str(path))
    state = Path(lab.cilia.env["CILIA_IDENTITY_SOCK"]).parent / "state"
    done = lab.cilia.run("store", "restore", str(path), "--state-dir", str(state))
    assert done.returncode != 0
    assert "cilia" in done.stderr or "running" in done.stderr
    assert lab.cilia.json("store", "status")["sessions"]


def test_version_and_completion(lab: Lab) -> None:
    shape = lab.cilia.json("version")
    assert set(shape) == {"client", "agent"}
    assert shape["agent"]
    assert "cilia" in lab.cilia.ok("completion", "bash")
    asked = {"_CILIA_COMPLETE": "bash_complete", "COMP_WORDS": "cilia endpoint get s"}
    typed = Cilia({**lab.cilia.env, **asked, "COMP_CWORD": "3"})
    assert typed.run().stdout.splitlines() == ["plain,server"]


def test_cleanup_refuses_a_running_agent_and_finds_nothing_elsewhere(
    lab: Lab, tmp_path: Path
) -> None:
    run_dir = Path(lab.cilia.env["CILIA_AGENT_SOCK"]).parent
    done = lab.cilia.run(
        "cleanup", "-f", "--run-dir", str(run_dir), "--state-dir", str(run_dir / "state")
    )
    assert done.returncode == 6
    assert "agent" in done.stderr
    assert lab.cilia.ok("status", "--brief") == "OK\n"
    assert lab.http("client", "http://server/")["exit"] == 0


def test_lab_exec_and_status(lab: Lab) -> None:
    shape = lab.cilia.json("lab", "status", lab.name)
    assert [item["name"] for item in shape] == [lab.name]
    assert shape[0]["healthy"] is True
    assert {w["name"]: w["process"] for w in shape[0]["workloads"]}["server"] == "running"
    assert "healthy" in lab.cilia.ok("lab", "status", lab.name)
    done = lab.cilia.run(
        "lab", "exec", "--lab", lab.name, "client", "--", "sh", "-c", "cat /etc/hosts; exit 7"
    )
    assert done.returncode == 7
    assert "far.test" in done.stdout
    assert lab.cilia.ok("lab", "exec", "--lab", lab.name, "node1", "ip", "-br", "addr").count("cil")
    lab.cilia.fails(5, "lab", "exec", "--lab", lab.name, "nobody", "true")
    lab.cilia.fails(5, "lab", "exec", "--lab", "no-such-lab", "client", "true")


def test_the_world_is_reached_through_the_node(lab: Lab) -> None:
    for flag, address in (("-4", "http://192.0.2.10/"), ("-6", "http://[2001:db8::10]/")):
        result = lab.http("client", address, flag)
        assert result["exit"] == 0
        you = json.loads(result["body"])["you"]
        assert you in ("198.18.0.1", "fd00:18::1")  # the node, not the workload: masqueraded
