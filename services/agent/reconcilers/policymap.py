"""Policy maps: the inner maps of cilia_policy and the rows of cilia_policy_meta.

Order of every change (bpf/lib/types.h, struct policy_meta), so that no reader ever allows what
neither the old nor the new policy allows:

    masks = old | new | HAS_DENY, and the CHANGING mark
      -> rows one by one (denials, allows, allows away, denials away)   small change
         or a new inner map, filled and then swapped in                 large change
        -> masks = new
          -> rev = the next number of the node, a write that changes nothing else
            -> the mark is cleared

Each step is taken for all slots that change before the next one is: the kernel waits for a grace
period after maps were put into slots, once for all of a batch (since Linux 6.8).

The mark (policy_meta.flags, which the programs do not read) says after a crash that rows may be
newer than the revision under which connections were admitted: such a slot gets a new revision.

Revisions are one counter a node. A freed slot keeps its last one, so the largest number in the
pinned array is always the last that was given, and no connection can outlive its revision.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import structlog

from cilia.bpf import Map
from cilia.bpf.constants import POLICY_META_HAS_DENY
from cilia.bpf.layout import POLICY_KEY, POLICY_META, POLICY_VALUE, U32
from cilia.bpf.uapi import F_NO_PREALLOC, MapType
from cilia.errors import ExhaustedError
from cilia.reconcile import Reconciler
from cilia.table import ReadTable
from services.agent.datapath import Datapath
from services.agent.drift import Drift
from services.agent.endpoint import SlotIndex, SubjectKey
from services.agent.policyrows import (
    NO_MASKS,
    Masks,
    PolicyRows,
    RowsDelta,
    Writes,
    changes,
    difference,
    row_differences,
)
from services.agent.rows import InForceSlot, PolicyMapRow

log = structlog.get_logger()

CHANGING: Final = 1 << 0  # policy_meta.flags
_SMALLEST: Final = 256  # 16 bytes each: a map that is outgrown costs its subject a grace period
_ROWWISE_LIMIT: Final = 512
_REV_BELIEVED: Final = 1 << 31  # a larger one than we come to is nonsense
_LOGGED: Final = 16  # policies of one write that the log names


class PolicyTooLarge(ExhaustedError):
    def __init__(
        self,
        subject: SubjectKey,
        users: Sequence[str],
        *,
        needed: int,
        allowed: int,
        outcome: str = "the old policy stays",
    ) -> None:
        who = ", ".join(users[:3]) + (", ..." if len(users) > 3 else "")
        super().__init__(
            f"policy of {who or 'no endpoint'} (identity {subject.identity}) needs "
            f"{needed} map entries, {allowed} are allowed; {outcome}",
            cure="Raise --bpf-policy-map-max, or write fewer or broader rules",
        )


@dataclass(slots=True)
class _Actual:
    """What a slot holds, as far as we know."""

    inner: Map
    row: PolicyMapRow | None  # what was written last; None: what was found, in `found`
    found: PolicyRows | None
    size: int  # rows
    masks: Masks
    rev: int
    changing: bool
    digest: bytes = b""  # of the rows, once somebody asked

    @property
    def rows(self) -> PolicyRows:
        if self.row is not None:
            return self.row.rows
        assert self.found is not None
        return self.found

    @property
    def proxy_ports(self) -> frozenset[int]:
        """Of the proxy, that rows name."""
        if self.row is not None:
            ports = self.row.fill.ports
            return frozenset(ports[x.digest] for x in self.row.state.l7 if x.digest in ports)
        values = self.rows.value_array()["proxy_port_be"]
        return frozenset(np.unique(values).tolist()) - {0}


@dataclass(slots=True)
class _Change:
    """A slot on its way to another policy."""

    row: PolicyMapRow
    size: int
    actual: _Actual | None
    masks: Masks
    rev: int
    writes: Writes | None  # if the engine knew what changed
    inner: Map | None = None  # which holds the new rows
    swap: bool = False  # whether it is yet to be put into the slot

    @property
    def slot(self) -> int:
        return self.row.slot


def _masks_of(meta: np.void) -> Masks:
    """Of a row of cilia_policy_meta."""
    id_, any_ = meta["plens_id"], meta["plens_any"]
    return Masks((int(id_[0]), int(id_[1])), (int(any_[0]), int(any_[1])))


def _meta_text(rev: int, masks: Masks, flags: int) -> str:
    lengths = " ".join(f"{x:#x}" for x in (*masks.id, *masks.any))
    return f"revision {rev}, lengths {lengths}, flags {flags:#x}"


def _stray(slot: int) -> Drift:
    return Drift(map="cilia_policy", row=f"slot {slot}", expected="empty", found="a policy")


class PolicyMaps:
    """The kernel side, blocking: runs on the datapath's executor, one call at a time."""

    def __init__(self, *, policy: Map, meta: Map, limit: int) -> None:
        self._policy = policy
        self._meta = meta
        self._limit = limit
        self._actual: dict[int, _Actual] = {}
        self._last_rev = 0

    @property
    def last_rev(self) -> int:
        return self._last_rev

    def rev(self, slot: int) -> int:
        actual = self._actual.get(slot)
        return actual.rev if actual else 0

    def read_back(self) -> None:
        """Take what is pinned as the actual state."""
        slots, metas = self._meta.items_np(U32, POLICY_META)
        self._last_rev = int(metas["rev"].max(initial=0))
        self._actual.clear()
        used = (metas["rev"] != 0) | (metas["flags"] != 0)
        for slot in slots[used].tolist():
            self._read_slot(slot)

    def _read_slot(self, slot: int) -> None:
        raw = self._meta.lookup(int(slot).to_bytes(4, "little"))
        inner_id = self._policy.inner_id(slot)
        if raw is None or inner_id is None:
            self._actual.pop(slot, None)
            return
        meta = np.frombuffer(raw, POLICY_META)[0]
        inner = Map.from_id(inner_id, f"policy {slot}")
        keys, values = inner.items_np(POLICY_KEY, POLICY_VALUE)
        found = PolicyRows.from_arrays(keys, values)
        self._actual[slot] = _Actual(
            inner=inner,
            row=None,
            found=found,
            size=len(found),
            masks=_masks_of(meta),
            rev=int(meta["rev"]),
            changing=bool(meta["flags"] & CHANGING),
        )

    def slots(self) -> frozenset[int]:
        return frozenset(self._actual)

    def in_force(self, slots: Collection[int]) -> list[InForceSlot]:
        """What these slots hold, whatever is wanted there."""
        return [
            InForceSlot(slot, actual.row, actual.proxy_ports)
            for slot in slots
            if (actual := self._actual.get(slot)) is not None
        ]

    def is_summed(self, slot: int) -> bool:
        """Whether it is known what the slot's rows come to, so that rereading it is cheap."""
        actual = self._actual.get(slot)
        return actual is None or bool(actual.digest)

    def strays(self) -> list[int]:
        """Slots in which programs would find something, and nothing was written."""
        slots, metas = self._meta.items_np(U32, POLICY_META)
        used = (metas["plens_id"] != 0).any(axis=1) | (metas["plens_any"] != 0).any(axis=1)
        return [slot for slot in slots[used].tolist() if slot not in self._actual]

    def reread(self, slot: int) -> list[Drift]:
        """Look at a slot again; one that is not as it was written is forgotten, and due.

        Reads a map state: not while the calculation changes.
        """
        actual = self._actual.get(slot)
        if actual is None:
            self._read_slot(slot)
            return [_stray(slot)] if slot in self._actual else []
        row = actual.row
        subject, users = (row.subject, row.users) if row is not None else (None, ())
        drifts: list[Drift] = []

        def drifted(name: str, which: str, expected: str, found: str, rule_id: int = 0) -> None:
            drifts.append(
                Drift(
                    map=name,
                    row=f"slot {slot}{which}",
                    expected=expected,
                    found=found,
                    subject=subject,
                    users=users,
                    rule_id=rule_id,
                )
            )

        raw = self._meta.lookup(int(slot).to_bytes(4, "little"))
        wanted = _meta_text(actual.rev, actual.masks, CHANGING if actual.changing else 0)
        meta = np.frombuffer(raw or bytes(POLICY_META.itemsize), POLICY_META)[0]
        met = _meta_text(int(meta["rev"]), _masks_of(meta), int(meta["flags"]))
        if met != wanted:
            drifted("cilia_policy_meta", "", wanted, met)
        inner_id = self._policy.inner_id(slot)
        if inner_id is None:
            drifted("cilia_policy", "", f"{actual.size} rows", "no map")
        else:
            with contextlib.closing(Map.from_id(inner_id, f"policy {slot}")) as inner:
                found = PolicyRows.from_arrays(*inner.items_np(POLICY_KEY, POLICY_VALUE))
            if actual.digest != (seen := found.digest()):
                rows = actual.rows
                actual.digest = rows.digest()
                if actual.digest != seen:
                    for which, expected, now, rule_id in row_differences(rows, found):
                        drifted("cilia_policy", f" {which}", expected, now, rule_id)
        if drifts:
            # It is made anew, with a map of its own: that in the slot may be another slot's. And
            # with a new revision, above whatever stands there: connections were admitted under it.
            self._actual.pop(slot)
            actual.inner.close()
            if int(meta["rev"]) < _REV_BELIEVED:
                self._last_rev = max(self._last_rev, int(meta["rev"]))
        return drifts

    def write(self, rows: Iterable[PolicyMapRow]) -> dict[SubjectKey, Exception]:
        """Make the slots hold these policies; returns what failed: PolicyTooLarge, BpfError."""
        failed: dict[SubjectKey, Exception] = {}
        changes: list[_Change] = []
        for row in rows:
            try:
                change = self._change(row)
            except (PolicyTooLarge, OSError) as error:
                failed[row.subject] = error
            else:
                if change is not None:
                    changes.append(change)
        try:
            self._apply(changes, failed)
        except OSError as error:
            for change in changes:
                failed.setdefault(change.row.subject, error)
        for change in changes:
            if change.row.subject in failed:
                self._read_slot(change.slot)  # some of it may be in: know what, before the next try
        return failed

    def _change(self, row: PolicyMapRow) -> _Change | None:
        """What is to be done; None when the slot holds the policy. Raises PolicyTooLarge."""
        size = row.size
        if size > self._limit:
            raise PolicyTooLarge(row.subject, row.users, needed=size, allowed=self._limit)
        actual = self._actual.get(row.slot)
        masks = row.masks
        if actual is None:
            # The slot may carry the revision of its last owner; its rows are gone.
            raw = self._meta.lookup(int(row.slot).to_bytes(4, "little"))
            rev = int(np.frombuffer(raw, POLICY_META)[0]["rev"]) if raw else 0
            return _Change(row, size, None, masks, rev, None)
        sound = not actual.changing and actual.rev and actual.masks == masks
        writes: Writes | None = None
        before = actual.row
        if (
            before is not None
            and (row.state is before.state or row.state.follows(before.state))
            and (before.fill == row.fill or not (before.state.l7 or row.state.l7))
        ):
            writes = changes(before.state, row.state, row.fill)
            same = not len(writes)
        else:
            same = actual.size == size and actual.rows == row.rows
        if sound and same:
            # The newer snapshot, so that the engine need not remember the older one's differences.
            actual.row, actual.found = row, None
            return None
        return _Change(row, size, actual, masks, actual.rev, writes)

    def _apply(self, changes: list[_Change], failed: dict[SubjectKey, Exception]) -> None:
        """All steps for all slots; one whose rows cannot be written stays behind, in `failed`."""
        if not changes:
            return
        unions = []
        for change in changes:
            old = change.actual.masks if change.actual else NO_MASKS
            unions.append(old.union(change.masks, extra=POLICY_META_HAS_DENY))
            if change.actual is not None:
                change.actual.changing = True
        self._put_metas(changes, [c.rev for c in changes], unions, CHANGING)
        for change in changes:
            try:
                self._write_rows(change)
            except OSError as error:
                failed[change.row.subject] = error
        good = [change for change in changes if change.row.subject not in failed]
        swaps = [(c.slot, c.inner.fd) for c in good if c.swap and c.inner is not None]
        if swaps:
            numbers = np.array(swaps, "u4")
            self._policy.update_batch(
                np.ascontiguousarray(numbers[:, 0]), np.ascontiguousarray(numbers[:, 1])
            )
        masks = [c.masks for c in good]
        self._put_metas(good, [c.rev for c in good], masks, CHANGING)
        revs = [self._last_rev + 1 + n for n in range(len(good))]
        self._last_rev += len(good)
        self._put_metas(good, revs, masks, CHANGING)
        self._put_metas(good, revs, masks, 0)
        for change, rev in zip(good, revs, strict=True):
            assert change.inner is not None
            self._actual[change.slot] = _Actual(
                change.inner, change.row, None, change.size, change.masks, rev, False
            )
        log.debug(
            "Policies were written.",
            subjects=[str(change.row.subject) for change in good[:_LOGGED]],
            slots=[change.slot for change in good[:_LOGGED]],
            rows=[change.size for change in good[:_LOGGED]],
            count=len(good),
            last_rev=self._last_rev,
        )

    def _write_rows(self, change: _Change) -> None:
        """Into the slot's map, or into a new one that is to be put there."""
        actual, rows = change.actual, None
        allowed = max(_ROWWISE_LIMIT, change.size // 8)
        if actual is not None:
            # Both policies are in the map for a moment, so it must have room for their union.
            writes = change.writes
            if writes is not None:
                few = len(writes) <= allowed and actual.size + writes.added <= (
                    actual.inner.max_entries
                )
                if few:
                    _write_few(actual.inner, writes)
                    change.inner = actual.inner
                    return
            else:
                rows = change.row.rows
                delta = difference(actual.rows, rows)
                peak = actual.size + len(delta.put_denies) + len(delta.put_allows)
                if len(delta) <= allowed and peak <= actual.inner.max_entries:
                    _write_some(actual.inner, delta)
                    change.inner = actual.inner
                    return
        if rows is None:
            rows = change.row.rows
        size = _SMALLEST
        while size < 2 * len(rows) and size < self._limit:
            size *= 2
        inner = Map.create(
            MapType.HASH,
            f"policy_{change.slot}",
            POLICY_KEY.itemsize,
            POLICY_VALUE.itemsize,
            max(min(size, self._limit), len(rows), 1),
            F_NO_PREALLOC,
        )
        if len(rows):
            inner.update_batch(rows.key_array(), rows.value_array())
        change.inner, change.swap = inner, True

    def erase(self, slot: int) -> None:
        """Empty a slot: no row matches, everything is denied. Its revision stays behind."""
        raw = self._meta.lookup(int(slot).to_bytes(4, "little"))
        rev = int(np.frombuffer(raw, POLICY_META)[0]["rev"]) if raw else 0
        if rev:
            values = np.zeros(1, POLICY_META)
            values["rev"] = rev
            self._meta.update_batch(np.array([slot], "u4"), values)
        self._policy.clear_inner(slot)
        self._actual.pop(slot, None)
        log.debug("A policy slot was emptied.", slot=slot)

    def _put_metas(
        self, changes: Sequence[_Change], revs: Sequence[int], masks: Sequence[Masks], flags: int
    ) -> None:
        """Rows of cilia_policy_meta."""
        if not changes:
            return
        values = np.zeros(len(changes), POLICY_META)
        values["rev"] = revs
        values["flags"] = flags
        values["plens_id"] = [x.id for x in masks]
        values["plens_any"] = [x.any for x in masks]
        self._meta.update_batch(np.array([x.slot for x in changes], "u4"), values)

    def close(self) -> None:
        for actual in self._actual.values():
            actual.inner.close()
        self._actual.clear()


def _write_few(inner: Map, writes: Writes) -> None:
    """Row by row: for few rows that costs less than to gather them."""
    for puts, drops in (
        (writes.put_denies, ()),
        (writes.put_allows, writes.drop_allows),
        (writes.lift_denies, writes.drop_denies),
    ):
        for key, value in puts:
            inner.update(key, value)
        for key in drops:
            inner.delete(key)


def _write_some(inner: Map, delta: RowsDelta) -> None:
    for put in (delta.put_denies, delta.put_allows):
        if len(put):
            inner.update_batch(put.key_array(), put.value_array())
    if len(delta.drop_allows):
        inner.delete_batch(delta.drop_allows.key_array())
    if len(delta.lift_denies):
        inner.update_batch(delta.lift_denies.key_array(), delta.lift_denies.value_array())
    if len(delta.drop_denies):
        inner.delete_batch(delta.drop_denies.key_array())


class PolicyMapReconciler(Reconciler[SubjectKey, PolicyMapRow]):
    """Keyed by subject; a subject keeps its slot for life."""

    updates_first = True

    def __init__(
        self, desired: ReadTable[SubjectKey, PolicyMapRow], datapath: Datapath, *, limit: int
    ) -> None:
        super().__init__("policymap", desired)
        self._datapath = datapath
        self._limit = limit
        self._maps: PolicyMaps | None = None
        self._spare: Callable[[], Collection[int]] = frozenset

    def spare_by(self, spare: Callable[[], Collection[int]]) -> None:
        """Who says which slots are not to be emptied, whatever is wanted: rows lead there."""
        self._spare = spare

    @property
    def maps(self) -> PolicyMaps:
        assert self._maps is not None, "read_back() comes first"
        return self._maps

    async def read_back(self) -> None:
        self._maps = PolicyMaps(
            policy=self._datapath.map("cilia_policy"),
            meta=self._datapath.map("cilia_policy_meta"),
            limit=self._limit,
        )
        await self._datapath.run(self._maps.read_back)

    async def reread(self, slots: Collection[int]) -> list[Drift]:
        """Look at slots again, all of which are few: the calculation waits meanwhile."""

        def look() -> list[Drift]:
            return [drift for slot in slots for drift in self.maps.reread(slot)]

        async with self.paused():
            drifts = await self._datapath.run(look)
        if drifts:
            self.trigger_resync()
        return drifts

    async def strays(self) -> list[int]:
        """Slots that hold something although nobody wrote it."""
        async with self.paused():
            return await self._datapath.run(self.maps.strays)

    async def update_batch(
        self, rows: Mapping[SubjectKey, PolicyMapRow]
    ) -> Mapping[SubjectKey, Exception]:
        return await self._datapath.run(self.maps.write, list(rows.values()))

    async def delete(self, row: PolicyMapRow) -> None:
        await self._datapath.run(self.maps.erase, row.slot)

    async def prune(self, rows: Collection[PolicyMapRow]) -> None:
        """Empties the slots that an earlier run left, no subject has and no endpoint leads to."""
        wanted = {row.slot for row in rows}
        for slot in self.maps.slots() - wanted - frozenset(self._spare()):
            await self._datapath.run(self.maps.erase, SlotIndex(slot))
