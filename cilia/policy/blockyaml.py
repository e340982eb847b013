"""The YAML that policies are mostly written in, read by itself: a dozen times as fast.

Block mappings and sequences by indentation; plain and quoted scalars, and flow collections, of one
line each; comments; several documents; printable ASCII. All else (anchors, tags, text over several
lines, escapes, empty values, ...) and whatever might be a fault is `NotPlain`, and then the whole
text is for ruamel.yaml, whose faults are reported. So what is read here must be what ruamel.yaml
reads, places included; `test_policy_blockyaml.py` compares both.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

from cilia.policy.tree import MAX_DEPTH, MAX_NODES, Node

_TEXT: Final = re.compile(r"[\n\x20-\x7e]*\Z")
_KEY: Final = re.compile(r"([A-Za-z](?:[A-Za-z0-9_./-]|:(?=[A-Za-z0-9_])){0,127}):(?: +|$)")
_FLOW_KEY: Final = re.compile(r"([A-Za-z](?:[A-Za-z0-9_./-]|:(?=[A-Za-z0-9_])){0,127}): +")
_BODY: Final = r"""A-Za-z0-9_./+=*<>()~^$@%!&|;?'"\\,\[\]{}-"""
_PLAIN: Final = re.compile(rf"[A-Za-z0-9_./](?:[{_BODY}]|:(?=[:{_BODY}])| +(?=[{_BODY}]))*")
_FLOW_PLAIN: Final = re.compile(r"[A-Za-z0-9_./](?:[A-Za-z0-9_./-]|:(?=[A-Za-z0-9_:/]))*")
_QUOTED: Final = re.compile(r"""'([^']*)'|"([^"\\]*)\"""")
_END: Final = re.compile(r" *(?:(?<= )#.*)?$")
_BLANKS: Final = re.compile(r" *")
_NULLS: Final = frozenset(("null", "Null", "NULL"))

Scalar = Callable[[str, int, int], Any]  # text, line, column


class NotPlain(Exception):
    """Not for this reader."""


