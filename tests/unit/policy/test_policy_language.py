"""Documents: what is accepted, and that every fault is named with its path and place."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cilia.policy import Kind, document_from_json, document_from_parts, parse_documents

ROOT = Path(__file__).parents[3]
HEAD = """\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata:
  name: p
spec:
  endpointSelector: {}
"""


def faults(text: str) -> list[tuple[str, str]]:
    result = parse_documents(text, source="p.yaml")
    assert not result.documents or not result.faults
    return [(fault.path, fault.message) for fault in result.faults]


def warnings(text: str) -> list[str]:
    result = parse_documents(text, source="p.yaml")
    assert result.faults == ()
    return [f"{x.path}: {x.message}" for x in result.warnings]


def test_every_fault_at_once_with_document_path_line_and_column() -> None:
    text = """\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata:
  name: one
spec:
  endpointSelector:
    matchLabel: {app: a}
  ingress:
  - fromEndpoint:
    - {}
    toPorts:
    - ports:
      - port: "99999"
        protocol: TPC
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: two, namespace: x}
spec:
  endpointSelector: {}
  egress:
  - toCIDR: [10.0.0.0/33]
    toEntities: [wrld]
"""
    result = parse_documents(text, source="p.yaml")
    assert result.documents == ()
    assert [(str(f.origin), f.origin.column, f.document, f.path) for f in result.faults] == [
        ("p.yaml:7", 5, "CiliumNetworkPolicy default/one", "spec.endpointSelector.matchLabel"),
        ("p.yaml:9", 5, "CiliumNetworkPolicy default/one", "spec.ingress[0].fromEndpoint"),
        (
            "p.yaml:13",
            15,
            "CiliumNetworkPolicy default/one",
            "spec.ingress[0].toPorts[0].ports[0].port",
        ),
        (
            "p.yaml:14",
            19,
            "CiliumNetworkPolicy default/one",
            "spec.ingress[0].toPorts[0].ports[0].protocol",
        ),
        ("p.yaml:22", 14, "CiliumNetworkPolicy x/two", "spec.egress[0].toCIDR[0]"),
        ("p.yaml:23", 17, "CiliumNetworkPolicy x/two", "spec.egress[0].toEntities"),
        ("p.yaml:23", 18, "CiliumNetworkPolicy x/two", "spec.egress[0].toEntities[0]"),
    ]
    said = [f.message for f in result.faults]
    assert said[0] == 'unknown field; did you mean "matchLabels"?'
    assert said[1] == 'unknown field; did you mean "fromEndpoints"?'
    assert "above 65535" in said[2]
    assert 'did you mean "TCP"' in said[3]
    assert "not an IPv4 or IPv6 CIDR" in said[4]
    assert "cannot stand together" in said[5]
    assert 'did you mean "world"' in said[6]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        # As in a NetworkPolicy. "nodeSelector", the nearest word, would be about the whole node.
        (
            "podSelector: {}",
            ["spec.podSelector: is a field of NetworkPolicy; here it is endpointS"],
        ),
        (
            "endpointSelector: {}\n  ingress:\n  - from: []\n    ports: []",
            [
                "spec.ingress[0].from: is a field of NetworkPolicy; here it is fromEndpoints",
                "spec.ingress[0].ports: belongs below toPorts",
            ],
        ),
        # Wrong indentation.
        (
            "endpointSelector:\n    matchLabels:\n    app: web",
            ["spec.endpointSelector.app: unknown field; if it belongs to matchLabels, which is em"],
        ),
        (
            "endpointSelector: {}\n  ingress:\n  - fromEndpoints:\n    - matchLabels: {a: b}\n"
            "      toPorts: []",
            ["spec.ingress[0].fromEndpoints[0].toPorts: is a field of spec.ingress[0]: indent"],
        ),
        ("endpointSelector: {}\n  egress: []\ningress: []", ["ingress: belongs below spec"]),
    ],
)
def test_what_was_meant_is_said(spec: str, expected: list[str]) -> None:
    head = "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: p}\nspec:\n  "
    text = f"{head}{spec}"
    said = [f"{x.path}: {x.message}" for x in parse_documents(text, source="p.yaml").faults]
    assert [text[: len(part)] for text, part in zip(said, expected, strict=True)] == expected


INGRESS = "  ingress:\n  - "
EGRESS = "  egress:\n  - "


@pytest.mark.parametrize(
    ("body", "path", "message"),
    [
        (INGRESS + "fromCIDRSet: [{cidr: 10.0.0.1}]", "[0].cidr", "no prefix length"),
        (
            INGRESS + "fromCIDRSet: [{cidr: 10.0.0.0/8, except: [11.0.0.0/8]}]",
            "except[0]",
            "not inside 10.0.0.0/8",
        ),
        (
            INGRESS + 'fromCIDRSet: [{cidr: "::/0", except: [10.0.0.0/8]}]',
            "except[0]",
            "not inside",
        ),
        (INGRESS + "fromCIDRSet: [{}]", "fromCIDRSet[0]", "exactly one of"),
        (INGRESS + "fromCIDRSet: [{cidr: null}]", "fromCIDRSet[0]", "exactly one of"),
        (INGRESS + 'fromCIDR: ["::ffff:10.0.0.0/104"]', "fromCIDR[0]", "write it as IPv4"),
        (INGRESS + "fromCIDR: [10.0.0.0/255.0.0.0]", "fromCIDR[0]", "must be a number"),
        (INGRESS + 'fromCIDR: ["fe80::1%eth0"]', "fromCIDR[0]", "no zone"),
        (INGRESS + "toEntities: [all]", "toEntities", "here it is fromEntities"),
        (EGRESS + "fromEndpoints: []", "fromEndpoints", "here it is toEndpoints"),
        (INGRESS + "toFQDNs: []", "toFQDNs", "belongs to egress"),
        (
            INGRESS + "toPorts: [{ports: [{port: 0120}]}]",
            "port",
            "leading zero",
        ),
        (INGRESS + 'toPorts: [{ports: [{port: "0x50"}]}]', "port", "not decimal"),
        (INGRESS + 'toPorts: [{ports: [{port: "0120"}]}]', "port", "leading zero"),
        (INGRESS + 'toPorts: [{ports: [{port: "-1"}]}]', "port", "neither a number"),
        (INGRESS + 'toPorts: [{ports: [{port: ""}]}]', "port", "neither a number"),
        (INGRESS + "toPorts: [{ports: [{protocol: TCP}]}]", "port", "is missing"),
        (INGRESS + 'toPorts: [{ports: [{port: "9", endPort: 8}]}]', "endPort", "below port 9"),
        (INGRESS + 'toPorts: [{ports: [{port: "0", endPort: 8}]}]', "endPort", "every port"),
        (INGRESS + "toPorts: [{ports: [{port: http, endPort: 8}]}]", "endPort", "no range"),
        (INGRESS + 'toPorts: [{ports: [{port: "1", protocol: ICMP}]}]', "protocol", "icmps"),
        (
            INGRESS + "toPorts: [{ports: [" + '{port: "1"},' * 41 + "]}]",
            "ports",
            "more than the 40",
        ),
        (INGRESS + "icmps: [{fields: [{type: 256}]}]", "type", "above 255"),
        (INGRESS + "icmps: [{fields: [{type: EchoRequst}]}]", "type", "EchoRequest"),
        (INGRESS + "icmps: [{fields: [{family: IPv5, type: 8}]}]", "family", "IPv"),
        (
            INGRESS + 'toPorts: [{ports: [{port: "1"}]}]\n    icmps: [{fields: [{type: 8}]}]',
            "icmps",
            "cannot stand together",
        ),
        (
            INGRESS + 'toPorts: [{ports: [{port: "80"}], rules: {http: [{}]}}]',
            "protocol",
            "need the protocol TCP",
        ),
        (
            INGRESS
            + 'toPorts: [{ports: [{port: "80", protocol: TCP}], rules: {http: [{path: "("}]}}]',
            "path",
            "RE2",
        ),
        (
            INGRESS + 'toPorts: [{ports: [{port: "80", protocol: TCP}], '
            'rules: {http: [{host: ".{900}"}]}}]',
            "host",
            "more than 1000 instructions",
        ),
        (
            INGRESS + 'toPorts: [{ports: [{port: "80", protocol: TCP}], '
            'rules: {http: [{method: "(a{1000}){1000}"}]}}]',
            "method",
            "RE2",
        ),
        (
            INGRESS + 'toPorts: [{ports: [{port: "80", protocol: TCP}], '
            'rules: {http: [{path: "a\\nb"}]}}]',
            "path",
            "control character",
        ),
        (
            INGRESS
            + 'toPorts: [{ports: [{port: "80", protocol: TCP}], rules: {http: [], kafka: []}}]',
            "rules",
            "cannot stand together",
        ),
        (
            "  ingressDeny:\n  - toPorts: [{ports: [], rules: {http: []}}]",
            "rules",
            "deny rule has ports only",
        ),
        ("  egressDeny:\n  - toGroups: [{}]", "toGroups", "denies nothing"),
        (
            "  egressDeny:\n  - toServices: [{k8sService: {serviceName: a}}]",
            "toServices",
            "denies nothing",
        ),
        ("  egressDeny:\n  - toFQDNs: []", "toFQDNs", "cannot name FQDNs"),
        (EGRESS + "toFQDNs: [{matchName: a, matchPattern: b}]", "toFQDNs[0]", "either"),
        (EGRESS + "toFQDNs: [{matchName: a/b}]", "matchName", "may hold letters"),
        ("  nodeSelector: {}", "nodeSelector", "cannot stand beside endpointSelector"),
        (INGRESS + "fromEndpoints: [{matchLabels: {a: true}}]", "matchLabels[a]", "quotes"),
        (INGRESS + "fromEndpoints: [{matchLabels: {a: -b}}]", "matchLabels[a]", "label value"),
        (INGRESS + "fromEndpoints: [{matchLabels: {a b: c}}]", "matchLabels[a b]", "blank"),
        (INGRESS + 'fromEndpoints: [{matchLabels: {"cidr:1.0.0.0/8": ""}}]', "", "fromCIDR"),
        (
            INGRESS + "fromEndpoints: [{matchExpressions: [{key: a, operator: In}]}]",
            "values",
            "at least one",
        ),
        (
            INGRESS
            + "fromEndpoints: [{matchExpressions: [{key: a, operator: Exists, values: [b]}]}]",
            "values",
            "takes no values",
        ),
        (
            INGRESS + "fromEndpoints: [{matchExpressions: [{key: a, operator: in, values: [b]}]}]",
            "operator",
            '"In"',
        ),
        (INGRESS + "fromEndpoints: {}", "fromEndpoints", "must be a list, not a mapping"),
        ("  ingress: [null]", "ingress[0]", "must be a mapping, not nothing"),
        ("  labels: [cilium-generated:a]", "labels[0]", "cannot be given by users"),
        ("  enableDefaultDeny: {ingress: no}", "ingress", "true or false"),
        ("  foo: 1", "spec.foo", "unknown field"),
    ],
)
def test_fault(body: str, path: str, message: str) -> None:
    found = faults(HEAD + body)
    assert [x for x in found if path in x[0] and re.search(message, x[1])], found
    assert len(found) == 1


@pytest.mark.parametrize(
    ("text", "path", "message"),
    [
        ("kind: CiliumNetworkPolice\n", "kind", 'mean "CiliumNetworkPolicy"'),
        ("endpointSelector: {}\n", "kind", "begin it with '- '"),
        ("5\n", "", "must be a mapping"),
        (HEAD.replace("v2", "v3"), "apiVersion", "write cilium.io/v2"),
        (HEAD.replace("name: p", "nam: p"), "metadata.nam", "unknown field"),
        (HEAD.replace("name: p", "name: P"), "metadata.name", "lower case"),
        (HEAD.replace("  name: p", "  name: p\n  namespace: a.b"), "metadata.namespace", "not a"),
        (HEAD + "---\n" + HEAD, "metadata.name", "also the name"),
        (HEAD + "sepcs: []\n", "sepcs", 'mean "specs"'),
        (HEAD.replace("spec:\n  endpointSelector: {}\n", ""), "spec", "is missing"),
        (
            HEAD.replace("endpointSelector: {}", "endpointSelector:"),
            "spec.endpointSelector",
            "miss",
        ),
        (
            HEAD.replace("NetworkPolicy", "ClusterwideNetworkPolicy").replace(
                "name: p", "name: p\n  namespace: x"
            ),
            "metadata.namespace",
            "has no namespace",
        ),
    ],
)
def test_document_fault(text: str, path: str, message: str) -> None:
    found = faults(text)
    assert [x for x in found if x[0] == path and message in x[1]], found


def test_one_bad_document_rejects_all() -> None:
    result = parse_documents(HEAD + "---\nkind: Nonsense\n", source="p.yaml")
    assert result.documents == ()
    assert len(result.faults) == 1


def test_what_holds_a_fault_is_not_called_empty() -> None:
    """A field is read on without its faulty parts; that nothing is left is nobody's mistake."""
    body = (
        "  - fromCIDR: [300.0.0.0/8]\n"
        '    toPorts: [{ports: [{port: "99999", protocol: TCP}]}]\n'
        "  - fromCIDR: []\n"
    )
    result = parse_documents(HEAD + "  ingress:\n" + body, source="p.yaml")
    assert [f.path for f in result.faults] == [
        "spec.ingress[0].fromCIDR[0]",
        "spec.ingress[0].toPorts[0].ports[0].port",
    ]
    assert [w.path for w in result.warnings] == ["spec.ingress[1].fromCIDR"]


