"""Small changes of YAML and JSON text, made where they belong: what stands around them, comments
and style included, stays as it was.

A change is written as text and made on plain data too. The text must read back as that data; where
it does not (odd layouts), the document is written anew from the data, without its comments.
"""

from __future__ import annotations

import copy
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

from cilia.policy.api import Document
from cilia.policy.tree import Node, TreeError, from_plain, parse_text

Step = str | int
Path = tuple[Step, ...]
_TOKEN: Final = re.compile(r"\[(\d+)\]|([^.\[\]]+)")


@dataclass(frozen=True, slots=True)
class Op:
    """One change. `path` leads to the list appended to, or to the value set or removed."""

    action: Literal["append", "set", "remove"]
    path: Path
    value: Any = None

    @property
    def path_text(self) -> str:
        """``spec.ingress[0].fromEndpoints``"""
        return path_text(self.path)


def parse_path(text: str) -> Path:
    """``spec.ingress[0]`` as steps."""
    return tuple(int(m[1]) if m[1] else m[2] for m in _TOKEN.finditer(text))


def path_text(path: Path) -> str:
    """Undo parse_path()."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else (f".{step}" if text else step)
    return text


# ---- plain data


def apply_plain(value: Any, op: Op) -> Any:
    """The data after a change. Raises LookupError or TypeError where the path leads nowhere."""
    made = copy.deepcopy(value)
    parent = made
    for step in op.path[:-1]:
        parent = parent[step]
    last = op.path[-1]
    match op.action:
        case "append":
            parent[last].append(copy.deepcopy(op.value))
        case "set":
            parent[last] = copy.deepcopy(op.value)
        case "remove":
            del parent[last]
    return made


# ---- writing values


def block(value: Any) -> list[str]:
    """A value as lines of block style YAML."""
    from ruamel.yaml import YAML  # slow to import, and needed by few processes

    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    out = io.StringIO()
    # What YAML 1.1 would read as a number or a word stays text: readers of both are about.
    yaml.dump(_quoted(value), out)
    lines = out.getvalue().rstrip("\n").split("\n")
    if lines and lines[-1] == "...":
        lines.pop()
    # a list of its own is not indented
    if isinstance(value, list) and value:
        lines = [line[2:] for line in lines]
    return lines


def _quoted(value: Any) -> Any:
    from ruamel.yaml.scalarstring import DoubleQuotedScalarString

    if isinstance(value, dict):
        return {k: _quoted(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_quoted(v) for v in value]
    if isinstance(value, str) and not _plain_text(value):
        return DoubleQuotedScalarString(value)
    return value


_WORDS: Final = frozenset(
    ("", "~", "null", "true", "false", "yes", "no", "on", "off", "y", "n", ".inf", ".nan")
)


def _plain_text(text: str) -> bool:
    """Whether text may stand unquoted in YAML, in flow style too, and stays text everywhere."""
    return (
        re.fullmatch(r"[A-Za-z_/][-A-Za-z0-9_./]*", text) is not None and text.lower() not in _WORDS
    )


def flow(value: Any, *, strict: bool = False) -> str:
    """A value on one line; strict: as JSON."""
    if strict:
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{flow(k)}: {flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(flow, value)) + "]"
    if isinstance(value, str) and _plain_text(value):
        return value
    return json.dumps(value, ensure_ascii=False)


# ---- text


@dataclass(frozen=True, slots=True)
class Changed:
    """Text after a change; the line of the original text at which it was made, from 1."""

    text: str
    line: int


def edit(text: str, document: Document, op: Op) -> Changed:
    """Make one change of a document in the text that it was read from.

    Raises LookupError when the document or the path is not in the text.
    """
    node = _document(text, document)
    wanted = apply_plain(_plain(text, document), op)
    changed = _edit_text(text, node, op)
    if changed is not None:
        try:
            if _plain(changed.text, document) == wanted:
                return changed
        except (LookupError, TreeError):
            pass
    return _rewritten(text, node, wanted)


def excerpt(text: str, document: Document) -> str:
    """The text of one document alone; all of the text, comments too, if it holds no other."""
    node = _document(text, document)
    roots = _compose(text)
    if len(roots) == 1 and roots[0].start_mark.index == node.start_mark.index:
        return text if text.endswith("\n") else text + "\n"
    start = _line_start(text, node.start_mark.index)
    if node.flow_style or node.start_mark.column:
        return "\n".join(block(_plain(text, document))) + "\n"
    return text[start : _end(text, node)].rstrip("\n") + "\n"


def _compose(text: str) -> list[Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return [x for x in YAML(typ="rt", pure=True).compose_all(text) if x is not None]
    except YAMLError as error:
        raise LookupError("the text cannot be read") from error


def _document(text: str, document: Document) -> Any:
    """The YAML node that a document was read from, by its place."""
    line, column = document.origin.line - 1, document.origin.column - 1
    for root in _compose(text):
        for node in (root, *_items(root)):
            mark = node.start_mark
            if (mark.line, mark.column) == (line, column):
                return node
    raise LookupError(f"{document.ref} is not at {document.origin}")


def _items(root: Any) -> Iterator[Any]:
    """The documents of a List."""
    for name, value in _pairs(root):
        if name == "items":
            for item in value.value if isinstance(value.value, list) else ():
                yield item
                yield from _items(item)


def _pairs(node: Any) -> Iterator[tuple[str, Any]]:
    if type(node).__name__ == "MappingNode":
        for key, value in node.value:
            yield str(key.value), value


def _plain(text: str, document: Document) -> Any:
    """The document's data, as the policy language reads it."""
    line, column = document.origin.line, document.origin.column

    def search(node: Node) -> Node | None:
        if (node.line, node.column) == (line, column):
            return node
        if isinstance(node.value, dict) and isinstance(
            (items := node.value.get("items", from_plain(None))).value, list
        ):
            return next((x for x in map(search, items.value) if x is not None), None)
        return None

    for root in parse_text(text):
        if (found := search(root)) is not None:
            return found.plain()
    raise LookupError(f"{document.ref} is not at {document.origin}")


