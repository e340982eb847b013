"""The command without any service: help, usage, offline verbs, and nobody answering."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from cli.errors import Exit
from cli.lab import how_to_talk
from cli.root import NOUNS, cli
from lab.state import LabState, NodeState

POLICY = """\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: rule1}
spec:
  endpointSelector: {matchLabels: {app: web}}
  ingress:
    - fromEndpoints: [{matchLabels: {app: front}}]
      toPorts:
        - ports: [{port: "80", protocol: TCP}]
"""

BAD = POLICY.replace('"80"', '"99999"').replace("TCP", "TPC")


def run(*args: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli, args, input=stdin, prog_name="cilia")


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    ctx = click.Context(group)
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        assert command is not None
        yield (*path, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


ALL = sorted(commands(cli))


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_every_command_has_help(path: tuple[str, ...]) -> None:
    result = run(*path, "--help")
    assert result.exit_code == 0, result.output
    assert "Usage: cilia" in result.output


def test_the_verbs_promised_are_there() -> None:
    said = {" ".join(path) for path in ALL}
    assert set(NOUNS) <= said
    for verb in ["list", "get", "add", "delete", "labels", "config", "log", "health", "regenerate"]:
        assert f"endpoint {verb}" in said
    for verb in ["apply", "get", "delete", "validate", "trace"]:
        assert f"policy {verb}" in said
    for verb in ["policy", "ct", "ipcache", "endpoint", "metrics"]:
        assert f"bpf {verb} list" in said
    for verb in ["up", "down", "status", "exec"]:
        assert f"lab {verb}" in said
    assert {"bpf probe", "store backup", "store restore", "store status"} <= said


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    result = run("completion", shell)
    assert result.exit_code == 0
    assert "_CILIA_COMPLETE" in result.output


@pytest.mark.parametrize(
    "args",
    [
        ("nonsense",),
        ("endpoint", "add", "--name", "x"),
        ("endpoint", "add", "--name", "x", "--netns", "a", "--pid", "1"),
        ("policy", "delete"),
        ("policy", "delete", "x", "--all"),
        ("identity", "get"),
        ("monitor", "--type", "nonsense"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_two(args: tuple[str, ...]) -> None:
    assert run(*args).exit_code == Exit.USAGE


def test_validate_says_all_faults_with_place_and_path(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(BAD)
    result = run("policy", "validate", str(path))
    assert result.exit_code == Exit.INVALID
    lines = [line for line in result.stderr.splitlines() if line.startswith(f"{path}:9:")]
    assert len(lines) == 2, result.stderr
    assert "spec.ingress[0].toPorts[0].ports[0].port: " in lines[0]
    assert "spec.ingress[0].toPorts[0].ports[0].protocol: " in lines[1]


def test_validate_json_and_stdin() -> None:
    good = json.loads(run("policy", "validate", "-", "-o", "json", stdin=POLICY).stdout)
    assert good["valid"] is True
    assert good["documents"] == [
        {"kind": "CiliumNetworkPolicy", "namespace": "default", "name": "rule1", "rules": 1}
    ]
    result = run("-o", "json", "policy", "validate", "-", stdin=BAD)
    bad = json.loads(result.stdout)
    assert result.exit_code == Exit.INVALID
    assert bad["valid"] is False
    assert {(f["file"], f["line"]) for f in bad["faults"]} == {("-", 9)}


@pytest.mark.parametrize("what", ["missing", "empty-dir", "empty-file"])
def test_validate_without_input(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x.yaml"
    expected = Exit.NOT_FOUND
    match what:
        case "empty-dir":
            path.mkdir()
        case "empty-file":
            path.write_text("\n")
            expected = Exit.INVALID
    result = run("policy", "validate", str(path))
    assert result.exit_code == expected
    assert result.stderr.startswith("Error: ")


def _trace(tmp_path: Path, *args: str) -> Result:
    path = tmp_path / "good.yaml"
    path.write_text(POLICY)
    return run("policy", "trace", "--policies", str(path), *args)


@pytest.mark.parametrize(
    ("src", "dport", "verdict"),
    [
        ("app=front", "80/tcp", "allowed"),
        ("app=front", "80", "allowed"),  # TCP's, as `why` and people take it
        ("app=front", "81/tcp", "denied"),
        ("app=front", "80/any", "denied"),  # not on UDP
        ("app=other", "80/tcp", "denied"),
        ("192.0.2.1", "80/tcp", "denied"),
        ("app=front,k8s:io.kubernetes.pod.namespace=shop", "80/tcp", "denied"),
    ],
)
def test_offline_trace(tmp_path: Path, src: str, dport: str, verdict: str) -> None:
    result = _trace(tmp_path, "-s", src, "-d", "app=web", "-p", dport, "-o", "json")
    assert result.exit_code == 0, result.output
    shape = json.loads(result.stdout)
    assert shape["verdict"] == verdict
    ingress = shape["ingress"]
    rules = ingress["rules"] if verdict == "allowed" else ingress["default_deny"]
    assert rules[0]["name"] == "CiliumNetworkPolicy default/rule1"
    assert rules[0]["line"]


def test_trace_exit_code_is_asked_for(tmp_path: Path) -> None:
    denied = ("-s", "app=other", "-d", "app=web", "-p", "80/tcp")
    plain = _trace(tmp_path, *denied)
    assert plain.exit_code == 0
    assert plain.stdout.rstrip().endswith("Final verdict: DENIED")
    assert _trace(tmp_path, *denied, "--exit-code").exit_code == Exit.FAILED


def test_without_a_port_all_are_asked_about_and_that_is_said(tmp_path: Path) -> None:
    result = _trace(tmp_path, "-s", "app=front", "-d", "app=web")
    assert "Final verdict: DENIED" in result.stdout
    assert "--dport" in result.stderr
    assert "--dport" not in _trace(tmp_path, "-s", "app=web", "-d", "app=front").stderr


ENDPOINTS = "[{name: web, labels: {app: web}}, {name: front, labels: {app: front}}, {name: x}]"


def test_offline_matrix(tmp_path: Path) -> None:
    (tmp_path / "policies" / "more").mkdir(parents=True)
    (tmp_path / "policies" / "more" / "p.yml").write_text(POLICY)
    (tmp_path / "endpoints.yaml").write_text(ENDPOINTS)
    files = ["--policies", f"{tmp_path}/policies", "--endpoints", f"{tmp_path}/endpoints.yaml"]
    result = run("policy", "matrix", *files, "-o", "json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    to_web = [x for x in rows if x["dst"] == "default/web" and x["src"] != "reserved:host"]
    assert to_web == [
        {"src": "default/front", "dst": "default/web", "protocol": "TCP", "ports": "80"}
    ]
    assert run("-o", "json", "policy", "matrix", *files).stdout == result.stdout
    never = json.loads(
        run("policy", "matrix", *files, "--enforcement", "never", "-o", "json").stdout
    )
    assert len(never) > len(rows)
    page = run("policy", "matrix", *files, "-o", "html").stdout
    assert "<td>TCP 80</td>" in page
    table = run("policy", "matrix", *files).stdout
    words = [line.split() for line in table.splitlines()]
    assert [x[2:] for x in words if x[:2] == ["default/front", "default/web"]] == [["TCP", "80"]]
    for pair in (["default/web", "default/x"], ["default/x", "0.0.0.0/0"], ["::/0", "default/x"]):
        assert [x[2:] for x in words if x[:2] == pair] == [["ANY", "all"]]
    assert re.search(r"^default/front +default/web +TCP +80$", table, re.MULTILINE)


def files(tmp_path: Path) -> list[str]:
    (tmp_path / "p.yaml").write_text(POLICY)
    (tmp_path / "e.yaml").write_text(ENDPOINTS)
    return ["--policies", f"{tmp_path}/p.yaml", "--endpoints", f"{tmp_path}/e.yaml"]


def test_why_names_the_rule_and_an_edit_that_works(tmp_path: Path) -> None:
    given = files(tmp_path)
    denied = run("why", "x", "web", "--dport", "80/tcp", *given, "-o", "json")
    assert denied.exit_code == Exit.FAILED, denied.output
    shape = json.loads(denied.stdout)
    (denial,) = shape["denials"]
    assert denial["direction"] == "ingress"
    assert denial["default_deny"][0]["line"] == 6
    assert denial["near_misses"][0]["rule"]["path"] == "spec.ingress[0]"
    assert shape["edit"]["steps"][0]["file"] == f"{tmp_path}/p.yaml"
    assert "+" in shape["edit"]["patch"]
    people = run("why", "x", "web", "--dport", "80/tcp", *given)
    assert "DENIED" in people.stdout
    assert "p.yaml:6" in people.stdout
    edited = run("why", "x", "web", "--dport", "80/tcp", *given, "-o", "yaml")
    assert edited.exit_code == Exit.FAILED
    (tmp_path / "p.yaml").write_text(edited.stdout)
    assert run("why", "x", "web", "--dport", "80/tcp", *given).exit_code == Exit.OK
    assert run("why", "x", "web", "--dport", "81/tcp", *given).exit_code == Exit.FAILED
    every = run("why", "front", "web", *given)  # one port is allowed, and the others not
    assert "default/front to default/web on all ports: DENIED" in every.stdout
    assert "--dport asks about one" in every.stderr


def test_why_writes_the_edit_into_the_file_itself(tmp_path: Path) -> None:
    given = files(tmp_path)
    policy = tmp_path / "p.yaml"
    policy.write_text(f"# kept\n{POLICY}---\n{POLICY.replace('rule1', 'rule2')}")
    result = run("why", "x", "web", "-p", "80", *given, "--write-edit", str(policy))
    assert result.exit_code == Exit.FAILED
    assert policy.read_text().startswith("# kept\n")
    assert policy.read_text().count("kind:") == 2
    assert run("why", "x", "web", "-p", "80", *given).exit_code == Exit.OK


EVENT: dict[str, Any] = {
    "type": "drop",
    "verdict": "DENIED",
    "protocol": "TCP",
    "icmp": None,
    "reply": False,
    "source": {
        "address": "10.0.0.9",
        "port": 1234,
        "labels": ["k8s:app=stranger", "k8s:io.kubernetes.pod.namespace=default"],
        "name": "default/stranger",
    },
    "destination": {
        "address": "10.0.0.1",
        "port": 80,
        "labels": ["k8s:app=web", "k8s:io.kubernetes.pod.namespace=default"],
        "name": None,
    },
}
FLOW: dict[str, Any] = {
    "flow": {
        "verdict": "DROPPED",
        "IP": {"source": "192.0.2.1", "destination": "10.0.0.1"},
        "l4": {"TCP": {"source_port": 1, "destination_port": 80}},
        "source": {"identity": 2, "labels": ["reserved:world"]},
        "destination": {
            "labels": ["k8s:app=web", "k8s:io.kubernetes.pod.namespace=default"],
            "namespace": "default",
            "pod_name": "web",
        },
    }
}


def test_why_reads_requests_of_flows(tmp_path: Path) -> None:
    given = files(tmp_path)
    (tmp_path / "p.yaml").write_text(
        POLICY.replace("app: front", "app: stranger")
        + '          rules: {http: [{method: GET, path: "/public"}]}\n'
    )
    http = {
        "method": "PUT",
        "url": "http://web/secret?x=1",
        "headers": [{"name": "a", "value": "b"}],
    }
    event = {**EVENT, "type": "l7", "http": http}
    hubble = {
        "flow": {
            **FLOW["flow"],
            "source": {"labels": EVENT["source"]["labels"], "pod_name": "stranger"},
            "l7": {"type": "REQUEST", "http": {**http, "headers": [{"key": "a", "value": "b"}]}},
        }
    }
    for flow in (event, hubble):
        result = run("why", json.dumps(flow), *given, "-o", "json")
        shape = json.loads(result.stdout)
        assert shape["what"] == "80/TCP with PUT web/secret?x=1"
        (denial,) = shape["denials"]
        assert denial["cause"] == "request"
        assert shape["edit"]["steps"][0]["value"] == {"method": "PUT", "path": "/secret\\?x=1"}


@pytest.mark.parametrize(("flow", "source"), [(EVENT, "default/stranger"), (FLOW, "192.0.2.1")])
def test_why_reads_flows(tmp_path: Path, flow: dict[str, object], source: str) -> None:
    given = files(tmp_path)[:2]
    text = json.dumps(flow)
    for result in (
        run("why", text, *given, "-o", "json"),
        run("why", *given, "-o", "json", stdin=text),
    ):
        assert result.exit_code == Exit.FAILED, result.output
        shape = json.loads(result.stdout)
        assert shape["source"] == source
        assert shape["what"] == "80/TCP"
        assert shape["edit"]["steps"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["one"], Exit.USAGE, "one word is no question"),
        (["a", "b", "c"], Exit.USAGE, "give one flow"),
        (["{"], Exit.INVALID, "not JSON"),
        (["{}"], Exit.INVALID, "no source"),
        (["nobody", "web"], Exit.NOT_FOUND, "no endpoint 'nobody'"),
        (["x", "web", "-p", "x"], Exit.INVALID, "not a port"),
        (["x", "web", "-p", "1/x"], Exit.INVALID, "unknown protocol"),
        (["x", "web", "-p", "80", "--header", "x"], Exit.INVALID, "not a header"),
    ],
)
def test_why_says_what_is_wrong(tmp_path: Path, words: list[str], code: Exit, message: str) -> None:
    result = run("why", *words, *files(tmp_path))
    assert result.exit_code == code, result.output
    assert message in result.stderr


def test_diff_is_about_decisions(tmp_path: Path) -> None:
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    a.write_text(POLICY)
    b.write_text("# another text\n" + POLICY.replace('port: "80"', 'port: "80", endPort: 80'))
    equal = run("policy", "diff", str(a), str(b), "-o", "json")
    assert equal.exit_code == Exit.OK, equal.output
    assert json.loads(equal.stdout)["equal"] is True
    b.write_text(POLICY.replace("80", "81"))
    (tmp_path / "e.yaml").write_text(ENDPOINTS)
    other = run("policy", "diff", str(a), str(b), "--endpoints", f"{tmp_path}/e.yaml", "-o", "json")
    assert other.exit_code == Exit.FAILED
    ends = {"src": "default/front", "dst": "default/web", "protocol": "TCP"}
    assert json.loads(other.stdout)["changes"] == [
        {"change": "closes", **ends, "ports": "80"},
        {"change": "opens", **ends, "ports": "81"},
    ]


def test_whatif_counts_recorded_flows_too(tmp_path: Path) -> None:
    given = files(tmp_path)
    new = tmp_path / "new.yaml"
    new.write_text(POLICY.replace("app: front", "app: stranger"))
    lines = "".join(f"{json.dumps(x)}\n" for x in (EVENT, EVENT, FLOW, {"type": "lost", "lost": 1}))
    result = run("policy", "whatif", str(new), *given, "--flows", "-", "-o", "json", stdin=lines)
    assert result.exit_code == Exit.FAILED, result.output
    shape = json.loads(result.stdout)
    (flow,) = shape["flows"]
    assert (flow["change"], flow["src"], flow["flows"]) == ("opens", "default/stranger", 2)
    assert [x["change"] for x in shape["changes"]] == ["closes"]
    same = run("policy", "whatif", given[1], *given)
    assert same.exit_code == Exit.OK
    assert "No connection changes (3 endpoints given)" in same.stdout
    gone = run("policy", "whatif", "--delete", given[1], *given)
    assert "+ default/x to default/web: ANY all" in gone.stdout.splitlines()
    assert "+ default/front to default/web: TCP 1-79,81-65535" in gone.stdout.splitlines()


TABLE = """
policies: [p.yaml]
endpoints: e.yaml
tests:
- {name: open, from: front, to: web, port: 80, expect: allow, rule: "rule1 spec.ingress[0]"}
- name: closed
  from: [x, 192.0.2.1]
  to: {app: web}
  port: [80, 53/udp]
  expect: deny
  rule: rule1
