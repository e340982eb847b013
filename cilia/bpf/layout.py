"""The structures of bpf/lib/types.h as numpy dtypes, and the check that both agree.

Field names are the header's. Two shapes need a word:

- `union addr` is 16 raw bytes (`V16`): assign `to_addr(ip)`, read with `from_addr(row["saddr"])`.
- the last byte of `struct policy_key` holds two bit fields; here it is one byte, `l4_plen_egress`,
  made by `plen_egress()` and taken apart by `split_plen_egress()`.

Fields named *_be are big-endian dtypes: numbers read from and written to them are in host order.
Beware of np.concatenate and np.stack, which make them native unless told `dtype=`: Map refuses
such rows.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from cilia.bpf import btf as _btf
from cilia.bpf.errors import LayoutError

if TYPE_CHECKING:
    from cilia.bpf.btf import Btf

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

ADDR: Final = np.dtype("V16")
MAC: Final = np.dtype("V6")

ENDPOINT: Final = np.dtype(
    [
        ("ifindex", "u4"),
        ("identity", "u4"),
        ("policy_slot", "u4"),
        ("id", "u2"),
        ("flags", "u2"),
        ("mac", MAC),
        ("node_mac", MAC),
        ("pad", "u4"),
        ("ip4", ADDR),
        ("ip6", ADDR),
    ]
)
IPCACHE_KEY: Final = np.dtype([("prefixlen", "u4"), ("addr", ADDR)])
IPCACHE_VALUE: Final = np.dtype(
    [("identity", "u4"), ("tunnel_be", ">u4"), ("flags", "u4"), ("pad", "u4")]
)
POLICY_KEY: Final = np.dtype(
    [("identity", "u4"), ("dport_be", ">u2"), ("proto", "u1"), ("l4_plen_egress", "u1")]
)
POLICY_VALUE: Final = np.dtype(
    [
        ("rule_id", "u4"),
        ("proxy_port_be", ">u2"),
        ("flags", "u1"),
        ("pad", "u1"),
        ("hits", "u8"),
    ]
)
POLICY_META: Final = np.dtype(
    [("rev", "u4"), ("flags", "u4"), ("plens_id", "u4", 2), ("plens_any", "u4", 2)]
)
CT_KEY: Final = np.dtype(
    [
        ("lo", ADDR),
        ("hi", ADDR),
        ("lo_port_be", ">u2"),
        ("hi_port_be", ">u2"),
        ("proto", "u1"),
        ("scope", "u1"),
        ("pad", "u2"),
    ]
)
CT_SIDE: Final = np.dtype(
    [("policy_rev", "u4"), ("remote_id", "u4"), ("epoch", "u4"), ("rule_id", "u4")]
)
CT_ENTRY: Final = np.dtype(
    [
        ("side", CT_SIDE, 2),
        ("packets", "u8", 2),
        ("bytes", "u8", 2),
        ("expires_s", "u4"),
        ("last_report_s", "u4", 2),
        ("report_flags", "u1", 2),
        ("seen", "u1", 2),
        ("nat_addr", ADDR),
        ("nat_port_be", ">u2"),
        ("proxy_port_be", ">u2"),
        ("flags", "u1"),
        ("pad", "u1"),
        ("proxy_port1_be", ">u2"),
    ]
)
NAT_KEY: Final = np.dtype(
    [
        ("remote", ADDR),
        ("local", ADDR),
        ("remote_port_be", ">u2"),
        ("local_port_be", ">u2"),
        ("proto", "u1"),
        ("pad", "u1", 3),
    ]
)
NAT_VALUE: Final = np.dtype(
    [("addr", ADDR), ("port_be", ">u2"), ("pad", "u2"), ("expires_s", "u4")]
)
DEVICE: Final = np.dtype([("ip4", ADDR), ("ip6", ADDR), ("mac", MAC), ("flags", "u2")])
FRAG_KEY: Final = np.dtype(
    [("saddr", ADDR), ("daddr", ADDR), ("id_be", ">u4"), ("proto", "u1"), ("pad", "u1", 3)]
)
FRAG_RANGE: Final = np.dtype([("start", "u2"), ("end", "u2")])
FRAG_VALUE: Final = np.dtype(
    [
        ("sport_be", ">u2"),
        ("dport_be", ">u2"),
        ("first_end", "u2"),
        ("contig_end", "u2"),
        ("expires_s", "u4"),
        ("island", FRAG_RANGE, 4),
        ("proto", "u1"),
        ("flags", "u1"),
        ("pad", "u2"),
    ]
)
RUNTIME: Final = np.dtype(
    [
        ("ipcache_epoch", "u4"),
        ("flags", "u4"),
        ("aggregation", "u4"),
        ("report_interval_s", "u4"),
        ("ct_tcp_s", "u4"),
        ("ct_tcp_syn_s", "u4"),
        ("ct_tcp_fin_s", "u4"),
        ("ct_any_s", "u4"),
        ("boot_offset_ns", "u8"),
        ("host_ifindex", "u4"),
        ("host_mac", "u1", 6),
        ("pad", "u2"),
        ("pad2", "u4"),
    ]
)
PROXY_PAIR: Final = np.dtype([("egress_be", ">u2"), ("ingress_be", ">u2")])
PROXY_LISTENER: Final = np.dtype([("port_be", ">u2"), ("pad", "u2")])
METRIC: Final = np.dtype([("packets", "u8"), ("bytes", "u8")])
EVENT: Final = np.dtype(
    [
        ("time_ns", "u8"),
        ("saddr", ADDR),
        ("daddr", ADDR),
        ("src_identity", "u4"),
        ("dst_identity", "u4"),
        ("rule_id", "u4"),
        ("policy_rev", "u4"),
        ("ifindex", "u4"),
        ("length", "u4"),
        ("verdict", "i4"),
        ("sport_be", ">u2"),
        ("dport_be", ">u2"),
        ("ep_id", "u2"),
        ("peer_ep_id", "u2"),
        ("type", "u1"),
        ("reason", "u1"),
        ("obs_point", "u1"),
        ("direction", "u1"),
        ("proto", "u1"),
        ("tcp_flags", "u1"),
        ("match_type", "u1"),
        ("flags", "u1"),
        ("smac", MAC),
        ("dmac", MAC),
        ("cpu", "u4"),
        ("orig_len", "u4"),
        ("pad", "u1", 20),
        ("_tail", "V4"),
    ]
)
U32: Final = np.dtype("u4")
U64: Final = np.dtype("u8")


def to_addr(ip: IPAddress | str) -> bytes:
    """An address as `union addr`: IPv4 in the mapped form of RFC 4291 section 2.5.5.2."""
    address = ipaddress.ip_address(ip)
    if isinstance(address, ipaddress.IPv4Address):
        return b"\0" * 10 + b"\xff\xff" + address.packed
    return address.packed


def from_addr(raw: Any) -> IPAddress:
    """The address in 16 bytes (bytes, or a field of a row); mapped ones come back as IPv4."""
    packed = bytes(raw)
    if len(packed) != 16:
        raise ValueError(f"an address has 16 bytes, not {len(packed)}")
    if packed.startswith(b"\0" * 10 + b"\xff\xff"):
        return ipaddress.IPv4Address(packed[12:])
    return ipaddress.IPv6Address(packed)


def plen_egress(l4_plen: int, egress: bool) -> int:
    """The byte `l4_plen_egress` of POLICY_KEY (bit fields fill from the low end)."""
    if not 0 <= l4_plen <= 24:
        raise ValueError(f"an L4 prefix has 0 to 24 bits, not {l4_plen}")
    return l4_plen | egress << 7


def split_plen_egress(byte: int) -> tuple[int, bool]:
    """(l4_plen, egress) of the byte `l4_plen_egress`."""
    return int(byte) & 0x7F, bool(int(byte) & 0x80)


class HasBtf(Protocol):
    """What the check needs of an object (cilia.bpf.object.Object)."""

    @property
    def path(self) -> Any: ...
    @property
    def btf(self) -> Btf: ...
    def definitions(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutSet:
    """Which structure has which dtype, and which map has which key and value.

    `bit_fields` names, per structure, the dtype fields that stand for several bit fields of C:
    {struct: {dtype field: ((C name, lowest bit, bits), ...)}}.
    """

    structs: Mapping[str, np.dtype[Any]]
    maps: Mapping[str, tuple[np.dtype[Any], np.dtype[Any]]] = field(default_factory=dict)
    inner_maps: Mapping[str, tuple[np.dtype[Any], np.dtype[Any]]] = field(default_factory=dict)
    bit_fields: Mapping[str, Mapping[str, Sequence[tuple[str, int, int]]]] = field(
        default_factory=dict
    )

    def check(self, obj: HasBtf) -> frozenset[str]:
        """Compare with the object; LayoutError names the first structure and field that differ.

        Structures the object does not use are not in its BTF and are passed over. Returns the names
        of those that were compared.
        """
        subject = str(obj.path)
        checked = set()
        for name, dtype in self.structs.items():
            found = obj.btf.struct(name)
            if found is not None:
                self._check_struct(subject, obj.btf, name, found, dtype)
                checked.add(name)
        definitions = obj.definitions()
        for name, (key, value) in self.maps.items():
            if name in definitions:
                self._check_map(subject, name, definitions[name], key, value)
        for name, (key, value) in self.inner_maps.items():
            if name in definitions and definitions[name].inner is not None:
                self._check_map(subject, f"{name} (inner)", definitions[name].inner, key, value)
        return frozenset(checked)

    @staticmethod
    def _check_map(
        subject: str, name: str, definition: Any, key: np.dtype[Any], value: np.dtype[Any]
    ) -> None:
        for what, got, want in (
            ("key", definition.key_size, key.itemsize),
            ("value", definition.value_size, value.itemsize),
        ):
            if got != want:
                raise LayoutError(
                    subject, f"of map {name}", what, f"{got} bytes in the object, {want} here"
                )

    def _check_struct(
        self, subject: str, btf: Btf, name: str, found: _btf.Type, dtype: np.dtype[Any]
    ) -> None:
        if found.size != dtype.itemsize:
            raise LayoutError(
                subject, name, None, f"{found.size} bytes in the object, {dtype.itemsize} here"
            )
        ours = dict(dtype.fields or {})
        bits = self.bit_fields.get(name, {})
        members = {member.name: member for member in found.members}
        for ours_name, pieces in bits.items():
            offset = ours.pop(ours_name)[1]
            for piece, low, width in pieces:
                member = members.pop(piece, None)
                if member is None:
                    raise LayoutError(subject, name, piece, "not in the object")
                if (member.bit_offset, member.bit_size) != (offset * 8 + low, width):
                    raise LayoutError(
                        subject,
                        name,
                        piece,
                        f"bits {member.bit_offset}+{member.bit_size} in the object, "
                        f"{offset * 8 + low}+{width} here",
                    )
        for member in members.values():
            if member.name not in ours:
                raise LayoutError(subject, name, member.name, "not here")
            ours_type, offset = ours.pop(member.name)[:2]
            if member.bit_size or member.bit_offset != offset * 8:
                raise LayoutError(
                    subject,
                    name,
                    member.name,
                    f"at bit {member.bit_offset} in the object, at byte {offset} here",
                )
            self._check_field(subject, btf, name, member, ours_type)
        for left in ours:
            if not left.startswith("_"):  # padding that the compiler adds has no name in C
                raise LayoutError(subject, name, left, "not in the object")

    @staticmethod
    def _check_field(
        subject: str, btf: Btf, name: str, member: _btf.Member, dtype: np.dtype[Any]
    ) -> None:
        def fail(detail: str) -> LayoutError:
            return LayoutError(subject, name, member.name, detail)

        size = btf.size(member.type_id)
        if size != dtype.itemsize:
            raise fail(f"{size} bytes in the object, {dtype.itemsize} here")
        kind = btf.resolve(member.type_id)
        base = dtype.base
        if base.kind == "V":
            return  # raw bytes, or a structure compared under its own name
        if kind.kind == _btf.ARRAY:
            if kind.count != (dtype.shape[0] if dtype.shape else 1):
                raise fail(f"{kind.count} elements in the object, {dtype.shape} here")
            kind = btf.resolve(kind.ref)
        if kind.kind != _btf.INT:
            raise fail("not an integer in the object")
        if kind.signed != (base.kind == "i"):
            raise fail("signed on one side only")
        big = btf.is_big_endian(member.type_id) or member.name.endswith("_be")
        if base.itemsize > 1 and big != (base.byteorder == ">"):
            raise fail("big-endian on one side only")


AUDIT_CELL: Final = np.dtype(
    [
        ("policy_slot", "u4"),
        ("identity", "u4"),
        ("remote_id", "u4"),
        ("dport_be", ">u2"),
        ("proto", "u1"),
        ("egress", "u1"),
        ("ep_id", "u2"),
        ("ep_flags", "u2"),
        ("verdict", "i4"),
        ("rule_id", "u4"),
        ("policy_rev", "u4"),
        ("match_type", "u1"),
        ("row_flags", "u1"),
        ("audited", "u1"),
        ("answered", "u1"),
    ]
)

CILIA: Final = LayoutSet(
    structs={
        "endpoint": ENDPOINT,
        "ipcache_key": IPCACHE_KEY,
        "ipcache_value": IPCACHE_VALUE,
        "policy_key": POLICY_KEY,
        "policy_value": POLICY_VALUE,
        "policy_meta": POLICY_META,
        "ct_key": CT_KEY,
        "ct_side": CT_SIDE,
        "ct_entry": CT_ENTRY,
        "nat_key": NAT_KEY,
        "nat_value": NAT_VALUE,
        "device": DEVICE,
        "frag_key": FRAG_KEY,
        "frag_range": FRAG_RANGE,
        "frag_value": FRAG_VALUE,
        "runtime": RUNTIME,
        "proxy_pair": PROXY_PAIR,
        "proxy_listener": PROXY_LISTENER,
        "metric": METRIC,
        "event": EVENT,
        "audit_cell": AUDIT_CELL,
    },
    maps={
        "cilia_lxc": (ADDR, ENDPOINT),
        "cilia_ifindex": (U32, ENDPOINT),
        "cilia_ipcache": (IPCACHE_KEY, IPCACHE_VALUE),
        "cilia_policy": (U32, U32),
        "cilia_policy_meta": (U32, POLICY_META),
        "cilia_ct": (CT_KEY, CT_ENTRY),
        "cilia_nat": (NAT_KEY, NAT_VALUE),
        "cilia_frag": (FRAG_KEY, FRAG_VALUE),
        "cilia_devices": (U32, DEVICE),
        "cilia_runtime": (U32, RUNTIME),
        "cilia_proxy_pair": (PROXY_PAIR, PROXY_LISTENER),
        "cilia_metrics": (U32, METRIC),
        "cilia_lost": (U32, U64),
    },
    inner_maps={"cilia_policy": (POLICY_KEY, POLICY_VALUE)},
    bit_fields={"policy_key": {"l4_plen_egress": (("l4_plen", 0, 7), ("egress", 7, 1))}},
)
