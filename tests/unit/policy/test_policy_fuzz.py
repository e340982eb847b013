"""Whatever is fed to the parser, it answers with documents or faults, and soon."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cilia.policy import DocumentError, ParseResult, document_from_json, parse_documents
from cilia.policy.language import requests
from cilia.policy.tree import MAX_DEPTH
from tests.unit.policy.effort import calls

EXAMPLES = int(os.environ.get("CILIA_PROPERTY_EXAMPLES", "300"))
fuzz = settings(max_examples=EXAMPLES, deadline=None)

GOOD = """\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: p, namespace: x}
spec:
  endpointSelector: {matchLabels: {app: a}}
  ingress:
  - fromEndpoints: [{matchExpressions: [{key: b, operator: In, values: [c]}]}]
    toPorts:
    - ports: [{port: "80", protocol: TCP, endPort: 90}]
  egress:
  - toCIDRSet: [{cidr: 10.0.0.0/8, except: [10.1.0.0/16]}]
  egressDeny:
  - toEntities: [world]
    icmps: [{fields: [{type: 8}]}]
"""


REQUESTS = """\
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: p, annotations: {cilia.io/audit: "true"}}
specs:
- endpointSelector: {}
  egress:
  - toFQDNs: [{matchPattern: "*.a.b"}]
    toPorts:
    - ports: [{port: "80", protocol: TCP}]
      rules:
        http: [{method: GET, path: "/a[^/]*", headerMatches: [{name: X, mismatch: LOG}]}]
      terminatingTLS: {secret: {namespace: n, name: s}, privateKey: k}
      serverNames: [a.b]
  - toServices: [{k8sService: {serviceName: s}}]
    toPorts: [{ports: [{port: web, protocol: TCP}], rules: {l7proto: x, l7: [{a: b}]}}]
  - toPorts: [{ports: [{port: "53"}], rules: {dns: [{matchName: a.b}]}}]
- nodeSelector: {matchLabels: {a: b}}
  ingressDeny: [{fromEntities: [world], toPorts: [{ports: [{port: ssh}]}]}]
"""
KUBERNETES = """\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: p, namespace: x}
spec:
  podSelector: {matchLabels: {app: a}}
  policyTypes: [Ingress, Egress]
  ingress:
  - from: [{podSelector: {}, namespaceSelector: {matchLabels: {a: b}}}]
    ports: [{port: 80, endPort: 90}, {port: web, protocol: UDP}]
  egress:
  - to: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}}]
