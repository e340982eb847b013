"""Flows as messages of GetFlows, thousands at once.

A message is three pieces, and a fourth with L7:

    prefix, time, node, uuid, ports │ verdict, type, flags, policies │ source, destination … │ L7
      one width, filled by columns  │      one a meta, kept          │   one a pair, kept    │

The pieces of a meta or a pair are made when a flow with it is first sent, and live as long as the
number stands for the same. What comes out is framed as gRPC wants it (a zero, four bytes of length)
and ready to be cut anywhere into frames of HTTP/2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from socket import AF_INET6, inet_ntop
from typing import Any, Final

import numpy as np

from services.flows import wire
from services.flows.dimensions import (
    EVENT_L7,
    ICMP,
    ICMPV6,
    REPLY_UNKNOWN,
    REPLY_YES,
    SCTP,
    TCP,
    UDP,
    Dimensions,
)
from services.flows.fieldmask import EVERYTHING, FieldMask, Tree, below, has, pick
from services.flows.interning import I64, AnyArray
from services.flows.l7 import Dns, Http, Kafka, L7Record
from services.flows.rows import Rows
from services.flows.summary import icmp_summary, l7_summary, tcp_summary
from services.flows.uuids import format_uuid, run_text
from services.flows.world import Party, PolicyRef

_SECOND: Final = 1_000_000_000
_KEEP_PAIRS: Final = 1 << 17  # pieces of pairs kept, of some 600 bytes each
_KEEP_MASKS: Final = 16

# flow.Layer4: the tag of each protocol's message. The first two fields of all of them are small
# numbers, so one shape does for ports and for types and codes.
_L4_TAGS: Final = {TCP: 0x0A, UDP: 0x12, ICMP: 0x1A, ICMPV6: 0x22, SCTP: 0x2A}
_L4_NAMES: Final = {TCP: "TCP", UDP: "UDP", ICMP: "ICMPv4", ICMPV6: "ICMPv6", SCTP: "SCTP"}
_L4_FIELDS: Final = {TCP: 1, UDP: 2, ICMP: 3, ICMPV6: 4, SCTP: 5}
_L4_TAG = np.zeros(256, np.uint8)
for _proto, _value in _L4_TAGS.items():
    _L4_TAG[_proto] = _value
# In place of a missing l4: the deprecated `reply` is false, four times. A default leaves no trace.
_NO_L4: Final = np.frombuffer(b"\x80\x01\x00" * 4, "V12")

_HEX: Final = np.array([int.from_bytes(b"%02x" % n, "little") for n in range(256)], "<u2")
_U16: Final = np.array(
    [(n & 127 | 128) | ((n >> 7 & 127) | 128) << 8 | (n >> 14) << 16 for n in range(65536)], "<u4"
)  # a varint of three bytes


@dataclass(slots=True)
class _Pieces:
    """What was made of one source's dimensions under one mask."""

    metas: dict[int, bytes] = field(default_factory=dict)
    meta_seen: AnyArray = field(default_factory=lambda: np.zeros(0, np.uint64))
    meta_size: AnyArray = field(default_factory=lambda: np.zeros(0, np.int64))
    pairs: dict[int, bytes] = field(default_factory=dict)
    pair_seen: AnyArray = field(default_factory=lambda: np.zeros(0, np.uint64))
    pair_size: AnyArray = field(default_factory=lambda: np.zeros(0, np.int64))
    parties: dict[int, tuple[Party, bytes, bytes]] = field(default_factory=dict)


