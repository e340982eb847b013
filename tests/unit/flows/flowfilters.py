"""The filters' oracle: what a FlowFilter says of a flow, one message at a time, in plain Python.

Written from the rules of the filters alone, over protobuf messages, with the standard library's
`re`: it shares nothing with the code under test.
"""

from __future__ import annotations

import random
import re
from ipaddress import ip_address, ip_network
from typing import Any
from urllib.parse import urlsplit

from protos.hubble.v1 import flow_pb2 as pb
from tests.unit.flows.flowworld import METHODS, NODE_NAME


def _ip(texts: Any, own: str) -> bool:
    if not own:
        return False
    return any(
        ip_address(own) in ip_network(text, strict=False) if "/" in text else own == text
        for text in texts
    )


def _named(texts: Any, namespace: str, name: str) -> bool:
    for text in texts:
        wanted, prefix = text.split("/", 1) if "/" in text else ("default", text)
        if (name or namespace) and wanted in ("", namespace) and name.startswith(prefix):
            return True
    return False


def _fqdn(texts: Any, names: Any) -> bool:
    for text in texts:
        text = text.strip().removesuffix(".").lower()
        pattern = "[-.0-9a-z]*".join(re.escape(part) for part in text.split("*"))
        if any(re.fullmatch(pattern, name.lower().removesuffix(".")) for name in names):
            return True
    return False


def _has(labels: Any, key: str, values: Any = None) -> bool:
    source, _, key = key.rpartition(":")
    source = "" if source == "any" else source
    for label in labels:
        own_source, _, rest = label.partition(":")
        own_key, _, value = rest.partition("=")
        if own_key == key and source in ("", own_source) and (values is None or value in values):
            return True
    return False


def _selected(texts: Any, labels: Any) -> bool:
    def one(term: str) -> bool:
        term = term.strip()
        if found := re.fullmatch(r"(\S+)\s+(in|notin)\s+\((.*)\)", term):
            inside = _has(labels, found[1], [v.strip() for v in found[3].split(",")])
            return inside if found[2] == "in" else not inside
        if term.startswith("!"):
            return not _has(labels, term[1:])
        if "!=" in term:
            key, value = term.split("!=")
            return not _has(labels, key, [value])
        if "=" in term:
            key, value = re.split("==?", term)
            return _has(labels, key, [value])
        return _has(labels, term)

    return any(all(one(t) for t in re.findall(r"(?:[^,(]|\([^)]*\))+", text)) for text in texts)


def _protocol(texts: Any, flow: pb.Flow) -> bool:
    l4 = flow.l4.WhichOneof("protocol") or ""
    record = flow.l7.WhichOneof("record") or ""
    for text in texts:
        text = text.lower()
        if text == "icmp" and l4.startswith("ICMP"):
            return True
        if text in (l4.lower(), record) and text:
            return True
    return False


def _port(texts: Any, flow: pb.Flow, name: str) -> bool:
    for kind in ("TCP", "UDP", "SCTP"):
        if flow.l4.HasField(kind):
            return str(getattr(getattr(flow.l4, kind), name)) in [str(int(t)) for t in texts]
    return False


