"""One policy lookup: which row decides, over every kind of row, and what the event says of it."""

from __future__ import annotations

import itertools
import random
from typing import Final

import pytest

from cilia.bpf import constants
from cilia.bpf.constants import (
    MATCH_ALL,
    MATCH_L3,
    MATCH_L3_L4,
    MATCH_L3_PROTO,
    MATCH_L4,
    MATCH_PROTO,
)
from tests.datapath.harness import TC_REDIRECT, TC_SHOT, Node, Rule
from tests.datapath.packets import echo, tcp, udp

PEER = 1002  # the identity of endpoint b
PORTS: Final = itertools.cycle(range(1024, 65536))  # each question is a connection of its own


def verdict(node: Node, v6: bool, port: int = 80) -> tuple[int, int, int]:
    """(verdict, rule, match type) of a's egress to b."""
    result = node.send(node.a, tcp(v6, node.a, node.b, "S", next(PORTS), port))
    event = result.verdicts[0]
    assert event["policy_rev"] == node._rev
    assert result.verdict == (TC_REDIRECT if event["verdict"] == 0 else TC_SHOT)
    return int(event["verdict"]), int(event["rule_id"]), int(event["match_type"])


LADDER = [
    (Rule(True, PEER, 6, 80, 24, id=1), MATCH_L3_L4),
    (Rule(True, 0, 6, 80, 24, id=2), MATCH_L4),
    (Rule(True, PEER, 6, 64, 8 + 11, id=3), MATCH_L3_L4),
    (Rule(True, 0, 6, 64, 8 + 11, id=4), MATCH_L4),
    (Rule(True, PEER, 6, 0, 8 + 1, id=5), MATCH_L3_L4),
    (Rule(True, PEER, 6, 0, 8, id=6), MATCH_L3_PROTO),
    (Rule(True, 0, 6, 0, 8, id=7), MATCH_PROTO),
    (Rule(True, PEER, 0, 0, 0, id=8), MATCH_L3),
    (Rule(True, 0, 0, 0, 0, id=9), MATCH_ALL),
]
"""From the most to the least specific, all matching port 80 of the peer."""


@pytest.mark.parametrize("first", range(len(LADDER)))
def test_the_longest_prefix_wins_then_the_identity(node: Node, v6: bool, first: int) -> None:
    # Rows of others must not matter.
    noise = [
        Rule(True, 999, 6, 80, 24, id=90),
        Rule(True, 0, 17, 80, 24, id=91),
        Rule(False, 0, 0, 0, 0, id=92),
        Rule(True, 0, 6, 81, 24, id=93),
        Rule(True, 0, 6, 96, 8 + 11, id=94),
    ]
    node.policy(node.a, [rule for rule, _ in LADDER[first:]] + noise)
    rule, match = LADDER[first]
    assert verdict(node, v6) == (0, rule.id, match)
    assert node.hits(node.a, rule.id) == 1


@pytest.mark.parametrize("denying", range(len(LADDER)))
def test_a_deny_wins_wherever_it_stands(node: Node, denying: int) -> None:
    rules = [
        Rule(r.egress, r.identity, r.proto, r.port, r.plen, deny=n == denying, id=r.id)
        for n, (r, _) in enumerate(LADDER)
    ]
    node.policy(node.a, rules)
    rule, match = LADDER[denying]
    assert verdict(node, False) == (-181, rule.id, match)


def test_nothing_matches(node: Node, v6: bool) -> None:
    node.policy(node.a, [Rule(True, PEER, 6, 81, 24), Rule(False), Rule(True, 7)])
    assert verdict(node, v6) == (-133, 0, constants.MATCH_NONE)


def test_port_ranges_are_prefixes(node: Node) -> None:
    """1000-1023 and 1024-2047: two rows; their edges."""
    node.policy(
        node.a, [Rule(True, 0, 6, 1000, 8 + 13, id=1), Rule(True, 0, 6, 1008, 8 + 12, id=2),
                 Rule(True, 0, 6, 1024, 8 + 6, id=3)]
    )  # fmt: skip
    expected = {999: 0, 1000: 1, 1007: 1, 1008: 2, 1023: 2, 1024: 3, 2047: 3, 2048: 0}
    assert {port: verdict(node, False, port)[1] for port in expected} == expected


