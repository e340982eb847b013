"""The annotation that asks to see an endpoint's requests: ``<Egress/53/UDP/DNS>``, and more after
commas.

It restricts nothing: each port is shown to a proxy that lets every request pass, and only in a
direction in which no policy isolates the endpoint, and none says which requests may pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

from cilia.policy.api import (
    L4,
    MAX_PORT,
    PROTO_NAMES,
    PROTO_TCP,
    PROTO_UDP,
    DNSRule,
    HTTPRule,
    KafkaRule,
    L7Rule,
    L7Rules,
    PortRule,
)
from cilia.policy.schema import shown

VISIBILITY_ANNOTATION: Final = "io.cilium.proxy-visibility"
MAX_ENTRIES: Final = 64
_ENTRY: Final = re.compile(r"\s*<(\w+)/([0-9]{1,6})/(\w+)/(\w+)>\s*\Z")
_DIRECTIONS: Final = ("ingress", "egress")
# By parser: the rule that lets every request pass, what it is spoken over, and where it is seen.
_PARSERS: Final[Mapping[str, tuple[L7Rule, tuple[int, ...], tuple[str, ...]]]] = {
    "http": (HTTPRule(), (PROTO_TCP,), _DIRECTIONS),
    "dns": (DNSRule(match_pattern="*"), (PROTO_TCP, PROTO_UDP), ("egress",)),
    "kafka": (KafkaRule(), (PROTO_TCP,), ("ingress",)),
}


def parse_visibility(text: str) -> tuple[PortRule, ...]:
    """The port rules that an annotation asks for; the path of each is its direction.

    Words may be of any case; ANY is every protocol that the parser is spoken over. Raises
    ValueError: then none of it counts.
    """
    entries = text.split(",") if text.strip() else []
    if len(entries) > MAX_ENTRIES:
        raise ValueError(f"{len(entries)} entries are more than the {MAX_ENTRIES} allowed")
    parsers: dict[tuple[str, int, int], str] = {}
    for entry in entries:
        found = _ENTRY.match(entry)
        if found is None:
            raise ValueError(
                f"{shown(entry)} is not <Ingress|Egress/PORT/TCP|UDP|ANY/HTTP|DNS|Kafka>"
            )
        direction, number, protocol, parser = (x.lower() for x in found.groups())
        port = int(number)
        if direction not in _DIRECTIONS:
            raise ValueError(f"{shown(entry)}: a direction is Ingress or Egress")
        if not 0 < port <= MAX_PORT:
            raise ValueError(f"{shown(entry)}: a port is 1 to {MAX_PORT}")
        if parser not in _PARSERS:
            raise ValueError(f"{shown(entry)}: a parser is HTTP, DNS or Kafka")
        _, spoken, allowed = _PARSERS[parser]
        if direction not in allowed:
            raise ValueError(f"{shown(entry)}: {parser} is seen on {allowed[0]} only")
        for proto in _protocols(protocol, parser, spoken, entry):
            before = parsers.setdefault((direction, port, proto), parser)
            if before != parser:
                raise ValueError(f"{shown(entry)}: {port}/{PROTO_NAMES[proto]} is {before} already")
    return tuple(
        PortRule(
            l4=(L4(proto, port, port),),
            l7=L7Rules(parser, (_PARSERS[parser][0],)),
            path=direction,
        )
        for (direction, port, proto), parser in parsers.items()
    )


def visibility_text(rules: Iterable[PortRule]) -> str:
    """The annotation that asks for these, one way to write it; "" for none."""
    return ",".join(sorted(_entry_text(rule) for rule in rules))


def _entry_text(rule: PortRule) -> str:
    (l4,) = rule.l4
    parser = rule.l7.parser if rule.l7 is not None else ""
    name = "Kafka" if parser == "kafka" else parser.upper()
    return f"<{rule.path.title()}/{l4.first}/{PROTO_NAMES[l4.proto]}/{name}>"


def _protocols(protocol: str, parser: str, spoken: tuple[int, ...], entry: str) -> tuple[int, ...]:
    if protocol == "any":
        return spoken
    proto = {"tcp": PROTO_TCP, "udp": PROTO_UDP}.get(protocol)
    if proto is None:
        raise ValueError(f"{shown(entry)}: a protocol is TCP, UDP or ANY")
    if proto not in spoken:
        raise ValueError(f"{shown(entry)}: {parser} is not spoken over {protocol.upper()}")
    return (proto,)
