"""The last column of clients' output: one line about a flow, worded as Hubble words it."""

from __future__ import annotations

from typing import Final

from services.flows.l7 import Dns, Http, Kafka, L7Record, L7Type

_TCP: Final = ((1, "SYN"), (4, "ACK"), (0, "FIN"), (2, "RST"), (3, "PSH"), (5, "URG"))
_TCP_MORE: Final = ((6, "ECE"), (7, "CWR"))
# Types by the registries of the IANA, in the spelling of Hubble's decoder; codes where they matter.
_ICMP: Final = {
    0: "EchoReply",
    3: "DestinationUnreachable",
    4: "SourceQuench",
    5: "Redirect",
    8: "EchoRequest",
    9: "RouterAdvertisement",
    10: "RouterSolicitation",
    11: "TimeExceeded",
    12: "ParameterProblem",
    13: "TimestampRequest",
    14: "TimestampReply",
}
_UNREACHABLE: Final = {
    0: "Net",
    1: "Host",
    2: "Protocol",
    3: "Port",
    4: "FragmentationNeeded",
    13: "CommAdminProhibited",
}
_ICMPV6: Final = {
    1: "DestinationUnreachable",
    2: "PacketTooBig",
    3: "TimeExceeded",
    4: "ParameterProblem",
    128: "EchoRequest",
    129: "EchoReply",
    133: "RouterSolicitation",
    134: "RouterAdvertisement",
    135: "NeighborSolicitation",
    136: "NeighborAdvertisement",
    137: "Redirect",
}
_UNREACHABLE6: Final = {0: "NoRouteToDst", 1: "AdminProhibited", 3: "Address", 4: "Port"}
_RCODES: Final = {0: "", 1: "FormErr", 2: "ServFail", 3: "NXDomain", 4: "NotImp", 5: "Refused"}


def tcp_summary(flags: int) -> str:
    names = [name for bit, name in (*_TCP, *_TCP_MORE) if flags >> bit & 1]
    return "TCP Flags: " + ", ".join(names)


def icmp_summary(v6: bool, kind: int, code: int) -> str:
    name = (_ICMPV6 if v6 else _ICMP).get(kind, str(kind))
    if name == "DestinationUnreachable":
        detail = (_UNREACHABLE6 if v6 else _UNREACHABLE).get(code, str(code))
        name = f"{name}({detail})"
    return f"{'ICMPv6' if v6 else 'ICMPv4'} {name}"


def l7_summary(record: L7Record) -> str:
    match record.record:
        case Http() as http:
            line = f"{http.protocol or 'HTTP'} {http.method} {http.url}"
            if record.type is L7Type.RESPONSE:
                milliseconds = record.latency_ns // 1_000_000
                asked = f"{http.method} {http.url}"
                return f"{http.protocol or 'HTTP'} {http.code} {milliseconds}ms ({asked})"
            return line
        case Dns() as dns:
            kinds = ",".join(dns.qtypes)
            if record.type is not L7Type.RESPONSE:
                return f"DNS Query {dns.query} {kinds}"
            if dns.rcode:
                what = f"RCode: {_RCODES.get(dns.rcode) or dns.rcode}"
            elif dns.ips:
                what = ", ".join(f'"{address}"' for address in dns.ips)
            else:
                what = "TTL: " + str(dns.ttl)
            return f"DNS Answer {what} ({dns.observation_source} {dns.query} {kinds})"
        case Kafka() as kafka:
            return f"Kafka {record.type.name.lower()} {kafka.api_key} topic {kafka.topic}"
