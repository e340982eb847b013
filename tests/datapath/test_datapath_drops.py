"""What a workload must not send, and what is answered for it: each with its stated verdict."""

from __future__ import annotations

import struct

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6MLReport2,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_Redirect,
    ICMPv6ND_RS,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptSrcLLAddr,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.ipsec import AH
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.layers.sctp import SCTP, SCTPChunkData
from scapy.packet import Packet, Raw

from cilia.bpf import constants
from tests.datapath.harness import (
    OUT,
    ROUTER4,
    ROUTER6,
    ROUTER_LL,
    TC_OK,
    TC_REDIRECT,
    TC_SHOT,
    Node,
    Result,
    Rule,
)
from tests.datapath.packets import echo, ip, tcp, udp, valid

ANSWERED, IGNORED = 100, 101


def assert_dropped(result: Result, reason: int, direction: int = OUT) -> None:
    """Dropped, counted once, reported once."""
    assert result.drops == [reason]
    assert result.verdict == TC_SHOT
    assert {key: n for key, (n, _) in result.metrics.items()} == {(reason, direction): 1}
    (event,) = result.of(constants.EVENT_DROP)
    assert event["verdict"] == -reason
    assert event["direction"] == direction


def assert_ignored(result: Result) -> None:
    assert result.verdict == TC_SHOT
    assert {key: n for key, (n, _) in result.metrics.items()} == {(IGNORED, OUT): 1}
    assert not len(result.events)


# ---- link layer


@pytest.mark.parametrize(
    ("type_", "reason"), [(0x05FF, 166), (0x0026, 166), (0x0600, 139), (0x88CC, 139), (0x8847, 139)]
)
def test_ethertypes(node: Node, type_: int, reason: int) -> None:
    frame = Ether(src=node.a.mac, dst=node.a.node_mac, type=type_) / Raw(bytes(46))
    assert_dropped(node.send(node.a, frame), reason)


@pytest.mark.parametrize("type_", [0x8100, 0x88A8])
def test_vlan_tags(node: Node, type_: int) -> None:
    inner = ip(False, node.a, node.b) / UDP()
    frame = Ether(src=node.a.mac, dst=node.a.node_mac, type=type_) / Dot1Q(vlan=5) / inner
    assert_dropped(node.send(node.a, frame), 182)


# ---- addresses


def test_source_must_be_the_endpoints(node: Node, v6: bool) -> None:
    a, b = node.a, node.b
    strange = "fd00:c111::99" if v6 else "10.217.0.99"
    for source in (strange, b.ip(v6), "::1" if v6 else "127.0.0.1", "::" if v6 else "0.0.0.0"):
        result = node.send(a, udp(v6, source, b))
        assert_dropped(result, 132)
        assert result.of(constants.EVENT_DROP)[0]["ep_id"] == a.id
    assert not node.ct()


def test_multicast_and_broadcast(node: Node, v6: bool) -> None:
    for target in ("ff02::fb", "ff0e::1") if v6 else ("224.0.0.251", "255.255.255.255"):
        assert_dropped(node.send(node.a, udp(v6, node.a, target)), 233)


def test_nobody_is_open_without_policy(node: Node, v6: bool) -> None:
    a, b = node.a, node.b
    node.policy(b, [Rule(False)], rev=0)
    dropped = node.send(a, tcp(v6, a, b, "S"))
    assert_dropped_in(dropped, 235)
    node.policy(a, [Rule(True)], rev=0)
    assert_dropped(node.send(a, tcp(v6, a, b, "S")), 235)
    node.reset()
    node.endpoint("a", 11, 1001, flags=0)
    assert_dropped(node.send(a, tcp(v6, a, b, "S")), 235)
    # An interface that is nobody's.
    frame = Ether(src=a.mac, dst=a.node_mac) / tcp(v6, a, b, "S")
    assert_dropped(node.run("from_endpoint", frame, node.ifindex("cilc")), 235)
    assert_dropped_in(node.run("to_endpoint", frame, node.ifindex("cilc")), 235)


