"""What this kernel, and this process on it, can do: each thing found out by doing it.

Versions are shown and never judged by, for distributions carry features back. A helper is there
when a program of a few instructions that calls it passes the verifier; a map type when a map of it
can be made; clsact and tcx when a program hangs on the loopback device of a namespace made for that
alone. Nothing is left behind.
"""

from __future__ import annotations

import ctypes as C
import errno
import os
import platform
import struct
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from cilia.bpf import attach, libbpf, sys, uapi
from cilia.bpf.errors import BpfError
from cilia.bpf.map import Map
from cilia.bpf.program import Program
from cilia.bpf.uapi import AttachType, MapType, ProgType


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """One finding. `detail` says what was seen, `effect` what its absence means for Cilia, `cure`
    what can be done about it."""

    name: str
    present: bool
    required: bool
    detail: str
    effect: str
    cure: str


_KERNEL: Final = "run Linux 5.10 or newer"

# ---- tiny programs


def insn(code: int, dst: int = 0, src: int = 0, off: int = 0, imm: int = 0) -> bytes:
    """One instruction (struct bpf_insn)."""
    return struct.pack("=BBhi", code, src << 4 | dst, off, imm)


_CALL, _EXIT, _MOV, _MOVR, _ADD = 0x85, 0x95, 0xB7, 0xBF, 0x07
_STORE, _JEQ = 0x7A, 0x15


def _mov(register: int, value: int) -> bytes:
    return insn(_MOV, register, imm=value)


def _copy(target: int, source: int) -> bytes:
    return insn(_MOVR, target, source)


def _stack(register: int, size: int) -> bytes:
    """Point `register` at `size` zeroed bytes of stack."""
    zero = b"".join(insn(_STORE, 10, off=-n) for n in range(8, size + 1, 8))
    return zero + _copy(register, 10) + insn(_ADD, register, imm=-size)


def _call(helper: int) -> bytes:
    return insn(_CALL, imm=helper)


_OUT = _mov(0, 0) + insn(_EXIT)
_RELEASE = insn(_JEQ, 0, off=2) + _copy(1, 0) + _call(86) + _OUT  # bpf_sk_release


def load_program(
    code: bytes, kind: ProgType = ProgType.SCHED_CLS, attach_type: AttachType | None = None
) -> Program:
    """Load raw instructions; BpfError with the verifier's log as detail."""
    log = C.create_string_buffer(4096)
    opts = libbpf.ProgLoadOpts(sz=C.sizeof(libbpf.ProgLoadOpts), attempts=2)
    opts.log_level, opts.log_size, opts.log_buf = 1, len(log), C.addressof(log)
    opts.expected_attach_type = int(attach_type or 0)
    try:
        fd = libbpf.call(
            "bpf_prog_load",
            int(kind),
            b"cilia_probe",
            b"Dual BSD/GPL",
            code,
            len(code) // 8,
            C.byref(opts),
            operation="load probe program",
        )
    except BpfError as error:
        lines = [line for line in log.value.decode(errors="replace").splitlines() if line.strip()]
        error.detail = next(
            (line for line in lines if "unknown func" in line), "".join(lines[-2:-1])
        )
        raise
    return Program(fd, "cilia_probe", int(attach_type or 0))


_HELPERS: Final[dict[str, bytes]] = {
    "bpf_redirect_peer": _mov(1, 1) + _mov(2, 0) + _call(155) + _OUT,
    "bpf_redirect_neigh": _mov(1, 1) + _mov(2, 0) + _mov(3, 0) + _mov(4, 0) + _call(152) + _OUT,
    "bpf_fib_lookup": _stack(2, 64) + _mov(3, 64) + _mov(4, 0) + _call(69) + _OUT,
    "bpf_skc_lookup_tcp": _stack(2, 16)
    + _mov(3, 12)
    + _mov(4, -1)
    + _mov(5, 0)
    + _call(99)
    + _RELEASE,
    "bpf_sk_lookup_udp": _stack(2, 16)
    + _mov(3, 12)
    + _mov(4, -1)
    + _mov(5, 0)
    + _call(85)
    + _RELEASE,
    "bpf_ktime_get_coarse_ns": _call(160) + _OUT,
}


