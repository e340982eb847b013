"""Reading the kernel's ring buffer as arrays of fixed-size events.

The ring is two mappings of the map (kernel/bpf/ringbuf.c): a page with the consumer's position,
which we write, and, read-only, a page with the producer's followed by the data twice over, so that
a record never wraps:

    offset 0      consumer page   u64 position
    page          producer page   u64 position
    2 * page      data            record: u32 length | busy << 31 | discarded << 30, u32 page,
    ... + size    data again      bytes, rounded up to 8

All events have one size, so committed records are viewed as one array, without a call an event. A
record that is still busy ends the view: what lies behind it waits, in order. Records of any other
size are stepped over and counted.

Memory order. The producer's position must be read before the lengths, and those before the events.
x86 keeps the order of loads and of stores, numpy cannot ask others to; there libbpf's consumer,
which has the barriers, copies the events one by one.
"""

from __future__ import annotations

import contextlib
import ctypes as C
import errno
import mmap
import platform
import weakref
from typing import Any

import numpy as np

from cilia.bpf import libbpf
from cilia.bpf.errors import BpfError
from cilia.bpf.map import Array, Map
from cilia.bpf.uapi import MapType

_HEADER = 8
_BUSY = 1 << 31
_DISCARDED = 1 << 30
_LENGTH = _DISCARDED - 1

ORDERED_MACHINES = frozenset({"x86_64", "amd64", "i386", "i686"})


