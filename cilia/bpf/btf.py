"""BPF Type Format, as much of it as comparing structures needs (Documentation/bpf/btf.rst).

Sizes and offsets are in bytes unless a name says bits.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_MAGIC = 0xEB9F
_HEADER = struct.Struct("=HBBIIIII")
_TYPE = struct.Struct("=III")

INT, PTR, ARRAY, STRUCT, UNION, ENUM, FWD, TYPEDEF = range(1, 9)
VOLATILE, CONST, RESTRICT, FUNC, FUNC_PROTO, VAR, DATASEC, FLOAT = range(9, 17)
DECL_TAG, TYPE_TAG, ENUM64 = range(17, 20)

_THROUGH = frozenset({TYPEDEF, VOLATILE, CONST, RESTRICT, TYPE_TAG})
_INT_SIGNED = 1


@dataclass(frozen=True, slots=True)
class Member:
    """A field. `bit_size` is 0 unless it is a bit field."""

    name: str
    type_id: int
    bit_offset: int
    bit_size: int


@dataclass(frozen=True, slots=True)
class Variable:
    """A global variable's place in its data section."""

    name: str
    type_id: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Type:
    """One type; which of the fields mean something depends on `kind`."""

    kind: int
    name: str
    size: int  # INT, STRUCT, UNION, ENUM, DATASEC, FLOAT; else 0
    ref: int  # the type it refers to; ARRAY: of its elements
    count: int = 0  # ARRAY: elements
    signed: bool = False  # INT
    members: tuple[Member, ...] = ()
    variables: tuple[Variable, ...] = ()


@dataclass(frozen=True, slots=True)
class Leaf:
    """A scalar at the end of a path of fields."""

    path: str
    bit_offset: int
    bit_size: int


class Btf:
    """The types of one object, by number. ValueError on bytes that are not BTF."""

    def __init__(self, data: bytes) -> None:
        try:
            magic, _version, _flags, header_len, type_off, type_len, str_off, str_len = (
                _HEADER.unpack_from(data)
            )
            if magic != _MAGIC:
                raise ValueError("not BTF, or of the other byte order")
            self._strings = data[header_len + str_off : header_len + str_off + str_len]
            self.types: list[Type | None] = [None]
            body = data[header_len + type_off : header_len + type_off + type_len]
            at = 0
            while at < len(body):
                kind, at = self._parse(body, at)
                self.types.append(kind)
        except struct.error as error:
            raise ValueError(f"truncated BTF: {error}") from error

    def _name(self, offset: int) -> str:
        return self._strings[offset : self._strings.index(b"\0", offset)].decode()

    def _parse(self, body: bytes, at: int) -> tuple[Type, int]:
        name_off, packed, third = _TYPE.unpack_from(body, at)
        at += _TYPE.size
        kind, count, flag = packed >> 24 & 0x1F, packed & 0xFFFF, packed >> 31
        name = self._name(name_off)
        if kind == INT:
            (encoding,) = struct.unpack_from("=I", body, at)
            signed = bool(encoding >> 24 & _INT_SIGNED)
            return Type(kind, name, third, 0, signed=signed), at + 4
        if kind == ARRAY:
            element, _index, length = struct.unpack_from("=III", body, at)
            return Type(kind, name, 0, element, count=length), at + 12
        if kind in (STRUCT, UNION):
            members = []
            for n in range(count):
                member_name, type_id, offset = struct.unpack_from("=III", body, at + 12 * n)
                bits = offset >> 24 if flag else 0
                place = offset & 0xFFFFFF if flag else offset
                members.append(Member(self._name(member_name), type_id, place, bits))
            return Type(kind, name, third, 0, members=tuple(members)), at + 12 * count
        if kind == DATASEC:
            variables = []
            for n in range(count):
                type_id, offset, size = struct.unpack_from("=III", body, at + 12 * n)
                variables.append(Variable("", type_id, offset, size))
            return Type(kind, name, third, 0, variables=tuple(variables)), at + 12 * count
        if kind in (ENUM, FLOAT):
            return Type(kind, name, third, 0), at + (8 * count if kind == ENUM else 0)
        if kind == ENUM64:
            return Type(ENUM, name, third, 0), at + 12 * count
        if kind == FUNC_PROTO:
            return Type(kind, name, 0, third), at + 8 * count
        if kind in (VAR, DECL_TAG):
            return Type(kind, name, 0, third), at + 4
        if kind in (PTR, FWD, FUNC) or kind in _THROUGH:
            return Type(kind, name, 0, third), at
        raise ValueError(f"unknown BTF kind {kind}")

    def get(self, type_id: int) -> Type:
        """The type of that number; ValueError when there is none (void included)."""
        found = self.types[type_id] if 0 <= type_id < len(self.types) else None
        if found is None:
            raise ValueError(f"no BTF type {type_id}")
        return found

    def resolve(self, type_id: int) -> Type:
        """The type behind typedefs and qualifiers."""
        found = self.get(type_id)
        for _ in range(64):
            if found.kind not in _THROUGH:
                return found
            found = self.get(found.ref)
        raise ValueError(f"BTF type {type_id} refers to itself")

    def is_big_endian(self, type_id: int) -> bool:
        """Whether a typedef on the way says so (__be16, __be32, __be64), arrays included."""
        found = self.get(type_id)
        for _ in range(64):
            if found.kind == TYPEDEF and found.name.startswith("__be"):
                return True
            if found.kind != ARRAY and found.kind not in _THROUGH:
                return False
            found = self.get(found.ref)
        return False

    def size(self, type_id: int) -> int:
        """Bytes that a value of this type takes."""
        found = self.resolve(type_id)
        if found.kind == ARRAY:
            return found.count * self.size(found.ref)
        return 8 if found.kind == PTR else found.size

    def struct(self, name: str) -> Type | None:
        """The structure or union of that name, if this object has one."""
        for found in self.types:
            if found is not None and found.kind in (STRUCT, UNION) and found.name == name:
                return found
        return None

    def variables(self, section: str) -> dict[str, Variable]:
        """The global variables of a data section (".rodata") by name."""
        result = {}
        for found in self.types:
            if found is not None and found.kind == DATASEC and found.name == section:
                for place in found.variables:
                    var = self.get(place.type_id)
                    result[var.name] = Variable(var.name, var.ref, place.offset, place.size)
        return result

    def leaves(self, type_id: int, path: str = "", base_bits: int = 0) -> Iterator[Leaf]:
        """Every scalar of a type in order: what two builds must agree on to share bytes."""
        found = self.resolve(type_id)
        if found.kind in (STRUCT, UNION):
            for member in found.members:
                name = f"{path}.{member.name}" if path and member.name else path + member.name
                offset = base_bits + member.bit_offset
                if member.bit_size:
                    yield Leaf(name, offset, member.bit_size)
                else:
                    yield from self.leaves(member.type_id, name, offset)
        elif found.kind == ARRAY and self.resolve(found.ref).kind in (STRUCT, UNION):
            step = self.size(found.ref) * 8
            for n in range(found.count):
                yield from self.leaves(found.ref, f"{path}[{n}]", base_bits + n * step)
        else:
            yield Leaf(path, base_bits, self.size(type_id) * 8)
