"""Packets made to pass where policy denies: by confusing conntrack, discovery, or names."""

from __future__ import annotations

import pytest
from scapy.layers.inet import ICMP
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NIQueryNOOP,
)
from scapy.packet import Packet, Raw

from tests.datapath.harness import (
    NODE4,
    NODE6,
    REMOTE4,
    REMOTE6,
    ROUTER6,
    ROUTER_LL,
    TC_OK,
    TC_REDIRECT,
    Node,
    Rule,
)
from tests.datapath.packets import echo, error, ip, tcp, udp


def other_icmp(v6: bool) -> Packet:
    """ICMP that is neither an echo nor an error: a timestamp request, a node information query."""
    return ICMPv6NIQueryNOOP() if v6 else ICMP(type=13)


def test_other_icmp_does_not_ride_on_an_echo(node: Node, v6: bool) -> None:
    """An echo of identifier 0 has the ports that other ICMP has, which is no connection of its."""
    a, b = node.a, node.b
    kind = Rule(True, 0, 58 if v6 else 1, 128 if v6 else 8, 24)
    node.policy(a, [kind])
    node.policy(b, [Rule(False, 0, kind.proto, kind.port, 24)])
    assert node.send(a, echo(v6, a, b, 0)).verdict == TC_REDIRECT
    for source, target in ((a, b), (b, a)):
        assert node.send(source, ip(v6, source, target) / other_icmp(v6)).drops == [133]
        stray = error(v6, source, target, udp(v6, target, source))
        assert node.send(source, stray).drops == [133]
    # The echo itself goes on.
    assert node.send(b, echo(v6, b, a, 0, reply=True)).verdict == TC_REDIRECT
    # From outside as well, behind the node's address and straight.
    remote = REMOTE6 if v6 else REMOTE4
    assert node.send(a, echo(v6, a, remote, 0)).verdict == TC_REDIRECT
    assert node.wire_sends(ip(v6, remote, a) / other_icmp(v6)).drops == [133]


def advertisement(source: str, target: str, about: str) -> Packet:
    """A neighbour advertisement with room for a message."""
    return (
        ip(True, source, target, hlim=255)
        / ICMPv6ND_NA(tgt=about, R=0, S=1)
        / ICMPv6NDOptDstLLAddr(lladdr="02:00:00:00:0a:02")
        / Raw(b"smuggled")
    )


@pytest.mark.parametrize("opened", [True, False])
def test_advertisements_go_to_the_node_alone(node: Node, opened: bool) -> None:
    """The node would route one that is for somebody else, past every policy."""
    a, b = node.a, node.b
    node.policy(a, [])
    if not opened:
        node.endpoint("a", 11, 1001, flags=0)
    for target in (b.ip6, REMOTE6, "fd00:c111::77"):
        result = node.send(a, advertisement(a.ip6, target, a.ip6))
        assert result.drops == [150]
        link_local = advertisement("fe80::a", target, "fe80::a")
        assert node.send(a, link_local).drops == [150]
    for target in (ROUTER6, ROUTER_LL, NODE6, "fe80::1"):
        assert node.send(a, advertisement(a.ip6, target, a.ip6)).verdict == TC_OK


def test_discovery_reaches_an_endpoint_from_the_node_alone(node: Node) -> None:
    b = node.b
    node.policy(b, [])
    asked = ip(True, "fe80::1", b, hlim=255) / ICMPv6ND_NS(tgt=b.ip6)
    assert node.stack_sends(b, asked).verdict == TC_OK
    answered = ip(True, ROUTER6, b, hlim=255) / ICMPv6ND_NA(tgt=ROUTER6)
    assert node.stack_sends(b, answered, came_in=b.ifindex).verdict == TC_OK
    for message in (ICMPv6ND_NS(tgt=b.ip6), ICMPv6ND_NA(tgt=REMOTE6)):
        routed = ip(True, REMOTE6, b, hlim=254) / message / Raw(b"smuggled")
        assert node.stack_sends(b, routed, came_in=node.up).drops == [176]
        routed = ip(True, node.a, b, hlim=254) / message / Raw(b"smuggled")
        assert node.stack_sends(b, routed, came_in=node.a.ifindex).drops == [176]


def test_an_endpoint_has_no_leave_to_say_too_big(node: Node, v6: bool) -> None:
    """Routers do, about packets that never came back: a workload could say it about anything."""
    a, b = node.a, node.b
    node.policy(b, [])
    lie = error(v6, b, a, udp(v6, a, REMOTE6 if v6 else REMOTE4), "too-big")
    assert node.send(b, lie).drops == [133]
    router = NODE6 if v6 else NODE4
    assert node.send(b, error(v6, b, router, udp(v6, router, b), "too-big")).drops == [133]
    # As the answer to what it was sent, it is the connection's.
    node.policy(b, [Rule(False)])
    sent = node.send(a, udp(v6, a, b)).packet.payload
    assert node.send(b, error(v6, b, a, sent, "too-big")).verdict == TC_REDIRECT
    # And whoever routes may.
    node.policy(a, [])
    hop = "2001:db8:5::5" if v6 else "198.18.0.5"
    about = udp(v6, a, REMOTE6 if v6 else REMOTE4)
    assert node.wire_sends(error(v6, hop, a, about, "too-big")).verdict == TC_REDIRECT


def test_nobody_outside_is_an_endpoint_to_the_node(node: Node, v6: bool) -> None:
    """The node would answer to the endpoint, as itself, whom endpoints let in."""
    a = node.a
    own, remote = (NODE6, REMOTE6) if v6 else (NODE4, REMOTE4)
    request = ICMPv6EchoRequest() if v6 else ICMP()
    for packet in (udp(v6, a, own), tcp(v6, a, own, "S"), ip(v6, a, own) / request,
                   udp(v6, a, remote)):  # fmt: skip
        assert node.wire_sends(packet).drops == [132]
    assert node.wire_sends(udp(v6, remote, own)).verdict == TC_OK
