"""Addresses, bit fields, and BTF read from bytes that we make here."""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cilia.bpf import btf, layout, libbpf
from cilia.bpf.errors import BpfError, LayoutError, VerifierError
from cilia.bpf.layout import LayoutSet

_STRINGS = b"\0int\0__be16\0thing\0a\0b\0low\0high\0"


def _at(name: str) -> int:
    return _STRINGS.index(b"\0" + name.encode() + b"\0") + 1


def _blob(*types: bytes) -> bytes:
    body = b"".join(types)
    return (
        struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(body), len(body), len(_STRINGS))
        + body
        + _STRINGS
    )


def _int(size: int, signed: bool = False) -> bytes:
    return struct.pack("=IIII", _at("int"), btf.INT << 24, size, signed << 24 | size * 8)


def _struct(size: int, *members: tuple[str, int, int, int]) -> bytes:
    flag = any(bits for *_, bits in members)
    raw = struct.pack("=III", _at("thing"), btf.STRUCT << 24 | len(members) | flag << 31, size)
    for name, type_id, offset, bits in members:
        raw += struct.pack("=III", _at(name), type_id, bits << 24 | offset if flag else offset)
    return raw


@dataclass
class FakeObject:
    btf: btf.Btf
    path: Path = Path("thing.o")
    maps: dict[str, Any] = field(default_factory=dict)

    def definitions(self) -> dict[str, Any]:
        return self.maps


PLAIN = _blob(_int(4), _struct(8, ("a", 1, 0, 0), ("b", 1, 32, 0)))


def check(blob: bytes, dtype: np.dtype[Any], **more: Any) -> frozenset[str]:
    return LayoutSet(structs={"thing": dtype}, **more).check(FakeObject(btf.Btf(blob)))


def test_equal_layouts_pass() -> None:
    assert check(PLAIN, np.dtype([("a", "u4"), ("b", "u4")])) == {"thing"}


@pytest.mark.parametrize(
    ("dtype", "where"),
    [
        ([("a", "u4"), ("b", "u4"), ("low", "u4")], None),
        ([("a", "u4"), ("low", "u4")], "b"),
        ([("b", "u4"), ("a", "u4")], "a"),
        ([("a", "u4"), ("b", "i4")], "b"),
        ([("a", "u4"), ("b", ">u4")], "b"),
        ([("a", "u4"), ("b", "u2"), ("_gap", "V2")], "b"),
        ([("a", "u4", 2)], "a"),
    ],
)
def test_a_difference_names_structure_and_field(dtype: Any, where: str | None) -> None:
    with pytest.raises(LayoutError) as caught:
        check(PLAIN, np.dtype(dtype))
    assert caught.value.struct_name == "thing"
    assert caught.value.field == where
    assert "thing.o" in str(caught.value)


def test_big_endian_is_known_by_the_typedef() -> None:
    typedef = struct.pack("=III", _at("__be16"), btf.TYPEDEF << 24, 1)
    blob = _blob(_int(2), typedef, _struct(2, ("a", 2, 0, 0)))
    assert check(blob, np.dtype([("a", ">u2")]))
    with pytest.raises(LayoutError, match="big-endian"):
        check(blob, np.dtype([("a", "u2")]))


def test_bit_fields() -> None:
    blob = _blob(_int(1), _struct(1, ("low", 1, 0, 7), ("high", 1, 7, 1)))
    dtype = np.dtype([("both", "u1")])
    right = {"thing": {"both": (("low", 0, 7), ("high", 7, 1))}}
    wrong = {"thing": {"both": (("low", 0, 6), ("high", 6, 2))}}
    assert check(blob, dtype, bit_fields=right)
    with pytest.raises(LayoutError) as caught:
        check(blob, dtype, bit_fields=wrong)
    assert caught.value.field == "low"


def test_structures_the_object_lacks_are_passed_over() -> None:
    assert LayoutSet(structs={"other": np.dtype("u4")}).check(FakeObject(btf.Btf(PLAIN))) == set()


@given(st.binary(max_size=200))
def test_garbage_is_no_btf(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        btf.Btf(data)


@given(st.integers(0, len(PLAIN)))
def test_cut_btf_is_refused_or_whole(length: int) -> None:
    try:
        parsed = btf.Btf(PLAIN[:length])
    except ValueError:
        return
    assert len(parsed.types) <= 3


@given(st.ip_addresses())
def test_addresses_round_trip(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    raw = layout.to_addr(ip)
    assert len(raw) == 16
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    assert layout.from_addr(raw) == (mapped or ip)


def test_address_in_a_row() -> None:
    row = np.zeros(1, layout.NAT_VALUE)
    row["addr"] = np.void(layout.to_addr("10.1.2.0"))
    row["port_be"] = 80
    assert row.tobytes()[:18] == bytes(10) + b"\xff\xff\x0a\x01\x02\x00" + b"\x00\x50"
    assert layout.from_addr(row[0]["addr"]) == ipaddress.ip_address("10.1.2.0")
    with pytest.raises(ValueError, match="16 bytes"):
        layout.from_addr(b"\0" * 4)


@given(st.integers(0, 24), st.booleans())
def test_policy_key_bits(plen: int, egress: bool) -> None:
    assert layout.split_plen_egress(layout.plen_egress(plen, egress)) == (plen, egress)


def test_policy_key_bits_are_bounded() -> None:
    with pytest.raises(ValueError, match="0 to 24"):
        layout.plen_egress(25, False)


def test_a_missing_library_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libbpf, "SONAME", "libbpf-that-is-not-there.so.1")
    with pytest.raises(BpfError, match="apt-get install libbpf1"):
        libbpf._Lib()


def test_errors_say_what_to_do() -> None:
    text = str(BpfError(1, "create map", "cilia_ct"))
    assert "create map cilia_ct" in text
    assert "EPERM" in text
    assert "CAP_BPF" in text
    log = "\n".join(f"line {n}" for n in range(100))
    refused = VerifierError(22, "x.o", program="from_endpoint", log=log, saved=Path("/tmp/l"))
    assert refused.log == log
    assert "from_endpoint" in str(refused)
    assert "/tmp/l" in str(refused)
    assert "line 99" in str(refused)
    assert "line 10\n" not in str(refused)
