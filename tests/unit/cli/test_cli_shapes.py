"""Messages as documented JSON, and events as lines."""

from __future__ import annotations

from typing import Any

from cli import monitor, shapes
from cli.status import ago, first_trouble
from protos.agent.v1 import agent_pb2
from protos.common.v1 import common_pb2

NS = 1_000_000_000


def _label(source: str, key: str, value: str = "") -> common_pb2.Label:
    return common_pb2.Label(source=source, key=key, value=value)


def _peer(address: str, port: int, identity: int, org: str) -> agent_pb2.Peer:
    return agent_pb2.Peer(
        address=address,
        port=port,
        identity=identity,
        labels=[
            _label("k8s", "io.kubernetes.pod.namespace", "default"),
            _label("k8s", "org", org),
        ],
    )


def _drop(**changes: Any) -> agent_pb2.MonitorEvent:
    event = agent_pb2.MonitorEvent(
        time_ns=1_700_000_000 * NS + 123_456_789,
        type="drop",
        verdict="DENIED",
        direction="ingress",
        reason="Policy denied",
        reason_code=133,
        source=_peer("10.217.0.7", 40112, 300, "alliance"),
        destination=_peer("10.217.0.5", 80, 301, "empire"),
        protocol="TCP",
        tcp_flags="SYN",
        ep_id=5,
        default_deny=[
            agent_pb2.RuleRef(
                rule_id=9,
                policy="CiliumNetworkPolicy default/rule1",
                path="spec.ingress",
                origin=common_pb2.Origin(source="l3.yaml", line=12, column=5),
            )
        ],
    )
    for name, value in changes.items():
        setattr(event, name, value)
    return event


def _text(event: agent_pb2.MonitorEvent) -> str:
    parts = monitor.event_line(shapes.event(event))
    return "".join(part if isinstance(part, str) else part[0] for part in parts)


def test_drop_line_says_who_what_and_why() -> None:
    assert _text(_drop()) == (
        "xx drop (Policy denied) 10.217.0.7:40112 -> 10.217.0.5:80 tcp SYN "
        "identity 300(org=alliance)->301(org=empire) endpoint 5 ingress: "
        "isolated by CiliumNetworkPolicy default/rule1 spec.ingress (l3.yaml:12:5)"
    )


def test_explanation_is_not_said_twice() -> None:
    text = _text(_drop(explanation="isolated by CiliumNetworkPolicy default/rule1 (l3.yaml:12:5)"))
    assert text.count("default/rule1") == 1
    assert text.count("l3.yaml") == 1


def test_place_is_added_to_an_explanation_without_one() -> None:
    text = _text(_drop(explanation="isolated by CiliumNetworkPolicy default/rule1"))
    assert text.endswith("at l3.yaml:12:5")


def test_event_shape_has_identities_rule_and_place() -> None:
    shape = shapes.event(_drop())
    assert shape["time"] == "2023-11-14T22:13:20.123456Z"
    assert shape["source"]["identity"] == 300
    assert shape["destination"]["identity"] == 301
    assert shape["rule"] is None
    assert shape["default_deny"] == [
        {
            "id": 9,
            "name": "CiliumNetworkPolicy default/rule1",
            "path": "spec.ingress",
            "file": "l3.yaml",
            "line": 12,
            "column": 5,
        }
    ]
    assert shape["icmp"] is None


def test_ipv6_addresses_are_bracketed_with_a_port() -> None:
    event = _drop()
    event.source.address = "fd00::1"
    assert "[fd00::1]:40112 ->" in _text(event)


def test_icmp_has_type_and_no_port() -> None:
    event = _drop(protocol="ICMPv6", icmp_type=128, tcp_flags="")
    event.source.port = event.destination.port = 0
    shape = shapes.event(event)
    assert shape["icmp"] == {"type": 128, "code": 0}
    assert shape["source"]["port"] is None
    assert "10.217.0.7 -> 10.217.0.5 icmpv6 type 128 identity" in _text(event)


def test_lost_and_agent_events_are_short() -> None:
    lost = agent_pb2.MonitorEvent(type="lost", lost=7, time_ns=NS)
    assert shapes.event(lost) == {"time": "1970-01-01T00:00:01.000000Z", "type": "lost", "lost": 7}
    note = agent_pb2.MonitorEvent(
        type="agent", notification=agent_pb2.Notification(subtype=3, json='{"a": 1}')
    )
    assert shapes.event(note)["notification"] == {"a": 1}
    broken = agent_pb2.MonitorEvent(
        type="agent", notification=agent_pb2.Notification(json="not json")
    )
    assert shapes.event(broken)["notification"] == "not json"


def test_never_is_null_and_labels_without_value_have_no_equals() -> None:
    assert shapes.time_text(0) is None
    assert shapes.label_text(_label("reserved", "world")) == "reserved:world"
    assert shapes.label_text(_label("k8s", "app", "web")) == "k8s:app=web"


def test_ago() -> None:
    now = 1_000_000 * NS
    assert ago(0, now) == "never"
    assert [ago(now - s * NS, now) for s in (0, 59, 60, 7200, 90_000)] == [
        "0s ago",
        "59s ago",
        "1m ago",
        "2h ago",
        "1d ago",
    ]
    assert ago(now + 5 * NS, now) == "0s ago"  # clocks


def test_first_trouble_prefers_components_then_controllers() -> None:
    reply = agent_pb2.StatusResponse(
        state="Warning",
        message="whole",
        components=[
            agent_pb2.Component(name="kernel", state="Ok"),
            agent_pb2.Component(name="identity", state="Failure", message="away"),
        ],
        controllers=[
            agent_pb2.Controller(name="resync", consecutive_failures=2, last_error="full")
        ],
    )
    assert first_trouble(reply) == "error in identity: away"
    del reply.components[:]
    assert first_trouble(reply) == "error in controller resync: full"
    del reply.controllers[:]
    assert first_trouble(reply) == "error in agent: whole"
