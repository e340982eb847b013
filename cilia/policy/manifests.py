"""JSON Schema and CustomResourceDefinitions of the policy language, made from its own models.

The parser, editors and Kubernetes' API server validate alike, for all three read the tables of
`cilia.policy.language`. Schemas say what is structure: fields, types, words, bounds. What stands
in no schema (which fields exclude one another, whether a text is a CIDR or an RE2) only the parser
judges, so a schema never refuses what the parser takes.

The two dialects differ: JSON Schema (2020-12) refuses unknown fields and takes null for an absent
one; a structural schema of Kubernetes can say neither, its API server does both of itself.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, Final, Literal

from cilia.policy.api import Kind
from cilia.policy.language import kubernetes
from cilia.policy.language.documents import API_VERSIONS, MAX_RULES, METADATA, NAMESPACED
from cilia.policy.language.rules import RULE
from cilia.policy.schema import (
    Anything,
    Bool,
    Choice,
    Either,
    Int,
    ListOf,
    MapOf,
    Null,
    Object,
    Text,
    Type,
)

# Raised when the language changes: the second number for what is added, the first for what goes.
SCHEMA_VERSION: Final = "1.0"
SCHEMA_ID: Final = f"urn:cilia:policy:{SCHEMA_VERSION}"
VERSION_LABEL: Final = "io.cilium.k8s.crd.schema.version"

Schema = dict[str, Any]
Dialect = Literal["jsonschema", "kubernetes"]


class _Describer:
    """Turns types into schemas of one dialect, and keeps those that have a name."""

    def __init__(self, dialect: Dialect) -> None:
        self.kubernetes = dialect == "kubernetes"
        self.defs: dict[str, Schema] = {}

    def describe(self, type_: Type | Either) -> Schema:
        """Raises TypeError for a type that says nothing of its structure."""
        match type_:
            case Text():
                return self.text(type_)
            case Choice():
                return {"type": "string", **self.words(type_)}
            case Int(first, last):
                return {"type": "integer", "minimum": first, "maximum": last}
            case Bool():
                return {"type": "boolean"}
            case Null():
                return {"type": "null"}
            case Anything():
                return {"x-kubernetes-preserve-unknown-fields": True} if self.kubernetes else {}
            case ListOf(item, max_items):
                return {"type": "array", "maxItems": max_items, "items": self.describe(item)}
            case MapOf(value, max_items):
                return {
                    "type": "object",
                    "maxProperties": max_items,
                    "additionalProperties": self.describe(value),
                }
            case Object():
                return self.object(type_)
            case Either(types):
                return self.either(types)
            case _:
                model: Type | Either | None = getattr(type_, "model", None)
                if model is None:
                    raise TypeError(f"{type(type_).__name__} says nothing of its structure")
                return self.describe(model)

    def text(self, type_: Text) -> Schema:
        bounds: Schema = {"maxLength": type_.max_length}
        if type_.pattern:
            bounds["pattern"] = type_.pattern
        if not type_.number_ok:
            return {"type": "string", **bounds}
        if not self.kubernetes:
            return {"type": ["string", "integer"], **bounds}
        if type_.kubernetes_number_ok:
            return {"x-kubernetes-int-or-string": True}
        return {"type": "string", **bounds}

    @staticmethod
    def words(type_: Choice) -> Schema:
        if not type_.any_case:
            return {"enum": list(type_.words)}
        return {"pattern": f"^({'|'.join(map(_any_case, type_.words))})$"}

    def either(self, types: tuple[Type, ...]) -> Schema:
        if not self.kubernetes:
            return {"anyOf": [self.describe(x) for x in types]}
        if any(isinstance(x, Int) for x in types):
            return {"x-kubernetes-int-or-string": True}
        if any(isinstance(x, Null) for x in types):
            (other,) = (x for x in types if not isinstance(x, Null))
            return {**self.describe(other), "nullable": True}
        return {"x-kubernetes-preserve-unknown-fields": True}

    def object(self, type_: Object) -> Schema:
        def make() -> Schema:
            schema: Schema = {
                "type": "object",
                "properties": {
                    name: self.field(x, required=name in type_.required)
                    for name, x in type_.fields.items()
                },
            }
            if type_.required:
                schema["required"] = sorted(type_.required)
            if not self.kubernetes:
                schema["additionalProperties"] = False
            return schema

        return self.named(type_.name, make)

    def field(self, type_: Type, *, required: bool) -> Schema:
        schema = self.describe(type_)
        if required or self.kubernetes or not schema:
            return schema
        if "enum" in schema:
            return {**schema, "type": [schema["type"], "null"], "enum": [*schema["enum"], None]}
        match schema.get("type"):
            case str(name):
                return {**schema, "type": [name, "null"]}
            case list(names):
                return {**schema, "type": [*names, "null"]}
            case _:
                return {"anyOf": [schema, {"type": "null"}]}

    def named(self, name: str, make: Callable[[], Schema]) -> Schema:
        if not name or self.kubernetes:
            return make()
        if name not in self.defs:
            self.defs[name] = {}
            self.defs[name] = make()
        return {"$ref": f"#/$defs/{name}"}


def _any_case(word: str) -> str:
    return "".join(f"[{x.upper()}{x.lower()}]" if x.isalpha() else x for x in word)


# ---- JSON Schema


def json_schema() -> Schema:
    """One schema for whatever a policy file may hold: a document of any kind, a list of them as
    kubectl prints it, or a bare list of rules."""
    d = _Describer("jsonschema")
    rules = {"type": "array", "maxItems": MAX_RULES, "items": d.describe(RULE)}
    for kind in Kind:
        d.defs[kind] = _document(d, kind, rules)
    documents = [{"$ref": f"#/$defs/{kind}"} for kind in Kind]
    d.defs["List"] = {
        "type": "object",
        "required": ["items", "kind"],
        "properties": {
            "apiVersion": {},
            "kind": {"const": "List"},
            "metadata": {},
            "items": {"type": "array", "items": {"anyOf": documents}},
        },
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA_ID,
        "title": f"Cilia network policy, schema version {SCHEMA_VERSION}",
        "anyOf": [*documents, {"$ref": "#/$defs/List"}, rules],
        "$defs": dict(sorted(d.defs.items())),
    }


def _document(d: _Describer, kind: Kind, rules: Schema) -> Schema:
    metadata = d.describe(METADATA)
    properties: Schema = {
        "apiVersion": {"const": API_VERSIONS[kind]},
        "kind": {"const": str(kind)},
        "metadata": metadata,
        "status": {},
    }
    schema: Schema = {
        "type": "object",
        "additionalProperties": False,
        "required": ["apiVersion", "kind", "metadata"],
        "properties": properties,
    }
    named = {"required": ["name"], "properties": {"name": {"type": "string"}}}
    match kind:
        case Kind.RULES:
            properties |= {"rules": rules, "metadata": {"anyOf": [metadata, {"type": "null"}]}}
            schema["required"] = ["kind", "rules"]
        case Kind.NP:
            properties["spec"] = d.describe(kubernetes.SPEC)
            schema["required"] = [*schema["required"], "spec"]
            schema["allOf"] = [{"properties": {"metadata": named}}]
        case Kind.CNP | Kind.CCNP:
            properties["spec"] = {"anyOf": [d.describe(RULE), {"type": "null"}]}
            properties["specs"] = {**rules, "type": ["array", "null"]}
            schema["anyOf"] = [
                {"required": [x], "properties": {x: {"not": {"type": "null"}}}}
                for x in ("spec", "specs")
            ]
            schema["allOf"] = [{"properties": {"metadata": named}}]
    if kind not in NAMESPACED:
        schema["not"] = {
            "required": ["metadata"],
            "properties": {
                "metadata": {
                    "type": "object",
                    "required": ["namespace"],
                    "properties": {"namespace": {"not": {"type": "null"}}},
                }
            },
        }
    return schema


# ---- Kubernetes

_NAMES: Final = {
    Kind.CNP: ("ciliumnetworkpolicies", "ciliumnetworkpolicy", ["cnp", "ciliumnp"]),
    Kind.CCNP: ("ciliumclusterwidenetworkpolicies", "ciliumclusterwidenetworkpolicy", ["ccnp"]),
}


def custom_resource_definitions() -> tuple[Schema, ...]:
    """The manifests that teach a Kubernetes cluster the policies of cilium.io/v2.

    NetworkPolicy it knows of itself, and lists of rules are no object of it.
    """
    return tuple(_definition(kind) for kind in _NAMES)


def _definition(kind: Kind) -> Schema:
    plural, singular, short = _NAMES[kind]
    group, _, version = API_VERSIONS[kind].partition("/")
    d = _Describer("kubernetes")
    rule = d.describe(RULE)
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{plural}.{group}",
            "labels": {VERSION_LABEL: SCHEMA_VERSION},
        },
        "spec": {
            "group": group,
            "names": {
                "categories": ["cilium", "ciliumpolicy"],
                "kind": str(kind),
                "listKind": f"{kind}List",
                "plural": plural,
                "shortNames": short,
                "singular": singular,
            },
            "scope": "Namespaced" if kind in NAMESPACED else "Cluster",
            "versions": [
                {
                    "name": version,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [
                        {
                            "jsonPath": ".metadata.creationTimestamp",
                            "name": "Age",
                            "type": "date",
                        }
                    ],
                    "schema": {
                        "openAPIV3Schema": {
                            "type": "object",
                            "required": ["metadata"],
                            "anyOf": [{"required": ["spec"]}, {"required": ["specs"]}],
                            "properties": {
                                "apiVersion": {"type": "string"},
                                "kind": {"type": "string"},
                                "metadata": {"type": "object"},
                                "spec": rule,
                                "specs": {"type": "array", "maxItems": MAX_RULES, "items": rule},
                                "status": {
                                    "type": "object",
                                    "x-kubernetes-preserve-unknown-fields": True,
                                },
                            },
                        }
                    },
                }
            ],
        },
    }


def to_yaml(manifest: Schema) -> str:
    """Block-style YAML without anchors."""
    from ruamel.yaml import YAML  # slow to import

    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 100
    yaml.representer.ignore_aliases = lambda *_: True
    out = io.StringIO()
    yaml.dump(manifest, out)
    return out.getvalue()


__all__ = ["SCHEMA_ID", "SCHEMA_VERSION", "custom_resource_definitions", "json_schema", "to_yaml"]