"""


def test_expectations(tmp_path: Path) -> None:
    files(tmp_path)
    table = tmp_path / "t.yaml"
    table.write_text(TABLE)
    held = run("policy", "test", str(table), "-o", "json")
    assert held.exit_code == Exit.OK, held.output
    shape = json.loads(held.stdout)
    assert (shape["level"], shape["passed"], shape["failed"]) == ("engine", 5, 0)
    assert shape["tests"][0]["rules"] == ["CiliumNetworkPolicy default/rule1 spec.ingress[0]"]
    for old, new, said in (
        ("expect: allow", "expect: deny", "expected deny (" + f"{table}:5)"),
        ("spec.ingress[0]", "spec.ingress[1]", "expected by rule1 spec.ingress[1]"),
    ):
        table.write_text(TABLE.replace(old, new))
        failed = run("policy", "test", str(table))
        assert failed.exit_code == Exit.FAILED
        assert said in failed.stdout
        assert "4 of 5 expectations held (level engine)" in failed.stdout
    table.write_text(TABLE.replace("from: front", "from: nobody"))
    assert run("policy", "test", str(table)).exit_code == Exit.NOT_FOUND
    table.write_text(TABLE.replace("expect: allow", "expect: perhaps"))
    bad = run("policy", "test", str(table))
    assert bad.exit_code == Exit.INVALID
    assert f"{table}:5:" in bad.stderr


def test_lint_says_what_is_probably_not_meant(tmp_path: Path) -> None:
    given = files(tmp_path)
    result = run("policy", "lint", given[1], *given[2:], "-o", "json")
    assert result.exit_code == Exit.FAILED
    assert any("default deny" in x["message"] for x in json.loads(result.stdout)["warnings"])
    assert run("policy", "lint", given[1]).exit_code == Exit.OK


def test_matrix_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(POLICY)
    (tmp_path / "bad.yaml").write_text("[{name: a, ips: [nowhere]}]")
    alone = run("policy", "matrix", "--policies", f"{tmp_path}/p.yaml")
    assert alone.exit_code == Exit.USAGE
    bad = run(
        "policy",
        "matrix",
        "--policies",
        f"{tmp_path}/p.yaml",
        "--endpoints",
        f"{tmp_path}/bad.yaml",
    )
    assert bad.exit_code == Exit.INVALID
    assert "bad.yaml:1:18: [0].ips[0]" in bad.stderr
    (tmp_path / "q.yaml").write_text(POLICY)
    (tmp_path / "e.yaml").write_text(ENDPOINTS)
    twice = run(
        "policy",
        "matrix",
        "--policies",
        str(tmp_path / "p.yaml"),
        "--policies",
        str(tmp_path / "q.yaml"),
        "--endpoints",
        str(tmp_path / "e.yaml"),
    )
    assert twice.exit_code == 0
    assert "also the name of the one at" in twice.stderr


def test_offline_trace_cannot_look_up_endpoints(tmp_path: Path) -> None:
    result = _trace(tmp_path, "-s", "xwing", "-d", "app=web")
    assert result.exit_code == Exit.NOT_FOUND
    assert "labels" in result.stderr
    number = _trace(tmp_path, "-s", "identity:7", "-d", "app=web")
    assert number.exit_code == Exit.INVALID
    assert "only be looked up by an agent" in number.stderr


def test_offline_trace_of_endpoints_and_requests(tmp_path: Path) -> None:
    given = files(tmp_path)
    (tmp_path / "p.yaml").write_text(
        POLICY + '          rules: {http: [{method: GET, path: "/public.*"}]}\n'
    )
    asked = ("policy", "trace", "-s", "front", "-d", "web", "-p", "80/tcp", *given)
    for request, verdict in (
        ((), "allowed"),
        (("--method", "GET", "--path", "/public/x"), "allowed"),
        (("--method", "POST", "--path", "/public/x"), "denied"),
        (("--path", "/secret", "--host", "a.org", "--header", "X-A: 1"), "denied"),
    ):
        result = run(*asked, *request, "-o", "json")
        shape = json.loads(result.stdout)
        assert shape["verdict"] == verdict, request
        assert shape["ingress"]["rules"][0]["path"] == "spec.ingress[0]"
        assert shape["ingress"]["rules"][0]["file"] == f"{tmp_path}/p.yaml"
    assert "no rule lets this request pass" in run(*asked, "--method", "PUT").stdout
    never = run("policy", "trace", "-s", "x", "-d", "web", *given, "--mode", "never", "-o", "json")
    assert json.loads(never.stdout)["verdict"] == "allowed"


def test_nobody_there(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    result = run("--agent-socket", str(path), "endpoint", "list")
    assert result.exit_code == Exit.UNREACHABLE
    assert f"agent not reachable at {path}" in result.stderr
    assert "python -m services.agent" in result.stderr


def test_socket_that_nobody_listens_on(tmp_path: Path) -> None:
    path = tmp_path / "identity.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    result = run("--identity-socket", str(path), "-o", "json", "identity", "list")
    assert result.exit_code == Exit.UNREACHABLE
    error = json.loads(result.stderr)["error"]
    assert error["code"] == "unreachable"
    assert error["exit"] == 3
    assert "services.identity" in error["hint"]


def test_a_socket_may_be_written_as_of_grpc(tmp_path: Path) -> None:
    result = run("--agent-socket", f"unix://{tmp_path}/agent.sock", "status")
    assert f"not reachable at {tmp_path}/agent.sock" in result.stderr


def test_a_flow_service_that_hangs_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "hubble.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        for words in (("stats",), ("observe", "-f")):
            result = run("--timeout", "0.3", "flows", *words, "--server", f"unix://{path}")
            assert result.exit_code == Exit.TIMEOUT
            assert "did not answer within 0.3 s" in result.stderr
    path.unlink()
    gone = run("flows", "stats", "--server", f"unix://{path}")
    assert gone.exit_code == Exit.UNREACHABLE
    assert "there is no such socket" in gone.stderr


def test_what_is_no_socket_is_not_called_one(tmp_path: Path) -> None:
    result = run("--agent-socket", str(tmp_path), "status")
    assert result.exit_code == Exit.UNREACHABLE
    assert "is not a socket" in result.stderr


def test_version_without_an_agent(tmp_path: Path) -> None:
    result = run("--agent-socket", str(tmp_path / "none"), "version", "-o", "json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["agent"] is None


@pytest.mark.parametrize("text", ["=x", "a b=c", "bad;label=x"])
def test_bad_label_never_reaches_a_service(tmp_path: Path, text: str) -> None:
    result = run("--agent-socket", str(tmp_path / "none"), "endpoint", "list", "-l", text)
    assert result.exit_code == Exit.INVALID


@pytest.mark.parametrize(
    ("flag", "value"), [("--ipv4", "fd00::1"), ("--ipv6", "10.0.0.1"), ("--ipv4", "10.0.0.256")]
)
def test_add_refuses_an_address_of_the_wrong_kind(flag: str, value: str) -> None:
    result = run("endpoint", "add", "--name", "x", "--pid", "1", flag, value)
    assert result.exit_code == Exit.INVALID
    assert value in result.stderr


def test_restore_refuses_what_is_no_backup(tmp_path: Path) -> None:
    path = tmp_path / "not-a-store"
    path.write_bytes(b"hello" * 1000)
    result = run("store", "restore", str(path), "--state-dir", str(tmp_path / "state"))
    assert result.exit_code == Exit.INVALID, result.output
    assert not list((tmp_path / "state").rglob("store.sqlite"))
    missing = run("store", "restore", str(tmp_path / "no"), "--state-dir", str(tmp_path))
    assert missing.exit_code == Exit.NOT_FOUND


def test_tables_off_a_terminal_are_whole_and_plain(capsys: pytest.CaptureFixture[str]) -> None:
    from cli import render
    from cli.settings import Settings

    long = "x" * 500
    count = render.table(
        Settings("a", "b"), ["A", "B"], [[1, long], ["denied", "[b]not markup[/b]"]]
    )
    lines = capsys.readouterr().out.splitlines()
    assert count == 2
    assert lines == ["A        B", f"1        {long}", "denied   [b]not markup[/b]"]


@pytest.mark.parametrize("columns", [40, 100, 300])
def test_tables_on_a_terminal_cut_no_word_into_letters(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    from cli import render
    from cli.settings import Settings

    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    rows = [[f"default/deathstar-{n}", "10.217.0.2", "ready", "because of " * 20] for n in (1, 2)]
    render.table(Settings("a", "b", color=False), ["NAME", "IPv4", "STATE", "WHY"], rows)
    lines = capsys.readouterr().out.splitlines()
    for n in (1, 2):
        (row,) = [x for x in lines if f"default/deathstar-{n}   10.217.0.2   ready   be" in x]
        # The long cell is folded where that makes rows fit, and nowhere else.
        assert (len(row) <= columns) == (columns != 40)
    assert (len(lines) == 3) == (columns != 100)


def test_completion_offers_nouns_and_verbs_and_never_complains(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CILIA_AGENT_SOCK", str(tmp_path / "nobody.sock"))

    def offered(words: str, kind: str = "plain") -> list[str]:
        done = CliRunner().invoke(
            cli,
            prog_name="cilia",
            env={
                "_CILIA_COMPLETE": "bash_complete",
                "COMP_WORDS": words,
                "COMP_CWORD": str(len(words.split(" ")) - 1),
            },
        )
        assert done.stderr == ""
        found = [line.partition(",") for line in done.stdout.splitlines() if line]
        return [name for said, _, name in found if said == kind]

    def files(words: str) -> bool:
        """Whether the shell is told to offer its files."""
        return offered(words, kind="file") == [""]

    assert offered("cilia pol") == ["policy"]
    assert "regenerate" in offered("cilia endpoint ")
    assert offered("cilia endpoint get ") == []
    for words in (
        "policy apply",
        "policy validate",
        "policy lint",
        "policy whatif",
        "policy delete -f",
    ):
        assert files(f"cilia {words} "), words


def test_every_verb_is_documented() -> None:
    page = Path(__file__).resolve().parents[3] / "docs" / "cli.md"
    first_cells = [
        line.split(" | ")[0] for line in page.read_text().splitlines() if line.startswith("| `")
    ]
    groups = {path[:-1] for path in ALL}
    for path in (path for path in ALL if path not in groups):
        assert any(all(re.search(rf"\b{word}\b", cell) for word in path) for cell in first_cells), (
            f"docs/cli.md does not list `cilia {' '.join(path)}`"
        )


def test_a_lab_says_how_to_find_the_command_when_it_is_not_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After `make lab` nobody has activated the environment."""
    node = NodeState(name="n", netns="", run_dir="", ipv4="", ipv6="", bpffs="", cgroup=None)
    lab = LabState(name="a", source="a.yaml", boot_id="", nodes=(node,))
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert how_to_talk(lab)[0] == f". {sys.prefix}/bin/activate"
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/cilia")
    assert how_to_talk(lab)[0].startswith("export CILIA_AGENT_SOCK=")


