"""Filters compiled to predicates over whole columns.

    FilterSpec ──▶ Filter: conditions on  pairs   (addresses, names, labels, identities …)
                                          metas   (verdict, event type, flags, direction …)
                                          rows    (ports, uuid)
                                          records (HTTP, DNS)
                                          messages (CEL)

What depends on the pair alone is decided once a pair, not once a row: for a long scan as a table of
answers by pair, for a few rows directly. So are metas. The cheap conditions come first; the later
ones see only the rows that are left. Text of a client goes to RE2 only, whose time is linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import re2

from cilia.bpf.layout import to_addr
from services.flows import selectors
from services.flows.dimensions import (
    DROPPED,
    EVENT_L7,
    ICMP,
    ICMPV6,
    REPLY_NO,
    REPLY_UNKNOWN,
    REPLY_YES,
    SCTP,
    TCP,
    UDP,
    V4_PREFIX,
    Dimensions,
)
from services.flows.filterspec import FilterInvalid, FilterSpec
from services.flows.interning import AnyArray
from services.flows.l7 import Dns, Http, L7Kind, L7Record
from services.flows.rows import Rows
from services.flows.uuids import parse_uuid
from services.flows.world import Party

T = TypeVar("T")
Mask = npt.NDArray[np.bool_]
# (dimensions, numbers of pairs or metas) -> which of them
Condition = Callable[[Dimensions, AnyArray], Mask]
RowCondition = Callable[[Rows], Mask]
# Given expressions, whether any of them holds of each encoded flow.
CelCompiler = Callable[[tuple[str, ...]], Callable[[Sequence[bytes]], list[bool]]]
Encode = Callable[[Rows], Sequence[bytes]]

MAX_VALUES: Final = 4096  # of one field
MAX_REGEX: Final = 2048
_PROTOCOLS: Final[dict[str, tuple[int, ...]]] = {
    "icmp": (ICMP, ICMPV6),
    "icmpv4": (ICMP,),
    "icmpv6": (ICMPV6,),
    "tcp": (TCP,),
    "udp": (UDP,),
    "sctp": (SCTP,),
    "vrrp": (),  # never carried here
    "igmp": (),
}
_L7_PROTOCOLS: Final = {"dns": L7Kind.DNS, "http": L7Kind.HTTP, "kafka": L7Kind.KAFKA}
_FQDN: Final = re2.compile(r"^[-_.*0-9a-z]+$")
_STATUS: Final = re2.compile(r"^(?:[1-5][0-9]{2}|[1-5][0-9]?\+)$")


@dataclass(slots=True)
class _Lut:
    """Answers by number, for one dimension of one source."""

    of: Condition
    source: object = None
    births: int = -1
    asked_of: object = None
    asked: int = 0
    answers: Mask = field(default_factory=lambda: np.zeros(0, bool))

    def __call__(self, dimensions: Dimensions, numbers: AnyArray, *, pairs: bool) -> Mask:
        born = dimensions.pair_born if pairs else dimensions.meta_born
        births = dimensions.pair_births if pairs else dimensions.meta_births
        size = len(born)
        known = self.source is dimensions.cache and self.births >= 0
        if not known:
            # A table pays once as many were asked for one by one.
            self.asked = len(numbers) + (self.asked if self.asked_of is dimensions.cache else 0)
            self.asked_of = dimensions.cache
            if self.asked * 4 < size:
                return self.of(dimensions, numbers)
        if not known:
            self.answers = self.of(dimensions, np.arange(size))
        elif births != self.births:
            fresh = np.flatnonzero(born > np.uint64(self.births))
            if size > len(self.answers):
                grown = np.zeros(size, bool)
                grown[: len(self.answers)] = self.answers
                self.answers = grown
            self.answers[fresh] = self.of(dimensions, fresh)
        self.source, self.births = dimensions.cache, births
        answers: Mask = self.answers[numbers]
        return answers


@dataclass(slots=True)
class _Filter:
    """One FilterSpec: all of it must hold."""

    node: list[Callable[[Dimensions], bool]] = field(default_factory=list)
    metas: list[Condition] = field(default_factory=list)
    pairs: list[Condition] = field(default_factory=list)
    rows: list[RowCondition] = field(default_factory=list)
    records: list[RowCondition] = field(default_factory=list)
    messages: list[RowCondition] = field(default_factory=list)
    meta_lut: _Lut | None = None
    pair_lut: _Lut | None = None

    def seal(self) -> None:
        if self.metas:
            self.meta_lut = _Lut(_all(self.metas))
        if self.pairs:
            self.pair_lut = _Lut(_all(self.pairs))

    def mask(self, rows: Rows) -> Mask:
        dimensions = rows.dimensions
        if not all(condition(dimensions) for condition in self.node):
            return np.zeros(len(rows), bool)
        found: Mask | None = None
        if self.meta_lut is not None:
            found = self.meta_lut(dimensions, rows.columns["meta"], pairs=False)
        for condition in self.rows:
            if found is not None and not found.any():
                return found
            more = condition(rows)
            found = more if found is None else found & more
        if self.pair_lut is not None and (found is None or found.any()):
            if found is not None and np.count_nonzero(found) * 8 < len(found):
                left = np.flatnonzero(found)
                answers = self.pair_lut(dimensions, rows.columns["pair"][left], pairs=True)
                found = np.zeros(len(rows), bool)
                found[left[answers]] = True
            else:
                more = self.pair_lut(dimensions, rows.columns["pair"], pairs=True)
                found = more if found is None else found & more
        if self.records and (found is None or found.any()):
            have = rows.columns["l7"] != 0
            found = have if found is None else found & have
        for condition in (*self.records, *self.messages):
            # The dear ones see only what is left.
            left = np.arange(len(rows)) if found is None else np.flatnonzero(found)
            found = np.zeros(len(rows), bool)
            if len(left):
                found[left[condition(rows.take(left))]] = True
        return np.ones(len(rows), bool) if found is None else found


class Matcher:
    """Whitelist less blacklist."""

    def __init__(self, whitelist: Sequence[_Filter], blacklist: Sequence[_Filter]) -> None:
        self._whitelist = whitelist
        self._blacklist = blacklist

    @property
    def everything(self) -> bool:
        return not self._whitelist and not self._blacklist

    def mask(self, rows: Rows) -> Mask:
        found = np.zeros(len(rows), bool) if self._whitelist else np.ones(len(rows), bool)
        for one in self._whitelist:
            found |= one.mask(rows)
        for one in self._blacklist:
            if found.any():
                found &= ~one.mask(rows)
        return found


def compile_filters(
    whitelist: Iterable[FilterSpec],
    blacklist: Iterable[FilterSpec],
    *,
    cel: CelCompiler | None = None,
    encode: Encode | None = None,
) -> Matcher:
    """Raises FilterInvalid, which names the field."""
    compiler = _Compiler(cel, encode)
    return Matcher(
        [compiler.filter(spec) for spec in whitelist], [compiler.filter(spec) for spec in blacklist]
    )


def _all(conditions: list[Condition]) -> Condition:
    def every(dimensions: Dimensions, numbers: AnyArray) -> Mask:
        found = conditions[0](dimensions, numbers)
        for condition in conditions[1:]:
            found = found & condition(dimensions, numbers)
        return found

    return every


class _Compiler:
    def __init__(self, cel: CelCompiler | None, encode: Encode | None) -> None:
        self._cel = cel
        self._encode = encode

    def filter(self, spec: FilterSpec) -> _Filter:
        for name in FilterSpec.__dataclass_fields__:
            if len(getattr(spec, name)) > MAX_VALUES:
                raise FilterInvalid(f"{name}: more than {MAX_VALUES} values")
        made = _Filter()
        self._meta_conditions(spec, made)
        self._pair_conditions(spec, made)
        self._row_conditions(spec, made)
        self._l7_conditions(spec, made)
        if spec.node_name:
            patterns = [_node_pattern(text) for text in spec.node_name]
            made.node.append(
                lambda dimensions: any(match(dimensions.node_name) for match in patterns)
            )
        if spec.node_labels:
            labels = selectors.matcher(spec.node_labels)
            made.node.append(lambda dimensions: labels(dimensions.node_labels))
        if spec.cel_expression:
            self._cel_condition(spec, made)
        made.seal()
        return made

    # ---- metas

    def _meta_conditions(self, spec: FilterSpec, made: _Filter) -> None:
        if spec.verdict:
            made.metas.append(_member("verdict", spec.verdict))
        if spec.drop_reason_desc:
            reasons = _member("drop", spec.drop_reason_desc)
            made.metas.append(
                lambda dimensions, numbers: (
                    (dimensions.metas["verdict"][numbers] == DROPPED) & reasons(dimensions, numbers)
                )
            )
        if spec.traffic_direction:
            made.metas.append(_member("direction", spec.traffic_direction))
        if spec.event_type:
            made.metas.append(_event_type(spec))
        if spec.reply:
            made.metas.append(_reply(spec.reply))
        if spec.tcp_flags:
            fits = np.array(
                [any(flags & need == need for need in spec.tcp_flags) for flags in range(256)]
            )
            made.metas.append(
                lambda dimensions, numbers: (
                    (dimensions.metas["proto"][numbers] == TCP)
                    & (dimensions.metas["type"][numbers] != EVENT_L7)
                    & fits[dimensions.metas["tcp_flags"][numbers]]
                )
            )
        if spec.encrypted and False not in spec.encrypted:
            made.metas.append(_never)
        if spec.ip_trace_id and 0 not in spec.ip_trace_id:
            made.metas.append(_never)

    # ---- pairs

    def _pair_conditions(self, spec: FilterSpec, made: _Filter) -> None:
        add = made.pairs.append
        for side, high, low in (("source", "s_hi", "s_lo"), ("destination", "d_hi", "d_lo")):
            short = "src" if side == "source" else "dst"
            if texts := getattr(spec, f"{side}_ip"):
                add(_addresses(f"{side}_ip", texts, high, low))
            if numbers := getattr(spec, f"{side}_identity"):
                add(_identities(f"{short}_identity", numbers))
            tests: list[Callable[[Party], bool]] = []
            if texts := getattr(spec, f"{side}_pod"):
                tests.append(_pods([_name_pattern(f"{side}_pod", text) for text in texts]))
            if texts := getattr(spec, f"{side}_label"):
                tests.append(_labelled(selectors.matcher(texts)))
            if workloads := getattr(spec, f"{side}_workload"):
                tests.append(_workloads(workloads))
            if clusters := getattr(spec, f"{side}_cluster_name"):
                if not all(clusters):
                    raise FilterInvalid(
                        f"{side}_cluster_name: an empty name", cure="Give a cluster's name"
                    )
                tests.append(_clusters(frozenset(clusters)))
            if tests:
                add(_by_value(short, lambda d: d.parties, _every(tests)))
            if texts := getattr(spec, f"{side}_fqdn"):
                patterns = [_fqdn(f"{side}_fqdn", text) for text in texts]
                add(_by_value(f"{short}_names", lambda d: d.names, _any_name(patterns)))
            if texts := getattr(spec, f"{side}_service"):
                services = [_name_pattern(f"{side}_service", text) for text in texts]
                add(_by_value(f"{short}_service", lambda d: d.services, _any_service(services)))
        if spec.source_ip_xlated:
            for text in spec.source_ip_xlated:
                _network("source_ip_xlated", text)
            add(_never)  # no flow has a translated source
        if spec.ip_version:
            add(_ip_version(spec.ip_version))
        if spec.interface:
            add(_interface(spec))

    # ---- rows

    def _row_conditions(self, spec: FilterSpec, made: _Filter) -> None:
        ported = np.zeros(256, bool)
        ported[[TCP, UDP, SCTP]] = True
        for name, column in (("source_port", "sport"), ("destination_port", "dport")):
            texts: tuple[str, ...] = getattr(spec, name)
            if not texts:
                continue
            ports = [_port(name, text) for text in texts]
            # ICMP's type and code lie in the same columns.
            made.metas.append(_proto(ported))
            made.rows.append(_in_column(column, ports))
        if spec.protocol:
            made.rows.append(_protocol(spec.protocol))
        if spec.uuid:
            wanted = [parsed for text in spec.uuid if (parsed := parse_uuid(text)) is not None]
            made.rows.append(
                lambda rows: np.isin(
                    rows.numbers,
                    np.array([n for run, n in wanted if run == rows.run], np.uint64),
                )
            )

    # ---- records

    def _l7_conditions(self, spec: FilterSpec, made: _Filter) -> None:
        http = (
            spec.http_status_code
            or spec.http_method
            or spec.http_path
            or spec.http_url
            or spec.http_header
        )
        if http and spec.event_type and all(kind.type != EVENT_L7 for kind in spec.event_type):
            raise FilterInvalid(
                "http filters with event types that have no HTTP",
                cure=f"Leave event_type out, or add type {EVENT_L7}",
            )
        if spec.http_status_code:
            made.records.append(_status(spec.http_status_code))
        if spec.http_method:
            methods = {text.lower() for text in spec.http_method}
            made.records.append(_http(lambda record: record.method.lower() in methods))
        if spec.http_path:
            paths = _regexes("http_path", spec.http_path)
            made.records.append(_http(_memo(lambda r: r.url, _path_search(paths))))
        if spec.http_url:
            urls = _regexes("http_url", spec.http_url)
            made.records.append(
                _http(_memo(lambda r: r.url, lambda url: any(e.search(url) for e in urls)))
            )
        if spec.http_header:
            headers = set(spec.http_header)
            made.records.append(_http(lambda record: not headers.isdisjoint(record.headers)))
        if spec.dns_query:
            queries = _regexes("dns_query", spec.dns_query)
            made.records.append(
                _records(
                    L7Kind.DNS,
                    lambda record: (
                        isinstance(record.record, Dns)
                        and any(e.search(record.record.query) for e in queries)
                    ),
                )
            )
        if spec.trace_id:
            traces = set(spec.trace_id)
            if "" not in traces:
                made.records.append(_records(None, lambda record: record.trace_id in traces))

    # ---- messages

    def _cel_condition(self, spec: FilterSpec, made: _Filter) -> None:
        if self._cel is None or self._encode is None:
            raise FilterInvalid("cel_expression is not supported here")
        evaluate, encode = self._cel(spec.cel_expression), self._encode

        def every(rows: Rows) -> Mask:
            return np.array(evaluate(encode(rows)), bool)

        repeats = all(_of_kinds(text) for text in spec.cel_expression)
        made.messages.append(_once_a_kind(every) if repeats else every)


# ---- conditions

# Fields of a flow that follow from its pair and its meta.
_KIND_FIELDS: Final = frozenset(
    (
        "verdict", "drop_reason", "drop_reason_desc", "ethernet", "IP", "source", "destination",
        "Type", "node_name", "source_names", "destination_names", "reply", "event_type",
        "source_service", "destination_service", "traffic_direction", "policy_match_type",
        "trace_observation_point", "is_reply", "interface", "proxy_port", "trace_reason",
        "egress_allowed_by", "ingress_allowed_by", "egress_denied_by", "ingress_denied_by",
    )
)  # fmt: skip
_FLOW_USE: Final = re2.compile(r"_flow(\s*\.\s*(\w+))?")
_MAX_KINDS: Final = 1 << 20


def _of_kinds(text: str) -> bool:
    """Whether an expression over `_flow` can only ask what all flows of a pair and meta share."""
    return all(use[1] in _KIND_FIELDS for use in _FLOW_USE.findall(text))


def _once_a_kind(condition: RowCondition) -> RowCondition:
    """The condition, asked once for each pair and meta that occur together."""
    known: dict[tuple[int, int, int], bool] = {}
    source: object = None

    def remembered(rows: Rows) -> Mask:
        nonlocal source
        dimensions = rows.dimensions
        if source is not dimensions.cache or len(known) > _MAX_KINDS:
            known.clear()
            source = dimensions.cache
        pair, meta = rows.columns["pair"], rows.columns["meta"]
        both = pair.astype(np.uint64) << np.uint64(32) | meta
        distinct, first, inverse = np.unique(both, return_index=True, return_inverse=True)
        # What a number stands for may change; when it did, it was born again.
        births = zip(
            distinct.tolist(),
            dimensions.pair_born[pair[first]].tolist(),
            dimensions.meta_born[meta[first]].tolist(),
            strict=True,
        )
        keys = list(births)
        fresh = [at for at, key in enumerate(keys) if key not in known]
        if fresh:
            answers = condition(rows.take(first[fresh]))
            for at, answer in zip(fresh, answers.tolist(), strict=True):
                known[keys[at]] = answer
        found = np.fromiter((known[key] for key in keys), bool, len(keys))
        return np.asarray(found[inverse])

    return remembered


def _never(_: Dimensions, numbers: AnyArray) -> Mask:
    return np.zeros(len(numbers), bool)


def _member(name: str, values: Iterable[int]) -> Condition:
    """Of a column of bytes."""
    table = np.zeros(256, bool)
    table[[value for value in values if 0 <= value < 256]] = True
    return lambda dimensions, numbers: table[dimensions.metas[name][numbers]]


def _proto(table: Mask) -> Condition:
    return lambda dimensions, numbers: table[dimensions.metas["proto"][numbers]]


def _event_type(spec: FilterSpec) -> Condition:
    wanted = spec.event_type

    def condition(dimensions: Dimensions, numbers: AnyArray) -> Mask:
        kind = dimensions.metas["type"][numbers]
        sub = dimensions.metas["sub"][numbers]
        found = np.zeros(len(numbers), bool)
        for one in wanted:
            fits = np.ones(len(numbers), bool) if one.type == 0 else kind == one.type
            if one.sub_type is not None:
                fits = fits & (sub == one.sub_type)
            found |= fits
        return found

    return condition


def _reply(wanted: tuple[bool, ...]) -> Condition:
    table = np.zeros(3, bool)
    table[REPLY_NO] = False in wanted
    table[REPLY_YES] = True in wanted

    def condition(dimensions: Dimensions, numbers: AnyArray) -> Mask:
        reply = dimensions.metas["reply"][numbers]
        dropped = dimensions.metas["verdict"][numbers] == DROPPED
        # What was dropped is no reply as far as anybody knows.
        return table[np.where(dropped & (reply == REPLY_UNKNOWN), REPLY_NO, reply)]

    return condition


def _identities(column: str, numbers: Iterable[int]) -> Condition:
    wanted = np.array(sorted(set(numbers)), np.uint32)
    if len(wanted) == 1:
        return lambda dimensions, which: dimensions.pairs[column][which] == wanted[0]
    return lambda dimensions, which: np.isin(dimensions.pairs[column][which], wanted)


def _addresses(name: str, texts: Iterable[str], high: str, low: str) -> Condition:
    networks = [_network(name, text) for text in texts]

    def condition(dimensions: Dimensions, numbers: AnyArray) -> Mask:
        hi, lo = dimensions.pairs[high][numbers], dimensions.pairs[low][numbers]
        v4 = (hi == 0) & (lo >> np.uint64(32) == np.uint64(0xFFFF))
        known = (hi != 0) | (lo != 0)
        found = np.zeros(len(numbers), bool)
        for is_v4, base, mask in networks:
            found |= (
                (v4 == is_v4)
                & ((hi & np.uint64(mask >> 64)) == np.uint64(base >> 64))
                & ((lo & np.uint64(mask & _LOW)) == np.uint64(base & _LOW))
            )
        return np.asarray(found & known)

    return condition


_LOW: Final = (1 << 64) - 1


def _network(name: str, text: str) -> tuple[bool, int, int]:
    """Whether it is of IPv4, the first address in mapped form, and the mask."""
    try:
        if "/" in text:
            network = ip_network(text, strict=False)
            bits = network.prefixlen + (96 if network.version == 4 else 0)
            first = network.network_address
        else:
            first, bits = ip_address(text), 128
    except ValueError as error:
        raise FilterInvalid(
            f"{name}: {text[:64]!r} is neither an address nor a prefix",
            cure="Write 10.0.0.1, 10.0.0.0/8, fd00::1 or fd00::/8",
        ) from error
    base = int.from_bytes(to_addr(first), "big")
    return first.version == 4, base, ((1 << bits) - 1) << (128 - bits)


def _ip_version(wanted: tuple[int, ...]) -> Condition:
    table = np.zeros(3, bool)
    table[[version for version in wanted if 0 <= version < 3]] = True
    return lambda dimensions, numbers: table[ip_versions(dimensions, numbers)]


def ip_versions(dimensions: Dimensions, numbers: AnyArray) -> AnyArray:
    """flow.IPVersion of pairs: 0 no IP, 1 IPv4, 2 IPv6."""
    hi, lo = dimensions.pairs["s_hi"][numbers], dimensions.pairs["s_lo"][numbers]
    return np.where(
        (hi == 0) & (lo == 0), 0, np.where((hi == 0) & (lo >> np.uint64(32) == 0xFFFF), 1, 2)
    )


assert V4_PREFIX == 0xFFFF << 32


def _interface(spec: FilterSpec) -> Condition:
    def condition(dimensions: Dimensions, numbers: AnyArray) -> Mask:
        index = dimensions.pairs["ifindex"][numbers]
        names = dimensions.pairs["interface"][numbers]
        found = np.zeros(len(numbers), bool)
        for one in spec.interface:
            fits = np.ones(len(numbers), bool) if not one.index else index == one.index
            if one.name:
                named = np.array([name == one.name for name in dimensions.strings], bool)
                fits = fits & named[names]
            found |= fits
        return np.asarray(found & ((index != 0) | (names != 0)))

    return condition


def _by_value(
    column: str, pool: Callable[[Dimensions], Sequence[T]], test: Callable[[T], bool]
) -> Condition:
    """A test of what a number in a column of pairs stands for, once a value."""

    def condition(dimensions: Dimensions, numbers: AnyArray) -> Mask:
        values = pool(dimensions)
        wanted = dimensions.pairs[column][numbers]
        if len(numbers) >= len(values):
            # Most of the pool are its zero when few are in use: ask once.
            zero = values[0]
            none = test(zero)
            table = np.array([none if v is zero else test(v) for v in values], bool)
            return np.asarray(table[wanted])
        distinct, inverse = np.unique(wanted, return_inverse=True)
        return np.array([test(values[n]) for n in distinct.tolist()], bool)[inverse]

    return condition


def _every(tests: list[Callable[[Party], bool]]) -> Callable[[Party], bool]:
    return lambda party: all(test(party) for test in tests)


def _pods(patterns: list[Callable[[str, str], bool]]) -> Callable[[Party], bool]:
    return lambda party: any(pattern(party.namespace, party.name) for pattern in patterns)


def _labelled(match: Callable[[tuple[str, ...]], bool]) -> Callable[[Party], bool]:
    return lambda party: match(party.labels)


def _workloads(wanted: Iterable[tuple[str, str]]) -> Callable[[Party], bool]:
    return lambda party: any(
        (not name or name == own.name) and (not kind or kind == own.kind)
        for name, kind in wanted
        for own in party.workloads
    )


def _clusters(wanted: frozenset[str]) -> Callable[[Party], bool]:
    return lambda party: party.cluster in wanted


def _any_name(patterns: list[Callable[[str], bool]]) -> Callable[[tuple[str, ...]], bool]:
    return lambda names: any(pattern(_bare(name)) for name in names for pattern in patterns)


def _any_service(
    patterns: list[Callable[[str, str], bool]],
) -> Callable[[tuple[str, str]], bool]:
    return lambda own: any(pattern(*own) for pattern in patterns)


def _name_pattern(field_name: str, text: str) -> Callable[[str, str], bool]:
    """namespace/prefix; without a slash, in namespace default."""
    if not text:
        raise FilterInvalid(
            f"{field_name}: an empty name", cure="Write namespace/name, namespace/ or /name"
        )
    namespace, slash, prefix = text.partition("/")
    if not slash:
        namespace, prefix = "default", text
    return lambda own_namespace, own_name: (
        bool(own_namespace or own_name)
        and (not namespace or own_namespace == namespace)
        and own_name.startswith(prefix)
    )


def _bare(name: str) -> str:
    return name.lower().removesuffix(".")


def _fqdn(field_name: str, text: str) -> Callable[[str], bool]:
    pattern = text.strip().removesuffix(".").lower()
    if not _FQDN.match(pattern):
        raise FilterInvalid(
            f"{field_name}: {text[:64]!r} is no pattern of a DNS name",
            cure="Use letters, digits, - . _ and * for any run of them",
        )
    return _glob(pattern)


def _glob(pattern: str) -> Callable[[str], bool]:
    if "*" not in pattern:
        return lambda name: name == pattern
    if len(pattern) > MAX_REGEX:
        raise FilterInvalid(f"a pattern of {len(pattern)} characters is too long")
    compiled = re2.compile(
        "^" + "[-.0-9a-z]*".join(re2.escape(part) for part in pattern.split("*")) + "$"
    )
    return lambda name: compiled.search(name) is not None


def _node_pattern(text: str) -> Callable[[str], bool]:
    """[cluster/]node, either with `*`; an empty part stands for any."""
    if text.count("/") > 1:
        raise FilterInvalid(
            f"node_name: {text[:64]!r} has more than one slash", cure="Write cluster/node"
        )
    cluster_text, slash, node_text = text.strip().partition("/")
    if not slash:
        cluster_text, node_text = "", cluster_text
    parts = []
    for part in (cluster_text, node_text):
        part = part.strip().lower().removesuffix(".")
        if part and not _FQDN.match(part):
            raise FilterInvalid(
                f"node_name: {text[:64]!r} is no pattern of a node's name",
                cure="Use letters, digits, - . _ and * for any run of them",
            )
        parts.append(_glob(part) if part else None)

    def matches(name: str) -> bool:
        cluster, slash, node = name.lower().partition("/")
        if not slash:
            cluster, node = "default", cluster
        return (parts[0] is None or parts[0](cluster)) and (parts[1] is None or parts[1](node))

    return matches


def _port(field_name: str, text: str) -> int:
    if text.isascii() and text.isdigit() and len(text) <= 5 and int(text) <= 65535:
        return int(text)
    raise FilterInvalid(
        f"{field_name}: {text[:32]!r} is no port", cure="Give one number from 0 to 65535 a value"
    )


def _in_column(column: str, ports: list[int]) -> RowCondition:
    if len(ports) == 1:
        port = ports[0]
        return lambda rows: np.asarray(rows.columns[column] == port)
    table = np.zeros(65536, bool)
    table[ports] = True
    return lambda rows: np.asarray(table[rows.columns[column]])


def _protocol(texts: tuple[str, ...]) -> RowCondition:
    table = np.zeros(256, bool)
    kinds: set[int] = set()
    for text in texts:
        name = text.lower()
        if name in _PROTOCOLS:
            table[list(_PROTOCOLS[name])] = True
        elif name in _L7_PROTOCOLS:
            kinds.add(int(_L7_PROTOCOLS[name]))
        else:
            raise FilterInvalid(
                f"protocol: {text[:32]!r} is not known",
                cure=f"Use one of {', '.join((*_PROTOCOLS, *_L7_PROTOCOLS))}",
            )
    lut = _Lut(_proto(table))

    def condition(rows: Rows) -> Mask:
        found = lut(rows.dimensions, rows.columns["meta"], pairs=False)
        if kinds:
            l7 = rows.columns["l7"]
            have = np.flatnonzero(l7)
            found = found.copy()
            found[have] |= np.isin(rows.dimensions.l7["kind"][l7[have]], list(kinds))
        return found

    return condition


def _records(kind: L7Kind | None, test: Callable[[L7Record], bool]) -> RowCondition:
    def condition(rows: Rows) -> Mask:
        l7 = rows.columns["l7"]
        found = np.zeros(len(rows), bool)
        have = np.flatnonzero(l7)
        if kind is not None and len(have):
            have = have[rows.dimensions.l7["kind"][l7[have]] == kind]
        records = rows.dimensions.records
        found[have] = [test(records[number]) for number in l7[have].tolist()]
        return found

    return condition


def _http(test: Callable[[Http], bool]) -> RowCondition:
    return _records(
        L7Kind.HTTP, lambda record: isinstance(record.record, Http) and test(record.record)
    )


def _memo(key: Callable[[Http], str], test: Callable[[str], bool]) -> Callable[[Http], bool]:
    known: dict[str, bool] = {}

    def remembered(record: Http) -> bool:
        text = key(record)
        answer = known.get(text)
        if answer is None:
            if len(known) > 65536:
                known.clear()
            answer = known[text] = test(text)
        return answer

    return remembered


def _status(texts: tuple[str, ...]) -> RowCondition:
    table = np.zeros(1 << 16, bool)
    for text in texts:
        if not _STATUS.match(text):
            raise FilterInvalid(
                f"http_status_code: {text[:32]!r} is neither a code nor a prefix",
                cure="Write 404, 40+ or 4+",
            )
        if text.endswith("+"):
            width = 10 ** (4 - len(text))
            first = int(text[:-1]) * width
            table[first : first + width] = True
        else:
            table[int(text)] = True

    def condition(rows: Rows) -> Mask:
        l7 = rows.columns["l7"]
        columns = rows.dimensions.l7
        is_http = (columns["kind"][l7] == L7Kind.HTTP) & (l7 != 0)
        return np.asarray(is_http & table[columns["code"][l7]])

    return condition


def _path_search(expressions: list[Any]) -> Callable[[str], bool]:
    def search(url: str) -> bool:
        try:
            path = urlsplit(url).path
        except ValueError:
            return False
        return any(expression.search(path) for expression in expressions)

    return search


def _regexes(name: str, texts: tuple[str, ...]) -> list[Any]:
    options = re2.Options()
    options.log_errors = False
    options.max_mem = 1 << 20
    made = []
    for text in texts:
        if len(text) > MAX_REGEX:
            raise FilterInvalid(
                f"{name}: an expression of {len(text)} characters is too long",
                cure=f"At most {MAX_REGEX}",
            )
        try:
            made.append(re2.compile(text, options=options))
        except re2.error as error:
            raise FilterInvalid(
                f"{name}: {text[:64]!r} is no regular expression of RE2: {error}"
            ) from error
    return made
