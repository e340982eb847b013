"""Fragments of both families: ports are lent by the first, and no byte comes twice."""

from __future__ import annotations

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment
from scapy.packet import Packet, Raw

from cilia.bpf import constants
from tests.datapath.harness import (
    NODE4,
    NODE6,
    OUT,
    REMOTE4,
    REMOTE6,
    TC_OK,
    TC_REDIRECT,
    Endpoint,
    Node,
    Result,
    Rule,
    now_s,
)
from tests.datapath.packets import echo, ip, udp

Host = Endpoint | str
SIZE = 64  # bytes of each piece


def fragment(
    v6: bool,
    src: Host,
    dst: Host,
    payload: bytes,
    offset: int,
    more: bool,
    *,
    proto: int = 17,
    id: int = 77,
) -> Packet:
    """A piece of a datagram; offset in bytes."""
    if v6:
        header = ip(True, src, dst) / IPv6ExtHdrFragment(
            nh=proto, id=id, offset=offset // 8, m=more
        )
    else:
        header = ip(False, src, dst, proto=proto, id=id, frag=offset // 8, flags=int(more))
    return header / Raw(payload)


def pieces(
    v6: bool, src: Host, dst: Host, count: int = 5, **fields: int
) -> tuple[bytes, list[Packet]]:
    """A UDP datagram of `count` pieces from port 5000 to 53."""
    whole = (
        ip(v6, src, dst)
        / UDP(sport=5000, dport=53)
        / bytes(n & 0xFF for n in range(SIZE * count - 8))
    )
    body = bytes(whole.payload)
    return body, [
        fragment(v6, src, dst, body[at : at + SIZE], at, at + SIZE < len(body), **fields)
        for at in range(0, len(body), SIZE)
    ]


def send_all(node: Node, packets: list[Packet]) -> list[Result]:
    return [node.send(node.a, packet) for packet in packets]


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [0, 2, 4, 1, 3], [0, 4, 3, 2, 1]])
def test_a_datagram_in_pieces(node: Node, v6: bool, order: list[int]) -> None:
    a, b = node.a, node.b
    node.policy(a, [Rule(True, 0, 17, 53, 24)])
    node.policy(b, [Rule(False, 0, 17, 53, 24)])
    _, packets = pieces(v6, a, b)
    results = send_all(node, [packets[n] for n in order])
    for n, result in enumerate(results):
        assert result.drops == []
        assert result.verdict == TC_REDIRECT
        assert len(result.verdicts) == (2 if n == 0 else 0)
        for event in result.events:
            assert event["flags"] & constants.EVENT_F_FRAGMENT
            assert (event["sport_be"], event["dport_be"], event["proto"]) == (5000, 53, 17)
    assert not node.frags()  # complete: forgotten
    ((_, entry),) = node.ct()
    assert int(entry["packets"][0]) == 5
    # The same identifier may come again at once.
    assert all(r.verdict == TC_REDIRECT for r in send_all(node, packets))


def test_state_of_an_unfinished_datagram(node: Node, v6: bool) -> None:
    _, packets = pieces(v6, node.a, node.b)
    send_all(node, [packets[0], packets[2], packets[4]])
    ((key, value),) = node.frags()
    assert int(key["id_be"]) == 77
    assert (int(value["sport_be"]), int(value["dport_be"])) == (5000, 53)
    assert (int(value["first_end"]), int(value["contig_end"])) == (SIZE, SIZE)
    islands = {(int(i["start"]), int(i["end"])) for i in value["island"] if i["end"]}
    assert islands == {(2 * SIZE, 3 * SIZE), (4 * SIZE, 5 * SIZE)}
    assert value["flags"] == constants.FRAG_F_LAST
    assert 13 <= int(value["expires_s"]) - now_s() <= 15


