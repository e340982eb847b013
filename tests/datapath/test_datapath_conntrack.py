"""Connections: states, lifetimes, what begins anew, and judging again when something changed."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest

from cilia.bpf import Object, constants, dropreason, libbpf
from cilia.bpf.uapi import MapType
from tests.datapath.harness import (
    IN,
    NODE4,
    NODE6,
    OUT,
    TC_OK,
    TC_REDIRECT,
    TC_SHOT,
    Endpoint,
    Node,
    Result,
    Rule,
    now_s,
)
from tests.datapath.packets import echo, tcp, udp


def expires_in(node: Node) -> int:
    ((_, entry),) = node.ct()
    return int(entry["expires_s"]) - now_s()


def near(value: int, expected: int) -> bool:
    return expected - 2 <= value <= expected + 1


# ---- lifetimes


def test_tcp_lifetimes(node: Node, v6: bool) -> None:
    a, b = node.a, node.b
    node.send(a, tcp(v6, a, b, "S"))
    assert near(expires_in(node), 60)
    node.send(b, tcp(v6, b, a, "SA", 80, 40000))
    assert near(expires_in(node), 60)  # half open still
    node.send(a, tcp(v6, a, b, "A"))
    assert near(expires_in(node), 21600)
    node.send(a, tcp(v6, a, b, "FA"))
    assert near(expires_in(node), 21600)  # one side only
    node.send(b, tcp(v6, b, a, "FA", 80, 40000))
    assert near(expires_in(node), 10)
    node.patch_ct(expires_s=now_s() + 5)
    node.send(a, tcp(v6, a, b, "A"))
    assert near(expires_in(node), 5)  # a closed connection is not kept alive


def test_any_lifetime_is_refreshed(node: Node, v6: bool) -> None:
    a, b = node.a, node.b
    node.send(a, udp(v6, a, b))
    assert near(expires_in(node), 60)
    node.patch_ct(expires_s=now_s() + 3)
    assert not node.send(b, udp(v6, b, a, 53, 5000)).verdicts
    assert near(expires_in(node), 60)


def test_lifetimes_are_runtime_settings(node: Node) -> None:
    node.runtime(ct_any_s=7, ct_tcp_syn_s=9)
    node.send(node.a, udp(False, node.a, node.b))
    assert near(expires_in(node), 7)
    node.reset()
    node.runtime(ct_tcp_syn_s=9)
    node.send(node.a, tcp(False, node.a, node.b, "S"))
    assert near(expires_in(node), 9)


def test_an_expired_entry_is_no_entry(node: Node, v6: bool) -> None:
    a, b = node.a, node.b
    node.send(a, udp(v6, a, b))
    node.patch_ct(expires_s=now_s() - 2)
    again = node.send(a, udp(v6, a, b))
    assert len(again.verdicts) == 2
    node.patch_ct(expires_s=now_s() - 2)
    # A late answer is a first packet of its own, and b may send nothing.
    node.policy(b, [Rule(False)])
    assert node.send(b, udp(v6, b, a, 53, 5000)).drops == [133]


# ---- TCP


def test_tcp_packets_without_an_entry(node: Node, v6: bool) -> None:
    a, b = node.a, node.b
    assert node.send(a, tcp(v6, a, b, "SA")).drops == [138]
    for flags in ("R", "RA", "FA"):
        assert node.send(a, tcp(v6, a, b, flags)).verdict == TC_REDIRECT
        assert not node.ct()
    assert node.send(a, tcp(v6, a, b, "A")).verdict == TC_REDIRECT  # picked up
    assert near(expires_in(node), 21600)
    node.reset()
    node.policy(a, [])
    for flags in ("R", "FA", "A", "S"):
        assert node.send(a, tcp(v6, a, b, flags)).drops == [133]


def test_syn_on_a_closing_connection_reopens_it(node: Node, v6: bool) -> None:
    a, b = node.a, node.b
    node.send(a, tcp(v6, a, b, "S"))
    node.send(a, tcp(v6, a, b, "A"))
    node.send(a, tcp(v6, a, b, "RA"))
    again = node.send(a, tcp(v6, a, b, "S"))
    assert len(again.verdicts) == 2
    assert near(expires_in(node), 60)
    ((_, entry),) = node.ct()
    assert entry["seen"].tolist() == [0, 0]
    # and is judged as a new one
    node.send(a, tcp(v6, a, b, "RA"))
    node.policy(b, [])
    assert node.send(a, tcp(v6, a, b, "S")).drops == [133]


def test_a_syn_of_the_responder_is_no_answer(node: Node, v6: bool) -> None:
    a, b = node.a, node.b
    node.policy(b, [Rule(False)])
    node.send(a, tcp(v6, a, b, "S"))
    attempt = node.send(b, tcp(v6, b, a, "S", 80, 40000))
    assert attempt.drops == [133]
    assert node.send(a, tcp(v6, a, b, "A")).verdict == TC_REDIRECT  # the old one lives


def test_an_echo_request_of_the_responder_is_no_answer(node: Node, v6: bool) -> None:
    a, b = node.a, node.b
    node.policy(b, [Rule(False)])
    node.send(a, echo(v6, a, b))
    assert node.send(b, echo(v6, b, a, reply=True)).verdict == TC_REDIRECT
    assert node.send(b, echo(v6, b, a)).drops == [133]


# ---- judging again


def connect(node: Node, v6: bool) -> tuple[Endpoint, Endpoint]:
    a, b = node.a, node.b
    assert node.send(a, udp(v6, a, b)).verdict == TC_REDIRECT
    assert node.send(b, udp(v6, b, a, 53, 5000)).verdict == TC_REDIRECT
    return a, b


def assert_cut(node: Node, result: Result, reason: int, direction: int, ep: Endpoint) -> None:
    assert result.verdict == TC_SHOT
    assert result.drops == [reason]
    (event,) = result.verdicts
    assert event["flags"] & constants.EVENT_F_REJUDGED
    assert event["verdict"] == -reason
    assert (event["ep_id"], event["direction"]) == (ep.id, direction)
    assert {key: n for key, (n, _) in result.metrics.items()} == {(reason, direction): 1}
    assert len(node.ct()) == 1  # what is still under way is known for what it is


@pytest.mark.parametrize("side", ["egress", "ingress"])
@pytest.mark.parametrize("way", ["forward", "reply"])
def test_revoked_policy_cuts_both_directions(node: Node, v6: bool, side: str, way: str) -> None:
    a, b = connect(node, v6)
    if side == "egress":
        node.policy(a, [Rule(False)])
    else:
        node.policy(b, [Rule(True)])
    packet = udp(v6, a, b) if way == "forward" else udp(v6, b, a, 53, 5000)
    result = node.send(a if way == "forward" else b, packet)
    assert_cut(node, result, 133, *((OUT, a) if side == "egress" else (IN, b)))
    # What follows, either way, begins no connection of its own, although each may begin some.
    for sender, late in ((b, udp(v6, b, a, 53, 5000)), (a, udp(v6, a, b))):
        assert node.send(sender, late).drops == [133]
    ((_, entry),) = node.ct()
    assert entry["packets"].tolist() == [1, 1]


def test_a_revoked_connection_is_kept_by_the_responder_alone(node: Node, v6: bool) -> None:
    """Else it would expire under a stream of replies, which would then begin it anew."""
    a, b = connect(node, v6)
    node.policy(b, [Rule(True)])
    for sender, packet, kept in (
        (a, udp(v6, a, b), False),
        (b, udp(v6, b, a, 53, 5000), True),
    ):
        before = now_s() + 5
        node.patch_ct(expires_s=before)
        assert node.send(sender, packet).drops == [133]
        ((_, entry),) = node.ct()
        assert (int(entry["expires_s"]) > before) is kept


def test_a_revoked_connection_goes_on_when_allowed_again(node: Node, v6: bool) -> None:
    a, b = connect(node, v6)
    node.policy(b, [Rule(True)])
    assert node.send(b, udp(v6, b, a, 53, 5000)).drops == [133]
    node.policy(b, [Rule(True), Rule(False)])
    assert node.send(b, udp(v6, b, a, 53, 5000)).verdict == TC_REDIRECT


def test_a_new_deny_cuts(node: Node, v6: bool) -> None:
    a, b = connect(node, v6)
    node.policy(b, [Rule(False), Rule(False, a.identity, 17, 53, 24, deny=True, id=9)])
    result = node.send(b, udp(v6, b, a, 53, 5000))
    assert_cut(node, result, 181, IN, b)
    assert result.verdicts[0]["rule_id"] == 9


def test_a_new_policy_that_allows_changes_nothing(node: Node, v6: bool) -> None:
    a, b = connect(node, v6)
    rev = node.policy(b, [Rule(False, a.identity, 17, 53, 24, id=77)])
    result = node.send(b, udp(v6, b, a, 53, 5000))
    assert result.verdict == TC_REDIRECT
    assert not result.verdicts
    ((_, entry),) = node.ct()
    assert (entry["side"][1]["policy_rev"], entry["side"][1]["rule_id"]) == (rev, 77)
    assert node.hits(b, 77) == 1
    node.send(b, udp(v6, b, a, 53, 5000))
    assert node.hits(b, 77) == 1  # current again: not asked a second time


@pytest.mark.parametrize("way", ["forward", "reply"])
def test_a_relabelled_peer_is_cut(node: Node, v6: bool, way: str) -> None:
    """b allows a's identity only; a gets another one."""
    a, b = node.a, node.b
    node.policy(b, [Rule(False, a.identity, id=3), Rule(True)])
    connect(node, v6)
    node.endpoint("a", 11, 2002)
    node.runtime(ipcache_epoch=2)
    packet = udp(v6, a, b) if way == "forward" else udp(v6, b, a, 53, 5000)
    result = node.send(a if way == "forward" else b, packet)
    assert_cut(node, result, 133, IN, b)