class _Template:
    """The piece of one width: where in it which column goes."""

    def __init__(self, node: str, run: int, tree: Tree | None) -> None:
        self._bytes = bytearray()
        self._fields: list[tuple[str, Any, int]] = []
        name = node.encode()
        self.time = has(tree, "time") and below(tree, "time") is None
        self.uuid = has(tree, "uuid")
        self.l4 = has(tree, "l4") and below(tree, "l4") is None
        self._put(b"\0")
        self._hole("size", ">u4")
        self.prefix = len(self._bytes)
        if self.time:
            self._put(wire.tag(1001, 2) + b"\x0c\x08")
            self._varint5("seconds")
            self._put(b"\x10")
            self._varint5("nanos")
        self._put(wire.data(1000, name))
        self._put(wire.tag(1, 2))
        self._hole("flow_size", "<u2")
        self._hole("flow_size_top", "u1")
        self.flow = len(self._bytes)
        if self.time:
            self._put(wire.tag(1, 2) + b"\x0c\x08")
            self._varint5("seconds2")
            self._put(b"\x10")
            self._varint5("nanos2")
        if has(tree, "node_name"):
            self._put(wire.data(11, name))
        if self.uuid:
            self._put(wire.tag(34, 2) + b"\x24" + run_text(run).encode())
            self._hole("n1", "u1")
            self._hole("n2", "<u2")
            self._put(b"-")
            self._hole("n4", "<u4")
            self._hole("n8", "<u4")
            self._hole("n12", "<u4")
        if self.l4:
            self._fields.append(("l4", "V12", len(self._bytes)))
            self._put(wire.tag(6, 2) + b"\x0a")
            self._hole("protocol", "u1")
            self._put(b"\x08\x08")
            for name_ in ("sport", "dport"):
                self._hole(name_, "<u2")
                self._hole(f"{name_}_top", "u1")
                if name_ == "sport":
                    self._put(b"\x10")
        self.width = len(self._bytes)
        self.dtype = np.dtype(
            {
                "names": [name for name, _, _ in self._fields],
                "formats": [kind for _, kind, _ in self._fields],
                "offsets": [at for _, _, at in self._fields],
                "itemsize": self.width,
            }
        )
        self.blank = np.frombuffer(bytes(self._bytes), f"V{self.width}")

    def _put(self, piece: bytes) -> None:
        self._bytes += piece

    def _hole(self, name: str, kind: str) -> None:
        self._fields.append((name, kind, len(self._bytes)))
        self._bytes += bytes(np.dtype(kind).itemsize)

    def _varint5(self, name: str) -> None:
        self._hole(name, "<u4")
        self._hole(f"{name}_top", "u1")


