"""The language's cases, one probe each: what a policy means for endpoint E (app=e, namespace d).

Numbers are those of the field's own 86 cases, written down for Cilium 1.7; each is here, in a test
that its number names, or in one of another kind (`ELSEWHERE`). Where we decide otherwise than 1.7
does, `DIFFERS` says why, and docs/design/policy.md the same. Cases without a number are our own.
"""

from __future__ import annotations

import re
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from cilia.identity import cidr_labels, reserved_labels
from cilia.labels import Labels
from cilia.policy import (
    ALL_PARSERS,
    L7Entry,
    L7Set,
    PolicyEngine,
    RuleID,
    Service,
    parse_documents,
)
from cilia.policy.api import L4, DNSRule, FQDNSelector, HTTPRule, L7Rules, PortRule
from cilia.policy.questions.requests import HTTPRequest, passes

ROOT = Path(__file__).parents[3]
NS = "k8s:io.kubernetes.pod.namespace"
SPACE = "k8s:io.cilium.k8s.namespace.labels.team=red"
E = Labels.parse(["k8s:app=e", f"{NS}=d"])
PEERS = {
    "a": Labels.parse(["k8s:app=a", f"{NS}=d"]),
    "a+prod": Labels.parse(["k8s:app=a", "k8s:env=prod", f"{NS}=d"]),
    "b": Labels.parse(["k8s:app=b", f"{NS}=d"]),
    "a in x": Labels.parse(["k8s:app=a", f"{NS}=x", SPACE]),
    "b in x": Labels.parse(["k8s:app=b", f"{NS}=x", SPACE]),
    "foreign": Labels.parse(["k8s:app=a", f"{NS}=d", "k8s:io.cilium.k8s.policy.cluster=far"]),
    "docker a": Labels.parse(["container:app=a", f"{NS}=d"]),
    "host": reserved_labels(1),
    "unmanaged": reserved_labels(3),
    "health": reserved_labels(4),
    "init": reserved_labels(5),
    "node": reserved_labels(6),
    "world4": reserved_labels(9),
    "world6": reserved_labels(10),
    **{
        x: cidr_labels(f"{x}/{128 if ':' in x else 32}")
        for x in (
            "10.1.1.1",
            "10.96.0.1",
            "10.96.5.1",
            "192.0.2.7",
            "198.51.100.1",
            "2001:db8::1",
        )
    },
}
A = "fromEndpoints: [{matchLabels: {app: a}}]"
B = "fromEndpoints: [{matchLabels: {app: b}}]"
KAFKA = (
    'toPorts: [{ports: [{port: "80", protocol: TCP}], rules: {kafka: [{topic: t, apiKey: fetch}]}}]'
)
RANGE = '"80", endPort: 81'
SPACES = "namespaceSelector: {matchLabels: {team: red}}"
T80 = 'toPorts: [{ports: [{port: "80", protocol: TCP}]}]'


def parse(text: str) -> Any:
    result = parse_documents(text, source="case.yaml", default_namespace="d")
    assert result.faults == ()
    return result.documents


def cnp(body: str, name: str = "p", selector: str = "{matchLabels: {app: e}}") -> str:
    lines = "".join(f"  {line}\n" for line in body.splitlines())
    return (
        "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\n"
        f"metadata: {{name: {name}}}\nspec:\n  endpointSelector: {selector}\n{lines}---\n"
    )


def ccnp(body: str) -> str:
    return cnp(body).replace("CiliumNetworkPolicy", "CiliumClusterwideNetworkPolicy")


def np(body: str) -> str:
    lines = "".join(f"  {line}\n" for line in body.splitlines())
    return (
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: n, namespace: d}\n"
        f"spec:\n  podSelector: {{}}\n{lines}---\n"
    )


def audited(text: str) -> str:
    return text.replace("{name: p}", '{name: p, annotations: {cilia.io/audit: "true"}}')


def http(rule: str, port: str = '"80"') -> str:
    return f"toPorts: [{{ports: [{{port: {port}, protocol: TCP}}], rules: {{http: [{rule}]}}}}]"


def raw(body: str) -> str:
    lines = "".join(f"  {line}\n" for line in body.splitlines())
    return f"- endpointSelector: {{matchLabels: {{app: e}}}}\n{lines}---\n"


def ingress(*elements: str) -> str:
    return "ingress:\n" + "".join(f"- {{{x}}}\n" for x in elements)


def egress(*elements: str) -> str:
    return "egress:\n" + "".join(f"- {{{x}}}\n" for x in elements)