SAID = re.compile(r"(?:`|^ +|^)cilia ([a-z][^`\n#|&;]*)", re.MULTILINE)


def test_commands_in_documents_are_there() -> None:
    """Their verbs and long options; not what follows `--`, or is another program's."""
    root = Path(__file__).resolve().parents[3]
    wrong = []
    for page in (root / "README.md", root / "CHANGELOG.md", *sorted((root / "docs").rglob("*.md"))):
        for text in SAID.findall(page.read_text()):
            words = re.sub(r"\$\(.*?\)", "", text).replace("\\", "").split()
            command: click.Command = cli
            while isinstance(command, click.Group) and words:
                found = command.get_command(click.Context(command), words[0].split(",")[0])
                if found is None:
                    wrong.append(f"{page.name}: cilia {text}: no {words[0]}")
                    break
                command, words = found, words[1:]
            known = {x for p in (*command.params, *cli.params) for x in p.opts} | {"--help"}
            for word in words[: words.index("--") if "--" in words else None]:
                name = word.split("=")[0].strip("[].,()")
                if name.startswith("--") and name not in known:
                    wrong.append(f"{page.name}: cilia {text}: no {name}")
    assert not wrong, "\n".join(wrong)


def test_every_option_is_documented_and_every_documented_one_is_there() -> None:
    """Those of flows that --from-, --to- and --not make are documented by these words."""
    text = (Path(__file__).resolve().parents[3] / "docs" / "cli.md").read_text()
    said = set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", text))
    known, missing = {"--help", "--not", "--from-", "--to-"}, []
    for path in ((), *ALL):
        command: click.Command = cli
        for word in path:
            assert isinstance(command, click.Group)
            found = command.get_command(click.Context(command), word)
            assert found is not None
            command = found
        for option in (x for x in command.params if isinstance(x, click.Option)):
            known |= set(option.opts) | set(option.secondary_opts)
            plain = {x for x in option.opts if not x.startswith(("--from-", "--to-", "--not-"))}
            if plain and not plain & said:
                missing.append(f"{' '.join(path)} {option.opts[-1]}")
    assert not missing, f"docs/cli.md lacks: {missing}"
    gone = {x for x in said if x.startswith("--")} - known
    assert not gone, f"docs/cli.md has what is not there: {sorted(gone)}"


