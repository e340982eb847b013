"""The node as a subject of policy: what devices and endpoints may tell it, and it them."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
)
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet, Raw

from cilia.bpf import constants
from cilia.bpf.dropreason import (
    CT_CANNOT_CREATE,
    INVALID_SOURCE_IP,
    POLICY_DENIED,
    POLICY_DENIED_BY_RULE,
)
from tests.datapath.harness import (
    HOST,
    IN,
    NODE4,
    NODE6,
    OUT,
    REMOTE4,
    REMOTE6,
    ROUTER4,
    ROUTER6,
    TC_OK,
    TC_REDIRECT,
    TC_SHOT,
    WORLD4,
    WORLD6,
    Node,
    Result,
    Rule,
    takes_ingress_ifindex,
)
from tests.datapath.packets import echo, error, ip, tcp, udp

SSH = Rule(False, 0, 6, 22, 24, id=22)
IN_ALL, OUT_ALL = Rule(False, id=102), Rule(True, id=101)
DENIED = (TC_SHOT, [POLICY_DENIED])


@pytest.fixture
def names(v6: bool) -> tuple[str, str]:
    """The node's address and that of somebody in the world."""
    return (NODE6, REMOTE6) if v6 else (NODE4, REMOTE4)


def said(result: Result) -> tuple[int, list[int]]:
    return result.verdict, result.drops


def test_nobody_is_asked_while_no_policy_is_about_the_node(
    node: Node, v6: bool, names: tuple[str, str]
) -> None:
    me, remote = names
    for result in (
        node.wire_sends(tcp(v6, remote, me, "S", dport=22)),
        node.wire_sends(tcp(v6, remote, me, "SA")),
        node.node_sends(tcp(v6, me, remote, "S")),
        node.node_sends(udp(v6, me, remote)),
    ):
        assert said(result) == (TC_OK, [])
        assert len(result.events) == 0
    assert node.ct() == []


def test_ingress_by_port(node: Node, v6: bool, names: tuple[str, str]) -> None:
    me, remote = names
    host = node.host([SSH, OUT_ALL])
    opened = node.wire_sends(tcp(v6, remote, me, "S", 40000, 22))
    assert said(opened) == (TC_OK, [])
    (verdict,) = opened.verdicts
    assert (verdict["ep_id"], verdict["direction"], verdict["rule_id"]) == (0, IN, 22)
    assert (verdict["src_identity"], verdict["dst_identity"]) == (WORLD6 if v6 else WORLD4, HOST)
    assert opened.traces == [constants.TRACE_TO_HOST]
    # The answers belong to it, whatever egress says, and so does what follows.
    node.policy(host, [SSH])
    assert said(node.node_sends(tcp(v6, me, remote, "SA", 22, 40000))) == (TC_OK, [])
    assert said(node.wire_sends(tcp(v6, remote, me, "A", 40000, 22))) == (TC_OK, [])
    shut = node.wire_sends(tcp(v6, remote, me, "S", 40000, 23))
    assert said(shut) == DENIED
    assert list(shut.metrics) == [(POLICY_DENIED, IN)]
    assert len(node.ct()) == 1


def test_egress_by_port(node: Node, v6: bool, names: tuple[str, str]) -> None:
    me, remote = names
    node.host([IN_ALL, Rule(True, 0, 17, 53, 24, id=53)])
    asked = node.node_sends(udp(v6, me, remote, 5000, 53))
    assert said(asked) == (TC_OK, [])
    assert asked.traces == [constants.TRACE_TO_NETWORK]
    assert said(node.wire_sends(udp(v6, remote, me, 53, 5000))) == (TC_OK, [])
    refused = node.node_sends(udp(v6, me, remote, 5000, 54))
    assert said(refused) == DENIED
    assert list(refused.metrics) == [(POLICY_DENIED, OUT)]
    (event,) = refused.of(constants.EVENT_DROP)
    assert (event["ep_id"], event["src_identity"]) == (0, HOST)


def test_an_answer_is_no_beginning(node: Node, v6: bool, names: tuple[str, str]) -> None:
    """Ingress is closed: what was not asked for does not come in as if it had been."""
    me, remote = names
    node.host([OUT_ALL])
    assert said(node.wire_sends(tcp(v6, remote, me, "SA"))) == (TC_SHOT, [CT_CANNOT_CREATE])
    assert said(node.wire_sends(udp(v6, remote, me, 53, 5000))) == DENIED
    assert said(node.wire_sends(echo(v6, remote, me))) == DENIED
    assert said(node.node_sends(echo(v6, me, remote))) == (TC_OK, [])
    assert said(node.wire_sends(echo(v6, remote, me, reply=True))) == (TC_OK, [])