def cases() -> list[Any]:
    """(id, documents, probes).

    A probe is a verdict, a direction and `peer protocol port`. Verdicts: + allowed, - denied, 7 as
    the L7 rules say, * by a proxy that lets everything pass, ! allowed and reported.
    """
    rows: list[tuple[str, str, str]] = [
        ("1 no policy", "", "+<a TCP 80, +>world4 TCP 80"),
        ("2 ingress []", cnp("ingress: []"), "+<a TCP 80"),
        ("3 ingress [{}]", cnp("ingress: [{}]"), "-<a TCP 80, +>a TCP 80, +<host TCP 80"),
        ("4 egress [{}]", cnp("egress: [{}]"), "->a TCP 1, ->host TCP 1, +<a TCP 1"),
        ("5 neither", cnp("description: x"), "+<a TCP 1, +>a TCP 1"),
        (
            "6 from a",
            cnp(ingress(A)),
            "+<a TCP 80, +<a ICMP 8, -<a in x TCP 80, -<b TCP 80, +<docker a TCP 1",
        ),
        (
            "7 from {} in a CNP",
            cnp(ingress("fromEndpoints: [{}]")),
            "+<b TCP 1, -<b in x TCP 1, -<world4 TCP 1, -<node TCP 1, +<host TCP 1",
        ),
        (
            "9 from {} clusterwide",
            ccnp(ingress("fromEndpoints: [{}]")),
            "+<b TCP 1, +<b in x TCP 1, -<world4 TCP 1, -<10.1.1.1 TCP 1, -<node TCP 1",
        ),
        (
            "8 from {} in raw rules is everyone",
            raw(ingress("fromEndpoints: [{}]")),
            "+<b in x TCP 1, +<world4 TCP 1, +<node TCP 1",
        ),
        (
            "10 namespace named",
            cnp(ingress(f'fromEndpoints: [{{matchLabels: {{app: a, "{NS}": x}}}}]')),
            "+<a in x TCP 1, -<a TCP 1, -<b in x TCP 1",
        ),
        (
            "11 any: namespace",
            cnp(ingress('fromEndpoints: [{matchLabels: {"any:io.kubernetes.pod.namespace": x}}]')),
            "+<a in x TCP 1, +<b in x TCP 1, -<a TCP 1",
        ),
        (
            "namespace NotIn is endpoints only",
            cnp(
                ingress(
                    f'fromEndpoints: [{{matchExpressions: [{{key: "{NS}", operator: NotIn, '
                    "values: [x]}]}]"
                )
            ),
            "+<a TCP 1, -<a in x TCP 1, -<world4 TCP 1, -<node TCP 1",
        ),
        (
            "namespace labels replace the own namespace",
            cnp(
                ingress(
                    'fromEndpoints: [{matchLabels: {"k8s:io.cilium.k8s.namespace.labels.team": '
                    "red}}]"
                )
            ),
            "+<a in x TCP 1, -<a TCP 1",
        ),
        (
            "12 other namespace in the subject",
            cnp(ingress("{}").replace("{{}}", "{}"), selector=f'{{matchLabels: {{"{NS}": x}}}}'),
            "-<a TCP 1",
        ),
        (
            "13 ports only",
            cnp(ingress(T80)),
            "+<world4 TCP 80, +<a TCP 80, -<a TCP 81, -<a UDP 80, -<a ICMP 8, -<a SCTP 80",
        ),
        (
            "14 from [] with ports is nobody",
            cnp(ingress(f"fromEndpoints: [], {T80}")),
            "-<a TCP 80",
        ),
        ("15 from []", cnp(ingress("fromEndpoints: []")), "-<a TCP 80"),
        ("16 a and 80", cnp(ingress(f"{A}, {T80}")), "+<a TCP 80, -<a TCP 443, -<b TCP 80"),
        ("17 two elements", cnp(ingress(A, T80)), "+<a TCP 9, +<b TCP 80, -<b TCP 81"),
        (
            "18 no protocol",
            cnp(ingress('toPorts: [{ports: [{port: "80"}]}]')),
            "+<a TCP 80, +<a UDP 80, +<a SCTP 80, -<a ICMP 80",
        ),
        (
            "port 0 of a protocol",
            cnp(ingress('toPorts: [{ports: [{port: "0", protocol: UDP}]}]')),
            "+<a UDP 1, +<a UDP 65535, -<a TCP 1",
        ),
        (
            "port range",
            cnp(ingress('toPorts: [{ports: [{port: "79", endPort: 81, protocol: TCP}]}]')),
            "-<a TCP 78, +<a TCP 79, +<a TCP 81, -<a TCP 82",
        ),
        (
            "icmps",
            cnp(ingress("icmps: [{fields: [{type: EchoRequest}, {family: IPv6, type: 128}]}]")),
            "+<a ICMP 8, -<a ICMP 0, +<a ICMPv6 128, -<a TCP 8",
        ),
        ("ports [] selects nothing", cnp(ingress(f"{A}, toPorts: [{{ports: []}}]")), "-<a TCP 80"),
        ("toPorts [] is none", cnp(ingress(f"{A}, toPorts: []")), "+<a TCP 80"),
        ("21 managed in CIDR", cnp(egress("toCIDR: [0.0.0.0/0]")), "->a TCP 1"),
        (
            "22 toCIDR",
            cnp(egress("toCIDR: [192.0.2.0/24]")),
            "+>192.0.2.7 TCP 1, ->198.51.100.1 TCP 1, ->world4 TCP 1, ->node TCP 1, ->host TCP 1",
        ),
        (
            "24 except",
            cnp(egress("toCIDRSet: [{cidr: 10.0.0.0/8, except: [10.96.0.0/12]}]")),
            "+>10.1.1.1 TCP 1, ->10.96.0.1 TCP 1",
        ),
        (
            "25 except is no deny",
            cnp(
                egress(
                    "toCIDRSet: [{cidr: 10.0.0.0/8, except: [10.96.0.0/12]}]",
                    "toCIDR: [10.96.5.0/24]",
                )
            ),
            "+>10.96.5.1 TCP 1, ->10.96.0.1 TCP 1",
        ),
        (
            "26 /0 is its own family's world",
            cnp(egress("toCIDR: [0.0.0.0/0]")),
            "+>world4 TCP 1, +>192.0.2.7 TCP 1, ->world6 TCP 1, ->2001:db8::1 TCP 1, ->node TCP 1",
        ),
        (
            "/0 with except still has the world",
            cnp(egress("toCIDRSet: [{cidr: 0.0.0.0/0, except: [10.0.0.0/8]}]")),
            "+>world4 TCP 1, +>192.0.2.7 TCP 1, ->10.1.1.1 TCP 1",
        ),
        (
            "ingress CIDR with ports",
            cnp(ingress(f"fromCIDR: [192.0.2.0/24], {T80}")),
            "+<192.0.2.7 TCP 80, -<192.0.2.7 TCP 81",
        ),
        (
            "27 world",
            cnp(egress("toEntities: [world]")),
            "+>world4 TCP 1, +>world6 TCP 1, +>10.1.1.1 TCP 1, ->a TCP 1, ->host TCP 1",
        ),
        (
            "world-ipv4 is one family",
            cnp(egress("toEntities: [world-ipv4]")),
            "+>world4 TCP 1, +>10.1.1.1 TCP 1, ->world6 TCP 1, ->2001:db8::1 TCP 1",
        ),
        (
            "28 cluster",
            cnp(egress("toEntities: [cluster]")),
            "+>a TCP 1, +>b in x TCP 1, +>node TCP 1, +>host TCP 1, +>init TCP 1, +>health TCP 1, "
            "+>unmanaged TCP 1, ->world4 TCP 1, ->foreign TCP 1",
        ),
        ("29 all", cnp(egress("toEntities: [all]")), "+>a TCP 1, +>world6 ICMPv6 1, +>node UDP 1"),
        ("31 host", cnp(ingress("fromEntities: [host]")), "+<host TCP 1, -<node TCP 1"),
        ("33 none", cnp(ingress("fromEntities: [none]")), "-<a TCP 1, -<world4 TCP 1"),
        (
            "reserved label in a CNP peer is not scoped",
            cnp(ingress('fromEndpoints: [{matchLabels: {"reserved:world": ""}}]')),
            "+<world4 TCP 1, +<10.1.1.1 TCP 1, -<a TCP 1",
        ),
        (
            "35 requires",
            cnp(ingress(A)) + cnp(ingress("fromRequires: [{matchLabels: {env: prod}}]"), "q"),
            "+<a+prod TCP 1, -<a TCP 1",
        ),
        (
            "36 requires alone",
            cnp(ingress("fromRequires: [{matchLabels: {env: prod}}]")),
            "-<a+prod TCP 1",
        ),
        (
            "37 requires and entities",
            cnp(ingress("fromEntities: [world]"))
            + cnp(ingress("fromRequires: [{matchLabels: {env: prod}}]"), "q"),
            "+<world4 TCP 1",
        ),
        (
            "38 requires and ports only",
            cnp(ingress(T80)) + cnp(ingress("fromRequires: [{matchLabels: {env: prod}}]"), "q"),
            "+<a TCP 80, +<world4 TCP 80",
        ),
        (
            "requires with ports and no peers grants nothing",
            cnp(ingress(f"fromRequires: [{{matchLabels: {{env: prod}}}}], {T80}")),
            "-<a+prod TCP 80",
        ),
        (
            "77 deny beats allow",
            cnp(ingress(f"{A}, {T80}") + f"ingressDeny:\n- {{{A}}}\n"),
            "-<a TCP 80, -<b TCP 80",
        ),
        (
            "78 allow all, deny a port",
            cnp(
                ingress("fromEntities: [all]")
                + 'ingressDeny:\n- {toPorts: [{ports: [{port: "22"}]}]}\n'
            ),
            "-<a TCP 22, -<world4 TCP 22, +<a TCP 23, +<a ICMP 8",
        ),
        (
            "79 allow a, deny /0",
            cnp(ingress(A) + "ingressDeny:\n- {fromCIDR: [0.0.0.0/0]}\n"),
            "+<a TCP 1, -<world4 TCP 1, -<10.1.1.1 TCP 1",
        ),
        (
            "deny with except: neither denied nor allowed",
            cnp(
                egress("toCIDR: [10.96.5.0/24]")
                + "egressDeny:\n- {toCIDRSet: [{cidr: 10.0.0.0/8, except: [10.96.0.0/12]}]}\n"
            ),
            "->10.1.1.1 TCP 1, ->10.96.0.1 TCP 1, +>10.96.5.1 TCP 1",
        ),
        (
            "deny of the local host holds",
            cnp("ingressDeny:\n- {fromEntities: [host]}\n"),
            "-<host TCP 80",
        ),
        ("empty deny element isolates", cnp("ingressDeny: [{}]"), "-<a TCP 1, +<host TCP 1"),
        (
            "enableDefaultDeny false",
            cnp(f"enableDefaultDeny: {{ingress: false}}\ningressDeny:\n- {{{A}}}\n"),
            "-<a TCP 1, +<b TCP 1",
        ),
        (
            "enableDefaultDeny true without rules",
            cnp("enableDefaultDeny: {ingress: true, egress: true}"),
            "+<a TCP 1, +>a TCP 1",
        ),
        (
            "enableDefaultDeny false is overruled by another rule",
            cnp(f"enableDefaultDeny: {{ingress: false}}\n{ingress(A)}") + cnp(ingress(T80), "q"),
            "+<a TCP 1, +<b TCP 80, -<b TCP 81",
        ),
        (
            "83 spec and specs",
            cnp(ingress(A)).replace("---", "")
            + f"specs:\n- endpointSelector: {{}}\n  ingress:\n  - {{{T80}}}\n",
            "+<a TCP 9, +<b TCP 80, -<b TCP 9",
        ),
        (
            "84 same name, other namespace",
            cnp(ingress(A)) + cnp("egress: [{}]").replace("{name: p}", "{name: p, namespace: x}"),
            "+<a TCP 9, -<b TCP 9, +>b TCP 9",
        ),
        (
            "an L7 part without proxy allows nothing",
            cnp(
                ingress(
                    'toPorts: [{ports: [{port: "80", protocol: TCP}], rules: {http: [{}]}}, '
                    '{ports: [{port: "81", protocol: TCP}]}]'
                )
            ),
            "-<a TCP 80, +<a TCP 81",
        ),
        ("51 FQDN", cnp(egress("toFQDNs: [{matchName: a.org}]")), "->192.0.2.7 TCP 443"),
        (
            "19 ICMP",
            cnp(ingress(A)) + cnp(ingress(T80), "q"),
            "+<a ICMP 8, -<b ICMP 8",
        ),
        (
            "20 ports are the backend's",
            cnp(egress(T80)),
            "+>a TCP 80, ->a TCP 8080",
        ),
        (
            "23 a node inside a CIDR",
            cnp(egress("toCIDR: [0.0.0.0/0]")),
            "->node TCP 1, ->host TCP 1, +>192.0.2.7 TCP 1",
        ),
        (
            "30 the local host is no other node",
            cnp(ingress("fromEntities: [host]")),
            "-<node TCP 1",
        ),
        (
            "32 remote nodes",
            cnp(ingress("fromEntities: [remote-node]")),
            "+<node TCP 1, -<a TCP 1",
        ),
        ("39 http", cnp(ingress(http("{method: GET, path: /public}"))), "7<a TCP 80, -<a TCP 81"),
        ("40 http with $", cnp(ingress(http("{method: GET, path: /public$}"))), "7<a TCP 80"),
        ("41 any request", cnp(ingress(http("{}"))), "7<a TCP 80, -<a TCP 81"),
        ("42 L7 and L4", cnp(ingress(http("{path: /}"), T80)), "*<a TCP 80, *<world4 TCP 80"),
        (
            "43 L7 for all, L4 for one",
            cnp(ingress(http("{path: /}"), f"{A}, {T80}")),
            "*<a TCP 80, 7<b TCP 80, 7<world4 TCP 80",
        ),
        (
            "44 L7 for one, L4 for all",
            cnp(ingress(f"{A}, {http('{path: /}')}", T80)),
            "*<a TCP 80, +<b TCP 80",
        ),
        (
            "45 L3 and L7 for one",
            cnp(ingress(A, f"{A}, {http('{path: /}')}")),
            "*<a TCP 80, +<a TCP 81, -<b TCP 80",
        ),
        (
            "46 L3 for one, L7 for another",
            cnp(ingress(A, f"{B}, {http('{path: /}')}")),
            "+<a TCP 80, 7<b TCP 80, -<b TCP 81",
        ),
        (
            "47 two parsers of different peers",
            cnp(ingress(f"{A}, {http('{path: /}')}", f"{B}, {KAFKA}")),
            "7<a TCP 80, 7<b TCP 80, -<world4 TCP 80",
        ),
        (
            "two parsers of the same peers",
            cnp(ingress(f"{A}, {http('{path: /}')}", f"{A}, {KAFKA}", f"{B}, {KAFKA}")),
            "-<a TCP 80, 7<b TCP 80",
        ),
        (
            "two parsers of the same peers, and everyone's",
            cnp(ingress(http("{path: /}"), f"{A}, {KAFKA}")),
            "7<a TCP 80, 7<b TCP 80",
        ),
        (
            "L7 on a range, plain on one port of it",
            cnp(ingress(f"{A}, {http('{path: /}', RANGE)}", T80)),
            "*<a TCP 80, 7<a TCP 81, +<b TCP 80, -<b TCP 81",
        ),
        (
            "plain on every port, L7 for everyone on one",
            cnp(ingress(f'{A}, toPorts: [{{ports: [{{port: "0"}}]}}]', http("{path: /}"))),
            "*<a TCP 80, +<a TCP 81, 7<b TCP 80",
        ),
        (
            "deny beats L7",
            cnp(ingress(http("{path: /}")) + f"ingressDeny:\n- {{{A}}}\n"),
            "-<a TCP 80, 7<b TCP 80",
        ),
        (
            "62 NetworkPolicy, ingress isolated",
            np("policyTypes: [Ingress]"),
            "-<a TCP 1, +>a TCP 1, +<host TCP 1",
        ),
        ("63 NetworkPolicy, egress isolated", np("policyTypes: [Egress]"), "+<a TCP 1, ->a TCP 1"),
        ("64 NetworkPolicy ingress [{}]", np("ingress: [{}]"), "+<a TCP 1, +<world4 TCP 1"),
        (
            "65 NetworkPolicy namespaceSelector {}",
            np("ingress: [{from: [{namespaceSelector: {}}]}]"),
            "+<a TCP 1, +<a in x TCP 1, -<world4 TCP 1",
        ),
        (
            "66 NetworkPolicy, both selectors in one peer",
            np(f"ingress: [{{from: [{{{SPACES}, podSelector: {{matchLabels: {{app: a}}}}}}]}}]"),
            "+<a in x TCP 1, -<b in x TCP 1, -<a TCP 1",
        ),
        (
            "66 NetworkPolicy, both selectors in two peers",
            np(
                f"ingress: [{{from: [{{{SPACES}}}, {{podSelector: {{matchLabels: {{app: a}}}}}}]}}]"
            ),
            "+<a in x TCP 1, +<b in x TCP 1, +<a TCP 1, -<b TCP 1",
        ),
        (
            "67 NetworkPolicy ipBlock with ports",
            np(
                "ingress: [{from: [{ipBlock: {cidr: 192.0.2.0/24}}], "
                "ports: [{port: 80, protocol: TCP}]}]"
            ),
            "+<192.0.2.7 TCP 80, -<192.0.2.7 TCP 81, -<198.51.100.1 TCP 80",
        ),
        (
            "an audit policy isolates nobody",
            audited(cnp(ingress(A))),
            "!<b TCP 1, +<a TCP 1, +>b TCP 1, +<host TCP 1",
        ),
        (
            "an audit policy beside one that isolates allows, and isolates no more",
            audited(cnp(ingress(A))) + cnp(ingress(f"{B}, {T80}"), "q"),
            "+<a TCP 1, +<b TCP 80, -<b TCP 81",
        ),
        (
            "an audit denial is reported where it meets what is allowed",
            audited(cnp(f"ingressDeny:\n- {{{A}}}\n")) + cnp(ingress(T80), "q"),
            "!<a TCP 80, -<a TCP 81, +<b TCP 80, -<b TCP 81",
        ),
        (
            "a denial holds beside one that only audits",
            audited(cnp(f"ingressDeny:\n- {{{A}}}\n")) + cnp(f"ingressDeny:\n- {{{A}}}\n", "q"),
            "-<a TCP 80, -<b TCP 80",
        ),
        (
            "an audit denial of a port inside what is allowed",
            audited(cnp(f"ingressDeny:\n- {{{T80}}}\n")) + cnp(ingress(A, f"{B}, {T80}"), "q"),
            "!<a TCP 80, +<a TCP 81, !<b TCP 80, -<b TCP 81",
        ),
        (
            "an audit denial where L7 rules are",
            audited(cnp(f"ingressDeny:\n- {{{A}}}\n")) + cnp(ingress(http("{path: /}")), "q"),
            "!<a TCP 80, 7<b TCP 80",
        ),
        (
            "a named port allows nothing",
            cnp(ingress(f"{A}, toPorts: [{{ports: [{{port: http}}]}}]")),
            "-<a TCP 80",
        ),
    ]
    return [pytest.param(name, docs, probes, id=name) for name, docs, probes in rows]


