"""Requests, and whether L7 rules let them pass, as the proxies judge them.

Methods, paths and hosts are RE2 expressions that must match the whole (the path with its query);
header names are compared without case, values exactly.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from cilia.policy.api import DNSRule, GenericRule, HTTPRule, KafkaRule, L7Rule

# The requests that a client needs to produce or to consume (Kafka protocol, names of API keys).
_ROLES: Final = {
    "produce": frozenset(("produce", "metadata", "apiversions")),
    "consume": frozenset(
        (
            "fetch",
            "offsets",
            "metadata",
            "offsetcommit",
            "offsetfetch",
            "findcoordinator",
            "joingroup",
            "heartbeat",
            "leavegroup",
            "syncgroup",
            "apiversions",
        )
    ),
}


@dataclass(frozen=True, slots=True)
class HTTPRequest:
    """An HTTP request's head. An empty host: none was said."""

    method: str = "GET"
    path: str = "/"
    host: str = ""
    headers: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"{self.method} {self.host}{self.path}"


@dataclass(frozen=True, slots=True)
class DNSRequest:
    """A DNS question."""

    name: str

    def __str__(self) -> str:
        return f"DNS {self.name}"


@dataclass(frozen=True, slots=True)
class KafkaRequest:
    """A Kafka request; what is empty was not said."""

    api_key: str
    topic: str = ""
    client_id: str = ""
    api_version: str = ""

    def __str__(self) -> str:
        return f"Kafka {self.api_key} {self.topic}".rstrip()


Request = HTTPRequest | DNSRequest | KafkaRequest
PARSERS: Final = {HTTPRequest: "http", DNSRequest: "dns", KafkaRequest: "kafka"}


def passes(rule: L7Rule, request: Request) -> bool:
    """Whether one rule lets a request pass. Rules of other protocols never do."""
    match rule, request:
        case HTTPRule(), HTTPRequest():
            return not http_mismatches(rule, request)
        case DNSRule(), DNSRequest():
            return rule.matches_name(request.name)
        case KafkaRule(), KafkaRequest():
            return _kafka(rule, request)
        case GenericRule(fields), _:
            return not fields
        case _:
            return False


def http_mismatches(rule: HTTPRule, request: HTTPRequest) -> tuple[str, ...]:
    """What of a request the rule does not allow, in words; nothing: it passes."""
    wrong = []
    for name, pattern, value in (
        ("method", rule.method, request.method),
        ("path", rule.path, request.path),
        ("host", rule.host, request.host),
    ):
        if pattern and not _whole(pattern, value):
            wrong.append(f"{name} {value or '(none)'} is not {pattern}")
    for text in rule.headers:
        name, _, value = (x.strip() for x in text.partition(":"))
        if not _has(request, name, value):
            wrong.append(f"header {text} is missing")
    for match in rule.header_matches:
        if match.mismatch:
            continue  # the proxy mends the request and lets it pass
        if match.secret is not None or not _has(request, match.name, match.value):
            what = "the value of a secret" if match.secret else match.value or "any value"
            wrong.append(f"header {match.name} with {what} is missing")
    return tuple(wrong)


def _has(request: HTTPRequest, name: str, value: str) -> bool:
    return any(
        name.lower() == key.lower() and value in ("", found) for key, found in request.headers
    )


def _whole(pattern: str, text: str) -> bool:
    import re2  # slow to import, and only L7 rules have regular expressions

    return re2.fullmatch(pattern, text) is not None


def _kafka(rule: KafkaRule, request: KafkaRequest) -> bool:
    key = request.api_key.lower()
    keys = _ROLES.get(rule.role, frozenset()) if rule.role else None
    return (
        (keys is None or key in keys)
        and rule.api_key in ("", key)
        and rule.topic in ("", request.topic)
        and rule.client_id in ("", request.client_id)
        and rule.api_version in ("", request.api_version)
    )


def any_passes(rules: Iterable[L7Rule], request: Request) -> bool:
    """Whether some rule lets it pass."""
    return any(passes(rule, request) for rule in rules)
