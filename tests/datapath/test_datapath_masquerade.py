"""Endpoint and world: routes, masquerade, the way back, and packets that come in by a device."""

from __future__ import annotations

import socket

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6
from scapy.layers.l2 import ARP, Ether
from scapy.layers.sctp import SCTP, SCTPChunkData
from scapy.packet import Packet, Raw

from cilia.bpf import constants, layout
from tests.datapath.harness import (
    GATEWAY_MAC,
    IN,
    NODE4,
    NODE6,
    OUT,
    REMOTE4,
    REMOTE6,
    TC_OK,
    TC_REDIRECT,
    TC_SHOT,
    Node,
    Rule,
    now_s,
)
from tests.datapath.packets import echo, error, ip, tcp, udp, valid

NO_MASQUERADE = constants.RT_F_ALLOW_FRAG_NEEDED


def remote(v6: bool) -> str:
    return REMOTE6 if v6 else REMOTE4


def own(v6: bool) -> str:
    return NODE6 if v6 else NODE4


def addresses(packet: Packet) -> tuple[str, str]:
    layer = packet[IPv6] if IPv6 in packet else packet[IP]
    return layer.src, layer.dst


def swapped(packet: Packet) -> Packet:
    """The answer to a packet that left: addresses and ports exchanged."""
    layer = packet[IPv6] if IPv6 in packet else packet[IP]
    back = (
        IPv6(src=layer.dst, dst=layer.src) if IPv6 in packet else IP(src=layer.dst, dst=layer.src)
    )
    if TCP in packet:
        flags = "SA" if packet[TCP].flags == "S" else "A"
        return back / TCP(sport=packet[TCP].dport, dport=packet[TCP].sport, flags=flags)
    if UDP in packet:
        return back / UDP(sport=packet[UDP].dport, dport=packet[UDP].sport) / b"answer"
    if SCTP in packet:
        return back / SCTP(sport=packet[SCTP].dport, dport=packet[SCTP].sport) / SCTPChunkData()
    if ICMPv6EchoRequest in packet:
        return echo(True, layer.dst, layer.src, packet[ICMPv6EchoRequest].id, reply=True)
    return echo(False, layer.dst, layer.src, packet[ICMP].id, reply=True)


def port_of(packet: Packet) -> int:
    for kind in (TCP, UDP, SCTP):
        if kind in packet:
            return int(packet[kind].sport)
    return int(packet[ICMPv6EchoRequest if ICMPv6EchoRequest in packet else ICMP].id)


@pytest.mark.parametrize("kind", ["tcp", "udp", "echo"])
def test_out_and_back(node: Node, v6: bool, kind: str) -> None:
    a = node.a
    packet = {"tcp": tcp(v6, a, remote(v6), "S"), "udp": udp(v6, a, remote(v6)),
              "echo": echo(v6, a, remote(v6))}[kind]  # fmt: skip
    out = node.send(a, packet)
    assert out.verdict == TC_REDIRECT
    left = out.packet
    assert (left.src, left.dst) == ("02:00:00:00:01:01", GATEWAY_MAC)
    assert addresses(left) == (own(v6), remote(v6))
    assert (left.hlim if v6 else left.ttl) == 63
    port = port_of(left)
    assert 61000 <= port <= 65535
    assert valid(left)
    assert out.traces[-1] == constants.TRACE_TO_NETWORK
    assert {key: n for key, (n, _) in out.metrics.items()} == {(0, OUT): 1}
    (event,) = out.verdicts
    assert event["dst_identity"] == (10 if v6 else 9)
    ((_, entry),) = node.ct()
    assert entry["flags"] & constants.CT_F_NAT
    assert int(entry["nat_port_be"]) == port
    assert str(layout.from_addr(entry["nat_addr"])) == own(v6)
    ((key, value),) = node.nat()
    assert int(key["local_port_be"]) == port
    assert str(layout.from_addr(value["addr"])) == a.ip(v6)
    assert int(value["expires_s"]) == int(entry["expires_s"])

    back = node.wire_sends(swapped(left))
    assert back.verdict == TC_REDIRECT
    home = back.packet
    assert (home.src, home.dst) == (a.node_mac, a.mac)
    assert addresses(home) == (remote(v6), a.ip(v6))
    assert valid(home)
    assert not back.verdicts
    assert back.traces == [constants.TRACE_FROM_NETWORK, constants.TRACE_TO_ENDPOINT]
    (trace,) = [e for e in back.of(constants.EVENT_TRACE) if e["obs_point"] == 0]
    assert (trace["src_identity"], trace["dst_identity"]) == (10 if v6 else 9, a.identity)
    assert {key: n for key, (n, _) in back.metrics.items()} == {(0, IN): 1}

    # The second packet uses the same port.
    if kind == "tcp":
        packet = tcp(v6, a, remote(v6), "A")
    again = node.send(a, packet)
    assert port_of(again.packet) == port
    assert valid(again.packet)
    assert len(node.nat()) == 1
    assert not again.verdicts


