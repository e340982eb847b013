"""No program of ours uses what Linux 5.10 lacks: looked up in the objects, without booting one."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

FLOOR = (5, 10)

# Helpers by number (include/uapi/linux/bpf.h), and the kernel that tc programs first had each in.
HELPERS = {
    1: ("map_lookup_elem", (3, 19)),
    2: ("map_update_elem", (3, 19)),
    3: ("map_delete_elem", (3, 19)),
    5: ("ktime_get_ns", (4, 1)),
    7: ("get_prandom_u32", (4, 1)),
    8: ("get_smp_processor_id", (4, 1)),
    9: ("skb_store_bytes", (4, 1)),
    10: ("l3_csum_replace", (4, 1)),
    11: ("l4_csum_replace", (4, 1)),
    19: ("skb_vlan_pop", (4, 3)),
    23: ("redirect", (4, 4)),
    26: ("skb_load_bytes", (4, 5)),
    28: ("csum_diff", (4, 6)),
    38: ("skb_change_tail", (4, 9)),
    39: ("skb_pull_data", (4, 9)),
    43: ("skb_change_head", (5, 8)),
    69: ("fib_lookup", (4, 18)),
    85: ("sk_lookup_udp", (4, 20)),
    86: ("sk_release", (4, 20)),
    95: ("sk_fullsock", (5, 1)),
    98: ("get_listener_sock", (5, 1)),
    99: ("skc_lookup_tcp", (5, 2)),
    124: ("sk_assign", (5, 7)),
    131: ("ringbuf_reserve", (5, 8)),
    132: ("ringbuf_submit", (5, 8)),
    133: ("ringbuf_discard", (5, 8)),
    152: ("redirect_neigh", (5, 10)),
    155: ("redirect_peer", (5, 10)),
    160: ("ktime_get_coarse_ns", (5, 11)),
}
# In a branch that HAVE_KTIME_COARSE rules out, which the verifier then never sees.
GUARDED = {160}

CALL, ATOMIC_W, ATOMIC_DW = 0x85, 0xC3, 0xDB
HELPER_CALL, BPF_ADD = 0, 0
SHT_PROGBITS, SHF_EXECINSTR = 1, 4


def _instructions(path: Path) -> Iterator[tuple[int, int, int]]:
    """(opcode, source register, immediate) of every instruction of an ELF64 object."""
    data = path.read_bytes()
    (sections,) = struct.unpack_from("=Q", data, 0x28)
    size, count = struct.unpack_from("=HH", data, 0x3A)
    for index in range(count):
        kind, flags, _, offset, length = struct.unpack_from(
            "=IQQQQ", data, sections + index * size + 4
        )
        if kind != SHT_PROGBITS or not flags & SHF_EXECINSTR:
            continue
        for code, registers, _, immediate in struct.iter_unpack(
            "=BBhi", data[offset : offset + length]
        ):
            yield code, registers >> 4, immediate


@pytest.fixture(scope="module", params=["bpf_lxc", "bpf_host"])
def instructions(request: pytest.FixtureRequest, repository: Path, need_objects: None) -> list[
    tuple[int, int, int]
]:  # fmt: skip
    found = list(_instructions(repository / "build" / "bpf" / f"{request.param}.o"))
    assert len(found) > 1000
    return found


def test_helpers_are_of_the_floor(instructions: list[tuple[int, int, int]]) -> None:
    called = {number for code, source, number in instructions if (code, source) == (CALL, 0)}
    assert 155 in called, "bpf_redirect_peer is not called: the instructions were read wrongly"
    unknown = called - HELPERS.keys()
    assert not unknown, f"look up which kernel first had helpers {sorted(unknown)}, and list them"
    newer = {n for n in called - GUARDED if HELPERS[n][1] > FLOOR}
    assert not newer, f"not in Linux 5.10: {[HELPERS[n][0] for n in sorted(newer)]}"


def test_atomics_are_of_the_floor(instructions: list[tuple[int, int, int]]) -> None:
    """Before Linux 5.12 there is atomic addition without a result, and nothing else."""
    atomics = [imm for code, _, imm in instructions if code in (ATOMIC_W, ATOMIC_DW)]
    assert set(atomics) <= {BPF_ADD}, f"atomic operations {set(atomics)} need Linux 5.12"
