"""What a proxy must enforce for one row: the L7 rules that meet there, merged into one set.

An `L7Set` is what a redirect is made from. Rows with equal sets share a redirect, on this node and
after a restart, so a set has a digest: of its content, not of where it was met.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Final

from cilia.policy.api import (
    PARSER_LISTENER,
    PARSER_TLS,
    L7Rule,
    L7Rules,
    RuleID,
    TLSContext,
)

#: Every parser that some version of Cilia's proxies enforces; offline tools take all to be there.
ALL_PARSERS: Final = frozenset(("http", "kafka", "dns", PARSER_TLS, PARSER_LISTENER))
_DIGEST_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class L7Entry:
    """One kind of request that passes. `rule` None: every request, by a rule without an L7 part."""

    rule_id: RuleID
    rule: L7Rule | None = None


@dataclass(frozen=True, slots=True, eq=False)
class L7Set:
    """Requests that may pass, any entry being enough. Equal when the digests are."""

    parser: str
    egress: bool
    rules: tuple[L7Entry, ...]
    originating_tls: TLSContext | None = None
    terminating_tls: TLSContext | None = None
    server_names: tuple[str, ...] = ()
    listener: str = ""
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        content = [_plain(getattr(self, f.name)) for f in fields(self) if f.name != "digest"]
        data = json.dumps(content, separators=(",", ":"), ensure_ascii=True).encode()
        object.__setattr__(self, "digest", hashlib.sha256(data).hexdigest()[: 2 * _DIGEST_BYTES])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, L7Set) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def allows_all(self) -> bool:
        """Whether every request passes: it is redirected to be seen, not to be judged."""
        return any(entry.rule is None for entry in self.rules)

    @property
    def watches(self) -> bool:
        """Whether the proxy has nothing to do but to look on: without it all may pass directly."""
        return all(entry.rule is None for entry in self.rules) and not (
            self.originating_tls or self.terminating_tls or self.server_names or self.listener
        )

    def __str__(self) -> str:
        return f"{self.parser} {self.digest[:8]}"


def _plain(value: Any) -> Any:
    """A value as JSON can say it, with the type of each dataclass, so that none looks like other"""
    if isinstance(value, tuple):
        return [_plain(x) for x in value]
    if is_dataclass(value):
        return [type(value).__name__, *(_plain(getattr(value, f.name)) for f in fields(value))]
    return value


def merge(parts: Iterable[tuple[RuleID, L7Rules]], plain: RuleID | None, egress: bool) -> L7Set:
    """One set from all L7 rules that meet on a row.

    A part without a rule (0) shows the traffic to a proxy and restricts nothing. `plain` is a rule
    that allows the same traffic without an L7 part (0: the implicit allow of the local host): then
    every request passes, but still by the proxy. Raises ConflictError where the parts cannot be
    served by one listener.
    """
    entries: dict[tuple[int, str], L7Entry] = {}
    heads: dict[tuple[str, tuple[str, ...], str], RuleID] = {}
    tls: list[TLSContext | None] = [None, None]
    for rule_id, rules in parts:
        heads.setdefault((rules.parser, rules.server_names, rules.listener), rule_id)
        for i, context in enumerate((rules.originating_tls, rules.terminating_tls)):
            if context is None:
                continue
            if tls[i] not in (None, context):
                raise ConflictError("their TLS contexts differ")
            tls[i] = context
        found: tuple[L7Rule | None, ...] = rules.rules
        if not rule_id or (not found and rules.parser in (PARSER_TLS, PARSER_LISTENER)):
            found = (None,)  # only to be seen, or a connection without requests
        for rule in found:
            entries[rule_id, _text(rule)] = L7Entry(rule_id, rule)
    if len(heads) > 1:
        parsers = sorted({parser for parser, *_ in heads})
        raise ConflictError(
            f"the parsers {' and '.join(parsers)} meet"
            if len(parsers) > 1
            else "their server names or listeners differ"
        )
    if plain is not None:
        entries[plain, _text(None)] = L7Entry(plain)
    ((parser, server_names, listener),) = heads
    return L7Set(
        parser=parser,
        egress=egress,
        rules=tuple(entries[key] for key in sorted(entries)),
        originating_tls=tls[0],
        terminating_tls=tls[1],
        server_names=server_names,
        listener=listener,
    )


def _text(rule: L7Rule | None) -> str:
    return "" if rule is None else json.dumps(_plain(rule))


class ConflictError(ValueError):
    """L7 rules meet that no one listener can serve."""


PortNames = tuple[tuple[str, int, int], ...]  # (name, port, protocol), sorted


def port_names(ports: Mapping[str, tuple[int, int]] | PortNames | None) -> PortNames:
    """Named ports of an endpoint, {name: (port, protocol number)}, in canonical form."""
    if not ports:
        return ()
    if isinstance(ports, tuple):
        return tuple(sorted(set(ports)))
    return tuple(sorted((name, port, proto) for name, (port, proto) in ports.items()))