def matches(wanted: pb.FlowFilter, flow: pb.Flow) -> bool:
    """Whether all that is set holds."""
    w, f = wanted, flow
    http = f.l7.http if f.l7.HasField("http") else None
    checks: list[bool] = []
    for side, own, names, service in (
        ("source", f.source, f.source_names, f.source_service),
        ("destination", f.destination, f.destination_names, f.destination_service),
    ):

        def asked(name: str, side: str = side) -> Any:
            return getattr(w, f"{side}_{name}")

        if asked("ip"):
            checks.append(_ip(asked("ip"), getattr(f.IP, side)))
        if asked("pod"):
            checks.append(_named(asked("pod"), own.namespace, own.pod_name))
        if asked("service"):
            checks.append(_named(asked("service"), service.namespace, service.name))
        if asked("fqdn"):
            checks.append(_fqdn(asked("fqdn"), names))
        if asked("label"):
            checks.append(_selected(asked("label"), own.labels))
        if asked("workload"):
            checks.append(
                any(
                    x.name in ("", y.name) and x.kind in ("", y.kind)
                    for x in asked("workload")
                    for y in own.workloads
                )
            )
        if asked("cluster_name"):
            checks.append(own.cluster_name in asked("cluster_name"))
        if asked("identity"):
            checks.append(own.identity in asked("identity"))
        if asked("port"):
            checks.append(_port(asked("port"), f, f"{side}_port"))
    if w.source_ip_xlated:
        checks.append(_ip(w.source_ip_xlated, f.IP.source_xlated))
    if w.verdict:
        checks.append(f.verdict in w.verdict)
    if w.drop_reason_desc:
        checks.append(f.verdict == pb.DROPPED and f.drop_reason_desc in w.drop_reason_desc)
    if w.traffic_direction:
        checks.append(f.traffic_direction in w.traffic_direction)
    if w.ip_version:
        checks.append(f.IP.ipVersion in w.ip_version)
    if w.encrypted:
        checks.append(f.IP.encrypted in w.encrypted)
    if w.reply:
        known = f.HasField("is_reply")
        checks.append(
            f.is_reply.value in w.reply if known else f.verdict == pb.DROPPED and False in w.reply
        )
    if w.event_type:
        checks.append(
            any(
                one.type in (0, f.event_type.type)
                and (not one.match_sub_type or one.sub_type == f.event_type.sub_type)
                for one in w.event_type
            )
        )
    if w.tcp_flags:
        flags = f.l4.TCP.flags
        present = f.l4.HasField("TCP") and f.l4.TCP.HasField("flags")
        checks.append(
            present
            and any(
                all(getattr(flags, d.name) for d, value in one.ListFields() if value)
                for one in w.tcp_flags
            )
        )
    if w.protocol:
        checks.append(_protocol(w.protocol, f))
    if w.interface:
        checks.append(
            f.HasField("interface")
            and any(
                one.index in (0, f.interface.index) and one.name in ("", f.interface.name)
                for one in w.interface
            )
        )
    if w.http_status_code:
        code = str(http.code) if http is not None and http.code else ""
        checks.append(
            bool(code)
            and any(
                code.startswith(text[:-1]) if text.endswith("+") else code == text
                for text in w.http_status_code
            )
        )
    if w.http_method:
        checks.append(
            http is not None and http.method.lower() in [m.lower() for m in w.http_method]
        )
    if w.http_path:
        checks.append(
            http is not None and any(re.search(e, urlsplit(http.url).path) for e in w.http_path)
        )
    if w.http_url:
        checks.append(http is not None and any(re.search(e, http.url) for e in w.http_url))
    if w.http_header:
        checks.append(
            http is not None
            and any(
                (a.key, a.value) == (b.key, b.value) for a in w.http_header for b in http.headers
            )
        )
    if w.dns_query:
        checks.append(
            f.l7.HasField("dns") and any(re.search(e, f.l7.dns.query) for e in w.dns_query)
        )
    if w.trace_id:
        checks.append(f.trace_context.parent.trace_id in w.trace_id)
    if w.uuid:
        checks.append(f.uuid in w.uuid)
    if w.ip_trace_id:
        checks.append(f.ip_trace_id.trace_id in w.ip_trace_id)
    if w.node_labels:
        checks.append(_selected(w.node_labels, f.node_labels))
    if w.node_name:
        checks.append(any(_node(text, f.node_name) for text in w.node_name))
    return all(checks)


def _node(text: str, own: str) -> bool:
    wanted_cluster, _, wanted = text.rpartition("/")
    cluster, _, name = own.rpartition("/")

    def fits(pattern: str, value: str) -> bool:
        return not pattern or _fqdn([pattern], [value])

    return fits(wanted_cluster, cluster) and fits(wanted, name)


def selected(
    flows: list[pb.Flow], whitelist: list[pb.FlowFilter], blacklist: list[pb.FlowFilter]
) -> list[str]:
    """The uuids of what is shown, in order."""
    return [
        flow.uuid
        for flow in flows
        if (not whitelist or any(matches(one, flow) for one in whitelist))
        and not any(matches(one, flow) for one in blacklist)
    ]


_LABELS = (
    "app=xwing", "k8s:app=deathstar", "app", "!app", "org!=empire", "org in (alliance, empire)",
    "org notin (empire)", "reserved:world", "reserved:host", "!reserved:world", "container:app",
    "app=xwing,org=alliance", "app==db", "app in (xwing,db),tier", "cidr:192.0.2.0/24", "any:tier",
)  # fmt: skip


