"""The condition under which a row allows: the L7 rules that a proxy enforces on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from cilia.policy.api import (
    DNSRule,
    GenericRule,
    HeaderMatch,
    HTTPRule,
    KafkaRule,
    L7Rule,
    RuleID,
)
from cilia.policy.mapstate import PolicyEntry
from cilia.policy.questions.requests import Request, passes


@dataclass(frozen=True, slots=True)
class Condition:
    """Requests that may pass, any rule being enough. Equal when they let the same rules pass,
    whichever documents those stand in."""

    parser: str
    rules: tuple[L7Rule, ...]
    server_names: tuple[str, ...] = ()
    tls: tuple[str, ...] = ()  # originating, terminating
    entries: tuple[tuple[RuleID, L7Rule | None], ...] = field(default=(), compare=False, repr=False)

    @property
    def rule_ids(self) -> tuple[RuleID, ...]:
        """The policy rules that these stand in."""
        return tuple(dict.fromkeys(x for x, _ in self.entries if x))

    def passing(self, request: Request) -> tuple[RuleID, ...]:
        """The policy rules that let a request pass."""
        return tuple(
            dict.fromkeys(
                rule_id
                for rule_id, rule in self.entries
                if rule_id and (rule is None or passes(rule, request))
            )
        )

    def shape(self) -> dict[str, Any]:
        """``{parser, rules[, server_names, tls]}``, the documented form."""
        shape: dict[str, Any] = {
            "parser": self.parser,
            "rules": [rule_shape(x) for x in self.rules],
        }
        if self.server_names:
            shape["server_names"] = list(self.server_names)
        if self.tls:
            shape["tls"] = list(self.tls)
        return shape


def condition_of(entry: PolicyEntry) -> Condition | None:
    """The condition of a row; None when it allows whatever is sent."""
    found = entry.l7
    if found is None:
        return None
    bare = found.parser in ("tls", "listener")
    if found.allows_all and not bare:
        return None
    rules = {repr(x.rule): x.rule for x in found.rules if x.rule is not None}
    contexts = (found.originating_tls, "originating"), (found.terminating_tls, "terminating")
    return Condition(
        parser=found.parser,
        rules=tuple(rules[key] for key in sorted(rules)),
        server_names=tuple(found.server_names),
        tls=tuple(name for context, name in contexts if context is not None),
        entries=tuple((x.rule_id, x.rule) for x in found.rules),
    )


def rule_shape(rule: L7Rule) -> dict[str, Any]:
    """An L7 rule as policies write it."""
    return dict(_fields(rule))


def _fields(rule: L7Rule) -> Iterator[tuple[str, Any]]:
    match rule:
        case HTTPRule(method, path, host, headers, header_matches):
            named = (("method", method), ("path", path), ("host", host))
            yield from ((name, value) for name, value in named if value)
            if headers:
                yield "headers", list(headers)
            if header_matches:
                yield "headerMatches", [_header(x) for x in header_matches]
        case KafkaRule(role, api_key, api_version, client_id, topic):
            named_kafka = (
                ("role", role),
                ("apiKey", api_key),
                ("apiVersion", api_version),
                ("clientID", client_id),
                ("topic", topic),
            )
            yield from ((name, value) for name, value in named_kafka if value)
        case DNSRule(match_name, match_pattern):
            yield ("matchName", match_name) if match_name else ("matchPattern", match_pattern)
        case GenericRule(fields):
            yield from fields


def _header(match: HeaderMatch) -> dict[str, Any]:
    shape: dict[str, Any] = {"name": match.name}
    if match.value:
        shape["value"] = match.value
    if match.secret:
        shape["secret"] = {"namespace": match.secret[0], "name": match.secret[1]}
    if match.mismatch:
        shape["mismatch"] = match.mismatch
    return shape
