"""The schemas are those of the parser, and are committed as they are generated."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cilia.policy import Fault, parse_documents
from cilia.policy.manifests import (
    SCHEMA_VERSION,
    custom_resource_definitions,
    json_schema,
    to_yaml,
)
from cilia.policy.tree import parse_text

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "cilia/policy/schemas"
EXAMPLES = int(os.environ.get("CILIA_PROPERTY_EXAMPLES", "400"))
VALIDATOR = jsonschema.Draft202012Validator(json_schema())

CORPUS: list[dict[str, Any]] = [
    {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": {"name": "p", "namespace": "d", "annotations": {"cilia.io/audit": "true"}},
        "spec": {
            "endpointSelector": {"matchLabels": {"app": "e", "reserved:x": None}},
            "ingress": [
                {
                    "fromEndpoints": [
                        {"matchExpressions": [{"key": "a", "operator": "In", "values": ["b"]}]}
                    ],
                    "toPorts": [
                        {
                            "ports": [{"port": "80", "protocol": "tcp", "endPort": 90}],
                            "rules": {
                                "http": [
                                    {
                                        "path": "/a",
                                        "headers": ["X: y"],
                                        "headerMatches": [
                                            {"name": "n", "secret": {"name": "s"}}
                                        ],
                                    }
                                ]
                            },
                            "terminatingTLS": {"secret": {"name": "s"}, "certificate": "c"},
                        }
                    ],
                },
                {"fromCIDRSet": [{"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}]},
                {"fromEntities": ["world"], "icmps": [{"fields": [{"type": 8}]}]},
                {"fromRequires": [{}], "authentication": {"mode": "disabled"}},
            ],
            "ingressDeny": [{"fromCIDR": ["192.0.2.1"], "toPorts": [{"ports": [{"port": 22}]}]}],
            "egress": [
                {"toFQDNs": [{"matchName": "a.b"}]},
                {"toServices": [{"k8sService": {"serviceName": "s", "namespace": "n"}}]},
                {
                    "toPorts": [
                        {
                            "ports": [{"port": "53"}],
                            "rules": {"dns": [{"matchPattern": "*"}]},
                        }
                    ]
                },
            ],
            "enableDefaultDeny": {"ingress": False},
            "labels": ["k8s:a=b", {"key": "k", "value": "v", "source": "k8s"}],
            "description": "text",
        },
        "specs": [{"endpointSelector": {}}],
        "status": {"anything": [1]},
    },
    {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumClusterwideNetworkPolicy",
        "metadata": {"name": "p"},
        "specs": [{"nodeSelector": {}, "egressDeny": [{"toEntities": ["all"]}]}],
    },
    {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "p", "namespace": "d"},
        "spec": {
            "podSelector": {"matchLabels": {"app": "e"}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {
                    "from": [
                        {"podSelector": {}, "namespaceSelector": {}},
                        {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}},
                    ],
                    "ports": [{"port": 80, "endPort": 81}, {"port": "web", "protocol": "UDP"}],
                }
            ],
            "egress": [{"to": []}],
        },
    },
    {"kind": "Rules", "rules": [{"endpointSelector": {}, "ingress": [{}]}]},
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from places(item, (*path, index))


WRONG: list[Any] = [None, True, 7, 1.5, "text", "", [], {}, [None], ["x"], {"x": 1}, [{}], 99999]


@st.composite
def damaged(draw: st.DrawFn) -> Any:
    """A good document with one or two places changed."""
    value: Any = copy.deepcopy(draw(st.sampled_from(CORPUS)))
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from([x for x in places(value) if x] or [()]))
        if not path:
            break
        at = value
        for step in path[:-1]:
            at = at[step]
        match draw(st.sampled_from(["put", "drop", "rename", "add"])):
            case "put":
                at[path[-1]] = copy.deepcopy(draw(st.sampled_from(WRONG)))
            case "drop":
                del at[path[-1]]
            case "rename" if isinstance(at, dict):
                at[f"{path[-1]}x"] = at.pop(path[-1])
            case "add" if isinstance(at, dict):
                other = draw(
                    st.sampled_from(["toPorts", "rules", "cidr", "spec", "namespace", "x"])
                )
                at.setdefault(other, copy.deepcopy(draw(st.sampled_from(WRONG))))
            case _:
                pass
    return value


# What the parser says of structure, and so does the schema.
STRUCTURAL = re.compile(
    r"unknown field|is a field of|belongs below|^must be (?!a mapping, or)|^is missing$|belongs to"
    r"|here it is|is listed under"
    r"|has ports only|cannot name FQDNs|is not a known (kind|operator|family|policy type|mode)"
)


def structural(fault: Fault) -> bool:
    return STRUCTURAL.search(fault.message) is not None


@settings(max_examples=EXAMPLES, deadline=None)
@given(damaged())
def test_schema_and_parser_agree(value: Any) -> None:
    result = parse_documents(json.dumps(value), source="x.json")
    said = next(VALIDATOR.iter_errors(value), None)
    if not result.faults:
        assert said is None, said
    if any(structural(x) for x in result.faults):
        assert said is not None, result.faults


@pytest.mark.parametrize("document", CORPUS, ids=lambda x: str(x["kind"]))
def test_what_is_good_is_good_to_both(document: dict[str, Any]) -> None:
    assert parse_documents(json.dumps(document), source="x.json").faults == ()
    VALIDATOR.validate(document)
    if isinstance(document.get("rules"), list):
        VALIDATOR.validate(document["rules"])
    VALIDATOR.validate({"apiVersion": "v1", "kind": "List", "items": [document]})


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples/policies").rglob("*.yaml")), ids=lambda x: x.name
)
def test_examples_are_valid(path: Path) -> None:
    for node in parse_text(path.read_bytes()):
        VALIDATOR.validate(node.plain())


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())


def test_committed_copies_are_current() -> None:
    """`make schemas` writes them; SCHEMA_VERSION rises with what they say."""
    assert (FOLDER / "policy.schema.json").read_text() == json.dumps(json_schema(), indent=2) + "\n"
    definitions = "---\n".join(map(to_yaml, custom_resource_definitions()))
    assert (FOLDER / "crds.yaml").read_text() == definitions


def nodes(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield schema
    for child in schema.get("properties", {}).values():
        yield from nodes(child)
    for key in ("items", "additionalProperties"):
        if key in schema:
            yield from nodes(schema[key])


@pytest.mark.parametrize(
    "definition", custom_resource_definitions(), ids=lambda x: x["spec"]["scope"]
)
def test_definitions_are_structural(definition: dict[str, Any]) -> None:
    """Kubernetes' rules of structural schemas, without which it takes no definition."""
    assert definition["metadata"]["labels"] == {"io.cilium.k8s.crd.schema.version": SCHEMA_VERSION}
    names = definition["spec"]["names"]
    assert definition["metadata"]["name"] == f"{names['plural']}.cilium.io"
    (version,) = definition["spec"]["versions"]
    allowed = {
        "type", "properties", "required", "items", "additionalProperties", "enum", "pattern",
        "minimum", "maximum", "maxLength", "maxItems", "maxProperties", "nullable", "anyOf",
        "x-kubernetes-int-or-string", "x-kubernetes-preserve-unknown-fields",
    }  # fmt: skip
    for schema in nodes(version["schema"]["openAPIV3Schema"]):
        assert set(schema) <= allowed
        assert isinstance(schema.get("type", ""), str)
        assert "type" in schema or any(x.startswith("x-kubernetes") for x in schema)
        assert not ("properties" in schema and "additionalProperties" in schema)
        for branch in schema.get("anyOf", ()):
            assert set(branch) == {"required"}