def assert_dropped_in(result: Result, reason: int) -> None:
    assert_dropped(result, reason, constants.DIR_INGRESS)


# ---- malformed


def test_malformed_ip(node: Node, v6: bool) -> None:
    a, b = node.a, node.b
    whole = bytes(Ether(src=a.mac, dst=a.node_mac) / udp(v6, a, b))
    cases = [whole[:14] + b"\x95" + whole[15:]]  # version 9
    longer = bytearray(whole)
    at = 18 if v6 else 16
    longer[at : at + 2] = struct.pack(">H", 2000)  # longer than the frame
    cases.append(bytes(longer))
    if not v6:
        cases.append(whole[:14] + b"\x44" + whole[15:])  # header of 16 bytes
        shorter = bytearray(whole)
        shorter[16:18] = struct.pack(">H", 19)
        cases.append(bytes(shorter))
    for frame in cases:
        assert_dropped(node.send(a, frame), 134)


def test_truncated_transport(node: Node, v6: bool) -> None:
    a, b = node.a, node.b
    for proto, size in ((6, 19), (17, 7), (132, 11), (58 if v6 else 1, 7)):
        header = ip(v6, a, b, **{"nh" if v6 else "proto": proto})
        assert_dropped(node.send(a, header / Raw(bytes(size))), 135)
    for offset in (4, 15):  # shorter than the header; longer than the packet
        assert_dropped(node.send(a, ip(v6, a, b) / TCP(dataofs=offset)), 135)


def test_unknown_transports(node: Node, v6: bool) -> None:
    a, b = node.a, node.b
    for proto in (4, 41, 47, 50, 59, 89, 255, 1 if v6 else 58):
        header = ip(v6, a, b, **{"nh" if v6 else "proto": proto})
        assert_dropped(node.send(a, header / Raw(bytes(40))), 137)


def test_sctp_is_plain_l4(node: Node, v6: bool) -> None:
    a, b = node.a, node.b
    node.policy(a, [Rule(True, 0, 132, 7777, 24)])
    packet = ip(v6, a, b) / SCTP(sport=4000, dport=7777) / SCTPChunkData(data=b"x")
    assert node.send(a, packet).verdict == TC_REDIRECT
    other = ip(v6, a, b) / SCTP(sport=4000, dport=7778) / SCTPChunkData(data=b"x")
    assert node.send(a, other).drops == [133]
    back = ip(v6, b, a) / SCTP(sport=7777, dport=4000) / SCTPChunkData(data=b"x")
    assert node.send(b, back).verdict == TC_REDIRECT
    ((_, entry),) = node.ct()
    assert entry["packets"].tolist() == [1, 1]


# ---- IPv6 extension headers


def pad() -> Packet:
    return IPv6ExtHdrDestOpt()


@pytest.mark.parametrize(
    "chain",
    [
        [IPv6ExtHdrHopByHop],
        [IPv6ExtHdrDestOpt],
        [IPv6ExtHdrHopByHop, IPv6ExtHdrDestOpt, IPv6ExtHdrDestOpt],
        [lambda: IPv6ExtHdrRouting(type=4, segleft=0)],
        [lambda: AH(nh=17, payloadlen=4, icv=bytes(12))],
        [lambda: IPv6ExtHdrFragment(offset=0, m=0, id=5)],  # atomic, RFC 6946
        [IPv6ExtHdrDestOpt] * 6,
    ],
)
def test_extension_headers_are_walked(node: Node, chain: list[type]) -> None:
    a, b = node.a, node.b
    node.policy(a, [Rule(True, 0, 17, 53, 24)])
    packet = ip(True, a, b)
    for header in chain:
        packet /= header()
    result = node.send(a, packet / UDP(sport=5000, dport=53) / b"x")
    assert result.drops == []
    assert result.verdict == TC_REDIRECT
    event = result.verdicts[0]
    assert (event["proto"], event["sport_be"], event["dport_be"]) == (17, 5000, 53)