class Encoder:
    """Encodes under one field mask. Call it before the rows' dimensions change."""

    def __init__(self, mask: FieldMask = EVERYTHING) -> None:
        self.mask = mask
        self._tree = mask.tree()
        self._templates: dict[tuple[str, int], _Template] = {}
        tree = self._tree
        self._slow = (has(tree, "time") and below(tree, "time") is not None) or (
            has(tree, "l4") and below(tree, "l4") is not None
        )

    # ---- what callers want

    def encode(self, rows: Rows) -> bytes:
        """GetFlowsResponse messages, framed for gRPC, one after the other."""
        return b"".join(self._pieces_of(rows))

    def messages(self, rows: Rows) -> list[bytes]:
        """The same, each by itself and without frames."""
        pieces = self._pieces_of(rows)
        template = self._template(rows)
        return [
            fixed[template.prefix :] + meta + pair
            for fixed, meta, pair in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True)
        ]

    def flows(self, rows: Rows) -> list[bytes]:
        """The flows alone: messages of flow.Flow."""
        pieces = self._pieces_of(rows)
        template = self._template(rows)
        return [
            fixed[template.flow :] + meta + pair
            for fixed, meta, pair in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True)
        ]

    # ---- how

    def _template(self, rows: Rows) -> _Template:
        key = (rows.dimensions.node_name, rows.run)
        template = self._templates.get(key)
        if template is None:
            if len(self._templates) > 1024:
                self._templates.clear()
            template = self._templates[key] = _Template(*key, self._tree)
        return template

    def _kept(self, dimensions: Dimensions) -> _Pieces:
        masks: dict[tuple[str, ...], _Pieces] = dimensions.cache.setdefault("encoder", {})
        kept = masks.pop(self.mask.paths, None)
        if kept is None:
            kept = _Pieces()
            while len(masks) >= _KEEP_MASKS:
                del masks[next(iter(masks))]
        masks[self.mask.paths] = kept  # the last one used is the last to go
        return kept

    def _pieces_of(self, rows: Rows) -> list[bytes]:
        dimensions = rows.dimensions
        kept = self._kept(dimensions)
        meta, pair = rows.columns["meta"], rows.columns["pair"]
        kept.meta_seen, kept.meta_size = _fresh(
            meta, dimensions.meta_born, kept.meta_seen, kept.meta_size, kept.metas,
            lambda number: self._meta(dimensions, number),
        )  # fmt: skip
        if len(kept.pairs) > _KEEP_PAIRS:
            kept.pairs.clear()
            kept.parties.clear()
            kept.pair_seen[:] = 0
        kept.pair_seen, kept.pair_size = _fresh(
            pair, dimensions.pair_born, kept.pair_seen, kept.pair_size, kept.pairs,
            lambda number: self._pair(dimensions, kept, number),
        )  # fmt: skip
        sizes = kept.meta_size[meta] + kept.pair_size[pair]
        pieces: list[bytes] = [b""] * (3 * len(rows))
        pieces[1::3] = map(kept.metas.__getitem__, meta.tolist())
        pieces[2::3] = map(kept.pairs.__getitem__, pair.tolist())
        l7 = rows.columns["l7"]
        for at in np.flatnonzero(l7).tolist():
            more = self._l7(dimensions.records[int(l7[at])])
            pieces[3 * at + 2] += more
            sizes[at] += len(more)
        if self._slow:
            for at, more in enumerate(self._partial(rows)):
                pieces[3 * at + 2] += more
                sizes[at] += len(more)
        pieces[::3] = self._fixed(rows, sizes).tolist()
        return pieces

    def _fixed(self, rows: Rows, sizes: I64) -> AnyArray:
        template = self._template(rows)
        count = len(rows)
        made = np.empty(count, template.blank.dtype)
        made[:] = template.blank
        out = made.view(template.dtype)
        if template.time:
            seconds = rows.times // _SECOND
            nanos = rows.times - seconds * _SECOND
            for name, value in (("seconds", seconds), ("nanos", nanos)):
                low, top = _varint5(value)
                out[name] = out[f"{name}2"] = low
                out[f"{name}_top"] = out[f"{name}2_top"] = top
        if template.uuid:
            digits = _HEX[rows.numbers.astype(">u8").view(np.uint8).reshape(count, 8)]
            out["n1"] = digits.view(np.uint8)[:, 1]
            out["n2"] = digits[:, 1]
            words = digits.view("<u4")
            out["n4"], out["n8"], out["n12"] = words[:, 1], words[:, 2], words[:, 3]
        if template.l4:
            metas = rows.dimensions.metas
            tags = _L4_TAG[metas["proto"][rows.columns["meta"]]]
            out["protocol"] = tags
            for name in ("sport", "dport"):
                coded = _U16[rows.columns[name]]
                out[name] = coded.astype("<u2")
                out[f"{name}_top"] = (coded >> 16).astype(np.uint8)
            if not tags.all():
                out["l4"][tags == 0] = _NO_L4
        flow = sizes + (template.width - template.flow)
        if len(flow) and int(flow.max()) >= 1 << 21:
            raise ValueError("a flow of 2 MiB")  # records are bounded where they come in
        out["flow_size"] = (flow & 127 | 128 | (flow >> 7 & 127 | 128) << 8).astype("<u2")
        out["flow_size_top"] = flow >> 14
        out["size"] = sizes + (template.width - template.prefix)
        return made

    def _partial(self, rows: Rows) -> list[bytes]:
        """Time and l4 where only parts of them are asked for."""
        tree = self._tree
        assert tree is not None
        made = [b""] * len(rows)
        if tree.get("time") is not None:
            for at, time_ns in enumerate(rows.times.tolist()):
                seconds, nanos = divmod(time_ns, _SECOND)
                body = pick(
                    tree["time"],
                    (("seconds", wire.uint(1, seconds)), ("nanos", wire.uint(2, nanos))),
                )
                made[at] = wire.data(1, body)
        if tree.get("l4") is not None:
            l4 = tree["l4"]
            columns = rows.columns
            protos = rows.dimensions.metas["proto"][columns["meta"]].tolist()
            for at, (proto, sport, dport) in enumerate(
                zip(protos, columns["sport"].tolist(), columns["dport"].tolist(), strict=True)
            ):
                name = _L4_NAMES.get(proto, "")
                if not name or not has(l4, name):
                    continue
                first, second = (
                    ("type", "code")
                    if proto in (ICMP, ICMPV6)
                    else ("source_port", "destination_port")
                )
                ports = pick(
                    below(l4, name), ((first, wire.uint(1, sport)), (second, wire.uint(2, dport)))
                )
                under = below(l4, name)
                # The flags come with the meta.
                if under is None or first in under or second in under:
                    made[at] += wire.data(6, wire.data(_L4_FIELDS[proto], ports))
        return made

    # ---- pieces

    def _meta(self, dimensions: Dimensions, number: int) -> bytes:
        meta = {name: int(column[number]) for name, column in dimensions.metas.items()}
        tree = self._tree
        l7 = meta["type"] == EVENT_L7
        drop = meta["drop"]
        fields = [
            ("verdict", wire.uint(2, meta["verdict"])),
            ("drop_reason", wire.uint(3, drop)),
            ("drop_reason_desc", wire.uint(25, drop)),
            ("Type", wire.uint(10, 2 if l7 else 1)),
            ("traffic_direction", wire.uint(22, meta["direction"])),
            ("policy_match_type", wire.uint(23, meta["match"])),
            ("trace_observation_point", wire.uint(24, meta["observation"])),
            ("trace_reason", wire.uint(36, meta["reason"])),
            ("proxy_port", wire.uint(29, meta["proxy_port"])),
            ("reply", wire.uint(16, int(meta["reply"] == REPLY_YES))),
        ]
        if has(tree, "event_type"):
            kind = pick(
                below(tree, "event_type"),
                (("type", wire.uint(1, meta["type"])), ("sub_type", wire.uint(2, meta["sub"]))),
            )
            fields.append(("event_type", wire.data(19, kind)))
        if has(tree, "is_reply") and meta["reply"] != REPLY_UNKNOWN:
            value = wire.uint(1, int(meta["reply"] == REPLY_YES))
            body = pick(below(tree, "is_reply"), [("value", value)])
            fields.append(("is_reply", wire.data(26, body)))
        if meta["proto"] == TCP and not l7 and has(tree, "l4"):
            fields.append(("l4", _tcp_flags(meta["tcp_flags"], below(tree, "l4"))))
        if not l7:
            fields.append(("Summary", wire.text(100000, _summary(meta))))
        policies = dimensions.policies[meta["policies"]]
        if policies:
            name, field_number = _POLICY_FIELDS[meta["direction"] == 2, bool(meta["denied"])]
            fields.append((name, b"".join(_policy(field_number, ref) for ref in policies)))
        return pick(tree, fields)

    def _pair(self, dimensions: Dimensions, kept: _Pieces, number: int) -> bytes:
        pair = dimensions.pairs
        tree = self._tree
        fields = []
        for name, at in (("source", "src"), ("destination", "dst")):
            if has(tree, name):
                side = int(pair[at][number])
                fields.append((name, self._party(dimensions, kept, side, name)))
        if has(tree, "IP"):
            fields.append(("IP", _ip(pair, number, below(tree, "IP"))))
        if has(tree, "ethernet"):
            smac, dmac = pair["smac"][number].tobytes(), pair["dmac"][number].tobytes()
            if any(smac) or any(dmac):
                macs = pick(
                    below(tree, "ethernet"),
                    (
                        ("source", wire.text(1, smac.hex(":"))),
                        ("destination", wire.text(2, dmac.hex(":"))),
                    ),
                )
                fields.append(("ethernet", wire.data(4, macs)))
        index, interface = int(pair["ifindex"][number]), int(pair["interface"][number])
        if (index or interface) and has(tree, "interface"):
            body = pick(
                below(tree, "interface"),
                (
                    ("index", wire.uint(1, index)),
                    ("name", wire.text(2, dimensions.strings[interface])),
                ),
            )
            fields.append(("interface", wire.data(28, body)))
        for name, at, number_ in (
            ("source_names", "src_names", 13),
            ("destination_names", "dst_names", 14),
        ):
            names = dimensions.names[int(pair[at][number])]
            fields.append((name, wire.texts(number_, names)))
        for name, at, number_ in (
            ("source_service", "src_service", 20),
            ("destination_service", "dst_service", 21),
        ):
            service = int(pair[at][number])
            if service and has(tree, name):
                namespace, own = dimensions.services[service]
                body = pick(
                    below(tree, name),
                    (("name", wire.text(1, own)), ("namespace", wire.text(2, namespace))),
                )
                fields.append((name, wire.data(number_, body)))
        return pick(tree, fields)

    def _party(self, dimensions: Dimensions, kept: _Pieces, number: int, side: str) -> bytes:
        party = dimensions.parties[number]
        known = kept.parties.get(number)
        if known is None or known[0] is not party:
            known = kept.parties[number] = (
                party,
                self._endpoint(party, "source", 8),
                self._endpoint(party, "destination", 9),
            )
        return known[1] if side == "source" else known[2]

    def _endpoint(self, party: Party, side: str, number: int) -> bytes:
        if not has(self._tree, side):
            return b""
        fields = (
            ("ID", wire.uint(1, party.ep_id)),
            ("identity", wire.uint(2, party.identity)),
            ("namespace", wire.text(3, party.namespace)),
            ("labels", wire.texts(4, party.labels)),
            ("pod_name", wire.text(5, party.name)),
            (
                "workloads",
                b"".join(
                    wire.data(6, wire.text(1, own.name) + wire.text(2, own.kind))
                    for own in party.workloads
                ),
            ),
            ("cluster_name", wire.text(7, party.cluster)),
        )
        under = below(self._tree, side)
        return wire.data(number, pick(under, fields))

    def _l7(self, record: L7Record) -> bytes:
        tree = self._tree
        fields = [("Summary", wire.text(100000, l7_summary(record)))]
        if record.trace_id and has(tree, "trace_context"):
            under = below(tree, "trace_context")
            parent = below(under, "parent")
            body = wire.data(1, pick(parent, [("trace_id", wire.text(1, record.trace_id))]))
            fields.append(("trace_context", wire.data(30, pick(under, [("parent", body)]))))
        if has(tree, "l7"):
            under = below(tree, "l7")
            body = pick(
                under,
                (
                    ("type", wire.uint(1, record.type)),
                    ("latency_ns", wire.uint(2, record.latency_ns)),
                    *_l7_record(record, under),
                ),
            )
            if body or under is None or not {"type", "latency_ns"}.isdisjoint(under):
                fields.append(("l7", wire.data(15, body)))
        return pick(tree, fields)


