"""Prometheus metrics of flows, with Hubble's names, labels and options.

    "drop:sourceContext=namespace|reserved-identity;labelsContext=traffic_direction"
     name  option     value

Counted a batch at a time: a metric looks at the rows it is about, and its labels are columns to
group them by. Each metric has at most so many series; what comes beyond is counted under `other`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

from cilia.bpf import constants as k
from cilia.bpf.dropreason import reason_text
from cilia.errors import InvalidError
from cilia.identity import RESERVED, WORLD, WORLD_IPV4, WORLD_IPV6, NumericIdentity
from cilia.observation import MATCHES, POINTS
from services.flows.dimensions import (
    DROPPED,
    EVENT_L7,
    FORWARDED,
    ICMP,
    ICMPV6,
    REPLY_NO,
    REPLY_UNKNOWN,
    SCTP,
    TCP,
    UDP,
    Dimensions,
)
from services.flows.encoder import address_text
from services.flows.grouping import PROTOCOLS, Column, keys_of, unmix
from services.flows.l7 import Dns, Http, Kafka, L7Kind, L7Type
from services.flows.ledger import Cause
from services.flows.rows import Rows
from services.flows.summary import icmp_summary
from services.flows.world import Party

Mask = npt.NDArray[np.bool_]
OTHER: Final = "other"
MAX_SERIES: Final = 2000
_BUCKETS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_VERDICTS: Final = {1: "FORWARDED", 2: "DROPPED", 3: "ERROR", 4: "AUDIT", 5: "REDIRECTED"}
LOST_SOURCES: Final = {
    Cause.KERNEL: "perf_event_ring_buffer",
    Cause.TRANSPORT: "observer_events_queue",
    Cause.READER: "hubble_ring_buffer",
}


class MetricSpecInvalid(InvalidError):
    default_cure = (
        "Write NAME or NAME:option=value;option, for example drop:sourceContext=namespace"
    )


@dataclass(frozen=True, slots=True)
class Spec:
    name: str
    options: Mapping[str, str] = field(default_factory=dict)


def parse_spec(text: str) -> Spec:
    """Hubble's way of writing a metric and its options. Raises MetricSpecInvalid."""
    name, _, rest = text.partition(":")
    if name not in _METRICS:
        raise MetricSpecInvalid(
            f"{name!r} is no metric", cure=f"Metrics are {', '.join(sorted(_METRICS))}"
        )
    options = {}
    allowed = _METRICS[name].options | _CONTEXT_OPTIONS
    for part in filter(None, rest.split(";")):
        option, _, value = part.partition("=")
        if option not in allowed:
            raise MetricSpecInvalid(
                f"{name} has no option {option!r}", cure=f"Options are {', '.join(sorted(allowed))}"
            )
        options[option] = value
    return Spec(name, options)


# ---- contexts: more labels, after who is at the ends

_CONTEXT_OPTIONS: Final = frozenset(
    f"{side}{direction}Context"
    for side in ("source", "destination")
    for direction in ("", "Egress", "Ingress")
) | {"labelsContext"}

Text = Callable[[Dimensions, int], str]


def _with_party(side: str, read: Callable[[Party], str]) -> Text:
    return lambda dims, pair: read(dims.parties[int(dims.pairs[side][pair])])


def _pod(party: Party) -> str:
    return f"{party.namespace}/{party.name}" if party.name and party.namespace else party.name


def _reserved(party: Party) -> str:
    name = RESERVED.get(NumericIdentity(party.identity))
    return f"reserved:{name}" if name else ""


def _workload(party: Party) -> str:
    if not party.workloads:
        return ""
    name = party.workloads[0].name
    return f"{party.namespace}/{name}" if party.namespace else name


def _app(party: Party) -> str:
    for key in ("app.kubernetes.io/name", "k8s-app", "app"):
        for label in party.labels:
            if label.partition(":")[2].startswith(f"{key}="):
                return label.partition("=")[2]
    return ""


