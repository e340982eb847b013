"""libbpf.so.1 through ctypes: signatures, error convention, and its log.

Libbpf 1.x returns a negative errno, or NULL with errno set. `call` and `pointer` turn both into
BpfError. The library is loaded at first use, so that a program which only wants the layouts runs
without it. Nothing is ever printed: warnings are kept per thread and go into the next error.
"""

from __future__ import annotations

import ctypes as C
import errno
import functools
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from cilia.bpf.errors import BpfError

SONAME = "libbpf.so.1"

_P = C.c_void_p
_S = C.c_char_p
_I = C.c_int
_U32 = C.c_uint32
_U64 = C.c_uint64
_SZ = C.c_size_t
_PSZ = C.POINTER(C.c_size_t)

# name -> (result, arguments); functions of libbpf 1.0 or 1.1 only
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "bpf_object__open_file": (_P, _S, _P),
    "bpf_object__load": (_I, _P),
    "bpf_object__close": (None, _P),
    "bpf_object__btf": (_P, _P),
    "bpf_object__next_map": (_P, _P, _P),
    "bpf_object__next_program": (_P, _P, _P),
    "btf__raw_data": (_P, _P, C.POINTER(_U32)),
    "bpf_map__fd": (_I, _P),
    "bpf_map__name": (_S, _P),
    "bpf_map__type": (_I, _P),
    "bpf_map__key_size": (_U32, _P),
    "bpf_map__value_size": (_U32, _P),
    "bpf_map__max_entries": (_U32, _P),
    "bpf_map__map_flags": (_U32, _P),
    "bpf_map__btf_key_type_id": (_U32, _P),
    "bpf_map__btf_value_type_id": (_U32, _P),
    "bpf_map__set_max_entries": (_I, _P, _U32),
    "bpf_map__inner_map": (_P, _P),
    "bpf_map__pin_path": (_S, _P),
    "bpf_map__set_pin_path": (_I, _P, _S),
    "bpf_map__is_internal": (C.c_bool, _P),
    "bpf_map__initial_value": (_P, _P, _PSZ),
    "bpf_map__reuse_fd": (_I, _P, _I),
    "bpf_program__fd": (_I, _P),
    "bpf_program__name": (_S, _P),
    "bpf_program__section_name": (_S, _P),
    "bpf_program__expected_attach_type": (_I, _P),
    "bpf_program__set_autoload": (_I, _P, C.c_bool),
    "bpf_map_create": (_I, _I, _S, _U32, _U32, _U32, _P),
    "bpf_map_lookup_elem": (_I, _I, _P, _P),
    "bpf_map_update_elem": (_I, _I, _P, _P, _U64),
    "bpf_map_delete_elem": (_I, _I, _P),
    "bpf_map_get_next_key": (_I, _I, _P, _P),
    "bpf_map_lookup_batch": (_I, _I, _P, _P, _P, _P, C.POINTER(_U32), _P),
    "bpf_map_update_batch": (_I, _I, _P, _P, C.POINTER(_U32), _P),
    "bpf_map_delete_batch": (_I, _I, _P, C.POINTER(_U32), _P),
    "bpf_obj_pin": (_I, _I, _S),
    "bpf_obj_get": (_I, _S),
    "bpf_obj_get_info_by_fd": (_I, _I, _P, C.POINTER(_U32)),
    "bpf_map_get_fd_by_id": (_I, _U32),
    "bpf_prog_get_fd_by_id": (_I, _U32),
    "bpf_btf_get_fd_by_id": (_I, _U32),
    "bpf_link_get_fd_by_id": (_I, _U32),
    "bpf_link_get_next_id": (_I, _U32, C.POINTER(_U32)),
    "bpf_btf_load": (_I, _S, _SZ, _P),
    "libbpf_version_string": (_S,),
    "bpf_prog_load": (_I, _I, _S, _S, _P, _SZ, _P),
    "bpf_prog_test_run_opts": (_I, _I, _P),
    "bpf_link_create": (_I, _I, _I, _I, _P),
    "bpf_link_detach": (_I, _I),
    "bpf_link_update": (_I, _I, _I, _P),
    "ring_buffer__new": (_P, _I, _P, _P, _P),
    "ring_buffer__free": (None, _P),
    "ring_buffer__consume": (_I, _P),
}

PrintFn = C.CFUNCTYPE(_I, _I, _S, _P)
SampleFn = C.CFUNCTYPE(_I, _P, _P, _SZ)

# Normal on Debian's 1.1 with newer kernels, and of no use to anybody.
_NOISE = (
    "Retrying without BTF",
    "skipping unrecognized data section",
    "elf: skipping",
    "failed to find valid kernel BTF",
)