def test_protocols_and_icmp_types(node: Node, v6: bool) -> None:
    a, b = node.a, node.b
    icmp, request = (58, 128) if v6 else (1, 8)
    node.policy(a, [Rule(True, 0, icmp, request, 24, id=1), Rule(True, 0, 17, 0, 8, id=2)])
    assert [int(e["rule_id"]) for e in node.send(a, echo(v6, a, b)).verdicts] == [1, 102]
    assert [int(e["rule_id"]) for e in node.send(a, udp(v6, a, b)).verdicts] == [2, 102]
    assert node.send(a, tcp(v6, a, b, "S")).drops == [133]
    assert node.send(a, echo(v6, a, b, 9, reply=True)).drops == [133]


def test_audit_drops_nothing_and_says_so(node: Node, v6: bool) -> None:
    a, b = node.a, node.b
    node.policy(a, [])
    node.endpoint("a", 11, 1001, flags=constants.EP_F_OPEN | constants.EP_F_AUDIT)
    result = node.send(a, tcp(v6, a, b, "S"))
    assert result.verdict == TC_REDIRECT
    event = result.verdicts[0]
    assert event["flags"] & constants.EVENT_F_AUDITED
    assert (event["verdict"], event["reason"]) == (0, 133)
    again = node.send(a, tcp(v6, a, b, "A"))
    assert (again.verdict, len(again.verdicts)) == (TC_REDIRECT, 0)

    # Policies that only audit: rows that allow, and report who would deny, or that it is by
    # default.
    for number, reason in ((4, 181), (0, 133)):
        node.reset()
        node.policy(a, [Rule(True, 0, 6, 80, 24, audit=True, id=number)])
        result = node.send(a, tcp(v6, a, b, "S"))
        assert result.verdict == TC_REDIRECT
        event = result.verdicts[0]
        assert event["flags"] & constants.EVENT_F_AUDITED
        assert (event["verdict"], event["reason"], event["rule_id"]) == (0, reason, number)

    # A denial that is enforced wins over them, and a longer row that allows is not reported.
    node.reset()
    node.policy(a, [Rule(True, audit=True), Rule(True, 0, 6, 80, 24, deny=True, id=5)])
    result = node.send(a, tcp(v6, a, b, "S"))
    assert (result.verdict, result.verdicts[0]["reason"]) == (TC_SHOT, 181)
    node.reset()
    node.policy(a, [Rule(True, audit=True), Rule(True, 0, 6, 80, 24, id=6)])
    event = node.send(a, tcp(v6, a, b, "S")).verdicts[0]
    assert not event["flags"] & constants.EVENT_F_AUDITED
    assert (event["verdict"], event["rule_id"]) == (0, 6)


def test_random_policies_against_a_plain_model(node: Node) -> None:
    """Every row looked at in Python, the kernel's answer compared."""
    rng = random.Random(4)
    shapes = [0, 8, 9, 12, 20, 24]
    for _ in range(40):
        rules = {}
        for n in range(rng.randint(1, 12)):
            plen = rng.choice(shapes)
            port = rng.choice([80, 81, 443, 1024]) & (0xFFFF0000 >> max(plen - 8, 0)) & 0xFFFF
            identity, proto = rng.choice([0, PEER, 999]), rng.choice([6, 17]) if plen else 0
            key = (identity, proto, port if plen > 8 else 0, plen)
            rules[key] = Rule(True, *key, deny=rng.random() < 0.25, id=n + 1)
        node.policy(node.a, rules.values())
        for port in (80, 81, 443, 1024):
            matching = [
                r
                for r in rules.values()
                if r.identity in (0, PEER)
                and (not r.plen or r.proto == 6)
                and (r.plen <= 8 or (port ^ r.port) >> (24 - r.plen) == 0)
            ]
            matching.sort(key=lambda r: (r.deny, r.plen, r.identity != 0), reverse=True)
            expected = (
                (-133, 0) if not matching else (-181 if matching[0].deny else 0, matching[0].id)
            )
            assert verdict(node, False, port)[:2] == expected, (rules, port)


def test_every_pair_of_rows(node: Node) -> None:
    for (one, _), (two, _) in itertools.combinations(LADDER, 2):
        node.policy(node.a, [one, two])
        assert verdict(node, False)[1] == one.id
