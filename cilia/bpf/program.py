"""Loaded programs: running them on a packet, pinning them, reading what the kernel counted."""

from __future__ import annotations

import ctypes as C
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cilia.bpf import libbpf
from cilia.bpf.descriptor import Descriptor
from cilia.bpf.errors import BpfError
from cilia.bpf.map import pin_fd

# struct __sk_buff of include/uapi/linux/bpf.h, 192 bytes
_SKB_SIZE = 192
_SKB_WORDS = {
    "len": 0,
    "pkt_type": 4,
    "mark": 8,
    "queue_mapping": 12,
    "protocol": 16,
    "vlan_present": 20,
    "vlan_tci": 24,
    "vlan_proto": 28,
    "priority": 32,
    "ingress_ifindex": 36,
    "ifindex": 40,
    "tc_index": 44,
    "hash": 68,
    "tc_classid": 72,
    "wire_len": 160,
    "gso_segs": 164,
    "gso_size": 176,
}
_SKB_CB = 48
_SKB_TSTAMP = 152


@dataclass(frozen=True, slots=True, kw_only=True)
class SkBuffCtx:
    """struct __sk_buff for a test run.

    The kernel takes mark, priority, ingress_ifindex, ifindex, cb, tstamp, wire_len, gso_segs and
    gso_size (net/bpf/test_run.c, convert___skb_to_skb) and answers EINVAL when another is not 0.
    `ifindex` must exist in the calling thread's network namespace; 0 and 1 are loopback.
    """

    mark: int = 0
    priority: int = 0
    ingress_ifindex: int = 0
    ifindex: int = 0
    cb: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0)
    tstamp: int = 0
    wire_len: int = 0
    gso_segs: int = 0
    gso_size: int = 0
    len: int = 0
    pkt_type: int = 0
    queue_mapping: int = 0
    protocol: int = 0
    vlan_present: int = 0
    vlan_tci: int = 0
    vlan_proto: int = 0
    tc_index: int = 0
    hash: int = 0
    tc_classid: int = 0

    def pack(self) -> bytes:
        """The kernel's bytes."""
        raw = bytearray(_SKB_SIZE)
        for name, offset in _SKB_WORDS.items():
            struct.pack_into("=I", raw, offset, getattr(self, name))
        struct.pack_into("=5I", raw, _SKB_CB, *self.cb)
        struct.pack_into("=Q", raw, _SKB_TSTAMP, self.tstamp)
        return bytes(raw)

    @classmethod
    def unpack(cls, raw: bytes) -> SkBuffCtx:
        """From the kernel's bytes; what it did not give is 0."""
        raw = raw.ljust(_SKB_SIZE, b"\0")
        words = {
            name: struct.unpack_from("=I", raw, offset)[0] for name, offset in _SKB_WORDS.items()
        }
        (tstamp,) = struct.unpack_from("=Q", raw, _SKB_TSTAMP)
        return cls(cb=struct.unpack_from("=5I", raw, _SKB_CB), tstamp=tstamp, **words)


@dataclass(frozen=True, slots=True)
class TestRun:
    """Result of a run: `duration_ns` is the mean over the repeats."""

    __test__ = False  # pytest takes the name for a test class

    retval: int  # signed: TC_ACT_UNSPEC is -1
    data_out: bytes
    ctx_out: SkBuffCtx | None
    duration_ns: int


@dataclass(frozen=True, slots=True)
class ProgramStats:
    """What the kernel counted; run_* need the sysctl kernel.bpf_stats_enabled."""

    verified_insns: int  # looked at by the verifier; 0 before Linux 5.16, which does not tell
    xlated_bytes: int
    jited_bytes: int
    run_time_ns: int
    run_count: int


@contextmanager
def _on_cpu(cpu: int | None) -> Iterator[None]:
    if cpu is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Program(Descriptor):
    """One loaded program; owns its file descriptor."""

    __slots__ = ("expected_attach_type", "id", "name", "tag", "type")

    def __init__(self, fd: int, name: str | None = None, expected_attach_type: int = 0) -> None:
        """Take over `fd`. `name` replaces the kernel's, which is cut at 15 bytes."""
        self.fd = fd
        info = libbpf.ProgInfo()
        try:
            libbpf.info(fd, info, name or "program")
        except BpfError:
            os.close(fd)
            self.fd = -1
            raise
        self.name: str = name or info.name.decode()
        self.id: int = info.id
        self.type: int = info.type
        self.tag: str = bytes(info.tag).hex()
        self.expected_attach_type = expected_attach_type

    @classmethod
    def open_pinned(cls, path: Path | str) -> Program:
        """The program pinned at `path`; BpfError(ENOENT) when there is none."""
        path = Path(path)
        fd = libbpf.call(
            "bpf_obj_get", os.fsencode(path), operation="open pinned program", subject=str(path)
        )
        return cls(fd, path.name)

    @classmethod
    def from_id(cls, prog_id: int) -> Program:
        """The program with the kernel's number `prog_id`."""
        fd = libbpf.call(
            "bpf_prog_get_fd_by_id", prog_id, operation="open program", subject=f"id {prog_id}"
        )
        return cls(fd)

    def __repr__(self) -> str:
        return f"<Program {self.name} id {self.id}>"

    def pin(self, path: Path | str) -> None:
        """Pin at `path`, in one step in place of what is pinned there."""
        pin_fd(self.fd, Path(path), f"program {self.name}")

    def stats(self) -> ProgramStats:
        """Sizes and counters."""
        info = libbpf.ProgInfo()
        libbpf.info(self.fd, info, self.name)
        return ProgramStats(
            info.verified_insns,
            info.xlated_prog_len,
            info.jited_prog_len,
            info.run_time_ns,
            info.run_cnt,
        )

    def test_run(
        self,
        data: bytes,
        *,
        ctx: SkBuffCtx | None = None,
        repeat: int = 1,
        cpu: int | None = None,
        room: int = 256,
    ) -> TestRun:
        """Run on a frame (Ethernet header first, 14 bytes at least) by BPF_PROG_TEST_RUN.

        `room`: how many bytes the program may add. `cpu` pins this thread for the run. With
        `repeat` > 1 the frame that the program leaves is its next input.
        """
        opts = libbpf.TestRunOpts(sz=C.sizeof(libbpf.TestRunOpts), repeat=repeat)
        data_in = C.create_string_buffer(data, len(data))
        data_out = C.create_string_buffer(len(data) + room)
        opts.data_in = C.addressof(data_in)
        opts.data_size_in = len(data)
        opts.data_out = C.addressof(data_out)
        opts.data_size_out = len(data_out)
        ctx_out = C.create_string_buffer(_SKB_SIZE)
        if ctx is not None:
            ctx_in = C.create_string_buffer(ctx.pack(), _SKB_SIZE)
            opts.ctx_in = C.addressof(ctx_in)
            opts.ctx_size_in = _SKB_SIZE
            opts.ctx_out = C.addressof(ctx_out)
            opts.ctx_size_out = _SKB_SIZE
        with _on_cpu(cpu):
            libbpf.call(
                "bpf_prog_test_run_opts",
                self.fd,
                C.byref(opts),
                operation="test run program",
                subject=self.name,
            )
        return TestRun(
            C.c_int32(opts.retval).value,
            data_out.raw[: opts.data_size_out],
            SkBuffCtx.unpack(ctx_out.raw[: opts.ctx_size_out]) if ctx is not None else None,
            opts.duration,
        )