def _at(node: Any, path: Path) -> Any:
    for step in path:
        node = node.value[step] if isinstance(step, int) else dict(_pairs(node))[step]
    return node


def _leaves(node: Any) -> Iterator[Any]:
    """What ends where its text ends: scalars, and collections in flow style."""
    children = node.value if isinstance(node.value, list) else []
    if not children or node.flow_style:
        yield node
        return
    for child in children:
        for part in child if isinstance(child, tuple) else (child,):
            yield from _leaves(part)


def _end(text: str, node: Any) -> int:
    """Where the text of a node ends, blanks and comments behind it not counted."""
    end: int = max(x.end_mark.index for x in _leaves(node))
    while end and text[end - 1] in "\n\r \t":
        end -= 1
    start: int = node.start_mark.index
    return max(end, start)


def _line_start(text: str, at: int) -> int:
    return text.rfind("\n", 0, at) + 1


def _line_end(text: str, at: int) -> int:
    found = text.find("\n", at)
    return len(text) if found < 0 else found


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _edit_text(text: str, document: Any, op: Op) -> Changed | None:
    """The change made in place; None where the layout is not one of the usual."""
    strict = text.lstrip()[:1] in ("{", "[")
    last = op.path[-1]
    match op.action:
        case "append":
            return _append(text, _at(document, op.path), op.value, strict)
        case "set":
            parent = _at(document, op.path[:-1])
            if isinstance(last, str) and last not in dict(_pairs(parent)):
                return _add_key(text, parent, last, op.value, strict)
            return _replace(text, _at(document, op.path), op.value, strict)
        case "remove":
            return _remove(text, _at(document, op.path[:-1]), last)


def _append(text: str, node: Any, value: Any, strict: bool) -> Changed | None:
    if not isinstance(node.value, list) or type(node).__name__ != "SequenceNode":
        return None
    if node.flow_style or not node.value:
        return _into_flow(text, node, flow(value, strict=strict), strict)
    column = node.start_mark.column
    end = _line_end(text, _end(text, node))
    lines = block(value)
    margin = " " * column
    # A list in a list item: deeper lines align with the first, behind the dash.
    new = "".join(
        f"\n{margin}{'- ' if i == 0 else '  '}{line}" if line else "\n"
        for i, line in enumerate(lines)
    )
    return Changed(text[:end] + new + text[end:], _line(text, end) + 1)


