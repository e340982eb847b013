"""What documents say beyond L3 and L4: it is there in types, for those who enforce it."""

from __future__ import annotations

import pytest

from cilia.labels import Labels
from cilia.policy import parse_documents
from cilia.policy.api import (
    L4,
    DNSRule,
    Document,
    Element,
    FQDNSelector,
    GenericRule,
    HeaderMatch,
    HTTPRule,
    KafkaRule,
    L7Rules,
    NamedPort,
    ServiceSelector,
    TLSContext,
)

CCNP = """\
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: p}
spec:
"""


def document(spec: str, head: str = CCNP) -> Document:
    result = parse_documents(head + spec, source="p.yaml")
    assert result.faults == ()
    return result.documents[0]


def element(text: str) -> Element:
    return document(f"  endpointSelector: {{}}\n  egress:\n  - {text}\n").rules[0].elements[0]


def l7(rules: str, protocol: str = "TCP", more: str = "") -> L7Rules:
    ports = f'ports: [{{port: "80", protocol: {protocol}}}]'
    found = element(f"toPorts: [{{{ports}, rules: {rules}{more}}}]").ports
    assert found is not None
    assert found[0].l7 is not None
    return found[0].l7


def test_http() -> None:
    found = l7(
        "{http: [{method: GET, path: /public, host: 'a[.]b', headers: ['X-A: 1', X-B], "
        "headerMatches: [{name: X-C, value: c, mismatch: REPLACE}, "
        "{name: X-D, secret: {namespace: n, name: s}}]}, {}]}"
    )
    assert found == L7Rules(
        "http",
        (
            HTTPRule(
                method="GET",
                path="/public",
                host="a[.]b",
                headers=("X-A: 1", "X-B"),
                header_matches=(
                    HeaderMatch("X-C", "c", "REPLACE"),
                    HeaderMatch("X-D", secret=("n", "s")),
                ),
            ),
            HTTPRule(),
        ),
    )


def test_kafka_and_generic() -> None:
    assert l7("{kafka: [{apiKey: Fetch, apiVersion: '3', topic: t}, {role: Produce}]}") == L7Rules(
        "kafka",
        (KafkaRule(api_key="fetch", api_version="3", topic="t"), KafkaRule(role="produce")),
    )
    assert l7("{l7proto: r2d2, l7: [{cmd: READ, file: x}]}") == L7Rules(
        "r2d2", (GenericRule((("cmd", "READ"), ("file", "x"))),)
    )
    assert l7("{l7proto: r2d2}").rules == (GenericRule(),)
    assert l7("{l7proto: r2d2, l7: []}").rules == ()


def test_dns_is_of_udp_and_tcp() -> None:
    found = element(
        'toPorts: [{ports: [{port: "53"}], rules: {dns: [{matchPattern: "*.Cilium.IO."}]}}]'
    ).ports
    assert found is not None
    assert found[0].l4 == (L4(6, 53, 53), L4(17, 53, 53))
    assert found[0].l7 == L7Rules("dns", (DNSRule(match_pattern="*.cilium.io"),))


def test_tls() -> None:
    found = l7(
        "{http: [{}]}",
        more=", terminatingTLS: {secret: {namespace: n, name: s}, certificate: c, privateKey: k}, "
        "originatingTLS: {secret: {name: t}, trustedCA: ca}, serverNames: [A.example.com]",
    )
    assert found.terminating_tls == TLSContext(("n", "s"), certificate="c", private_key="k")
    assert found.originating_tls == TLSContext(("", "t"), trusted_ca="ca")
    assert found.server_names == ("a.example.com",)
    ports = element(
        'toPorts: [{ports: [{port: "443", protocol: TCP}], serverNames: [a.example.com]}]'
    ).ports
    assert ports is not None
    assert ports[0].l7 == L7Rules("tls", server_names=("a.example.com",))


def test_named_ports_beside_numbers() -> None:
    found = element('toPorts: [{ports: [{port: HTTP}, {port: web, protocol: TCP}, {port: "8"}]}]')
    assert found.ports is not None
    assert found.ports[0].named == (NamedPort("http", 0), NamedPort("web", 6))
    assert found.l4 == found.ports[0].l4 == (L4(6, 8, 8), L4(17, 8, 8), L4(132, 8, 8))


def test_l7_rules_keep_their_own_place() -> None:
    rest = ", protocol: TCP}], rules: {http: [{}]}"
    text = (
        "toPorts:\n    - ports: [{port: '79'}]\n"
        f"    - {{ports: [{{port: '80'{rest}}}\n    - {{ports: [{{port: '81'{rest}}}"
    )
    found = element(text).ports
    assert found is not None
    assert [(x.path, x.origin.line) for x in found] == [
        ("spec.egress[0].toPorts[0]", 7),
        ("spec.egress[0].toPorts[1]", 9),
        ("spec.egress[0].toPorts[2]", 10),
    ]


def test_names_and_services_as_peers() -> None:
    peers = element("toFQDNs: [{matchName: CILIUM.io.}, {matchPattern: '*.cilium.io'}]").peers
    assert peers == (FQDNSelector("cilium.io"), FQDNSelector("", "*.cilium.io"))
    peers = element(
        "toServices: [{k8sService: {serviceName: a, namespace: b}}, "
        "{k8sServiceSelector: {selector: {matchLabels: {c: d}}}}]"
    ).peers
    assert peers is not None
    assert peers[0] == ServiceSelector("b", name="a")
    assert str(peers[1]) == "service with c=d"


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("*.cilium.io", "sub.cilium.io", True),
        ("*.cilium.io", "SUB.cilium.IO.", True),
        ("*.cilium.io", "cilium.io", False),
        ("*.cilium.io", "a.b.cilium.io", False),
        ("*.cilium.io", "sub.ciliumxio", False),
        ("*cilium.io", "cilium.io", True),
        ("a*.io", "a_b.io", True),
        ("*", "a.b.c", True),
        ("**.io", "a.b.io", True),
        ("**.io", "io", False),
    ],
)
def test_patterns_of_names(pattern: str, name: str, *, matches: bool) -> None:
    assert FQDNSelector(match_pattern=pattern).matches_name(name) is matches
    assert DNSRule(match_pattern=pattern).matches_name(name) is matches


def test_host_policy_is_about_no_endpoint() -> None:
    (rule,) = document("  nodeSelector: {matchLabels: {type: worker}}\n  ingress: [{}]\n").rules
    assert rule.node
    assert rule.selector.matches(Labels.parse(["k8s:type=worker"]))
    assert rule.isolates_ingress is not None


@pytest.mark.parametrize(("value", "audit"), [('"true"', True), ('"false"', False)])
def test_audit_annotation(value: str, *, audit: bool) -> None:
    head = CCNP.replace("name: p", f"name: p, annotations: {{cilia.io/audit: {value}}}")
    assert document("  endpointSelector: {}\n", head).audit is audit
