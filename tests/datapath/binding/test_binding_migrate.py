"""Pinned maps from one build to the next, and builds that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

from cilia.bpf import (
    BpfError,
    Map,
    MapPolicy,
    MigrationRefused,
    Object,
    OnChange,
    SkBuffCtx,
    VerifierError,
    layout,
    load_all,
)

FRAME = bytes(12) + b"\x08\x00" + bytes(50)
PINNED = {"t_hash", "t_lru", "t_percpu", "t_outer", "t_ring", "t_lost", "t_scratch"}


class Build(Protocol):
    def __call__(self, name: str, *defines: str) -> Path: ...


def key(number: int, size: int = 4) -> bytes:
    return number.to_bytes(size, "little")


def pins(directory: Path) -> dict[str, int]:
    """Name -> number of each pinned map."""
    return {p.name: Map.open_pinned(p).id for p in directory.iterdir() if "." not in p.name}


def first_run(path: Path, bpffs: Path) -> Object:
    """Load and fill every map."""
    obj = Object.open(path, pin_dir=bpffs)
    assert obj.load() == ()
    more = obj.map("t_hash").value_size - 8
    obj.map("t_hash").update(key(0), key(1) + key(2) + bytes(more))
    obj.map("t_lru").update(key(5, 8), key(3) + key(4) + bytes(more))
    obj.map("t_percpu").update(key(2), key(10, 8) + key(20, 8) + bytes(more))
    inner = obj.new_inner("t_outer", "policy_1")
    inner.update(key(7, 8), key(99) + bytes(12 + more))
    obj.map("t_outer").set_inner(1, inner)
    return obj


def test_an_equal_build_uses_what_is_pinned(build: Build, bpffs: Path) -> None:
    first_run(build("plain"), bpffs)
    before = pins(bpffs)
    assert set(before) == PINNED
    with Object.open(build("g2", "GENERATION=2"), pin_dir=bpffs) as obj:
        assert obj.load() == ()
        assert obj.map("t_hash").lookup(key(0)) == key(1) + key(2)
    assert pins(bpffs) == before


def test_maps_need_no_pins(build: Build, bpffs: Path) -> None:
    with Object.open(build("plain")) as obj:
        obj.load()
    assert pins(bpffs) == {}


def test_a_map_may_be_left_out(build: Build, bpffs: Path) -> None:
    with Object.open(build("plain"), pin_dir=bpffs, unpinned=["t_scratch"]) as obj:
        obj.load()
    assert set(pins(bpffs)) == PINNED - {"t_scratch"}


def test_a_reset_may_be_asked_for(build: Build, bpffs: Path) -> None:
    first_run(build("plain"), bpffs)
    policies = {"t_hash": MapPolicy(on_change=OnChange.RESET)}
    grown = build("grown", "VALUE_EXTRA=1")
    with Object.open(grown, pin_dir=bpffs, policies=policies) as obj:
        done = {m.name: (m.copied, m.dropped) for m in obj.load()}
        assert obj.map("t_hash").lookup(key(0)) is None
    assert done["t_hash"] == (0, 1)


def test_an_empty_outer_map_is_shared_and_kept(build: Build, bpffs: Path) -> None:
    """Nothing in it tells its shape: the kernel is asked, and no slot is left used by that."""
    with Object.open(build("plain"), pin_dir=bpffs) as obj:
        obj.load()
    before = pins(bpffs)
    with Object.open(build("plain"), pin_dir=bpffs) as obj:
        obj.load()
        assert not any(obj.map("t_outer").inner_id(n) for n in range(8))
    assert pins(bpffs) == before


def test_a_full_outer_map_is_judged_by_its_maps(build: Build, bpffs: Path) -> None:
    with Object.open(build("plain"), pin_dir=bpffs) as obj:
        obj.load()
        for slot in range(8):
            obj.map("t_outer").set_inner(slot, obj.new_inner("t_outer", "policy", 8 + slot))
    before = pins(bpffs)
    with Object.open(build("plain"), pin_dir=bpffs) as obj:
        assert obj.load() == ()
    assert pins(bpffs) == before
    with Object.open(build("grown", "VALUE_EXTRA=1"), pin_dir=bpffs) as obj:
        assert {m.name: m.copied for m in obj.load()}["t_outer"] == 8


def test_grown_values_are_carried(build: Build, bpffs: Path) -> None:
    first_run(build("plain"), bpffs)
    before = pins(bpffs)
    with Object.open(build("grown", "VALUE_EXTRA=1"), pin_dir=bpffs) as obj:
        done = {m.name: m for m in obj.load()}
        assert obj.map("t_hash").lookup(key(0)) == key(1) + key(2) + bytes(8)
        assert obj.map("t_lru").lookup(key(5, 8)) == key(3) + key(4) + bytes(8)
        grown = np.dtype([("packets", "u8"), ("bytes", "u8"), ("more", "u8")])
        counts = obj.map("t_percpu").lookup_percpu(key(2), grown)
        assert counts is not None
        assert set(counts.tolist()) == {(10, 20, 0)}
        inner = obj.map("t_outer").inner_id(1)
        assert inner is not None
        assert Map.from_id(inner).lookup(key(7, 8)) == key(99) + bytes(20)
        assert obj.program("look_inside").test_run(FRAME, ctx=SkBuffCtx(mark=1)).retval == 99
    assert set(done) == {"t_hash", "t_lru", "t_percpu", "t_outer"}
    assert "value_size 8 -> 16" in done["t_hash"].text
    assert "inner map: value_size 16 -> 24" in done["t_outer"].text
    assert (done["t_hash"].copied, done["t_hash"].dropped) == (1, 0)
    after = pins(bpffs)
    assert set(after) == PINNED
    assert {name for name in PINNED if after[name] != before[name]} == set(done)


def test_sizes_change_both_ways(build: Build, bpffs: Path) -> None:
    first_run(build("plain"), bpffs)
    sizes = {"t_hash": 128, "t_outer": 16, "t_ring": 1 << 15}
    with Object.open(build("plain"), pin_dir=bpffs, map_sizes=sizes) as obj:
        done = {m.name: m.copied for m in obj.load()}
        assert done == {"t_hash": 1, "t_outer": 1, "t_ring": 0}
        assert obj.map("t_hash").max_entries == 128
        assert obj.program("look_inside").test_run(FRAME, ctx=SkBuffCtx(mark=1)).retval == 99
    with Object.open(build("plain"), pin_dir=bpffs) as obj:
        obj.load()
        m = obj.map("t_hash")
        m.update_batch(np.arange(50, dtype="u4"), np.zeros(50, "u8"))
    before = pins(bpffs)
    with (
        Object.open(build("plain"), pin_dir=bpffs, map_sizes={"t_hash": 20}) as obj,
        pytest.raises(MigrationRefused, match=r"t_hash.*more rows than the new size of 20"),
    ):
        obj.load()
    assert pins(bpffs) == before


def test_shrunk_values_empty_caches_and_refuse_others(build: Build, bpffs: Path) -> None:
    first_run(build("grown", "VALUE_EXTRA=1"), bpffs)
    before = pins(bpffs)
    with (
        Object.open(build("plain"), pin_dir=bpffs) as obj,
        pytest.raises(MigrationRefused, match=r"t_hash.*value_size 16 -> 8"),
    ):
        obj.load()
    assert pins(bpffs) == before
    policies = {
        "t_hash": MapPolicy(convert=lambda k, v: (k, v[:8])),
        "t_outer": MapPolicy(convert=lambda k, v: (k, v[:16])),
    }
    with Object.open(build("plain"), pin_dir=bpffs, policies=policies) as obj:
        done = {m.name: (m.copied, m.dropped) for m in obj.load()}
        assert obj.map("t_hash").lookup(key(0)) == key(1) + key(2)
        assert obj.map("t_lru").lookup(key(5, 8)) is None
        assert obj.program("look_inside").test_run(FRAME, ctx=SkBuffCtx(mark=1)).retval == 99
    assert done == {"t_hash": (1, 0), "t_lru": (0, 1), "t_percpu": (0, 0), "t_outer": (1, 0)}


def test_a_field_that_means_something_else_is_a_change(build: Build, bpffs: Path) -> None:
    """Sizes are equal; the types that the kernel keeps with the map tell."""
    first_run(build("plain"), bpffs)
    with (
        Object.open(build("renamed", "RENAMED"), pin_dir=bpffs) as obj,
        pytest.raises(MigrationRefused, match=r"t_hash: .*value field b changed"),
    ):
        obj.load()


def test_refuse_is_refused(build: Build, bpffs: Path) -> None:
    first_run(build("plain"), bpffs)
    policies = {"t_hash": MapPolicy(on_change=OnChange.REFUSE)}
    grown = build("grown", "VALUE_EXTRA=1")
    with (
        Object.open(grown, pin_dir=bpffs, policies=policies) as obj,
        pytest.raises(MigrationRefused, match="t_hash"),
    ):
        obj.load()


def test_a_build_the_verifier_refuses_changes_nothing(build: Build, bpffs: Path) -> None:
    old = first_run(build("plain"), bpffs)
    before = pins(bpffs)
    bad = build("grown_refused", "VALUE_EXTRA=1", "REFUSED")
    with Object.open(bad, pin_dir=bpffs) as obj, pytest.raises(VerifierError) as caught:
        obj.load()
    if caught.value.saved:
        caught.value.saved.unlink()
    assert pins(bpffs) == before
    old.program("generation").test_run(FRAME)
    assert Map.open_pinned(bpffs / "t_hash").lookup(key(0)) == key(2) + key(2)


def test_objects_that_share_maps_load_as_one(build: Build, bpffs: Path) -> None:
    first_run(build("plain"), bpffs)
    before = pins(bpffs)
    good, bad = (
        build("grown", "VALUE_EXTRA=1"),
        build("grown_refused", "VALUE_EXTRA=1", "REFUSED"),
    )
    with Object.open(good, pin_dir=bpffs) as one, Object.open(bad, pin_dir=bpffs) as two:
        with pytest.raises(VerifierError) as caught:
            load_all([one, two])
        if caught.value.saved:
            caught.value.saved.unlink()
    assert pins(bpffs) == before
    with Object.open(good, pin_dir=bpffs) as one, Object.open(good, pin_dir=bpffs) as two:
        assert {m.name for m in load_all([one, two])} == {"t_hash", "t_lru", "t_percpu", "t_outer"}
        for name in PINNED:
            assert one.map(name).id == two.map(name).id == pins(bpffs)[name]


def test_objects_that_disagree_about_a_new_map(build: Build, bpffs: Path) -> None:
    one = Object.open(build("plain"), pin_dir=bpffs)
    two = Object.open(build("grown", "VALUE_EXTRA=1"), pin_dir=bpffs)
    with pytest.raises(BpfError, match="share map t_hash"):
        load_all([one, two])
    assert pins(bpffs) == {}


def test_a_leftover_of_a_killed_run_is_no_obstacle(build: Build, bpffs: Path) -> None:
    first_run(build("plain"), bpffs)
    # killed between pin and rename
    Map.open_pinned(bpffs / "t_hash").pin(bpffs / "t_hash__new_1")
    with Object.open(build("plain"), pin_dir=bpffs) as obj:
        assert obj.load() == ()


def test_layouts_of_the_datapath_hold_in_a_map(build: Build) -> None:
    """A row written through the dtype is the row that C reads."""
    with Object.open(build("plain"), layouts=layout.CILIA) as obj:
        obj.load()
        inner = obj.new_inner("t_outer", "one")
        rows: Any = np.zeros(1, layout.POLICY_VALUE)
        rows["rule_id"] = 5
        keys: Any = np.zeros(1, layout.POLICY_KEY)
        keys["identity"] = 7
        inner.update_batch(keys, rows)
        obj.map("t_outer").set_inner(0, inner)
        assert obj.program("look_inside").test_run(FRAME, ctx=SkBuffCtx(mark=0)).retval == 5