class _Log(threading.local):
    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=40)


_log = _Log()
_LINE_MAX = 4096


def take_log() -> str:
    """What libbpf said on this thread since the last call, oldest first."""
    text = "".join(_log.lines).strip()
    _log.lines.clear()
    return text


class OpenOpts(C.Structure):
    """struct bpf_object_open_opts."""

    _fields_ = [
        ("sz", _SZ),
        ("object_name", _S),
        ("relaxed_maps", C.c_bool),
        ("pin_root_path", _S),
        ("reserved", _P),
        ("kconfig", _S),
        ("btf_custom_path", _S),
        ("kernel_log_buf", _P),
        ("kernel_log_size", _SZ),
        ("kernel_log_level", _U32),
    ]


class MapCreateOpts(C.Structure):
    """struct bpf_map_create_opts."""

    _fields_ = [
        ("sz", _SZ),
        ("btf_fd", _U32),
        ("btf_key_type_id", _U32),
        ("btf_value_type_id", _U32),
        ("btf_vmlinux_value_type_id", _U32),
        ("inner_map_fd", _U32),
        ("map_flags", _U32),
        ("map_extra", _U64),
        ("numa_node", _U32),
        ("map_ifindex", _U32),
    ]


class BatchOpts(C.Structure):
    """struct bpf_map_batch_opts."""

    _fields_ = [("sz", _SZ), ("elem_flags", _U64), ("flags", _U64)]


class ProgLoadOpts(C.Structure):
    """struct bpf_prog_load_opts."""

    _fields_ = [
        ("sz", _SZ),
        ("attempts", _I),
        ("expected_attach_type", _I),
        ("prog_btf_fd", _U32),
        ("prog_flags", _U32),
        ("prog_ifindex", _U32),
        ("kern_version", _U32),
        ("attach_btf_id", _U32),
        ("attach_prog_fd", _U32),
        ("attach_btf_obj_fd", _U32),
        ("fd_array", _P),
        ("func_info", _P),
        ("func_info_cnt", _U32),
        ("func_info_rec_size", _U32),
        ("line_info", _P),
        ("line_info_cnt", _U32),
        ("line_info_rec_size", _U32),
        ("log_level", _U32),
        ("log_size", _U32),
        ("log_buf", _P),
    ]


class TestRunOpts(C.Structure):
    """struct bpf_test_run_opts."""

    _fields_ = [
        ("sz", _SZ),
        ("data_in", _P),
        ("data_out", _P),
        ("data_size_in", _U32),
        ("data_size_out", _U32),
        ("ctx_in", _P),
        ("ctx_out", _P),
        ("ctx_size_in", _U32),
        ("ctx_size_out", _U32),
        ("retval", _U32),
        ("repeat", _I),
        ("duration", _U32),
        ("flags", _U32),
        ("cpu", _U32),
        ("batch_size", _U32),
    ]


class LinkCreateOpts(C.Structure):
    """struct bpf_link_create_opts, its fixed part."""

    _fields_ = [
        ("sz", _SZ),
        ("flags", _U32),
        ("iter_info", _P),
        ("iter_info_len", _U32),
        ("target_btf_id", _U32),
    ]


class MapInfo(C.Structure):
    """struct bpf_map_info."""

    _fields_ = [
        ("type", _U32),
        ("id", _U32),
        ("key_size", _U32),
        ("value_size", _U32),
        ("max_entries", _U32),
        ("map_flags", _U32),
        ("name", C.c_char * 16),
        ("ifindex", _U32),
        ("btf_vmlinux_value_type_id", _U32),
        ("netns_dev", _U64),
        ("netns_ino", _U64),
        ("btf_id", _U32),
        ("btf_key_type_id", _U32),
        ("btf_value_type_id", _U32),
        ("pad", _U32),
        ("map_extra", _U64),
    ]


class ProgInfo(C.Structure):
    """struct bpf_prog_info, as of Linux 5.16 (later fields are not asked for)."""

    _fields_ = [
        ("type", _U32),
        ("id", _U32),
        ("tag", C.c_uint8 * 8),
        ("jited_prog_len", _U32),
        ("xlated_prog_len", _U32),
        ("jited_prog_insns", _U64),
        ("xlated_prog_insns", _U64),
        ("load_time", _U64),
        ("created_by_uid", _U32),
        ("nr_map_ids", _U32),
        ("map_ids", _U64),
        ("name", C.c_char * 16),
        ("ifindex", _U32),
        ("gpl_compatible", _U32),
        ("netns_dev", _U64),
        ("netns_ino", _U64),
        ("nr_jited_ksyms", _U32),
        ("nr_jited_func_lens", _U32),
        ("jited_ksyms", _U64),
        ("jited_func_lens", _U64),
        ("btf_id", _U32),
        ("func_info_rec_size", _U32),
        ("func_info", _U64),
        ("nr_func_info", _U32),
        ("nr_line_info", _U32),
        ("line_info", _U64),
        ("jited_line_info", _U64),
        ("nr_jited_line_info", _U32),
        ("line_info_rec_size", _U32),
        ("jited_line_info_rec_size", _U32),
        ("nr_prog_tags", _U32),
        ("prog_tags", _U64),
        ("run_time_ns", _U64),
        ("run_cnt", _U64),
        ("recursion_misses", _U64),
        ("verified_insns", _U32),
        ("attach_btf_obj_id", _U32),
        ("attach_btf_id", _U32),
    ]