def _context(name: str, side: str) -> Text:
    """Raises MetricSpecInvalid."""
    short = "src" if side == "source" else "dst"
    plain: dict[str, Callable[[Party], str]] = {
        "identity": lambda party: ",".join(party.labels),
        "namespace": lambda party: party.namespace,
        "pod": _pod,
        "pod-name": lambda party: party.name,
        "reserved-identity": _reserved,
        "workload": _workload,
        "workload-name": lambda party: party.workloads[0].name if party.workloads else "",
        "workload_kind": lambda party: party.workloads[0].kind if party.workloads else "",
        "app": _app,
    }
    if name in plain:
        return _with_party(short, plain[name])
    if name == "ip":
        high, low = f"{short[0]}_hi", f"{short[0]}_lo"
        return lambda dims, pair: address_text(
            int(dims.pairs[high][pair]), int(dims.pairs[low][pair])
        )
    if name == "dns":
        return lambda dims, pair: ",".join(dims.names[int(dims.pairs[f"{short}_names"][pair])])
    raise MetricSpecInvalid(f"{name!r} is no context")


def _first_of(contexts: str, side: str) -> Text:
    texts = [_context(name, side) for name in contexts.split("|")]
    return lambda dims, pair: next((t for text in texts if (t := text(dims, pair))), "")


def context_columns(options: Mapping[str, str]) -> list[Column]:
    """The labels that a metric's options add. Raises MetricSpecInvalid."""
    columns = []
    for side in ("source", "destination"):
        chosen = options.get(f"{side}Context", "")
        by_direction = {
            direction: options.get(f"{side}{name}Context", "") or chosen
            for direction, name in ((k.DIR_EGRESS, "Egress"), (k.DIR_INGRESS, "Ingress"))
        }
        if len(set(by_direction.values())) > 1:
            raise MetricSpecInvalid(
                f"{side}EgressContext and {side}IngressContext that differ are not supported",
                cure=f"Give {side}Context",
            )
        if any(by_direction.values()):
            columns.append(Column(side, "pair", _first_of(by_direction[k.DIR_EGRESS], side)))
    for name in filter(None, options.get("labelsContext", "").split(",")):
        if name == "traffic_direction":
            columns.append(Column(name, "meta", _direction))
            continue
        side, _, what = name.partition("_")
        if side not in ("source", "destination") or what not in (
            "ip", "pod", "namespace", "workload", "workload_kind", "app",
        ):  # fmt: skip
            raise MetricSpecInvalid(f"{name!r} is no label")
        context = {"pod": "pod-name", "workload": "workload-name"}.get(what, what)
        columns.append(Column(name, "pair", _context(context, side)))
    return columns


# ---- what is counted


@dataclass(frozen=True, slots=True)
class _Kind:
    """A metric: rows it is about, and what makes its series of them."""

    make: Callable[[Spec], list[_Counter | _Durations]]
    options: frozenset[str] = frozenset()


@dataclass(slots=True)
class _Counter:
    """A counter family over rows that a mask chooses, by columns."""

    name: str
    help: str
    columns: list[Column]
    where: Callable[[Rows], Mask]
    values: dict[tuple[str, ...], float] = field(default_factory=dict)
    folded: int = 0

    def count(self, rows: Rows) -> None:
        chosen = self.where(rows)
        if not chosen.any():
            return
        part = rows if chosen.all() else rows.take(chosen)
        mixed, texts = keys_of(self.columns, part)
        distinct, counts = np.unique(mixed, return_counts=True)
        for number, count in zip(distinct.tolist(), counts.tolist(), strict=True):
            self.add(unmix(number, texts), count)

    def add(self, labels: tuple[str, ...], count: float) -> None:
        if labels not in self.values and len(self.values) >= MAX_SERIES:
            self.folded += 1
            labels = (OTHER,) * len(self.columns)
        self.values[labels] = self.values.get(labels, 0.0) + count

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(
            self.name, self.help, labels=[column.name for column in self.columns]
        )
        for labels, value in self.values.items():
            family.add_metric(labels, value)
        yield family