def test_the_first_must_come_first(node: Node, v6: bool) -> None:
    a, b = node.a, node.b
    _, packets = pieces(v6, a, b)
    result = node.send(a, packets[1])
    assert result.drops == [175]
    assert {key: n for key, (n, _) in result.metrics.items()} == {(175, OUT): 1}
    send_all(node, packets[:1])
    ((key, value),) = node.frags()
    value = value.copy()
    value["expires_s"] = now_s() - 2
    node.map("cilia_frag").update(key.tobytes(), value.tobytes())
    assert node.send(a, packets[1]).drops == [175]


@pytest.mark.parametrize(
    ("start", "end"), [(SIZE - 8, 2 * SIZE), (0, SIZE), (8, 24), (3 * SIZE - 8, 4 * SIZE),
                       (2 * SIZE, 3 * SIZE), (SIZE, 2 * SIZE + 8)]
)  # fmt: skip
def test_overlaps_spoil_the_datagram(node: Node, v6: bool, start: int, end: int) -> None:
    a, b = node.a, node.b
    body, packets = pieces(v6, a, b)
    send_all(node, [packets[0], packets[2]])
    piece = fragment(v6, a, b, body[start:end], start, True)
    assert node.send(a, piece).drops == [232]
    assert node.send(a, packets[3]).drops == [232]  # RFC 5722: all that follows
    assert node.send(a, packets[0]).drops == [232]


@pytest.mark.parametrize(("proto", "size"), [(6, 16), (132, 8), (17, 0)])
def test_tiny_fragments(node: Node, v6: bool, proto: int, size: int) -> None:
    a, b = node.a, node.b
    if size:
        tiny = fragment(v6, a, b, bytes(TCP())[:size], 0, True, proto=proto)
        assert node.send(a, tiny).drops == [231]
    else:
        assert node.send(a, fragment(v6, a, b, b"", 0, True)).drops == [134]
    assert not node.frags()


def test_a_split_tcp_header(node: Node) -> None:
    """RFC 1858: offset 1 overwrites the flags that the policy saw."""
    piece = fragment(False, node.a, node.b, bytes(40), 8, True, proto=6)
    assert node.send(node.a, piece).drops == [231]


def test_a_split_header_chain(node: Node) -> None:
    """RFC 7112: the first fragment holds all headers."""
    a, b = node.a, node.b
    options = bytes([17, 3]) + bytes(30)  # 32 bytes of options, of which 16 are here
    piece = fragment(True, a, b, options[:16], 0, True, proto=60)
    assert node.send(a, piece).drops == [231]


def test_options_in_the_fragmentable_part(node: Node) -> None:
    a, b = node.a, node.b
    node.policy(a, [Rule(True, 0, 17, 53, 24)])
    body = bytes(IPv6ExtHdrDestOpt(nh=17)) + bytes(UDP(sport=5000, dport=53, len=120)) + bytes(112)
    first = fragment(True, a, b, body[:64], 0, True, proto=60)
    second = fragment(True, a, b, body[64:], 64, False, proto=60)
    for result in send_all(node, [first, second]):
        assert result.verdict == TC_REDIRECT
    assert not node.frags()


def test_malformed_fragments(node: Node, v6: bool) -> None:
    a, b = node.a, node.b
    assert node.send(a, fragment(v6, a, b, bytes(61), 0, True)).drops == [134]  # not of eights
    assert node.send(a, fragment(v6, a, b, bytes(64), 65528, False)).drops == [134]  # too long
    if v6:
        twice = ip(True, a, b) / IPv6ExtHdrFragment(m=1) / IPv6ExtHdrFragment(nh=17, m=1)
        assert node.send(a, twice / Raw(bytes(64))).drops == [156]


def test_too_scattered(node: Node, v6: bool) -> None:
    a, b = node.a, node.b
    _, packets = pieces(v6, a, b, 12)
    results = send_all(node, packets[:1] + packets[2:11:2])
    assert [r.drops for r in results] == [[]] * 5 + [[234]]