def test_defaults_are_shown_once_and_plainly() -> None:
    said = " ".join(run("--help").output.split())
    assert "[default: /run/cilia/agent.sock]" in said
    assert "[default: /run/cilia/identity.sock]" in said
    assert "(/run" not in said


def test_one_document_is_one(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(POLICY)
    assert "(1 document)" in run("policy", "validate", str(tmp_path)).output
    (tmp_path / "b.yaml").write_text(POLICY.replace("rule1", "rule2"))
    assert "(2 documents)" in run("policy", "validate", str(tmp_path)).output


@pytest.mark.parametrize(
    ("args", "right"),
    [(("stauts",), "status"), (("policy", "aply"), "apply"), (("endpoint", "lst"), "list")],
)
def test_misspelt_verbs_are_recognised(args: tuple[str, ...], right: str) -> None:
    assert f"Did you mean '{right}'?" in run(*args).stderr


def command(*args: str, reader: str = "cat") -> subprocess.CompletedProcess[str]:
    """The program as a shell runs it; `reader` gets its output."""
    line = shlex.join([sys.executable, "-m", "cli", *args])
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{line} | {reader}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize(
    "args",
    [
        ("-o", "json", "stauts"),
        ("policy", "delete", "-o", "json"),
        ("monitor", "-ojson", "-n", "0"),
        ("xds", "resources", "--type", "FOO", "--output=json"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_json_where_json_was_asked_for(args: tuple[str, ...]) -> None:
    done = command(*args)
    assert done.returncode == Exit.USAGE
    error = json.loads(done.stderr)["error"]
    assert (error["code"], error["exit"]) == ("usage", 2)
    assert "--help" in error["hint"]


def test_a_reader_that_goes_away_is_no_failure() -> None:
    for args in (("policy", "schema", "--format", "crd"), ("--help",)):
        done = command(*args, reader="head -1")
        assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_ends_with_130_and_no_traceback() -> None:
    """Early, while modules are imported, and later, in the midst of a call."""
    for said in ("import", "reading"):
        words = [sys.executable, "-X", "importtime", "-m", "cli", "policy", "validate", "-"]
        if said == "reading":
            words[1:3] = []
        with subprocess.Popen(
            words, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None
            if said == "import":
                while "click" not in process.stderr.readline():
                    pass
            else:
                wait_for_read(process.pid)
            process.send_signal(signal.SIGINT)
            told = process.stderr.read()
            code = process.wait(timeout=20)
        assert "Traceback" not in told, told
        assert code == (-signal.SIGINT if said == "import" else 130)


def wait_for_read(pid: int) -> None:
    """Until a process waits for its standard input."""
    deadline = time.monotonic() + 20
    while "pipe_read" not in Path(f"/proc/{pid}/wchan").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (("identity", "get", "foo"), "cilia identity list"),
        (("endpoint", "config", "web", "PolicyAudit"), "PolicyAudit=Enabled"),
    ],
)
def test_wrong_words_are_answered_with_right_ones(args: tuple[str, ...], hint: str) -> None:
    result = run(*args)
    assert result.exit_code == Exit.INVALID
    assert hint in result.output.splitlines()[-1]


def test_a_document_too_long_to_store_is_named_with_its_size_and_the_cure(tmp_path: Path) -> None:
    path = tmp_path / "long.yaml"
    notes = ", ".join(f"note-{n}: {'x' * 250_000}" for n in range(6))
    path.write_text(POLICY.replace("{name: rule1}", f"{{name: rule1, annotations: {{{notes}}}}}"))
    result = run("policy", "validate", str(path))
    assert result.exit_code == Exit.INVALID
    assert re.search(
        rf"{path}:1:1: the document is \d{{7}} bytes long as stored, 1310720 are allowed: "
        "spread its rules over several documents",
        result.output,
    )