_POLICY_FIELDS: Final = {
    # (egress, denied)
    (True, False): ("egress_allowed_by", 21001),
    (False, False): ("ingress_allowed_by", 21002),
    (True, True): ("egress_denied_by", 21004),
    (False, True): ("ingress_denied_by", 21005),
}


def _fresh(
    numbers: AnyArray,
    born: AnyArray,
    seen: AnyArray,
    size: AnyArray,
    pieces: dict[int, bytes],
    make: Callable[[int], bytes],
) -> tuple[AnyArray, AnyArray]:
    """Makes the pieces of those that are not there, or that stand for something else by now."""
    if len(seen) < len(born):
        longer, longer_size = np.zeros(len(born), np.uint64), np.zeros(len(born), np.int64)
        longer[: len(seen)], longer_size[: len(size)] = seen, size
        seen, size = longer, longer_size
    stale = numbers[seen[numbers] != born[numbers]]
    if len(stale):
        for number in np.unique(stale).tolist():
            piece = pieces[number] = make(number)
            size[number] = len(piece)
            seen[number] = born[number]
    return seen, size


def _varint5(value: I64) -> tuple[AnyArray, AnyArray]:
    """Varints of five bytes, of numbers below 2^35: the lower four bytes, and the last."""
    value = value.astype(np.uint64)
    low = value & 127 | 128
    for at in (1, 2, 3):
        low |= (value >> np.uint64(7 * at) & 127 | 128) << np.uint64(8 * at)
    return low.astype("<u4"), (value >> np.uint64(28)).astype(np.uint8)


