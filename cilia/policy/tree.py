"""Text to a tree that remembers where each value stood.

YAML (many documents) and JSON both become the same nodes, with 1-based lines and columns. Documents
come from people and from the network, so everything is bounded: bytes, nesting, number of values,
and the size that YAML aliases expand to. A key given twice is a fault, not a silent overwrite.

JSON is read by its own small parser: ruamel.yaml would do, at a hundredth of the speed. ruamel.yaml
is imported only when YAML is read, so a process that only loads stored documents never pays for it.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

MAX_YAML_BYTES: Final = 4 << 20
MAX_JSON_BYTES: Final = 32 << 20
MAX_DEPTH: Final = 48
MAX_NODES: Final = 2_000_000
MAX_ALIASED_NODES: Final = 100_000
MAX_KEY: Final = 1024

Scalar = str | int | float | bool | None


@dataclass(slots=True)
class Node:
    """A value and the place of its first character. `keys` holds the places of a mapping's keys."""

    value: Any  # scalar | list[Node] | dict[str, Node]
    line: int = 0
    column: int = 0
    keys: dict[str, tuple[int, int]] | None = None

    def plain(self) -> Any:
        """The value without positions, as json.loads would give it."""
        value = self.value
        if isinstance(value, dict):
            return {key: child.plain() for key, child in value.items()}
        if isinstance(value, list):
            return [child.plain() for child in value]
        return value


