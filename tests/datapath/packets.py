"""Short names for the packets of the datapath's tests, and the check of their checksums."""

from __future__ import annotations

from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6PacketTooBig,
    ICMPv6ParamProblem,
    ICMPv6TimeExceeded,
    IPv6,
)
from scapy.packet import Packet

from tests.datapath.harness import Endpoint

Host = Endpoint | str


def ip(v6: bool, src: Host, dst: Host, **fields: int) -> Packet:
    """An IP header between two endpoints or addresses."""
    source = src if isinstance(src, str) else src.ip(v6)
    target = dst if isinstance(dst, str) else dst.ip(v6)
    if v6:
        if "ttl" in fields:
            fields["hlim"] = fields.pop("ttl")
        return IPv6(src=source, dst=target, **fields)
    return IP(src=source, dst=target, **fields)


def tcp(v6: bool, src: Host, dst: Host, flags: str, sport: int = 40000, dport: int = 80,
        **fields: int) -> Packet:  # fmt: skip
    """A TCP segment without data."""
    return ip(v6, src, dst, **fields) / TCP(sport=sport, dport=dport, flags=flags)


def valid(packet: Packet) -> bool:
    """All checksums are what Scapy computes from scratch."""
    raw = bytes(packet)
    fresh = packet.copy()
    layer: Packet | None = fresh
    while layer:
        # What an error quotes is not ours to complete.
        if type(layer).__name__.endswith("error"):
            break
        for name in ("chksum", "cksum"):
            if name in layer.fields:
                del layer.fields[name]
        layer = layer.payload
    return bytes(fresh) == raw


def udp(
    v6: bool, src: Host, dst: Host, sport: int = 5000, dport: int = 53, **fields: int
) -> Packet:
    """A UDP datagram of one byte."""
    return ip(v6, src, dst, **fields) / UDP(sport=sport, dport=dport) / b"x"


def echo(
    v6: bool, src: Host, dst: Host, id: int = 7, *, reply: bool = False, **fields: int
) -> Packet:
    """An ICMP echo request or reply."""
    if v6:
        layer = ICMPv6EchoReply(id=id) if reply else ICMPv6EchoRequest(id=id)
    else:
        layer = ICMP(type=0 if reply else 8, id=id)
    return ip(v6, src, dst, **fields) / layer


def error(v6: bool, src: Host, dst: Host, about: Packet, kind: str = "unreachable") -> Packet:
    """An ICMP error about a packet: unreachable, time-exceeded, parameter or too-big."""
    quoted = bytes(about)[: (48 if v6 else 28)]
    if v6:
        layer = {
            "unreachable": ICMPv6DestUnreach(code=4),
            "time-exceeded": ICMPv6TimeExceeded(),
            "parameter": ICMPv6ParamProblem(),
            "too-big": ICMPv6PacketTooBig(mtu=1280),
        }[kind]
    else:
        layer = {
            "unreachable": ICMP(type=3, code=3),
            "time-exceeded": ICMP(type=11),
            "parameter": ICMP(type=12),
            "too-big": ICMP(type=3, code=4, nexthopmtu=1280),
        }[kind]
    return ip(v6, src, dst) / layer / quoted


__all__ = ["echo", "error", "ip", "tcp", "udp", "valid"]
