"""Pieces of protobuf messages made by hand (protobuf.dev/programming-guides/encoding)."""

from __future__ import annotations


def varint(number: int) -> bytes:
    """Of a number from 0 to 2^64-1."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)
