"""Listeners of the L7 proxy: given out, acknowledged, changed in place, paired, taken back."""

from __future__ import annotations

from pathlib import Path

import pytest

from cilia.identity import NumericIdentity
from cilia.policy import L7Set
from cilia.policy.api import HTTPRule, RuleID
from cilia.policy.l7 import L7Entry
from cilia.statefile import StateFileDamaged
from services.agent.endpoint import SubjectKey
from services.agent.redirects import (
    InForce,
    ListenerState,
    Proxied,
    Redirects,
    State,
    SubjectRows,
    meeting_pairs,
)


def rules(path: str, *, egress: bool = False) -> L7Set:
    entry = L7Entry(RuleID(7), HTTPRule(path=path))
    return L7Set(parser="http", egress=egress, rules=(entry,))


def subject(number: int) -> SubjectKey:
    return SubjectKey(NumericIdentity(number), "default", audit=False)


NOTHING = InForce()


class Desk:
    """Redirects and the other side of their stream."""

    def __init__(self, path: Path) -> None:
        self.now = 100.0
        self.path = path
        self.taken: set[int] = set()
        self.redirects = self.make()
        self.sequence = 0
        self.in_force = NOTHING

    def make(self, ports: range = range(10000, 10010)) -> Redirects:
        return Redirects(
            self.path,
            ports=ports,
            release_delay_s=60,
            busy=lambda: self.taken,
            clock=lambda: self.now,
        )

    def want(self, *sets: L7Set, pairs: tuple[tuple[L7Set, L7Set], ...] = ()) -> bool:
        """Each set is wanted by a subject of its own, the first by 300, the next by 301."""
        used = {subject(300 + i): frozenset({x}) for i, x in enumerate(sets)}
        return self.redirects.want(used, pairs, self.in_force)

    def sent(self) -> tuple[list[int], list[int]]:
        """Ports told to make or change, and to close."""
        self.sequence += 1
        changed, removed = self.redirects.take_changes()
        for listener in changed:
            listener.sent = self.sequence
        return [x.port for x in changed], removed

    def says(self, port: int, state: str, *, digest: str = "", message: str = "") -> frozenset[str]:
        listener = self.redirects.listeners.get(port)
        said = ListenerState(
            port=port,
            digest=digest or (listener.digest if listener is not None else ""),
            state=state,  # type: ignore[arg-type]  # one of its words
            message=message,
            sequence=self.sequence,
        )
        return self.redirects.feed([said])


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "redirects.json")


A, B, OUT = rules("/a"), rules("/b"), rules("/o", egress=True)


def test_a_port_is_named_once_it_is_acknowledged(desk: Desk) -> None:
    assert desk.want(A)
    ((port,), removed) = desk.sent()
    assert port in range(10000, 10010)
    assert not removed
    assert desk.redirects.port(A) is None
    assert desk.says(port, "pending") == frozenset()
    assert desk.says(port, "acked") == {A.digest}
    assert desk.redirects.port(A) == port
    assert desk.says(port, "acked") == frozenset(), "it was known"
    assert not desk.want(A)


def test_equal_sets_share_a_listener(desk: Desk) -> None:
    desk.want(A, rules("/a"))
    assert len(desk.redirects.listeners) == 1
    desk.want(A, B, OUT)
    assert len(desk.redirects.listeners) == 3


def test_what_the_proxy_refuses_is_not_named(desk: Desk) -> None:
    desk.want(A)
    (port,), _ = desk.sent()
    desk.says(port, "acked")
    desk.want(B)
    desk.sent()
    desk.says(port, "failed", message="no such regex")
    (waiting,) = desk.redirects.waiting()
    assert (waiting.state, waiting.message) == (State.FAILED, "no such regex")
    assert desk.redirects.port(B) is None


def test_a_port_that_the_proxy_cannot_have(desk: Desk) -> None:
    """Another one is tried, three times."""
    desk.want(A)
    (port,), _ = desk.sent()
    for _ in range(3):
        desk.says(port, "failed", message="cannot bind")
        (other,), removed = desk.sent()
        assert removed == [port]
        assert other != port
        port = other
    desk.says(port, "failed", message="cannot bind")
    assert desk.sent() == ([], [])
    (waiting,) = desk.redirects.waiting()
    assert waiting.state is State.FAILED