def test_a_change_is_felt_by_the_next_packet(node: Node, v6: bool, names: tuple[str, str]) -> None:
    me, remote = names
    host = node.host([SSH, OUT_ALL])
    node.wire_sends(tcp(v6, remote, me, "S", 40000, 22))
    node.wire_sends(tcp(v6, remote, me, "A", 40000, 22))
    node.policy(host, [OUT_ALL])
    cut = node.node_sends(tcp(v6, me, remote, "A", 22, 40000))
    assert said(cut) == DENIED
    assert cut.verdicts[0]["flags"] & constants.EVENT_F_REJUDGED
    assert said(node.wire_sends(tcp(v6, remote, me, "A", 40000, 22))) == DENIED
    # A policy that is not about the node any more cuts nobody.
    node.no_host()
    assert said(node.wire_sends(tcp(v6, remote, me, "A", 40000, 22))) == (TC_OK, [])
    node.host([SSH])
    assert said(node.wire_sends(tcp(v6, remote, me, "A", 40000, 22))) == (TC_OK, [])


def test_a_peer_by_its_prefix(node: Node, v6: bool, names: tuple[str, str]) -> None:
    me, remote = names
    cidr = 1 << 24 | 7
    node.host([Rule(False, cidr, id=7), OUT_ALL])
    assert said(node.wire_sends(tcp(v6, remote, me, "S"))) == DENIED
    node.ipcache(f"{remote}/{128 if v6 else 32}", cidr)
    assert said(node.wire_sends(tcp(v6, remote, me, "S"))) == (TC_OK, [])


@pytest.mark.parametrize("claimed", [HOST, 4, 6, 5001])
def test_outside_is_the_world(node: Node, v6: bool, names: tuple[str, str], claimed: int) -> None:
    """Host, health, a node or an endpoint: nobody gets such a name by a source address."""
    me, remote = names
    node.host([Rule(False, claimed, id=7), OUT_ALL])
    node.ipcache(f"{remote}/{128 if v6 else 32}", claimed)
    result = node.wire_sends(tcp(v6, remote, me, "S"))
    assert said(result) == ((TC_SHOT, [INVALID_SOURCE_IP]) if claimed == HOST else DENIED)


def test_who_pretends_to_be_the_other_end(node: Node, v6: bool, names: tuple[str, str]) -> None:
    """The wire sends, in the node's own name, what would be an answer of the node's."""
    me, remote = names
    node.host([SSH, OUT_ALL])
    node.wire_sends(tcp(v6, remote, me, "S", 40000, 22))
    assert said(node.wire_sends(tcp(v6, me, remote, "A", 22, 40000))) == (
        TC_SHOT,
        [INVALID_SOURCE_IP],
    )


def test_what_is_only_forwarded_is_not_the_nodes(node: Node, v6: bool) -> None:
    """The node routes for others: their packets are for their own policy."""
    node.host([])
    # Both are reached by the default route.
    source, target = ("2001:db8:8::8", REMOTE6) if v6 else ("198.18.0.8", REMOTE4)
    before = node.ct()
    for packet in (tcp(v6, source, target, "S"), udp(v6, source, target)):
        assert said(node.wire_sends(packet)) == (TC_OK, [])
    if takes_ingress_ifindex():
        other = node.ifindex("cilc")
        assert said(node.node_sends(udp(v6, source, target), came_in=other)) == (TC_OK, [])
    assert node.ct() == before


@pytest.mark.parametrize(
    "target",
    ["255.255.255.255", "192.0.2.255", "224.0.0.1", "169.254.7.7", "0.0.0.0", "127.0.0.1",
     "ff02::1", "fe80::7", "2001:db8::"],
)  # fmt: skip
def test_every_name_of_the_node_is_meant(node: Node, target: str) -> None:
    """A socket that listens on any address hears of them all."""
    node.thread.sh(
        "ip addr replace 169.254.7.7/16 dev up0", "ip addr replace fe80::7/64 dev up0 nodad"
    )
    node.host([OUT_ALL])
    v6 = ":" in target
    packet = udp(v6, REMOTE6 if v6 else "192.0.2.9", target)
    assert said(node.wire_sends(packet)) == DENIED
    node.host([Rule(False, 0, 17, 53, 24, id=9)])
    assert said(node.wire_sends(packet)) == (TC_OK, [])


