"""Between messages and domain values, at the edge: total one way, strict the other.

A filter field that this build does not know is refused, never ignored: a filter that is ignored
shows what was to be hidden.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from cel_expr_python import cel
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.field_mask_pb2 import FieldMask as FieldMaskProto
from google.protobuf.message import DecodeError, Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.protobuf.unknown_fields import UnknownFieldSet

from cilia.bpf import constants as k
from cilia.bpf.layout import EVENT
from cilia.errors import InvalidError
from cilia.rpc.convert import label_from_proto
from protos.agent.v1 import agent_pb2
from protos.hubble.v1 import flow_pb2, observer_pb2, relay_pb2
from protos.xds.v1 import xds_pb2
from services.flows.dimensions import DROPPED, ERROR, EVENT_L7, FORWARDED, TCP
from services.flows.fieldmask import FieldMask
from services.flows.filterspec import (
    EventTypeSpec,
    FilterInvalid,
    FilterSpec,
    FlowQuery,
    InterfaceSpec,
)
from services.flows.ingest import AgentBatch
from services.flows.interning import AnyArray
from services.flows.l7 import Dns, Http, Kafka, L7Record, L7Type
from services.flows.ledger import Cause, Loss
from services.flows.notes import Note
from services.flows.store import L7Event
from services.flows.world import EndpointInfo, Meaning, PolicyRef, RemoteInfo

MAX_FILTERS: Final = 256  # in one list
MAX_PATHS: Final = 256
MAX_CEL: Final = 4096  # characters
_SECOND: Final = 1_000_000_000
_FLAGS: Final = ("FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR")


class RequestInvalid(InvalidError):
    """A request that cannot be served as it stands."""


class EventsInvalid(InvalidError):
    """What came from the agent cannot be what it says."""


# ---- requests


def timestamp_ns(message: Timestamp, name: str) -> int:
    """Raises RequestInvalid for what is no time."""
    if not 0 <= message.nanos < _SECOND or not -62135596800 <= message.seconds < 253402300800:
        raise RequestInvalid(f"{name} is no time between the years 1 and 9999")
    return message.seconds * _SECOND + message.nanos


def to_timestamp(time_ns: int) -> Timestamp:
    seconds, nanos = divmod(time_ns, _SECOND)
    return Timestamp(seconds=seconds, nanos=nanos)


def flows_request(message: observer_pb2.GetFlowsRequest) -> tuple[FlowQuery, FieldMask]:
    """Raises RequestInvalid or FilterInvalid."""
    refuse_unknown(message, "GetFlowsRequest")
    if message.HasField("extensions"):
        raise RequestInvalid(
            f"extensions {message.extensions.type_url[:64]!r} are not known here",
            cure="Send the request without them",
        )
    for name in ("whitelist", "blacklist"):
        if len(getattr(message, name)) > MAX_FILTERS:
            raise FilterInvalid(f"{name}: more than {MAX_FILTERS} filters")
    mask = message.field_mask
    if not message.HasField("field_mask") and message.experimental.HasField("field_mask"):
        mask = message.experimental.field_mask
    query = FlowQuery(
        whitelist=tuple(filter_from_proto(one) for one in message.whitelist),
        blacklist=tuple(filter_from_proto(one) for one in message.blacklist),
        number=message.number,
        first=message.first,
        follow=message.follow,
        since_ns=timestamp_ns(message.since, "since") if message.HasField("since") else None,
        until_ns=timestamp_ns(message.until, "until") if message.HasField("until") else None,
    )
    return query, mask_from_proto(mask)


def refuse_unknown(message: Message, where: str) -> None:
    """Raises RequestInvalid when a message, or one in it, has a field that is not known here."""
    unknown = UnknownFieldSet(message)
    if len(unknown):
        numbers = sorted({unknown[at].field_number for at in range(len(unknown))})
        raise RequestInvalid(
            f"{where} has fields that are not known here: {', '.join(map(str, numbers[:8]))}",
            cure="Leave them out, or ask a newer server",
        )
    for descriptor, value in message.ListFields():
        if descriptor.type != FieldDescriptor.TYPE_MESSAGE or descriptor.message_type is None:
            continue
        if descriptor.message_type.full_name.startswith("google.protobuf."):
            continue
        for one in value if descriptor.is_repeated else (value,):
            refuse_unknown(one, f"{where}.{descriptor.name}")


def mask_from_proto(message: FieldMaskProto) -> FieldMask:
    """Raises RequestInvalid for a path that flow.Flow does not have."""
    if len(message.paths) > MAX_PATHS:
        raise RequestInvalid(f"field_mask: more than {MAX_PATHS} paths")
    for path in message.paths:
        descriptor: Descriptor | None = flow_pb2.Flow.DESCRIPTOR
        parts = path.split(".")
        for at, part in enumerate(parts):
            field = descriptor.fields_by_name.get(part) if descriptor is not None else None
            if field is None or (field.is_repeated and at + 1 < len(parts)):
                raise RequestInvalid(
                    f"field_mask: a flow has no field {path[:100]!r}",
                    cure="Paths are names of the protobuf message, such as source.pod_name",
                )
            descriptor = field.message_type
    return FieldMask(tuple(dict.fromkeys(message.paths)))


# ---- filters


def filter_from_proto(message: flow_pb2.FlowFilter) -> FilterSpec:
    """Raises FilterInvalid or RequestInvalid."""
    refuse_unknown(message, "FlowFilter")
    values: dict[str, Any] = {}
    for descriptor, value in message.ListFields():
        name = descriptor.name
        if name in _TRANSLATED:
            values.update(_TRANSLATED[name](value))
        elif name in FilterSpec.__dataclass_fields__:
            values[name] = tuple(value)
        else:
            raise FilterInvalid(f"filtering by {name} is not supported here")
    return FilterSpec(**values)


def _flag_bits(values: Iterable[flow_pb2.TCPFlags]) -> dict[str, Any]:
    bits = []
    for one in values:
        if one.NS:
            raise FilterInvalid(
                "tcp_flags: NS is not recorded (RFC 8311 gave the bit up)", cure="Leave it out"
            )
        bits.append(sum(1 << bit for bit, name in enumerate(_FLAGS) if getattr(one, name)))
    return {"tcp_flags": tuple(bits)}


def _pairs(name: str, first: str, second: str) -> Callable[[Any], dict[str, Any]]:
    return lambda values: {name: tuple((getattr(v, first), getattr(v, second)) for v in values)}


_TRANSLATED: Final[dict[str, Callable[[Any], dict[str, Any]]]] = {
    "event_type": lambda values: {
        "event_type": tuple(
            EventTypeSpec(type=one.type, sub_type=one.sub_type if one.match_sub_type else None)
            for one in values
        )
    },
    "tcp_flags": _flag_bits,
    "source_workload": _pairs("source_workload", "name", "kind"),
    "destination_workload": _pairs("destination_workload", "name", "kind"),
    "http_header": _pairs("http_header", "key", "value"),
    "interface": lambda values: {
        "interface": tuple(InterfaceSpec(index=one.index, name=one.name) for one in values)
    },
    "experimental": lambda value: {"cel_expression": tuple(value.cel_expression)},
}


def compile_cel(expressions: tuple[str, ...]) -> Callable[[Sequence[bytes]], list[bool]]:
    """Whether any of the expressions over `_flow` holds; one that fails on a flow does not.

    Raises FilterInvalid for what does not compile, or is not of type bool.
    """
    environment = cel.NewEnv(
        descriptor_pool.Default(), variables={"_flow": cel.Type("flow.Flow")}, container="flow"
    )
    compiled = []
    for text in expressions:
        if len(text) > MAX_CEL:
            raise FilterInvalid(
                f"cel_expression of {len(text)} characters is too long", cure=f"At most {MAX_CEL}"
            )
        try:
            expression = environment.compile(text)
        except RuntimeError as error:  # what the library makes of its C++ side's errors
            first = str(error).splitlines()[0] if str(error) else "it does not compile"
            raise FilterInvalid(
                f"cel_expression {text[:100]!r}: {first[:300]}",
                cure="Write a condition on _flow, such as _flow.verdict == Verdict.DROPPED",
            ) from error
        if expression.return_type() != cel.Type.BOOL:
            raise FilterInvalid(
                f"cel_expression {text[:100]!r} is of type {expression.return_type().name()}",
                cure="It must be true or false",
            )
        compiled.append(expression)

    def evaluate(flows: Sequence[bytes]) -> list[bool]:
        found = []
        for raw in flows:
            data = {"_flow": flow_pb2.Flow.FromString(raw)}
            found.append(any(_holds(expression, data) for expression in compiled))
        return found

    return evaluate


def _holds(expression: Any, data: Mapping[str, Message]) -> bool:
    try:
        return expression.eval(data=data).value() is True
    except RuntimeError:  # a division by zero of the client's, a missing key
        return False


# ---- answers


_LOSS_SOURCE: Final = {
    Cause.KERNEL: flow_pb2.PERF_EVENT_RING_BUFFER,
    Cause.TRANSPORT: flow_pb2.OBSERVER_EVENTS_QUEUE,
    Cause.READER: flow_pb2.HUBBLE_RING_BUFFER,
    Cause.HISTORY: flow_pb2.HUBBLE_RING_BUFFER,
}


def loss_to_response(loss: Loss, node_name: str) -> observer_pb2.GetFlowsResponse:
    """A gap as clients know it: LostEvent; NODE_UNAVAILABLE when nobody was watching at all."""
    response = observer_pb2.GetFlowsResponse(node_name=node_name, time=to_timestamp(loss.to_ns))
    if loss.cause in (Cause.AGENT, Cause.STOPPED):
        response.node_status.state_change = relay_pb2.NODE_UNAVAILABLE
        response.node_status.node_names.append(node_name)
        seconds = (loss.to_ns - loss.from_ns) / _SECOND
        response.node_status.message = (
            f"{loss.detail or loss.cause}: nothing was recorded for {seconds:.3f} s"
        )
        return response
    lost = response.lost_events
    lost.source = _LOSS_SOURCE.get(loss.cause, flow_pb2.UNKNOWN_LOST_EVENT_SOURCE)
    lost.num_events_lost = loss.count or 0
    lost.first.CopyFrom(to_timestamp(loss.from_ns))
    lost.last.CopyFrom(to_timestamp(loss.to_ns))
    return response


# ---- the agent's stream


def events_from_proto(raw: bytes) -> AnyArray:
    """Raises EventsInvalid."""
    if len(raw) % EVENT.itemsize:
        raise EventsInvalid(
            f"{len(raw)} bytes of events are no multiple of {EVENT.itemsize}",
            cure="The agent and this service must be of one version",
        )
    return np.frombuffer(raw, EVENT)


def meaning_from_proto(message: agent_pb2.EventMeaning) -> Meaning:
    return Meaning(
        reset=message.reset,
        node=message.node,
        cluster=message.cluster,
        endpoints=tuple(_endpoint(one) for one in message.endpoints),
        gone_endpoints=tuple(message.gone_endpoints),
        identities={one.id: _labels(one.labels) for one in message.identities},
        gone_identities=tuple(message.gone_identities),
        rules={one.rule_id: policy_ref(one) for one in message.rules},
        addresses=tuple(
            RemoteInfo(prefix=one.prefix, name=one.name, namespace=one.namespace)
            for one in message.addresses
        ),
        gone_addresses=tuple(message.gone_addresses),
    )


def _labels(messages: Iterable[Any]) -> tuple[str, ...]:
    return tuple(str(label_from_proto(one)) for one in messages)


def _endpoint(message: agent_pb2.EventEndpoint) -> EndpointInfo:
    return EndpointInfo(
        id=message.id,
        name=message.name,
        namespace=message.namespace,
        labels=_labels(message.labels),
        identity=message.identity,
        addresses=tuple(message.addresses),
        ifindex=message.ifindex,
        interface=message.host_interface,
        mode=message.mode,
        ingress_enforced=message.ingress_enforced,
        egress_enforced=message.egress_enforced,
        ingress_isolated_by=tuple(message.ingress_isolated_by),
        egress_isolated_by=tuple(message.egress_isolated_by),
    )


def policy_ref(message: agent_pb2.RuleRef) -> PolicyRef:
    """`Kind namespace/name` or `Kind name`, taken apart."""
    kind, _, rest = message.policy.partition(" ")
    namespace, slash, name = rest.rpartition("/")
    origin = message.origin
    where = f"{origin.source}:{origin.line}" if origin.line else origin.source
    return PolicyRef(kind, namespace if slash else "", name, message.path, where)


def agent_batch(message: agent_pb2.EventBatch) -> AgentBatch:
    """Raises EventsInvalid."""
    return AgentBatch(
        events=events_from_proto(message.events),
        wall_offset_ns=message.wall_offset_ns,
        lost_ring=message.lost_ring,
        lost_transport=message.lost_transport,
        meaning=meaning_from_proto(message.meaning) if message.HasField("meaning") else None,
        lost_l7=message.lost_l7,
        l7=tuple(l7_event(one, message.wall_offset_ns) for one in message.l7),
        notes=tuple(
            Note(one.time_ns, agent_event(one).SerializeToString()) for one in message.notifications
        ),
    )


# ---- requests at proxies

_MAX_TEXT: Final = 8192  # characters of a URL or a header's value that are kept
_MAX_HEADERS: Final = 128
_L7_VERDICT: Final = {
    xds_pb2.L7Record.FORWARDED: FORWARDED,
    xds_pb2.L7Record.DENIED: DROPPED,
    xds_pb2.L7Record.ERROR: ERROR,
}


def l7_event(message: xds_pb2.L7Record, wall_offset_ns: int) -> L7Event:
    """What a proxy told of, as an event of type 129 and a record.

    An answer goes from the server to the client, when the server had given it.
    """
    answer = message.type == xds_pb2.L7Record.RESPONSE
    source, destination = message.source, message.destination
    if answer:
        source, destination = destination, source
    # Rules of both ends on one connection: those of the receiving one have the last word.
    egress = message.direction == xds_pb2.EGRESS
    time_ns = message.time_ns + (message.latency_ns if answer else 0)
    event = np.zeros(1, EVENT)
    event["time_ns"] = max(0, time_ns - wall_offset_ns)
    event["saddr"] = np.void(_address(source.address))
    event["daddr"] = np.void(_address(destination.address))
    event["src_identity"] = source.identity
    event["dst_identity"] = destination.identity
    ends = (source.endpoint_id & 0xFFFF, destination.endpoint_id & 0xFFFF)
    event["ep_id"], event["peer_ep_id"] = ends if egress else reversed(ends)
    event["sport_be"] = source.port & 0xFFFF
    event["dport_be"] = destination.port & 0xFFFF
    event["rule_id"] = message.rule_id
    event["verdict"] = message.proxy_port & 0xFFFF
    event["type"] = EVENT_L7
    event["reason"] = _L7_VERDICT.get(message.verdict, 0)
    event["direction"] = k.DIR_EGRESS if egress else k.DIR_INGRESS
    event["proto"] = TCP
    event["flags"] = (k.EVENT_F_REPLY if answer else 0) | (
        k.EVENT_F_IPV6 if len(source.address) == 16 else 0
    )
    return L7Event(event, _l7_record(message, answer=answer))


def _address(raw: bytes) -> bytes:
    match len(raw):
        case 4:
            return b"\0" * 10 + b"\xff\xff" + raw
        case 16:
            return raw
        case _:
            return bytes(16)


def _l7_record(message: xds_pb2.L7Record, *, answer: bool) -> L7Record:
    kind = L7Type.RESPONSE if answer else L7Type.REQUEST
    latency_ns = max(0, message.latency_ns) if answer else 0
    own: Http | Dns | Kafka
    values = message.fields
    if message.parser == "kafka":
        own = Kafka(
            api_key=values.get("api_key", "")[:_MAX_TEXT],
            api_version=_number(values.get("api_version", "")),
            correlation_id=_number(values.get("correlation_id", "")),
            error_code=_number(values.get("error_code", "")),
            topic=values.get("topic", "")[:_MAX_TEXT],
        )
    elif message.parser == "dns":
        own = Dns(
            query=values.get("query", "")[:_MAX_TEXT],
            rcode=_number(values.get("rcode", "")),
            ttl=_number(values.get("ttl", "")),
            ips=_words(values.get("ips", "")),
            cnames=_words(values.get("cnames", "")),
            qtypes=_words(values.get("qtypes", "")),
            rrtypes=_words(values.get("rrtypes", "")),
            observation_source="proxy",
        )
    else:
        http = message.http
        headers = [*http.headers, *(http.response_headers if answer else ())]
        own = Http(
            code=http.code,  # 0 for a request, but of one that was refused
            method=http.method[:_MAX_TEXT],
            url=http.url[:_MAX_TEXT],
            protocol=(http.protocol or message.parser)[:_MAX_TEXT],
            headers=tuple(
                (one.name[:_MAX_TEXT], one.value[:_MAX_TEXT]) for one in headers[:_MAX_HEADERS]
            ),
        )
    return L7Record(
        type=kind, record=own, latency_ns=latency_ns, trace_id=_trace_id(message.http.headers)
    )


def _number(text: str) -> int:
    """A number of 32 bits; 0 for what is none."""
    try:
        return max(-(1 << 31), min(int(text[:12]), (1 << 31) - 1))
    except ValueError:
        return 0


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text[:_MAX_TEXT].split(",") if word)


def _trace_id(headers: Iterable[xds_pb2.Header]) -> str:
    """Of W3C's trace context, or of B3 in either form; empty: none."""
    for header in headers:
        value = header.value[:256]
        match header.name.lower():
            case "traceparent":
                parts = value.split("-")
                if len(parts) >= 4 and len(parts[1]) == 32:
                    return parts[1]
            case "x-b3-traceid":
                return value
            case "b3":
                return value.partition("-")[0]
            case _:
                pass
    return ""