class RingReader:
    """The one consumer of a ring buffer map.

    A ring has one reader at a time: the position is kept in the map, so a reader that is started
    anew goes on where the last one stopped. Not thread-safe.
    """

    def __init__(
        self,
        ring: Map,
        dtype: np.dtype[Any],
        *,
        lost: Map | None = None,
        by_mmap: bool | None = None,
    ) -> None:
        """`lost`: a per-CPU array whose row 0 counts (u64) events that did not fit.

        `by_mmap` overrides the choice made by the machine's architecture.
        """
        if ring.type != MapType.RINGBUF:
            raise BpfError(errno.EINVAL, "read ring", ring.name, detail="not a ring buffer map")
        self._ring = ring
        self._dtype = dtype
        self._lost = lost
        self._record = (dtype.itemsize + _HEADER + 7) & ~7
        self.skipped = 0  # records of another size, stepped over
        self.discarded = 0
        if by_mmap is None:
            by_mmap = platform.machine().lower() in ORDERED_MACHINES
        self._mapped = _Mapped(ring) if by_mmap else None
        self._called = None if by_mmap else _Called(ring, dtype)

    def fileno(self) -> int:
        """For epoll (level-triggered): readable while there are committed records."""
        return self._ring.fd

    @property
    def lost(self) -> int:
        """Events that the programs could not write since the map was made; 0 without a counter."""
        if self._lost is None:
            return 0
        row = self._lost.lookup_percpu(bytes(4), np.dtype("u8"))
        return int(row.sum()) if row is not None else 0

    def close(self) -> None:
        """Unmap; arrays got from `peek` must not be used any more."""
        if self._mapped is not None:
            self._mapped.close()
        if self._called is not None:
            self._called.close()

    def read(self, max: int = 4096) -> Array:
        """Up to `max` events, copied and taken off the ring. Empty when there are none."""
        if self._called is not None:
            events, odd = self._called.read(max)
            self.skipped += odd
            return events
        events = self.peek(max).copy()
        self.advance(len(events))
        return events

    def peek(self, max: int = 4096) -> Array:
        """Up to `max` events as a read-only view of the ring; valid until `advance` or `close`."""
        if self._mapped is None:
            raise BpfError(errno.EOPNOTSUPP, "view ring", self._ring.name)
        ring, record, size = self._mapped, self._record, self._dtype.itemsize
        while True:
            at = int(ring.consumer[0])
            count = min((int(ring.producer[0]) - at) // record, max)
            start = at & ring.mask
            # At the very end a record of another size may hold what is left.
            if count <= 0:
                if max <= 0 or not self._step_over(at):
                    return np.empty(0, self._dtype)
                continue
            count = min(count, (len(ring.data) - start) // record)
            rows = ring.data[start : start + count * record].reshape(count, record)
            lengths = rows[:, :4].view("u4")[:, 0]
            plain = lengths == size
            if not plain.all():
                count = int(plain.argmin())
                if count == 0:
                    if not self._step_over(at):
                        return np.empty(0, self._dtype)
                    continue
            whole = np.dtype(
                {
                    "names": ["event"],
                    "formats": [self._dtype],
                    "offsets": [_HEADER],
                    "itemsize": record,
                }
            )
            view: Array = rows[:count].reshape(-1).view(whole)["event"]
            return view

    def advance(self, count: int) -> None:
        """Take `count` events, which `peek` has shown, off the ring."""
        if self._mapped is not None and count:
            self._mapped.consumer[0] += np.uint64(count * self._record)

    def _step_over(self, at: int) -> bool:
        """Pass a record that is no event; False when there is none, or it is still written."""
        ring = self._mapped
        if ring is None or int(ring.producer[0]) - at < _HEADER:
            return False
        start = at & ring.mask
        header = int(ring.data[start : start + 4].view("u4")[0])
        if header & _BUSY:
            return False
        if header & _DISCARDED:
            self.discarded += 1
        elif header != self._dtype.itemsize:
            self.skipped += 1
        else:
            return True  # it was committed since it was looked at: look again
        step = ((header & _LENGTH) + _HEADER + 7) & ~7
        ring.consumer[0] += np.uint64(step)
        return True


class _Mapped:
    """The two mappings."""

    def __init__(self, ring: Map) -> None:
        page = mmap.PAGESIZE
        size = ring.max_entries
        try:
            self._consumer_map = mmap.mmap(
                ring.fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=0
            )
            self._producer_map = mmap.mmap(
                ring.fd, page + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page
            )
        except OSError as error:
            raise BpfError(error.errno or errno.EINVAL, "map ring", ring.name) from error
        self.mask = size - 1
        self.consumer: Array = np.frombuffer(self._consumer_map, "u8", 1)
        self.producer: Array = np.frombuffer(self._producer_map, "u8", 1)
        self.data: Array = np.frombuffer(self._producer_map, "u1", 2 * size, offset=page)

    def close(self) -> None:
        empty = np.empty(0, "u1")
        self.consumer = self.producer = empty.view("u8")
        self.data = empty
        for mapping in (self._consumer_map, self._producer_map):
            with contextlib.suppress(BufferError):  # a view is held: unmapped when it goes
                mapping.close()


class _Called:
    """libbpf's consumer, stopped by its callback when enough has been read."""

    def __init__(self, ring: Map, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self._size = dtype.itemsize
        self._buffer: Array = np.empty(0, dtype)
        self._count = self._odd = 0

        def sample(_context: int | None, data: int, size: int) -> int:
            if size != self._size:
                self._odd += 1
                return 0
            C.memmove(self._buffer.ctypes.data + self._count * size, data, size)
            self._count += 1
            return -errno.EAGAIN if self._count == len(self._buffer) else 0

        self._callback = libbpf.SampleFn(sample)  # must outlive the consumer
        self._handle = libbpf.pointer(
            "ring_buffer__new",
            ring.fd,
            C.cast(self._callback, C.c_void_p),
            None,
            None,
            operation="open ring",
            subject=ring.name,
        )
        self.close = weakref.finalize(self, libbpf.function("ring_buffer__free"), self._handle)
        self._name = ring.name

    def read(self, max: int) -> tuple[Array, int]:
        if max <= 0:
            return np.empty(0, self._dtype), 0
        self._buffer = np.empty(max, self._dtype)
        self._count = self._odd = 0
        result = libbpf.function("ring_buffer__consume")(self._handle)
        if result < 0 and result != -errno.EAGAIN:
            raise BpfError(-result, "read ring", self._name)
        return self._buffer[: self._count], self._odd
