"""Flows as text: one line each, as Hubble's command prints them, with the rule that decided.

    Nov 21 15:04:05.123: lab/xwing:40112 (ID:31234) -> lab/deathstar:80 (ID:5123)
        policy-verdict:none INGRESS DENIED (TCP Flags: SYN) by CiliumNetworkPolicy ...

(on one line).
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from cilia.identity import RESERVED, NumericIdentity
from cilia.observation import MATCHES, POINTS
from protos.hubble.v1 import flow_pb2, observer_pb2

Part = str | tuple[str, str]

STYLES: Final = {
    flow_pb2.FORWARDED: "green",
    flow_pb2.DROPPED: "bold red",
    flow_pb2.ERROR: "bold red",
    flow_pb2.AUDIT: "yellow",
    flow_pb2.REDIRECTED: "yellow",
}
HEADER: Final = ("TIMESTAMP", "SOURCE", "DESTINATION", "TYPE", "VERDICT", "SUMMARY", "POLICY")


def stamp(at: Timestamp, style: str) -> str:
    """A time in UTC as the style says: short, rfc3339milli, rfc3339nano, or unix (seconds)."""
    nanos = at.ToNanoseconds()
    seconds, rest = divmod(nanos, 1_000_000_000)
    if style == "unix":
        return f"{seconds}.{rest:09d}"
    moment = datetime.fromtimestamp(seconds, UTC)
    match style:
        case "rfc3339milli":
            return f"{moment:%Y-%m-%dT%H:%M:%S}.{rest // 1_000_000:03d}Z"
        case "rfc3339nano":
            return f"{moment:%Y-%m-%dT%H:%M:%S}.{rest:09d}Z"
        case _:
            return f"{moment:%b %e %H:%M:%S}.{rest // 1_000_000:03d}"


def ports(flow: flow_pb2.Flow) -> tuple[int | None, int | None]:
    """Source and destination port, of protocols that have them."""
    kind = flow.l4.WhichOneof("protocol")
    if kind not in ("TCP", "UDP", "SCTP"):
        return None, None
    l4 = getattr(flow.l4, kind)
    return l4.source_port, l4.destination_port


def party(endpoint: flow_pb2.Endpoint, address: str, port: int | None, names: list[str]) -> str:
    """`namespace/name:port`, else a DNS name, else the address."""
    if endpoint.pod_name:
        name = (
            f"{endpoint.namespace}/{endpoint.pod_name}" if endpoint.namespace else endpoint.pod_name
        )
    elif names:
        name = ",".join(names)
    else:
        name = f"[{address}]" if ":" in address and port is not None else address or "?"
    return f"{name}:{port}" if port is not None else name


def identity(endpoint: flow_pb2.Endpoint) -> str:
    """`(ID:31234)`, or `(world)` for a reserved one."""
    number = NumericIdentity(endpoint.identity)
    if not number:
        return ""
    return f"({RESERVED[number]})" if number in RESERVED else f"(ID:{number})"


def reason(number: int) -> str:
    """`Policy denied` of POLICY_DENIED; a number that has no name as it is."""
    try:
        name = flow_pb2.DropReason.Name(number)  # type: ignore[arg-type]  # unknown ones raise
    except ValueError:
        return f"reason {number}"
    return name.replace("_", " ").capitalize()


def kind(flow: flow_pb2.Flow) -> str:
    """The TYPE column."""
    event, sub = flow.event_type.type, flow.event_type.sub_type
    if flow.HasField("l7") and event == 129:
        record = flow.l7.WhichOneof("record") or "l7"
        what = flow_pb2.L7FlowType.Name(flow.l7.type).lower()
        return f"{record}-{what}"
    match event:
        case 1:
            return reason(flow.drop_reason_desc or sub)
        case 4:
            return POINTS.get(sub, f"trace {sub}")
        case 5:
            direction = flow_pb2.TrafficDirection.Name(flow.traffic_direction)
            match = flow.policy_match_type
            text = MATCHES.get(match, str(match))
            action = {
                flow_pb2.DROPPED: "DENIED",
                flow_pb2.AUDIT: "AUDITED",
                flow_pb2.REDIRECTED: "REDIRECTED",
            }.get(flow.verdict, "ALLOWED")
            return f"policy-verdict:{text} {direction} {action}"
        case _:
            return f"event {event}"


def policies(flow: flow_pb2.Flow) -> str:
    """Which rule decided: `denied by CiliumNetworkPolicy lab/rule1 spec.ingress[0] (f.yaml:12)`."""
    out = []
    for field, words in (
        ("egress_denied_by", "egress denied by"),
        ("ingress_denied_by", "ingress denied by"),
        ("egress_allowed_by", "egress allowed by"),
        ("ingress_allowed_by", "ingress allowed by"),
    ):
        found = [policy(item) for item in getattr(flow, field)]
        if found:
            out.append(f"{words} {', '.join(found)}")
    out += flow.policy_log
    return "; ".join(out)


def policy(item: flow_pb2.Policy) -> str:
    """`CiliumNetworkPolicy lab/rule1 spec.ingress[0] (file.yaml:12)`."""
    name = f"{item.namespace}/{item.name}" if item.namespace else item.name
    text = f"{item.kind} {name}".strip()
    more = dict(label.split("=", 1) for label in item.labels if "=" in label)
    if rule := more.get("cilia:rule"):
        text += f" {rule}"
    if origin := more.get("cilia:origin"):
        text += f" ({origin})"
    return text


def columns(response: observer_pb2.GetFlowsResponse, time_format: str) -> tuple[str, ...]:
    """The cells of HEADER."""
    flow = response.flow
    sport, dport = ports(flow)
    return (
        stamp(response.time, time_format),
        party(flow.source, flow.IP.source, sport, list(flow.source_names)),
        party(flow.destination, flow.IP.destination, dport, list(flow.destination_names)),
        kind(flow),
        flow_pb2.Verdict.Name(flow.verdict),
        flow.Summary,
        policies(flow),
    )


def compact(
    response: observer_pb2.GetFlowsResponse, time_format: str, *, node: bool = False
) -> list[Part]:
    """One line, as styled parts."""
    flow = response.flow
    at, source, destination, what, verdict, summary, decided = columns(response, time_format)
    left = f"{source} {identity(flow.source)}".rstrip()
    right = f"{destination} {identity(flow.destination)}".rstrip()
    arrow = "->"
    if not flow.HasField("is_reply"):
        arrow = "<>"
    elif flow.is_reply.value:
        left, right, arrow = right, left, "<-"
    where = f" [{response.node_name}]" if node else ""
    parts: list[Part] = [
        f"{at}{where}: {left} {arrow} {right} {what} ",
        (verdict, STYLES.get(flow.verdict, "")),
        f" ({summary})",
    ]
    if decided:
        parts.append((f" {decided}", "dim"))
    return parts


def dictionary(response: observer_pb2.GetFlowsResponse, time_format: str) -> str:
    """One `NAME: value` a line."""
    cells = columns(response, time_format)
    pairs = [("TIMESTAMP", cells[0])]
    if response.node_name:
        pairs.append(("NODE", response.node_name))
    pairs += list(zip(HEADER[1:], cells[1:], strict=True))
    return "\n".join(f"{name:>12}: {value}" for name, value in pairs)


def lost(event: flow_pb2.LostEvent) -> str:
    """`EVENTS LOST: HUBBLE_RING_BUFFER CPU(2) 17`."""
    cpu = f" CPU({event.cpu.value})" if event.HasField("cpu") else ""
    source = flow_pb2.LostEventSource.Name(event.source)
    return f"EVENTS LOST: {source}{cpu} {event.num_events_lost}"
