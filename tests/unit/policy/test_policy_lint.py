"""Warnings about what is legal and probably not meant; and silence where all is well."""

from __future__ import annotations

import pytest

from cilia.labels import Labels
from cilia.policy import Document, parse_documents
from cilia.policy.lint import Enforcers, lint
from tests.unit.policy.effort import calls

NS = "k8s:io.kubernetes.pod.namespace"
ENDPOINTS = {
    "d/e": Labels.parse(["k8s:app=e", f"{NS}=d"]),
    "d/a": Labels.parse(["k8s:app=a", f"{NS}=d"]),
    "x/a": Labels.parse(["k8s:app=a", f"{NS}=x"]),
}
A = "fromEndpoints: [{matchLabels: {app: a}}]"
WEB = 'toPorts: [{ports: [{port: "80", protocol: TCP}]}]'
WIDE = WEB.replace('"80"', '"70", endPort: 90')
GET = 'toPorts: [{ports: [{port: "80", protocol: TCP}], rules: {http: [{method: GET}]}}]'
DNS = 'toPorts: [{ports: [{port: "53"}], rules: {dns: [{matchPattern: "*"}]}}]'


def cnp(body: str, name: str = "p", subject: str = "{matchLabels: {app: e}}") -> str:
    lines = "".join(f"  {line}\n" for line in body.splitlines())
    return (
        "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\n"
        f"metadata: {{name: {name}, namespace: d}}\n"
        f"spec:\n  endpointSelector: {subject}\n{lines}---\n"
    )


def read(text: str) -> tuple[Document, ...]:
    result = parse_documents(text, source="p.yaml")
    assert result.faults == ()
    return result.documents


def ingress(*elements: str) -> str:
    return "ingress:\n" + "".join(f"- {{{x}}}\n" for x in elements)


def egress(*elements: str) -> str:
    return "egress:\n" + "".join(f"- {{{x}}}\n" for x in elements)


def said(text: str, *, endpoints: bool = False) -> list[str]:
    found = lint(read(text), ENDPOINTS if endpoints else None)
    return [f"{x.path}: {x.message}" for x in found if "default deny" not in x.message]


@pytest.mark.parametrize(
    ("text", "path", "message"),
    [
        (
            cnp(ingress(A), subject="{matchLabels: {app: e}, matchExpressions: "
            "[{key: app, operator: DoesNotExist}]}"),
            "spec.endpointSelector",
            "selects nothing: app=e contradicts app does not exist",
        ),
        (
            cnp(ingress("fromEndpoints: [{matchLabels: {app: a}, matchExpressions: "
                        "[{key: app, operator: NotIn, values: [a]}]}]")),
            "spec.ingress[0]",
            "a peer selects nothing",
        ),
        (cnp(ingress("fromEndpoints: [{}]")), "spec.ingress[0]", "fromEntities: [all]"),
        (cnp(egress("toEndpoints: [{}]")), "spec.egress[0]", "toEntities: [all]"),
        (cnp("ingressDeny: [{fromEntities: [world]}]"), "spec.ingressDeny", "isolate as well"),
        (cnp(ingress("fromRequires: [{matchLabels: {a: b}}]")), "spec.ingress[0]", "only narrow"),
        (cnp(egress("toFQDNs: [{matchName: a.b}]")), "spec.egress[0].toFQDNs", "never get"),
        (
            cnp(egress(DNS.replace('"53"', '"53", protocol: TCP'))),
            "spec.egress[0].toPorts[0]",
            "asked over UDP",
        ),
        # Shadows: by wider peers, wider ports, a wider subject, and by a denial.
        (cnp(ingress(A, A)), "spec.ingress[1]", "p spec.ingress[0] (p.yaml:7) covers it"),
        (cnp(ingress(f"{A}, {WEB}", A)), "spec.ingress[0]", "covers it"),
        (cnp(ingress(f"{A}, {WEB}", WEB)), "spec.ingress[0]", "covers it"),
        (
            cnp(ingress("fromEndpoints: [{matchLabels: {app: a, b: c}}]", A)),
            "spec.ingress[0]",
            "covers it",
        ),
        (cnp(ingress(A, "fromEntities: [all]")), "spec.ingress[0]", "covers it"),
        (cnp(egress("toCIDR: [10.1.0.0/16]", "toCIDR: [10.0.0.0/8]")), "spec.egress[0]", "covers"),
        (cnp(egress("toCIDR: [10.1.0.0/16]", "toEntities: [world]")), "spec.egress[0]", "covers"),
        (
            cnp(ingress(f"{A}, {WEB}"))
            + cnp(ingress(f"{A}, {WIDE}"), "q"),
            "spec.ingress[0]",
            "CiliumNetworkPolicy d/q spec.ingress[0] (p.yaml:15) covers it",
        ),
        (
            cnp(ingress("fromEndpoints: [{matchLabels: {b: c}}]"))
            + cnp(ingress("fromEndpoints: [{matchLabels: {b: c}}]"), "q", "{}"),
            "spec.ingress[0]",
            "d/q spec.ingress[0]",
        ),
        (
            cnp(ingress(f"{A}, {WEB}") + "ingressDeny:\n- {fromEntities: [all]}"),
            "spec.ingress[0]",
            "allows nothing: CiliumNetworkPolicy d/p spec.ingressDeny[0] (p.yaml:9) denies all",
        ),
        (cnp(ingress(f"{A}, {GET}", f"{A}, {WEB}")), "spec.ingress[0]", "rules restrict nothing"),
    ],
)  # fmt: skip
def test_said(text: str, path: str, message: str) -> None:
    found = [x for x in said(text) if x.startswith(f"{path}: ")]
    assert len(found) == 1, said(text)
    assert message in found[0]


