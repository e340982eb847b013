"""HTTP rules as RBAC policies: what may pass.

A policy's name is the rule's id, so that the access log says which rule decided. Several rules of
one id (the list of one port rule) are one policy with several permissions.

Deny is the absence of a policy. An RBAC message *without* rules is a filter that is switched off;
every message made here has rules, and `deny_all()` has no policies in them.
"""

from __future__ import annotations

import itertools
import re
from typing import Final

from envoy.config.rbac.v3 import rbac_pb2 as policy_pb2
from envoy.config.route.v3 import route_components_pb2 as route_pb2
from envoy.extensions.filters.http.rbac.v3 import rbac_pb2

from cilia.policy.api import HeaderMatch, HTTPRule
from services.xds.translate.expressions import matcher
from services.xds.translate.model import (
    MAX_RULES,
    Direction,
    Rule,
    RuleRefused,
    RuleSet,
    SecretReader,
)

_TOKEN: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,256}")
_MAX_DASHES: Final = 6
_MAX_VALUE: Final = 8192


def filter_name(direction: Direction) -> str:
    """Of the filter in the listener, and of its configuration in routes."""
    return f"cilia.rbac.{direction.value}"


def deny_all(direction: Direction) -> rbac_pb2.RBAC:
    message = rbac_pb2.RBAC(rules_stat_prefix=f"{direction.value}_")
    message.rules.action = policy_pb2.RBAC.ALLOW
    message.rules.SetInParent()
    return message


def to_rbac(direction: Direction, rules: RuleSet, secrets: SecretReader) -> rbac_pb2.RBAC:
    """Raises RuleRefused."""
    if len(rules.rules) > MAX_RULES:
        raise RuleRefused(
            f"a rule set has {len(rules.rules)} rules, over the limit of {MAX_RULES}",
            cure="Join rules by regular expressions, or let fewer policies meet on one port",
        )
    message = deny_all(direction)
    for rule in rules.rules:
        permission = _permission(rule, secrets)
        if permission is None:
            continue
        policy = message.rules.policies[str(rule.rule_id)]
        policy.permissions.append(permission)
        if not policy.principals:
            policy.principals.add().any = True
    return message


def per_route(rbac: rbac_pb2.RBAC) -> rbac_pb2.RBACPerRoute:
    assert rbac.HasField("rules"), "an RBAC without rules would let everything pass"
    return rbac_pb2.RBACPerRoute(rbac=rbac)


def _permission(rule: Rule, secrets: SecretReader) -> policy_pb2.Permission | None:
    """What the rule's hard conditions allow; None: nothing, ever."""
    conditions = [] if rule.http is None else hard_conditions(rule.rule_id, rule.http, secrets)
    if conditions is None:
        return None
    if not conditions:
        return policy_pb2.Permission(any=True)
    permission = policy_pb2.Permission()
    rules = permission.and_rules.rules
    for condition in conditions:
        rules.add().header.CopyFrom(condition)
        # A server may take x_role for x-role (CGI does, and what descends from it): beside a
        # condition on the one, the other must be absent.
        for twin in _twins(condition.name):
            rules.add().header.CopyFrom(
                route_pb2.HeaderMatcher(name=twin, present_match=True, invert_match=True)
            )
    return permission


def hard_conditions(
    rule_id: int, rule: HTTPRule, secrets: SecretReader
) -> list[route_pb2.HeaderMatcher] | None:
    """What must hold of a request's headers; None when a secret is missing: nothing matches then.

    Raises RuleRefused.
    """
    who = f"rule {rule_id}: the"
    found: list[route_pb2.HeaderMatcher] = []
    for name, expression in ((":method", rule.method), (":path", rule.path)):
        if expression and (value := matcher(expression, what=f"{who} {name[1:]}")) is not None:
            found.append(route_pb2.HeaderMatcher(name=name, string_match=value))
    if rule.host and (value := matcher(rule.host, what=f"{who} host")) is not None:
        found.append(route_pb2.HeaderMatcher(name=":authority", string_match=value))
    for item in rule.headers:
        name, _, value_text = item.partition(" ")
        # Without a value the whole is the name: "X-Up:true" asks for a header of that odd name,
        # which no client can send, so the rule matches nothing.
        name = name.rstrip(":") if value_text else name
        found.append(_header(who, name, value_text))
    for match in rule.header_matches:
        if match.mismatch:
            continue
        expected = expected_value(match, secrets)
        if expected is None:
            return None
        found.append(_header(who, match.name, expected))
    # The first that fails ends it: comparisons before expressions, and the method last of each.
    return sorted(found, key=_cost)


def _cost(condition: route_pb2.HeaderMatcher) -> tuple[bool, bool]:
    return (condition.string_match.HasField("safe_regex"), condition.name == ":method")


def expected_value(match: HeaderMatch, secrets: SecretReader) -> str | None:
    """The value that a header match speaks of, "" for mere presence; None: its secret is missing.

    A secret holds one item; where it cannot be read the match's own value stands in, if any.
    """
    if match.secret is None:
        return match.value
    items = secrets(match.secret)
    if items is not None and len(items) == 1:
        return next(iter(items.values())).decode("latin-1").rstrip("\r\n")
    return match.value or None


def check_header(who: str, name: str, value: str) -> None:
    """Raises RuleRefused for what cannot be a header."""
    if not _TOKEN.fullmatch(name):
        raise RuleRefused(f"{who} header name {name[:80]!r} is not one that HTTP allows")
    if name.count("-") > _MAX_DASHES:
        raise RuleRefused(f"{who} header name {name[:80]!r} has more than {_MAX_DASHES} dashes")
    if len(value) > _MAX_VALUE or any(char in value for char in "\0\r\n"):
        raise RuleRefused(f"{who} value of header {name!r} is not one that HTTP allows")


def _header(who: str, name: str, value: str) -> route_pb2.HeaderMatcher:
    check_header(who, name.replace(":", "-"), value)
    header = route_pb2.HeaderMatcher(name=name.lower())
    if value:
        header.string_match.exact = value
    else:
        header.present_match = True
    return header


def _twins(name: str) -> list[str]:
    """The spellings of a header's name with underscores for some of its dashes."""
    if name.startswith(":") or "-" not in name:
        return []
    parts = name.split("-")
    return [
        "".join(itertools.chain.from_iterable(zip(parts, (*joints, ""), strict=True)))
        for joints in itertools.product("-_", repeat=len(parts) - 1)
        if "_" in joints
    ]
