"""States of an endpoint, its options, its record on disk."""

from __future__ import annotations

import json
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest

from cilia.identity import EndpointID, NumericIdentity
from cilia.labels import Labels
from services.agent.endpoint import (
    STATUS_LOG_ENTRIES,
    Endpoint,
    EndpointExists,
    EndpointInvalid,
    EndpointNotFound,
    EndpointOptions,
    EndpointState,
    check_port_names,
    may_move,
)
from services.agent.endpointtable import Endpoints
from services.agent.record import EndpointRecords

S = EndpointState


def endpoint(number: int = 1, name: str = "a", **changes: object) -> Endpoint:
    values: dict[str, object] = {
        "id": EndpointID(number),
        "name": name,
        "namespace": "default",
        "labels": Labels.parse(["app=a"]),
        "identity_labels": Labels.parse(["app=a", "k8s:io.kubernetes.pod.namespace=default"]),
        "identity": NumericIdentity(300),
        "netns": f"/run/netns/{name}",
        "netns_inode": number,
        "interface": "eth0",
        "host_interface": f"cil{number:05d}",
        "ifindex": 40 + number,
        "ipv4": IPv4Address("10.217.0.1") + number,
        "ipv6": IPv6Address("fd00::1") + number,
        "mac": bytes(range(6)),
        "node_mac": bytes(range(6, 12)),
        "state": S.CREATING,
    }
    return Endpoint(**(values | changes))  # type: ignore[arg-type]  # keywords of a test


@pytest.mark.parametrize(
    ("old", "new", "builder", "allowed"),
    [
        (S.NONE, S.WAITING_FOR_IDENTITY, False, True),
        (S.CREATING, S.WAITING_FOR_IDENTITY, False, True),
        (S.CREATING, S.READY, False, False),
        (S.WAITING_FOR_IDENTITY, S.READY, False, True),
        (S.WAITING_FOR_IDENTITY, S.WAITING_TO_REGENERATE, False, False),
        (S.READY, S.WAITING_TO_REGENERATE, False, True),
        (S.READY, S.REGENERATING, True, False),
        (S.WAITING_TO_REGENERATE, S.REGENERATING, False, False),
        (S.WAITING_TO_REGENERATE, S.REGENERATING, True, True),
        (S.RESTORING, S.REGENERATING, True, True),
        (S.REGENERATING, S.READY, True, True),
        (S.REGENERATING, S.READY, False, False),
        (S.DISCONNECTING, S.READY, True, False),
        (S.DISCONNECTING, S.DISCONNECTED, False, True),
        (S.DISCONNECTED, S.READY, True, False),
    ],
)
def test_edges(old: S, new: S, builder: bool, allowed: bool) -> None:
    assert may_move(old, new, builder=builder) is allowed


def test_an_impossible_move_is_logged_and_skipped() -> None:
    endpoints = Endpoints()
    endpoints.insert(endpoint(), "made")
    assert not endpoints.move(EndpointID(1), S.READY, "hurry")
    assert endpoints.get(EndpointID(1)).state is S.CREATING
    last = endpoints.log_of(EndpointID(1)).newest_first()[0]
    assert last.code == "Warning"
    assert last.message == "Skipped invalid state transition to ready due to: hurry"


def test_log_is_bounded_and_newest_first() -> None:
    endpoints = Endpoints()
    endpoints.insert(endpoint(), "made")
    for number in range(STATUS_LOG_ENTRIES + 10):
        endpoints.note(EndpointID(1), "OK", str(number))
    entries = endpoints.log_of(EndpointID(1)).newest_first()
    assert len(entries) == STATUS_LOG_ENTRIES
    assert entries[0].message == str(STATUS_LOG_ENTRIES + 9)


def test_ready_with_a_message_is_shown_as_not_ready() -> None:
    assert endpoint(state=S.READY).shown_state == "ready"
    assert endpoint(state=S.READY, message="policy does not fit").shown_state == "not-ready"
    assert endpoint(state=S.REGENERATING, message="x").shown_state == "regenerating"


def test_names_and_wires_are_unique() -> None:
    endpoints = Endpoints()
    endpoints.insert(endpoint(1, "a"), "made")
    with pytest.raises(EndpointExists, match="default/a"):
        endpoints.insert(endpoint(2, "a"), "made")
    with pytest.raises(EndpointExists, match="eth0"):
        endpoints.insert(endpoint(2, "b", netns_inode=1), "made")
    endpoints.insert(endpoint(2, "b"), "made")
    endpoints.remove(EndpointID(1))
    endpoints.insert(endpoint(1, "a"), "made again")