@dataclass(slots=True)
class _Durations:
    """How long answers took, by columns."""

    name: str
    help: str
    columns: list[Column]
    where: Callable[[Rows], Mask]
    values: dict[tuple[str, ...], list[float]] = field(default_factory=dict)  # buckets, then sum

    def count(self, rows: Rows) -> None:
        chosen = self.where(rows)
        if not chosen.any():
            return
        part = rows.take(chosen)
        mixed, texts = keys_of(self.columns, part)
        for number, l7 in zip(mixed.tolist(), part.columns["l7"].tolist(), strict=True):
            record = part.dimensions.records.get(l7)
            if record is None:
                continue
            labels = unmix(number, texts)
            if labels not in self.values and len(self.values) >= MAX_SERIES:
                labels = (OTHER,) * len(self.columns)
            found = self.values.setdefault(labels, [0.0] * (len(_BUCKETS_S) + 2))
            seconds = record.latency_ns / 1e9
            found[int(np.searchsorted(_BUCKETS_S, seconds))] += 1
            found[-1] += seconds

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(
            self.name, self.help, labels=[column.name for column in self.columns]
        )
        for labels, found in self.values.items():
            running, buckets = 0.0, []
            for bound, count in zip((*_BUCKETS_S, "+Inf"), found[:-1], strict=True):
                running += count
                buckets.append((str(bound), running))
            family.add_metric(labels, buckets, sum_value=found[-1])
        yield family


def _meta(rows: Rows, name: str) -> Any:
    return rows.dimensions.metas[name][rows.columns["meta"]]


def _everything(rows: Rows) -> Mask:
    return np.ones(len(rows), bool)


def _direction(dims: Dimensions, meta: int) -> str:
    number = int(dims.metas["direction"][meta])
    return {k.DIR_INGRESS: "ingress", k.DIR_EGRESS: "egress"}.get(number, "unknown")


def _protocol(dims: Dimensions, meta: int) -> str:
    number = int(dims.metas["proto"][meta])
    return PROTOCOLS.get(number, "Unknown flow")


def _verdict(dims: Dimensions, meta: int) -> str:
    return _VERDICTS.get(int(dims.metas["verdict"][meta]), "VERDICT_UNKNOWN")


def _family(dims: Dimensions, pair: int) -> str:
    v4 = not dims.pairs["s_hi"][pair] and int(dims.pairs["s_lo"][pair]) >> 32 == 0xFFFF
    return "IPv4" if v4 else "IPv6"


def _drop(spec: Spec) -> list[_Counter | _Durations]:
    columns = [
        *context_columns(spec.options),
        Column("reason", "meta", lambda dims, meta: reason_text(int(dims.metas["drop"][meta]))),
        Column("protocol", "meta", _protocol),
    ]
    return [
        _Counter(
            "hubble_drop",
            "Number of drops",
            columns,
            lambda rows: (_meta(rows, "verdict") == DROPPED) & (_meta(rows, "type") == 1),
        )
    ]


def _flow(spec: Spec) -> list[_Counter | _Durations]:
    def kind(dims: Dimensions, meta: int) -> str:
        number = int(dims.metas["type"][meta])
        return {1: "Drop", 4: "Trace", 5: "PolicyVerdict", 129: "L7"}.get(number, "Unknown")

    def sub(dims: Dimensions, meta: int) -> str:
        number, what = int(dims.metas["sub"][meta]), int(dims.metas["type"][meta])
        if what == k.EVENT_TRACE:
            return POINTS.get(number, str(number))
        if what == k.EVENT_DROP:
            return reason_text(number)
        return ""

    columns = [
        *context_columns(spec.options),
        Column("type", "meta", kind),
        Column("subtype", "meta", sub),
        Column("verdict", "meta", _verdict),
        Column("protocol", "meta", _protocol),
    ]
    return [_Counter("hubble_flows_processed", "Total number of flows", columns, _everything)]


