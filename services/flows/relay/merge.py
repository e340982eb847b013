"""Streams of several nodes, each in order of time, into one: a k-way merge of undecoded messages.

What may go out is decided by low-water marks. A node that has said nothing yet could still say
something older than all that the others said, so everything waits for it. In a stream that goes on
for ever a quiet node would hold up the rest: there it is waited for as long as `lag_ns`; what it
says later than that comes out of order.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from typing import Final

_FLOW_TAG: Final = 0x0A  # field 1, length-delimited
_TIME_TAG: Final = b"\xca\x3e"  # field 1001, length-delimited


def varint(data: bytes, at: int) -> tuple[int, int]:
    """The varint at a position, and the position behind it. Raises IndexError, ValueError."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a varint of more than ten bytes")


def time_ns(message: bytes) -> int | None:
    """GetFlowsResponse.time in ns since the epoch, without decoding the flow; None: it has none.

    Raises ValueError for what is no message.
    """
    at, end = 0, len(message)
    found: int | None = None
    try:
        while at < end:
            tag, at = varint(message, at)
            kind = tag & 7
            if kind == 2:
                length, at = varint(message, at)
                if at + length > end:
                    raise ValueError("a field reaches beyond the message")
                if tag == 1001 << 3 | 2:
                    found = _timestamp(message, at, at + length)
                at += length
            elif kind == 0:
                _, at = varint(message, at)
            elif kind == 1:
                at += 8
            elif kind == 5:
                at += 4
            else:
                raise ValueError(f"wire type {kind}")
    except IndexError:
        raise ValueError("the message ends inside a field") from None
    return found


def _timestamp(data: bytes, at: int, end: int) -> int:
    seconds = nanos = 0
    while at < end:
        tag, at = varint(data, at)
        value, at = varint(data, at)
        if tag == 1 << 3:
            seconds = value if value < 1 << 63 else value - (1 << 64)
        elif tag == 2 << 3:
            nanos = value
    return seconds * 1_000_000_000 + nanos


class Merge:
    """Push what nodes say, take what is due."""

    def __init__(self, *, follow: bool, lag_ns: int = 1_000_000_000) -> None:
        self._follow = follow
        self._lag_ns = lag_ns
        self._queues: dict[str, deque[tuple[int, bytes]]] = {}
        self._marks: dict[str, int] = {}
        self._silent: set[str] = set()  # nodes with nothing queued: all wait for them
        self._heads: list[tuple[int, str]] = []

    def add(self, node: str) -> None:
        self._queues[node] = deque()
        self._marks[node] = 0
        self._silent.add(node)

    def push(self, node: str, messages: Iterable[bytes]) -> None:
        """What a node said next. Raises ValueError for what is no message."""
        queue = self._queues[node]
        mark = self._marks[node]
        was_empty = not queue
        for message in messages:
            # A node's stream is in order; what steps back, or has no time, follows what was before.
            mark = max(mark, time_ns(message) or 0)
            queue.append((mark, message))
        self._marks[node] = mark
        if queue and was_empty:
            self._silent.discard(node)
            heapq.heappush(self._heads, (queue[0][0], node))

    def end(self, node: str) -> None:
        """The node will say no more; what it said still goes out in its turn."""
        self._silent.discard(node)
        if not self._queues.get(node):
            self._queues.pop(node, None)
        self._marks.pop(node, None)

    def queued(self, node: str) -> int:
        return len(self._queues.get(node, ()))

    @property
    def empty(self) -> bool:
        """Whether everything went out and nobody will say more."""
        return not self._heads and not self._silent

    @property
    def waits_for(self) -> frozenset[str]:
        return frozenset(self._silent)

    def take(self, now_ns: int, limit: int = 4096) -> list[bytes]:
        """What is due, in order. `now_ns` is wall clock time, as the nodes' is."""
        out: list[bytes] = []
        due = now_ns - self._lag_ns
        heads = self._heads
        while heads and len(out) < limit:
            head, node = heads[0]
            if self._silent and not (self._follow and head <= due):
                break
            queue = self._queues[node]
            # As long as this node is the next, its messages go out without touching the heap.
            others = min((h[0] for h in heads[1:3]), default=None)
            while queue and len(out) < limit:
                at, message = queue[0]
                if others is not None and at > others:
                    break
                if self._silent and not (self._follow and at <= due):
                    break
                out.append(message)
                queue.popleft()
            if queue:
                heapq.heapreplace(heads, (queue[0][0], node))
            else:
                heapq.heappop(heads)
                if node in self._marks:
                    self._silent.add(node)
                else:
                    del self._queues[node]
        return out