def probe(engine: PolicyEngine, subject: Labels, text: str) -> None:
    sign, arrow, rest = text[0], text[1], text[2:]
    name, proto, port = rest.rsplit(" ", 2)
    direction: Any = "ingress" if arrow == "<" else "egress"
    verdict = engine.verdict(subject, PEERS[name], direction, proto, int(port))
    found = "-"
    if verdict.allowed and verdict.audit:
        found = "!"
    elif verdict.allowed:
        found = "+" if verdict.l7 is None else "*" if verdict.l7.allows_all else "7"
    assert found == sign, (text, verdict.reason)
    assert verdict.reason.endswith(".")


@pytest.mark.parametrize(("case", "documents", "probes"), cases())
def test_case(case: str, documents: str, probes: str) -> None:
    engine = PolicyEngine(enforcers=() if "without proxy" in case else ALL_PARSERS)
    engine.set_documents(parse(documents) if documents else ())
    for text in probes.split(", "):
        probe(engine, E, text)


def test_modes() -> None:
    deny = parse(cnp("ingress: [{}]\negress: [{}]"))
    always = PolicyEngine("always")
    for text in ("-<a TCP 1", "->a TCP 1", "+<host TCP 1"):  # 69
        probe(always, E, text)
    never = PolicyEngine("never")
    never.set_documents(deny)
    for text in ("+<a TCP 1", "+>a TCP 1"):  # 70
        probe(never, E, text)
    loose = parse(cnp(f"enableDefaultDeny: {{ingress: false}}\n{ingress(A)}"))
    always.set_documents(loose)
    probe(always, E, "-<b TCP 1")
    assert always.verdict(E, PEERS["b"], "ingress", 6, 1, mode="default").allowed


