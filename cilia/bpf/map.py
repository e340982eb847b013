"""eBPF maps: single rows as bytes, many rows as numpy arrays.

A `Map` owns its file descriptor. Keys and values of single operations are raw bytes of exactly the
map's sizes. A value of a per-CPU map is one value a possible CPU, each rounded up to 8 bytes.
"""

from __future__ import annotations

import ctypes as C
import errno
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cilia.bpf import libbpf, uapi
from cilia.bpf.descriptor import Descriptor
from cilia.bpf.errors import ENOTSUPP, BpfError
from cilia.bpf.uapi import MapType

_BATCH = 4096
_TRIES = 16
_NO_BATCH = frozenset({ENOTSUPP, errno.EINVAL, errno.EOPNOTSUPP})

Array = npt.NDArray[Any]


@functools.cache
def possible_cpus() -> int:
    """CPUs the kernel may ever bring up: the number of values in a per-CPU row."""
    text = Path("/sys/devices/system/cpu/possible").read_text().strip()
    return int(text.replace(",", "-").rsplit("-", 1)[-1]) + 1


@dataclass(frozen=True, slots=True)
class MapDefinition:
    """What makes two maps interchangeable. Sizes in bytes. `inner` is None unless the map holds
    maps, or when it is not known."""

    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    inner: MapDefinition | None = None

    def type_name(self) -> str:
        """The kernel's name of the type."""
        try:
            return MapType(self.type).name
        except ValueError:
            return str(self.type)


