"""Kubernetes' NetworkPolicy: what is accepted, and what it means for pod E (app=e, namespace d)."""

from __future__ import annotations

import json

import pytest

from cilia.identity import cidr_labels, reserved_labels
from cilia.labels import Labels, namespace_labels
from cilia.policy import (
    Document,
    Kind,
    NamedPort,
    PolicyEngine,
    PortRule,
    document_from_json,
    parse_documents,
)
from cilia.policy.api import L4


def pod(namespace: str, *labels: str, **of_namespace: str) -> Labels:
    return Labels.parse([f"k8s:{x}" for x in labels]).merge(
        namespace_labels(namespace, of_namespace)
    )


E = pod("d", "app=e", team="blue")
PEERS = {
    "a": pod("d", "app=a", team="blue"),
    "b": pod("d", "app=b", team="blue"),
    "a in x": pod("x", "app=a", team="red"),
    "b in x": pod("x", "app=b", team="red"),
    "bare": Labels.parse(["k8s:app=a", "k8s:io.kubernetes.pod.namespace=x"]),
    "host": reserved_labels(1),
    "node": reserved_labels(6),
    "world4": reserved_labels(9),
    "world6": reserved_labels(10),
    "10.1.1.1": cidr_labels("10.1.1.1/32"),
    "10.96.0.1": cidr_labels("10.96.0.1/32"),
}
PODS = "a b a-in-x b-in-x bare"


def policy(spec: str) -> str:
    body = "".join(f"  {line}\n" for line in spec.splitlines())
    return (
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n"
        "metadata: {name: p, namespace: d}\nspec:\n"
        f"  podSelector: {{matchLabels: {{app: e}}}}\n{body}"
    )


def parse(text: str) -> Document:
    result = parse_documents(text, source="np.yaml", default_namespace="other")
    assert result.faults == ()
    (document,) = result.documents
    return document


def allowed(spec: str, *, egress: bool = False, proto: str = "TCP", port: int = 80) -> str:
    engine = PolicyEngine(allow_localhost=False)
    engine.set_documents([parse(policy(spec))])
    names = [
        name.replace(" ", "-")
        for name, labels in PEERS.items()
        if engine.verdict(E, labels, "egress" if egress else "ingress", proto, port).allowed
    ]
    return " ".join(names)


ALL = " ".join(name.replace(" ", "-") for name in PEERS)


@pytest.mark.parametrize(
    ("spec", "ingress", "egress"),
    [
        # Isolation: policyTypes, and what is taken for granted without them.
        ("", "", ALL),
        ("policyTypes: [Ingress]", "", ALL),
        ("policyTypes: [Egress]", ALL, ""),
        ("policyTypes: [Ingress, Egress]", "", ""),
        ("policyTypes: []", "", ALL),
        ("ingress: []", "", ALL),
        ("egress: []", "", ALL),
        ("egress: [{}]", "", ALL),
        ("policyTypes: [Egress]\ningress: [{from: [{podSelector: {}}]}]", ALL, ""),
        ("policyTypes: [Ingress]\negress: [{to: [{podSelector: {}}]}]", "", ALL),
        # Everyone: no peers, as a missing or an empty list.
        ("ingress: [{}]", ALL, ALL),
        ("ingress: [{from: []}]", ALL, ALL),
        ("ingress: [{from: null, ports: []}]", ALL, ALL),
        # Pods of this namespace, of others, of both.
        ("ingress: [{from: [{podSelector: {}}]}]", "a b", ALL),
        ("ingress: [{from: [{podSelector: {matchLabels: {app: a}}}]}]", "a", ALL),
        ("ingress: [{from: [{namespaceSelector: {}}]}]", PODS, ALL),
        (
            "ingress: [{from: [{namespaceSelector: {matchLabels: {team: red}}}]}]",
            "a-in-x b-in-x",
            ALL,
        ),
        (
            "ingress: [{from: [{namespaceSelector: {matchLabels: {team: red}}, "
            "podSelector: {matchLabels: {app: a}}}]}]",
            "a-in-x",
            ALL,
        ),
        (
            "ingress: [{from: [{namespaceSelector: {matchLabels: {team: red}}}, "
            "{podSelector: {matchLabels: {app: a}}}]}]",
            "a a-in-x b-in-x",
            ALL,
        ),
        (
            "ingress: [{from: [{namespaceSelector: {matchExpressions: "
            "[{key: team, operator: NotIn, values: [blue]}]}}]}]",
            "a-in-x b-in-x bare",
            ALL,
        ),
        (
            "ingress: [{from: [{namespaceSelector: {matchExpressions: "
            "[{key: team, operator: DoesNotExist}]}}]}]",
            "bare",
            ALL,
        ),
        (
            "ingress: [{from: [{namespaceSelector: {matchLabels: "
            "{kubernetes.io/metadata.name: x}}}]}]",
            "a-in-x b-in-x bare",
            ALL,
        ),
        (
            "ingress: [{from: [{namespaceSelector: {matchExpressions: "
            "[{key: kubernetes.io/metadata.name, operator: NotIn, values: [x]}]}}]}]",
            "a b",
            ALL,
        ),
        # Blocks select what is outside; exceptions are no denials.
        (
            "egress: [{to: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.96.0.0/12]}}]}]",
            "",
            "10.1.1.1",
        ),
        ("ingress: [{from: [{ipBlock: {cidr: 0.0.0.0/0}}]}]", "world4 10.1.1.1 10.96.0.1", ALL),
        ("ingress: [{from: [{ipBlock: {cidr: '::/0'}}]}]", "world6", ALL),
    ],
)
def test_peers(spec: str, ingress: str, egress: str) -> None:
    assert allowed(spec) == ingress
    assert allowed(spec, egress=True) == egress


