"""Whatever a stranger sends is a value of the domain or a refusal that names the field."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given, settings
from hypothesis import strategies as st

from cilia.errors import Origin
from cilia.kv import KeyValue
from protos.common.v1 import common_pb2
from protos.identity.v1 import identity_pb2 as pb
from services.identity import convert
from services.identity.keys import Kind, ip_key, policy_key, policy_name_of
from services.identity.records import InvalidRequestField, IpEntry, Policy, PolicyName
from services.identity.view import Change

text = st.text(max_size=30)
labels = st.builds(common_pb2.Label, source=text, key=text, value=text)
u32 = st.integers(0, 2**32 - 1)
origins = st.builds(common_pb2.Origin, source=text, line=u32, column=u32)
kinds = st.one_of(st.sampled_from(convert.POLICY_KINDS), text)
ip_entries = st.builds(
    pb.IpEntry,
    prefix=st.one_of(text, st.ip_addresses().map(str), st.just("10.0.0.0/8")),
    identity=st.one_of(u32, st.integers(1, 70_000)),
    node=st.one_of(text, st.just("n")),
    host_ip=st.one_of(st.just(""), text, st.ip_addresses().map(str)),
    namespace=text,
    workload=text,
)
documents = st.one_of(
    st.binary(max_size=40),
    st.recursive(st.none() | st.integers() | text, st.lists).map(lambda v: json.dumps(v).encode()),
    st.just(b"{}"),
    st.just(b"[" * 5000 + b"]" * 5000),
    st.just(b'"\xff"'),
)
policies = st.builds(
    pb.Policy,
    kind=kinds,
    namespace=st.one_of(text, st.just("default")),
    name=text,
    document=documents,
    origin=origins,
    rule_origins=st.lists(st.builds(pb.RuleOrigin, path=text, origin=origins), max_size=2),
)
requests: st.SearchStrategy[tuple[Callable[[Any], Any], Any]] = st.one_of(
    st.tuples(st.just(convert.labels), st.lists(labels, max_size=4)),
    st.tuples(st.just(convert.required_labels), st.lists(labels, max_size=4)),
    st.tuples(st.just(convert.node), text),
    st.tuples(st.just(convert.identity_number), u32),
    st.tuples(st.just(convert.kinds), st.lists(st.integers(-1, 5), max_size=20)),
    st.tuples(st.just(convert.resume_revision), st.integers(-(2**63), 2**63 - 1)),
    st.tuples(st.just(convert.policies), st.lists(policies, max_size=3)),
    st.tuples(
        st.just(convert.policy_names),
        st.lists(st.builds(pb.PolicyName, kind=kinds, namespace=text, name=text), max_size=3),
    ),
    st.tuples(
        st.just(convert.announcement),
        st.builds(
            pb.AnnounceRequest,
            node=st.one_of(text, st.just("n")),
            put=st.lists(ip_entries, max_size=3),
            withdraw=st.lists(st.one_of(text, st.ip_addresses().map(str)), max_size=3),
        ),
    ),
)


@settings(max_examples=500)
@given(requests)
def test_everything_is_taken_or_refused_by_field(
    request: tuple[Callable[[Any], Any], Any],
) -> None:
    check, value = request
    refusal = None
    try:
        check(value)
    except InvalidRequestField as error:
        refusal = error
    if refusal is not None:
        assert refusal.faults
        assert all((fault.document or fault.path) and fault.message for fault in refusal.faults)


@settings(max_examples=300)
@given(st.lists(labels, max_size=3), st.lists(labels, max_size=3))
def test_different_labels_never_share_a_canonical_form(
    one: list[common_pb2.Label], two: list[common_pb2.Label]
) -> None:
    try:
        first, second = convert.labels(one), convert.labels(two)
    except InvalidRequestField:
        return
    assert (first == second) == (first.canonical() == second.canonical())


@pytest.mark.parametrize(
    ("request_", "path"),
    [
        (pb.AnnounceRequest(), "node"),
        (pb.AnnounceRequest(node="-n"), "node"),
        (pb.AnnounceRequest(node="n/1"), "node"),
        (pb.AnnounceRequest(node="n" * 254), "node"),
        (pb.AnnounceRequest(node="n", put=[pb.IpEntry(identity=1)]), "put[0].prefix"),
        (
            pb.AnnounceRequest(node="n", put=[pb.IpEntry(prefix="10.0.0.1/8", identity=1)]),
            "put[0].prefix",
        ),
        (
            pb.AnnounceRequest(node="n", put=[pb.IpEntry(prefix="fe80::1%eth0", identity=1)]),
            "put[0].prefix",
        ),
        (pb.AnnounceRequest(node="n", put=[pb.IpEntry(prefix="::1")]), "put[0].identity"),
        (
            pb.AnnounceRequest(node="n", put=[pb.IpEntry(prefix="::1", identity=1 << 24 | 5)]),
            "put[0].identity",
        ),
        (
            pb.AnnounceRequest(node="n", put=[pb.IpEntry(prefix="::1", identity=1, node="m")]),
            "put[0].node",
        ),
        (
            pb.AnnounceRequest(
                node="n", put=[pb.IpEntry(prefix=p, identity=1) for p in ("::1", "0::1/128")]
            ),
            "put[1].prefix",
        ),
        (pb.AnnounceRequest(node="n", withdraw=["10.0.0.0/33"]), "withdraw[0]"),
        (
            pb.AnnounceRequest(
                node="n", withdraw=["::1"], put=[pb.IpEntry(prefix="::1", identity=1)]
            ),
            "withdraw[0]",
        ),
        (pb.AnnounceRequest(node="n", withdraw=["::1"] * 5000), "put"),
    ],
)
def test_faults_of_announcements_name_the_field(request_: pb.AnnounceRequest, path: str) -> None:
    with pytest.raises(InvalidRequestField) as caught:
        convert.announcement(request_)
    assert [fault.path for fault in caught.value.faults] == [path]


def test_ambiguous_and_oversized_labels_are_refused() -> None:
    def label(key: str, value: str = "", source: str = "k8s") -> common_pb2.Label:
        return common_pb2.Label(source=source, key=key, value=value)

    for bad in (
        [label("a", "x;k8s:b=y")],
        [label("a=b", "c")],
        [label("")],
        [label("a", source="")],
        [label("a", source="k8s:x")],
        [label("a", "1"), label("a", "2")],
        [label("a" * 400)],
        [label("a", "\n")],
        [label(f"k{n}") for n in range(300)],
    ):
        with pytest.raises(InvalidRequestField) as caught:
            convert.labels(bad)
        assert caught.value.faults[0].path.startswith("labels")


def _policy(number: int, *, origins: int = 0, size: int = 0) -> pb.Policy:
    return pb.Policy(
        kind="CiliumNetworkPolicy",
        namespace="d",
        name=f"p{number}",
        document=json.dumps({"x": "y" * size}).encode(),
        rule_origins=[pb.RuleOrigin(path=f"spec.ingress[{i}]") for i in range(origins)],
    )


@pytest.mark.parametrize(
    ("policies", "document", "message"),
    [
        ([_policy(i) for i in range(129)], "d/p128", "129 documents at once are more than the 128"),
        ([_policy(1), _policy(2, origins=16_385)], "d/p2", "16385 rules and entries"),
        ([_policy(1), _policy(2, size=1_400_000)], "d/p2", "1400009 bytes long"),
        ([_policy(i, size=500_000 + i) for i in range(4)], "d/p3", "the largest"),
        ([_policy(1), _policy(1)], "d/p1", "given twice"),
    ],
)
def test_what_is_too_much_names_the_document(
    policies: list[pb.Policy], document: str, message: str
) -> None:
    with pytest.raises(InvalidRequestField) as caught:
        convert.policies(policies)
    (fault,) = caught.value.faults
    assert fault.document == f"CiliumNetworkPolicy {document}"
    assert message in fault.message
    assert str(caught.value).startswith(f"CiliumNetworkPolicy {document}: ")


def test_a_policy_survives_the_store_and_the_wire() -> None:
    name = PolicyName(kind="Rules", namespace="", name="a/b %2F_ü")
    policy = Policy(
        name=name,
        document='{"x": "ü"}'.encode(),
        origin=Origin("f.yaml", 3, 4),
        rule_origins=(
            ("spec.ingress[0]", Origin("f.yaml", 5, 6)),
            ("spec.egress[0]", Origin("g.yaml", 7, 8)),
        ),
    )
    assert Policy.decode(name, policy.encode()) == policy
    proto = convert.policy_to_proto(policy, 9)
    assert proto.revision == 9
    assert convert.policies([proto]) == [policy]
    key = policy_key(name.kind, name.namespace, name.name)
    assert policy_name_of(key) == (name.kind, name.namespace, name.name)
    event = convert.event_to_proto(Change(Kind.POLICY, KeyValue(key, policy.encode(), 1, 9, 1)))
    assert event.policy == proto
    deleted = convert.event_to_proto(Change(Kind.POLICY, KeyValue(key, b"", 0, 10, 0)))
    assert (deleted.type, deleted.policy) == (
        pb.Event.DELETE,
        pb.Policy(kind=name.kind, name=name.name),
    )


def test_an_address_survives_the_store_and_the_wire() -> None:
    entry = IpEntry(
        prefix="10.1.2.3/32",
        identity=300,
        node="n",
        host_ip="192.0.2.1",
        namespace="default",
        workload="web-0",
    )
    key = ip_key(entry.prefix)
    event = convert.event_to_proto(Change(Kind.IP, KeyValue(key, entry.to_json(), 1, 2, 1)))
    assert convert.ip_entry(event.ip, "put[0]", "n") == entry
    deleted = convert.event_to_proto(Change(Kind.IP, KeyValue(key, b"", 0, 3, 0)))
    assert deleted.ip == pb.IpEntry(prefix="10.1.2.3/32")


@settings(max_examples=200)
@given(st.binary(max_size=80))
def test_bytes_that_parse_as_a_request_are_checked_too(data: bytes) -> None:
    checks: list[tuple[Message, Callable[[Any], Any]]] = [
        (pb.AnnounceRequest(), convert.announcement),
        (pb.ApplyPoliciesRequest(), lambda m: convert.policies(m.policies)),
        (pb.AllocateRequest(), lambda m: convert.labels(m.labels)),
    ]
    for message, check in checks:
        with contextlib.suppress(InvalidRequestField, DecodeError):
            message.ParseFromString(data)
            check(message)