def choices(uuids: list[str]) -> dict[str, list[Any]]:
    """Values to make filters of, by field."""
    both: dict[str, list[Any]] = {
        "ip": ["10.1.0.1", "10.1.0.0/24", "203.0.113.5", "fd00::/16", "fd00::2", "0.0.0.0/0",
               "::/0", "192.0.2.0/25", "10.9.9.9", "2001:db8::5"],
        "pod": ["lab/", "lab/x", "xwing", "/death", "/", "prod/db", "prod/far", "default/x"],
        "fqdn": ["www.example.com", "*.example.net", "*", "WWW.example.com.", "*.org"],
        "label": list(_LABELS),
        "service": ["lab/x", "/"],
        "workload": [pb.Workload(name="xwing"), pb.Workload(kind="Workload"),
                     pb.Workload(name="db", kind="Pod"), pb.Workload()],
        "cluster_name": ["default", "other"],
        "identity": [1, 2, 9, 1001, 1002, 1003, 1004, 16777217, 0],
        "port": ["80", "443", "53", "40000", "65535", "0", "00080"],
    }  # fmt: skip
    return {
        **{f"source_{name}": values for name, values in both.items()},
        **{f"destination_{name}": values for name, values in both.items()},
        "source_ip_xlated": ["10.0.0.1", "10.0.0.0/8"],
        "verdict": [0, 1, 2, 4, 5, 7],
        "drop_reason_desc": [133, 181, 132, 235, 0],
        "traffic_direction": [0, 1, 2],
        "ip_version": [0, 1, 2],
        "encrypted": [True, False],
        "reply": [True, False],
        "event_type": [
            pb.EventTypeFilter(type=1), pb.EventTypeFilter(type=4),
            pb.EventTypeFilter(type=4, match_sub_type=True),
            pb.EventTypeFilter(type=4, match_sub_type=True, sub_type=5),
            pb.EventTypeFilter(match_sub_type=True, sub_type=133), pb.EventTypeFilter(type=5),
            pb.EventTypeFilter(type=129), pb.EventTypeFilter(),
        ],
        "tcp_flags": [pb.TCPFlags(SYN=True), pb.TCPFlags(SYN=True, ACK=True), pb.TCPFlags(),
                      pb.TCPFlags(RST=True), pb.TCPFlags(CWR=True, ECE=True)],
        "protocol": ["tcp", "UDP", "icmp", "icmpv4", "icmpv6", "sctp", "http", "dns", "kafka",
                     "vrrp"],
        "interface": [pb.NetworkInterface(index=101), pb.NetworkInterface(name="lxc2"),
                      pb.NetworkInterface(index=102, name="lxc2"), pb.NetworkInterface(),
                      pb.NetworkInterface(index=101, name="lxc2")],
        "http_status_code": ["200", "4+", "40+", "503", "2+"],
        "http_method": [*METHODS, "get", "DELETE"],
        "http_path": ["landing", "^/v1/", "^/$", "y=1"],
        "http_url": ["deathstar/v1", "y=1$", "^https"],
        "http_header": [pb.HTTPHeader(key="X-Has-Force", value="true"),
                        pb.HTTPHeader(key="x-has-force", value="true")],
        "dns_query": ["example", "^db\\.", "nothing"],
        "trace_id": ["0af7651916cd43dd8448eb211c80319c", "none"],
        "ip_trace_id": [0, 7],
        "uuid": [*uuids, "no-uuid"],
        "node_name": [NODE_NAME, "node*", "default/", "other/*", "*/node1", "nod"],
        "node_labels": ["!anything", "zone=a"],
    }  # fmt: skip


_HTTP = ("http_status_code", "http_method", "http_path", "http_url", "http_header")


def random_filter(r: random.Random, values: dict[str, list[Any]], *, fields: int) -> pb.FlowFilter:
    made = pb.FlowFilter()
    names = r.sample(sorted(values), fields)
    if "event_type" in names:
        names = [name for name in names if name not in _HTTP]
    for name in names:
        target = getattr(made, name)
        for value in r.sample(values[name], min(len(values[name]), r.choice((1, 1, 2, 3)))):
            target.append(value)
    return made
