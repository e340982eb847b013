"""Loading, constants, maps and test runs against the running kernel."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

from cilia.bpf import (
    BpfError,
    LayoutError,
    LayoutSet,
    Map,
    Object,
    Program,
    SkBuffCtx,
    VerifierError,
    layout,
    probe,
)
from cilia.bpf.uapi import EXIST, F_NO_PREALLOC, NOEXIST, TC_ACT_OK, TC_ACT_SHOT, MapType
from tests.datapath.harness import takes_ingress_ifindex

FRAME = bytes(12) + b"\x08\x00" + bytes(50)
ROW = np.dtype([("a", "u4"), ("b", "u4")])


class Build(Protocol):
    def __call__(self, name: str, *defines: str) -> Path: ...


def key(number: int) -> bytes:
    return number.to_bytes(4, "little")


def test_every_structure_equals_the_headers(build: Build) -> None:
    with Object.open(build("plain"), layouts=layout.CILIA) as obj:
        assert layout.CILIA.check(obj) == set(layout.CILIA.structs)


def test_a_layout_that_differs_refuses_to_load(build: Build) -> None:
    wrong = np.dtype([("packets", "u8"), ("octets", "u8")])
    with Object.open(build("plain"), layouts=LayoutSet(structs={"metric": wrong})) as obj:
        with pytest.raises(LayoutError, match="struct metric, field bytes"):
            obj.load()
        with pytest.raises(BpfError, match="not loaded"):
            obj.map("t_hash")


def test_a_map_of_other_sizes_refuses_to_load(build: Build) -> None:
    wrong = LayoutSet(structs={}, maps={"t_hash": (layout.U32, layout.METRIC)})
    with (
        Object.open(build("plain"), layouts=wrong) as obj,
        pytest.raises(LayoutError, match="t_hash, field value: 8 bytes in the object, 16 here"),
    ):
        obj.load()


def test_constants_are_seen_by_programs(build: Build) -> None:
    address = layout.to_addr("10.20.30.40")
    constants: dict[str, bytes | int] = {"NUMBER": 4711, "SMALL": 200, "ADDRESS": address}
    with Object.open(build("plain"), rodata=constants) as obj:
        assert obj.rodata()["ADDRESS"] == address
        obj.load()
        run = obj.program("generation").test_run(FRAME, ctx=SkBuffCtx(mark=9))
    assert run.ctx_out is not None
    assert run.ctx_out.cb[:3] == (4711, 200, int.from_bytes(address[12:], "little"))
    assert (run.retval, run.ctx_out.mark, run.ctx_out.priority) == (TC_ACT_OK, 1, 9)
    assert run.data_out == FRAME


@pytest.mark.parametrize(
    ("constants", "text"),
    [
        ({"NUMBR": 1}, "NUMBR.*has ADDRESS, NUMBER, SMALL"),
        ({"SMALL": 256}, "does not fit 1 bytes"),
        ({"ADDRESS": b"1234"}, "4 bytes given, it has 16"),
    ],
)
def test_wrong_constants_are_refused(build: Build, constants: dict[str, Any], text: str) -> None:
    with pytest.raises(BpfError, match=text):
        Object.open(build("plain"), rodata=constants)


def test_missing_object_names_the_cure(tmp_path: Path) -> None:
    with pytest.raises(BpfError, match="make bpf"):
        Object.open(tmp_path / "absent.o")


def test_the_verifiers_log_is_kept(build: Build) -> None:
    with Object.open(build("refused", "REFUSED")) as obj, pytest.raises(VerifierError) as caught:
        obj.load()
    error = caught.value
    assert error.program == "generation"
    assert "pointer arithmetic prohibited" in error.log or "pkt_end" in error.log
    assert error.saved is not None
    assert error.saved.read_text() == error.log
    assert str(error.saved) in str(error)
    error.saved.unlink()


def test_test_run_context_is_bounded_by_the_kernel(build: Build) -> None:
    with Object.open(build("plain")) as obj:
        obj.load()
        prog = obj.program("generation")
    ingress = 5 if takes_ingress_ifindex() else 0
    ctx = SkBuffCtx(ifindex=1, ingress_ifindex=ingress)
    assert prog.test_run(FRAME, ctx=ctx).retval == TC_ACT_OK
    with pytest.raises(BpfError, match="EINVAL"):
        prog.test_run(FRAME, ctx=SkBuffCtx(tc_index=1))
    assert prog.test_run(FRAME, repeat=1000).duration_ns < 1_000_000
    assert prog.stats().xlated_bytes > 0
    if tuple(map(int, os.uname().release.split(".")[:2])) >= (5, 16):  # older ones do not tell
        assert prog.stats().verified_insns > 0


def test_single_operations() -> None:
    m = Map.create(MapType.HASH, "t", 4, 8, 2)
    assert m.lookup(key(1)) is None
    m.update(key(1), b"12345678", NOEXIST)
    with pytest.raises(BpfError) as caught:
        m.update(key(1), b"12345678", NOEXIST)
    assert caught.value.errno == errno.EEXIST
    with pytest.raises(BpfError) as caught:
        m.update(key(2), b"12345678", EXIST)
    assert caught.value.errno == errno.ENOENT
    assert m.lookup(key(1)) == b"12345678"
    assert m.delete(key(1)) is True
    assert m.delete(key(1)) is False
    with pytest.raises(ValueError, match="a key has 4 bytes"):
        m.lookup(b"1")
    with pytest.raises(ValueError, match="a value has 8 bytes"):
        m.update(key(1), b"1")


def test_a_full_map_says_so() -> None:
    m = Map.create(MapType.HASH, "tiny", 4, 4, 2)
    keys = np.arange(3, dtype="u4")
    with pytest.raises(BpfError, match=r"tiny.*full at 2 entries: raise its size"):
        m.update_batch(keys, keys)


def test_numbers_of_the_wrong_byte_order_are_refused() -> None:
    m = Map.create(MapType.HASH, "policy", 8, 16, 8)
    keys, values = np.zeros(2, layout.POLICY_KEY), np.zeros(2, layout.POLICY_VALUE)
    keys["dport_be"] = [80, 443]
    with pytest.raises(ValueError, match="dport_be"):
        m.update_batch(np.concatenate([keys[:1], keys[1:]]), values)
    m.update_batch(np.concatenate([keys[:1], keys[1:]], dtype=layout.POLICY_KEY), values)
    assert {row[4:6] for row, _ in m.items()} == {b"\0\x50", b"\x01\xbb"}


KINDS = [
    (MapType.HASH, 0),
    (MapType.HASH, F_NO_PREALLOC),
    (MapType.LRU_HASH, 0),
    (MapType.LPM_TRIE, F_NO_PREALLOC),
    (MapType.ARRAY, 0),
]


@pytest.mark.parametrize("batches", [True, False])
@pytest.mark.parametrize(("kind", "flags"), KINDS)
def test_many_rows(kind: MapType, flags: int, batches: bool) -> None:
    count = 9000  # more than two portions
    room = count if kind == MapType.ARRAY else 4 * count
    ksize = 8 if kind == MapType.LPM_TRIE else 4
    m = Map.create(kind, "many", ksize, 8, room, flags)
    m._batch = batches
    numbers = np.arange(count, dtype="u4")
    if kind == MapType.LPM_TRIE:
        kdtype: np.dtype[Any] = np.dtype([("plen", "u4"), ("ip", ">u4")])
        keys = np.zeros(count, kdtype)
        keys["plen"], keys["ip"] = 32, numbers
    else:
        kdtype, keys = np.dtype("u4"), numbers
    m.update_batch(keys, numbers.astype("u8") * 3)
    got_keys, got_values = m.items_np(kdtype, np.dtype("u8"))
    got = got_keys["ip"] if kind == MapType.LPM_TRIE else got_keys
    assert sorted(got.tolist()) == numbers.tolist()
    assert (got_values == got.astype("u8") * 3).all()
    assert len(list(m.items(limit=17))) == 17
    assert len(m.items_np(kdtype, np.dtype("u8"), limit=5000)[0]) == 5000
    if kind != MapType.ARRAY:
        twice = np.concatenate([keys[::2], keys[:100]], dtype=kdtype)
        assert m.delete_batch(twice) == count // 2 + 50
        assert len(list(m.keys())) == count - count // 2 - 50


@pytest.mark.parametrize("batches", [True, False])
@pytest.mark.parametrize("kind", [MapType.HASH, MapType.LRU_HASH, MapType.LPM_TRIE])
def test_reading_ends_while_the_map_churns(kind: MapType, batches: bool) -> None:
    flags = F_NO_PREALLOC if kind != MapType.LRU_HASH else 0
    m = Map.create(kind, "churn", 8, 4, 512, flags)
    m._batch = batches
    stop = threading.Event()

    def row(n: int) -> bytes:
        return key(32) + (n % 2**32).to_bytes(4, "big")

    def churn() -> None:
        n = 0
        while not stop.is_set():
            m.update(row(n), key(n))
            if n >= 200:
                m.delete(row(n - 200))
            n += 1

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(30):
            keys = list(m.keys())
            assert len(keys) == len(set(keys))
            assert len(keys) <= 512
    finally:
        stop.set()
        thread.join()


def test_percpu_rows(build: Build) -> None:
    with Object.open(build("plain")) as obj:
        obj.load()
        m, prog = obj.map("t_percpu"), obj.program("generation")
    cpus = sorted(os.sched_getaffinity(0))
    for times, cpu in enumerate(cpus, 1):
        for _ in range(times):
            prog.test_run(FRAME, cpu=cpu)
    counts = m.lookup_percpu(key(0), layout.METRIC)
    assert counts is not None
    assert [int(counts["packets"][cpu]) for cpu in cpus] == list(range(1, len(cpus) + 1))
    keys, values = m.items_np(layout.U32, layout.METRIC)
    assert values.shape[0] == len(keys) == 16
    assert (values[0]["packets"] == counts["packets"]).all()
    m.update(key(0), bytes(16))
    cleared = m.lookup_percpu(key(0), layout.METRIC)
    assert cleared is not None
    assert not cleared["packets"].any()


def test_maps_in_a_map(build: Build) -> None:
    with Object.open(build("plain")) as obj:
        obj.load()
        outer, prog = obj.map("t_outer"), obj.program("look_inside")
        first, second = obj.new_inner("t_outer", "one"), obj.new_inner("t_outer", "two", 1000)
    rule = np.zeros(1, layout.POLICY_VALUE)
    policy_key = np.zeros(1, layout.POLICY_KEY)
    policy_key["identity"] = 7
    for number, inner in ((41, first), (42, second)):
        rule["rule_id"] = number
        inner.update_batch(policy_key, rule)
    assert outer.inner_id(3) is None
    assert prog.test_run(FRAME, ctx=SkBuffCtx(mark=3)).retval == TC_ACT_SHOT
    outer.set_inner(3, first)
    assert prog.test_run(FRAME, ctx=SkBuffCtx(mark=3)).retval == 41
    outer.set_inner(3, second)
    assert prog.test_run(FRAME, ctx=SkBuffCtx(mark=3)).retval == 42
    assert outer.inner_id(3) == second.id
    assert Map.from_id(second.id).max_entries == 1000
    with pytest.raises(BpfError, match="slot 4, map odd"):
        outer.set_inner(4, Map.create(MapType.HASH, "odd", 8, 32, 4, F_NO_PREALLOC))
    assert outer.clear_inner(3)
    assert outer.inner_id(3) is None


def test_sizes_are_overridden(build: Build) -> None:
    with Object.open(build("plain"), map_sizes={"t_hash": 7, "not_here": 1}) as obj:
        obj.load()
        assert obj.map("t_hash").max_entries == 7
        assert obj.map("t_lru").max_entries == 64


def test_programs_and_maps_outlive_the_object(build: Build, bpffs: Path) -> None:
    with Object.open(build("plain")) as obj:
        obj.load()
        prog, m = obj.program("generation"), obj.map("t_hash")
        with pytest.raises(BpfError, match="has generation"):
            obj.program("nonesuch")
    m.update(key(0), bytes(8))
    prog.pin(bpffs / "prog")
    prog.pin(bpffs / "prog")
    again = Program.open_pinned(bpffs / "prog")
    again.test_run(FRAME)
    assert m.lookup(key(0)) == key(1) + key(0)
    assert again.id == prog.id
    assert sorted(p.name for p in bpffs.iterdir() if "." not in p.name) == ["prog"]


def test_a_pin_outside_bpffs_names_the_cure(tmp_path: Path, need_bpf: None) -> None:
    with pytest.raises(BpfError, match="mount -t bpf"):
        Map.create(MapType.ARRAY, "t", 4, 4, 1).pin(tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


def test_probe_tries_everything(need_bpf: None) -> None:
    before = set(Path("/sys/fs/cgroup").glob("**/cilia-probe-*"))
    found = {feature.name: feature for feature in probe.features()}
    assert found["ringbuf"].present
    assert found["bpf_redirect_peer"].present
    assert found["libbpf"].detail.startswith("libbpf.so.1 v")
    assert all(feature.effect for feature in found.values())
    assert all(feature.cure for feature in found.values() if not feature.present)
    assert probe.missing(list(found.values())) == []
    # Another run's probe may be under way: its group goes in a moment, one that was left stays.
    new = set(Path("/sys/fs/cgroup").glob("**/cilia-probe-*")) - before
    deadline = time.monotonic() + 20
    while left := {path for path in new if path.exists()}:
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def test_an_unknown_helper_is_seen_as_absent(need_bpf: None) -> None:
    assert probe.has_helper("bpf_redirect_neigh")
    unknown = probe.insn(0x85, imm=9999) + probe.insn(0xB7) + probe.insn(0x95)
    with pytest.raises(BpfError, match="func"):
        probe.load_program(unknown)
