"""A small declarative schema: what a document may hold, and a walker that finds every fault at
once.

A table of these types describes the language once. Each type checks a node, records faults with the
path and place of the very value that is wrong, and returns what the node means. Unknown fields are
faults.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from cilia.policy.api import Fault, Origin
from cilia.policy.tree import Node

INVALID: Final = object()
MAX_FAULTS: Final = 200


@dataclass(slots=True)
class Work:
    """What the checks of one text may still cost, beyond reading it: a text is bounded in bytes,
    but a short regular expression may be a large program."""

    programs: int = 2_000_000  # instructions of regular expressions, about a second
    reports: int = 10_000  # faults and warnings


@dataclass(slots=True)
class Checking:
    """The state of checking one document."""

    source: str
    document: str
    faults: list[Fault] = field(default_factory=list)
    warnings: list[Fault] = field(default_factory=list)
    origins: dict[str, Origin] = field(default_factory=dict)
    known_origins: Mapping[str, Origin] | None = (
        None  # of a stored document, which has no places itself
    )
    work: Work = field(default_factory=Work)
    # The mappings that are being checked, outermost first: path, and the fields that belong there.
    inside: list[tuple[str, Collection[str]]] = field(default_factory=list)

    def place(self, path: str, node: Node) -> Origin:
        if self.known_origins is not None:
            at = path
            while at:
                if at in self.known_origins:
                    return self.known_origins[at]
                at = at[: max(at.rfind("."), at.rfind("["), 0)]
        return Origin(self.source, node.line, node.column)

    def fault(self, path: str, node: Node, message: str) -> None:
        self._report(self.faults, path, node, message)

    def warn(self, path: str, node: Node, message: str) -> None:
        self._report(self.warnings, path, node, message)

    def _report(self, reports: list[Fault], path: str, node: Node, message: str) -> None:
        if len(reports) >= MAX_FAULTS:
            return
        # The first of a document always counts: without any it would pass.
        if self.work.reports <= 0 and reports:
            return
        self.work.reports -= 1
        if len(reports) == MAX_FAULTS - 1:
            message = f"{message}; more than these {MAX_FAULTS} are not listed"
        reports.append(Fault(self.document, path, message, self.place(path, node)))

    def mark(self, path: str, node: Node) -> Origin:
        """Remember where something that rules are known by was written."""
        origin = self.place(path, node)
        self.origins[path] = origin
        return origin


class Type(Protocol):
    def check(self, node: Node, path: str, c: Checking) -> Any:
        """What the node means, or INVALID after recording why not."""


def kind_of(value: object) -> str:
    match value:
        case None:
            return "nothing"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case list():
            return "a list"
        case _:
            return "a mapping"


def shown(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def canonical(node: Node) -> str:
    """What was written, as JSON that does not depend on its order or spacing."""
    return json.dumps(node.plain(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def suggestion(word: str, known: tuple[str, ...] | list[str]) -> str:
    """`; did you mean "x"?`, or the words there are when none is near and they are few."""
    by_lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower()[:64], list(by_lower), n=1, cutoff=0.6)
    if near:
        return f'; did you mean "{by_lower[near[0]]}"?'
    return f"; it may be {', '.join(known)}" if 0 < len(known) <= 24 else ""


@dataclass(frozen=True, slots=True)
class Either:
    """A value of one of several types, for `manifests`: who checks it tells them apart himself.

    A type of its own making says in `model` what plain type it has the structure of, or this.
    """

    types: tuple[Type, ...]


@dataclass(frozen=True, slots=True)
class Null:
    def check(self, node: Node, path: str, c: Checking) -> Any:
        if node.value is not None:
            c.fault(path, node, f"must be nothing, not {kind_of(node.value)}")
            return INVALID
        return None


@dataclass(frozen=True, slots=True)
class Text:
    """Text, bounded; `parse` turns it into its meaning or raises ValueError with the reason.

    `pattern` tells editors and Kubernetes what parse() accepts at most.
    """

    parse: Callable[[str], Any] | None = None
    max_length: int = 1024
    number_ok: bool = False  # numbers are taken as their text
    kubernetes_number_ok: bool = True  # by its API server too
    pattern: str = ""

    def check(self, node: Node, path: str, c: Checking) -> Any:
        value = node.value
        if self.number_ok and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str):
            hint = ": put it in quotes" if isinstance(value, bool | int | float) else ""
            c.fault(path, node, f"must be text, not {kind_of(value)}{hint}")
            return INVALID
        if len(value) > self.max_length:
            c.fault(path, node, f"is longer than {self.max_length} characters")
            return INVALID
        if self.parse is None:
            return value
        try:
            return self.parse(value)
        except ValueError as error:
            c.fault(path, node, str(error))
            return INVALID


@dataclass(frozen=True, slots=True)
class Choice:
    """One of a few words."""

    words: tuple[str, ...]
    what: str = "value"
    any_case: bool = False

    def check(self, node: Node, path: str, c: Checking) -> Any:
        value = node.value
        if not isinstance(value, str):
            c.fault(path, node, f"must be text, not {kind_of(value)}")
            return INVALID
        if value in self.words:
            return value
        if self.any_case:
            for word in self.words:
                if word.lower() == value.lower():
                    return word
        c.fault(
            path,
            node,
            f"{shown(value)} is not a known {self.what}{suggestion(value, self.words)}",
        )
        return INVALID


@dataclass(frozen=True, slots=True)
class Int:
    first: int
    last: int

    def check(self, node: Node, path: str, c: Checking) -> Any:
        value = node.value
        if isinstance(value, bool) or not isinstance(value, int):
            c.fault(path, node, f"must be a whole number, not {kind_of(value)}")
            return INVALID
        if not self.first <= value <= self.last:
            c.fault(path, node, f"{value} is outside {self.first} to {self.last}")
            return INVALID
        return value


@dataclass(frozen=True, slots=True)
class Bool:
    def check(self, node: Node, path: str, c: Checking) -> Any:
        if not isinstance(node.value, bool):
            c.fault(path, node, f"must be true or false, not {kind_of(node.value)}")
            return INVALID
        return node.value


@dataclass(frozen=True, slots=True)
class Anything:
    """Carried and not looked into (status, managed fields)."""

    def check(self, node: Node, path: str, c: Checking) -> Any:
        return node.plain()


@dataclass(frozen=True, slots=True)
class ListOf:
    """A list; gives the meanings of its good items."""

    item: Type
    max_items: int
    what: str = "entries"

    def check(self, node: Node, path: str, c: Checking) -> Any:
        if not isinstance(node.value, list):
            c.fault(path, node, f"must be a list, not {kind_of(node.value)}")
            return INVALID
        if len(node.value) > self.max_items:
            c.fault(
                path,
                node,
                f"has {len(node.value)} {self.what}, more than the {self.max_items} allowed",
            )
            return INVALID
        item = self.item
        values = [item.check(child, f"{path}[{i}]", c) for i, child in enumerate(node.value)]
        return [value for value in values if value is not INVALID]


@dataclass(frozen=True, slots=True)
class MapOf:
    """Free keys, all values of one type."""

    value: Type
    max_items: int = 1024
    key: Callable[[str], Any] | None = None

    def check(self, node: Node, path: str, c: Checking) -> Any:
        if not isinstance(node.value, dict):
            c.fault(path, node, f"must be a mapping, not {kind_of(node.value)}")
            return INVALID
        if len(node.value) > self.max_items:
            c.fault(path, node, f"has more than the {self.max_items} keys allowed")
            return INVALID
        found = {}
        for name, child in node.value.items():
            at = f"{path}[{name[:80]}]"
            if self.key is not None:
                try:
                    self.key(name)
                except ValueError as error:
                    line, column = (node.keys or {}).get(name, (child.line, child.column))
                    c.fault(at, Node(name, line, column), str(error))
                    continue
            value = self.value.check(child, at, c)
            if value is not INVALID:
                found[name] = value
        return found


@dataclass(frozen=True, slots=True)
class Object:
    """Named fields. `build` turns the good ones into their meaning and may record more faults.

    A field that is null counts as absent, as in Kubernetes.
    """

    fields: Mapping[str, Type]
    required: tuple[str, ...] = ()
    build: Callable[[dict[str, Any], Node, str, Checking], Any] | None = None
    # Fields that exist elsewhere in the language, with the reason why not here.
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    name: str = ""  # in JSON Schema, of what stands in several places

    def check(self, node: Node, path: str, c: Checking) -> Any:
        if not isinstance(node.value, dict):
            c.fault(path, node, f"must be a mapping, not {kind_of(node.value)}")
            return INVALID
        if not path and {"apiVersion", "kind"} <= node.value.keys() - self.fields.keys():
            # Another file than was meant: a fault a field would not say so.
            c.fault("", node, f"this is a {shown(node.value['kind'].value)}, not {c.document}")
            return INVALID
        c.inside.append((path, self.fields))
        try:
            return self._check_fields(node, path, c)
        finally:
            c.inside.pop()

    def _unknown(self, name: str, node: Node, c: Checking) -> str:
        """Of a field that does not belong here: what was meant, or where it belongs."""
        for path, fields in reversed(c.inside[:-1]):
            if name in fields:
                return f"is a field of {path or 'the document'}: indent it less"
        above = ""
        for other, child in node.value.items():
            if other == name:
                break
            above = other if other in self.fields and child.value is None else ""
        if above:
            return f"unknown field; if it belongs to {above}, which is empty, indent it more"
        return f"unknown field{suggestion(name, list(self.fields))}"

    def _check_fields(self, node: Node, path: str, c: Checking) -> Any:
        values: dict[str, Any] = {}
        bad = False
        for name, child in node.value.items():
            at = f"{path}.{name[:80]}" if path else name[:80]
            known = self.fields.get(name)
            if known is None:
                line, column = (node.keys or {}).get(name, (child.line, child.column))
                message = self.elsewhere.get(name) or self._unknown(name, node, c)
                c.fault(at, Node(name, line, column), message)
                bad = True
                continue
            if child.value is None:
                continue
            value = known.check(child, at, c)
            if value is INVALID:
                bad = True
            else:
                values[name] = value
        for name in self.required:
            if name not in node.value or node.value[name].value is None:
                c.fault(f"{path}.{name}" if path else name, node, "is missing")
                bad = True
        if self.build is None:
            return INVALID if bad else values
        # Build even beside faults: what it finds in the other fields is reported in the same round.
        result = self.build(values, node, path, c)
        return INVALID if bad else result