def has_helper(name: str) -> bool:
    """Whether tc programs may call it: one of the helpers probed here, by name ("bpf_...")."""
    try:
        load_program(_HELPERS[name]).close()
    except BpfError:
        return False
    return True


def _helper(name: str) -> str:
    load_program(_HELPERS[name]).close()
    return "a program that calls it was accepted"


# ---- maps


def _map(kind: MapType, key: int, value: int, entries: int, flags: int = 0) -> str:
    Map.create(kind, "cilia_probe", key, value, entries, flags).close()
    return "a map was made"


def _map_in_map() -> str:
    inner = Map.create(MapType.HASH, "cilia_probe_in", 8, 8, 4, uapi.F_NO_PREALLOC)
    outer = Map.create(MapType.ARRAY_OF_MAPS, "cilia_probe_out", 4, 4, 2, inner=inner)
    # before 5.10 the sizes of all inner maps had to be equal
    other = Map.create(MapType.HASH, "cilia_probe_in", 8, 8, 16, uapi.F_NO_PREALLOC)
    outer.set_inner(0, other)
    return "maps of two sizes were put in one outer map"


def _batch() -> str:
    probe = Map.create(MapType.HASH, "cilia_probe", 4, 4, 8)
    keys = np.arange(4, dtype="u4")
    probe.update_batch(keys, keys)
    found, _ = probe.lookup_batch()
    if not probe.batches or len(found) != 4:
        raise BpfError(errno.EOPNOTSUPP, "look up a batch in map", probe.name)
    return "four rows were written and read in one call each"


# ---- attachments


def _in_new_netns(work: Callable[[], str]) -> str:
    """Run `work` on a thread with a network namespace of its own, gone when it ends."""
    result: list[str] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            sys.unshare_net()
            result.append(work())
        except (OSError, ImportError) as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="cilia-probe")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


_LOOPBACK: Final = 1


def _try_attach(mode: attach.Mode) -> str:
    def work() -> str:
        prog = load_program(_OUT)
        link = attach.attach_tc(_LOOPBACK, "ingress", prog, mode=mode)
        try:
            there = [a for a in attach.list_attached(_LOOPBACK) if a.kind == mode]
            if not there:
                raise BpfError(errno.ENOENT, "find attachment by", mode)
        finally:
            link.detach()
        return "a program was attached to a loopback device"

    return _in_new_netns(work)


