"""Carrying the rows of a pinned map over to a changed definition of it.

What can be carried: rows whose key kept its size and layout, and whose value kept its layout or
grew at the end (or into fields named pad*), new bytes being zero. Anything else takes a converter
that the caller supplies. Without one, caches (LRU), what is kept per CPU (counters, scratch) and
event streams start empty, and others are refused: an emptied policy or ipcache map would change
verdicts.

Old programs write to the old map until they are replaced, so what they add after the copy is lost.
The maps they write to are caches and counters.
"""

from __future__ import annotations

import ctypes as C
import enum
import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from cilia.bpf import libbpf, uapi
from cilia.bpf.btf import Btf
from cilia.bpf.errors import BpfError, MigrationRefused
from cilia.bpf.map import Array, Map, MapDefinition, possible_cpus
from cilia.bpf.uapi import MapType

Converter = Callable[[bytes, bytes], tuple[bytes, bytes] | None]


class OnChange(enum.Enum):
    """What becomes of a pinned map whose definition changed."""

    COPY = "copy"  # carry the rows; where that cannot be done, empty caches and refuse others
    RESET = "reset"  # start empty
    REFUSE = "refuse"  # fail the load


@dataclass(frozen=True, slots=True, kw_only=True)
class MapPolicy:
    """`convert` makes a new row (key, value) of an old one, or None to drop it."""

    on_change: OnChange = OnChange.COPY
    convert: Converter | None = None


@dataclass(frozen=True, slots=True)
class Migration:
    """What happened to a map: `text` says what changed."""

    name: str
    text: str
    copied: int
    dropped: int


@dataclass(frozen=True, slots=True)
class Change:
    """How a pinned map differs from the object's definition."""

    name: str
    text: str
    old: MapDefinition
    new: MapDefinition
    carriable: bool  # rows can be carried as they are, values padded with zeros
    inner: Change | None = None

    def _action(self, policy: MapPolicy | None) -> str:
        policy = policy or MapPolicy()
        if policy.on_change is OnChange.REFUSE:
            return "refuse"
        if policy.on_change is OnChange.RESET or self.new.type in uapi.STREAM_TYPES:
            return "reset"
        if policy.convert is not None:
            return "convert"
        if self.carriable:
            return "copy"
        return "reset" if self.new.type in uapi.LRU_TYPES | uapi.PERCPU_TYPES else "refuse"

    def check(self, policy: MapPolicy | None) -> None:
        """MigrationRefused when the rows may be neither carried nor dropped."""
        if self._action(policy) == "refuse":
            raise MigrationRefused(self.name, self.text)

    def action(self, policy: MapPolicy | None) -> str:
        """copy, convert or reset."""
        self.check(policy)
        return self._action(policy)


def _kernel_btf(btf_id: int) -> Btf | None:
    """The types a map was created with; None when they are gone or unreadable."""
    try:
        fd = libbpf.call("bpf_btf_get_fd_by_id", btf_id, operation="open BTF", subject=str(btf_id))
    except BpfError:
        return None
    try:
        info = libbpf.BtfInfo()
        libbpf.info(fd, info, "BTF")
        data = C.create_string_buffer(info.btf_size)
        info = libbpf.BtfInfo(btf=C.addressof(data), btf_size=len(data))
        libbpf.info(fd, info, "BTF")
        return Btf(data.raw)
    except (BpfError, ValueError):
        return None
    finally:
        os.close(fd)


def _lost_leaf(old: Btf, old_type: int, new: Btf, new_type: int) -> str | None:
    """The first field of the old type that the new one lacks, or has elsewhere."""
    kept = set(new.leaves(new_type))
    for leaf in old.leaves(old_type):
        field = leaf.path.rsplit(".", 1)[-1]
        if leaf not in kept and not field.startswith("pad"):
            return leaf.path or "(the whole)"
    return None


def _differences(old: MapDefinition, new: MapDefinition) -> list[str]:
    result = []
    if old.type != new.type:
        result.append(f"type {old.type_name()} -> {new.type_name()}")
    for what in ("key_size", "value_size", "max_entries", "flags"):
        before, after = getattr(old, what), getattr(new, what)
        if before != after:
            result.append(f"{what} {before} -> {after}")
    return result


def _sizes_carriable(old: MapDefinition, new: MapDefinition) -> bool:
    return (
        old.key_size == new.key_size
        and old.value_size <= new.value_size
        and (old.type in uapi.PERCPU_TYPES) == (new.type in uapi.PERCPU_TYPES)
        and (old.type in uapi.OUTER_TYPES) == (new.type in uapi.OUTER_TYPES)
        and not {old.type, new.type} & uapi.STREAM_TYPES
    )


def _slots(outer: Map) -> Iterator[int]:
    """Slots that hold a map."""
    for row in outer.items():
        yield int.from_bytes(row[0], "little")


def _inner_change(name: str, outer: Map, template: MapDefinition) -> Change | None:
    """Whether `outer` takes maps after `template`: the kernel is asked, by putting one in.

    The shape that an outer map was created for cannot be read back.
    """
    free = next((n for n in range(outer.max_entries) if outer.inner_id(n) is None), None)
    existing = None
    if outer.type == MapType.ARRAY_OF_MAPS and free is not None:
        sample = Map.create(
            template.type,
            "cilia_probe",
            template.key_size,
            template.value_size,
            template.max_entries,
            template.flags,
        )
        try:
            outer.set_inner(free, sample)
        except BpfError as error:
            if error.errno != errno.EINVAL:
                raise
        else:
            outer.clear_inner(free)
            return None
        finally:
            sample.close()
    for slot in _slots(outer):
        inner_id = outer.inner_id(slot)
        if inner_id is not None:
            existing = Map.from_id(inner_id).definition
            break
    if existing is None:
        return Change(name, "inner map template", template, template, True)
    differences = _differences(replace(existing, max_entries=template.max_entries), template)
    if free is None and not differences:
        return None  # full: no slot to ask the kernel with, so its maps are judged by
    text = "inner map: " + (", ".join(differences) or "refused by the kernel")
    return Change(name, text, existing, template, _sizes_carriable(existing, template))