def test_an_epoch_that_changes_nothing_asks_no_policy(node: Node, v6: bool) -> None:
    a, b = connect(node, v6)
    before = node.hits(b, 102)
    node.runtime(ipcache_epoch=7)
    assert node.send(a, udp(v6, a, b)).verdict == TC_REDIRECT
    ((_, entry),) = node.ct()
    assert entry["side"]["epoch"].tolist() == [7, 7]
    assert node.hits(b, 102) == before


def test_a_closed_endpoint_cuts_without_a_verdict(node: Node, v6: bool) -> None:
    a, b = connect(node, v6)
    node.endpoint("b", 12, 1002, flags=0)
    result = node.send(a, udp(v6, a, b))
    assert (result.drops, len(result.verdicts)) == ([235], 0)
    assert len(node.ct()) == 1  # it may open again
    node.endpoint("b", 12, 1002)
    assert node.send(a, udp(v6, a, b)).verdict == TC_REDIRECT
    node.policy(b, [Rule(False)], rev=0)
    assert node.send(a, udp(v6, a, b)).drops == [235]


# ---- the node itself


def test_from_and_to_the_host(node: Node, v6: bool) -> None:
    a = node.a
    host = NODE6 if v6 else NODE4
    out = node.send(a, tcp(v6, a, host, "S", 40000, 22))
    assert out.verdict == TC_OK
    assert out.traces[-1] == constants.TRACE_TO_HOST
    assert {key: n for key, (n, _) in out.metrics.items()} == {(0, OUT): 1}
    (event,) = out.verdicts
    assert (event["src_identity"], event["dst_identity"]) == (a.identity, 1)
    back = node.stack_sends(a, tcp(v6, host, a, "SA", 22, 40000))
    assert back.verdict == TC_OK
    assert not back.verdicts
    assert back.traces == [constants.TRACE_TO_ENDPOINT]
    (trace,) = back.of(constants.EVENT_TRACE)
    assert (trace["src_identity"], trace["dst_identity"]) == (1, a.identity)
    ack = node.send(a, tcp(v6, a, host, "A", 40000, 22))
    assert (ack.verdict, ack.traces[-1]) == (TC_OK, constants.TRACE_TO_HOST)

    node.policy(a, [Rule(True), Rule(False, 1, 6, 80, 24, id=6)])
    inward = node.stack_sends(a, tcp(v6, host, a, "S", 50000, 80))
    assert inward.verdict == TC_OK
    (event,) = inward.verdicts
    assert (event["rule_id"], event["src_identity"], event["direction"]) == (6, 1, IN)
    reply = node.send(a, tcp(v6, a, host, "SA", 80, 50000))
    assert (reply.verdict, reply.traces[-1]) == (TC_OK, constants.TRACE_TO_HOST)
    assert node.stack_sends(a, tcp(v6, host, a, "S", 50000, 81)).drops == [133]
    node.policy(a, [Rule(True)])
    assert_revoked = node.send(a, tcp(v6, a, host, "A", 80, 50000))
    assert assert_revoked.drops == [133]


