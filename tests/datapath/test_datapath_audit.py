"""Audit mode on every path, its self-test, and the programs that answer without a packet."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from cilia.bpf import constants, layout
from cilia.bpf.dropreason import AUDITED, ENDPOINT_NOT_OPEN, POLICY_DENIED, POLICY_DENIED_BY_RULE
from tests.datapath.harness import (
    ALLOW_ALL,
    IN,
    OUT,
    REMOTE4,
    REMOTE6,
    TC_OK,
    TC_REDIRECT,
    Endpoint,
    Node,
    Result,
    Rule,
)
from tests.datapath.packets import tcp, udp

OPEN = constants.EP_F_OPEN
AUDIT = constants.EP_F_OPEN | constants.EP_F_AUDIT
DENY_ROW = (Rule(True, deny=True, id=7), Rule(False, deny=True, id=7))


def cells(ep: Endpoint, *questions: tuple[int, bool, int, int], flags: int = OPEN) -> Any:
    """Questions to an endpoint's policy: peer, egress, protocol, port."""
    rows = np.zeros(len(questions), layout.AUDIT_CELL)
    rows["policy_slot"], rows["ep_id"], rows["ep_flags"] = ep.slot, ep.id, flags
    rows["identity"] = ep.identity
    for row, (peer, egress, proto, port) in zip(rows, questions, strict=True):
        row["remote_id"], row["egress"], row["proto"], row["dport_be"] = peer, egress, proto, port
    return rows


def audited(result: Result) -> list[tuple[int, int, int]]:
    """Endpoint, direction and reason of the events that say "audited"."""
    return [
        (int(e["ep_id"]), int(e["direction"]), int(e["reason"]))
        for e in result.verdicts
        if e["flags"] & constants.EVENT_F_AUDITED
    ]


@pytest.mark.parametrize(
    ("rules", "reason"),
    [((), POLICY_DENIED), (DENY_ROW, POLICY_DENIED_BY_RULE)],
    ids=["miss", "deny"],
)
def test_audit_of_both_ends(node: Node, v6: bool, rules: tuple[Rule, ...], reason: int) -> None:
    a, b = node.a, node.b
    for ep in (a, b):
        node.policy(ep, rules)
        node.endpoint(ep.name, ep.id, ep.identity, flags=AUDIT)
    result = node.send(a, tcp(v6, a, b, "S"))
    assert result.verdict == TC_REDIRECT
    assert audited(result) == [(a.id, OUT, reason), (b.id, IN, reason)]
    assert result.metrics[AUDITED, OUT][0] == result.metrics[AUDITED, IN][0] == 1
    assert node.send(b, tcp(v6, b, a, "SA", 80, 40000)).verdict == TC_REDIRECT
    remote = REMOTE6 if v6 else REMOTE4
    assert audited(node.send(a, udp(v6, a, remote))) == [(a.id, OUT, reason)]
    assert audited(node.wire_sends(udp(v6, remote, b))) == [(b.id, IN, reason)]
    from_stack = node.stack_sends(b, udp(v6, remote, b, 6000), came_in=0)
    assert (from_stack.verdict, audited(from_stack)) == (TC_OK, [(b.id, IN, reason)])


def test_audit_of_a_live_connection(node: Node, v6: bool) -> None:
    """Policy would end it: that is said once a change, and it goes on."""
    a, b = node.a, node.b
    node.endpoint("a", a.id, a.identity, flags=AUDIT)
    node.send(a, tcp(v6, a, b, "S"))
    node.policy(a, [])
    told = node.send(a, tcp(v6, a, b, "A"))
    assert told.verdict == TC_REDIRECT
    assert audited(told) == [(a.id, OUT, POLICY_DENIED)]
    assert told.verdicts[0]["flags"] & constants.EVENT_F_REJUDGED
    assert told.metrics[AUDITED, OUT][0] == 1
    assert node.send(a, tcp(v6, a, b, "A")).verdicts == []
    # Enforced again, it ends.
    node.endpoint("a", a.id, a.identity, flags=OPEN)
    node.policy(a, [])
    assert node.send(a, tcp(v6, a, b, "A")).drops == [POLICY_DENIED]