def test_a_udp_checksum_of_zero_stays(node: Node) -> None:
    packet = IP(src=node.a.ip4, dst=REMOTE4) / UDP(sport=5000, dport=53, chksum=0) / b"x"
    left = node.send(node.a, packet).packet
    assert left[UDP].chksum == 0
    assert left[IP].src == NODE4


def test_a_port_in_range_is_kept(node: Node, v6: bool) -> None:
    a, b = node.a, node.b
    first = node.send(a, udp(v6, a, remote(v6), 62000)).packet
    assert port_of(first) == 62000
    # The same port of another endpoint to the same place has to move; elsewhere it need not.
    second = node.send(b, udp(v6, b, remote(v6), 62000)).packet
    assert port_of(second) != 62000
    other = node.send(b, udp(v6, b, remote(v6), 62000, 54)).packet
    assert port_of(other) == 62000
    assert addresses(node.wire_sends(swapped(first)).packet)[1] == a.ip(v6)
    assert addresses(node.wire_sends(swapped(second)).packet)[1] == b.ip(v6)


def test_sctp_keeps_its_port_or_fails(node: Node, v6: bool) -> None:
    a, b = node.a, node.b

    def packet(ep: object) -> Packet:
        return ip(v6, ep, remote(v6)) / SCTP(sport=4000, dport=5000) / SCTPChunkData(data=b"x")  # type: ignore[arg-type]

    first = node.send(a, packet(a))
    assert port_of(first.packet) == 4000
    before = bytes(packet(a)[SCTP])
    assert bytes(first.packet[SCTP]) == before  # the CRC covers no address
    assert node.send(b, packet(b)).drops == [167]
    assert len(node.ct()) == 1
    back = node.wire_sends(swapped(first.packet))
    assert addresses(back.packet) == (remote(v6), a.ip(v6))


def test_ports_of_the_nodes_sockets_are_avoided(objects: None) -> None:
    """A range of one port: taken by a socket of the node, then free."""
    with Node(rodata={"NAT_PORT_MIN": 61000, "NAT_PORT_MAX": 61000}) as node:
        a = node.a
        for v6 in (False, True):
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                packet = (tcp(v6, a, remote(v6), "S") if kind == socket.SOCK_STREAM
                          else udp(v6, a, remote(v6)))  # fmt: skip
                taken = node.thread.call(lambda k=kind, f=v6: _bind(k, f))  # type: ignore[misc]
                assert node.send(a, packet).drops == [167], (v6, kind)
                assert not node.ct()
                taken.close()
                assert port_of(node.send(a, packet).packet) == 61000
                node.reset()


def _bind(kind: int, v6: bool) -> socket.socket:
    taken = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET, kind)
    if v6:
        taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    taken.bind((own(v6), 61000))
    if kind == socket.SOCK_STREAM:
        taken.listen()
    return taken