def test_the_router_is_the_host(node: Node, v6: bool) -> None:
    router = "fe80::c111" if v6 else "10.217.0.1"  # in no ipcache when link local
    out = node.send(node.a, echo(v6, node.a, router))
    assert (out.verdict, out.traces[-1]) == (TC_OK, constants.TRACE_TO_HOST)


def test_who_the_stack_speaks_for(node: Node, v6: bool) -> None:
    """Nobody from outside becomes host, node, health or an endpoint."""
    a, b = node.a, node.b
    world = 10 if v6 else 9
    bits = 128 if v6 else 32
    addresses = {
        2: ("2001:db8:7::2" if v6 else "198.18.0.2", 4, world),  # health
        3: ("2001:db8:7::3" if v6 else "198.18.0.3", 6, world),  # a remote node
        4: ("2001:db8:7::4" if v6 else "198.18.0.4", 5001, world),  # an endpoint elsewhere
        5: ("2001:db8:7::5" if v6 else "198.18.0.5", 1 << 24 | 5, 1 << 24 | 5),  # a CIDR
        6: ("2001:db8:7::6" if v6 else "198.18.0.6", 1, world),  # host
        7: ("2001:db8:7::7" if v6 else "198.18.0.7", None, world),
    }
    for address, cached, expected in addresses.values():
        if cached is not None:
            node.ipcache(f"{address}/{bits}", cached)
        result = node.stack_sends(a, udp(v6, address, a), came_in=node.up)
        assert result.verdict == TC_OK
        assert int(result.verdicts[0]["src_identity"]) == expected
        if cached == 1:
            continue
        wire = node.wire_sends(udp(v6, address, a, 5001))
        assert wire.verdict == TC_REDIRECT
        assert int(wire.verdicts[0]["src_identity"]) == expected
    # An endpoint's address only by its own interface.
    assert node.stack_sends(a, udp(v6, b, a), came_in=node.up).drops == [132]
    own = node.stack_sends(a, udp(v6, b, a), came_in=b.ifindex)
    assert own.verdict == TC_OK
    assert [int(e["src_identity"]) for e in own.verdicts] == [b.identity, b.identity]


