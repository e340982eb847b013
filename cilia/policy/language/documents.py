"""Documents: kinds, metadata, many in one text, and those that are stored."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePath
from typing import Any, Final

from cilia.policy.api import (
    Document,
    DocumentError,
    DocumentKey,
    Fault,
    Kind,
    Origin,
    ParseResult,
    Rule,
)
from cilia.policy.language import kubernetes
from cilia.policy.language.rules import RULE
from cilia.policy.language.scope import scope_rule
from cilia.policy.language.selectors import DNS_SUBDOMAIN
from cilia.policy.schema import (
    INVALID,
    Anything,
    Checking,
    MapOf,
    Object,
    Text,
    Work,
    shown,
    suggestion,
)
from cilia.policy.tree import Node, TreeError, from_plain, parse_text

MAX_RULES: Final = 10_000  # in one document
MAX_DOCUMENTS: Final = 20_000
MAX_DOCUMENT_BYTES: Final = 1280 * 1024  # the store's bound of one document, as JSON
MAX_ORIGINS: Final = (
    16_384  # rules, entries and L7 port rules of a document: their places are stored
)
AUDIT_ANNOTATION: Final = "cilia.io/audit"

_DNS_LABEL: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\Z")


def _dns(pattern: re.Pattern[str], what: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if not pattern.match(text):
            raise ValueError(
                f"{shown(text)} is not a {what}: lower case letters, digits and '-', beginning and "
                "ending with a letter or digit"
            )
        return text

    return parse


METADATA: Final = Object(
    {
        "name": Text(_dns(DNS_SUBDOMAIN, "name"), max_length=253),
        "namespace": Text(_dns(_DNS_LABEL, "namespace"), max_length=63),
        "labels": MapOf(Text()),
        "annotations": MapOf(Text(max_length=256 << 10)),
        **dict.fromkeys(
            (
                "uid",
                "resourceVersion",
                "generation",
                "creationTimestamp",
                "deletionTimestamp",
                "deletionGracePeriodSeconds",
                "generateName",
                "managedFields",
                "ownerReferences",
                "finalizers",
                "selfLink",
            ),
            Anything(),
        ),
    },
    name="Metadata",
)
API_VERSIONS: Final = {
    Kind.CNP: "cilium.io/v2",
    Kind.CCNP: "cilium.io/v2",
    Kind.RULES: "cilium.io/v2",
    Kind.NP: kubernetes.API_VERSION,
}
NAMESPACED: Final = (Kind.CNP, Kind.NP)


def _default_name(source: str) -> str:
    stem = PurePath(source).name.partition(".")[0].lower()
    name = re.sub(r"[^a-z0-9]+", "-", stem).strip("-")[:63].strip("-")
    return name or "rules"


class _Reader:
    """Reads the documents of one text."""

    def __init__(self, source: str, default_namespace: str) -> None:
        self.source, self.default_namespace = source, default_namespace
        self.documents: list[Document] = []
        self.faults: list[Fault] = []
        self.warnings: list[Fault] = []
        self.names: dict[DocumentKey, Origin] = {}
        self.count = 0
        self.work = Work()

    def add(self, node: Node) -> None:
        self.count += 1
        title = f"document {self.count}"
        if self.count > MAX_DOCUMENTS:
            if self.count == MAX_DOCUMENTS + 1:
                self.fault(title, "", f"there are more than {MAX_DOCUMENTS} documents", node)
            return
        if isinstance(node.value, dict) and _text(node, "kind").endswith("List"):
            kind = _text(node, "kind").removesuffix("List")
            items = node.value.get("items")
            if items is not None and isinstance(items.value, list) and kind in ("", *Kind):
                self.count -= 1
                for item in items.value:
                    if kind and isinstance(item.value, dict):
                        place = item.line, item.column
                        item.value.setdefault("kind", Node(kind, *place))
                        version = _text(node, "apiVersion") or API_VERSIONS[Kind(kind)]
                        item.value.setdefault("apiVersion", Node(version, *place))
                    self.add(item)
                return
        document = self.read(node, title)
        if document is None:
            return
        if (before := self.names.get(document.key)) is not None:
            hint = " (name it with metadata.name)" if document.kind == Kind.RULES else ""
            self.fault(
                document.ref,
                "metadata.name",
                f"is also the name of the one at {before}{hint}",
                node,
            )
            return
        self.names[document.key] = document.origin
        self.documents.append(document)

    def fault(self, document: str, path: str, message: str, node: Node) -> None:
        self.faults.append(
            Fault(document, path, message, Origin(self.source, node.line, node.column))
        )

    def read(self, node: Node, title: str) -> Document | None:
        if isinstance(node.value, list):
            return self.build(node, title, Kind.RULES, None, _default_name(self.source))
        if not isinstance(node.value, dict):
            self.fault(title, "", "a document must be a mapping, or a list of rules", node)
            return None
        kind = node.value.get("kind")
        if kind is None or kind.value is None:
            hint = (
                "; a rule without kind goes into a list: begin it with '- '"
                if "endpointSelector" in node.value
                else f"; it may be {', '.join(Kind)}"
            )
            self.fault(title, "kind", f"is missing{hint}", node)
            return None
        if kind.value not in tuple(Kind):
            hint = suggestion(str(kind.value), list(Kind))
            self.fault(title, "kind", f"{shown(kind.value)} is not a known kind{hint}", kind)
            return None
        c = Checking(self.source, title, work=self.work)
        at = node.value.get("metadata")
        metadata = {} if at is None or at.value is None else METADATA.check(at, "metadata", c)
        namespace: str | None = None
        name = ""
        if metadata is not INVALID:
            name = metadata.get("name", "")
            if kind.value in NAMESPACED:
                namespace = metadata.get("namespace") or self.default_namespace
            elif "namespace" in metadata and at is not None:
                c.fault(
                    "metadata.namespace", at.value["namespace"], f"a {kind.value} has no namespace"
                )
            if not name:
                if kind.value == Kind.RULES:
                    name = _default_name(self.source)
                elif at is not None and "name" in (at.value or {}):
                    c.fault("metadata.name", at.value["name"], "is empty")
                else:
                    c.fault("metadata.name", at or node, "is missing")
        if kind.value != Kind.RULES or "apiVersion" in node.value:
            version, wanted = node.value.get("apiVersion"), API_VERSIONS[Kind(kind.value)]
            if version is None or version.value is None:
                c.fault("apiVersion", node, f"is missing; write {wanted}")
            elif version.value != wanted:
                c.fault(
                    "apiVersion",
                    version,
                    f"{shown(version.value)} is not supported; write {wanted}",
                )
        if c.faults:
            if name:
                title = str(DocumentKey(kind.value, namespace or "", name))
            self.faults += [Fault(title, f.path, f.message, f.origin) for f in c.faults]
            # The rest is checked too, so that one round shows every fault.
            self.build(node, title, Kind(kind.value), namespace, name or "?")
            return None
        return self.build(node, title, Kind(kind.value), namespace, name)

    def build(
        self, node: Node, title: str, kind: Kind, namespace: str | None, name: str
    ) -> Document | None:
        if name != "?":
            title = str(DocumentKey(kind, namespace or "", name))
        c = Checking(self.source, title, work=self.work)
        rules = _rules(node, kind, namespace, c)
        audit = _audit(node, c)
        self.faults += c.faults
        self.warnings += c.warnings
        if c.faults:
            return None
        origin = Origin(self.source, node.line, node.column)
        return Document(
            kind=kind,
            namespace=namespace,
            name=name,
            rules=rules,
            body=_body(node.plain()),
            origin=origin,
            origins=tuple(sorted(c.origins.items())),
            audit=audit,
        )


def _audit(node: Node, c: Checking) -> bool:
    """Whether the annotation asks to report only. What is neither true nor false is a fault."""
    at: Node | None = node
    for name in ("metadata", "annotations", AUDIT_ANNOTATION):
        at = at.value.get(name) if at is not None and isinstance(at.value, dict) else None
    if at is None or at.value is None:
        return False
    if at.value not in ("true", "false"):
        c.fault(
            f"metadata.annotations[{AUDIT_ANNOTATION}]",
            at,
            f'{shown(at.value)} is neither "true" nor "false"',
        )
    return bool(at.value == "true")


def _text(node: Node, key: str) -> str:
    child = node.value.get(key)
    return child.value if child is not None and isinstance(child.value, str) else ""


def _body(plain: Any) -> bytes:
    return json.dumps(plain, separators=(",", ":"), ensure_ascii=False).encode()


def _rules(node: Node, kind: str, namespace: str | None, c: Checking) -> tuple[Rule, ...]:
    """Check the body of a document and give its rules, scoped to its namespace."""
    found: list[tuple[Node, Any]] = []
    if isinstance(node.value, list):
        _check_count(node, "", c)
        found = [
            (child, RULE.check(child, f"[{i}]", c))
            for i, child in enumerate(node.value[:MAX_RULES])
        ]
    else:
        fields = {Kind.RULES: ("rules",), Kind.NP: ("spec",)}.get(Kind(kind), ("spec", "specs"))
        known = ("apiVersion", "kind", "metadata", "status", *fields)
        for key in node.value:
            if key not in known:
                line, column = (node.keys or {}).get(key, (node.line, node.column))
                c.fault(
                    key[:80],
                    Node(key, line, column),
                    "belongs below spec: indent it more"
                    if "spec" in fields
                    and key in (kubernetes.SPEC if kind == Kind.NP else RULE).fields
                    else f"unknown field{suggestion(key, list(known))}",
                )
        present = [(f, node.value[f]) for f in fields if f in node.value]
        present = [(f, at) for f, at in present if at.value is not None]
        if not present:
            c.fault(fields[0], node, "is missing")
        for name, at in present:
            if kind == Kind.NP:
                rule = kubernetes.read_spec(at, name, namespace or "default", c)
                return (rule,) if rule is not None else ()
            if name == "spec":
                found.append((at, RULE.check(at, name, c)))
            elif not isinstance(at.value, list):
                c.fault(name, at, "must be a list of rules")
            else:
                _check_count(at, name, c)
                found += [
                    (child, RULE.check(child, f"{name}[{i}]", c))
                    for i, child in enumerate(at.value[:MAX_RULES])
                ]
    return tuple(
        scope_rule(rule, kind, namespace, c, at) for at, rule in found if rule is not INVALID
    )


def _check_count(node: Node, path: str, c: Checking) -> None:
    if len(node.value) > MAX_RULES:
        c.fault(path, node, f"has {len(node.value)} rules, more than the {MAX_RULES} allowed")
    if not node.value:
        c.warn(path, node, "has no rules: it has no effect")


def parse_documents(
    text: bytes | str, *, source: str, default_namespace: str = "default"
) -> ParseResult:
    """Read policy documents from YAML (many documents) or JSON text.

    All or nothing: with one fault anywhere there are no documents, and every fault is given with
    its document, field path, line and column. Never raises for anything the text holds.
    """
    reader = _Reader(source, default_namespace)
    try:
        nodes = parse_text(text)
    except TreeError as error:
        fault = Fault("document", "", error.message, Origin(source, error.line, error.column))
        return ParseResult(faults=(fault,))
    for node in nodes:
        reader.add(node)
    for document in reader.documents:
        if len(document.body) > MAX_DOCUMENT_BYTES:
            reader.faults.append(
                Fault(
                    document.ref,
                    "",
                    f"the document is {len(document.body)} bytes long as stored, "
                    f"{MAX_DOCUMENT_BYTES} are allowed: spread its rules over several documents",
                    document.origin,
                )
            )
        if len(document.origins) > MAX_ORIGINS:
            reader.faults.append(
                Fault(
                    document.ref,
                    "",
                    f"the document has {len(document.origins)} rules and entries, "
                    f"{MAX_ORIGINS} are allowed: spread them over several documents",
                    document.origin,
                )
            )
    if not nodes:
        reader.faults.append(Fault("document", "", "there is no document", Origin(source)))
    warnings = tuple(reader.warnings)
    if reader.faults:
        found = sorted(reader.faults, key=lambda x: (x.origin.line, x.origin.column))
        # What holds a fault was read without it: a warning that it is empty would be untrue.
        faulty = {(f.document, part) for f in found for part in _around(f.path)}
        warnings = tuple(w for w in warnings if (w.document, w.path) not in faulty)
        return ParseResult(faults=tuple(found), warnings=warnings)
    return ParseResult(documents=tuple(reader.documents), warnings=warnings)


def _around(path: str) -> list[str]:
    """The path and those of everything it is in: `a.b[0]` gives a, a.b and a.b[0]."""
    return [path[: cut.start()] for cut in re.finditer(r"[.\[]", path)] + [path]


def document_from_parts(
    *,
    kind: str,
    namespace: str | None,
    name: str,
    body: bytes,
    origin: Origin,
    origins: Mapping[str, Origin] | Iterable[tuple[str, Origin]] = (),
) -> Document:
    """Build a document from what is stored of it. Raises DocumentError."""
    title = str(DocumentKey(kind, namespace or "", name))
    c = Checking(origin.source, title, known_origins={"": origin, **dict(origins)})
    try:
        plain = json.loads(body)
    except (ValueError, RecursionError):
        raise DocumentError((Fault(title, "", "the stored text is not JSON", origin),)) from None
    if kind not in tuple(Kind) or not isinstance(plain, dict | list):
        raise DocumentError((Fault(title, "kind", f"{shown(kind)} is not a known kind", origin),))
    node = from_plain(plain, origin.line, origin.column)
    rules = _rules(node, kind, namespace, c)
    audit = _audit(node, c)
    if c.faults:
        raise DocumentError(tuple(c.faults))
    return Document(
        kind=Kind(kind),
        namespace=namespace,
        name=name,
        rules=rules,
        body=body,
        origin=origin,
        origins=tuple(sorted(c.origins.items())),
        audit=audit,
    )


def document_from_json(data: bytes | str) -> Document:
    """Undo Document.to_json(). Raises DocumentError."""
    try:
        v = json.loads(data)
        origin = Origin(str(v["source"]), *map(int, v["origin"]))
        origins = {
            str(path): Origin(origin.source, int(line), int(column))
            for path, (line, column) in v["origins"].items()
        }
        namespace = v["namespace"]
        return document_from_parts(
            kind=str(v["kind"]),
            namespace=None if namespace is None else str(namespace),
            name=str(v["name"]),
            body=_body(v["body"]),
            origin=origin,
            origins=origins,
        )
    except DocumentError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        fault = Fault("document", "", f"not a stored document: {error}", Origin("stored"))
        raise DocumentError((fault,)) from None