def _tcp_flags(flags: int, tree: Tree | None) -> bytes:
    if not has(tree, "TCP"):
        return b""
    tcp = below(tree, "TCP")
    if not has(tcp, "flags"):
        return b""
    names = ("FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR")
    under = below(tcp, "flags")
    body = pick(
        under,
        [(name, wire.uint(bit + 1, flags >> bit & 1)) for bit, name in enumerate(names)],
    )
    return wire.data(6, wire.data(1, wire.data(3, body)))


def _summary(meta: dict[str, int]) -> str:
    match meta["proto"]:
        case 6:  # TCP
            return tcp_summary(meta["tcp_flags"])
        case 17:  # UDP
            return "UDP"
        case 132:  # SCTP
            return "SCTP"
        case 1 | 58:  # ICMP, ICMPv6
            return icmp_summary(meta["proto"] == ICMPV6, meta["icmp"] >> 8, meta["icmp"] & 255)
        case _:
            return ""


def _policy(number: int, ref: PolicyRef) -> bytes:
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
    return wire.data(
        number,
        wire.text(1, ref.name)
        + wire.text(2, ref.namespace)
        + wire.texts(3, labels)
        + wire.text(5, ref.kind),
    )


def address_text(high: int, low: int) -> str:
    """As Go and RFC 5952 write it; empty for none."""
    if not high and not low:
        return ""
    if not high and low >> 32 == 0xFFFF:
        return f"{low >> 24 & 255}.{low >> 16 & 255}.{low >> 8 & 255}.{low & 255}"
    return inet_ntop(AF_INET6, high.to_bytes(8, "big") + low.to_bytes(8, "big"))