class TreeError(Exception):
    """The text is not a document at all: one message, one place."""

    def __init__(self, message: str, line: int = 0, column: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.line = line
        self.column = column


def from_plain(value: Any, line: int = 0, column: int = 0) -> Node:
    """A tree over plain data, every value at the one place given."""
    if isinstance(value, dict):
        return Node(
            {str(k): from_plain(v, line, column) for k, v in value.items()}, line, column, {}
        )
    if isinstance(value, list):
        return Node([from_plain(v, line, column) for v in value], line, column)
    return Node(value, line, column)


def parse_text(text: bytes | str) -> list[Node]:
    """Every document of the text. Empty documents are left out. Raises TreeError."""
    if isinstance(text, bytes):
        if len(text) > MAX_JSON_BYTES:
            raise TreeError(f"the text is longer than {MAX_JSON_BYTES >> 20} MiB")
        try:
            decoded = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = text.count(b"\n", 0, error.start) + 1
            raise TreeError(f"the text is not UTF-8: {error.reason}", line, 1) from None
    else:
        if len(text) > MAX_JSON_BYTES:
            raise TreeError(f"the text is longer than {MAX_JSON_BYTES >> 20} MiB")
        decoded = text.removeprefix("\ufeff")
    if decoded.lstrip()[:1] in ("{", "["):
        try:
            return [_JsonReader(decoded).read()]
        except _NotJsonError as error:
            # It may be YAML in flow style. If that fails too, what was begun as JSON is reported as
            # JSON.
            try:
                return parse_yaml(decoded)
            except TreeError:
                raise TreeError(error.message, error.line, error.column) from None
    return parse_yaml(decoded)


# ---- JSON


class _NotJsonError(TreeError):
    """Bad JSON syntax, which may still be good YAML."""


_WHITESPACE: Final = re.compile(r"[ \t\n\r]*")
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_NUMBER: Final = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_scanstring: Final[Callable[[str, int, bool], tuple[str, int]]] = json.decoder.scanstring  # type: ignore[attr-defined]  # not in the stubs, public in the module


class _JsonReader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.starts = [0, *(m.end() for m in re.finditer("\n", text))]
        self.nodes = 0

    def place(self, at: int) -> tuple[int, int]:
        line = bisect_right(self.starts, at)
        return line, at - self.starts[line - 1] + 1

    def fail(self, message: str, at: int) -> _NotJsonError:
        return _NotJsonError(f"invalid JSON: {message}", *self.place(at))

    def blank(self, at: int) -> int:
        first = self.text[at : at + 1]
        if first and first not in " \t\n\r":
            return at
        found = _WHITESPACE.match(self.text, at)
        return found.end() if found else at

    def read(self) -> Node:
        node, at = self.value(self.blank(0), 0)
        at = self.blank(at)
        if at != len(self.text):
            raise self.fail("something follows the document", at)
        return node

    def string(self, at: int) -> tuple[str, int]:
        try:
            text, end = _scanstring(self.text, at + 1, True)
        except json.JSONDecodeError as error:
            raise self.fail(error.msg, error.pos) from None
        if not text.isascii() and _SURROGATE.search(text):
            raise TreeError("a lone surrogate is no character", *self.place(at))
        return text, end

    def value(self, at: int, depth: int) -> tuple[Node, int]:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise TreeError(f"the document has more than {MAX_NODES} values", *self.place(at))
        if depth > MAX_DEPTH:
            raise TreeError(f"the document is nested deeper than {MAX_DEPTH}", *self.place(at))
        text = self.text
        line, column = self.place(at)
        first = text[at : at + 1]
        if first == "{":
            return self.mapping(at, depth, Node({}, line, column, {}))
        if first == "[":
            return self.sequence(at, depth, Node([], line, column))
        if first == '"':
            string, end = self.string(at)
            return Node(string, line, column), end
        for word, constant in (("true", True), ("false", False), ("null", None)):
            if text.startswith(word, at):
                return Node(constant, line, column), at + len(word)
        found = _NUMBER.match(text, at)
        if not found:
            raise self.fail("a value was expected", at)
        return Node(_number(found.group(), *self.place(at)), line, column), found.end()

    def mapping(self, at: int, depth: int, node: Node) -> tuple[Node, int]:
        at = self.blank(at + 1)
        if self.text[at : at + 1] == "}":
            return node, at + 1
        assert node.keys is not None
        while True:
            if self.text[at : at + 1] != '"':
                raise self.fail("a key in double quotes was expected", at)
            place = self.place(at)
            key, end = self.string(at)
            if key in node.value:
                raise TreeError(f"the key {key[:80]!r} is given twice", *place)
            at = self.blank(end)
            if self.text[at : at + 1] != ":":
                raise self.fail("':' was expected", at)
            node.value[key], at = self.value(self.blank(at + 1), depth + 1)
            node.keys[key] = place
            at = self.blank(at)
            match self.text[at : at + 1]:
                case ",":
                    at = self.blank(at + 1)
                case "}":
                    return node, at + 1
                case _:
                    raise self.fail("',' or '}' was expected", at)

    def sequence(self, at: int, depth: int, node: Node) -> tuple[Node, int]:
        at = self.blank(at + 1)
        if self.text[at : at + 1] == "]":
            return node, at + 1
        while True:
            item, at = self.value(at, depth + 1)
            node.value.append(item)
            at = self.blank(at)
            match self.text[at : at + 1]:
                case ",":
                    at = self.blank(at + 1)
                case "]":
                    return node, at + 1
                case _:
                    raise self.fail("',' or ']' was expected", at)


def _number(text: str, line: int, column: int) -> int | float:
    if len(text) > 40:
        raise TreeError("a number is longer than 40 characters", line, column)
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if number in (float("inf"), float("-inf")):
            raise TreeError("a number is out of range", line, column) from None
        return number


# ---- YAML

# The core schema of YAML 1.2: `yes`, `on` and `0777` are text, unlike in YAML 1.1.
# An integer with a leading zero is octal to readers of YAML 1.1, decimal to those of 1.2: it stays
# text, for the field to judge.
_YAML_INT: Final = re.compile(r"[-+]?(0|[1-9][0-9]*)\Z")
_YAML_ZERO: Final = re.compile(r"[-+]?0[0-9]+\Z")
_YAML_RADIX: Final = re.compile(r"0o[0-7]+\Z|0x[0-9a-fA-F]+\Z")
_YAML_FLOAT: Final = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_YAML_WORDS: Final[dict[str, Scalar]] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


def _plain_scalar(text: str, line: int, column: int) -> Scalar:
    if text in _YAML_WORDS:
        return _YAML_WORDS[text]
    if _YAML_ZERO.match(text):
        return text
    if _YAML_INT.match(text) or _YAML_FLOAT.match(text):
        return _number(text, line, column)
    if len(text) <= 20 and _YAML_RADIX.match(text):
        return int(text, 0)
    return text


def parse_yaml(text: str) -> list[Node]:
    """Every YAML document of the text, empty ones left out. Raises TreeError."""
    if len(text) > MAX_YAML_BYTES:
        raise TreeError(
            f"the YAML text is longer than {MAX_YAML_BYTES >> 20} MiB; "
            f"JSON may have {MAX_JSON_BYTES >> 20} MiB"
        )
    _refuse_deep_flow(text)
    import ruamel.yaml  # slow to import, and needed by few processes
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    yaml = ruamel.yaml.YAML(typ="safe", pure=True)
    try:
        return list(_YamlReader(yaml.parse(text)).documents())
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = str(error.problem or error.context or "cannot be read").split("\n")[0]
        line, column = (mark.line + 1, mark.column + 1) if mark else (0, 0)
        raise TreeError(f"invalid YAML: {problem}", line, column) from None
    except YAMLError as error:
        raise TreeError(f"invalid YAML: {str(error).splitlines()[0]}") from None
    except (ValueError, TypeError, AttributeError, LookupError, AssertionError) as error:
        # ruamel.yaml 0.19 lets these escape on some malformed directives, tags and escapes.
        raise TreeError(f"invalid YAML: {type(error).__name__}") from None
    except RecursionError:
        raise TreeError("invalid YAML: nested too deeply") from None


def _refuse_deep_flow(text: str) -> None:
    # The scanner keeps possible simple keys per flow level and walks all of them for each token, so
    # a run of brackets is quadratic before the first event is out. No real document has half as
    # many in a row.
    if found := re.search(rf"(?:[\[{{]\s*){{{MAX_DEPTH + 1}}}", text):
        line = text.count("\n", 0, found.start()) + 1
        raise TreeError(f"the document is nested deeper than {MAX_DEPTH}", line, 1)


class _YamlReader:
    """Builds nodes from ruamel.yaml's events; the composer of the library has no bounds."""

    def __init__(self, events: Iterator[Any]) -> None:
        self.events = events
        self.nodes = 0
        self.aliased = 0
        self.anchors: dict[str, tuple[Node, int]] = {}

    def documents(self) -> Iterator[Node]:
        for event in self.events:
            name = type(event).__name__
            if name == "DocumentStartEvent":
                self.anchors.clear()
                node, _ = self.node(next(self.events), 0)
                if node.value is not None:
                    yield node

    def node(self, event: Any, depth: int) -> tuple[Node, int]:
        """The node that begins with this event, and how many values it holds."""
        mark = event.start_mark
        line, column = mark.line + 1, mark.column + 1
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise TreeError(f"the document has more than {MAX_NODES} values", line, column)
        if depth > MAX_DEPTH:
            raise TreeError(f"the document is nested deeper than {MAX_DEPTH}", line, column)
        match type(event).__name__:
            case "AliasEvent":
                if event.anchor not in self.anchors:
                    raise TreeError(f"the alias *{event.anchor} has no anchor", line, column)
                node, size = self.anchors[event.anchor]
                self.aliased += size
                if self.aliased > MAX_ALIASED_NODES:
                    raise TreeError(
                        f"aliases expand to more than {MAX_ALIASED_NODES} values", line, column
                    )
                if _depth(node) + depth > MAX_DEPTH:
                    raise TreeError(f"the document is nested deeper than {MAX_DEPTH}", line, column)
                return node, size
            case "ScalarEvent":
                node, size = Node(self.scalar(event, line, column), line, column), 1
            case "SequenceStartEvent":
                node, size = self.sequence(depth, Node([], line, column))
            case "MappingStartEvent":
                node, size = self.mapping(depth, Node({}, line, column, {}))
            case other:
                raise TreeError(f"invalid YAML: unexpected {other}", line, column)
        if event.anchor is not None:
            self.anchors[event.anchor] = node, size
        return node, size

    def scalar(self, event: Any, line: int, column: int) -> Scalar:
        if _SURROGATE.search(event.value):
            raise TreeError("a lone surrogate is no character", line, column)
        tag = str(event.tag) if event.tag is not None else None
        if tag in (None, "None", "!"):
            plain = event.style is None or event.style == ""
            return _plain_scalar(event.value, line, column) if plain else str(event.value)
        if tag.endswith(":str"):
            return str(event.value)
        raise TreeError(f"the tag {tag[:80]!r} is not supported", line, column)

    def sequence(self, depth: int, node: Node) -> tuple[Node, int]:
        size = 1
        while type(event := next(self.events)).__name__ != "SequenceEndEvent":
            item, n = self.node(event, depth + 1)
            node.value.append(item)
            size += n
        return node, size

    def mapping(self, depth: int, node: Node) -> tuple[Node, int]:
        size = 1
        assert node.keys is not None
        while type(event := next(self.events)).__name__ != "MappingEndEvent":
            key, n = self.node(event, depth + 1)
            place = event.start_mark.line + 1, event.start_mark.column + 1
            # Kubernetes' YAML reader makes text of scalar keys too: `8080: x` has the key "8080".
            if isinstance(key.value, (list, dict)) or key.value is None:
                raise TreeError("a key must be text", *place)
            name = str(event.value) if type(event).__name__ == "ScalarEvent" else str(key.value)
            if len(name) > MAX_KEY:
                raise TreeError(f"a key is longer than {MAX_KEY} characters", *place)
            if name == "<<":
                raise TreeError("merge keys ('<<') are not supported: write the fields out", *place)
            if name in node.value:
                raise TreeError(f"the key {name[:80]!r} is given twice", *place)
            node.value[name], m = self.node(next(self.events), depth + 1)
            node.keys[name] = place
            size += n + m
        return node, size


def _depth(node: Node) -> int:
    value = node.value
    if isinstance(value, dict):
        return 1 + max((_depth(child) for child in value.values()), default=0)
    if isinstance(value, list):
        return 1 + max((_depth(child) for child in value), default=0)
    return 0
