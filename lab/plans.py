"""The bytes of a long download: known to server and reader, so that a reader can check them.

Block n is SHAKE-128 of b"plans" and n. Nobody stores or sends a hash: both ends compute.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

BLOCK = 16 * 1024  # bytes


def blocks(size: int) -> Iterator[bytes]:
    """The first `size` bytes of the plans, in blocks of at most BLOCK."""
    number = 0
    while size > 0:
        block = hashlib.shake_128(b"plans" + number.to_bytes(8, "big")).digest(min(BLOCK, size))
        yield block
        size -= len(block)
        number += 1


def digest(size: int) -> str:
    """SHA-256 of the first `size` bytes, in hexadecimal."""
    total = hashlib.sha256()
    for block in blocks(size):
        total.update(block)
    return total.hexdigest()
