"""The engine as its users see it: reasons, references, rule numbers, increments, sharing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cilia.identity import RESERVED, cidr_labels, reserved_labels
from cilia.labels import Labels
from cilia.policy import PolicyEngine, PolicyEntry, PolicyKey, parse_documents
from cilia.policy.mapstate import MATCH_L3_L4
from cilia.policy.repository import RuleIDs

ROOT = Path(__file__).parents[3]
NS = "k8s:io.kubernetes.pod.namespace=default"
DEATHSTAR = Labels.parse(["k8s:org=empire", "k8s:class=deathstar", NS])
TIEFIGHTER = Labels.parse(["k8s:org=empire", "k8s:class=tiefighter", NS])
XWING = Labels.parse(["k8s:org=alliance", "k8s:class=xwing", NS])


def star_wars(**options: Any) -> PolicyEngine:
    engine = PolicyEngine(**options)
    for number in RESERVED:
        engine.add_identity(number, reserved_labels(number))
    text = (ROOT / "examples/policies/star-wars/l3-l4.yaml").read_bytes()
    result = parse_documents(text, source="l3-l4.yaml")
    assert not result.faults
    assert not result.warnings
    engine.set_documents(result.documents)
    return engine


def rules(text: str, source: str = "r.yaml") -> Any:
    result = parse_documents(text, source=source)
    assert result.faults == ()
    return result.documents


def test_star_wars_map_state() -> None:
    engine = star_wars()
    for number, labels in ((256, DEATHSTAR), (257, TIEFIGHTER), (258, XWING)):
        engine.add_identity(number, labels)
    resolved = engine.resolve(DEATHSTAR)
    assert (resolved.ingress_enforced, resolved.egress_enforced) == (True, False)
    rule = next(x.rule_id for x in resolved.mapstate.values() if x.rule_id)
    allow = PolicyEntry(deny=False, rule_id=rule, rules=(rule,))
    implicit = PolicyEntry(deny=False, rule_id=0)  # type: ignore[arg-type]
    assert dict(resolved.mapstate) == {
        PolicyKey(256, False, 6, 80, 24): allow,
        PolicyKey(257, False, 6, 80, 24): allow,
        PolicyKey(1, False, 0, 0, 0): implicit,
        PolicyKey(0, True, 0, 0, 0): implicit,
    }
    assert len(resolved.mapstate) == 4
    info = engine.rule(rule)
    assert (info.policy, info.path) == (
        "CiliumNetworkPolicy default/deathstar-landing",
        "spec.ingress[0]",
    )
    assert str(info.origin).startswith("l3-l4.yaml:")


def test_reasons_are_sentences_that_name_rules_and_lines() -> None:
    engine = star_wars()
    allowed = engine.trace(TIEFIGHTER, DEATHSTAR, "TCP", 80)
    assert allowed.allowed
    assert allowed.ingress.reason == (
        "class=tiefighter,org=empire to class=deathstar,org=empire on 80/TCP: allowed by "
        "CiliumNetworkPolicy default/deathstar-landing spec.ingress[0] (l3-l4.yaml:22)."
    )
    assert allowed.ingress.match_type == MATCH_L3_L4
    assert not allowed.egress.enforced
    assert "no rule isolates class=tiefighter,org=empire on egress" in allowed.egress.reason
    denied = engine.trace(XWING, DEATHSTAR, "tcp", 80)
    assert not denied.allowed
    assert denied.ingress.rules == ()
    (source,) = denied.ingress.default_deny
    assert (source.path, str(source.origin)) == ("spec.ingress", "l3-l4.yaml:21")
    assert engine.rule(source.rule_id) == source
    assert "denied by default" in denied.ingress.reason
    assert "spec.ingress (l3-l4.yaml:21), and no rule allows this." in denied.ingress.reason
    from_host = engine.trace(reserved_labels(1), DEATHSTAR, 6, 80)
    assert from_host.allowed
    assert "the local host may always" in from_host.ingress.reason
    assert "no endpoint" in from_host.egress.reason


def test_deny_reason_and_isolation_by_mode() -> None:
    engine = star_wars()
    (doc,) = rules(
        "- endpointSelector: {matchLabels: {class: deathstar}}\n"
        "  ingressDeny: [{fromEndpoints: [{matchLabels: {class: tiefighter}}]}]\n"
    )
    engine.upsert(doc)
    verdict = engine.verdict(DEATHSTAR, TIEFIGHTER, "ingress", 6, 80)
    assert verdict.deny
    assert not verdict.allowed
    assert "denied by Rules r [0].ingressDeny[0] (r.yaml:2)." in verdict.reason
    always = PolicyEngine("always").verdict(XWING, TIEFIGHTER, "egress", 6, 1)
    assert "enforcement mode always" in always.reason
    init = PolicyEngine().verdict(reserved_labels(5), TIEFIGHTER, "egress", 6, 1)
    assert "reserved:init" in init.reason


def test_questions_about_what_does_not_exist() -> None:
    engine = star_wars()
    with pytest.raises(KeyError, match="identity 999"):
        engine.verdict(DEATHSTAR, 999, "ingress", 6, 80)
    with pytest.raises(ValueError, match="not a protocol"):
        engine.verdict(DEATHSTAR, XWING, "ingress", "TPC", 80)
    with pytest.raises(ValueError, match="port 70000"):
        engine.verdict(DEATHSTAR, XWING, "ingress", 6, 70000)
    with pytest.raises(KeyError):
        engine.rule(1)


def test_identities_come_and_go() -> None:
    engine = star_wars()
    assert engine.add_identity(256, DEATHSTAR) == frozenset()  # nobody was resolved yet
    before = engine.resolve(DEATHSTAR)
    assert engine.add_identity(257, TIEFIGHTER) == {DEATHSTAR}
    assert engine.add_identity(257, TIEFIGHTER) == frozenset()
    assert engine.add_identity(258, XWING) == frozenset()
    after = engine.resolve(DEATHSTAR)
    delta = after.mapstate.delta(before.mapstate)
    assert list(delta.upserts) == [PolicyKey(257, False, 6, 80, 24)]
    assert delta.deletes == ()
    assert PolicyKey(257, False, 6, 80, 24) not in before.mapstate  # snapshots do not move
    assert engine.remove_identity(257) == {DEATHSTAR}
    assert engine.remove_identity(257) == frozenset()
    back = engine.resolve(DEATHSTAR).mapstate
    assert dict(back) == dict(before.mapstate)
    assert back.delta(after.mapstate).deletes == (PolicyKey(257, False, 6, 80, 24),)
    # an identity that is given other labels is another identity
    assert engine.add_identity(258, TIEFIGHTER) == {DEATHSTAR}


def test_changes_touch_only_whom_they_are_about() -> None:
    engine = star_wars()
    deathstar, xwing = engine.resolve(DEATHSTAR), engine.resolve(XWING)
    (doc,) = rules(
        "- endpointSelector: {matchLabels: {class: xwing}}\n  egress: [{toEntities: [world]}]\n"
    )
    revision = engine.revision
    assert engine.upsert(doc) == revision + 1
    assert engine.upsert(doc) == revision + 1  # the same again is no change
    assert engine.resolve(DEATHSTAR).mapstate is deathstar.mapstate
    assert engine.resolve(XWING).egress_enforced
    assert engine.remove(doc.kind, doc.namespace, doc.name) == revision + 2
    assert dict(engine.resolve(XWING).mapstate) == dict(xwing.mapstate)
    assert engine.remove("Rules", None, "r") == revision + 2


def test_order_of_documents_does_not_matter() -> None:
    a, b = rules(
        "kind: Rules\nmetadata: {name: a}\nrules: &r\n"
        "- endpointSelector: {}\n  ingress: [{fromEntities: [world]}]\n---\n"
        "kind: Rules\nmetadata: {name: b}\nrules:\n"
        "- endpointSelector: {}\n  ingress: [{fromEntities: [world]}]\n"
    )
    states = []
    for docs in ((a, b), (b, a)):
        engine = PolicyEngine()
        for number in RESERVED:
            engine.add_identity(number, reserved_labels(number))
        for doc in docs:
            engine.upsert(doc)
        states.append(dict(engine.resolve(XWING).mapstate))
    assert states[0] == states[1]
    entry = states[0][PolicyKey(9, False, 0, 0, 0)]
    assert len(entry.rules) == 2
    assert entry.rule_id == entry.rules[0]


def test_forgotten_subjects_leave_nothing() -> None:
    engine = star_wars()
    engine.resolve(DEATHSTAR)
    engine.resolve(XWING, mode="always")
    engine.forget(DEATHSTAR)
    engine.forget(XWING)
    assert len(engine.selectors) == 0
    assert engine.add_identity(257, TIEFIGHTER) == frozenset()


def test_cidr_prefixes_are_the_rules_prefixes_and_exceptions() -> None:
    engine = PolicyEngine()
    (doc,) = rules(
        "- endpointSelector: {}\n  egress:\n"
        "  - toCIDRSet: [{cidr: 10.0.0.0/8, except: [10.96.0.0/12]}]\n"
        "  - toCIDR: [0.0.0.0/0, 192.0.2.1]\n"
    )
    engine.upsert(doc)
    assert sorted(map(str, engine.cidr_prefixes())) == [
        "10.0.0.0/8",
        "10.96.0.0/12",
        "192.0.2.1/32",
    ]
    number = 1 << 24
    for prefix in engine.cidr_prefixes():
        number += 1
        engine.add_identity(number, cidr_labels(prefix))
    engine.remove(doc.kind, doc.namespace, doc.name)
    assert engine.cidr_prefixes() == frozenset()


def test_unenforced_parts_are_listed_with_the_policy() -> None:
    engine = PolicyEngine()
    (doc,) = rules(
        "- endpointSelector: {}\n  egress:\n  - toFQDNs: [{matchName: a.org}]\n"
        '  - toPorts: [{ports: [{port: "80", protocol: TCP}], rules: {http: [{}]}}]\n'
    )
    engine.upsert(doc)
    found = engine.resolve(XWING).unenforced
    assert [(x.rule.path, x.why) for x in found] == [
        ("[0].egress[0]", "toFQDNs needs DNS answers, and nobody watches DNS"),
        ("[0].egress[1]", "http rules have no proxy to enforce them yet"),
    ]


def test_rule_numbers_are_stable_and_collisions_are_probed_the_same_way_everywhere() -> None:
    docs = rules(
        "".join(
            f"kind: Rules\nmetadata: {{name: {name}}}\nrules:\n"
            "- endpointSelector: {}\n  ingress: [{fromEntities: [world]}]\n---\n"
            for name in "abc"
        )
    )

    def weak(text: str, probe: int) -> int:
        return (len(text) + probe) % 64

    def numbers(*order: Any) -> dict[str, int]:
        engine = PolicyEngine(rule_ids=RuleIDs(weak))
        for doc in order:
            engine.upsert(doc)
        paths = ("rules[0]", "rules[0].ingress", "rules[0].ingress[0]")
        return {
            f"{d.name} {path}": engine.repository.ids.number(d.key, path)
            for d in engine.documents()
            for path in paths
        }

    a, b, c = docs
    wanted = numbers(a, b, c)
    assert len(set(wanted.values())) == 9
    assert 0 not in wanted.values()
    assert numbers(c, b, a) == numbers(b, a, c) == wanted
    engine = PolicyEngine(rule_ids=RuleIDs(weak))
    for doc in (c, a, b):
        engine.upsert(doc)
    engine.resolve(XWING)
    engine.remove(a.kind, None, a.name)
    for rule in (x for e in engine.resolve(XWING).mapstate.values() for x in e.rules):
        assert engine.rule(rule).policy in ("Rules b", "Rules c")
    assert engine.verdict(XWING, reserved_labels(9), "ingress", 6, 1).rules


def test_rule_numbers_never_change_between_releases() -> None:
    engine = star_wars()
    (doc,) = engine.documents()
    # Written down: hubs of flows compare the numbers of nodes that run different releases.
    assert engine.repository.ids.number(doc.key, "spec.ingress[0]") == 4208862191


def test_a_preview_counts_what_would_be_and_changes_nothing() -> None:
    engine = star_wars()
    for number, labels in ((256, DEATHSTAR), (257, TIEFIGHTER), (258, XWING)):
        engine.add_identity(number, labels)
    before = dict(engine.resolve(DEATHSTAR).mapstate)
    (document,) = rules("""
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: more}
spec:
  endpointSelector: {matchLabels: {class: deathstar}}
  ingress:
  - fromEndpoints: [{matchLabels: {org: alliance}}, {}]
  - fromCIDR: [10.0.0.0/8, 10.1.0.0/16]
    toPorts: [{ports: [{port: "1000", endPort: 1023, protocol: TCP}]}]
""")
    preview = engine.preview([document])
    counts = {subject: preview.rows(subject, mode="default") for subject in (DEATHSTAR, XWING)}
    assert dict(engine.resolve(DEATHSTAR).mapstate) == before
    assert len(engine.documents()) == 1
    engine.upsert(document)
    for number, prefix in enumerate(engine.cidr_prefixes(), 1 << 24):
        engine.add_identity(number, cidr_labels(prefix))
    assert counts == {x: len(engine.resolve(x).mapstate) for x in (DEATHSTAR, XWING)}
    assert counts[DEATHSTAR] > len(before)