@pytest.mark.parametrize(
    ("ports", "open_"),
    [
        ("[{}]", "TCP/80 TCP/81"),
        ("[]", "TCP/80 TCP/81 UDP/80 SCTP/80 ICMP/8"),
        ("[{port: 80}]", "TCP/80"),
        ("[{protocol: UDP}]", "UDP/80"),
        ("[{port: 80, protocol: SCTP}]", "SCTP/80"),
        ("[{port: 80, endPort: 81}]", "TCP/80 TCP/81"),
        ("[{port: 81}, {port: 80, protocol: UDP}]", "TCP/81 UDP/80"),
    ],
)
def test_ports(ports: str, open_: str) -> None:
    spec = f"ingress: [{{from: [{{podSelector: {{}}}}], ports: {ports}}}]"
    probes = [("TCP", 80), ("TCP", 81), ("UDP", 80), ("SCTP", 80), ("ICMP", 8)]
    found = [f"{x}/{n}" for x, n in probes if "a" in allowed(spec, proto=x, port=n).split()]
    assert " ".join(found) == open_


def test_a_block_with_ports_is_allowed_on_ingress() -> None:
    spec = "ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8}}], ports: [{port: 80}]}]"
    assert allowed(spec) == "10.1.1.1 10.96.0.1"
    assert allowed(spec, port=81) == ""


def test_named_ports_are_of_the_endpoint() -> None:
    spec = "ingress: [{ports: [{port: web}, {port: 8080}]}]"
    (element,) = parse(policy(spec)).rules[0].elements
    assert element.ports is not None
    assert element.ports == (
        PortRule(
            (L4(6, 8080, 8080),),
            (NamedPort("web", 6),),
            path="spec.ingress[0].ports",
            origin=element.ports[0].origin,
        ),
    )


def test_names_namespace_and_places() -> None:
    text = policy(
        "policyTypes: [Egress, Ingress]\negress:\n- to:\n"
        "  - podSelector: {}\n  - ipBlock: {cidr: '::/0'}"
    )
    document = parse(text)
    assert (document.kind, document.namespace, document.ref) == (Kind.NP, "d", "NetworkPolicy d/p")
    (rule,) = document.rules
    assert [(x.path, x.origin.line) for x in rule.elements] == [
        ("spec.egress[0].to[0]", 9),
        ("spec.egress[0].to[1]", 10),
    ]
    assert rule.isolates_ingress is not None
    assert rule.isolates_egress is not None
    assert [(x[0], x[1].line) for x in (rule.isolates_ingress, rule.isolates_egress)] == [
        ("spec.policyTypes", 6),
        ("spec.egress", 7),
    ]
    again = document_from_json(document.to_json())
    assert again == document
    assert again.rules == document.rules