def test_a_small_range_is_used_up(objects: None) -> None:
    with Node(rodata={"NAT_PORT_MIN": 61000, "NAT_PORT_MAX": 61031}) as node:
        a = node.a
        ports = set()
        for sport in range(32):
            ports.add(port_of(node.send(a, udp(False, a, REMOTE4, 1000 + sport)).packet))
        assert ports == set(range(61000, 61032))
        full = node.send(a, udp(False, a, REMOTE4, 2000))
        assert full.drops == [167]
        assert len(node.ct()) == 32
        # Another destination has the ports to itself, and expired mappings are taken over.
        assert node.send(a, udp(False, a, "203.0.113.10", 2000)).verdict == TC_REDIRECT
        key, value = next((k, v) for k, v in node.nat() if int(v["port_be"]) == 1000)
        value = value.copy()
        value["expires_s"] = now_s() - 2
        node.map("cilia_nat").update(key.tobytes(), value.tobytes())
        freed = node.send(a, udp(False, a, REMOTE4, 2000)).packet
        assert port_of(freed) == int(key["local_port_be"])


def test_an_evicted_mapping_is_restored(node: Node, v6: bool) -> None:
    a = node.a
    port = port_of(node.send(a, udp(v6, a, remote(v6))).packet)
    for key, _ in node.nat():
        node.map("cilia_nat").delete(key.tobytes())
    assert port_of(node.send(a, udp(v6, a, remote(v6))).packet) == port
    assert len(node.nat()) == 1


def test_both_directions_keep_the_mapping(node: Node, v6: bool) -> None:
    a = node.a
    left = node.send(a, udp(v6, a, remote(v6))).packet

    def age() -> None:
        ((key, value),) = node.nat()
        value = value.copy()
        value["expires_s"] = now_s() + 3
        node.map("cilia_nat").update(key.tobytes(), value.tobytes())

    for inward in (True, False):
        age()
        if inward:
            node.wire_sends(swapped(left))
        else:
            node.send(a, udp(v6, a, remote(v6)))
        ((_, value),) = node.nat()
        assert int(value["expires_s"]) >= now_s() + 58


def test_what_cannot_be_masqueraded(node: Node, v6: bool) -> None:
    a = node.a
    odd = IPv6(src=a.ip6, dst=REMOTE6, nh=58) / Raw(b"\xc8" + bytes(15)) if v6 else (
        IP(src=a.ip4, dst=REMOTE4) / ICMP(type=13)
    )  # fmt: skip
    assert node.send(a, odd).drops == [168]
    assert node.send(a, tcp(v6, a, remote(v6), "RA")).drops == [167]


def test_policy_comes_first(node: Node, v6: bool) -> None:
    a = node.a
    node.policy(a, [Rule(True, a.identity)])
    assert node.send(a, udp(v6, a, remote(v6))).drops == [133]
    assert not node.nat()
    node.policy(a, [Rule(True, 10 if v6 else 9)])
    assert node.send(a, udp(v6, a, remote(v6))).verdict == TC_REDIRECT


def test_without_masquerade(node: Node, v6: bool) -> None:
    a = node.a
    node.runtime(flags=NO_MASQUERADE)
    out = node.send(a, udp(v6, a, remote(v6)))
    assert out.verdict == TC_REDIRECT
    assert addresses(out.packet) == (a.ip(v6), remote(v6))
    assert valid(out.packet)
    assert not node.nat()
    back = node.wire_sends(swapped(out.packet))
    assert (back.verdict, len(back.verdicts)) == (TC_REDIRECT, 0)
    assert (back.packet.hlim if v6 else back.packet.ttl) == 63


def test_cluster_and_unlisted_devices_see_the_endpoint(node: Node, v6: bool) -> None:
    a = node.a
    node.ipcache(f"{remote(v6)}/{128 if v6 else 32}", 7001)  # an endpoint of another node
    assert addresses(node.send(a, udp(v6, a, remote(v6))).packet)[0] == a.ip(v6)
    node.reset()
    node.map("cilia_devices").delete(node.up.to_bytes(4, "little"))
    assert addresses(node.send(a, udp(v6, a, remote(v6))).packet)[0] == a.ip(v6)
    node.device(node.up, None, None)
    assert node.send(a, udp(v6, a, remote(v6), 5001)).drops == [167]  # no address to lend


