"""What a change costs beside fifty or two thousand prefixes: calls are counted, not time."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from ipaddress import IPv4Network
from types import FrameType
from typing import Any

import pytest

from cilia.identity import cidr_labels
from cilia.labels import Labels
from cilia.policy import Document, PolicyEngine, parse_documents

SUBJECT = Labels.parse(["k8s:app=a", "k8s:io.kubernetes.pod.namespace=default"])
OTHER = Labels.parse(["k8s:app=b", "k8s:io.kubernetes.pod.namespace=default"])
LOCAL = 1 << 24


def document(name: str, *cidrs: str) -> Document:
    sets = [{"cidr": x, "except": [str(IPv4Network(x).network_address + 1)]} for x in cidrs]
    for x in sets:
        x["except"] = [f"{x['except'][0]}/32"]
    rule = {"endpointSelector": {}, "egress": [{"toCIDRSet": sets}]}
    text = json.dumps({"kind": "Rules", "metadata": {"name": name}, "rules": [rule]})
    result = parse_documents(text, source="x.json")
    assert not result.faults
    return result.documents[0]


def engine_of(prefixes: int) -> PolicyEngine:
    engine = PolicyEngine()
    cidrs = [str(IPv4Network(((10 << 24) + (n << 8), 24))) for n in range(prefixes)]
    engine.upsert(document("few", *cidrs[:25]))
    engine.upsert(document("many", *cidrs[25:]))
    for n, prefix in enumerate(sorted(engine.cidr_prefixes(), key=str), 1):
        engine.add_identity(LOCAL + n, cidr_labels(prefix))
    engine.resolve(SUBJECT)
    return engine


def calls(function: Callable[[], Any]) -> int:
    """How many functions it calls, those of the interpreter too."""
    count = 0

    def seen(_frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


MORE = "172.16.0.0/24"


def one_rule_more(engine: PolicyEngine) -> None:
    engine.apply([document("more", MORE)])
    for n, prefix in enumerate((MORE, "172.16.0.1/32")):
        engine.add_identity(LOCAL + 900_000 + n, cidr_labels(prefix))
    state = engine.resolve(SUBJECT).mapstate
    assert state.allows(LOCAL + 900_000, True, 6, 80)
    assert not state.allows(LOCAL + 900_001, True, 6, 80)


def one_rule_less(engine: PolicyEngine) -> None:
    key = document("few", MORE).key
    state = engine.resolve(SUBJECT).mapstate
    engine.apply([], [key])
    assert len(engine.resolve(SUBJECT).mapstate) == len(state) - 25


def one_identity_more(engine: PolicyEngine) -> None:
    engine.add_identity(LOCAL + 900_000, cidr_labels("10.0.3.128/25"))
    assert engine.resolve(SUBJECT).mapstate.allows(LOCAL + 900_000, True, 6, 80)


def one_subject_more(engine: PolicyEngine) -> None:
    rows = engine.resolve(SUBJECT).mapstate
    assert len(engine.resolve(OTHER).mapstate) == len(rows)


def one_preview(engine: PolicyEngine) -> None:
    rows = len(engine.resolve(SUBJECT).mapstate)
    assert engine.preview([document("more", MORE)]).rows(SUBJECT, mode="default") == rows + 1


CHANGES = (one_rule_more, one_rule_less, one_identity_more, one_subject_more, one_preview)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_costs_what_it_touches(change: Callable[[PolicyEngine], None]) -> None:
    change(engine_of(50))  # what is made once is made
    small, large = engine_of(50), engine_of(2000)
    few, many = calls(lambda: change(small)), calls(lambda: change(large))
    assert abs(many - few) < 100
