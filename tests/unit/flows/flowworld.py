"""Made-up workloads and events for tests of the flow service, and a plain account of each event.

`Seen` describes an event and makes it as the kernel does; `expected_flow` builds the message that a
flow of it must become, with protobuf, field by field, from the description alone: it shares no code
with the encoder.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from ipaddress import ip_address
from itertools import groupby
from typing import Any

import numpy as np

from cilia.bpf import constants as k
from cilia.bpf.layout import EVENT, to_addr
from protos.hubble.v1 import flow_pb2 as pb
from services.flows.dimensions import EVENT_L7
from services.flows.l7 import Dns, Http, Kafka, L7Record, L7Type
from services.flows.store import L7Event, Store
from services.flows.world import EndpointInfo, Meaning, PolicyRef, RemoteInfo

NODE, CLUSTER = "node1", "default"
NODE_NAME = f"{CLUSTER}/{NODE}"
OFFSET_NS = 1_790_000_000_000_000_000  # wall clock less the events' clock

RULES = {
    11: PolicyRef("CiliumNetworkPolicy", "lab", "allow-empire", "spec.ingress[0]", "p.yaml:3"),
    12: PolicyRef("CiliumClusterwideNetworkPolicy", "", "no-telnet", "spec.egressDeny[0]"),
    13: PolicyRef("CiliumNetworkPolicy", "lab", "isolate", "spec.ingress"),
}
IDENTITIES: dict[int, tuple[str, ...]] = {
    1: ("reserved:host",),
    2: ("reserved:world",),
    9: ("reserved:world", "reserved:world-ipv4"),
    1001: ("k8s:app=xwing", "k8s:io.kubernetes.pod.namespace=lab", "k8s:org=alliance"),
    1002: ("k8s:app=deathstar", "k8s:io.kubernetes.pod.namespace=lab", "k8s:org=empire"),
    1003: ("container:app=db", "k8s:io.kubernetes.pod.namespace=prod", "k8s:tier=back"),
    1004: ("k8s:app=far", "k8s:io.kubernetes.pod.namespace=prod"),
    16777217: ("cidr:192.0.2.0/24", "reserved:world"),
}
ENDPOINTS = {
    1: ("xwing", "lab", 1001, ("10.1.0.1", "fd00::1"), 101, "lxc1"),
    2: ("deathstar-1", "lab", 1002, ("10.1.0.2", "fd00::2"), 102, "lxc2"),
    3: ("db", "prod", 1003, ("10.1.0.3", "fd00::3"), 103, "lxc3"),
}
REMOTE = {"10.2.0.9": ("far-1", "prod")}  # of identity 1004
NAMES = {"203.0.113.5": ("www.example.com", "cdn.example.net.")}
WORLD = {"203.0.113.5": 9, "198.51.100.7": 9, "192.0.2.20": 16777217, "2001:db8::5": 2}


def meaning() -> Meaning:
    return Meaning(
        reset=True,
        node=NODE,
        cluster=CLUSTER,
        endpoints=tuple(
            EndpointInfo(
                id=number,
                name=name,
                namespace=namespace,
                labels=IDENTITIES[identity],
                identity=identity,
                addresses=addresses,
                ifindex=ifindex,
                interface=interface,
                mode="always" if number == 3 else "default",
                ingress_enforced=number in (2, 3),
                egress_enforced=number == 3,
                ingress_isolated_by=(13, 11) if number == 2 else (),
            )
            for number, (name, namespace, identity, addresses, ifindex, interface) in (
                ENDPOINTS.items()
            )
        ),
        identities=IDENTITIES,
        rules=RULES,
        addresses=tuple(
            RemoteInfo(prefix=f"{address}/32", name=name, namespace=namespace)
            for address, (name, namespace) in REMOTE.items()
        ),
        names=NAMES,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """An event, described."""

    time_ns: int = 5_000_000_000
    source: str = "10.1.0.1"
    destination: str = "10.1.0.2"
    src_identity: int = 1001
    dst_identity: int = 1002
    src_ep: int = 1
    dst_ep: int = 2
    type: int = k.EVENT_TRACE
    reason: int = 0
    obs_point: int = k.TRACE_TO_ENDPOINT
    direction: int = k.DIR_INGRESS
    verdict: int = 0
    rule: int = 0
    match: int = 0
    proto: int = 6
    sport: int = 40000
    dport: int = 80
    tcp_flags: int = 2
    flags: int = 0
    length: int = 100
    ifindex: int = 101
    smac: bytes = b"\x02\0\0\0\0\x01"
    dmac: bytes = b"\x02\0\0\0\0\x02"
    l7: L7Record | None = None
    l7_verdict: int = 1

    def event(self) -> Any:
        row = np.zeros(1, EVENT)
        row["time_ns"] = self.time_ns
        row["saddr"], row["daddr"] = (
            np.void(to_addr(self.source) if self.source else bytes(16)),
            np.void(to_addr(self.destination) if self.destination else bytes(16)),
        )
        row["src_identity"], row["dst_identity"] = self.src_identity, self.dst_identity
        egress = self.direction == k.DIR_EGRESS
        row["ep_id"] = self.src_ep if egress else self.dst_ep
        row["peer_ep_id"] = self.dst_ep if egress else self.src_ep
        row["type"] = EVENT_L7 if self.l7 else self.type
        row["reason"] = self.l7_verdict if self.l7 else self.reason
        row["obs_point"] = self.obs_point
        row["direction"] = self.direction
        row["verdict"] = self.verdict
        row["rule_id"] = self.rule
        row["match_type"] = self.match
        row["proto"] = self.proto
        row["sport_be"], row["dport_be"] = self.sport, self.dport
        row["tcp_flags"] = self.tcp_flags
        six = bool(self.source) and ip_address(self.source).version == 6
        row["flags"] = self.flags | (k.EVENT_F_IPV6 if six else 0)
        row["length"] = self.length
        row["ifindex"] = 0 if self.l7 else self.ifindex
        if not self.l7:
            row["smac"], row["dmac"] = np.void(self.smac), np.void(self.dmac)
        return row

    def l7_event(self) -> L7Event:
        assert self.l7 is not None
        return L7Event(self.event(), self.l7)


def _party(message: pb.Endpoint, ep_id: int, identity: int, address: str) -> None:
    if not ep_id:
        ep_id = next((n for n, row in ENDPOINTS.items() if address in row[3]), 0)
        if identity < 256 or identity > 1 << 24:
            ep_id = 0
    message.ID = ep_id
    message.identity = identity
    message.labels.extend(IDENTITIES.get(identity, ()))
    for label in message.labels:
        if label.startswith("k8s:io.kubernetes.pod.namespace="):
            message.namespace = label.partition("=")[2]
    if 256 <= identity < 1 << 24:
        message.cluster_name = CLUSTER
    if ep_id in ENDPOINTS:
        message.pod_name, message.namespace = ENDPOINTS[ep_id][:2]
        message.cluster_name = CLUSTER
    elif address in REMOTE and identity == 1004:
        message.pod_name, message.namespace = REMOTE[address]
    if message.pod_name:
        message.workloads.add(name=message.pod_name, kind="Workload")


def _policy(target: Any, ref: PolicyRef) -> None:
    labels = [
        f"k8s:io.cilium.k8s.policy.derived-from={ref.kind}",
        f"k8s:io.cilium.k8s.policy.name={ref.name}",
    ]
    if ref.namespace:
        labels.append(f"k8s:io.cilium.k8s.policy.namespace={ref.namespace}")
    if ref.path:
        labels.append(f"cilia:rule={ref.path}")
    if ref.origin:
        labels.append(f"cilia:origin={ref.origin}")
    target.add(name=ref.name, namespace=ref.namespace, kind=ref.kind, labels=labels)


def expected_flow(seen: Seen, uuid: str) -> pb.Flow:
    """The flow of an event, but for its Summary."""
    flow: Any = pb.Flow(uuid=uuid, node_name=NODE_NAME)  # enums of it are plain numbers here
    wall = seen.time_ns + OFFSET_NS
    flow.time.seconds, flow.time.nanos = divmod(wall, 10**9)
    egress = seen.direction == k.DIR_EGRESS
    audited = bool(seen.flags & k.EVENT_F_AUDITED)
    replied = bool(seen.flags & k.EVENT_F_REPLY)
    denied = False
    if seen.l7:
        flow.Type = pb.L7
        flow.event_type.type = 129
        flow.verdict = seen.l7_verdict
        flow.is_reply.value = replied
        denied = seen.l7_verdict == pb.DROPPED
    else:
        flow.Type = pb.L3_L4
        flow.event_type.type = seen.type
        if seen.type == k.EVENT_DROP:
            flow.event_type.sub_type = seen.reason
            flow.verdict = pb.DROPPED
            flow.drop_reason = flow.drop_reason_desc = seen.reason
            denied = seen.reason in (133, 181)
        elif seen.type == k.EVENT_TRACE:
            flow.event_type.sub_type = seen.obs_point
            flow.verdict = pb.FORWARDED
            flow.trace_observation_point = seen.obs_point or pb.TO_ENDPOINT
            flow.trace_reason = seen.reason + 1
            flow.is_reply.value = replied or seen.reason == k.CT_REPLY
        else:
            flow.policy_match_type = seen.match
            if audited:
                flow.verdict = pb.AUDIT
            elif seen.verdict < 0:
                flow.verdict = pb.DROPPED
                flow.drop_reason = flow.drop_reason_desc = -seen.verdict
            else:
                flow.verdict = pb.REDIRECTED if seen.verdict else pb.FORWARDED
            if flow.verdict != pb.DROPPED:
                flow.is_reply.value = False
            denied = seen.verdict < 0 or audited
        if seen.smac.strip(b"\0") or seen.dmac.strip(b"\0"):
            flow.ethernet.source, flow.ethernet.destination = (
                ":".join(f"{byte:02x}" for byte in mac) for mac in (seen.smac, seen.dmac)
            )
        if seen.ifindex:
            flow.interface.index = seen.ifindex
            flow.interface.name = next(
                (row[5] for row in ENDPOINTS.values() if row[4] == seen.ifindex), ""
            )
    flow.reply = flow.is_reply.value
    flow.proxy_port = max(0, seen.verdict)
    flow.traffic_direction = seen.direction
    if seen.source:
        flow.IP.source, flow.IP.destination = seen.source, seen.destination
        flow.IP.ipVersion = (ip_address(seen.source).version == 4 and pb.IPv4) or pb.IPv6
    match seen.proto:
        case 6:
            flow.l4.TCP.source_port, flow.l4.TCP.destination_port = seen.sport, seen.dport
            if not seen.l7:
                flow.l4.TCP.flags.SetInParent()
                names = ["FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR"]
                for bit, name in enumerate(names):
                    setattr(flow.l4.TCP.flags, name, bool(seen.tcp_flags >> bit & 1))
        case 17:
            flow.l4.UDP.SetInParent()
            flow.l4.UDP.source_port, flow.l4.UDP.destination_port = seen.sport, seen.dport
        case 132:
            flow.l4.SCTP.SetInParent()
            flow.l4.SCTP.source_port, flow.l4.SCTP.destination_port = seen.sport, seen.dport
        case 1:
            flow.l4.ICMPv4.SetInParent()
            flow.l4.ICMPv4.type, flow.l4.ICMPv4.code = seen.sport, seen.dport
        case 58:
            flow.l4.ICMPv6.SetInParent()
            flow.l4.ICMPv6.type, flow.l4.ICMPv6.code = seen.sport, seen.dport
    _party(flow.source, seen.src_ep, seen.src_identity, seen.source)
    _party(flow.destination, seen.dst_ep, seen.dst_identity, seen.destination)
    flow.source_names.extend(NAMES.get(seen.source, ()))
    flow.destination_names.extend(NAMES.get(seen.destination, ()))
    target = {
        (True, False): flow.egress_allowed_by,
        (False, False): flow.ingress_allowed_by,
        (True, True): flow.egress_denied_by,
        (False, True): flow.ingress_denied_by,
    }[egress, denied]
    if seen.rule:
        _policy(target, RULES.get(seen.rule) or PolicyRef("", "", f"rule {seen.rule}"))
    elif denied:
        subject = flow.source if egress else flow.destination
        if subject.ID == 2 and not egress:
            _policy(target, RULES[13])
            _policy(target, RULES[11])
        if subject.ID == 3:
            _policy(target, PolicyRef("EnforcementMode", "", "always"))
    if seen.l7:
        _l7(flow, seen.l7)
    made: pb.Flow = flow
    return made


def _l7(flow: Any, record: L7Record) -> None:
    flow.l7.type = int(record.type)
    flow.l7.latency_ns = record.latency_ns
    if record.trace_id:
        flow.trace_context.parent.trace_id = record.trace_id
    match record.record:
        case Http() as own:
            http = flow.l7.http
            http.SetInParent()
            http.code, http.method, http.url = own.code, own.method, own.url
            http.protocol = own.protocol
            for key, value in own.headers:
                http.headers.add(key=key, value=value)
        case Dns() as own:
            dns = flow.l7.dns
            dns.SetInParent()
            dns.query, dns.ttl, dns.rcode = own.query, own.ttl, own.rcode
            dns.observation_source = own.observation_source
            dns.ips.extend(own.ips)
            dns.cnames.extend(own.cnames)
            dns.qtypes.extend(own.qtypes)
            dns.rrtypes.extend(own.rrtypes)
        case Kafka() as own:
            kafka = flow.l7.kafka
            kafka.SetInParent()
            kafka.error_code, kafka.api_version = own.error_code, own.api_version
            kafka.api_key, kafka.topic = own.api_key, own.topic
            kafka.correlation_id = own.correlation_id


_ENDS4 = [
    ("10.1.0.1", 1, 1001),
    ("10.1.0.2", 2, 1002),
    ("10.1.0.3", 3, 1003),
    ("10.1.0.3", 0, 1003),  # an endpoint that the event does not name
    ("10.2.0.9", 0, 1004),
    ("203.0.113.5", 0, 9),
    ("198.51.100.7", 0, 9),
    ("192.0.2.20", 0, 16777217),
    ("10.1.0.254", 0, 1),
]
_ENDS6 = [
    ("fd00::1", 1, 1001),
    ("fd00::2", 2, 1002),
    ("fd00::3", 3, 1003),
    ("2001:db8::5", 0, 2),
]
METHODS = ("GET", "POST", "PUT")
PATHS = ("/v1/request-landing", "/v1/exhaust-port", "/", "/v1/x?y=1")
DROPS = (132, 133, 133, 133, 134, 137, 150, 151, 155, 157, 166, 171, 181, 230, 235)


def random_record(r: random.Random) -> L7Record:
    kind = r.choice(("http", "http", "http", "dns", "kafka"))
    reply = r.random() < 0.5
    latency = r.choice((0, 1_500_000, 70_000_000)) if reply else 0
    own: Http | Dns | Kafka
    if kind == "http":
        own = Http(
            code=r.choice((200, 204, 302, 403, 404, 503)) if reply else 0,
            method=r.choice(METHODS),
            url=f"http://deathstar{r.choice(PATHS)}",
            protocol=r.choice(("HTTP/1.1", "HTTP/2")),
            headers=(("X-Has-Force", r.choice(("true", "false"))), ("Host", "deathstar")),
        )
    elif kind == "dns":
        own = Dns(
            query=r.choice(("www.example.com.", "db.prod.svc.")),
            ips=("203.0.113.5",) if reply else (),
            ttl=30 if reply else 0,
            observation_source="proxy",
            rcode=r.choice((0, 3)) if reply else 0,
            qtypes=("A", "AAAA")[: r.randint(1, 2)],
            rrtypes=("A",) if reply else (),
        )
    else:
        own = Kafka(
            api_key=r.choice(("produce", "fetch")),
            api_version=r.randint(0, 12),
            error_code=r.choice((0, -1, 29)) if reply else 0,
            correlation_id=r.randint(-5, 99),
            topic=r.choice(("empire-announce", "deathstar-plans")),
        )
    return L7Record(
        type=L7Type.RESPONSE if reply else L7Type.REQUEST,
        record=own,
        latency_ns=latency,
        trace_id=r.choice(("", "", "0af7651916cd43dd8448eb211c80319c")),
    )


def random_seen(r: random.Random, time_ns: int, *, l7: bool = False) -> Seen:
    ends = r.choice((_ENDS4, _ENDS4, _ENDS6))
    (source, src_ep, src_id), (destination, dst_ep, dst_id) = r.sample(ends, 2)
    proto = 6 if l7 else r.choice((6, 6, 6, 17, 17, 1, 58, 132, 50))
    if proto == 58 and ends is _ENDS4:
        proto = 1
    icmp = proto in (1, 58)
    direction = r.choice((k.DIR_INGRESS, k.DIR_EGRESS, k.DIR_NONE))
    if l7 and direction == k.DIR_NONE:
        direction = k.DIR_INGRESS
    kind = r.choice((k.EVENT_DROP, k.EVENT_TRACE, k.EVENT_TRACE, k.EVENT_VERDICT))
    verdict = r.choice((0, -133, -181, 10001)) if kind == k.EVENT_VERDICT else 0
    flags = 0
    if kind == k.EVENT_VERDICT and r.random() < 0.2:
        flags, verdict = k.EVENT_F_AUDITED, 0
    if kind == k.EVENT_TRACE and r.random() < 0.4:
        flags |= k.EVENT_F_REPLY
    reason = {
        k.EVENT_DROP: r.choice(DROPS),
        k.EVENT_TRACE: r.choice((k.CT_NEW, k.CT_ESTABLISHED, k.CT_REPLY, k.CT_RELATED)),
    }.get(kind, 0)
    seen = Seen(
        time_ns=time_ns,
        source=source,
        destination=destination,
        src_identity=src_id,
        dst_identity=dst_id,
        src_ep=src_ep,
        dst_ep=dst_ep,
        type=kind,
        reason=reason,
        obs_point=r.choice(range(12)) if kind == k.EVENT_TRACE else 0,
        direction=direction,
        verdict=verdict,
        rule=r.choice((0, 11, 12)) if kind != k.EVENT_TRACE else 0,
        match=r.choice(range(7)) if kind == k.EVENT_VERDICT else 0,
        proto=proto,
        sport=r.choice((8, 0, 3, 128)) if icmp else r.choice((40000, 40001, 53, 65535)),
        dport=r.choice((0, 1, 3)) if icmp else r.choice((80, 443, 53, 0)),
        tcp_flags=r.choice((2, 18, 16, 24, 17, 4, 0, 0xC2)) if proto == 6 else 0,
        flags=flags,
        length=r.choice((60, 1500)),
        ifindex=r.choice((101, 102, 7, 0)),
        smac=r.choice((b"\x02\0\0\0\0\x01", bytes(6))),
        dmac=r.choice((b"\x02\0\0\0\0\x02", bytes(6))),
    )
    if l7:
        record = random_record(r)
        reply = record.type is L7Type.RESPONSE
        seen = replace(
            seen,
            l7=record,
            l7_verdict=r.choice((1, 1, 2, 5)),
            type=EVENT_L7,
            reason=0,
            obs_point=0,
            verdict=0,
            match=0,
            tcp_flags=0,
            flags=k.EVENT_F_REPLY if reply else 0,
        )
    return seen


def random_events(r: random.Random, count: int, *, start_ns: int = 1_000_000_000) -> list[Seen]:
    """In the order of time, one in six of L7."""
    return [
        random_seen(r, start_ns + at * 1_000_000 + r.randint(0, 999_999), l7=r.random() < 0.17)
        for at in range(count)
    ]


def store_all(store: Store, events: list[Seen]) -> None:
    """In batches as they come, kinds not mixed."""
    for l7, part in groupby(events, key=lambda seen: seen.l7 is not None):
        if l7:
            store.take_l7([seen.l7_event() for seen in part], wall_offset_ns=OFFSET_NS)
        else:
            rows = [seen.event() for seen in part]
            store.take(np.concatenate(rows, dtype=EVENT), wall_offset_ns=OFFSET_NS)