def open_to_all(v6: bool, egress: bool) -> Iterator[Packet]:
    """What keeps a node on its network."""
    if v6:
        source, target = ("fe80::7", "ff02::1") if egress else ("fe80::1", NODE6)
        for message in (ICMPv6ND_NS(tgt=NODE6), ICMPv6ND_NA(tgt=NODE6), ICMPv6ND_RA()):
            yield IPv6(src=source, dst=target, hlim=255) / message
        sport, dport = (546, 547) if egress else (547, 546)
        yield IPv6(src="fe80::1", dst="fe80::7") / UDP(sport=sport, dport=dport) / b"x"
    else:
        sport, dport = (68, 67) if egress else (67, 68)
        yield IP(src="0.0.0.0", dst="255.255.255.255") / UDP(sport=sport, dport=dport) / b"x"
        yield IP(src=NODE4, dst="224.0.0.22", proto=2) / b"\x22\0\xf9\x02\0\0\0\1"
        yield Ether(src="02:00:00:00:01:01", dst="ff:ff:ff:ff:ff:ff") / ARP(pdst="192.0.2.7")


def test_the_network_itself_stays_open(node: Node, v6: bool) -> None:
    node.host([])
    for packet in open_to_all(v6, False):
        assert said(node.wire_sends(packet)) == (TC_OK, [])
    for packet in open_to_all(v6, True):
        assert said(node.node_sends(packet)) == (TC_OK, [])
    if v6:  # who is no neighbour has nothing to discover
        routed = IPv6(src=REMOTE6, dst=NODE6, hlim=254) / ICMPv6ND_NA(tgt=NODE6)
        assert said(node.wire_sends(routed)) == DENIED
    # A server of DHCP needs a rule.
    to_server = (
        IPv6(src="fe80::1", dst="fe80::7") / UDP(sport=546, dport=547)
        if v6
        else IP(src="0.0.0.0", dst="255.255.255.255") / UDP(sport=68, dport=67)
    )
    assert said(node.wire_sends(to_server / b"x")) == DENIED


def test_protocols_without_ports_are_judged_by_number(
    node: Node, v6: bool, names: tuple[str, str]
) -> None:
    me, remote = names
    esp = ip(v6, remote, me, **{"nh" if v6 else "proto": 50}) / Raw(bytes(16))
    out = ip(v6, me, remote, **{"nh" if v6 else "proto": 50}) / Raw(bytes(16))
    node.host([SSH])
    assert said(node.wire_sends(esp)) == DENIED
    assert said(node.node_sends(out)) == DENIED
    node.host([Rule(False, id=1)])
    assert said(node.wire_sends(esp)) == (TC_OK, [])
    assert said(node.node_sends(out)) == DENIED  # it is no answer, since there are no connections
    assert node.ct() == []


def test_what_cannot_be_read_does_not_slip_through(
    node: Node, v6: bool, names: tuple[str, str]
) -> None:
    me, remote = names
    packets = [ip(v6, remote, me, **{"nh" if v6 else "proto": 6}) / Raw(bytes(4))]
    if v6:
        chain: Packet = IPv6(src=remote, dst=me)
        for _ in range(8):
            chain = chain / IPv6ExtHdrDestOpt()
        packets.append(chain / ICMPv6EchoRequest())
    for packet in packets:
        assert said(node.wire_sends(packet)) == (TC_OK, [])
    node.host([IN_ALL])
    for packet in packets:
        assert node.wire_sends(packet).verdict == TC_SHOT