def test_a_list_as_kubectl_prints_it() -> None:
    item = {"metadata": {"name": "p", "namespace": "d"}, "spec": {"podSelector": {}}}
    full = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", **item}
    for kind, one in (("List", full), ("NetworkPolicyList", item)):
        text = json.dumps({"apiVersion": "networking.k8s.io/v1", "kind": kind, "items": [one]})
        assert parse(text).ref == "NetworkPolicy d/p"


@pytest.mark.parametrize(
    ("spec", "path", "message"),
    [
        ("ingress: [{to: []}]", "spec.ingress[0].to", "listed under `from`"),
        ("egress: [{from: []}]", "spec.egress[0].from", "listed under `to`"),
        ("ingress: [{from: [{}]}]", "spec.ingress[0].from[0]", "needs podSelector"),
        (
            "ingress: [{from: [{podSelector: {}, ipBlock: {cidr: 10.0.0.0/8}}]}]",
            "spec.ingress[0].from[0]",
            "cannot stand with a selector",
        ),
        (
            "ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [11.0.0.0/8]}}]}]",
            "spec.ingress[0].from[0].ipBlock.except[0]",
            "not inside",
        ),
        (
            "ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/8]}}]}]",
            "spec.ingress[0].from[0].ipBlock.except[0]",
            "all of",
        ),
        (
            "ingress: [{from: [{ipBlock: {}}]}]",
            "spec.ingress[0].from[0].ipBlock.cidr",
            "is missing",
        ),
        ("ingress: [{ports: [{port: 0}]}]", "spec.ingress[0].ports[0].port", "outside 1 to"),
        ('ingress: [{ports: [{port: "80"}]}]', "spec.ingress[0].ports[0].port", "without quotes"),
        ("ingress: [{ports: [{port: WEB}]}]", "spec.ingress[0].ports[0].port", "lower case"),
        ("ingress: [{ports: [{endPort: 9}]}]", "spec.ingress[0].ports[0].endPort", "needs port"),
        (
            "ingress: [{ports: [{port: 9, endPort: 8}]}]",
            "spec.ingress[0].ports[0].endPort",
            "below",
        ),
        (
            "ingress: [{ports: [{port: a, endPort: 8}]}]",
            "spec.ingress[0].ports[0].endPort",
            "no range",
        ),
        ("ingress: [{ports: [{protocol: tcp}]}]", "spec.ingress[0].ports[0].protocol", '"TCP"'),
        ("ingress: [{ports: [{protocol: ICMP}]}]", "spec.ingress[0].ports[0].protocol", "TCP"),
        ("policyTypes: [ingress]", "spec.policyTypes[0]", '"Ingress"'),
        (
            "ingress: [{from: [{podSelector: {matchLabels: {'k8s:app': a}}}]}]",
            "spec.ingress[0].from[0].podSelector.matchLabels[k8s:app]",
            "names no source",
        ),
        ("endpointSelector: {}", "spec.endpointSelector", "podSelector"),
        ("ingressDeny: []", "spec.ingressDeny", "NetworkPolicy has nothing like it"),
        ("ingress: [{fromEndpoints: [{}]}]", "spec.ingress[0].fromEndpoints", "from: [{podSel"),
        ("egress: [{toCIDR: [10.0.0.0/8]}]", "spec.egress[0].toCIDR", "to: [{ipBlock: ...}]"),
        ("ingress: [{toPorts: []}]", "spec.ingress[0].toPorts", "here it is ports"),
    ],
)
def test_fault(spec: str, path: str, message: str) -> None:
    result = parse_documents(policy(spec), source="np.yaml")
    assert result.documents == ()
    assert [(x.path, message in x.message) for x in result.faults] == [(path, True)], result.faults


def test_the_api_version_is_kubernetes_own() -> None:
    text = policy("").replace("networking.k8s.io/v1", "cilium.io/v2")
    (fault,) = parse_documents(text, source="np.yaml").faults
    assert (fault.path, "write networking.k8s.io/v1" in fault.message) == ("apiVersion", True)


@pytest.mark.parametrize(
    ("spec", "warning"),
    [
        ("policyTypes: [Egress]\ningress: [{}]", "does not list Ingress"),
        ("policyTypes: [Ingress]\negress: [{}]", "does not list Egress"),
    ],
)
def test_warning(spec: str, warning: str) -> None:
    result = parse_documents(policy(spec), source="np.yaml")
    assert [warning in x.message for x in result.warnings] == [True]
