"""ICMP errors: those about a connection pass and are translated with it; others are plain ICMP."""

from __future__ import annotations

import pytest
from scapy.layers.inet import ICMP, IP, IPerror, UDPerror
from scapy.layers.inet6 import IPerror6, IPv6
from scapy.packet import Packet, Raw

from cilia.bpf import constants
from tests.datapath.harness import (
    NODE4,
    NODE6,
    REMOTE4,
    REMOTE6,
    TC_OK,
    TC_REDIRECT,
    Node,
    Rule,
    now_s,
)
from tests.datapath.packets import echo, error, ip, tcp, udp

KINDS = ["unreachable", "time-exceeded", "parameter", "too-big"]


def only(node: Node) -> None:
    """a may send UDP, b may receive it, and no policy says anything of ICMP."""
    node.policy(node.a, [Rule(True, 0, 17, 0, 8), Rule(True, 0, 6, 0, 8)])
    node.policy(node.b, [Rule(False, 0, 17, 0, 8), Rule(False, 0, 6, 0, 8)])


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_about_a_connection_passes(node: Node, v6: bool, kind: str) -> None:
    a, b = node.a, node.b
    only(node)
    for about in (udp(v6, a, b), tcp(v6, a, b, "S")):
        sent = node.send(a, about).packet
        result = node.send(b, error(v6, b, a, sent.payload, kind))
        assert result.verdict == TC_REDIRECT
        assert (result.packet.src, result.packet.dst) == (a.node_mac, a.mac)
        assert not result.verdicts
        (trace,) = [e for e in result.of(constants.EVENT_TRACE) if e["obs_point"] == 0]
        assert trace["reason"] == constants.CT_RELATED
        assert trace["flags"] & constants.EVENT_F_RELATED
        assert (trace["src_identity"], trace["dst_identity"]) == (b.identity, a.identity)
    assert len(node.ct()) == 2


def test_an_error_from_the_node(node: Node, v6: bool) -> None:
    """Time exceeded by the kernel, about a packet between endpoints or to the world."""
    a, b = node.a, node.b
    only(node)
    router = "fd00:c111::1" if v6 else "10.217.0.1"
    for target in (b, REMOTE6 if v6 else REMOTE4):
        about = udp(v6, a, target, ttl=1)
        assert node.send(a, about).verdict == TC_OK
        result = node.stack_sends(a, error(v6, router, a, about, "time-exceeded"))
        assert result.verdict == TC_OK
        (trace,) = result.of(constants.EVENT_TRACE)
        assert trace["reason"] == constants.CT_RELATED
        assert trace["src_identity"] == 1


def test_an_error_about_nothing_is_plain_icmp(node: Node, v6: bool) -> None:
    a, b = node.a, node.b
    icmp, unreachable = (58, 1) if v6 else (1, 3)
    only(node)
    stray = error(v6, b, a, udp(v6, a, b))
    node.policy(b, [])
    assert node.send(b, stray).drops == [133]
    node.policy(b, [Rule(True, 0, icmp, unreachable, 24, id=8)])
    node.policy(a, [Rule(False, 0, icmp, unreachable, 24, id=9)])
    result = node.send(b, stray)
    assert [int(e["rule_id"]) for e in result.verdicts] == [8, 9]
    assert not node.ct()


def test_errors_that_lie(node: Node, v6: bool) -> None:
    """About somebody else's connection, or to another than its sender."""
    a, b = node.a, node.b
    c = node.endpoint("c", 13, 1003)
    node.policy(c, [])
    only(node)
    sent = node.send(a, udp(v6, a, b)).packet.payload
    assert node.send(c, error(v6, c, a, sent)).drops == [133]
    assert node.send(b, error(v6, b, c, sent)).drops == [133]
    # A packet that never was: the quoted connection's other direction is there, though.
    outside = REMOTE6 if v6 else REMOTE4
    assert node.wire_sends(error(v6, outside, a, sent)).drops == [133]
    # cut off in the quoted IP header
    body = Raw(bytes(error(v6, b, a, sent).payload)[:20])
    cut_off = ip(v6, b, a, **({"nh": 58} if v6 else {"proto": 1})) / body
    assert node.send(b, cut_off).drops == [133]


def test_an_error_is_cut_with_its_connection(node: Node, v6: bool) -> None:
    a, b = node.a, node.b
    only(node)
    sent = node.send(a, udp(v6, a, b)).packet.payload
    node.policy(a, [])
    result = node.send(b, error(v6, b, a, sent))
    assert result.drops == [133]
    (event,) = result.verdicts
    assert event["flags"] & constants.EVENT_F_REJUDGED
    assert event["ep_id"] == a.id
    assert node.send(b, error(v6, b, a, sent)).drops == [133]
    # expired
    only(node)
    sent = node.send(a, udp(v6, a, b)).packet.payload
    node.patch_ct(expires_s=now_s() - 2)
    assert node.send(b, error(v6, b, a, sent)).drops == [133]