def test_answers_are_what_packets_meet(node: Node) -> None:
    """Random policies, asked quietly and then by packets."""
    rng = random.Random(11)
    ports = [80, 81, 443, 1024]
    source = 1024
    for _ in range(20):
        rules = {}
        for n in range(rng.randint(0, 12)):
            plen = rng.choice([0, 8, 9, 12, 20, 24])
            port = rng.choice(ports) & (0xFFFF0000 >> max(plen - 8, 0)) & 0xFFFF
            proto = rng.choice([6, 17]) if plen else 0
            peer = rng.choice([0, node.b.identity, 999])
            key = (peer, proto, port if plen > 8 else 0, plen)
            rules[key] = Rule(True, *key, deny=rng.random() < 0.25, id=n + 1)
        node.policy(node.a, rules.values())
        questions = [(node.b.identity, True, proto, port) for proto in (6, 17) for port in ports]
        answers = node.auditor.ask(cells(node.a, *questions))
        for answer, (_, _, proto, port) in zip(answers, questions, strict=True):
            source += 1
            make = (tcp(False, node.a, node.b, "S", source, port) if proto == 6
                    else udp(False, node.a, node.b, source, port))  # fmt: skip
            met = node.send(node.a, make).verdicts[0]
            for name in ("verdict", "rule_id", "policy_rev", "match_type"):
                assert answer[name] == met[name], (name, rules.values(), proto, port)


def test_questions_leave_no_trace(node: Node) -> None:
    node.policy(node.a, [Rule(True, 0, 6, 80, 24, id=5), *DENY_ROW])
    before = node.metrics()
    answers = node.auditor.ask(
        cells(node.a, *[(peer, True, 6, 80) for peer in range(1, 201)], flags=AUDIT)
    )
    assert len(answers) == 200
    assert (answers["verdict"] == -POLICY_DENIED_BY_RULE).all()
    assert answers["audited"].all()
    assert list(answers["remote_id"]) == list(range(1, 201))
    assert node.metrics() == before
    assert len(node.drain()) == 0
    assert node.ct() == []
    assert node.hits(node.a, 7) == 0


def test_what_has_no_policy_is_not_open(node: Node) -> None:
    nobody = Endpoint("x", 40, 1, "", "", "", "", 0, 40)
    for ep, flags in ((nobody, OPEN), (node.a, 0)):
        (answer,) = node.auditor.ask(cells(ep, (1, True, 6, 80), flags=flags))
        assert answer["verdict"] == -ENDPOINT_NOT_OPEN
    with pytest.raises(ValueError, match="policy slot"):
        node.auditor.ask(np.zeros(1, layout.AUDIT_CELL))


@pytest.mark.parametrize("egress", [False, True])
def test_the_self_test_is_heard(node: Node, egress: bool) -> None:
    a = node.a
    node.policy(a, [])
    question = cells(a, (4711, egress, 17, 9), flags=AUDIT)
    (answer,) = node.auditor.try_aloud(question)
    assert answer["audited"]
    assert answer["verdict"] == -POLICY_DENIED
    (event,) = node.drain()
    assert event["type"] == constants.EVENT_VERDICT
    assert event["flags"] == constants.EVENT_F_AUDITED | constants.EVENT_F_SELFTEST
    assert (event["verdict"], event["reason"], event["ep_id"]) == (0, POLICY_DENIED, a.id)
    assert (event["proto"], event["dport_be"]) == (17, 9)
    ends = [int(event["src_identity"]), int(event["dst_identity"])]
    assert ends == ([a.identity, 4711] if egress else [4711, a.identity])
    # What is enforced, or allowed, is no event: nobody was there.
    node.auditor.try_aloud(cells(a, (4711, egress, 17, 9)))
    node.policy(a, ALLOW_ALL)
    node.auditor.try_aloud(question)
    assert len(node.drain()) == 0
    assert node.ct() == []
