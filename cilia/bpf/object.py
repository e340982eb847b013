"""Object files: opening, configuring, loading, and taking over what an earlier run pinned.

    open      rodata and map sizes are set; nothing has reached the kernel
      prepare   layouts compared; maps: pinned ones of equal definition are reused, changed ones
                get a new map beside the old; programs pass the verifier
      copy      rows go from old maps to new
      pin       new maps take the names of the old, by rename
    then the caller puts the programs in place by Link.replace or attach_tc

Whatever fails before `pin` has changed nothing: what ran keeps running on its maps.
Several objects that share maps are loaded together by `load_all`, so that a changed map is made
once and its pin swapped after every object has passed the verifier.
"""

from __future__ import annotations

import ctypes as C
import errno
import fcntl
import mmap
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final

from cilia.bpf import libbpf
from cilia.bpf.btf import Btf
from cilia.bpf.errors import BpfError, VerifierError
from cilia.bpf.layout import LayoutSet
from cilia.bpf.map import Map, MapDefinition
from cilia.bpf.migrate import Change, MapPolicy, Migration, compare, copy_rows
from cilia.bpf.program import Program

# What the verifier may write at most (BPF_LOG_BUF_SIZE of libbpf); pages are taken as it writes.
_LOG_SIZE: Final = (1 << 24) - 1
_FAILED_PROGRAM = re.compile(r"prog '([^']+)': (?:BPF program load failed|failed to load)")


@dataclass(slots=True)
class _MapState:
    """A map of an opened object."""

    name: str
    handle: int
    definition: MapDefinition
    pinned: bool
    reused: bool = False
    change: Change | None = None
    old: Map | None = None


@dataclass(slots=True)
class Transaction:
    """What objects loaded together share: maps that are new and not pinned yet."""

    fresh: dict[str, Map] = field(default_factory=dict)


