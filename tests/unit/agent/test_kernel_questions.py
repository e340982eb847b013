"""Which packets prove a policy, and what the engine says of each."""

from __future__ import annotations

from cilia.policy import MapState, PolicyEntry, PolicyKey
from cilia.policy.api import RuleID
from cilia.policy.mapstate import L4Key
from services.agent.kernelaudit import Answer, expected, questions
from services.agent.policyrows import Fill, PolicyRows, row_differences, row_text

STRANGER = 0xFFFFFFFF
ALLOW = PolicyEntry(False, RuleID(5))


def asked(*keys: PolicyKey) -> set[tuple[int, bool, int, int]]:
    return set(questions(keys))


def test_edges_of_a_range_and_one_step_outside() -> None:
    found = asked(PolicyKey(7, True, 6, 64, 8 + 12))  # 64-79
    ports = {port for peer, egress, proto, port in found if (peer, egress, proto) == (7, True, 6)}
    assert ports == {63, 64, 79, 80}
    # Another peer, another protocol, and each direction where no row is.
    assert {(STRANGER, True, 6, 64), (7, True, 17, 64), (STRANGER, False, 6, 0)} <= found


def test_no_port_lies_outside_of_all() -> None:
    found = asked(PolicyKey(7, False, 6, 0, 9), PolicyKey(7, False, 6, 32768, 9))
    assert {port for *_, port in found} <= {0, 32767, 32768, 65535}
    types = asked(PolicyKey(0, False, 1, 255, 24))
    assert {port for _, egress, proto, port in types if proto == 1 and not egress} == {0, 254, 255}


def test_each_is_asked_once() -> None:
    keys = [PolicyKey(n, False, 6, 80, 24) for n in (0, 7, 8)]
    found = list(questions(keys))
    assert len(found) == len(set(found))


def test_what_the_engine_says() -> None:
    state = MapState(
        {
            0: {L4Key(False, 0, 0, 0): PolicyEntry(False, RuleID(0), audit=True)},
            7: {
                L4Key(False, 6, 80, 24): ALLOW,
                L4Key(False, 6, 81, 24): PolicyEntry(True, RuleID(6)),
                L4Key(False, 6, 82, 24): PolicyEntry(False, RuleID(9), audit=True),
            },
        }
    )

    def say(peer: int, egress: bool, port: int, audit: bool = False) -> Answer:
        return expected(state, Fill(), (peer, egress, 6, port), audit=audit)

    assert say(7, False, 80) == Answer(0, 5)
    assert say(7, False, 80, audit=True) == Answer(0, 5)
    assert say(7, False, 81) == Answer(-181, 6)
    assert say(7, False, 81, audit=True) == Answer(-181, 6, True)
    assert say(7, False, 82) == Answer(-181, 9, True)
    assert say(7, False, 83) == Answer(-133, 0, True)  # isolated by rules that only audit
    assert say(7, True, 80) == Answer(-133, 0)
    assert str(say(7, False, 82)) == "denied, only audited, by rule 9"


def test_rows_in_words() -> None:
    assert row_text(PolicyKey(7, True, 6, 64, 20)) == "egress to identity 7 on TCP/64-79"
    assert row_text(PolicyKey(0, False, 0, 0, 0)) == "ingress from anybody on any port"
    assert row_text(PolicyKey(0, False, 17, 0, 8)) == "ingress from anybody on UDP"
    keys = [PolicyKey(7, False, 6, port, 24) for port in (80, 81)]
    wanted = PolicyRows.from_entries([(keys[0], ALLOW), (keys[1], ALLOW)])
    found = PolicyRows.from_entries([(keys[0], PolicyEntry(True, RuleID(6)))])
    assert wanted.digest() != found.digest()
    assert sorted(row_differences(wanted, found)) == [
        ("ingress from identity 7 on TCP/80", "allow, rule 5", "deny, rule 6", 5),
        ("ingress from identity 7 on TCP/81", "allow, rule 5", "absent", 5),
    ]
    assert list(row_differences(wanted, wanted)) == []