def test_fragments_follow_the_first(node: Node, v6: bool, names: tuple[str, str]) -> None:
    me, remote = names
    body = struct.pack("!HHHH", 5000, 53, 8 + 40, 0) + bytes(40)

    def piece(ident: int, start: int, end: int, port: int = 53) -> Packet:
        data = body[:2] + struct.pack("!H", port) + body[4:]
        more = end < len(data)
        if v6:
            head = IPv6ExtHdrFragment(id=ident, offset=start // 8, m=int(more), nh=17)
            return IPv6(src=remote, dst=me) / head / Raw(data[start:end])
        flags = "MF" if more else 0
        return IP(
            src=remote, dst=me, id=ident, frag=start // 8, flags=flags, proto=17
        ) / Raw(data[start:end])  # fmt: skip

    node.host([Rule(False, 0, 17, 53, 24, id=9), OUT_ALL])
    for start, end in ((0, 16), (16, 32), (32, 48)):
        assert said(node.wire_sends(piece(1, start, end))) == (TC_OK, [])
    assert said(node.wire_sends(piece(2, 0, 24, 54))) == DENIED
    assert said(node.wire_sends(piece(2, 24, 48, 54))) == DENIED
    assert node.wire_sends(piece(3, 24, 48)).verdict == TC_SHOT  # nobody knows whose
    assert node.frags() == [] or len(node.frags()) == 1  # that of the refused one


def test_masqueraded_answers_are_the_endpoints(node: Node, v6: bool) -> None:
    """Ingress of the node is shut; what comes back to its address may be an endpoint's."""
    node.host([])
    remote = REMOTE6 if v6 else REMOTE4
    sent = node.send(node.a, udp(v6, node.a, remote, 5000, 53))
    assert sent.verdict == TC_REDIRECT
    left = sent.packet.payload
    if takes_ingress_ifindex():
        # On its way out of the device the same packet is not judged again.
        out = node.node_sends(left, came_in=node.a.ifindex)
        assert said(out) == (TC_OK, [])
    answer = udp(v6, remote, left.src, 53, left.sport)
    assert node.wire_sends(answer).verdict == TC_REDIRECT
    assert said(node.wire_sends(udp(v6, remote, left.src, 54, left.sport))) == DENIED


def test_endpoint_to_node(node: Node, v6: bool) -> None:
    a = node.a
    router = ROUTER6 if v6 else ROUTER4
    node.host([Rule(False, a.identity, 6, 80, 24, id=80), OUT_ALL])
    opened = node.send(a, tcp(v6, a, router, "S", 40000, 80))
    assert said(opened) == (TC_OK, [])
    assert [(e["ep_id"], e["direction"]) for e in opened.verdicts] == [(a.id, OUT), (0, IN)]
    assert said(node.stack_sends(a, tcp(v6, router, a, "SA", 80, 40000))) == (TC_OK, [])
    assert said(node.send(a, tcp(v6, a, router, "A", 40000, 80))) == (TC_OK, [])
    refused = node.send(a, tcp(v6, a, router, "S", 40000, 81))
    assert said(refused) == DENIED
    assert list(refused.metrics) == [(POLICY_DENIED, IN)]
    assert said(node.send(node.b, tcp(v6, node.b, router, "S", 40000, 80))) == DENIED


def test_a_connection_from_before_the_policy(node: Node, v6: bool) -> None:
    """Its entry says which end is the node: the first packet under the policy is judged for it."""
    a = node.a
    router = ROUTER6 if v6 else ROUTER4
    node.send(a, tcp(v6, a, router, "S", 40000, 80))
    node.stack_sends(a, tcp(v6, router, a, "S", 40001, 81))
    host = node.host([Rule(False, a.identity, 6, 80, 24, id=80), Rule(True, a.identity, id=1)])
    assert said(node.stack_sends(a, tcp(v6, router, a, "A", 80, 40000))) == (TC_OK, [])
    assert said(node.send(a, tcp(v6, a, router, "A", 81, 40001))) == (TC_OK, [])
    node.policy(host, [])
    assert said(node.stack_sends(a, tcp(v6, router, a, "A", 80, 40000))) == DENIED
    assert said(node.send(a, tcp(v6, a, router, "A", 81, 40001))) == DENIED


def test_node_to_endpoint(node: Node, v6: bool) -> None:
    a = node.a
    router = ROUTER6 if v6 else ROUTER4
    node.host([IN_ALL, Rule(True, a.identity, 6, 80, 24, id=80)])
    opened = node.stack_sends(a, tcp(v6, router, a, "S", 40000, 80))
    assert said(opened) == (TC_OK, [])
    assert [(e["ep_id"], e["direction"]) for e in opened.verdicts] == [(0, OUT), (a.id, IN)]
    assert said(node.send(a, tcp(v6, a, router, "SA", 80, 40000))) == (TC_OK, [])
    refused = node.stack_sends(a, tcp(v6, router, a, "S", 40000, 81))
    assert said(refused) == DENIED
    assert list(refused.metrics) == [(POLICY_DENIED, OUT)]


def test_errors_about_the_nodes_connections(node: Node, v6: bool, names: tuple[str, str]) -> None:
    me, remote = names
    node.host([Rule(True, 0, 17, 53, 24, id=53)])
    packet = udp(v6, me, remote, 5000, 53)
    node.node_sends(packet)
    hop = "2001:db8:5::5" if v6 else "198.18.0.5"
    related = node.wire_sends(error(v6, hop, me, packet))
    assert said(related) == (TC_OK, [])
    other = udp(v6, me, remote, 5001, 53)
    assert said(node.wire_sends(error(v6, hop, me, other))) == DENIED
    # Path MTU discovery is not the policy's.
    assert said(node.wire_sends(error(v6, hop, me, other, "too-big"))) == (TC_OK, [])


def test_errors_that_the_node_sends_its_endpoints(node: Node, v6: bool) -> None:
    """Egress of the node is shut; "time exceeded" is about the endpoint's own connection."""
    node.host([])
    a, remote = node.a, REMOTE6 if v6 else REMOTE4
    packet = udp(v6, a, remote)
    node.send(a, packet)
    router = ROUTER6 if v6 else ROUTER4
    about = node.stack_sends(a, error(v6, router, a, packet, "time-exceeded"))
    assert said(about) == (TC_OK, [])


def test_a_proxys_connections_are_judged_where_they_began(
    node: Node, v6: bool, names: tuple[str, str]
) -> None:
    me, remote = names
    node.host([])
    packet = tcp(v6, me, remote, "S", 40000, 80)
    assert said(node.node_sends(packet)) == DENIED
    for mark in (constants.MARK_FROM_INGRESS_PROXY, constants.MARK_FROM_EGRESS_PROXY):
        packet = tcp(v6, me, remote, "S", 40000 + mark, 80)
        assert said(node.node_sends(packet, mark=mark | 0x1230000)) == (TC_OK, [])
        answer = tcp(v6, remote, me, "SA", 80, 40000 + mark)
        assert said(node.wire_sends(answer)) == (TC_OK, [])
        assert said(node.node_sends(tcp(v6, me, remote, "A", 40000 + mark, 80))) == (TC_OK, [])


def test_marks_of_others_are_not_the_proxys(node: Node, v6: bool, names: tuple[str, str]) -> None:
    me, remote = names
    node.host([])
    # 0xca6c is what wg-quick gives the packets that a tunnel sends.
    for mark in (0xCA6C, 0x1A00, 0xB01, 0xCA6C | 0x1F90 << 16):
        packet = tcp(v6, me, remote, "S", 50000, 80)
        assert said(node.node_sends(packet, mark=mark)) == DENIED


def test_control_ports_stay_open(objects: None) -> None:
    def port(number: int, proto: int, egress: bool) -> bytes:
        return socket.htons(number).to_bytes(2, "little") + bytes([proto, egress])

    ports = port(4244, 6, False) + port(2379, 6, True)
    with Node(rodata={"CONTROL_PORTS": ports.ljust(32, b"\0")}) as node:
        node.host([Rule(False, deny=True, id=1), Rule(True, deny=True, id=2)])
        for v6, me, remote in ((False, NODE4, REMOTE4), (True, NODE6, REMOTE6)):
            assert said(node.wire_sends(tcp(v6, remote, me, "S", 40000, 4244))) == (TC_OK, [])
            assert said(node.node_sends(tcp(v6, me, remote, "SA", 4244, 40000))) == (TC_OK, [])
            assert said(node.node_sends(tcp(v6, me, remote, "S", 40000, 2379))) == (TC_OK, [])
            assert said(node.wire_sends(tcp(v6, remote, me, "SA", 2379, 40000))) == (TC_OK, [])
            router = ROUTER6 if v6 else ROUTER4
            assert said(node.send(node.a, tcp(v6, node.a, router, "S", 40000, 4244)))[0] == TC_OK
            closed = (TC_SHOT, [POLICY_DENIED_BY_RULE])
            assert said(node.wire_sends(tcp(v6, remote, me, "S", 40000, 2379))) == closed
            assert said(node.wire_sends(udp(v6, remote, me, 40000, 4244))) == closed
            assert said(node.node_sends(tcp(v6, me, remote, "S", 40000, 4244))) == closed


def test_audit_of_the_node(node: Node, v6: bool, names: tuple[str, str]) -> None:
    me, remote = names
    node.host([], flags=constants.EP_F_OPEN | constants.EP_F_AUDIT)
    for result in (
        node.wire_sends(tcp(v6, remote, me, "S", 40000, 22)),
        node.node_sends(udp(v6, me, remote)),
        node.send(node.a, udp(v6, node.a, ROUTER6 if v6 else ROUTER4)),
    ):
        assert said(result) == (TC_OK, [])
        audited = [e for e in result.verdicts if e["flags"] & constants.EVENT_F_AUDITED]
        assert [(e["ep_id"], e["reason"], e["verdict"]) for e in audited] == [(0, POLICY_DENIED, 0)]
