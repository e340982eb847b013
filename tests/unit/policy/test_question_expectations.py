"""Tables of expectations: what they may say, and which rule a name means."""

from __future__ import annotations

from pathlib import Path

import pytest

from cilia.policy.api import Origin, RuleID, RuleRef
from cilia.policy.questions.expectations import TableError, names_rule, parse_table
from cilia.policy.questions.inventory import Inventory
from cilia.policy.questions.requests import HTTPRequest

TABLE = """
policies: [p.yaml]
endpoints: [{name: a}, {name: b, labels: {app: b}}]
enforcement: always
tests:
- name: all of them
  from: [a, {app: x, tier: y}]
  to: 192.0.2.1
  port: [80, 53/udp, 8/icmp]
  expect: deny
- name: a request
  from: a
  to: b
  port: 80/tcp
  http: {method: POST, path: /x, host: b.org, headers: {X-A: 1}}
  expect: allow
  rule: p spec.egress[0]
"""


def test_sides_and_ports_are_multiplied() -> None:
    table = parse_table(TABLE, source="t.yaml")
    assert table.policies == ("p.yaml",)
    assert table.mode == "always"
    assert isinstance(table.endpoints, Inventory)
    assert [x.ref for x in table.endpoints.endpoints] == ["default/a", "default/b"]
    *many, last = table.tests
    assert [(x.src, x.proto, x.port) for x in many] == [
        (src, proto, port)
        for src in (("a",), ("app=x", "tier=y"))
        for proto, port in ((6, 80), (17, 53), (1, 8))
    ]
    assert not any(x.allow for x in many)
    assert last.allow
    assert last.request == HTTPRequest("POST", "/x", "b.org", (("X-A", "1"),))
    assert last.rule == "p spec.egress[0]"
    assert (many[0].origin.line, last.origin.line) == (6, 11)


@pytest.mark.parametrize(
    ("old", "new", "path", "message"),
    [
        ("expect: deny", "expect: maybe", "tests[0].expect", "not a known expectation"),
        ("  expect: deny\n", "", "tests[0].expect", "is missing"),
        ("port: 80/tcp", "port: http", "tests[1].port", "is not a port"),
        ("8/icmp", "300/icmp", "tests[0].port[2]", "types of ICMP"),
        ("from: a\n", "from: []\n", "tests[1].from", "needs 1 to"),
        ("from: a\n", "from: {}\n", "tests[1].from", "names no labels"),
        ("name: a request", "nam: a", "tests[1].nam", 'did you mean "name"'),
        ("{name: a}, ", "{name: a}, {name: a}, ", "endpoints[1]", "also the name"),
        ("enforcement: always", "enforcement: on", "enforcement", "not a known mode"),
        ("tests:", "test:", "test", 'did you mean "tests"'),
        ("tests:", "apiVersion: v1\nkind: Pod\ntests:", "", "this is a 'Pod', not expectations"),
    ],
)
def test_faults_name_the_place(old: str, new: str, path: str, message: str) -> None:
    assert old in TABLE
    with pytest.raises(TableError) as caught:
        parse_table(TABLE.replace(old, new, 1), source="t.yaml")
    fault = caught.value.faults[0]
    assert (fault.path, fault.origin.source) == (path, "t.yaml")
    assert message in fault.message
    assert fault.origin.line


@pytest.mark.parametrize("text", ["", "a: [", "tests: []\n---\ntests: []"])
def test_what_is_no_table_is_refused(text: str) -> None:
    with pytest.raises(TableError):
        parse_table(text, source="t.yaml")


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        ("p", True),
        ("shop/p", True),
        ("CiliumNetworkPolicy shop/p", True),
        ("p spec.ingress[0]", True),
        ("shop/p spec.ingress[0]", True),
        ("CiliumNetworkPolicy shop/p spec.ingress[0]", True),
        ("p spec.ingress[1]", False),
        ("other/p", False),
        ("spec.ingress[0]", False),
    ],
)
def test_rules_are_named_by_policy_and_place(wanted: str, named: bool) -> None:
    ref = RuleRef(RuleID(1), "CiliumNetworkPolicy shop/p", "spec.ingress[0]", Origin("f", 1))
    assert names_rule(wanted, ref) == named


def test_the_example_is_a_table() -> None:
    path = Path(__file__).resolve().parents[3] / "examples" / "expectations" / "star-wars.yaml"
    assert len(parse_table(path.read_bytes(), source=str(path)).tests) == 19
