"""`cilia flows`: options become Hubble's filters, and flows become lines."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner
from google.protobuf import json_format

from cli import flows_show
from cli.errors import CliError
from cli.flows_filter import fold_not
from cli.flows_server import parse_time
from cli.root import cli
from protos.hubble.v1 import flow_pb2, observer_pb2


def filters(*args: str) -> dict[str, Any]:
    result = CliRunner().invoke(
        cli, ["flows", "observe", *args, "--print-raw-filters"], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    shape: dict[str, Any] = json.loads(result.output)
    return shape


def fails(*args: str) -> str:
    result = CliRunner().invoke(cli, ["flows", "observe", *args, "--print-raw-filters"])
    assert result.exit_code != 0
    return result.output


@pytest.mark.parametrize(
    ("args", "allow"),
    [
        ([], []),
        (["--pod", "team-3/svc-3"],
         [{"source_pod": ["team-3/svc-3"]}, {"destination_pod": ["team-3/svc-3"]}]),
        (["-n", "team-5", "--to-port", "443"],
         [{"source_pod": ["team-5/"], "destination_port": ["443"]},
          {"destination_pod": ["team-5/"], "destination_port": ["443"]}]),
        (["-n", "a", "--pod", "b"], [{"source_pod": ["a/b"]}, {"destination_pod": ["a/b"]}]),
        (["--from-pod", "a/b", "--to-label", "app=web"],
         [{"source_pod": ["a/b"], "destination_label": ["app=web"]}]),
        (["--type", "trace:to-endpoint", "--protocol", "udp"],
         [{"event_type": [{"type": 4, "match_sub_type": True}], "protocol": ["udp"]}]),
        (["--verdict", "dropped", "--verdict", "AUDIT"], [{"verdict": ["DROPPED", "AUDIT"]}]),
        (["--tcp-flags", "syn,ack"], [{"tcp_flags": [{"SYN": True, "ACK": True}]}]),
        (["--identity", "world", "--reply", "true"],
         [{"source_identity": [2], "reply": [True]},
          {"destination_identity": [2], "reply": [True]}]),
        (["--drop-reason-desc", "policy-denied", "--ip-version", "6"],
         [{"drop_reason_desc": ["POLICY_DENIED"], "ip_version": ["IPv6"]}]),
        (["--http-header", "x-a: b", "--workload", "Deployment/web"],
         [{"http_header": [{"key": "x-a", "value": "b"}],
           "source_workload": [{"name": "web", "kind": "Deployment"}]},
          {"http_header": [{"key": "x-a", "value": "b"}],
           "destination_workload": [{"name": "web", "kind": "Deployment"}]}]),
        (["--cel-expression", "_flow.verdict == 2"],
         [{"experimental": {"cel_expression": ["_flow.verdict == 2"]}}]),
    ],
)  # fmt: skip
def test_filters(args: list[str], allow: list[dict[str, Any]]) -> None:
    assert filters(*args) == {"allowlist": allow, "denylist": []}


def test_all_that_is_negated_is_one_filter() -> None:
    found = filters("--not", "--verdict", "FORWARDED", "--not", "--to-port=53", "--port", "80")
    assert found == {
        "allowlist": [{"source_port": ["80"]}, {"destination_port": ["80"]}],
        "denylist": [{"verdict": ["FORWARDED"], "destination_port": ["53"]}],
    }
    assert filters("--not", "-n", "a")["denylist"] == [
        {"source_pod": ["a/"]}, {"destination_pod": ["a/"]},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--verdict", "GONE"], "--verdict GONE: one of FORWARDED"),
        (["--type", "trace:nowhere"], "trace points are"),
        (["--identity", "x"], "a number, or one of host"),
        (["--http-header", "x"], "NAME:VALUE"),
        (["--first", "1", "--last", "2"], "choose one of"),
        (["--first", "1", "-f"], "exclude one another"),
        (["--since", "yesterday"], "yesterday is no time"),
        (["--field-mask", "time", "-o", "dict"], "--field-mask needs -o json"),
    ],
)
def test_mistakes_are_named(args: list[str], message: str) -> None:
    assert message in fails(*args)


def test_not_needs_a_filter() -> None:
    with pytest.raises(CliError, match="only a filter can be negated"):
        fold_not(["--not", "--follow"])
    with pytest.raises(CliError, match="needs a filter behind it"):
        fold_not(["--not"])


def test_times() -> None:
    now = 1_700_000_000_000_000_000
    assert parse_time("1h30m", now).ToNanoseconds() == now - 5400 * 10**9
    assert parse_time("250ms", now).ToNanoseconds() == now - 250 * 10**6
    assert parse_time("2023-11-14T22:13:20Z", 0).ToNanoseconds() == now
    assert parse_time("2023-11-14", 0).ToJsonString() == "2023-11-14T00:00:00Z"


DENIED = {
    "time": "2026-01-02T03:04:05.678901234Z",
    "node_name": "default/n1",
    "flow": {
        "verdict": "DROPPED",
        "drop_reason_desc": "POLICY_DENIED",
        "IP": {"source": "10.0.0.1", "destination": "10.0.0.2", "ipVersion": "IPv4"},
        "l4": {"TCP": {"source_port": 40112, "destination_port": 80, "flags": {"SYN": True}}},
        "source": {"identity": 31234, "namespace": "lab", "pod_name": "xwing"},
        "destination": {"identity": 5123, "namespace": "lab", "pod_name": "deathstar"},
        "event_type": {"type": 5},
        "traffic_direction": "INGRESS",
        "is_reply": False,
        "Summary": "TCP Flags: SYN",
        "ingress_denied_by": [
            {
                "name": "rule1",
                "namespace": "lab",
                "kind": "CiliumNetworkPolicy",
                "labels": ["cilia:rule=spec.ingress[0]", "cilia:origin=l3-l4.yaml:12"],
            }
        ],
    },
}


def response(**changes: Any) -> observer_pb2.GetFlowsResponse:
    shape = DENIED | {"flow": DENIED["flow"] | changes}  # type: ignore[operator]
    return json_format.ParseDict(shape, observer_pb2.GetFlowsResponse())


def line(**changes: Any) -> str:
    parts = flows_show.compact(response(**changes), "short")
    return "".join(part if isinstance(part, str) else part[0] for part in parts)


def test_a_denied_flow_as_a_line() -> None:
    assert line() == (
        "Jan  2 03:04:05.678: lab/xwing:40112 (ID:31234) -> lab/deathstar:80 (ID:5123) "
        "policy-verdict:none INGRESS DENIED DROPPED (TCP Flags: SYN) "
        "ingress denied by CiliumNetworkPolicy lab/rule1 spec.ingress[0] (l3-l4.yaml:12)"
    )


def test_other_flows_as_lines() -> None:
    drop = line(event_type={"type": 1, "sub_type": 133}, ingress_denied_by=[])
    assert " Policy denied DROPPED (TCP Flags: SYN)" in drop
    reply = line(
        event_type={"type": 4}, verdict="FORWARDED", is_reply=True, ingress_denied_by=[],
        source={"identity": 2},
    )  # fmt: skip
    assert "lab/deathstar:80 (ID:5123) <- 10.0.0.1:40112 (world) to-endpoint FORWARDED" in reply
    unknown = line(is_reply=None)
    assert " <> " in unknown
    http = line(
        event_type={"type": 129},
        l7={"type": "REQUEST", "http": {"method": "PUT", "url": "http://d/v1"}},
        Summary="HTTP/1.1 PUT http://d/v1",
    )
    assert " http-request DROPPED (HTTP/1.1 PUT http://d/v1)" in http


def test_blocks_and_times() -> None:
    block = flows_show.dictionary(response(), "rfc3339nano")
    assert "  TIMESTAMP: 2026-01-02T03:04:05.678901234Z" in block
    assert "       NODE: default/n1" in block
    assert flows_show.stamp(response().time, "unix") == "1767323045.678901234"
    lost = flow_pb2.LostEvent(source=flow_pb2.HUBBLE_RING_BUFFER, num_events_lost=17)
    assert flows_show.lost(lost) == "EVENTS LOST: HUBBLE_RING_BUFFER 17"