def test_routes_that_lead_nowhere(node: Node, v6: bool) -> None:
    a = node.a
    nowhere = "2001:db8:bad::1" if v6 else "198.51.100.1"
    assert node.send(a, udp(v6, a, nowhere)).drops == [169]
    # A local address that the ipcache does not know yet is not delivered on the world's rule.
    node.thread.sh(f"ip addr replace {'2001:db8:5::5/128' if v6 else '192.0.2.55/32'} dev up0")
    local = "2001:db8:5::5" if v6 else "192.0.2.55"
    assert node.send(a, udp(v6, a, local)).drops == [169]


def test_an_unknown_neighbour_is_left_to_the_kernel(node: Node, v6: bool) -> None:
    target = "2001:db8::77" if v6 else "192.0.2.77"  # on the link, never seen
    out = node.send(node.a, udp(v6, node.a, target))
    assert out.verdict == TC_REDIRECT
    assert addresses(out.packet) == (own(v6), target)


def test_hops_and_sizes_at_the_uplink(node: Node, v6: bool) -> None:
    a = node.a
    last = node.send(a, udp(v6, a, remote(v6), ttl=1))
    assert (last.verdict, last.traces[-1]) == (TC_OK, constants.TRACE_TO_STACK)
    assert addresses(last.packet)[0] == a.ip(v6)  # the kernel's error goes to the endpoint
    big = ip(v6, a, remote(v6)) / UDP(sport=5000, dport=53) / bytes(2000)
    if not v6:
        assert node.send(a, big).drops == [136]
        big[IP].flags = "DF"
    result = node.send(a, big)
    assert (result.verdict, result.traces[-1]) == (TC_OK, constants.TRACE_TO_STACK)


# ---- in by the device


def test_world_to_endpoint(node: Node, v6: bool) -> None:
    a = node.a
    inward = node.wire_sends(tcp(v6, remote(v6), a, "S", 40000, 80))
    assert inward.verdict == TC_REDIRECT
    assert (inward.packet.src, inward.packet.dst) == (a.node_mac, a.mac)
    assert (inward.packet.hlim if v6 else inward.packet.ttl) == 63
    assert valid(inward.packet)
    (event,) = inward.verdicts
    assert (event["direction"], event["ep_id"], event["ifindex"]) == (IN, a.id, node.up)
    assert event["src_identity"] == (10 if v6 else 9)
    ((_, entry),) = node.ct()
    assert entry["flags"] & constants.CT_F_OUTSIDE
    # The answer leaves as it is asked for: not masqueraded.
    reply = node.send(a, tcp(v6, a, remote(v6), "SA", 80, 40000))
    assert reply.verdict == TC_REDIRECT
    assert addresses(reply.packet) == (a.ip(v6), remote(v6))
    node.policy(a, [Rule(True)])
    assert node.wire_sends(tcp(v6, remote(v6), a, "A", 40000, 80)).drops == [133]
    assert node.wire_sends(tcp(v6, remote(v6), a, "S", 40001, 80)).drops == [133]


def test_spoofed_sources_from_the_wire(node: Node, v6: bool) -> None:
    a, b = node.a, node.b
    for source in (b.ip(v6), own(v6), "fe80::c111" if v6 else "10.217.0.1"):
        result = node.wire_sends(udp(v6, source, a))
        assert (result.verdict, result.drops) == (TC_SHOT, [132])
        assert {key: n for key, (n, _) in result.metrics.items()} == {(132, IN): 1}


def test_what_is_the_nodes_passes_untouched(node: Node, v6: bool) -> None:
    here = own(v6)
    packets: list[Packet | bytes] = [
        tcp(v6, remote(v6), here, "S", 40000, 22),
        udp(v6, remote(v6), here, 53, 61500),
        echo(v6, remote(v6), here),
        echo(v6, remote(v6), here, reply=True),
        udp(v6, remote(v6), "ff02::1" if v6 else "224.0.0.1"),
        udp(v6, remote(v6), "2001:db8:42::1" if v6 else "198.18.5.5"),
        ip(v6, remote(v6), here, **{"nh" if v6 else "proto": 47}) / Raw(bytes(20)),
        ip(v6, remote(v6), here) / TCP(dataofs=3),
        error(v6, remote(v6), here, udp(v6, here, remote(v6))),
        Ether(dst="ff:ff:ff:ff:ff:ff") / ARP(pdst=NODE4),
        Ether(type=0x88CC) / Raw(bytes(50)),
        Ether(type=0x0026) / Raw(bytes(50)),
    ]
    for packet in packets:
        frame = node._frame(packet, GATEWAY_MAC, "02:00:00:00:01:01")
        result = node.run("from_netdev", frame, node.up)
        assert result.verdict == TC_OK
        assert result.raw == bytes(frame)
        assert not result.metrics
        assert not len(result.events)