class LinkInfo(C.Structure):
    """struct bpf_link_info: the union's first two words serve tcx (ifindex, attach type) and
    cgroup (u64 cgroup id, attach type)."""

    _fields_ = [
        ("type", _U32),
        ("id", _U32),
        ("prog_id", _U32),
        ("pad", _U32),  # the union holds 64-bit members
        ("word0", _U32),
        ("word1", _U32),
        ("word2", _U32),
        ("rest", _U32 * 16),
    ]


class BtfInfo(C.Structure):
    """struct bpf_btf_info."""

    _fields_ = [
        ("btf", _U64),
        ("btf_size", _U32),
        ("id", _U32),
        ("name", _U64),
        ("name_len", _U32),
        ("kernel_btf", _U32),
    ]


class _Lib:
    """The loaded library; `fn[name]` has its signature set."""

    def __init__(self) -> None:
        try:
            dll = C.CDLL(SONAME, use_errno=True)
        except OSError as error:
            raise BpfError(
                errno.ENOENT,
                "load library",
                SONAME,
                detail=str(error),
                cure="apt-get install libbpf1",
            ) from error
        self.fn: dict[str, Callable[..., Any]] = {}
        for name, (result, *arguments) in _SIGNATURES.items():
            try:
                function = getattr(dll, name)
            except AttributeError as error:
                raise BpfError(
                    errno.ENOSYS,
                    "find function",
                    name,
                    detail=f"{SONAME} is too old",
                    cure="install libbpf 1.1 or newer (apt-get install libbpf1)",
                ) from error
            function.restype = result
            function.argtypes = tuple(arguments)
            self.fn[name] = function
        vsnprintf = C.CDLL(None).vsnprintf
        vsnprintf.argtypes = (_P, _SZ, _S, _P)
        vsnprintf.restype = _I

        def keep(level: int, template: bytes, arguments: int) -> int:
            if level > 0:  # LIBBPF_WARN is 0
                return 0
            buffer = C.create_string_buffer(_LINE_MAX)
            vsnprintf(buffer, _LINE_MAX, template, arguments)
            line = buffer.value.decode(errors="replace")
            if not any(noise in line for noise in _NOISE):
                _log.lines.append(line)
            return 0

        self._print = PrintFn(keep)  # must outlive the library
        set_print = dll.libbpf_set_print
        set_print.restype = _P
        set_print.argtypes = (PrintFn,)
        set_print(self._print)


@functools.cache
def lib() -> _Lib:
    """The library; BpfError with the cure where it is missing."""
    return _Lib()


def function(name: str) -> Callable[..., Any]:
    """The bare function: results are the caller's to judge."""
    return lib().fn[name]


def version() -> str:
    """libbpf's own version, "v1.1"."""
    text: bytes = lib().fn["libbpf_version_string"]()
    return text.decode()


def call(
    name: str, *arguments: Any, operation: str, subject: str = "", cure: str | None = None
) -> int:
    """Call a function that returns an int; a negative one is an error."""
    _log.lines.clear()
    result: int = lib().fn[name](*arguments)
    if result < 0:
        raise BpfError(-result, operation, subject, detail=take_log(), cure=cure)
    return result


def pointer(name: str, *arguments: Any, operation: str, subject: str = "") -> int:
    """Call a function that returns a pointer; NULL is an error."""
    _log.lines.clear()
    C.set_errno(0)
    result: int | None = lib().fn[name](*arguments)
    if not result:
        raise BpfError(C.get_errno() or errno.EINVAL, operation, subject, detail=take_log())
    return result


def info(fd: int, structure: C.Structure, subject: str = "") -> None:
    """Fill `structure` by BPF_OBJ_GET_INFO_BY_FD."""
    size = _U32(C.sizeof(structure))
    call(
        "bpf_obj_get_info_by_fd",
        fd,
        C.byref(structure),
        C.byref(size),
        operation="read information of",
        subject=subject,
    )
