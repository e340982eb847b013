"""Differences of policies: by what they decide, not by how they say it."""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cilia.policy import Document, parse_documents
from cilia.policy.questions.difference import Difference
from cilia.policy.questions.inventory import Inventory, parse_inventory
from cilia.policy.questions.matrix import Matrix
from cilia.policy.questions.sample import MAX_ENDPOINTS, is_repeat, sample
from cilia.policy.questions.scene import Scene


def _module(name: str) -> Any:
    """A neighbour of this file."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


random_policies = _module("test_policy_property")
matrix_cases = _module("test_question_matrix")

ENDPOINTS = """
- {name: a, labels: {app: a}}
- {name: b, labels: {app: b}}
- {name: c, labels: {app: c}}
"""


def documents(spec: str, name: str = "p") -> tuple[Document, ...]:
    text = matrix_cases.cnp(spec, name)
    result = parse_documents(text, source="p.yaml")
    assert result.faults == ()
    return result.documents


def inventory(text: str = ENDPOINTS) -> Inventory:
    return parse_inventory(text, source="e.yaml")


def flips(before: Any, after: Any, **options: Any) -> set[tuple[str, str, str, str, str]]:
    found = Difference(before, after, inventory(), make=functools.partial(Scene, **options))
    return {
        (x.kind, str(x.src), str(x.dst), shape["protocol"], shape.get("ports") or shape["types"])
        for x in found.flips()
        for shape in [x.shape()]
    }


ALLOW_B = """
endpointSelector: {matchLabels: {app: a}}
ingress: [{fromEndpoints: [{matchLabels: {app: b}}], toPorts: [{ports: [%s]}]}]
"""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            '{port: "80"}',
            '{port: "80", protocol: TCP}, {port: "80", protocol: UDP}, '
            '{port: "80", protocol: SCTP}',
        ),
        (
            '{port: "80", endPort: 90, protocol: TCP}',
            '{port: "80", endPort: 85, protocol: TCP}, {port: "84", endPort: 90, protocol: TCP}',
        ),
    ],
)
def test_texts_that_say_the_same_are_equal(one: str, other: str) -> None:
    assert flips(documents(ALLOW_B % one), documents(ALLOW_B % other, "other")) == set()


def test_flips_name_just_what_changes() -> None:
    narrow = documents(ALLOW_B % '{port: "80", protocol: TCP}')
    wide = documents(ALLOW_B % '{port: "79", endPort: 81, protocol: TCP}')
    assert flips(narrow, wide) == {("opens", "default/b", "default/a", "TCP", "79,81")}
    assert flips(wide, narrow) == {("closes", "default/b", "default/a", "TCP", "79,81")}
    assert flips(wide, narrow, mode="never") == set()


def test_other_requests_are_a_change_of_their_own() -> None:
    def http(path: str) -> tuple[Document, ...]:
        return documents(
            "endpointSelector: {matchLabels: {app: a}}\ningress:\n- toPorts:\n"
            f'  - {{ports: [{{port: "80", protocol: TCP}}], rules: {{http: [{{path: {path}}}]}}}}'
        )

    found = list(Difference(http("/x"), http("/y"), inventory()).flips())
    assert {x.kind for x in found} == {"requests"}
    shape = found[0].shape()
    assert shape["l7_before"][0]["rules"] == [{"path": "/x"}]
    assert shape["l7"][0]["rules"] == [{"path": "/y"}]
    assert not Difference(http("/x"), http("/x"), inventory())
    opened = list(Difference((), http("/x"), inventory()).flips())
    assert {x.kind for x in opened} == {"closes", "requests"}


def test_prefixes_of_either_side_are_told_apart() -> None:
    def to(prefix: str) -> tuple[Document, ...]:
        return documents(
            f"endpointSelector: {{matchLabels: {{app: a}}}}\negress: [{{toCIDR: [{prefix}]}}]"
        )

    found = flips(to("10.0.0.0/8"), to("10.0.0.0/9"))
    assert {x[:3] for x in found} == {("closes", "default/a", "10.128.0.0/9")}


def expanded(rows: Any) -> dict[Any, Any]:
    """Every allowed number of every pair, prefixes by sample addresses."""
    found = {}
    for row in rows:
        for first, last in row.ranges:
            for number in (0, 1, 79, 80, 81, 8080, 65535):
                if first <= number <= last:
                    found[row.src, row.dst, row.proto, number] = repr(row.condition)
    return found


@settings(
    max_examples=max(random_policies.EXAMPLES // 10, 10),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(one=random_policies.document_lists(), other=random_policies.document_lists())
def test_a_difference_is_that_of_the_matrices(one: Any, other: Any) -> None:
    endpoints = inventory(json.dumps(matrix_cases.MINE))
    before, after = random_policies.parse(one), random_policies.parse(other)
    found = Difference(before, after, endpoints)
    # the same prefixes for both, so that rows can be compared
    prefixes = {x.prefix for x in found.before.regions if x.prefix is not None}
    sides = [
        expanded(
            row
            for row in Matrix(Scene(x, endpoints, prefixes=prefixes)).rows()
            if isinstance(row.src, str) and isinstance(row.dst, str)
        )
        for x in (before, after)
    ]
    wanted = {k for k in {*sides[0], *sides[1]} if sides[0].get(k) != sides[1].get(k)}
    named = {x for pair in found.cells for x in pair if isinstance(x, str)}
    shared = {x for key in (*sides[0], *sides[1]) for x in key[:2]}
    flipped = {
        (x.src, x.dst, x.proto, number)
        for x in found.flips()
        for first, last in x.ranges
        for number in (0, 1, 79, 80, 81, 8080, 65535)
        if first <= number <= last and isinstance(x.src, str) and isinstance(x.dst, str)
    }
    # entities that only one side names have rows in that one only
    reserved = {x for x in named | shared if str(x).startswith("reserved:")}
    one_sided = reserved - {"reserved:host"}
    assert {x for x in flipped if not {x[0], x[1]} & one_sided} == {
        x for x in wanted if not {x[0], x[1]} & one_sided
    }
    assert not Difference(before, before, endpoints)


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(one=random_policies.document_lists(), data=st.data())
def test_sampled_endpoints_are_bounded_and_valid(one: Any, data: Any) -> None:
    made = sample(random_policies.parse(one))
    assert len(made.endpoints) <= MAX_ENDPOINTS
    assert len({x.ref for x in made.endpoints}) == len(made.endpoints)


def test_sampled_endpoints_tell_policies_apart() -> None:
    pairs = [
        (ALLOW_B % '{port: "80"}', ALLOW_B.replace("app: b", "app: c") % '{port: "80"}'),
        (
            "endpointSelector: {}\ningress: [{fromEndpoints: [{}]}]",
            "endpointSelector: {}\ningress: [{}]",
        ),
        (
            "endpointSelector: {matchExpressions: [{key: x, operator: Exists}]}\ningress: [{}]",
            "endpointSelector: {matchExpressions: [{key: x, operator: In, values: [a, b]}]}\n"
            "ingress: [{}]",
        ),
        (
            "endpointSelector: {}\ningress: [{fromEndpoints: [{matchLabels: {a: b, c: d}}]}]",
            "endpointSelector: {}\ningress: [{fromEndpoints: [{matchLabels: {a: b}}]}]",
        ),
        (
            "endpointSelector: {}\ningress: [{toPorts: [{ports: [{port: web}]}]}]",
            "endpointSelector: {}\ningress: [{toPorts: [{ports: [{port: www}]}]}]",
        ),
    ]
    for one, other in pairs:
        before, after = documents(one), documents(other)
        made = sample((*before, *after))
        assert Difference(before, after, made), one
        assert not Difference(before, before, made)


def test_a_twin_says_nothing_twice() -> None:
    made = sample(documents(ALLOW_B % '{port: "80"}'))
    pairs = [(a.ref, b.ref) for a in made.endpoints for b in made.endpoints if a is not b]
    told = [x for x in pairs if not is_repeat(*x)]
    by_labels = {(a.labels, b.labels) for a in made.endpoints for b in made.endpoints}
    assert len(told) == len(by_labels)
