"""Label selectors as Kubernetes writes them: `a=b,c!=d,e in (x,y),f notin (z),g,!h`.

A key may name the source of the label, `k8s:app`; without one it stands for any source. The
semantics are those of Kubernetes: `!=` and `notin` also match where there is no such key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final

import re2

from services.flows.filterspec import FilterInvalid

MAX_SELECTOR: Final = 4096
_KEY: Final = r"[A-Za-z0-9](?:[-A-Za-z0-9_./]*[A-Za-z0-9])?"
_TOKEN: Final = re2.compile(
    r"^\s*(?:"
    rf"(?P<negated>!)?\s*(?P<key>(?:[a-z0-9-]+:)?{_KEY})\s*"
    r"(?:(?P<op>==|=|!=)\s*(?P<value>[^,()!=\s]*)"
    r"|\s(?P<set>in|notin)\s*\((?P<values>[^()]*)\))?"
    r")\s*(?:,|$)"
)


class Operator(Enum):
    IN = "in"
    NOT_IN = "notin"
    EXISTS = "exists"
    ABSENT = "absent"


@dataclass(frozen=True, slots=True)
class Requirement:
    source: str  # "": any
    key: str
    operator: Operator
    values: frozenset[str] = frozenset()

    def matches(self, labels: Iterable[tuple[str, str, str]]) -> bool:
        """Whether labels, as (source, key, value), fulfil it."""
        found = [
            value
            for source, key, value in labels
            if key == self.key and (not self.source or source == self.source)
        ]
        match self.operator:
            case Operator.IN:
                return any(value in self.values for value in found)
            case Operator.NOT_IN:
                return not any(value in self.values for value in found)
            case Operator.EXISTS:
                return bool(found)
            case Operator.ABSENT:
                return not found


def split_label(text: str) -> tuple[str, str, str]:
    """`source:key=value` in its parts; what has no source has an empty one."""
    source, colon, rest = text.partition(":")
    if not colon or "=" in source:
        source, rest = "", text
    key, _, value = rest.partition("=")
    return source, key, value


def parse(text: str) -> tuple[Requirement, ...]:
    """All of them must hold; none for an empty selector. Raises FilterInvalid."""
    if len(text) > MAX_SELECTOR:
        raise FilterInvalid(
            f"a label selector of {len(text)} characters is too long",
            cure=f"At most {MAX_SELECTOR}",
        )
    requirements = []
    rest = text
    while rest.strip():
        match = _TOKEN.match(rest)
        if match is None:
            raise FilterInvalid(
                f"label selector {text!r} cannot be read at {rest.strip()[:40]!r}",
                cure="Write it as a=b,c!=d,e in (x,y),f notin (z),g,!h",
            )
        parts = match.groupdict()
        source, colon, key = parts["key"].partition(":")
        if not colon:
            source, key = "", source
        if source == "any":
            source = ""
        if parts["op"] or parts["set"]:
            if parts["negated"]:
                raise FilterInvalid(
                    f"label selector {text!r}: ! stands before a key alone",
                    cure="Write key!=value, or key notin (values)",
                )
            if parts["op"]:
                operator = Operator.NOT_IN if parts["op"] == "!=" else Operator.IN
                values = frozenset((parts["value"],))
            else:
                operator = Operator.NOT_IN if parts["set"] == "notin" else Operator.IN
                values = frozenset(value.strip() for value in parts["values"].split(","))
        else:
            operator = Operator.ABSENT if parts["negated"] else Operator.EXISTS
            values = frozenset()
        requirements.append(Requirement(source, key, operator, values))
        rest = rest[match.end() :]
    return tuple(requirements)


def matcher(selectors: Iterable[str]) -> Callable[[tuple[str, ...]], bool]:
    """Whether any of the selectors matches a tuple of labels. Raises FilterInvalid."""
    parsed = [parse(text) for text in selectors]

    def matches(labels: tuple[str, ...]) -> bool:
        split = [split_label(label) for label in labels]
        return any(all(need.matches(split) for need in needs) for needs in parsed)

    return matches