def test_path_mtu_discovery_passes_policy(node: Node, v6: bool) -> None:
    a = node.a
    node.policy(a, [])
    router, remote = (NODE6, REMOTE6) if v6 else (NODE4, REMOTE4)
    stray = error(v6, router, a, udp(v6, a, remote), "too-big")
    assert node.stack_sends(a, stray).verdict == TC_OK
    hop = "2001:db8:5::5" if v6 else "198.18.0.5"
    assert node.wire_sends(error(v6, hop, a, udp(v6, a, remote), "too-big")).verdict == TC_REDIRECT
    node.runtime(flags=0)
    assert node.stack_sends(a, stray).drops == [133]
    node.runtime()
    node.endpoint("a", 11, 1001, flags=0)
    assert node.stack_sends(a, stray).drops == [235]


# ---- masqueraded connections


def quoted(packet: Packet) -> tuple[str, str]:
    layer = packet[IPerror6] if IPerror6 in packet else packet[IPerror]
    return layer.src, layer.dst


def icmp_is_valid(packet: Packet) -> bool:
    """The checksum of the error itself, over what it quotes as it is."""
    raw = packet.copy()
    layer = raw[IPv6] if IPv6 in raw else raw[IP]
    fresh = type(layer)(bytes(layer))
    if IPv6 in raw:
        before = fresh.payload.cksum
        del fresh.payload.cksum
        return bool(type(layer)(bytes(fresh)).payload.cksum == before)
    before = fresh[ICMP].chksum
    header = fresh.chksum
    del fresh[ICMP].chksum
    del fresh.chksum
    again = IP(bytes(fresh))
    return bool(again[ICMP].chksum == before and again.chksum == header)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("about", ["udp", "tcp", "echo"])
def test_an_error_about_a_masqueraded_connection(
    node: Node, v6: bool, kind: str, about: str
) -> None:
    a = node.a
    remote = REMOTE6 if v6 else REMOTE4
    own = NODE6 if v6 else NODE4
    node.policy(a, [Rule(True)])
    packet = {"udp": udp(v6, a, remote), "tcp": tcp(v6, a, remote, "S"),
              "echo": echo(v6, a, remote)}[about]  # fmt: skip
    left = node.send(a, packet).packet.payload
    hop = "2001:db8:5::5" if v6 else "198.18.0.5"
    result = node.wire_sends(error(v6, hop, own, left, kind))
    assert result.drops == []
    assert result.verdict == TC_REDIRECT
    home = result.packet
    layer = home[IPv6] if v6 else home[IP]
    assert (layer.src, layer.dst) == (hop, a.ip(v6))
    assert quoted(home) == (a.ip(v6), remote)
    inner = (home[IPerror6] if v6 else home[IPerror]).payload
    if about == "echo":
        assert inner.id == 7
    else:
        assert (inner.sport, inner.dport) == ((5000, 53) if about == "udp" else (40000, 80))
    assert icmp_is_valid(home)
    if not v6:
        fresh = IPerror(bytes(home[IPerror]))
        before = fresh.chksum
        del fresh.chksum
        assert IPerror(bytes(fresh)).chksum == before
    trace = result.of(constants.EVENT_TRACE)[-1]
    assert trace["reason"] == constants.CT_RELATED


def test_an_endpoints_error_about_a_masqueraded_answer(node: Node, v6: bool) -> None:
    """The answer came to a closed port: the remote hears it from the node, in its own terms."""
    a = node.a
    remote = REMOTE6 if v6 else REMOTE4
    own = NODE6 if v6 else NODE4
    node.policy(a, [Rule(True, 0, 17, 0, 8)])
    left = node.send(a, udp(v6, a, remote)).packet
    port = left.payload.payload.sport
    home = node.wire_sends(udp(v6, remote, own, 53, port)).packet.payload
    result = node.send(a, error(v6, a, remote, home))
    assert result.drops == []
    assert result.verdict == TC_REDIRECT
    out = result.packet
    layer = out[IPv6] if v6 else out[IP]
    assert (layer.src, layer.dst) == (own, remote)
    assert quoted(out) == (remote, own)
    assert out[UDPerror].dport == port
    assert out[UDPerror].sport == 53
    assert icmp_is_valid(out)


def test_an_error_when_the_connection_is_gone(node: Node, v6: bool) -> None:
    a = node.a
    remote, own = (REMOTE6, NODE6) if v6 else (REMOTE4, NODE4)
    left = node.send(a, udp(v6, a, remote)).packet.payload
    for key, _ in node.ct():
        node.map("cilia_ct").delete(key.tobytes())
    assert node.wire_sends(error(v6, remote, own, left)).drops == [167]