def test_changed_rules_keep_their_port(desk: Desk) -> None:
    desk.want(A)
    (port,), _ = desk.sent()
    desk.says(port, "acked")
    assert desk.want(B)
    assert desk.redirects.port(A) is None
    assert desk.redirects.port(B) is None, "not before the proxy says so"
    assert desk.says(port, "acked", digest=A.digest) == frozenset(), "that was about the old rules"
    assert desk.sent() == ([port], [])
    assert desk.says(port, "acked") == {B.digest}
    assert desk.redirects.port(B) == port


def test_an_answer_to_an_older_request_is_none(desk: Desk) -> None:
    """There and back again: the first acknowledgement of A is not that of the second A."""
    desk.want(A)
    (port,), _ = desk.sent()
    desk.says(port, "acked")
    desk.want(B)
    desk.sent()
    desk.want(A)
    old = ListenerState(port=port, digest=A.digest, state="acked", sequence=1)
    assert desk.redirects.feed([old]) == frozenset()
    desk.sent()
    assert desk.redirects.feed([old]) == frozenset()
    assert desk.says(port, "acked") == {A.digest}


def test_rules_that_others_still_use_are_not_changed(desk: Desk) -> None:
    desk.want(A, A)
    (port,), _ = desk.sent()
    desk.says(port, "acked")
    desk.want(B, A)
    (other,), _ = desk.sent()
    assert other != port
    assert desk.redirects.port(A) == port


def test_who_changed_two_sets_gets_new_listeners(desk: Desk) -> None:
    """Which of the old ones became which of the new ones is not plain."""
    desk.redirects.want({subject(300): frozenset({A, B})}, (), NOTHING)
    first, _ = desk.sent()
    desk.redirects.want({subject(300): frozenset({rules("/c"), rules("/d")})}, (), NOTHING)
    second, _ = desk.sent()
    assert not set(first) & set(second)


def test_rules_of_rows_in_the_kernel_are_not_changed_under_them(desk: Desk) -> None:
    """Peers that lose rules would have those of others until the rows are written."""
    desk.want(A)
    (port,), _ = desk.sent()
    desk.says(port, "acked")
    desk.in_force = InForce(frozenset({port}), may_swap=lambda old, new: False)
    desk.want(B)
    (other,), _ = desk.sent()
    assert other != port
    assert desk.redirects.port(A) == port


def test_a_port_that_a_row_names_is_not_given_to_other_rules(desk: Desk) -> None:
    """Nor closed: a policy that cannot be written leaves its rows in the kernel."""
    desk.redirects = desk.make(range(10000, 10002))
    desk.want(A)
    (port,), _ = desk.sent()
    desk.says(port, "acked")
    desk.in_force = InForce(frozenset({port}))
    desk.want()
    desk.now += 1000
    assert not desk.redirects.release_due(desk.in_force.ports)

    # A restart forgets the listeners that nothing needs, and the rows are there still.
    desk.redirects.save()
    again = desk.make(range(10000, 10002))
    again.load()
    again.want({}, (), desk.in_force)
    again.snapshot()
    again.want({subject(300): frozenset({B})}, (), desk.in_force)
    assert again.listeners.keys() == {10000, 10001} - {port}
    again.want({subject(300): frozenset({B, rules("/c")})}, (), desk.in_force)
    assert "is free" in again.problem


def test_a_pair_needs_all_three(desk: Desk) -> None:
    desk.want(A, OUT, pairs=((OUT, A),))
    ports, _ = desk.sent()
    assert len(ports) == 3
    by = {x.direction: x.port for x in desk.redirects.listeners.values()}
    desk.says(by["egress"], "acked")
    desk.says(by["ingress"], "acked")
    assert desk.redirects.pairs() == {}
    desk.says(by["both"], "acked")
    assert desk.redirects.pairs() == {(by["egress"], by["ingress"]): by["both"]}
    # One end's rules change: both listeners that have them change, and keep their ports.
    desk.want(B, OUT, pairs=((OUT, B),))
    changed, removed = desk.sent()
    assert (sorted(changed), removed) == (sorted([by["ingress"], by["both"]]), [])
    assert desk.redirects.pairs() == {}
    desk.says(by["ingress"], "acked")
    desk.says(by["both"], "acked")
    assert desk.redirects.pairs() == {(by["egress"], by["ingress"]): by["both"]}