def test_localhost_by_policy() -> None:
    engine = PolicyEngine(allow_localhost=False)
    engine.set_documents(parse(cnp("ingress: [{}]")))
    probe(engine, E, "-<host TCP 1")  # 34


def test_init_is_isolated_until_a_rule_selects_it() -> None:
    engine = PolicyEngine()
    init = reserved_labels(5)
    for text in ("-<a TCP 1", "->a TCP 1", "+<host TCP 1"):  # 71
        probe(engine, init, text)
    engine.set_documents(
        parse(
            cnp(
                egress('toEntities: [all], toPorts: [{ports: [{port: "53", protocol: UDP}]}]'),
                selector='{matchLabels: {"reserved:init": ""}}',
            )
        )
    )
    for text in ("+>world4 UDP 53", "+>a UDP 53", "->a TCP 53"):  # 72
        probe(engine, init, text)


def test_a_rule_of_another_namespace_is_not_about_us() -> None:
    engine = PolicyEngine()
    engine.set_documents(parse(cnp("ingress: [{}]").replace("name: p", "name: p, namespace: x")))
    probe(engine, E, "+<a TCP 1")


def fill(engine: PolicyEngine) -> dict[str, int]:
    """Give every peer an identity, as a cluster would; gives them by name."""
    numbers = {name: 256 + i for i, name in enumerate(PEERS)}
    for name, labels in PEERS.items():
        engine.add_identity(numbers[name], labels)
    return numbers


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        # 48, 49, 50, 57
        (egress('toPorts: [{ports: [{port: "80", protocol: ANY}], rules: {kafka: [{}]}}]'), "TCP"),
        (ingress('toPorts: [{ports: [{port: "80"}], rules: {http: [{}]}}]'), "TCP"),
        (
            ingress('toPorts: [{ports: [{port: "53", protocol: UDP}], rules: {dns: [{}]}}]'),
            "egress",
        ),
        (egress("toFQDNs: [{matchName: a.org}], toEndpoints: [{}]"), "toEndpoints"),
    ],
    ids=["48 kafka of ANY", "49 http of ANY", "50 dns on ingress", "57 two kinds of peers"],
)
def test_refused(rule: str, message: str) -> None:
    result = parse_documents(cnp(rule), source="case.yaml", default_namespace="d")
    assert result.documents == ()
    assert any(message in str(fault) for fault in result.faults), result.faults