def _tcp(spec: Spec) -> list[_Counter | _Durations]:
    def flag(dims: Dimensions, meta: int) -> str:
        bits = int(dims.metas["tcp_flags"][meta])
        if bits & 1:
            return "FIN"
        if bits & 4:
            return "RST"
        return "SYN-ACK" if bits & 16 else "SYN"

    def where(rows: Rows) -> Mask:
        flags = _meta(rows, "tcp_flags")
        return np.asarray(
            (_meta(rows, "proto") == TCP)
            & ((flags & 7) != 0)
            & (_meta(rows, "verdict") == FORWARDED)
            & (_meta(rows, "type") != EVENT_L7)
        )

    columns = [
        *context_columns(spec.options),
        Column("flag", "meta", flag),
        Column("family", "pair", _family),
    ]
    return [_Counter("hubble_tcp_flags", "TCP flag occurrences", columns, where)]


def _icmp(spec: Spec) -> list[_Counter | _Durations]:
    def what(dims: Dimensions, meta: int) -> str:
        number = int(dims.metas["icmp"][meta])
        v6 = int(dims.metas["proto"][meta]) == ICMPV6
        return icmp_summary(v6, number >> 8, number & 255).partition(" ")[2]

    columns = [
        *context_columns(spec.options),
        Column(
            "family",
            "meta",
            lambda dims, meta: "IPv6" if int(dims.metas["proto"][meta]) == ICMPV6 else "IPv4",
        ),
        Column("type", "meta", what),
    ]
    return [
        _Counter(
            "hubble_icmp",
            "Number of ICMP messages",
            columns,
            lambda rows: np.isin(_meta(rows, "proto"), (ICMP, ICMPV6)),
        )
    ]


def _ports(spec: Spec) -> list[_Counter | _Durations]:
    columns = [
        *context_columns(spec.options),
        Column("protocol", "meta", _protocol),
        Column("port", "dport", lambda _, number: str(number)),
    ]

    def where(rows: Rows) -> Mask:
        # A new connection's first packet, at the responder's side of it.
        proto, flags = _meta(rows, "proto"), _meta(rows, "tcp_flags")
        first = np.where(proto == TCP, (flags & 18) == 2, (proto == UDP) | (proto == SCTP))
        return np.asarray(
            first
            & (_meta(rows, "type") == k.EVENT_TRACE)
            & (_meta(rows, "verdict") == FORWARDED)
            & (_meta(rows, "reply") == REPLY_NO)
        )

    return [
        _Counter(
            "hubble_port_distribution",
            "Numbers of packets distributed by destination port",
            columns,
            where,
        )
    ]


def _to_world(spec: Spec) -> list[_Counter | _Durations]:
    any_drop, syn_only = "any-drop" in spec.options, "syn-only" in spec.options

    def where(rows: Rows) -> Mask:
        identity = rows.dimensions.pairs["dst_identity"][rows.columns["pair"]]
        outside = np.isin(identity, (WORLD, WORLD_IPV4, WORLD_IPV6)) | ((identity & (1 << 24)) != 0)
        drop = _meta(rows, "drop")
        wanted = (_meta(rows, "verdict") != DROPPED) | any_drop | np.isin(drop, (133, 181))
        fresh = np.isin(_meta(rows, "reply"), (REPLY_NO, REPLY_UNKNOWN))
        found = outside & wanted & fresh
        if syn_only:
            tcp = _meta(rows, "proto") == TCP
            found &= ~tcp | ((_meta(rows, "tcp_flags") & 18) == 2)
        return np.asarray(found)

    columns = [
        *context_columns(spec.options),
        Column("protocol", "meta", _protocol),
        Column("verdict", "meta", _verdict),
    ]
    if "port" in spec.options:
        columns.append(Column("port", "dport", lambda _, number: str(number)))
    return [_Counter("hubble_flows_to_world", "Total number of flows to world", columns, where)]


def _policy(spec: Spec) -> list[_Counter | _Durations]:
    def action(dims: Dimensions, meta: int) -> str:
        number = int(dims.metas["verdict"][meta])
        return {1: "forwarded", 2: "dropped", 4: "audit", 5: "redirected"}.get(number, "unknown")

    columns = [
        *context_columns(spec.options),
        Column("direction", "meta", _direction),
        Column(
            "match",
            "meta",
            lambda dims, meta: MATCHES.get(int(dims.metas["match"][meta]), "").lower(),
        ),
        Column("action", "meta", action),
    ]
    return [
        _Counter(
            "hubble_policy_verdicts",
            "Policy verdicts",
            columns,
            lambda rows: _meta(rows, "type") == k.EVENT_VERDICT,
        )
    ]


