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
from services.agent.endpoint import SlotIndex, SubjectKey
from services.agent.policyrows import NO_MASKS, Masks, PolicyRows, difference
from services.agent.rows import PolicyMapRow

log = structlog.get_logger()

CHANGING: Final = 1 << 0  # policy_meta.flags
_SMALLEST: Final = 256  # 16 bytes each: a map that is outgrown costs its subject a grace period
_ROWWISE_LIMIT: Final = 512


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
    rows: PolicyRows
    masks: Masks
    rev: int
    changing: bool


@dataclass(slots=True)
class _Change:
    """A slot on its way to another policy."""

    row: PolicyMapRow
    actual: _Actual | None
    masks: Masks
    rev: int
    inner: Map | None = None  # which holds the new rows
    swap: bool = False  # whether it is yet to be put into the slot

    @property
    def slot(self) -> int:
        return self.row.slot


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
        self._actual[slot] = _Actual(
            inner=inner,
            rows=PolicyRows.from_arrays(keys, values),
            masks=Masks(
                (int(meta["plens_id"][0]), int(meta["plens_id"][1])),
                (int(meta["plens_any"][0]), int(meta["plens_any"][1])),
            ),
            rev=int(meta["rev"]),
            changing=bool(meta["flags"] & CHANGING),
        )

    def slots(self) -> frozenset[int]:
        return frozenset(self._actual)

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
        rows = row.rows
        if len(rows) > self._limit:
            raise PolicyTooLarge(row.subject, row.users, needed=len(rows), allowed=self._limit)
        actual = self._actual.get(row.slot)
        masks = rows.masks()
        if actual is not None:
            if not actual.changing and actual.rev and actual.masks == masks and actual.rows == rows:
                return None
            return _Change(row, actual, masks, actual.rev)
        # The slot may carry the revision of its last owner; its rows are gone.
        raw = self._meta.lookup(int(row.slot).to_bytes(4, "little"))
        rev = int(np.frombuffer(raw, POLICY_META)[0]["rev"]) if raw else 0
        return _Change(row, None, masks, rev)

    def _apply(self, changes: list[_Change], failed: dict[SubjectKey, Exception]) -> None:
        """All steps for all slots; one whose rows cannot be written stays behind, in `failed`."""
        metas = []
        for change in changes:
            old = change.actual.masks if change.actual else NO_MASKS
            union = old.union(change.masks, extra=POLICY_META_HAS_DENY)
            metas.append((change.slot, change.rev, union, CHANGING))
            if change.actual is not None:
                change.actual.changing = True
        self._put_metas(metas)
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
        self._put_metas((c.slot, c.rev, c.masks, CHANGING) for c in good)
        revs = [self._last_rev + 1 + n for n in range(len(good))]
        self._last_rev += len(good)
        self._put_metas((c.slot, rev, c.masks, CHANGING) for c, rev in zip(good, revs, strict=True))
        self._put_metas((c.slot, rev, c.masks, 0) for c, rev in zip(good, revs, strict=True))
        for change, rev in zip(good, revs, strict=True):
            assert change.inner is not None
            rows = change.row.rows
            log.debug(
                "A policy was written.",
                subject=str(change.row.subject),
                slot=change.slot,
                rev=rev,
                rows=len(rows),
                rows_before=len(change.actual.rows) if change.actual else None,
            )
            self._actual[change.slot] = _Actual(change.inner, rows, change.masks, rev, False)

    def _write_rows(self, change: _Change) -> None:
        """Into the slot's map, or into a new one that is to be put there."""
        rows, actual = change.row.rows, change.actual
        if actual is not None:
            delta = difference(actual.rows, rows)
            # Both policies are in the map for a moment, so it must have room for their union.
            peak = len(actual.rows) + len(delta.put_denies) + len(delta.put_allows)
            if len(delta) <= max(_ROWWISE_LIMIT, len(rows) // 8) and (
                peak <= actual.inner.max_entries
            ):
                for put in (delta.put_denies, delta.put_allows):
                    if len(put):
                        actual.inner.update_batch(put.key_array(), put.value_array())
                if len(delta.drop_allows):
                    actual.inner.delete_batch(delta.drop_allows.key_array())
                if len(delta.lift_denies):
                    actual.inner.update_batch(
                        delta.lift_denies.key_array(), delta.lift_denies.value_array()
                    )
                if len(delta.drop_denies):
                    actual.inner.delete_batch(delta.drop_denies.key_array())
                change.inner = actual.inner
                return
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
            self._put_metas([(slot, rev, NO_MASKS, 0)])
        self._policy.clear_inner(slot)
        self._actual.pop(slot, None)
        log.debug("A policy slot was emptied.", slot=slot)

    def _put_metas(self, metas: Iterable[tuple[int, int, Masks, int]]) -> None:
        """Rows of cilia_policy_meta: slot, revision, masks, flags."""
        rows = list(metas)
        values = np.zeros(len(rows), POLICY_META)
        for value, (_, rev, masks, flags) in zip(values, rows, strict=True):
            value["rev"] = rev
            value["flags"] = flags
            value["plens_id"] = masks.id
            value["plens_any"] = masks.any
        self._meta.update_batch(np.array([slot for slot, *_ in rows], "u4"), values)

    def close(self) -> None:
        for actual in self._actual.values():
            actual.inner.close()
        self._actual.clear()


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