def test_finding() -> None:
    endpoints = Endpoints()
    endpoints.insert(endpoint(1, "a"), "made")
    for found in (
        endpoints.find(number=1),
        endpoints.find(name="a"),
        endpoints.find(name="default/a"),
        endpoints.find(address="10.217.0.2"),
        endpoints.find(address="fd00::2"),
    ):
        assert found.id == 1
    for wanted in ({"number": 2}, {"name": "b"}, {"address": "10.0.0.1"}, {"address": "x"}, {}):
        with pytest.raises(EndpointNotFound):
            endpoints.find(**wanted)


def test_options() -> None:
    options = EndpointOptions()
    assert options.merged({"PolicyEnforcement": "always"}).enforcement == "always"
    assert options.merged({"PolicyAudit": "on"}).audit is True
    assert options.merged({"PolicyAudit": "Disabled"}).audit is False
    assert EndpointOptions("never", True).merged({"PolicyEnforcement": "node"}).enforcement is None
    for bad in ({"PolicyEnforcement": "sometimes"}, {"PolicyAudit": "2"}, {"Debug": "on"}):
        with pytest.raises(EndpointInvalid):
            options.merged(bad)


def test_visibility() -> None:
    options = EndpointOptions().merged({"visibility": "<ingress/80/any/http>"})
    assert options.visibility == "<Ingress/80/TCP/HTTP>"
    assert options.as_text(mode="default", audit=False)["Visibility"] == "<Ingress/80/TCP/HTTP>"
    assert options.merged({"PolicyAudit": "on"}).visibility == options.visibility
    assert options.merged({"Visibility": "none"}) == EndpointOptions()
    assert EndpointOptions().as_text(mode="default", audit=False)["Visibility"] == "none"
    assert EndpointOptions.of_annotations({}) == EndpointOptions()
    key = "io.cilium.proxy-visibility"
    assert EndpointOptions.of_annotations({key: "<Ingress/80/ANY/HTTP>"}) == options
    with pytest.raises(EndpointInvalid, match=f"{key}: .*a port is 1 to 65535") as caught:
        EndpointOptions.of_annotations({key: "<Ingress/0/TCP/HTTP>"})
    assert "<Ingress/80/TCP/HTTP>" in caught.value.cure
    with pytest.raises(EndpointInvalid, match="annotation x means nothing here"):
        EndpointOptions.of_annotations({"x": "y"})


@pytest.mark.parametrize(
    "ports",
    [
        [("HTTP", 80, 6)],
        [("-http", 80, 6)],
        [("80", 80, 6)],
        [("a--b", 80, 6)],
        [("sixteen-letters-", 80, 6)],
        [("", 80, 6)],
        [("http", 0, 6)],
        [("http", 65536, 6)],
        [("http", 80, 1)],
        [("http", 80, 6), ("http", 81, 6)],
        [(f"p{n}", 80, 6) for n in range(257)],
    ],
)
def test_port_names_that_are_none(ports: list[tuple[str, int, int]]) -> None:
    with pytest.raises(EndpointInvalid):
        check_port_names(tuple(ports))
    check_port_names((("http", 80, 6), ("8a", 1, 17), ("a-b-c", 65535, 132)))


def test_records_of_before_there_were_port_names(tmp_path: Path) -> None:
    records = EndpointRecords(tmp_path)
    records.prepare()
    records.save(endpoint())
    content = json.loads((tmp_path / "1.json").read_text())
    del content["ports"]
    (tmp_path / "1.json").write_text(json.dumps(content))
    ((restored, _),) = records.load()
    assert restored.ports == ()
    assert records.damaged == []


def test_record_round_trip_and_a_damaged_one_is_kept_aside(tmp_path: Path) -> None:
    records = EndpointRecords(tmp_path)
    records.prepare()
    saved = endpoint(options=EndpointOptions("always", True), ports=(("http", 80, 6),))
    records.save(saved)
    records.save(endpoint(2, "b"), creating=True)
    (tmp_path / "3.json").write_text('{"version": 1, "id": ')
    (tmp_path / "4.json").write_text(json.dumps({"version": 99}))
    found = {e.name: (e, creating) for e, creating in records.load()}
    assert set(found) == {"a", "b"}
    assert found["b"][1]
    restored, creating = found["a"]
    assert not creating
    assert restored.state is S.RESTORING
    kept = ("ports", "labels", "identity_labels", "identity", "ipv4", "ipv6", "mac", "options")
    for name in kept:
        assert getattr(restored, name) == getattr(saved, name)
    assert len(records.damaged) == 2
    assert (tmp_path / "3.json.damaged-1").exists()