def _l7_where(kind: L7Kind, *types: L7Type) -> Callable[[Rows], Mask]:
    def where(rows: Rows) -> Mask:
        numbers = rows.columns["l7"]
        columns = rows.dimensions.l7
        found = (numbers != 0) & (columns["kind"][numbers] == kind)
        return np.asarray(found & np.isin(columns["type"][numbers], types)) if types else found

    return where


def _record(read: Callable[[Any], str], kind: type[Http | Dns | Kafka]) -> Text:
    def text(dims: Dimensions, number: int) -> str:
        record = dims.records.get(number)
        return read(record.record) if record and isinstance(record.record, kind) else ""

    return text


def _reporter(dims: Dimensions, meta: int) -> str:
    ingress = int(dims.metas["direction"][meta]) == k.DIR_INGRESS
    return "server" if ingress else "client"


def _http_columns() -> dict[str, Column]:
    return {
        "method": Column("method", "l7", _record(lambda http: http.method, Http)),
        "protocol": Column("protocol", "l7", _record(lambda http: http.protocol, Http)),
        "status": Column("status", "l7", _record(lambda http: str(http.code), Http)),
        "reporter": Column("reporter", "meta", _reporter),
    }


def _http_durations(context: list[Column], of: Mapping[str, Column]) -> _Durations:
    return _Durations(
        "hubble_http_request_duration_seconds",
        "Quantiles of HTTP request duration in seconds",
        [*context, of["method"], of["reporter"]],
        _l7_where(L7Kind.HTTP, L7Type.RESPONSE),
    )


def _http(spec: Spec) -> list[_Counter | _Durations]:
    context, of = context_columns(spec.options), _http_columns()
    answers = _l7_where(L7Kind.HTTP, L7Type.RESPONSE)
    return [
        _Counter(
            "hubble_http_requests",
            "Count of HTTP requests",
            [*context, of["method"], of["protocol"], of["reporter"]],
            _l7_where(L7Kind.HTTP, L7Type.REQUEST),
        ),
        _Counter(
            "hubble_http_responses",
            "Count of HTTP responses",
            [*context, of["method"], of["status"], of["reporter"]],
            answers,
        ),
        _http_durations(context, of),
    ]


def _http_v2(spec: Spec) -> list[_Counter | _Durations]:
    context, of = context_columns(spec.options), _http_columns()
    answers = _l7_where(L7Kind.HTTP, L7Type.RESPONSE)
    return [
        _Counter(
            "hubble_http_requests",
            "Count of HTTP requests",
            [*context, of["method"], of["protocol"], of["status"], of["reporter"]],
            answers,
        ),
        _http_durations(context, of),
    ]


def _dns(spec: Spec) -> list[_Counter | _Durations]:
    context = context_columns(spec.options)
    if "query" in spec.options:
        context.append(Column("query", "l7", _record(lambda dns: dns.query, Dns)))
    qtypes = Column("qtypes", "l7", _record(lambda dns: ",".join(dns.qtypes), Dns))
    rcode = Column("rcode", "l7", _record(lambda dns: _rcode(dns.rcode), Dns))
    ips = Column("ips_returned", "l7", _record(lambda dns: str(len(dns.ips)), Dns))
    types = Column("type", "l7", _record(lambda dns: ",".join(dns.rrtypes), Dns))
    asked = _l7_where(L7Kind.DNS, L7Type.REQUEST)
    answered = _l7_where(L7Kind.DNS, L7Type.RESPONSE)
    if "ignoreAAAA" in spec.options:
        asked, answered = _without_aaaa(asked), _without_aaaa(answered)
    labels = [*context, rcode, qtypes, ips]
    return [
        _Counter("hubble_dns_queries", "Number of DNS queries observed", labels, asked),
        _Counter("hubble_dns_responses", "Number of DNS responses observed", labels, answered),
        _Counter(
            "hubble_dns_response_types",
            "Number of DNS responses observed by type",
            [*context, types, qtypes],
            answered,
        ),
    ]