def test_names() -> None:
    """52, 53, 58, 59: what DNS answered may be reached, and nothing else."""
    engine = PolicyEngine()
    name, pattern = FQDNSelector("cilium.io"), FQDNSelector(match_pattern="*.cilium.io")
    engine.set_documents(parse(cnp(egress("toFQDNs: [{matchName: cilium.io}]"))))
    assert engine.set_fqdn(name, [ip_network("192.0.2.7")]) == frozenset()
    for text in ("+>192.0.2.7 TCP 443", "->198.51.100.1 TCP 443", "->world4 TCP 443"):
        probe(engine, E, text)
    assert engine.cidr_prefixes() == {ip_network("192.0.2.7")}
    assert [pattern.matches_name(x) for x in ("sub.cilium.io", "cilium.io", "a.b.cilium.io")] == [
        True, False, False,
    ]  # fmt: skip
    engine.set_documents(
        parse(
            cnp(egress(f"toFQDNs: [{{matchPattern: '*.cilium.io'}}], {T80}"))
            + cnp(egress('toCIDR: [192.0.2.0/24], toPorts: [{ports: [{port: "81"}]}]'), "q")
        )
    )
    assert engine.set_fqdn(pattern, [ip_network("192.0.2.7")]) == frozenset()
    for text in ("+>192.0.2.7 TCP 80", "+>192.0.2.7 UDP 81", "->192.0.2.7 TCP 443"):
        probe(engine, E, text)