# ---- agent events

# The monitor's numbers to AgentEventType.
_AGENT_TYPES: Final = {
    2: flow_pb2.AGENT_STARTED,
    3: flow_pb2.ENDPOINT_REGENERATE_SUCCESS,
    4: flow_pb2.ENDPOINT_REGENERATE_FAILURE,
    5: flow_pb2.POLICY_UPDATED,
    6: flow_pb2.POLICY_DELETED,
    7: flow_pb2.ENDPOINT_CREATED,
    8: flow_pb2.ENDPOINT_DELETED,
    9: flow_pb2.IPCACHE_UPSERTED,
    10: flow_pb2.IPCACHE_DELETED,
}


def agent_event(message: agent_pb2.Notification) -> flow_pb2.AgentEvent:
    """A notification of the agent; one that cannot be read becomes an unknown one."""
    kind = _AGENT_TYPES.get(message.subtype, flow_pb2.AGENT_EVENT_UNKNOWN)
    event = flow_pb2.AgentEvent(type=kind)
    try:
        payload = json.loads(message.json)
        match message.subtype:
            case 2:
                event.agent_start.time.CopyFrom(to_timestamp(message.time_ns))
            case 3 | 4:
                regenerated = event.endpoint_regenerate
                regenerated.id = payload["id"]
                regenerated.labels.extend(payload.get("labels", ()))
                regenerated.error = payload.get("error", "")
            case 5 | 6:
                policy = event.policy_update
                policy.labels.extend(payload.get("labels", ()))
                policy.revision = payload.get("revision", 0)
                policy.rule_count = payload.get("rule_count", 0)
            case 7 | 8:
                endpoint = event.endpoint_update
                endpoint.id = payload["id"]
                endpoint.labels.extend(payload.get("labels", ()))
                endpoint.pod_name = payload.get("pod-name", "")
                endpoint.namespace = payload.get("namespace", "")
            case 9 | 10:
                event.ipcache_update.cidr = payload["cidr"]
                event.ipcache_update.identity = payload.get("id") or 0
            case _:
                raise ValueError(message.subtype)
    except (ValueError, KeyError, TypeError, AttributeError):
        event = flow_pb2.AgentEvent(type=flow_pb2.AGENT_EVENT_UNKNOWN)
        event.unknown.type = str(message.subtype)
        event.unknown.notification = message.json[:4096]
    return event


def parse(kind: type[Any], raw: bytes) -> Any:
    """A request's message. Raises RequestInvalid."""
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        raise RequestInvalid(f"the request is no {kind.DESCRIPTOR.full_name}: {error}") from error