def _ip(pair: Any, number: int, tree: Tree | None) -> bytes:
    high, low = int(pair["s_hi"][number]), int(pair["s_lo"][number])
    source = address_text(high, low)
    if not source:
        return b""
    version = 1 if not high and low >> 32 == 0xFFFF else 2
    destination = address_text(int(pair["d_hi"][number]), int(pair["d_lo"][number]))
    fields = (
        ("source", wire.text(1, source)),
        ("destination", wire.text(2, destination)),
        ("ipVersion", wire.uint(3, version)),
    )
    return wire.data(5, pick(tree, fields))


def _l7_record(record: L7Record, tree: Tree | None) -> Sequence[tuple[str, bytes]]:
    own = record.record
    match own:
        case Http():
            if not has(tree, "http"):
                return ()
            headers = b"".join(
                wire.data(5, wire.text(1, key) + wire.text(2, value)) for key, value in own.headers
            )
            body = pick(
                below(tree, "http"),
                (
                    ("code", wire.uint(1, own.code)),
                    ("method", wire.text(2, own.method)),
                    ("url", wire.text(3, own.url)),
                    ("protocol", wire.text(4, own.protocol)),
                    ("headers", headers),
                ),
            )
            return (("http", wire.data(101, body)),)
        case Dns():
            if not has(tree, "dns"):
                return ()
            body = pick(
                below(tree, "dns"),
                (
                    ("query", wire.text(1, own.query)),
                    ("ips", wire.texts(2, own.ips)),
                    ("ttl", wire.uint(3, own.ttl)),
                    ("cnames", wire.texts(4, own.cnames)),
                    ("observation_source", wire.text(5, own.observation_source)),
                    ("rcode", wire.uint(6, own.rcode)),
                    ("qtypes", wire.texts(7, own.qtypes)),
                    ("rrtypes", wire.texts(8, own.rrtypes)),
                ),
            )
            return (("dns", wire.data(100, body)),)
        case Kafka():
            if not has(tree, "kafka"):
                return ()
            wide = 1 << 64
            body = pick(
                below(tree, "kafka"),
                (
                    ("error_code", wire.uint(1, own.error_code % wide)),
                    ("api_version", wire.uint(2, own.api_version % wide)),
                    ("api_key", wire.text(3, own.api_key)),
                    ("correlation_id", wire.uint(4, own.correlation_id % wide)),
                    ("topic", wire.text(5, own.topic)),
                ),
            )
            return (("kafka", wire.data(102, body)),)


def uuid_of(rows: Rows, at: int) -> str:
    return format_uuid(rows.run, int(rows.numbers[at]))
