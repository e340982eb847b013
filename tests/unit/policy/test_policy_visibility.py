"""The visibility annotation: what it asks for, and what is none."""

from __future__ import annotations

import pytest

from cilia.labels import Labels
from cilia.policy import PolicyEngine, parse_documents, visibility_text
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


def test_written_one_way() -> None:
    text = "<egress/9092/tcp/http> , <Ingress/9092/ANY/kafka>,<Egress/53/any/DNS>"
    written = visibility_text(parse_visibility(text))
    assert written == (
        "<Egress/53/TCP/DNS>,<Egress/53/UDP/DNS>,<Egress/9092/TCP/HTTP>,<Ingress/9092/TCP/Kafka>"
    )
    assert visibility_text(parse_visibility(written)) == written


def test_the_engine_shows_what_it_asks_for() -> None:
    engine = PolicyEngine(enforcers=["http"])
    resolved = engine.resolve(
        Labels.parse(["k8s:app=a"]), visibility=parse_visibility("<Ingress/80/TCP/HTTP>")
    )
    match = resolved.mapstate.lookup(0, False, 6, 80)
    assert match is not None
    assert match.entry.l7 is not None
    assert match.entry.l7.parser == "http"
    assert match.entry.l7.watches


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("ingress: [{}]", "policy isolates this direction"),
        (
            "enableDefaultDeny: {ingress: false}\n"
            "  ingress: [{toPorts: [{ports: [{port: '80', protocol: TCP}],"
            " rules: {http: [{path: /a}]}}]}]",
            "policy has L7 rules in this direction",
        ),
        ("egress: [{}]", ""),
    ],
)
def test_it_opens_nothing_that_policy_says_something_of(spec: str, why: str) -> None:
    engine = PolicyEngine(enforcers=["http"])
    text = f"- endpointSelector: {{}}\n  {spec}"
    labels = Labels.parse(["k8s:app=a"])
    engine.set_documents(parse_documents(text, source="x").documents)
    plain = engine.resolve(labels)
    resolved = engine.resolve(labels, visibility=parse_visibility("<Ingress/80/TCP/HTTP>"))
    assert [x.why for x in resolved.unseen] == ([why] if why else [])
    if why:
        assert dict(resolved.mapstate) == dict(plain.mapstate)


def test_what_no_proxy_shows() -> None:
    engine = PolicyEngine(enforcers=["http"])
    rules = parse_visibility("<Egress/53/UDP/DNS>,<Egress/80/TCP/HTTP>")
    resolved = engine.resolve(Labels.parse(["k8s:app=a"]), visibility=rules)
    assert [(x.rule, x.why) for x in resolved.unseen] == [(rules[0], "no proxy here shows dns")]
    assert {x.parser for x in resolved.mapstate.l7} == {"http"}