"""


def check(text: bytes | str) -> ParseResult:
    result = parse_documents(text, source="fuzz")
    assert bool(result.faults) != bool(result.documents)
    for fault in (*result.faults, *result.warnings):
        assert fault.message
        assert str(fault)
    for document in result.documents:
        again = document_from_json(document.to_json())
        assert again == document
        assert again.rules == document.rules
        assert again.to_json() == document.to_json()
    return result


@fuzz
@given(st.binary(max_size=200))
def test_bytes(data: bytes) -> None:
    check(data)


@fuzz
@given(st.text(alphabet="{}[]:,-?&*!|>'\"%@`#<~= \n\tab10x.\\\ud800\u0085\ufeff", max_size=60))
def test_yaml_indicators(text: str) -> None:
    check(text)


@fuzz
@given(
    st.sampled_from([GOOD, REQUESTS, KUBERNETES]),
    st.floats(0, 1),
    st.integers(0, 12),
    st.text(max_size=6),
)
def test_a_good_document_damaged(text: str, part: float, cut: int, put: str) -> None:
    at = int(part * len(text))
    check(text[:at] + put + text[at + cut :])


@fuzz
@given(
    st.sampled_from([GOOD, REQUESTS, KUBERNETES]),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=3),
)
def test_lines_of_a_good_document_moved(text: str, moves: list[tuple[int, int]]) -> None:
    lines = text.splitlines()
    for source, target in moves:
        lines.insert(target % len(lines), lines.pop(source % len(lines)))
    check("\n".join(lines))


FIELDS = [
    "apiVersion",
    "kind",
    "metadata",
    "name",
    "namespace",
    "spec",
    "specs",
    "rules",
    "items",
    "endpointSelector",
    "nodeSelector",
    "matchLabels",
    "matchExpressions",
    "key",
    "operator",
    "values",
    "ingress",
    "egress",
    "ingressDeny",
    "egressDeny",
    "fromEndpoints",
    "toEndpoints",
    "fromCIDR",
    "toCIDRSet",
    "cidr",
    "except",
    "fromEntities",
    "toFQDNs",
    "matchName",
    "toServices",
    "toPorts",
    "ports",
    "port",
    "endPort",
    "protocol",
    "rules",
    "http",
    "dns",
    "kafka",
    "l7",
    "l7proto",
    "icmps",
    "fields",
    "family",
    "type",
    "fromRequires",
    "enableDefaultDeny",
    "labels",
    "description",
    "authentication",
    "mode",
    "status",
    *["podSelector", "policyTypes", "from", "to", "namespaceSelector", "ipBlock"],
    *["headers", "headerMatches", "path", "mismatch", "secret", "terminatingTLS", "serverNames"],
    *["listener", "k8sService", "serviceName", "annotations", "cilia.io/audit"],
]
words = st.sampled_from(
    [
        *[
            "cilium.io/v2",
            "CiliumNetworkPolicy",
            "CiliumClusterwideNetworkPolicy",
            "Rules",
            "NetworkPolicy",
            "networking.k8s.io/v1",
            "Ingress",
            "List",
            "In",
        ],
        *[
            "p",
            "default",
            "app=a",
            "k8s:a",
            "80",
            "TCP",
            "http",
            "10.0.0.0/8",
            "::/0",
            "all",
            "IPv4",
            "8",
            "required",
            "k8s:",
            "(",
        ],
        "",
    ]
)
leaves = st.one_of(st.none(), st.booleans(), st.integers(-1, 70000), st.floats(), words, st.text())
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(FIELDS), inner, max_size=5)
    ),
    max_leaves=25,
)


@fuzz
@given(values)
def test_json_of_the_language(value: object) -> None:
    check(json.dumps(value))


@fuzz
@given(
    st.dictionaries(st.sampled_from(FIELDS), values, max_size=6),
    st.sampled_from(["CiliumNetworkPolicy", "CiliumClusterwideNetworkPolicy", "Rules"]),
)
def test_rules_of_the_language(rule: dict[str, object], kind: str) -> None:
    body = {"apiVersion": "cilium.io/v2", "kind": kind, "metadata": {"name": "p"}}
    kubernetes = {**body, "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy"}
    check(json.dumps({**kubernetes, "spec": {"podSelector": {}, **rule}}))
    check(json.dumps({**body, "spec": {"endpointSelector": {}, **rule}}))
    check(json.dumps([{"endpointSelector": {}, **rule}]))


@fuzz
@given(st.one_of(st.binary(max_size=80), values.map(lambda v: json.dumps(v).encode())))
def test_stored_bytes(data: bytes) -> None:
    with contextlib.suppress(DocumentError):
        document_from_json(data)


BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)
LOOP = "a: &a\n  b: *a\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "aliases expand"),
        (LOOP, "no anchor"),
        ("[" * 100_000, "nested deeper"),
        ("{a: " * 50_000, "nested deeper|invalid"),
        ("- " * 50_000, "nested deeper"),
        ("? " * 20_000, "nested deeper|invalid"),
        ('{"a":' * 20_000, "nested deeper"),
        ("&a " * 50_000, "invalid YAML"),
        ("a: 1\na: 2\n", "given twice"),
        ('{"a": 1, "a": 2}', "given twice"),
        ("a: !!python/object:os.system x\n", "tag"),
        ("a: " + "9" * 5000, "longer than 40"),
        ("x" * (5 << 20), "longer than 4 MiB"),
        (b"\xff\xfe", "not UTF-8"),
        ("", "no document"),
        ("---\n---\n", "no document"),
        ("%YAML 9.9\n--- x\n", "."),
        ("a: *b\n", "no anchor"),
        ("'" * 10_001, "invalid YAML|must be a mapping"),
        ("<<: {a: b}\n", "merge keys"),
        ("? [a]\n: b\n", "key must be text"),
    ],
    ids=lambda x: repr(x[:16]) if isinstance(x, bytes | str) else "",
)
def test_bombs(text: str | bytes, message: str) -> None:
    result = parse_documents(text, source="bomb")
    assert calls(lambda: parse_documents(text, source="bomb")) < 1_000_000
    assert not result.documents
    assert len(result.faults) == 1
    assert re.search(message, result.faults[0].message)


@pytest.mark.parametrize("text", [BOMB, "[" * 100_000, "- [" * 40 + "a: " * 50_000], ids=len)
def test_memory_is_bounded(text: str) -> None:
    tracemalloc.start()
    try:
        parse_documents(text, source="bomb")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20


def test_depth_that_is_allowed() -> None:
    nested = "[" * (MAX_DEPTH - 2) + "]" * (MAX_DEPTH - 2)
    result = parse_documents(nested, source="deep")
    assert "must be a mapping" in result.faults[0].message


@pytest.mark.parametrize("expression", ["a{N}", "[[:word:]]{N}", "(?i)\\pL{N}", "\\pL{N}(.{N})"])
def test_regular_expressions_are_bounded_together(expression: str) -> None:
    """Each is small as text; as programs they would take minutes. Few are compiled."""
    texts = [expression.replace("N", str(n)) for n in range(1000, 500, -1)]
    rules = [{"path": x + "b" * n} for x in texts for n in range(12)]
    ports = [{"port": "80", "protocol": "TCP"}]
    entry = {"toPorts": [{"ports": ports, "rules": {"http": rules[i : i + 1000]}}
                         for i in range(0, len(rules), 1000)]}  # fmt: skip
    text = json.dumps([{"endpointSelector": {}, "ingress": [entry]}])
    requests._program.cache_clear()
    result = parse_documents(text, source="regexes")
    assert len(rules) == 6000
    assert requests._program.cache_info().misses < 2500
    assert "too large" in result.faults[-1].message


def test_faults_of_one_document_are_bounded() -> None:
    rules = ",".join(['{"endpointSelector":{"x":1}}'] * 5000)
    result = parse_documents(f"[{rules}]", source="many")
    assert len(result.faults) == 200
    assert "more than these 200 are not listed" in result.faults[-1].message


def test_faults_of_many_documents_are_bounded_and_none_with_a_fault_passes() -> None:
    bad = {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "spec": {"endpointSelector": {}, "egress": [{"x": 1}] * 100},
    }
    items = [{**bad, "metadata": {"name": f"p{i}"}} for i in range(500)]
    result = parse_documents(json.dumps({"kind": "List", "items": items}), source="many")
    assert len({x.document for x in result.faults}) == 500
    assert len(result.faults) <= 10_500


@pytest.mark.slow
@pytest.mark.timeout(900)
@settings(max_examples=10 * EXAMPLES, deadline=None)
@given(
    st.sampled_from([GOOD, REQUESTS, KUBERNETES]),
    st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 30), st.text(max_size=8)), min_size=1, max_size=6
    ),
)
def test_good_documents_damaged_for_long(text: str, damage: list[tuple[float, int, str]]) -> None:
    for part, cut, put in damage:
        at = int(part * len(text))
        text = text[:at] + put + text[at + cut :]
    check(text)