class BlockReader:
    """Reads one text. `scalar` says what plain text means."""

    def __init__(self, text: str, scalar: Scalar) -> None:
        if not _TEXT.match(text):
            raise NotPlain
        self._scalar: Final = scalar
        self._nodes = 0
        self._lines: list[tuple[int, int, str]] = []  # of one document: number, indent, text
        self._at = 0
        self._documents: Final[list[list[tuple[int, int, str]]]] = [[]]
        for number, line in enumerate(text.split("\n"), start=1):
            content = line.lstrip(" ")
            if not content or content[0] == "#":
                continue
            indent = len(line) - len(content)
            if not indent and line.startswith(("---", "...", "%")):
                if line.rstrip(" ") != "---":
                    raise NotPlain
                self._documents.append([])
                continue
            self._documents[-1].append((number, indent, line.rstrip(" ")))

    def read(self) -> list[Node]:
        """Every document that is not empty. Raises NotPlain."""
        found = []
        for lines in self._documents:
            if not lines:
                continue
            self._lines, self._at = lines, 0
            if lines[0][1]:
                raise NotPlain
            node = self._node(0, 0)
            if self._at != len(lines) or not isinstance(node.value, dict | list):
                raise NotPlain
            found.append(node)
        return found

    def _count(self, depth: int) -> None:
        self._nodes += 2  # with its key
        if depth > MAX_DEPTH or self._nodes > MAX_NODES:
            raise NotPlain

    def _node(self, pos: int, depth: int) -> Node:
        """What begins here, in the present line."""
        self._count(depth)
        number, _, line = self._lines[self._at]
        if _dash(line, pos):
            return self._sequence(pos, depth)
        if _KEY.match(line, pos):
            return self._mapping(pos, depth)
        return self._inline(number, line, pos, depth)

    def _sequence(self, indent: int, depth: int) -> Node:
        node = Node([], self._lines[self._at][0], indent + 1)
        while True:
            line = self._lines[self._at][2]
            begin = _blanks(line, indent + 1)
            if _END.match(line, begin):
                self._at += 1
                if self._indent() <= indent:
                    raise NotPlain
                begin = self._indent()
            node.value.append(self._node(begin, depth + 1))
            if self._indent() < indent:
                return node
            if self._indent() > indent:
                raise NotPlain
            line = self._lines[self._at][2]
            if not _dash(line, indent):
                return node

    def _mapping(self, indent: int, depth: int) -> Node:
        keys: dict[str, tuple[int, int]] = {}
        number, _, line = self._lines[self._at]
        node = Node({}, number, indent + 1, keys)
        while True:
            number, _, line = self._lines[self._at]
            found = _KEY.match(line, indent)
            if found is None or found[1] in keys or found[1] in _NULLS:
                raise NotPlain
            key, begin = found[1], found.end()
            keys[key] = number, indent + 1
            if begin == len(line) or line[begin] == "#":
                self._at += 1
                below = self._indent()
                if below > indent:
                    node.value[key] = self._node(below, depth + 1)
                elif below == indent and _dash(self._lines[self._at][2], indent):
                    self._count(depth + 1)
                    node.value[key] = self._sequence(indent, depth + 1)
                else:
                    raise NotPlain
            else:
                self._count(depth + 1)
                node.value[key] = self._inline(number, line, begin, depth + 1)
            if self._indent() < indent:
                return node
            if self._indent() > indent:
                raise NotPlain

    def _indent(self) -> int:
        """Of the present line; less than any at the end."""
        return self._lines[self._at][1] if self._at < len(self._lines) else -1

    def _inline(self, number: int, line: str, pos: int, depth: int) -> Node:
        """A value that ends with the line."""
        first = line[pos]
        if first in "[{":
            node, end = self._flow(number, line, pos, depth)
        elif found := _QUOTED.match(line, pos):
            node, end = Node(found[found.lastindex or 0], number, pos + 1), found.end()
        elif found := _PLAIN.match(line, pos):
            node = Node(self._scalar(found[0], number, pos + 1), number, pos + 1)
            end = found.end()
        else:
            raise NotPlain
        if not _END.match(line, end):
            raise NotPlain
        self._at += 1
        return node

    def _flow(self, number: int, line: str, pos: int, depth: int) -> tuple[Node, int]:
        self._count(depth)
        first = line[pos : pos + 1]
        if first == "[":
            return self._flow_sequence(number, line, pos, depth)
        if first == "{":
            return self._flow_mapping(number, line, pos, depth)
        if found := _QUOTED.match(line, pos):
            return Node(found[found.lastindex or 0], number, pos + 1), found.end()
        if found := _FLOW_PLAIN.match(line, pos):
            return Node(self._scalar(found[0], number, pos + 1), number, pos + 1), found.end()
        raise NotPlain

    def _flow_sequence(self, number: int, line: str, pos: int, depth: int) -> tuple[Node, int]:
        node = Node([], number, pos + 1)
        pos = _blanks(line, pos + 1)
        if line.startswith("]", pos):
            return node, pos + 1
        while True:
            item, pos = self._flow(number, line, pos, depth + 1)
            node.value.append(item)
            pos = _blanks(line, pos)
            if line.startswith("]", pos):
                return node, pos + 1
            if not line.startswith(",", pos):
                raise NotPlain
            pos = _blanks(line, pos + 1)

    def _flow_mapping(self, number: int, line: str, pos: int, depth: int) -> tuple[Node, int]:
        keys: dict[str, tuple[int, int]] = {}
        node = Node({}, number, pos + 1, keys)
        pos = _blanks(line, pos + 1)
        if line.startswith("}", pos):
            return node, pos + 1
        while True:
            found = _FLOW_KEY.match(line, pos)
            if found is None or found[1] in keys or found[1] in _NULLS:
                raise NotPlain
            keys[found[1]] = number, pos + 1
            node.value[found[1]], pos = self._flow(number, line, found.end(), depth + 1)
            pos = _blanks(line, pos)
            if line.startswith("}", pos):
                return node, pos + 1
            if not line.startswith(",", pos):
                raise NotPlain
            pos = _blanks(line, pos + 1)


def _dash(line: str, pos: int) -> bool:
    """Whether an entry of a sequence begins here."""
    return line.startswith("-", pos) and line[pos + 1 : pos + 2] in ("", " ")


def _blanks(line: str, pos: int) -> int:
    """Where the blanks from here on end."""
    found = _BLANKS.match(line, pos)
    return found.end() if found else pos