def _rcode(number: int) -> str:
    names = {0: "No Error", 1: "Format Error", 2: "Server Failure", 3: "Non-Existent Domain",
             4: "Not Implemented", 5: "Query Refused"}  # fmt: skip
    return names.get(number, str(number))


def _without_aaaa(where: Callable[[Rows], Mask]) -> Callable[[Rows], Mask]:
    def filtered(rows: Rows) -> Mask:
        found = where(rows).copy()
        for at in np.flatnonzero(found).tolist():
            record = rows.dimensions.records.get(int(rows.columns["l7"][at]))
            if record and isinstance(record.record, Dns) and record.record.qtypes == ("AAAA",):
                found[at] = False
        return found

    return filtered


def _kafka(spec: Spec) -> list[_Counter | _Durations]:
    context = context_columns(spec.options)
    topic = Column("topic", "l7", _record(lambda kafka: kafka.topic, Kafka))
    key = Column("api_key", "l7", _record(lambda kafka: kafka.api_key, Kafka))
    error = Column("error_code", "l7", _record(lambda kafka: str(kafka.error_code), Kafka))
    reporter = Column("reporter", "meta", _reporter)
    where = _l7_where(L7Kind.KAFKA)
    return [
        _Counter(
            "hubble_kafka_requests",
            "Count of Kafka requests by topic",
            [*context, topic, key, error, reporter],
            where,
        ),
        _Durations(
            "hubble_kafka_request_duration_seconds",
            "Quantiles of Kafka request duration by topic",
            [*context, topic, key, reporter],
            where,
        ),
    ]


_METRICS: Final[Mapping[str, _Kind]] = {
    "dns": _Kind(_dns, frozenset({"query", "ignoreAAAA"})),
    "drop": _Kind(_drop),
    "flow": _Kind(_flow),
    "flows-to-world": _Kind(_to_world, frozenset({"any-drop", "port", "syn-only"})),
    "http": _Kind(_http),
    "httpV2": _Kind(_http_v2, frozenset({"exemplars"})),
    "icmp": _Kind(_icmp),
    "kafka": _Kind(_kafka),
    "policy": _Kind(_policy),
    "port-distribution": _Kind(_ports),
    "tcp": _Kind(_tcp),
}


class FlowMetrics:
    """Counts batches as they come in. A collector of prometheus_client."""

    def __init__(
        self, specs: Iterable[Spec], *, lost: Callable[[], Mapping[Cause, int]] = dict
    ) -> None:
        chosen = tuple(specs)
        names = [spec.name for spec in chosen]
        if {"http", "httpV2"} <= set(names) or len(set(names)) != len(names):
            raise MetricSpecInvalid("a metric is given twice, or both http and httpV2")
        self._lost = lost
        self.families: Sequence[_Counter | _Durations] = [
            family for spec in chosen for family in _METRICS[spec.name].make(spec)
        ]

    def count(self, rows: Rows) -> None:
        for family in self.families:
            family.count(rows)

    def sums(self) -> list[tuple[str, str, dict[str, str], float]]:
        """Every series of every counter: name, help, labels, value."""
        return [
            (family.name, family.help, dict(zip(names, labels, strict=True)), value)
            for family in self.families
            if isinstance(family, _Counter)
            for names in [[column.name for column in family.columns]]
            for labels, value in list(family.values.items())
        ]

    def collect(self) -> Iterator[Metric]:
        for family in self.families:
            yield from family.collect()
        lost = CounterMetricFamily("hubble_lost_events", "Number of lost events", labels=["source"])
        for cause, source in LOST_SOURCES.items():
            lost.add_metric([source], self._lost().get(cause, 0))
        yield lost


__all__ = ["FlowMetrics", "MetricSpecInvalid", "Spec", "parse_spec"]