def test_a_spoofed_host_does_not_enter_its_connections(node: Node, v6: bool) -> None:
    a = node.a
    host = NODE6 if v6 else NODE4
    node.stack_sends(a, udp(v6, host, a, 5000, 53))
    assert node.stack_sends(a, udp(v6, host, a, 5000, 53), came_in=node.up).drops == [132]
    node.send(a, udp(v6, a, host, 6000, 123))
    assert node.stack_sends(a, udp(v6, host, a, 123, 6000), came_in=node.up).drops == [132]


def test_the_stack_must_not_send_it_what_is_not_its(node: Node, v6: bool) -> None:
    host = NODE6 if v6 else NODE4
    assert node.stack_sends(node.a, udp(v6, host, node.b)).drops == [150]
    group = "ff02::1" if v6 else "224.0.0.1"
    assert node.stack_sends(node.a, udp(v6, host, group)).drops == [233]


# ---- aggregation


@pytest.mark.parametrize(
    ("level", "first", "second", "fin"),
    [(0, [5, 0], [5, 0], [5, 0]), (1, [0], [0], [0]), (2, [0], [0], [0]), (3, [0], [], [0])],
)
def test_aggregation(
    node: Node, level: int, first: list[int], second: list[int], fin: list[int]
) -> None:
    a, b = node.a, node.b
    node.runtime(aggregation=level)
    assert node.send(a, tcp(False, a, b, "S")).traces == first
    assert node.send(a, tcp(False, a, b, "A")).traces == second
    assert node.send(a, tcp(False, a, b, "FA")).traces == fin
    assert node.send(a, tcp(False, a, b, "FA")).traces == fin  # always


def test_aggregation_reports_by_interval(node: Node) -> None:
    a, b = node.a, node.b
    node.runtime(aggregation=3)
    node.send(a, udp(False, a, b))
    assert node.send(a, udp(False, a, b)).traces == []
    node.patch_ct(last_report_s=[now_s() - 6, 0])
    assert node.send(a, udp(False, a, b)).traces == [0]
    assert node.send(a, udp(False, a, b)).traces == []
    # the other direction has its own clock
    assert node.send(b, udp(False, b, a, 53, 5000)).traces == [0]


def test_lost_events_are_counted(node: Node) -> None:
    a, b = node.a, node.b
    before = node.ring.lost
    sent = (1 << 20) // 136 // 3 + 200
    ctx = node.thread
    from cilia.bpf import SkBuffCtx  # the raw way: run() drains the ring

    frame = bytes(node._frame(udp(False, a, "10.217.0.77"), a.mac, a.node_mac))
    node.policy(a, [])
    program = node.programs["from_endpoint"]
    sk = SkBuffCtx(ifindex=a.ifindex)
    ctx.call(lambda: program.test_run(frame, ctx=sk, repeat=sent * 2))
    kept = len(node.drain())
    assert kept + node.ring.lost - before == sent * 2 * 3  # from, verdict, drop
    assert node.ring.lost > before
    assert b.id == 12


class Forgetful(Node):
    """A node whose connections do not make room for one another."""

    def configure(self, obj: Object) -> None:
        state = obj._maps.get("cilia_ct")
        if state is not None:
            set_type = ctypes.CDLL(libbpf.SONAME).bpf_map__set_type
            set_type.argtypes = (ctypes.c_void_p, ctypes.c_int)
            assert set_type(state.handle, MapType.HASH) == 0
            state.definition = replace(state.definition, type=int(MapType.HASH))


def test_a_connection_that_cannot_be_remembered(objects: None) -> None:
    with Forgetful(cilia_ct=1) as node:
        assert node.send(node.a, tcp(False, node.a, node.b, "S", 40000)).drops == []
        second = node.send(node.a, tcp(False, node.a, node.b, "S", 40001))
        assert (second.verdict, second.drops) == (TC_SHOT, [dropreason.CT_INSERT_FAILED])
        assert [reason for reason, _ in second.metrics] == [dropreason.CT_INSERT_FAILED]
        assert node.send(node.a, tcp(False, node.a, node.b, "A", 40000)).drops == []