def test_a_listener_goes_late_and_its_port_later(desk: Desk) -> None:
    desk.want(A)
    (port,), _ = desk.sent()
    desk.says(port, "acked")
    desk.want()
    assert not desk.redirects.release_due(desk.in_force.ports)
    desk.now += 30
    desk.want(A)  # it came back
    desk.now += 60
    assert not desk.redirects.release_due(desk.in_force.ports)
    assert desk.redirects.port(A) == port
    desk.want()
    desk.now += 61
    assert desk.redirects.release_due(desk.in_force.ports)
    assert desk.redirects.port(A) is None
    assert desk.sent() == ([], [port])
    assert port in desk.redirects.ports, "until the proxy says that it is closed"
    desk.says(port, "removed")
    assert port not in desk.redirects.ports


def test_wanted_again_while_it_goes(desk: Desk) -> None:
    desk.want(A)
    (port,), _ = desk.sent()
    desk.says(port, "acked")
    desk.want()
    desk.now += 61
    desk.redirects.release_due(desk.in_force.ports)
    desk.want(A)
    assert desk.redirects.port(A) is None
    changed, removed = desk.sent()
    assert changed == [port]
    assert removed == []
    assert desk.says(port, "acked") == {A.digest}


def test_ports_in_use_are_passed_over(desk: Desk) -> None:
    desk.taken = set(range(10000, 10009))
    desk.want(A, B)
    assert list(desk.redirects.listeners) == [10009]
    assert "--proxy-ports" in desk.redirects.problem
    desk.taken = set()
    desk.want(A, B)
    assert len(desk.redirects.listeners) == 2
    assert not desk.redirects.problem


def test_a_restart_believes_what_was_acknowledged(desk: Desk) -> None:
    desk.want(A)
    (port,), _ = desk.sent()
    desk.says(port, "acked")
    desk.redirects.save()
    again = desk.make()
    again.load()
    again.want({subject(300): frozenset({A})}, (), NOTHING)
    assert again.port(A) == port
    known, _ = again.snapshot()
    assert [x.port for x in known] == [port]
    # Killed after new rules were sent: whether they are enforced is not known.
    again.want({subject(300): frozenset({B})}, (), NOTHING)
    again.save()
    third = desk.make()
    third.load()
    for wanted in (A, B):
        third.want({subject(300): frozenset({wanted})}, (), NOTHING)
        assert third.port(wanted) is None


def test_what_a_restart_does_not_need_is_not_in_the_snapshot(desk: Desk) -> None:
    desk.want(A)
    desk.sent()
    desk.redirects.save()
    again = desk.make()
    again.load()
    again.want({}, (), NOTHING)
    assert again.snapshot() == ([], [])
    assert not again.ports


def test_a_damaged_file_says_so(desk: Desk) -> None:
    desk.path.write_text('{"listeners": {"x": {}}}')
    with pytest.raises(StateFileDamaged):
        desk.redirects.load()


def test_pairs_are_those_that_can_meet() -> None:
    def row(peer: int, first: int, last: int, what: L7Set) -> Proxied:
        return Proxied(peer, first, last, what)

    client = SubjectRows(300, egress=[row(301, 80, 80, OUT)])
    server = SubjectRows(301, ingress=[row(300, 80, 80, A)])
    assert meeting_pairs([client, server]) == {(OUT, A)}
    assert meeting_pairs([client, SubjectRows(301, ingress=[row(0, 0, 65535, A)])]) == {(OUT, A)}
    assert not meeting_pairs([client, SubjectRows(301, ingress=[row(300, 81, 81, A)])])
    assert not meeting_pairs([client, SubjectRows(301, ingress=[row(302, 80, 80, A)])])
    assert not meeting_pairs([client, SubjectRows(302, ingress=[row(300, 80, 80, A)])])
    both = SubjectRows(300, egress=[row(0, 80, 80, OUT)], ingress=[row(300, 80, 80, A)])
    assert meeting_pairs([both]) == {(OUT, A)}