def test_malformed_for_an_endpoint_is_dropped(node: Node, v6: bool) -> None:
    broken = ip(v6, remote(v6), node.a) / TCP(dataofs=3)
    assert node.wire_sends(broken).drops == [135]
    last = node.wire_sends(udp(v6, remote(v6), node.a, ttl=1))
    assert (last.verdict, last.traces[-1]) == (TC_OK, constants.TRACE_TO_STACK)


def test_answers_need_their_connection(node: Node, v6: bool) -> None:
    a = node.a
    left = node.send(a, udp(v6, a, remote(v6))).packet
    # revoked meanwhile
    node.policy(a, [])
    cut = node.wire_sends(swapped(left))
    assert cut.drops == [133]
    assert cut.verdicts[0]["flags"] & constants.EVENT_F_REJUDGED
    assert cut.verdicts[0]["ep_id"] == a.id
    # allowed again: its entry was kept
    node.policy(a, [Rule(True)])
    assert node.wire_sends(swapped(left)).verdict == TC_REDIRECT
    # gone
    ((key, _),) = node.ct()
    node.map("cilia_ct").delete(key.tobytes())
    assert node.wire_sends(swapped(left)).drops == [167]
    # the endpoint is gone
    node.map("cilia_lxc").delete(layout.to_addr(a.ip(v6)))
    assert node.wire_sends(swapped(left)).drops == [150]
    # the mapping has expired: the node's own business
    ((key, value),) = node.nat()
    value = value.copy()
    value["expires_s"] = now_s() - 2
    node.map("cilia_nat").update(key.tobytes(), value.tobytes())
    assert node.wire_sends(swapped(left)).verdict == TC_OK


@pytest.mark.parametrize(("level", "traces"), [(0, [10, 0]), (1, [10, 0]), (2, [10, 0]), (3, [0])])
def test_from_network_and_aggregation(node: Node, level: int, traces: list[int]) -> None:
    node.runtime(aggregation=level)
    assert node.wire_sends(udp(False, REMOTE4, node.a)).traces == traces


@pytest.mark.parametrize("way", ["forward", "answer"])
def test_a_remote_that_gets_an_identity_is_judged_again(node: Node, v6: bool, way: str) -> None:
    """A policy came to name its CIDR: from now on it is no longer the world's rule that counts."""
    a = node.a
    node.policy(a, [Rule(True, 10 if v6 else 9)])
    left = node.send(a, udp(v6, a, remote(v6))).packet
    node.ipcache(f"{remote(v6)}/{128 if v6 else 32}", 1 << 24 | 7)
    assert node.send(a, udp(v6, a, remote(v6))).verdict == TC_REDIRECT  # not told yet
    node.runtime(ipcache_epoch=2)
    if way == "forward":
        cut = node.send(a, udp(v6, a, remote(v6)))
    else:
        cut = node.wire_sends(swapped(left))
    assert cut.drops == [133]
    (event,) = cut.verdicts
    assert event["flags"] & constants.EVENT_F_REJUDGED
    assert (event["ep_id"], event["direction"]) == (a.id, OUT)
    identity = event["dst_identity"] if way == "forward" else event["src_identity"]
    assert identity == 1 << 24 | 7
    assert len(node.ct()) == 1  # revoked, and kept
    assert node.send(a, udp(v6, a, remote(v6))).drops == [133]
    assert node.wire_sends(swapped(left)).drops == [133]