def cgroup2_root() -> Path | None:
    """Where cgroup version 2 is mounted, from /proc/self/mountinfo."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.startswith("cgroup2 "):
            return Path(before.split()[4])
    return None


def _cgroup2() -> str:
    root = cgroup2_root()
    if root is None:
        raise BpfError(errno.ENOENT, "find a mount of", "cgroup2")
    return f"mounted at {root}"


def _sock_addr() -> str:
    root = cgroup2_root()
    if root is None:
        raise BpfError(errno.ENOENT, "find a mount of", "cgroup2")
    prog = load_program(
        _mov(0, 1) + insn(_EXIT), ProgType.CGROUP_SOCK_ADDR, AttachType.CGROUP_INET4_CONNECT
    )
    group = Path(tempfile.mkdtemp(prefix="cilia-probe-", dir=root))
    try:
        attach.attach_cgroup(group, AttachType.CGROUP_INET4_CONNECT, prog).close()
    finally:
        group.rmdir()
    return "a program was attached to a cgroup of its own"


def _bpffs() -> str:
    directory = sys.detached_bpffs()
    try:
        probe = Map.create(MapType.ARRAY, "cilia_probe", 4, 4, 1)
        probe.pin(f"/proc/self/fd/{directory}/probe")
    finally:
        os.close(directory)
    return "a map was pinned in a bpffs made for it"


# ---- the process and the machine

_CAPABILITIES: Final = {
    "CAP_NET_ADMIN": 12,
    "CAP_SYS_ADMIN": 21,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
    "CAP_SYS_RESOURCE": 24,
}


def _capability(name: str) -> str:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            effective = int(line.split()[1], 16)
            if effective >> _CAPABILITIES[name] & 1:
                return "effective"
            sys_admin = effective >> _CAPABILITIES["CAP_SYS_ADMIN"] & 1
            if name in ("CAP_BPF", "CAP_PERFMON") and sys_admin:
                return "implied by CAP_SYS_ADMIN"
    raise BpfError(errno.EPERM, "use", name)


def _locked_memory() -> str:
    try:
        return _capability("CAP_SYS_RESOURCE")
    except BpfError:
        # Of the same release as the accounting of maps by cgroup, which needs no such limit.
        if has_helper("bpf_ktime_get_coarse_ns"):
            return "not needed: maps do not count as locked memory on this kernel"
        raise


def _kernel() -> str:
    # Any kernel that runs a program of ours; the version is for reading only.
    load_program(_OUT).close()
    return f"Linux {platform.release()}"


def _libbpf() -> str:
    libbpf.lib()
    return f"{libbpf.SONAME} {libbpf.version()}"


def _kernel_btf() -> str:
    path = Path("/sys/kernel/btf/vmlinux")
    with path.open("rb") as file:
        if file.read(2) != struct.pack("=H", 0xEB9F):
            raise BpfError(errno.EINVAL, "read", str(path))
    return str(path)


def _program_btf() -> str:
    # void; int; enough for the kernel to say whether it takes BTF at all
    types = struct.pack("=IIII", 1, 1 << 24, 4, 32)
    strings = b"\0int\0"
    header = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings))
    data = header + types + strings
    fd = libbpf.call("bpf_btf_load", data, len(data), None, operation="load BTF")
    os.close(fd)
    return "type information was accepted"


@dataclass(frozen=True, slots=True)
class _Probe:
    name: str
    required: bool
    run: Callable[[], str]
    effect: str
    cure: str = _KERNEL


_BATCH_EFFECT = "tables are read and written row by row: slower, nothing is lost"
_MODULES = "load the module (modprobe cls_bpf sch_ingress), or use a kernel with CONFIG_NET_CLS_BPF"
_PRIVILEGE = "run as root, or grant it (systemd: AmbientCapabilities, docker: --cap-add)"

_PROBES: Final = (
    _Probe("libbpf", True, _libbpf, "nothing can be loaded", "apt-get install libbpf1"),
    _Probe("kernel", True, _kernel, "no eBPF program can be loaded at all"),
    _Probe(
        "program-btf",
        True,
        _program_btf,
        "layouts of pinned maps cannot be compared; programs with global functions do not load",
    ),
    _Probe(
        "kernel-btf",
        False,
        _kernel_btf,
        "none today: no program of ours reads the kernel's own structures",
        "use a kernel with CONFIG_DEBUG_INFO_BTF",
    ),
    _Probe(
        "tcx",
        False,
        lambda: _try_attach("tcx"),
        "clsact filters are used instead; both replace programs without losing a packet",
        "run Linux 6.6 or newer",
    ),
    _Probe(
        "clsact",
        False,
        lambda: _try_attach("clsact"),
        "only tcx can be used; without tcx, programs cannot be attached",
        _MODULES,
    ),
    _Probe("map-hash", True, lambda: _map(MapType.HASH, 4, 4, 4), "no endpoint table"),
    _Probe(
        "map-lru-hash",
        True,
        lambda: _map(MapType.LRU_HASH, 4, 4, 64),
        "no connection tracking",
    ),
    _Probe(
        "map-lpm-trie",
        True,
        lambda: _map(MapType.LPM_TRIE, 8, 4, 4, uapi.F_NO_PREALLOC),
        "addresses cannot be turned into identities",
    ),
    _Probe("map-in-map", True, _map_in_map, "no policy map for each endpoint"),
    _Probe(
        "map-percpu-array",
        True,
        lambda: _map(MapType.PERCPU_ARRAY, 4, 16, 4),
        "packets and drops cannot be counted",
    ),
    _Probe(
        "ringbuf",
        True,
        lambda: _map(MapType.RINGBUF, 0, 0, os.sysconf("SC_PAGESIZE")),
        "no verdicts, drops or traces are seen by the monitor",
    ),
    _Probe("batch-operations", False, _batch, _BATCH_EFFECT, "run Linux 5.6 or newer"),
    _Probe(
        "bpf_redirect_peer",
        True,
        lambda: _helper("bpf_redirect_peer"),
        "packets between endpoints of one node cannot be delivered in one pass",
    ),
    _Probe(
        "bpf_redirect_neigh",
        True,
        lambda: _helper("bpf_redirect_neigh"),
        "packets to the world cannot leave without the stack",
    ),
    _Probe(
        "bpf_fib_lookup",
        True,
        lambda: _helper("bpf_fib_lookup"),
        "packets to the world cannot be routed",
    ),
    _Probe(
        "bpf_skc_lookup_tcp",
        True,
        lambda: _helper("bpf_skc_lookup_tcp"),
        "masquerade could take a port that a socket of the host uses",
    ),
    _Probe(
        "bpf_sk_lookup_udp",
        True,
        lambda: _helper("bpf_sk_lookup_udp"),
        "masquerade could take a port that a socket of the host uses",
    ),
    _Probe(
        "bpf_ktime_get_coarse_ns",
        False,
        lambda: _helper("bpf_ktime_get_coarse_ns"),
        "the exact clock is read instead, some nanoseconds slower",
        "run Linux 5.11 or newer",
    ),
    _Probe(
        "bpffs",
        True,
        _bpffs,
        "nothing can be pinned: the datapath would stop with the agent",
        "grant CAP_SYS_ADMIN, or mount it beforehand: mount -t bpf bpf /run/cilia/bpf",
    ),
    _Probe(
        "cgroup2",
        False,
        _cgroup2,
        "no socket hooks; first needed by socket load balancing",
        "mount -t cgroup2 none /sys/fs/cgroup/unified",
    ),
    _Probe(
        "cgroup-sock-addr",
        False,
        _sock_addr,
        "no socket hooks; first needed by socket load balancing",
        "use a kernel with CONFIG_CGROUP_BPF",
    ),
    *(
        _Probe(name, required, partial(_capability, name), effect, _PRIVILEGE)
        for name, required, effect in (
            ("CAP_NET_ADMIN", True, "devices, routes and attachments cannot be made"),
            ("CAP_BPF", True, "maps and programs cannot be made"),
            ("CAP_PERFMON", True, "programs that compare packet pointers are refused"),
            ("CAP_SYS_ADMIN", True, "bpffs cannot be mounted nor namespaces entered"),
        )
    ),
    _Probe(
        "CAP_SYS_RESOURCE",
        False,
        _locked_memory,
        "before Linux 5.11 the limit on locked memory cannot be raised for large maps",
        _PRIVILEGE,
    ),
)


def features() -> list[Feature]:
    """Everything probed, in a fixed order. Takes some 50 ms. Never raises for what is absent."""
    result = []
    for probe in _PROBES:
        try:
            detail, present = probe.run(), True
        except (OSError, ImportError) as error:
            detail = error.brief() if isinstance(error, BpfError) else str(error)
            present = False
        result.append(
            Feature(
                name=probe.name,
                present=present,
                required=probe.required,
                detail=detail,
                effect=probe.effect,
                cure="" if present else probe.cure,
            )
        )
    return result


def missing(found: list[Feature] | None = None) -> list[Feature]:
    """Required features that are absent. Of tcx and clsact one suffices."""
    found = features() if found is None else found
    result = [feature for feature in found if feature.required and not feature.present]
    modes = [feature for feature in found if feature.name in ("tcx", "clsact")]
    if modes and not any(feature.present for feature in modes):
        result += modes
    return result