def compare(
    name: str, old: Map, new: MapDefinition, new_btf: Btf, new_types: tuple[int, int]
) -> Change | None:
    """None when the pinned map can be used as it is.

    Beside the sizes, the layouts of key and value are compared where both builds have their BTF.
    """
    texts = _differences(old.definition, new)
    carriable = _sizes_carriable(old.definition, new)
    if old.btf_id and all(new_types):
        old_btf = _kernel_btf(old.btf_id)
        old_types = (old.btf_key_type_id, old.btf_value_type_id)
        if old_btf is not None and all(old_types):
            for what, before, after in zip(("key", "value"), old_types, new_types, strict=True):
                lost = _lost_leaf(old_btf, before, new_btf, after)
                if lost is not None:
                    texts.append(f"{what} field {lost} changed")
                    carriable = False
    inner = None
    if new.type in uapi.OUTER_TYPES and new.inner is not None and old.type == new.type:
        inner = _inner_change(name, old, new.inner)
        if inner is not None:
            texts.append(inner.text)
            carriable = carriable and inner.carriable
    if not texts:
        return None
    return Change(name, ", ".join(texts), old.definition, new, carriable, inner)


def _pad_values(values: Array, old: Map, new: Map) -> Array:
    if old.value_size == new.value_size:
        return values
    cpus = possible_cpus() if old.is_percpu else 1
    before = values.shape[1] // cpus
    after = (new.value_size + 7 & ~7) if new.is_percpu else new.value_size
    padded = np.zeros((len(values), cpus, after), "u1")
    # a per-CPU value's own rounding bytes are not part of it
    size = old.value_size
    padded[:, :, :size] = values.reshape(len(values), cpus, before)[:, :, :size]
    return padded.reshape(len(values), cpus * after)


def _convert(keys: Array, values: Array, convert: Converter) -> tuple[Array, Array]:
    rows = [convert(k.tobytes(), v.tobytes()) for k, v in zip(keys, values, strict=True)]
    kept = [row for row in rows if row is not None]
    return (
        np.frombuffer(b"".join(key for key, _ in kept), "u1").reshape(len(kept), -1),
        np.frombuffer(b"".join(value for _, value in kept), "u1").reshape(len(kept), -1),
    )


def _copy_plain(old: Map, new: Map, convert: Converter | None) -> tuple[int, int]:
    copied = dropped = 0
    for keys, values in old.chunks(old.max_entries):
        total = len(keys)
        if new.type in uapi.ARRAY_TYPES and new.max_entries < old.max_entries:
            index = np.ascontiguousarray(keys).view("u4").reshape(len(keys))
            beyond = index >= new.max_entries
            if values[beyond].any():
                raise MigrationRefused(new.name, "rows beyond the new size are in use")
            keys, values = keys[~beyond], values[~beyond]
        if convert is not None:
            keys, values = _convert(keys, values, convert)
        else:
            values = _pad_values(values, old, new)
        if len(keys):
            try:
                new.update_batch(keys, values)
            except BpfError as error:
                if error.errno != errno.E2BIG:
                    raise
                raise MigrationRefused(
                    new.name, f"more rows than the new size of {new.max_entries}"
                ) from error
        copied += len(keys)
        dropped += total - len(keys)
    return copied, dropped


def _copy_outer(change: Change, old: Map, new: Map, convert: Converter | None) -> tuple[int, int]:
    copied = 0
    for slot in _slots(old):
        if slot >= new.max_entries:
            raise MigrationRefused(new.name, f"slot {slot} is in use and beyond the new size")
        inner_id = old.inner_id(slot)
        if inner_id is None:
            continue
        inner = Map.from_id(inner_id)
        template = change.new.inner
        if change.inner is not None and template is not None:
            fresh = Map.create(
                template.type,
                inner.name,
                template.key_size,
                template.value_size,
                max(template.max_entries, inner.max_entries),
                template.flags,
            )
            _copy_plain(inner, fresh, convert)
            inner = fresh
        new.set_inner(slot, inner)
        copied += 1
    return copied, 0


def copy_rows(change: Change, old: Map, new: Map, policy: MapPolicy | None) -> Migration:
    """Fill `new`, which nothing uses yet, from `old`. MigrationRefused when it does not fit.

    The converter of a map of maps converts the rows of the inner maps.
    """
    action = change.action(policy)
    if action == "reset":
        dropped = 0
        if old.type not in uapi.STREAM_TYPES | uapi.ARRAY_TYPES:
            dropped = sum(len(keys) for keys, _ in old.chunks(old.max_entries))
        return Migration(change.name, change.text, 0, dropped)
    convert = policy.convert if policy is not None and action == "convert" else None
    copy = _copy_outer if new.type in uapi.OUTER_TYPES else None
    counts = copy(change, old, new, convert) if copy else _copy_plain(old, new, convert)
    return Migration(change.name, change.text, *counts)