@pytest.mark.parametrize(
    ("body", "warning"),
    [
        (INGRESS + "fromEndpoints: []", "selects nobody"),
        (INGRESS + "toPorts: [{ports: []}]", "selects no traffic"),
        (INGRESS + "fromCIDR: [10.0.0.1/8]", "it means 10.0.0.0/8"),
        (INGRESS + "toPorts: [{ports: [{port: 80}]}]", "is a number"),
        ("  ingressDeny: [{}]", "denies nothing"),
        ("  ingress: []", "no effect"),
    ],
)
def test_warning(body: str, warning: str) -> None:
    assert any(warning in x for x in warnings(HEAD + body)), warnings(HEAD + body)


def test_another_namespace_in_the_subject_is_replaced_with_a_warning() -> None:
    text = HEAD.replace(
        "endpointSelector: {}",
        'endpointSelector: {matchLabels: {"k8s:io.kubernetes.pod.namespace": x}}',
    )
    assert any("stays one of namespace default" in x for x in warnings(text + "  ingress: [{}]"))


def test_kinds_names_and_namespaces() -> None:
    text = (
        HEAD
        + "---\n"
        + HEAD.replace("CiliumNetworkPolicy", "CiliumClusterwideNetworkPolicy")
        + "---\n- endpointSelector: {}\n---\nkind: Rules\nmetadata: {name: r}\n"
        + "rules: [{endpointSelector: {}}]\n"
    )
    result = parse_documents(text, source="dir/My File.yaml", default_namespace="team")
    assert [(d.kind, d.namespace, d.name, d.ref) for d in result.documents] == [
        (Kind.CNP, "team", "p", "CiliumNetworkPolicy team/p"),
        (Kind.CCNP, None, "p", "CiliumClusterwideNetworkPolicy p"),
        (Kind.RULES, None, "my-file", "Rules my-file"),
        (Kind.RULES, None, "r", "Rules r"),
    ]
    assert [d.rules[0].path for d in result.documents] == ["spec", "spec", "[0]", "rules[0]"]