def test_a_name_that_resolves_otherwise_changes_whom_it_is_about() -> None:
    engine = PolicyEngine()
    selector = FQDNSelector("cilium.io")
    numbers = fill(engine)
    engine.set_documents(parse(cnp(egress("toFQDNs: [{matchName: cilium.io}]"))))
    why = "toFQDNs needs DNS answers, and nobody watches DNS"
    first = engine.resolve(E)
    assert [x.why for x in first.unenforced] == [why]
    assert engine.set_fqdn(selector, [ip_network("192.0.2.7")]) == {E}
    second = engine.resolve(E)
    assert second.unenforced == ()
    assert second.mapstate.allows(numbers["192.0.2.7"], True, 6, 443)
    assert engine.set_fqdn(selector, [ip_network("198.51.100.1")]) == {E}
    third = engine.resolve(E).mapstate
    delta = third.delta(second.mapstate)
    assert {key.identity for key in delta.upserts} == {numbers["198.51.100.1"]}
    assert {key.identity for key in delta.deletes} == {numbers["192.0.2.7"]}
    assert engine.set_fqdn(FQDNSelector("other.io"), [ip_network("192.0.2.7")]) == frozenset()


def test_dns_names() -> None:
    """54, 55, 56: which questions a DNS rule lets pass."""
    pattern, name = DNSRule(match_pattern="*.cilium.io"), DNSRule("cilium.io")
    assert not pattern.matches_name("cilium.io")
    assert pattern.matches_name("sub.cilium.io")
    assert name.matches_name("CILIUM.IO.")
    assert not name.matches_name("cilium.io.d.svc.cluster.local")


def test_services() -> None:
    """60, 61: backends that are no endpoints; a service with a selector has none of those."""
    engine = PolicyEngine()
    numbers = fill(engine)
    engine.set_documents(
        parse(cnp(egress("toServices: [{k8sService: {serviceName: s, namespace: d}}]")))
    )
    assert [x.why for x in engine.resolve(E).unenforced] == [
        "toServices needs services, and nobody watches them"
    ]
    assert engine.set_services([Service("d", "s")]) == {E}
    assert not engine.resolve(E).mapstate.allows(numbers["192.0.2.7"], True, 6, 1)
    backends = frozenset([ip_network("192.0.2.7")])
    assert engine.set_services([Service("x", "s", backends=backends)]) == {E}
    assert not engine.resolve(E).mapstate.allows(numbers["192.0.2.7"], True, 6, 1)
    engine.set_services([Service("d", "s", backends=backends)])
    assert engine.resolve(E).mapstate.allows(numbers["192.0.2.7"], True, 17, 1)
    assert not engine.resolve(E).mapstate.allows(numbers["198.51.100.1"], True, 17, 1)
    engine.set_documents(
        parse(
            cnp(egress("toServices: [{k8sServiceSelector: {selector: {matchLabels: {tier: db}}}}]"))
        )
    )
    assert not engine.resolve(E).mapstate.allows(numbers["192.0.2.7"], True, 17, 1)
    engine.set_services([Service("d", "s", Labels.parse(["k8s:tier=db"]), backends)])
    assert engine.resolve(E).mapstate.allows(numbers["192.0.2.7"], True, 17, 1)


