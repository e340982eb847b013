"""The visibility annotation: what it asks for, and what is none."""

from __future__ import annotations

import pytest

from cilia.labels import Labels
from cilia.policy import PolicyEngine
from cilia.policy.api import L4, DNSRule, HTTPRule, L7Rules, PortRule
from cilia.policy.language import parse_visibility


def test_parsed() -> None:
    http = L7Rules("http", (HTTPRule(),))
    dns = L7Rules("dns", (DNSRule(match_pattern="*"),))
    assert parse_visibility("<Ingress/80/TCP/HTTP>, <egress/53/any/dns>") == (
        PortRule((L4(6, 80, 80),), (), http, "ingress"),
        PortRule((L4(6, 53, 53),), (), dns, "egress"),
        PortRule((L4(17, 53, 53),), (), dns, "egress"),
    )
    assert parse_visibility("<Egress/80/ANY/HTTP>,<Egress/80/TCP/HTTP>") == (
        PortRule((L4(6, 80, 80),), (), http, "egress"),
    )
    assert parse_visibility("") == parse_visibility("  ") == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Ingress/80/TCP/HTTP", "is not <Ingress"),
        ("<Ingress/80/TCP/HTTP>,", "is not <Ingress"),
        ("<Ingress/http/TCP/HTTP>", "is not <Ingress"),
        ("<Both/80/TCP/HTTP>", "a direction is"),
        ("<Ingress/0/TCP/HTTP>", "a port is"),
        ("<Ingress/65536/TCP/HTTP>", "a port is"),
        ("<Ingress/80/SCTP/HTTP>", "a protocol is"),
        ("<Ingress/80/UDP/HTTP>", "not spoken over UDP"),
        ("<Ingress/53/UDP/DNS>", "dns is seen on egress only"),
        ("<Egress/9092/TCP/Kafka>", "kafka is seen on ingress only"),
        ("<Ingress/80/TCP/R2D2>", "a parser is"),
        ("<Ingress/80/TCP/HTTP>,<Ingress/80/ANY/Kafka>", "80/TCP is http already"),
        (",".join(["<Ingress/80/TCP/HTTP>"] * 65), "65 entries"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_visibility(text)


def test_the_engine_shows_what_it_asks_for() -> None:
    engine = PolicyEngine(enforcers=["http"])
    resolved = engine.resolve(
        Labels.parse(["k8s:app=a"]), visibility=parse_visibility("<Ingress/80/TCP/HTTP>")
    )
    match = resolved.mapstate.lookup(0, False, 6, 80)
    assert match is not None
    assert match.entry.l7 is not None
    assert match.entry.l7.parser == "http"