def _into_flow(text: str, node: Any, what: str, strict: bool) -> Changed | None:
    """Put something behind the last thing between brackets."""
    closing = "]" if type(node).__name__ == "SequenceNode" else "}"
    at: int = node.end_mark.index - 1
    if at < 0 or text[at] != closing:
        return None
    if not node.value:
        return Changed(text[:at].rstrip() + what + text[at:], _line(text, at))
    last = node.value[-1][1] if isinstance(node.value[-1], tuple) else node.value[-1]
    end: int = last.end_mark.index
    first = node.value[0][0] if isinstance(node.value[0], tuple) else node.value[0]
    # Things below each other get one more line, aligned.
    many = len(node.value) > 1 or strict
    if many and first.start_mark.line != node.start_mark.line:
        gap = "\n" + " " * first.start_mark.column
    else:
        gap = " "
    return Changed(text[:end] + "," + gap + what + text[end:], _line(text, end))


def _add_key(text: str, node: Any, key: str, value: Any, strict: bool) -> Changed | None:
    if type(node).__name__ != "MappingNode":
        return None
    if node.flow_style or not node.value:
        name = json.dumps(key) if strict else flow(key)
        return _into_flow(text, node, f"{name}: {flow(value, strict=strict)}", strict)
    column = node.value[0][0].start_mark.column
    end = _line_end(text, _end(text, node))
    margin = " " * column
    new = "".join(f"\n{margin}{line}" if line else "\n" for line in block({key: value}))
    return Changed(text[:end] + new + text[end:], _line(text, end) + 1)


def _replace(text: str, node: Any, value: Any, strict: bool) -> Changed | None:
    start: int = node.start_mark.index
    end = _end(text, node)
    children = isinstance(node.value, list) and node.value and not node.flow_style
    if children and isinstance(value, dict | list) and value:
        new = ("\n" + " " * node.start_mark.column).join(block(value))
    else:
        new = flow(value, strict=strict)
    return Changed(text[:start] + new + text[end:], _line(text, start))


def _remove(text: str, parent: Any, last: Step) -> Changed | None:
    if len(parent.value) < 2:
        return _emptied(text, parent)
    entries = [x if isinstance(x, tuple) else (x, x) for x in parent.value]
    if isinstance(last, int):
        index = last
    else:
        index = next(i for i, (key, _) in enumerate(entries) if str(key.value) == last)
    head, tail = entries[index]
    if parent.flow_style:
        if index + 1 < len(entries):
            start, end = head.start_mark.index, entries[index + 1][0].start_mark.index
        else:
            start, end = entries[index - 1][1].end_mark.index, tail.end_mark.index
        return Changed(text[:start] + text[end:], _line(text, start))
    start = _line_start(text, head.start_mark.index)
    before = text[start : head.start_mark.index]
    if before.strip() not in ("", "-") or (before.strip() and not isinstance(last, int)):
        return None  # shares its line with something else
    end = min(_line_end(text, _end(text, tail)) + 1, len(text))
    return Changed(text[:start] + text[end:], _line(text, start))


def _emptied(text: str, node: Any) -> Changed | None:
    empty = "[]" if type(node).__name__ == "SequenceNode" else "{}"
    start, end = node.start_mark.index, _end(text, node)
    head = text[:start]
    if not node.flow_style:
        head = head.rstrip()
        if not head.endswith(":"):
            return None  # a comment stands between
        head += " "
    return Changed(head + empty + text[end:], _line(text, start))


def _rewritten(text: str, node: Any, value: Any) -> Changed:
    """The whole document anew."""
    start: int = node.start_mark.index
    end = _end(text, node)
    strict = text.lstrip()[:1] in ("{", "[")
    if node.flow_style or strict:
        new = flow(value, strict=strict)
    else:
        new = ("\n" + " " * node.start_mark.column).join(block(value))
    return Changed(text[:start] + new + text[end:], _line(text, start))