@pytest.mark.parametrize(
    "chain",
    [
        [IPv6ExtHdrDestOpt] * 7,  # over the bound
        [IPv6ExtHdrDestOpt, IPv6ExtHdrHopByHop],  # hop-by-hop not first
        [lambda: IPv6ExtHdrRouting(type=0, segleft=1, addresses=["::1"])],  # RFC 5095
        [lambda: IPv6ExtHdrDestOpt(len=200)],  # longer than the packet
        [lambda: AH(payloadlen=255, icv=bytes(12))],
    ],
)
def test_bad_extension_headers(node: Node, chain: list[type]) -> None:
    packet = ip(True, node.a, node.b)
    for header in chain:
        packet /= header()
    assert_dropped(node.send(node.a, packet / UDP(sport=5000, dport=53) / b"x"), 156)


def test_a_cut_off_extension_header(node: Node) -> None:
    packet = IPv6(src=node.a.ip6, dst=node.b.ip6, nh=60) / Raw(b"\x11\x00\x01")
    assert_dropped(node.send(node.a, packet), 156)


# ---- ARP


def arp(node: Node, **fields: object) -> Packet:
    a = node.a
    values = {"op": 1, "hwsrc": a.mac, "psrc": a.ip4, "pdst": ROUTER4} | fields
    return Ether(src=a.mac, dst="ff:ff:ff:ff:ff:ff") / ARP(**values)


def test_arp_for_the_gateway_is_answered(node: Node) -> None:
    a = node.a
    result = node.send(a, arp(node))
    assert result.verdict == TC_REDIRECT
    answer = result.packet
    assert (answer.src, answer.dst) == (a.node_mac, a.mac)
    assert (answer[ARP].op, answer[ARP].psrc, answer[ARP].hwsrc) == (2, ROUTER4, a.node_mac)
    assert (answer[ARP].pdst, answer[ARP].hwdst) == (a.ip4, a.mac)
    assert {key: n for key, (n, _) in result.metrics.items()} == {(ANSWERED, OUT): 1}
    # What was answered goes out by to_endpoint.
    assert node.run("to_endpoint", answer, a.ifindex).verdict == TC_OK


def test_other_arp(node: Node) -> None:
    a = node.a
    assert_dropped(node.send(a, arp(node, pdst="10.217.0.12")), 230)
    assert_dropped(node.send(a, arp(node, psrc="10.217.0.12")), 132)
    assert_ignored(node.send(a, arp(node, psrc="0.0.0.0", pdst=a.ip4)))  # probe, RFC 5227
    assert_ignored(node.send(a, arp(node, psrc=a.ip4, pdst=a.ip4)))  # announcement
    assert node.send(a, arp(node, op=2)).verdict == TC_OK  # the node asked
    assert_dropped(node.send(a, arp(node, op=2, psrc=ROUTER4)), 132)
    assert_dropped(node.send(a, arp(node, op=3)), 134)
    assert_dropped(node.send(a, arp(node, hwlen=8)), 134)
    assert_dropped(node.send(a, bytes(arp(node))[:30]), 134)
    # Not even open: the gateway answers.
    node.endpoint("a", 11, 1001, flags=0)
    assert node.send(a, arp(node)).verdict == TC_REDIRECT


# ---- neighbour discovery and its kin


def ns(node: Node, target: str, src: str | None = None, **fields: int) -> Packet:
    header = IPv6(src=src or node.a.ip6, dst="ff02::1:ff00:1", hlim=fields.get("hlim", 255))
    return header / ICMPv6ND_NS(tgt=target) / ICMPv6NDOptSrcLLAddr(lladdr=node.a.mac)