class Map(Descriptor):
    """One map of the kernel."""

    __slots__ = (
        "_batch",
        "_buffer_size",
        "_delete",
        "_lookup",
        "_next",
        "_update",
        "btf_id",
        "btf_key_type_id",
        "btf_value_type_id",
        "definition",
        "id",
        "name",
    )

    def __init__(self, fd: int, name: str | None = None) -> None:
        """Take over `fd`. `name` replaces the kernel's, which is cut at 15 bytes."""
        self.fd = fd
        info = libbpf.MapInfo()
        try:
            libbpf.info(fd, info, name or "map")
        except BpfError:
            os.close(fd)
            self.fd = -1
            raise
        self.name: str = name or info.name.decode()
        self.id: int = info.id
        self.definition = MapDefinition(
            info.type, info.key_size, info.value_size, info.max_entries, info.map_flags
        )
        self.btf_id: int = info.btf_id
        self.btf_key_type_id: int = info.btf_key_type_id
        self.btf_value_type_id: int = info.btf_value_type_id
        self._buffer_size = self.value_size
        if self.is_percpu:
            self._buffer_size = (self.value_size + 7 & ~7) * possible_cpus()
        # Empty slots of a map of maps end a batch before Linux 6.5.
        self._batch = info.type not in uapi.OUTER_TYPES
        self._lookup = libbpf.function("bpf_map_lookup_elem")
        self._update = libbpf.function("bpf_map_update_elem")
        self._delete = libbpf.function("bpf_map_delete_elem")
        self._next = libbpf.function("bpf_map_get_next_key")

    @classmethod
    def open_pinned(cls, path: Path | str) -> Map:
        """The map pinned at `path`; BpfError(ENOENT) when there is none."""
        path = Path(path)
        fd = libbpf.call(
            "bpf_obj_get", os.fsencode(path), operation="open pinned map", subject=str(path)
        )
        return cls(fd, path.name)

    @classmethod
    def from_id(cls, map_id: int, name: str | None = None) -> Map:
        """The map with the kernel's number `map_id`."""
        fd = libbpf.call(
            "bpf_map_get_fd_by_id", map_id, operation="open map", subject=name or f"id {map_id}"
        )
        return cls(fd, name)

    @classmethod
    def create(
        cls,
        type: MapType | int,
        name: str,
        key_size: int,
        value_size: int,
        max_entries: int,
        flags: int = 0,
        *,
        inner: Map | None = None,
    ) -> Map:
        """A new map; sizes in bytes. `inner` is the template of a map of maps."""
        opts = libbpf.MapCreateOpts(sz=C.sizeof(libbpf.MapCreateOpts), map_flags=flags)
        if inner is not None:
            opts.inner_map_fd = inner.fd
        fd = libbpf.call(
            "bpf_map_create",
            int(type),
            name[:15].encode(),
            key_size,
            value_size,
            max_entries,
            C.byref(opts),
            operation="create map",
            subject=name,
        )
        return cls(fd, name)

    def __repr__(self) -> str:
        return f"<Map {self.name} id {self.id} {self.definition.type_name()}>"

    @property
    def type(self) -> int:
        return self.definition.type

    @property
    def key_size(self) -> int:
        return self.definition.key_size

    @property
    def value_size(self) -> int:
        return self.definition.value_size

    @property
    def max_entries(self) -> int:
        return self.definition.max_entries

    @property
    def flags(self) -> int:
        return self.definition.flags

    @property
    def is_percpu(self) -> bool:
        return self.definition.type in uapi.PERCPU_TYPES

    @property
    def batches(self) -> bool:
        """False once the kernel has been found to lack batch operations for this map."""
        return self._batch

    # ---- one row

    def _error(self, code: int, operation: str) -> BpfError:
        cure = None
        if code == errno.E2BIG and operation.startswith("update"):
            cure = f"the map is full at {self.max_entries} entries: raise its size"
        return BpfError(code, operation, self.name, cure=cure)

    def _check_key(self, key: bytes) -> None:
        if len(key) != self.key_size:
            raise ValueError(f"{self.name}: a key has {self.key_size} bytes, not {len(key)}")

    def lookup(self, key: bytes) -> bytes | None:
        """The value under `key`, or None. Per-CPU maps: all CPUs' values, one after the other."""
        self._check_key(key)
        buffer = C.create_string_buffer(self._buffer_size)
        result = self._lookup(self.fd, key, buffer)
        if result < 0:
            if result == -errno.ENOENT:
                return None
            raise self._error(-result, "look up in map")
        return buffer.raw

    def lookup_percpu(self, key: bytes, dtype: np.dtype[Any]) -> Array | None:
        """The row of a per-CPU map as an array, a value a CPU."""
        raw = self.lookup(key)
        if raw is None:
            return None
        row: Array = self._percpu(np.frombuffer(raw, "u1").reshape(1, -1), dtype)[0]
        return row

    def _percpu(self, raw: Array, dtype: np.dtype[Any]) -> Array:
        cpus = possible_cpus()
        step = self.value_size + 7 & ~7
        shaped = raw.reshape(len(raw), cpus, step)[:, :, : dtype.itemsize]
        return np.ascontiguousarray(shaped).view(dtype).reshape(len(raw), cpus)

    def _value(self, value: bytes) -> bytes:
        if len(value) == self._buffer_size:
            return value
        if self.is_percpu and len(value) == self.value_size:
            return value.ljust(self.value_size + 7 & ~7, b"\0") * possible_cpus()
        raise ValueError(f"{self.name}: a value has {self._buffer_size} bytes, not {len(value)}")

    def update(self, key: bytes, value: bytes, flags: int = uapi.ANY) -> None:
        """Write a row. A per-CPU map takes all CPUs' values, or one that is written to each."""
        self._check_key(key)
        result = self._update(self.fd, key, self._value(value), flags)
        if result < 0:
            raise self._error(-result, "update map")

    def delete(self, key: bytes) -> bool:
        """Remove a row; False when there was none."""
        self._check_key(key)
        result = self._delete(self.fd, key)
        if result < 0:
            if result == -errno.ENOENT:
                return False
            raise self._error(-result, "delete from map")
        return True

    # ---- many rows

    def items(self, limit: int | None = None) -> Iterator[tuple[bytes, bytes]]:
        """Rows as (key, value), each key once, `limit` of them at most.

        It ends also while the map churns: see `lookup_batch`.
        """
        left = self.max_entries if limit is None else limit
        for keys, values in self.chunks(left):
            raw_keys, raw_values = keys.tobytes(), values.tobytes()
            ksize, vsize = self.key_size, self._buffer_size
            for n in range(min(len(keys), left)):
                yield raw_keys[n * ksize : (n + 1) * ksize], raw_values[n * vsize : (n + 1) * vsize]
            left -= len(keys)
            if left <= 0:
                return

    def keys(self, limit: int | None = None) -> Iterator[bytes]:
        """The keys, in the bounds of `items`."""
        return (key for key, _ in self.items(limit))

    def lookup_batch(self, limit: int | None = None) -> tuple[Array, Array]:
        """All rows as two arrays of raw bytes, (n, key_size) and (n, value bytes).

        Rows written or removed meanwhile may be missing; no key comes twice, and it ends after
        `max_entries` keys (a map that is refilled as fast as it is read has no end of its own).
        """
        bound = self.max_entries if limit is None else limit
        chunks = list(self.chunks(bound))
        if not chunks:
            return (
                np.empty((0, self.key_size), "u1"),
                np.empty((0, self._buffer_size), "u1"),
            )
        if len(chunks) == 1:
            keys, values = chunks[0]
            return keys[:bound], values[:bound]
        return (
            np.concatenate([keys for keys, _ in chunks])[:bound],
            np.concatenate([values for _, values in chunks])[:bound],
        )

    def items_np(
        self, kdtype: np.dtype[Any], vdtype: np.dtype[Any], limit: int | None = None
    ) -> tuple[Array, Array]:
        """All rows as structured arrays; values of a per-CPU map are of shape (rows, CPUs)."""
        if kdtype.itemsize != self.key_size or vdtype.itemsize != self.value_size:
            raise ValueError(
                f"{self.name}: rows are {self.key_size} + {self.value_size} bytes, "
                f"not {kdtype.itemsize} + {vdtype.itemsize}"
            )
        keys, values = self.lookup_batch(limit)
        shaped = np.ascontiguousarray(keys).view(kdtype).reshape(len(keys))
        if self.is_percpu:
            return shaped, self._percpu(values, vdtype)
        return shaped, np.ascontiguousarray(values).view(vdtype).reshape(len(values))

    def chunks(self, bound: int) -> Iterator[tuple[Array, Array]]:
        """Rows in portions, until the end or `bound` distinct keys, whichever is first.

        For reading a large map without holding it; the last portion may exceed `bound`.
        """
        if bound <= 0:
            return
        seen: set[bytes] | None = None
        if self.type not in (MapType.HASH, MapType.LRU_HASH, *uapi.ARRAY_TYPES):
            # A trie restarts from its first key when the one it stands on is deleted. A hash walks
            # its buckets, and an array its indexes, once each.
            seen = set()
        produced = rounds = 0
        source = self._batches(bound) if self._batch else self._singles(bound)
        for keys, values in source:
            fresh_keys, fresh_values = keys, values
            if seen is not None:
                raw, size = keys.tobytes(), self.key_size
                new = []
                for n in range(len(keys)):
                    key = raw[n * size : (n + 1) * size]
                    if key not in seen:
                        seen.add(key)
                        new.append(n)
                if len(new) < len(keys):
                    fresh_keys, fresh_values = keys[new], values[new]
            if len(fresh_keys):
                yield fresh_keys, fresh_values
            produced += len(fresh_keys)
            rounds += len(keys)
            if produced >= bound or rounds >= 2 * self.max_entries + _BATCH:
                return

    def _batches(self, bound: int) -> Iterator[tuple[Array, Array]]:
        call = libbpf.function("bpf_map_lookup_batch")
        opts = libbpf.BatchOpts(sz=C.sizeof(libbpf.BatchOpts))
        # the kernel's cursor: a bucket number, an index, or (trie) a whole key
        cursors = [C.create_string_buffer(max(8, self.key_size)) for _ in range(2)]
        size = min(_BATCH, self.max_entries)
        source = None
        started = False
        tries = 0
        while True:
            keys = np.empty((size, self.key_size), "u1")
            values = np.empty((size, self._buffer_size), "u1")
            count = C.c_uint32(size)
            target = cursors[0] if source is not cursors[0] else cursors[1]
            result = call(
                self.fd,
                source,
                target,
                keys.ctypes.data,
                values.ctypes.data,
                C.byref(count),
                C.byref(opts),
            )
            code = -result if result < 0 else 0
            if code == errno.ENOSPC:  # a bucket holds more rows than we have room for
                size *= 2
                continue
            if code == errno.EINTR and tries < _TRIES:  # a row went while a trie was walked
                tries += 1
                continue
            if (code in _NO_BATCH and not started) or code == errno.EINTR:
                # rows that come again are for `chunks` to sort out
                self._batch = self._batch and code == errno.EINTR
                yield from self._singles(bound)
                return
            if code not in (0, errno.ENOENT):
                raise self._error(code, "look up a batch in map")
            started = True
            if count.value:
                yield keys[: count.value], values[: count.value]
            if code == errno.ENOENT:
                return
            source = target

    def _singles(self, bound: int) -> Iterator[tuple[Array, Array]]:
        """By get_next_key, for kernels and types without batches. A hash restarts from its first
        key when the one it stands on is deleted: hence the set and the bounded number of steps."""
        cursor: C.Array[C.c_char] | None = None
        target = C.create_string_buffer(self.key_size)
        seen: set[bytes] = set()
        keys: list[bytes] = []
        values: list[bytes] = []
        for _ in range(2 * self.max_entries + 1):
            result = self._next(self.fd, cursor, target)
            if result == -errno.ENOENT:
                break
            if result < 0:
                raise self._error(-result, "walk map")
            key = target.raw
            cursor, target = target, cursor or C.create_string_buffer(self.key_size)
            if key in seen:
                continue
            seen.add(key)
            value = self.lookup(key)
            if value is None:
                continue
            keys.append(key)
            values.append(value)
            if len(seen) >= bound:
                break
        if keys:
            yield (
                np.frombuffer(b"".join(keys), "u1").reshape(-1, self.key_size),
                np.frombuffer(b"".join(values), "u1").reshape(-1, self._buffer_size),
            )

    def _flat(self, array: Array, size: int, what: str) -> Array:
        for name, (dtype, *_) in (array.dtype.fields or {}).items():
            if name.endswith("_be") and dtype.base.byteorder not in ">|":
                # what np.concatenate makes of two equal arrays, silently, without dtype=
                raise ValueError(f"{self.name}: field {name} of a {what} is not big-endian")
        flat = np.ascontiguousarray(array)
        width = flat.itemsize * (flat.size // len(flat)) if len(flat) else size
        if width != size:
            raise ValueError(f"{self.name}: a {what} has {size} bytes, not {width}")
        return flat

    def update_batch(self, keys: Array, values: Array, flags: int = uapi.ANY) -> None:
        """Write the rows of two arrays of equal length; per-CPU maps: all CPUs' values.

        At an error the rows before the one named in it have been written.
        """
        if len(keys) != len(values):
            raise ValueError(f"{len(keys)} keys, {len(values)} values")
        if not len(keys):
            return
        keys = self._flat(keys, self.key_size, "key")
        values = self._flat(values, self._buffer_size, "value")
        done = 0
        if self._batch:
            opts = libbpf.BatchOpts(sz=C.sizeof(libbpf.BatchOpts), elem_flags=flags)
            count = C.c_uint32(len(keys))
            result = libbpf.function("bpf_map_update_batch")(
                self.fd, keys.ctypes.data, values.ctypes.data, C.byref(count), C.byref(opts)
            )
            if result >= 0:
                return
            if -result not in _NO_BATCH:
                error = self._error(-result, "update map")
                error.detail = f"row {count.value} of {len(keys)}"
                raise error
            # EINVAL may be a bad row as well: the singles below say which. A kernel without the
            # command leaves count alone.
            done = count.value if count.value < len(keys) else 0
        key_at, value_at = keys.ctypes.data, values.ctypes.data
        for n in range(done, len(keys)):
            result = self._update(
                self.fd, key_at + n * self.key_size, value_at + n * self._buffer_size, flags
            )
            if result < 0:
                error = self._error(-result, "update map")
                error.detail = f"row {n} of {len(keys)}"
                raise error

    def delete_batch(self, keys: Array) -> int:
        """Remove rows; absent ones are passed over. Returns how many were there."""
        if not len(keys):
            return 0
        keys = self._flat(keys, self.key_size, "key")
        start = keys.ctypes.data
        done = deleted = 0
        opts = libbpf.BatchOpts(sz=C.sizeof(libbpf.BatchOpts))
        while self._batch and done < len(keys):
            count = C.c_uint32(len(keys) - done)
            result = libbpf.function("bpf_map_delete_batch")(
                self.fd, start + done * self.key_size, C.byref(count), C.byref(opts)
            )
            if result >= 0:
                return deleted + count.value
            if -result != errno.ENOENT:
                if -result in _NO_BATCH:
                    break
                raise self._error(-result, "delete from map")
            deleted += count.value
            done += count.value + 1  # the kernel stops at a key that is absent
        for n in range(done, len(keys)):
            result = self._delete(self.fd, start + n * self.key_size)
            if result >= 0:
                deleted += 1
            elif result != -errno.ENOENT:
                raise self._error(-result, "delete from map")
        return deleted

    # ---- maps of maps

    def set_inner(self, slot: int, inner: Map) -> None:
        """Put `inner` into `slot` in one step: readers see the old map or the new one.

        The kernel refuses (EINVAL) an inner map of another shape than the template.
        """
        result = self._update(
            self.fd, slot.to_bytes(4, "little"), inner.fd.to_bytes(4, "little"), uapi.ANY
        )
        if result < 0:
            error = self._error(-result, "set inner map of")
            error.detail = f"slot {slot}, map {inner.name}"
            raise error

    def clear_inner(self, slot: int) -> bool:
        """Empty `slot`; False when it was empty."""
        return self.delete(slot.to_bytes(4, "little"))

    def inner_id(self, slot: int) -> int | None:
        """The kernel's number of the map in `slot`, for `Map.from_id`; None when it is empty."""
        raw = self.lookup(slot.to_bytes(4, "little"))
        return int.from_bytes(raw, "little") if raw is not None else None

    # ---- pins

    def pin(self, path: Path | str) -> None:
        """Pin at `path`, in one step in place of what is pinned there."""
        pin_fd(self.fd, Path(path), f"map {self.name}")


def pin_fd(fd: int, path: Path, subject: str) -> None:
    """Pin any object. An older pin is replaced by rename: there is no moment without one.

    BpfError; ENOENT and EINVAL mean that `path` is not on a bpffs.
    """
    temporary = path.with_name(f"{path.name}__new_{os.getpid()}")  # bpffs allows no dots
    try:
        temporary.unlink(missing_ok=True)
        libbpf.call(
            "bpf_obj_pin",
            fd,
            os.fsencode(temporary),
            operation="pin",
            subject=f"{subject} at {path}",
            cure="mount bpffs: mount -t bpf bpf DIR, and create the directories below it",
        )
        try:
            temporary.rename(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    except BpfError:
        raise
    except OSError as error:
        raise BpfError(error.errno or errno.EIO, "pin", f"{subject} at {path}") from error