@pytest.mark.parametrize(
    "text",
    [
        cnp(ingress(A, WEB)),
        cnp(ingress(f"{A}, {WEB}", f"{A}, {WEB.replace('80', '81')}")),
        cnp(ingress(f"{A}, {WEB}") + egress(f"toEndpoints: [{{matchLabels: {{app: a}}}}], {WEB}")),
        cnp(ingress(A)) + cnp(ingress(A), "q", "{matchLabels: {app: f}}"),
        # The exception of one is not in the other; L7 rules do not cover, plain ones are covered.
        cnp(egress("toCIDR: [10.1.0.0/16]",
                   "toCIDRSet: [{cidr: 10.0.0.0/8, except: [10.1.0.0/16]}]")),
        cnp(ingress(f"{A}, {WEB}", GET)),
        # Requirements narrow one entry and not the other.
        cnp(ingress(f"{A}, fromRequires: [{{matchLabels: {{x: y}}}}]", "fromEntities: [all]")),
        cnp(egress("toFQDNs: [{matchName: a.b}]", DNS)),
        cnp(egress("toFQDNs: [{matchName: a.b}]")) + cnp(egress(DNS), "q", "{}"),
        cnp("ingressDeny: [{fromEntities: [world]}]\nenableDefaultDeny: {ingress: false}"),
        cnp(ingress("{}".strip("{}"))),
    ],
)  # fmt: skip
def test_nothing_said(text: str) -> None:
    assert said(text) == []


def test_selectors_are_compared_with_the_endpoints_there_are() -> None:
    text = cnp(
        ingress("fromEndpoints: [{matchLabels: {app: z}}]", A), subject="{matchLabels: {app: y}}"
    )
    assert said(text) == []
    assert said(text, endpoints=True) == [
        "spec.endpointSelector: selects none of the endpoints: app=y, "
        "k8s:io.kubernetes.pod.namespace=d",
        "spec.ingress[0]: a peer selects none of the endpoints: app=z, "
        "k8s:io.kubernetes.pod.namespace=d",
    ]


def test_who_becomes_isolated() -> None:
    first, second = read(cnp(ingress(A)) + cnp(ingress(A, WEB), "q", "{}"))

    def flips(documents: list[Document], before: list[Document]) -> list[str]:
        found = lint(documents, ENDPOINTS, before=before)
        return [f"{x.document} {x.path}: {x.message}" for x in found if "puts" in x.message]

    assert flips([first], []) == [
        "CiliumNetworkPolicy d/p spec.ingress: puts d/e in default deny: ingress to them that no "
        "rule allows is denied"
    ]
    assert flips([second], [first]) == [
        "CiliumNetworkPolicy d/q spec.ingress: puts d/a in default deny: ingress to them that no "
        "rule allows is denied"
    ]
    assert flips([first], [second]) == []


def test_a_document_shadowed_by_one_in_force() -> None:
    new, old = read(cnp(ingress(f"{A}, {WEB}")) + cnp(ingress(A), "q"))
    (found,) = lint([new], before=[old])
    assert "d/q spec.ingress[0]" in found.message
    assert [x.document for x in lint([old], before=[new])] == []


def test_effort_grows_with_the_rules_and_not_with_their_pairs() -> None:
    def effort(count: int) -> int:
        rules = "".join(
            f"- {{endpointSelector: {{matchLabels: {{app: a{i % 100}}}}}, ingress: "
            f"[{{fromEndpoints: [{{matchLabels: {{app: b{i}, tier: c}}}}]}}]}}\n"
            for i in range(count)
        )
        documents = read(rules)
        assert lint(documents, ENDPOINTS)
        return calls(lambda: lint(documents, ENDPOINTS))

    assert effort(800) < 4.1 * effort(200)


@pytest.mark.parametrize(
    ("element", "message"),
    [
        ("toFQDNs: [{matchName: a.b}]", "nobody watches DNS"),
        ("toServices: [{k8sService: {serviceName: a}}]", "nobody watches them"),
        (GET, "http rules have no proxy"),
    ],
)
def test_who_would_enforce_it(element: str, message: str) -> None:
    (document,) = read(cnp(egress(element, DNS)))
    everybody = Enforcers(parsers=frozenset({"http", "dns"}), names=True, services=True)
    for enforcers in (None, everybody):
        assert not [
            x for x in lint([document], enforcers=enforcers) if "allows nothing" in x.message
        ]
    found = [x for x in lint([document], enforcers=Enforcers()) if x.path == "spec.egress[0]"]
    assert message in found[0].message


def test_what_nobody_ever_resolves_is_always_said() -> None:
    (document,) = read(cnp(egress("toGroups: [{aws: {}}]", "authentication: {mode: required}")))
    assert [x.message for x in lint([document])] == [
        "allows nothing: toGroups cannot be resolved",
        "allows nothing: mutual authentication is not supported yet",
    ]
