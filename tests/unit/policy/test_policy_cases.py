"""The language's cases, one probe each: what a policy means for endpoint E (app=e, namespace d).

Numbers are those of the reference's case table where a case is in it; L7, FQDN, service, Kubernetes
NetworkPolicy and proxy cases are not here, for nothing enforces them yet.
"""

from __future__ import annotations

from typing import Any

import pytest

from cilia.identity import cidr_labels, reserved_labels
from cilia.labels import Labels
from cilia.policy import PolicyEngine, parse_documents

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


def raw(body: str) -> str:
    lines = "".join(f"  {line}\n" for line in body.splitlines())
    return f"- endpointSelector: {{matchLabels: {{app: e}}}}\n{lines}---\n"


def ingress(*elements: str) -> str:
    return "ingress:\n" + "".join(f"- {{{x}}}\n" for x in elements)


def egress(*elements: str) -> str:
    return "egress:\n" + "".join(f"- {{{x}}}\n" for x in elements)


def cases() -> list[Any]:
    """(id, documents, probes); a probe is `[<|>] peer proto port` and its verdict, + or -."""
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
            "a named port allows nothing",
            cnp(ingress(f"{A}, toPorts: [{{ports: [{{port: http}}]}}]")),
            "-<a TCP 80",
        ),
    ]
    return [pytest.param(docs, probes, id=name) for name, docs, probes in rows]


def probe(engine: PolicyEngine, subject: Labels, text: str) -> None:
    sign, arrow, rest = text[0], text[1], text[2:]
    name, proto, port = rest.rsplit(" ", 2)
    direction: Any = "ingress" if arrow == "<" else "egress"
    verdict = engine.verdict(subject, PEERS[name], direction, proto, int(port))
    assert verdict.allowed == (sign == "+"), (text, verdict.reason)
    assert verdict.reason.endswith(".")


@pytest.mark.parametrize(("documents", "probes"), cases())
def test_case(documents: str, probes: str) -> None:
    engine = PolicyEngine()
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