class Object:
    """An object file. Maps and programs taken from it live on after `close`."""

    def __init__(self, path: Path, handle: int, log: mmap.mmap) -> None:
        """Use `Object.open`."""
        self.path = path
        self._handle = handle
        self._log = log
        self._layouts: LayoutSet | None = None
        self._pin_dir: Path | None = None
        self._policies: Mapping[str, MapPolicy] = {}
        self._maps: dict[str, _MapState] = {}
        self._programs: dict[str, int] = {}
        self._rodata: dict[str, tuple[int, int]] = {}
        self._btf: Btf | None = None
        self._loaded = False
        self.migrations: tuple[Migration, ...] = ()

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        rodata: Mapping[str, bytes | int] | None = None,
        pin_dir: Path | None = None,
        map_sizes: Mapping[str, int] | None = None,
        layouts: LayoutSet | None = None,
        policies: Mapping[str, MapPolicy] | None = None,
        unpinned: Collection[str] = (),
        log_level: int = 0,
    ) -> Object:
        """Read an object file and configure it; nothing reaches the kernel yet.

        `rodata` sets `const volatile` globals by name: numbers in host order, bytes of exactly the
        variable's size. `map_sizes` overrides max_entries by map name; names the object lacks are
        ignored, so that one configuration serves several objects. With `pin_dir`, every map but
        `unpinned` ones is pinned there under its name; without, none is. `policies` says what
        becomes of a pinned map whose definition changed.
        """
        path = Path(path)
        if not path.is_file():
            raise BpfError(
                errno.ENOENT, "open object", str(path), cure="build the objects: make bpf"
            )
        log = mmap.mmap(-1, _LOG_SIZE + 1)
        log_address = C.addressof(C.c_char.from_buffer(log))
        opts = libbpf.OpenOpts(
            sz=C.sizeof(libbpf.OpenOpts),
            kernel_log_buf=log_address,
            kernel_log_size=_LOG_SIZE,
            kernel_log_level=log_level,
        )
        handle = libbpf.pointer(
            "bpf_object__open_file",
            os.fsencode(path),
            C.byref(opts),
            operation="open object",
            subject=str(path),
        )
        obj = cls(path, handle, log)
        try:
            obj._layouts = layouts
            obj._pin_dir = pin_dir
            obj._policies = policies or {}
            obj._read_programs()
            obj._read_maps(map_sizes or {}, unpinned)
            for name, value in (rodata or {}).items():
                obj._set_rodata(name, value)
        except BaseException:
            obj.close()
            raise
        return obj

    def __enter__(self) -> Object:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Free libbpf's side. Pins, links, and `Map`s and `Program`s taken before stay."""
        handle, self._handle = getattr(self, "_handle", 0), 0
        if handle:
            libbpf.function("bpf_object__close")(handle)
            self._log.close()
        for state in getattr(self, "_maps", {}).values():
            state.old = None

    # ---- what is in the file

    def _walk(self, function: str) -> Iterator[int]:
        step: Callable[[int, int | None], int | None] = libbpf.function(function)
        current = step(self._handle, None)
        while current:
            yield current
            current = step(self._handle, current)

    def _read_programs(self) -> None:
        name = libbpf.function("bpf_program__name")
        for handle in self._walk("bpf_object__next_program"):
            self._programs[name(handle).decode()] = handle

    @staticmethod
    def _definition(handle: int) -> MapDefinition:
        fn = libbpf.function
        inner = fn("bpf_map__inner_map")(handle)
        return MapDefinition(
            fn("bpf_map__type")(handle),
            fn("bpf_map__key_size")(handle),
            fn("bpf_map__value_size")(handle),
            fn("bpf_map__max_entries")(handle),
            fn("bpf_map__map_flags")(handle),
            Object._definition(inner) if inner else None,
        )

    def _read_maps(self, sizes: Mapping[str, int], unpinned: Collection[str]) -> None:
        fn = libbpf.function
        for handle in self._walk("bpf_object__next_map"):
            name = fn("bpf_map__name")(handle).decode()
            if fn("bpf_map__is_internal")(handle):
                self._read_section(name, handle)
                continue
            # Pins are ours to make, after the verifier has said yes; libbpf makes them before.
            libbpf.call(
                "bpf_map__set_pin_path", handle, None, operation="configure map", subject=name
            )
            if name in sizes:
                libbpf.call(
                    "bpf_map__set_max_entries",
                    handle,
                    sizes[name],
                    operation="set size of map",
                    subject=name,
                )
            self._maps[name] = _MapState(
                name, handle, self._definition(handle), name not in unpinned
            )

    def _read_section(self, map_name: str, handle: int) -> None:
        at = map_name.find(".rodata")
        if at < 0:
            return
        size = C.c_size_t()
        address: int | None = libbpf.function("bpf_map__initial_value")(handle, C.byref(size))
        if not address:
            return
        for name, var in self.btf.variables(map_name[at:]).items():
            if var.offset + var.size <= size.value:
                self._rodata[name] = (address + var.offset, var.size)

    @property
    def btf(self) -> Btf:
        """The object's types."""
        if self._btf is None:
            handle: int | None = libbpf.function("bpf_object__btf")(self._handle)
            if not handle:
                raise BpfError(
                    errno.EINVAL,
                    "read BTF of",
                    str(self.path),
                    cure="compile the object with -g",
                )
            size = C.c_uint32()
            data = libbpf.pointer(
                "btf__raw_data",
                handle,
                C.byref(size),
                operation="read BTF of",
                subject=str(self.path),
            )
            self._btf = Btf(C.string_at(data, size.value))
        return self._btf

    def definitions(self) -> Mapping[str, MapDefinition]:
        """The maps of the object, sizes overridden as asked."""
        return {name: state.definition for name, state in self._maps.items()}

    def program_names(self) -> tuple[str, ...]:
        """The programs of the object."""
        return tuple(self._programs)

    # ---- configuration

    def _set_rodata(self, name: str, value: bytes | int) -> None:
        place = self._rodata.get(name)
        if place is None:
            raise BpfError(
                errno.ENOENT,
                "set constant",
                name,
                detail=f"{self.path.name} has {', '.join(sorted(self._rodata)) or 'none'}",
            )
        address, size = place
        if isinstance(value, int):
            try:
                value = value.to_bytes(size, "little" if _LITTLE else "big", signed=value < 0)
            except OverflowError as error:
                raise BpfError(
                    errno.ERANGE,
                    "set constant",
                    name,
                    detail=f"{value!r} does not fit {size} bytes",
                ) from error
        if len(value) != size:
            raise BpfError(
                errno.EINVAL,
                "set constant",
                name,
                detail=f"{len(value)} bytes given, it has {size}",
            )
        C.memmove(address, bytes(value), size)

    def rodata(self) -> dict[str, bytes]:
        """The constants as they stand."""
        return {name: C.string_at(address, size) for name, (address, size) in self._rodata.items()}

    def disable_program(self, name: str) -> None:
        """Leave a program out of the load."""
        libbpf.call(
            "bpf_program__set_autoload",
            self._program_handle(name),
            False,
            operation="configure program",
            subject=name,
        )

    # ---- loading

    def load(self) -> tuple[Migration, ...]:
        """Load, then migrate and pin maps. Returns what was migrated.

        VerifierError, LayoutError, MigrationRefused and any BpfError of the load itself leave
        everything as it was.
        """
        return load_all([self])

    def prepare(self, transaction: Transaction) -> None:
        """First half of a load: see the module's text."""
        if self._layouts is not None:
            self._layouts.check(self)
        for state in self._maps.values():
            self._choose_map(state, transaction)
        C.memset(self._log_address(), 0, 1)
        try:
            libbpf.call("bpf_object__load", self._handle, operation="load", subject=str(self.path))
        except BpfError as error:
            raise self._load_error(error) from None
        self._loaded = True
        for state in self._maps.values():
            if state.pinned and self._pin_dir and not state.reused:
                transaction.fresh[state.name] = self.map(state.name)

    def _choose_map(self, state: _MapState, transaction: Transaction) -> None:
        if not state.pinned or self._pin_dir is None:
            return
        pending = transaction.fresh.get(state.name)
        if pending is not None:
            change = compare(state.name, pending, state.definition, self.btf, self._types(state))
            if change is not None:
                raise BpfError(
                    errno.EINVAL,
                    "share map",
                    state.name,
                    detail=f"{self.path.name} defines it otherwise: {change.text}",
                    cure="build all objects from the same source: make bpf",
                )
            self._reuse(state, pending)
            return
        path = self._pin_dir / state.name
        if not path.exists():
            return
        old = Map.open_pinned(path)
        change = compare(state.name, old, state.definition, self.btf, self._types(state))
        if change is None:
            self._reuse(state, old)
            old.close()
        else:
            change.check(self._policies.get(state.name))
            state.change, state.old = change, old

    def _types(self, state: _MapState) -> tuple[int, int]:
        return (
            libbpf.function("bpf_map__btf_key_type_id")(state.handle),
            libbpf.function("bpf_map__btf_value_type_id")(state.handle),
        )

    def _reuse(self, state: _MapState, found: Map) -> None:
        libbpf.call(
            "bpf_map__reuse_fd", state.handle, found.fd, operation="reuse map", subject=state.name
        )
        state.reused = True

    def _log_address(self) -> int:
        return C.addressof(C.c_char.from_buffer(self._log))

    def verifier_log(self) -> str:
        """What the kernel wrote about the last program (or BTF) that it refused."""
        return C.string_at(self._log_address()).decode(errors="replace")

    def _load_error(self, error: BpfError) -> BpfError:
        match = _FAILED_PROGRAM.search(error.detail)
        log = self.verifier_log()
        if match is None:
            return error
        saved = None
        if log:
            try:
                fd, name = tempfile.mkstemp(
                    prefix=f"cilia-verifier-{self.path.stem}-", suffix=".log"
                )
                with os.fdopen(fd, "w") as file:
                    file.write(log)
                saved = Path(name)
            except OSError:
                saved = None
        return VerifierError(
            error.errno or errno.EINVAL,
            str(self.path),
            program=match[1],
            log=log,
            saved=saved,
            detail="" if log else error.detail,
        )

    def copy(self) -> tuple[Migration, ...]:
        """First part of a commit: rows go from old maps to new ones, which nothing uses yet."""
        self.migrations = tuple(
            copy_rows(state.change, state.old, self.map(state.name), self._policies.get(state.name))
            for state in self._maps.values()
            if state.change is not None and state.old is not None
        )
        return self.migrations

    def pin(self) -> None:
        """Second part of a commit: new maps take the names of the old."""
        for state in self._maps.values():
            if self._pin_dir is not None and state.pinned and not state.reused:
                self.map(state.name).pin(self._pin_dir / state.name)
            state.old = None

    # ---- what came of it

    def _program_handle(self, name: str) -> int:
        try:
            return self._programs[name]
        except KeyError:
            raise BpfError(
                errno.ENOENT,
                "find program",
                name,
                detail=f"{self.path.name} has {', '.join(self._programs) or 'none'}",
            ) from None

    def _require_loaded(self) -> None:
        if not self._loaded:
            raise BpfError(errno.EBADF, "use object", str(self.path), detail="it is not loaded")

    def map(self, name: str) -> Map:
        """A map of the loaded object, with a descriptor of its own."""
        self._require_loaded()
        state = self._maps.get(name)
        if state is None:
            raise BpfError(
                errno.ENOENT,
                "find map",
                name,
                detail=f"{self.path.name} has {', '.join(self._maps) or 'none'}",
            )
        fd = libbpf.call("bpf_map__fd", state.handle, operation="find map", subject=name)
        return Map(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0), name)

    def program(self, name: str) -> Program:
        """A program of the loaded object, with a descriptor of its own."""
        self._require_loaded()
        handle = self._program_handle(name)
        fd = libbpf.call("bpf_program__fd", handle, operation="find program", subject=name)
        attach_type = libbpf.function("bpf_program__expected_attach_type")(handle)
        return Program(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0), name, attach_type)

    def new_inner(self, outer: str, name: str, max_entries: int | None = None) -> Map:
        """A map after the template of the map of maps `outer`, to be put in by `set_inner`."""
        state = self._maps.get(outer)
        template = state.definition.inner if state is not None else None
        if template is None:
            raise BpfError(errno.ENOENT, "find inner map template of", outer)
        return Map.create(
            template.type,
            name,
            template.key_size,
            template.value_size,
            max_entries or template.max_entries,
            template.flags,
        )


_LITTLE: Final = memoryview(b"\1\0").cast("H")[0] == 1


def load_all(objects: Sequence[Object] | Iterable[Object]) -> tuple[Migration, ...]:
    """Load objects that share maps as one step: all are accepted, or nothing is changed."""
    ordered = list(objects)
    transaction = Transaction()
    for obj in ordered:
        obj.prepare(transaction)
    migrations = tuple(migration for obj in ordered for migration in obj.copy())
    for obj in ordered:
        obj.pin()
    return migrations
