"""What lint claims is so: an entry called superfluous may go, and nobody's verdict changes."""

from __future__ import annotations

import copy
import json
import os
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cilia.identity import cidr_labels, reserved_labels
from cilia.labels import Labels
from cilia.policy import PolicyEngine, parse_documents
from cilia.policy.lint import lint

EXAMPLES = int(os.environ.get("CILIA_PROPERTY_EXAMPLES", "100"))

ENDPOINTS = [
    Labels.parse([f"k8s:app={app}", *([f"k8s:env={env}"] if env else [])])
    for app in ("a", "b")
    for env in ("p", "q", "")
]
PEERS = [
    *ENDPOINTS,
    reserved_labels(1),
    reserved_labels(9),
    reserved_labels(10),
    *(cidr_labels(x) for x in ("10.1.2.3/32", "10.1.0.0/16", "192.0.2.1/32", "2001:db8::1/128")),
]
PROBES = [(6, 80), (6, 81), (6, 443), (17, 80), (132, 80), (1, 8)]

selectors = st.sampled_from(
    [
        {},
        {"matchLabels": {"app": "a"}},
        {"matchLabels": {"app": "a", "env": "p"}},
        {"matchLabels": {"env": "p"}},
        {"matchExpressions": [{"key": "env", "operator": "NotIn", "values": ["p"]}]},
        {"matchExpressions": [{"key": "app", "operator": "In", "values": ["a", "b"]}]},
        {"matchExpressions": [{"key": "env", "operator": "DoesNotExist"}]},
        {
            "matchLabels": {"env": "p"},
            "matchExpressions": [{"key": "env", "operator": "NotIn", "values": ["p"]}],
        },
    ]
)
cidrs = st.sampled_from(
    [
        {"cidr": "10.0.0.0/8"},
        {"cidr": "10.1.0.0/16"},
        {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]},
        {"cidr": "0.0.0.0/0"},
        {"cidr": "2001:db8::/32"},
    ]
)
entities = st.sampled_from(["world", "world-ipv4", "all", "host", "none"])
ports = st.lists(
    st.sampled_from(
        [
            {"port": "80", "protocol": "TCP"},
            {"port": "80"},
            {"port": "0", "protocol": "TCP"},
            {"port": "70", "endPort": 90, "protocol": "TCP"},
            {"port": "443", "protocol": "TCP"},
        ]
    ),
    max_size=2,
)


@st.composite
def element(draw: st.DrawFn) -> dict[str, Any]:
    found: dict[str, Any] = draw(
        st.one_of(
            st.just({}),
            st.fixed_dictionaries({"fromEndpoints": st.lists(selectors, max_size=2)}),
            st.fixed_dictionaries({"fromCIDRSet": st.lists(cidrs, max_size=2)}),
            st.fixed_dictionaries({"fromEntities": st.lists(entities, max_size=2)}),
        )
    )
    if draw(st.sampled_from([True, False])):
        found["toPorts"] = [{"ports": x} for x in draw(st.lists(ports, min_size=1, max_size=2))]
    if draw(st.integers(0, 9)) == 0:
        found["fromRequires"] = [draw(selectors)]
    return found


rules = st.lists(
    st.fixed_dictionaries(
        {"endpointSelector": selectors, "ingress": st.lists(element(), min_size=1, max_size=3)},
        optional={"ingressDeny": st.lists(element(), max_size=2)},
    ),
    min_size=1,
    max_size=3,
)


def verdicts(found: list[dict[str, Any]]) -> list[bool]:
    result = parse_documents(json.dumps(found), source="r.json")
    assert result.faults == ()
    engine = PolicyEngine(mode="always")  # whom an entry isolates is not what lint speaks of
    engine.set_documents(result.documents)
    return [
        engine.verdict(subject, peer, "ingress", proto, port).allowed
        for subject in ENDPOINTS
        for peer in PEERS
        for proto, port in PROBES
    ]


CLAIMS = re.compile(r"covers it$|denies all of it$|selects nothing|selects none of|without peers")
PLACE = re.compile(r"\[(\d+)\]\.(ingress|ingressDeny)\[(\d+)\]\Z")


@pytest.mark.timeout(900)
@settings(max_examples=EXAMPLES, deadline=None)
@given(rules)
def test_what_is_superfluous_may_go(found: list[dict[str, Any]]) -> None:
    documents = parse_documents(json.dumps(found), source="r.json").documents
    endpoints = {str(i): labels for i, labels in enumerate(ENDPOINTS)}
    before: list[bool] | None = None
    for fault in lint(documents, endpoints):
        place = PLACE.match(fault.path)
        if place is None or not CLAIMS.search(fault.message):
            continue
        rule, side, index = int(place[1]), place[2], int(place[3])
        entry = found[rule][side][index]
        if "peer" in fault.message and len(entry.get("fromEndpoints", ())) != 1:
            continue  # one peer of several selects nothing
        if "fromRequires" in entry:
            continue  # what it requires of others goes with it
        fewer = copy.deepcopy(found)
        del fewer[rule][side][index]
        before = before if before is not None else verdicts(found)
        assert verdicts(fewer) == before, fault