def test_echo_in_pieces(node: Node, v6: bool) -> None:
    a, b = node.a, node.b
    icmp, request = (58, 128) if v6 else (1, 8)
    node.policy(a, [Rule(True, 0, icmp, request, 24)])
    node.policy(b, [Rule(False, 0, icmp, request, 24)])
    for src, dst, reply in ((a, b, False), (b, a, True)):
        body = bytes((echo(v6, src, dst, 9, reply=reply) / bytes(120)).payload)
        for at in range(0, len(body), 64):
            piece = fragment(v6, src, dst, body[at : at + 64], at, at + 64 < len(body), proto=icmp)
            result = node.send(src, piece)
            assert result.drops == []
            assert result.verdict == TC_REDIRECT
    ((_, entry),) = node.ct()
    assert entry["packets"].tolist() == [2, 2]


def test_denied_pieces(node: Node, v6: bool) -> None:
    a, b = node.a, node.b
    node.policy(b, [])
    _, packets = pieces(v6, a, b)
    assert [r.drops for r in send_all(node, packets)] == [[133]] * 5


def test_masqueraded_pieces_out_and_back(node: Node, v6: bool) -> None:
    a = node.a
    remote, own = (REMOTE6, NODE6) if v6 else (REMOTE4, NODE4)
    body, packets = pieces(v6, a, remote)
    results = send_all(node, packets)
    port = None
    joined = b""
    for result in results:
        assert result.drops == []
        assert result.verdict == TC_REDIRECT
        layer = result.packet[IPv6] if v6 else result.packet[IP]
        assert (layer.src, layer.dst) == (own, remote)
        if not v6:
            again = IP(bytes(layer))
            del again.chksum
            assert IP(bytes(again)).chksum == layer.chksum
        joined += result.raw[14 + (48 if v6 else 20) :]
    assert len(joined) == len(body)
    # What the receiver puts together has a right checksum.
    udp_ = UDP(joined)
    port = udp_.sport
    assert port >= 61000
    check = udp_.chksum
    del udp_.chksum
    rebuilt = ip(v6, own, remote) / udp_
    assert UDP(bytes(rebuilt.payload)).chksum == check

    back = bytes((ip(v6, remote, own) / UDP(sport=53, dport=port) / bytes(300)).payload)
    joined = b""
    for at in range(0, len(back), 104):
        piece = fragment(v6, remote, own, back[at : at + 104], at, at + 104 < len(back), id=5)
        result = node.wire_sends(piece)
        assert result.drops == []
        assert result.verdict == TC_REDIRECT
        layer = result.packet[IPv6] if v6 else result.packet[IP]
        assert (layer.src, layer.dst) == (remote, a.ip(v6))
        joined += result.raw[14 + (48 if v6 else 20) :]
    assert UDP(joined).dport == 5000
    check = UDP(joined).chksum
    rebuilt = udp(v6, remote, a)
    rebuilt.remove_payload()
    fresh = UDP(joined)
    del fresh.chksum
    assert UDP(bytes((ip(v6, remote, a) / fresh).payload)).chksum == check
    assert not node.frags()


def test_the_nodes_own_fragments_pass_untouched(node: Node, v6: bool) -> None:
    remote, own = (REMOTE6, NODE6) if v6 else (REMOTE4, NODE4)
    _, packets = pieces(v6, remote, own)
    for packet in packets:
        result = node.wire_sends(packet)
        assert result.verdict == TC_OK
        assert not result.metrics
    assert not node.frags()


def test_pieces_from_the_wire_and_the_stack(node: Node, v6: bool) -> None:
    a = node.a
    remote = REMOTE6 if v6 else REMOTE4
    node.policy(a, [Rule(False, 0, 17, 53, 24)])
    _, packets = pieces(v6, remote, a)
    for packet in packets:
        assert node.wire_sends(packet).verdict == TC_REDIRECT
    _, packets = pieces(v6, NODE6 if v6 else NODE4, a)
    for packet in packets:
        assert node.stack_sends(a, packet).verdict == TC_OK
    assert not node.frags()