def test_spec_and_specs_both_count() -> None:
    text = HEAD + "specs:\n- endpointSelector: {}\n- endpointSelector: {matchLabels: {a: b}}\n"
    (document,) = parse_documents(text, source="p").documents
    assert [rule.path for rule in document.rules] == ["spec", "specs[0]", "specs[1]"]


def test_origins_survive_storage() -> None:
    path = ROOT / "examples/policies/star-wars/l3-l4.yaml"
    (document,) = parse_documents(path.read_bytes(), source="l3-l4.yaml").documents
    line = path.read_text().splitlines().index("    - fromEndpoints:") + 1
    element = document.rules[0].elements[0]
    assert (element.path, str(element.origin)) == ("spec.ingress[0]", f"l3-l4.yaml:{line}")
    again = document_from_json(document.to_json())
    assert again == document
    assert again.rules == document.rules
    parts = document_from_parts(
        kind=document.kind,
        namespace=document.namespace,
        name=document.name,
        body=document.body,
        origin=document.origin,
        origins=document.origins,
    )
    assert parts == document
    assert parts.rules == document.rules


def test_json_and_yaml_mean_the_same() -> None:
    text = (
        HEAD
        + INGRESS
        + 'fromEndpoints: [{matchLabels: {app: a}}]\n    toPorts: [{ports: [{port: "80"}]}]'
    )
    (from_yaml,) = parse_documents(text, source="p").documents
    (from_json,) = parse_documents(from_yaml.body, source="p").documents
    assert from_json.body == from_yaml.body
    assert json.loads(from_json.body)["spec"]["ingress"][0]["fromEndpoints"]


def test_yaml_words_are_those_of_1_2() -> None:
    text = HEAD + INGRESS + "fromEndpoints: [{matchLabels: {country: no, on: yes}}]"
    (document,) = parse_documents(text, source="p").documents
    assert "country=no" in document.rules[0].elements[0].peers_text()


def test_more_places_than_are_stored_name_the_document() -> None:
    rule: dict[str, object] = {
        "endpointSelector": {},
        "ingress": [{}] * 9000,
        "egress": [{}] * 9000,
    }
    body = {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": {"name": "p"},
        "spec": rule,
    }
    (fault,) = parse_documents(json.dumps(body), source="p.json").faults
    assert fault.document == "CiliumNetworkPolicy default/p"
    assert "18003 rules and entries, 16384 are allowed" in fault.message
