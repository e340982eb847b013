"""`policy trace --policies`: the engine asked directly, without any service."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Any, Literal

from cilia.identity import cidr_labels
from cilia.labels import Labels
from cilia.policy import PolicyEngine, RuleRef, Verdict
from cli import documents, refs
from cli.errors import CliError, Exit

Mode = Literal["default", "always", "never"]


def trace(
    *,
    src: Sequence[str],
    dst: Sequence[str],
    port: int,
    protocol: str,
    paths: Sequence[str],
    mode: Mode,
    namespace: str,
) -> dict[str, Any]:
    """The same shape as the agent's answer. Raises CliError."""
    checked = documents.check(documents.read(paths), default_namespace=namespace)
    if checked.faults:
        raise documents.invalid(checked.faults, changed_nothing=False)
    engine = PolicyEngine(mode=mode)
    engine.set_documents(checked.documents)
    source = subject(src, engine, namespace)
    destination = subject(dst, engine, namespace)
    answer = engine.trace(source, destination, protocol, port)
    return {
        "verdict": "allowed" if answer.allowed else "denied",
        "egress": _verdict(answer.egress),
        "ingress": _verdict(answer.ingress),
    }


def subject(texts: Sequence[str], engine: PolicyEngine, namespace: str) -> Labels:
    """Labels of one side. An address means what is outside: the widest prefix rules speak of, or
    world."""
    text = texts[0]
    if len(texts) == 1 and refs.is_address(text):
        address = ipaddress.ip_address(text)
        matching = [p for p in engine.cidr_prefixes() if address in p]
        if matching:
            return cidr_labels(max(matching, key=lambda p: p.prefixlen))
        return Labels.parse([f"reserved:world-ipv{address.version}", "reserved:world"][:1])
    if text.partition(":")[0] in ("identity", "id", "endpoint", "ep") or (
        len(texts) == 1 and "=" not in text and ":" not in text
    ):
        raise CliError(
            f"{text!r} can only be looked up by an agent",
            code=Exit.INVALID,
            hint="With --policies say who it is by labels (app=web) or by an address.",
        )
    return refs.subject_labels(texts, namespace)


def _rule(ref: RuleRef) -> dict[str, Any]:
    return {
        "id": int(ref.rule_id),
        "name": ref.policy,
        "path": ref.path,
        "file": ref.origin.source or None,
        "line": ref.origin.line or None,
        "column": ref.origin.column or None,
    }


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        "verdict": verdict.verdict,
        "enforced": verdict.enforced,
        "reason": verdict.reason,
        "rules": [_rule(item) for item in verdict.rules],
        "default_deny": [_rule(item) for item in verdict.default_deny],
    }