@pytest.mark.parametrize("target", [ROUTER6, ROUTER_LL])
@pytest.mark.parametrize("option", [True, False])
@pytest.mark.parametrize("source", [None, "fe80::42"])
def test_solicitation_for_the_gateway_is_answered(
    node: Node, target: str, option: bool, source: str | None
) -> None:
    a = node.a
    question = ns(node, target, source)
    if not option:
        question = IPv6(src=source or a.ip6, dst=target, hlim=255) / ICMPv6ND_NS(tgt=target)
    result = node.send(a, question)
    assert result.verdict == TC_REDIRECT
    answer = result.packet
    assert (answer.src, answer.dst) == (a.node_mac, a.mac)
    assert (answer[IPv6].src, answer[IPv6].dst) == (target, source or a.ip6)
    assert answer[IPv6].hlim == 255
    na = answer[ICMPv6ND_NA]
    assert (na.R, na.S, na.O, na.tgt) == (1, 1, 1, target)
    assert answer[ICMPv6NDOptDstLLAddr].lladdr == a.node_mac
    assert valid(answer)
    assert {key: n for key, (n, _) in result.metrics.items()} == {(ANSWERED, OUT): 1}
    assert node.run("to_endpoint", answer, a.ifindex).verdict == TC_OK


def test_other_neighbour_discovery(node: Node) -> None:
    a = node.a
    assert_dropped(node.send(a, ns(node, node.b.ip6)), 150)
    assert_dropped(node.send(a, ns(node, ROUTER6, hlim=64)), 134)
    assert_dropped(node.send(a, ns(node, ROUTER6, src=node.b.ip6)), 132)
    assert_ignored(node.send(a, ns(node, a.ip6, src="::")))  # DAD
    assert_ignored(node.send(a, ns(node, "fe80::42", src="::")))
    lone = IPv6(src="fe80::42", dst="ff02::2", hlim=255)
    assert_ignored(node.send(a, lone / ICMPv6ND_RS()))
    assert_dropped(node.send(a, lone / ICMPv6ND_RA()), 176)
    assert_dropped(node.send(a, lone / ICMPv6ND_Redirect()), 176)
    assert_ignored(node.send(a, IPv6(src="fe80::42", dst="ff02::16", hlim=1) / ICMPv6MLReport2()))
    all_nodes = IPv6(src=a.ip6, dst="ff02::1", hlim=255) / ICMPv6ND_NA(tgt=a.ip6, S=0)
    assert_ignored(node.send(a, all_nodes))
    asked = IPv6(src=a.ip6, dst=ROUTER6, hlim=255) / ICMPv6ND_NA(tgt=a.ip6)
    assert node.send(a, asked).verdict == TC_OK
    lying = IPv6(src=a.ip6, dst=ROUTER6, hlim=255) / ICMPv6ND_NA(tgt=ROUTER6)
    assert_dropped(node.send(a, lying), 132)
    split = IPv6(src=a.ip6, dst=ROUTER6, hlim=255) / IPv6ExtHdrFragment(m=1, id=9)
    assert_dropped(node.send(a, split / ICMPv6ND_NS(tgt=ROUTER6)), 176)


def test_igmp_is_ignored(node: Node) -> None:
    packet = IP(src=node.a.ip4, dst="224.0.0.22", ttl=1, proto=2) / Raw(bytes(8))
    assert_ignored(node.send(node.a, packet))


# ---- hops


def test_the_last_hop_goes_to_the_stack(node: Node, v6: bool) -> None:
    """The kernel answers with time exceeded; policy has been asked before."""
    a, b = node.a, node.b
    for hops in (1, 0):
        result = node.send(a, echo(v6, a, b, hops + 70, ttl=hops))
        assert result.verdict == TC_OK
        assert result.traces == [constants.TRACE_FROM_ENDPOINT, constants.TRACE_TO_STACK]
        assert (result.packet.hlim if v6 else result.packet.ttl) == hops
    node.policy(a, [])
    assert_dropped(node.send(a, echo(v6, a, b, 99, ttl=1)), 133)
