"""Between two endpoints of one node: parse, policy of both ends, conntrack, delivery."""

from __future__ import annotations

from scapy.layers.inet import ICMP, UDP
from scapy.layers.inet6 import ICMPv6EchoReply, ICMPv6EchoRequest
from scapy.packet import Raw

from cilia.bpf import constants, layout
from tests.datapath.harness import IN, OUT, TC_REDIRECT, TC_SHOT, Node, Rule
from tests.datapath.packets import ip, tcp, valid


def test_a_tcp_connection_from_syn_to_close(node: Node, v6: bool) -> None:
    a, b = node.a, node.b
    node.runtime(aggregation=3)

    syn = node.send(a, tcp(v6, a, b, "S"))
    assert syn.verdict == TC_REDIRECT
    out = syn.packet
    assert (out.src, out.dst) == (b.node_mac, b.mac)
    assert (out.hlim if v6 else out.ttl) == 63
    assert valid(out)
    length = len(out)
    assert syn.metrics == {(0, IN): (1, length)}
    egress, ingress = syn.verdicts
    assert (egress["ep_id"], egress["peer_ep_id"], egress["direction"]) == (a.id, b.id, OUT)
    assert (ingress["ep_id"], ingress["peer_ep_id"], ingress["direction"]) == (b.id, a.id, IN)
    for event, rule in ((egress, 101), (ingress, 102)):
        assert (event["src_identity"], event["dst_identity"]) == (a.identity, b.identity)
        assert event["rule_id"] == rule
        assert event["verdict"] == 0
        assert event["match_type"] == constants.MATCH_ALL
        assert event["proto"] == 6
        assert event["tcp_flags"] == 0x02
        assert (event["sport_be"], event["dport_be"]) == (40000, 80)
        assert layout.from_addr(event["saddr"]) == layout.from_addr(layout.to_addr(a.ip(v6)))
        assert bool(event["flags"] & constants.EVENT_F_IPV6) == v6
        assert event["length"] == length
        assert event["ifindex"] == a.ifindex
        assert bytes(event["smac"]).hex(":") == a.mac
        assert bytes(event["dmac"]).hex(":") == a.node_mac
    assert syn.traces == [constants.TRACE_TO_ENDPOINT]
    ((key, entry),) = node.ct()
    assert {int(key["lo_port_be"]), int(key["hi_port_be"])} == {40000, 80}
    assert entry["side"][0]["remote_id"] == b.identity
    assert entry["side"][1]["remote_id"] == a.identity
    assert entry["side"]["rule_id"].tolist() == [101, 102]
    assert entry["packets"].tolist() == [1, 0]

    synack = node.send(b, tcp(v6, b, a, "SA", 80, 40000))
    assert synack.verdict == TC_REDIRECT
    assert (synack.packet.src, synack.packet.dst) == (a.node_mac, a.mac)
    assert not synack.verdicts
    assert [int(e["reason"]) for e in synack.of(constants.EVENT_TRACE)] == [constants.CT_REPLY]
    assert synack.of(constants.EVENT_TRACE)[0]["flags"] & constants.EVENT_F_REPLY

    ack = node.send(a, tcp(v6, a, b, "A"))
    assert ack.verdict == TC_REDIRECT
    assert len(ack.events) == 0  # nothing new to say at aggregation medium
    ((_, entry),) = node.ct()
    assert entry["packets"].tolist() == [2, 1]
    assert entry["bytes"].tolist() == [length * 2, length]

    for sender, other, sport, dport in ((a, b, 40000, 80), (b, a, 80, 40000)):
        fin = node.send(sender, tcp(v6, sender, other, "FA", sport, dport))
        assert fin.traces == [constants.TRACE_TO_ENDPOINT]
    ((_, entry),) = node.ct()
    assert all(int(s) & constants.CT_SEEN_CLOSING for s in entry["seen"])


def test_udp_and_echo(node: Node, v6: bool) -> None:
    a, b = node.a, node.b
    for request, reply in (
        (UDP(sport=5000, dport=53) / b"x", UDP(sport=53, dport=5000) / b"y"),
        (
            (ICMPv6EchoRequest(id=7) if v6 else ICMP(type=8, id=7)),
            (ICMPv6EchoReply(id=7) if v6 else ICMP(type=0, id=7)),
        ),
    ):
        there = node.send(a, ip(v6, a, b) / request)
        assert there.verdict == TC_REDIRECT
        assert valid(there.packet)
        back = node.send(b, ip(v6, b, a) / reply)
        assert back.verdict == TC_REDIRECT
        assert valid(back.packet)
        assert not back.verdicts
    assert len(node.ct()) == 2


def test_policy_denies_at_either_end(node: Node, v6: bool) -> None:
    a, b = node.a, node.b
    node.policy(a, [])
    denied = node.send(a, tcp(v6, a, b, "S"))
    assert denied.verdict == TC_SHOT
    assert denied.drops == [133]
    assert [(int(e["verdict"]), int(e["direction"])) for e in denied.verdicts] == [(-133, OUT)]
    assert set(denied.metrics) == {(133, OUT)}
    assert not node.ct()

    node.policy(a, [Rule(True, id=5)])
    node.policy(b, [Rule(False, id=6), Rule(False, a.identity, 6, 80, 24, deny=True, id=7)])
    denied = node.send(a, tcp(v6, a, b, "S"))
    assert denied.drops == [181]
    assert [(int(e["verdict"]), int(e["rule_id"])) for e in denied.verdicts] == [(0, 5), (-181, 7)]
    assert denied.verdicts[1]["match_type"] == constants.MATCH_L3_L4
    assert set(denied.metrics) == {(181, IN)}
    assert denied.of(constants.EVENT_DROP)[0]["ep_id"] == b.id
    assert not node.ct()
    assert node.hits(b, 7) == 1


def test_big_tcp_has_no_length(node: Node, v6: bool) -> None:
    """Segments of more than 64 KiB carry a length of 0; only of an offloaded packet is it true."""
    a, b = node.a, node.b
    packet = tcp(v6, a, b, "A") / bytes(3000)
    setattr(packet, "plen" if v6 else "len", 0)
    assert node.send(a, packet, gso_size=1400).verdict == TC_REDIRECT
    assert node.send(a, packet).drops == [135 if v6 else 134]


def test_a_large_segment_arrives_as_it_was_sent(node: Node, v6: bool) -> None:
    """Its head is made its own on the way (own_large_head()): the same bytes, one hop less."""
    a, b = node.a, node.b
    assert node.send(a, tcp(v6, a, b, "S")).verdict == TC_REDIRECT
    sent = tcp(v6, a, b, "A") / Raw(bytes(range(256)) * 11)
    large = node.send(a, sent, gso_size=1400)
    assert large.verdict == TC_REDIRECT
    assert (large.packet.src, large.packet.dst) == (b.node_mac, b.mac)
    assert valid(large.packet)
    arrived = large.packet.payload
    assert bytes(arrived[Raw]) == bytes(sent[Raw])
    assert (arrived.hlim if v6 else arrived.ttl) == 63
