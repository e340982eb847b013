"""Pieces of protobuf messages (protobuf.dev/programming-guides/encoding), made by hand.

Padded varints, and the parts of one message in any order or in several pieces, are all legal, and
every parser takes them; that is what lets rows of one width be filled by columns.
"""

from __future__ import annotations

from collections.abc import Iterable

from cilia.rpc.wire import varint


def tag(field: int, wire_type: int) -> bytes:
    return varint(field << 3 | wire_type)


def uint(field: int, number: int) -> bytes:
    """Left out when 0, as proto3 does."""
    return tag(field, 0) + varint(number) if number else b""


def data(field: int, payload: bytes) -> bytes:
    """A message or bytes, also when empty: a message that is there."""
    return tag(field, 2) + varint(len(payload)) + payload


def text(field: int, value: str) -> bytes:
    """Left out when empty."""
    return data(field, value.encode("utf-8", "replace")) if value else b""


def texts(field: int, values: Iterable[str]) -> bytes:
    return b"".join(data(field, value.encode("utf-8", "replace")) for value in values)