def test_named_ports() -> None:
    """68: a port by the name that the destination gives it, and with its own protocol."""
    engine = PolicyEngine()
    engine.set_documents(parse(np("ingress: [{ports: [{port: http}]}]")))
    names = {"http": (8080, 6)}
    assert engine.verdict(E, PEERS["a"], "ingress", 6, 8080, named_ports=names).allowed
    for other in ({"http": (8080, 17)}, {"web": (8080, 6)}, {}):
        assert not engine.verdict(E, PEERS["a"], "ingress", 6, 8080, named_ports=other).allowed
    assert [x.why for x in engine.resolve(E).unenforced] == [
        "the endpoint has no port named 'http'"
    ]
    assert engine.resolve(E, named_ports=names).unenforced == ()

    engine.set_documents(parse(cnp(egress(f"{A.replace('from', 'to')}, {NAMED}"))))
    assert [x.why for x in engine.resolve(E).unenforced] == ["no endpoint has a port named 'http'"]
    a, b = PEERS["a"], PEERS["b"]
    assert engine.verdict(E, a, "egress", 6, 8080, peer_ports=names).allowed
    assert not engine.verdict(E, b, "egress", 6, 8080, peer_ports=names).allowed
    assert engine.trace(E, a, 6, 8080, dst_ports=names).allowed
    assert not engine.trace(E, a, 6, 8080).allowed
    numbers = fill(engine)
    state = engine.resolve(E).mapstate
    assert not state.allows(numbers["a"], True, 6, 8080)
    assert engine.set_port_names(numbers["a"], names) == {E}
    assert engine.set_port_names(numbers["b"], names) == frozenset()
    state = engine.resolve(E).mapstate
    assert state.allows(numbers["a"], True, 6, 8080)
    assert not state.allows(numbers["b"], True, 6, 8080)
    assert not state.allows(numbers["a in x"], True, 6, 8080)
    assert engine.verdict(E, numbers["a"], "egress", 6, 8080).allowed
    assert engine.set_port_names(numbers["a"], {"http": (8081, 6)}) == {E}
    state = engine.resolve(E).mapstate
    assert state.allows(numbers["a"], True, 6, 8081)
    assert not state.allows(numbers["a"], True, 6, 8080)

    # Of everyone: each peer's own.
    engine.set_documents(parse(cnp(egress(NAMED))))
    state = engine.resolve(E).mapstate
    assert state.allows(numbers["a"], True, 6, 8081)
    assert state.allows(numbers["b"], True, 6, 8080)
    assert not state.allows(numbers["b"], True, 6, 8081)
    assert not state.allows(numbers["world4"], True, 6, 8080)


def test_open_and_proxied() -> None:
    """80: L7 rules restrict also where nothing isolates; the rest stays open."""
    engine = PolicyEngine(enforcers=ALL_PARSERS)
    rule = 'toPorts: [{ports: [{port: "53", protocol: UDP}], rules: {dns: [{matchPattern: "*"}]}}]'
    engine.set_documents(parse(cnp("enableDefaultDeny: {egress: false}\n" + egress(rule))))
    for text in ("7>a UDP 53", "+>a UDP 54", "+>world4 TCP 53"):
        probe(engine, E, text)


def test_visibility() -> None:
    """81, 82, 82a: an annotation shows to proxies what no policy isolates; it restricts nothing."""
    engine = PolicyEngine(enforcers=ALL_PARSERS)
    dns = PortRule((L4(17, 53, 53),), l7=L7Rules("dns"), path="egress")

    def found(identity: int, port: int) -> str:
        match = engine.resolve(E, visibility=[dns]).mapstate.lookup(identity, True, 17, port)
        if match is None or match.entry.deny:
            return "-"
        return "+" if match.entry.l7 is None else "*" if match.entry.l7.allows_all else "7"

    numbers = fill(engine)
    a = numbers["a"]
    assert (found(a, 53), found(a, 54)) == ("*", "+")
    assert engine.resolve(E).mapstate.l7 == frozenset()
    engine.set_documents(parse(cnp(egress("toEndpoints: [{matchLabels: {app: a}}]"))))
    assert (found(a, 53), found(numbers["b"], 53)) == ("+", "-")
    engine.set_documents(parse(cnp(ingress(A))))
    assert (found(a, 53), found(a, 54)) == ("*", "+")
    engine.set_documents(parse(audited(cnp(egress(f"{A.replace('from', 'to')}")))))
    assert (found(a, 53), found(numbers["b"], 53)) == ("*", "*")
    state = engine.resolve(E, visibility=[dns]).mapstate
    reported = {x: state.lookup(numbers[x], True, 17, 53) for x in "ab"}
    assert [x for x, match in reported.items() if match and match.entry.audit] == ["b"]
    engine.set_enforcers(())
    assert found(a, 53) == "+"


def test_the_host_passes_the_proxy() -> None:
    """85: what the local host asks is not judged, but seen."""
    rules = parse(cnp(ingress(f"fromEntities: [host, world], {http('{path: /}')}")))
    engine = PolicyEngine(enforcers=ALL_PARSERS)
    engine.set_documents(rules)
    for text in ("*<host TCP 80", "7<world4 TCP 80", "+<host TCP 81"):
        probe(engine, E, text)
    engine = PolicyEngine(allow_localhost=False, enforcers=ALL_PARSERS)
    engine.set_documents(rules)
    for text in ("7<host TCP 80", "-<host TCP 81"):
        probe(engine, E, text)


@pytest.mark.parametrize(
    ("rules", "peer", "request_", "passing"),
    [
        (http("{method: GET, path: /public}"), "a", HTTPRequest("GET", "/public"), True),  # 39
        (http("{method: GET, path: /public}"), "a", HTTPRequest("GET", "/public/x"), False),
        (http("{method: GET, path: /public}"), "a", HTTPRequest("POST", "/public"), False),
        (http("{method: GET, path: /public$}"), "a", HTTPRequest("GET", "/public"), True),  # 40
        (http("{}"), "a", HTTPRequest("PUT", "/any?x=y"), True),  # 41
        (f"{http('{path: /}')}}}\n- {{{T80}", "a", HTTPRequest("GET", "/x"), True),  # 42
        (f"{http('{path: /}')}}}\n- {{{A}, {T80}", "a", HTTPRequest("GET", "/x"), True),  # 43
        (f"{http('{path: /}')}}}\n- {{{A}, {T80}", "b", HTTPRequest("GET", "/x"), False),
        (f"{http('{path: /}')}}}\n- {{{A}, {T80}", "b", HTTPRequest("GET", "/"), True),
    ],
)
def test_requests(rules: str, peer: str, request_: HTTPRequest, *, passing: bool) -> None:
    """39, 40, 41, 42, 43: what the proxy is given lets pass what the rules say together."""
    engine = PolicyEngine(enforcers=ALL_PARSERS)
    engine.set_documents(parse(cnp(ingress(rules))))
    found = engine.verdict(E, PEERS[peer], "ingress", 6, 80).l7
    assert found is not None
    allowed = any(x.rule is None or passes(x.rule, request_) for x in found.rules)
    assert allowed is passing


def test_what_a_proxy_is_given() -> None:
    engine = PolicyEngine(enforcers=ALL_PARSERS)
    engine.set_documents(
        parse(cnp(ingress(http("{path: /x}"), f"{A}, {http('{method: GET}, {path: /x}')}", A)))
    )
    common = engine.verdict(E, PEERS["b"], "ingress", 6, 80)
    assert common.l7 is not None
    assert [x.rule for x in common.l7.rules] == [HTTPRule(path="/x")]
    (ref,) = common.rules
    assert common.l7.rules[0].rule_id == ref.rule_id
    assert "http rules" in common.reason
    mine = engine.verdict(E, PEERS["a"], "ingress", 6, 80).l7
    assert mine is not None
    assert {x.rule for x in mine.rules} == {HTTPRule(path="/x"), HTTPRule(method="GET"), None}
    assert mine.digest != common.l7.digest
    # Written down: agents and proxies of different releases compare digests.
    assert L7Set("http", False, (L7Entry(RuleID(7), HTTPRule(path="/x")),)).digest == (
        "71a6f11fabc115f67bb90cacb94e4d5c"
    )


def test_the_node_is_judged_by_rules_about_nodes() -> None:
    engine = PolicyEngine("always")
    node = Labels.parse(["reserved:host", "k8s:type=worker"])
    engine.set_documents(
        parse(
            cnp(ingress(T80), selector="{}").replace(
                "CiliumNetworkPolicy", "CiliumClusterwideNetworkPolicy"
            )
        )
    )
    assert not engine.judges(node)
    probe(engine, node, "+<a TCP 81")  # no mode isolates a node
    engine.set_documents(
        parse(ccnp(ingress(T80)).replace("endpointSelector: {matchLabels: {app: e}}", NODES))
    )
    assert engine.judges(node)
    for text in ("+<a TCP 80", "-<a TCP 81", "+>a TCP 81", "-<node TCP 81"):
        probe(engine, node, text)
    assert not engine.judges(Labels.parse(["reserved:host", "k8s:type=other"]))
    probe(engine, E, "-<a TCP 80")
    assert engine.trace(PEERS["b"], node, 6, 81, mode="default").ingress.default_deny


NODES = "nodeSelector: {matchLabels: {type: worker}}"
NAMED = "toPorts: [{ports: [{port: http, protocol: TCP}]}]"

# Cases that are not about what a policy means, and what shows them.
ELSEWHERE = {
    "73": "tests/datapath/test_datapath_icmp.py",
    "74": "tests/datapath/test_datapath_fragments.py",
    "75": "tests/datapath/test_datapath_drops.py",
    "76": "tests/datapath/test_datapath_conntrack.py",
}
# Where we decide otherwise than 1.7, and why. docs/design/policy.md has the same table.
DIFFERS = {
    "8": "`{}` of a clusterwide policy is every endpoint, as in 9; only rule lists say everyone",
    "14": "a list of peers that is given and empty selects nobody, as since 1.16",
    "18": "a port without protocol is of SCTP, too",
    "26": "each /0 is the world of its own family",
    "28": "health endpoints are part of the cluster",
    "30": "other nodes always have an identity of their own, so `host` is the local host",
    "32": "so `remote-node` selects other nodes",
    "47": "each peer has a redirect; where parsers meet on one peer's row, none is granted",
    "67": "an ipBlock may have ports; 1.7 refused the object, and left open what it was to isolate",
    "68": "named ports are resolved at the destination; 1.7 refused the object likewise",
    "74": "later fragments have the verdict of the first",
    "75": "nothing is encapsulated yet, so no port is refused",
}


def test_every_case_is_shown() -> None:
    """By its number in a test's name or docstring, or by a test of another kind."""
    wanted = {str(n) for n in range(1, 86)} | {"82a"}
    text = Path(__file__).read_text()
    shown = {row.values[0].split()[0] for row in cases()}
    for function in re.findall(r'"""([0-9][0-9a, ]*):', text):
        shown.update(function.split(", "))
    shown.update(re.findall(r'"(\d+) [a-z]', text))
    shown.update(re.findall(r"# (\d+)$", text, re.MULTILINE))
    assert wanted - shown == ELSEWHERE.keys()
    assert all((ROOT / path).is_file() for path in ELSEWHERE.values())


def test_the_differences_are_written_down() -> None:
    text = (ROOT / "docs/design/policy.md").read_text()
    rows = dict(re.findall(r"^\| (\d+[a-z]?) \| (.*) \|$", text, re.MULTILINE))
    assert rows == DIFFERS
