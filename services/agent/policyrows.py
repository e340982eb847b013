"""One identity's policy as the rows of a policy map: the engine's map state, made of two arrays.

A key and the lasting part of a value (rule, proxy port, flags; not the hit counter) are 8 bytes
each, so a whole policy is two sorted arrays of u64, and the difference of two policies is set
arithmetic without a Python object per row.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cilia.bpf.constants import (
    POLICY_F_AUDIT,
    POLICY_F_DENY,
    POLICY_F_WATCH,
    POLICY_META_HAS_DENY,
)
from cilia.bpf.layout import POLICY_KEY, POLICY_VALUE, plen_egress, split_plen_egress
from cilia.policy import PROTO_NAMES, MapState, PolicyEntry, PolicyKey
from cilia.policy.mapstate import PLEN_PROTO, Block

U64Array = npt.NDArray[np.uint64]

_EMPTY: Final = np.empty(0, "u8")
_DENY_BIT: Final = np.uint64(POLICY_F_DENY << 48)


@dataclass(frozen=True, slots=True)
class Masks:
    """plens_id and plens_any of struct policy_meta, ingress then egress."""

    id: tuple[int, int]
    any: tuple[int, int]

    def union(self, other: Masks, *, extra: int = 0) -> Masks:
        return Masks(
            (self.id[0] | other.id[0] | extra, self.id[1] | other.id[1] | extra),
            (self.any[0] | other.any[0] | extra, self.any[1] | other.any[1] | extra),
        )


NO_MASKS: Final = Masks((0, 0), (0, 0))


@dataclass(frozen=True, slots=True)
class Fill:
    """What a row's value needs besides its entry: the proxies' ports, by the digest of an L7 set.

    A row whose proxy is not ready is absent, for it allows nothing. Where nothing isolates, absence
    would let pass what the proxy was to restrict: there it denies until the proxy is ready.
    """

    ports: Mapping[str, int] = field(default_factory=dict)
    ingress_enforced: bool = True
    egress_enforced: bool = True

    def value(self, key: PolicyKey, entry: PolicyEntry) -> tuple[int, int] | None:
        """(proxy port, flags), or None for no row."""
        if entry.deny:
            return 0, POLICY_F_DENY
        flags = POLICY_F_AUDIT if entry.audit else 0
        if entry.l7 is None:
            return 0, flags
        if (port := self.ports.get(entry.l7.digest)) is not None:
            return port, flags | (POLICY_F_WATCH if entry.l7.watches else 0)
        if entry.l7.allows_all or (self.egress_enforced if key.egress else self.ingress_enforced):
            return None
        return 0, POLICY_F_DENY


class PolicyRows:
    """Immutable. Equal when every row is, whatever the hit counters say."""

    __slots__ = ("keys", "values")

    def __init__(self, keys: U64Array, values: U64Array) -> None:
        order = np.argsort(keys, kind="stable")
        self.keys: U64Array = keys[order]
        self.values: U64Array = values[order]

    def __len__(self) -> int:
        return len(self.keys)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PolicyRows):
            return NotImplemented
        return bool(
            np.array_equal(self.keys, other.keys) and np.array_equal(self.values, other.values)
        )

    def __hash__(self) -> int:
        return hash((len(self.keys), self.keys.tobytes()[:64]))

    def __repr__(self) -> str:
        return f"<PolicyRows {len(self)}>"

    @classmethod
    def from_entries(
        cls,
        entries: Iterable[tuple[PolicyKey, PolicyEntry]],
        fill: Fill | None = None,
    ) -> PolicyRows:
        """Rows of a map state. An endpoint's own audit is its flag (EP_F_AUDIT), no row's."""
        keys = []
        values = []
        fill = fill or Fill()
        for key, entry in entries:
            value = fill.value(key, entry)
            if value is None:
                continue
            keys.append((key.identity, key.port, key.proto, plen_egress(key.plen, key.egress)))
            values.append((entry.rule_id, *value, 0, 0))
        if not keys:
            return cls(_EMPTY, _EMPTY)
        return cls.from_arrays(np.array(keys, POLICY_KEY), np.array(values, POLICY_VALUE))

    @classmethod
    def from_state(cls, state: MapState, fill: Fill) -> PolicyRows:
        """Rows of a map state, block by block: peers that share one differ in the identity only."""
        peers: dict[int, tuple[Block, list[int]]] = {}
        for identity, block in state.blocks().items():
            peers.setdefault(id(block), (block, []))[1].append(identity)
        keys, values = [], []
        for block, identities in peers.values():
            one = cls.from_entries(
                ((PolicyKey(0, *key), entry) for key, entry in block.items()), fill
            )
            if not len(one):
                continue
            # The identity is the first half of a key, in whatever order the machine's bytes are.
            numbers = np.zeros((len(identities), 2), "u4")
            numbers[:, 0] = identities
            words = numbers.view("u8")
            keys.append((words | one.keys).reshape(-1))
            values.append(np.tile(one.values, len(identities)))
        if not keys:
            return cls(_EMPTY, _EMPTY)
        return cls(np.concatenate(keys), np.concatenate(values))

    @classmethod
    def from_arrays(cls, keys: npt.NDArray[Any], values: npt.NDArray[Any]) -> PolicyRows:
        """From rows as the map holds them."""
        if not len(keys):
            return cls(_EMPTY, _EMPTY)
        words = np.ascontiguousarray(values).view("u8").reshape(len(values), 2)[:, 0]
        return cls(np.ascontiguousarray(keys).view("u8").reshape(len(keys)), words.copy())

    def key_array(self) -> npt.NDArray[Any]:
        return self.keys.view(POLICY_KEY)

    def value_array(self) -> npt.NDArray[Any]:
        """Full values, hit counters zero."""
        out = np.zeros((len(self.values), 2), "u8")
        out[:, 0] = self.values
        return out.view(POLICY_VALUE).reshape(len(self.values))

    def digest(self) -> bytes:
        """Equal of equal rows."""
        return hashlib.blake2b(self.keys.tobytes() + self.values.tobytes(), digest_size=16).digest()

    def take(self, chosen: npt.NDArray[Any]) -> PolicyRows:
        return PolicyRows(self.keys[chosen], self.values[chosen])

    @property
    def denies(self) -> npt.NDArray[np.bool_]:
        denies: npt.NDArray[np.bool_] = (self.values & _DENY_BIT) != 0
        return denies

    def masks(self) -> Masks:
        """Which prefix lengths occur, per direction, with an identity and without one."""
        if not len(self):
            return NO_MASKS
        rows = self.key_array()
        has_deny = POLICY_META_HAS_DENY if bool(self.denies.any()) else 0
        plens = (rows["l4_plen_egress"] & 0x7F).astype("u4")
        egress = rows["l4_plen_egress"] >> 7 != 0
        named = rows["identity"] != 0

        def mask(direction: bool, with_identity: bool) -> int:
            chosen = (egress == direction) & (named == with_identity)
            return int(np.bitwise_or.reduce(np.uint32(1) << plens[chosen])) if chosen.any() else 0

        # The deny bit is the policy's, not a direction's: a spare probe costs less than a doubt.
        return Masks(
            (mask(False, True) | has_deny, mask(True, True) | has_deny),
            (mask(False, False) | has_deny, mask(True, False) | has_deny),
        )


@dataclass(frozen=True, slots=True)
class RowsDelta:
    """What turns one policy into another, in the order in which it may be written.

    The traffic allowed is what some allow row matches and no deny row does. Denials first, then new
    allows, then old allows away, then old denials away: at each point what is allowed was allowed
    by the old policy or is by the new one, and what both allow is never interrupted.
    """

    put_denies: PolicyRows
    put_allows: PolicyRows
    drop_allows: PolicyRows
    lift_denies: PolicyRows  # deny rows that become allow rows
    drop_denies: PolicyRows

    def __len__(self) -> int:
        return (
            len(self.put_denies)
            + len(self.put_allows)
            + len(self.drop_allows)
            + len(self.lift_denies)
            + len(self.drop_denies)
        )


_WORD: Final = struct.Struct("=I2sBB")  # the lasting half of a value
_KEY: Final = struct.Struct("=I2sBB")
_VALUE: Final = struct.Struct("=I2sBBQ")


@dataclass(slots=True)
class Writes:
    """As RowsDelta, of few rows: (key, value) as the map takes them, or keys to delete."""

    put_denies: list[tuple[bytes, bytes]] = field(default_factory=list)
    put_allows: list[tuple[bytes, bytes]] = field(default_factory=list)
    drop_allows: list[bytes] = field(default_factory=list)
    lift_denies: list[tuple[bytes, bytes]] = field(default_factory=list)
    drop_denies: list[bytes] = field(default_factory=list)
    added: int = 0  # rows under keys that the old policy did not have
    dropped: int = 0

    def __len__(self) -> int:
        puts = len(self.put_denies) + len(self.put_allows) + len(self.lift_denies)
        return puts + len(self.drop_allows) + len(self.drop_denies)


_Packed = list[tuple[bytes, bytes, bool]]  # a key after its identity, a value, whether it denies
# By the block's address, with the block, so that the address stays its own. Peers come by the
# hundred with the same rows.
_PACKED: Final[dict[int, tuple[Block, _Packed | None]]] = {}
_MAX_PACKED: Final = 4096


def _pack(block: Block) -> _Packed | None:
    """A block as the map takes it; None if that depends on proxies."""
    known = _PACKED.get(id(block))
    if known is not None:
        return known[1]
    packed: _Packed | None = None
    if all(entry.l7 is None for entry in block.values()):
        fill, packed = Fill(), []
        for key, entry in block.items():
            _, flags = fill.value(PolicyKey(0, *key), entry) or (0, 0)
            packed.append((
                _KEY.pack(0, key.port.to_bytes(2, "big"), key.proto,
                          plen_egress(key.plen, key.egress))[4:],
                _VALUE.pack(entry.rule_id, bytes(2), flags, 0, 0),
                entry.deny,
            ))  # fmt: skip
    if len(_PACKED) >= _MAX_PACKED:
        _PACKED.clear()
    _PACKED[id(block)] = block, packed
    return packed


def changes(old: MapState, new: MapState, fill: Fill) -> Writes:
    """What must be written where `old` is in force and `new`, which follows it, is wanted.

    Both with the same fill.
    """
    writes = Writes()
    for identity, was, now in new.moved(old):
        packed = _pack(was or now) if not (was and now) else None
        if packed is None:
            _compare(identity, was, now, fill, writes)
            continue
        number = identity.to_bytes(4, sys.byteorder)
        if now:
            writes.added += len(packed)
            for key, value, denies in packed:
                (writes.put_denies if denies else writes.put_allows).append((number + key, value))
        else:
            writes.dropped += len(packed)
            for key, _, denies in packed:
                (writes.drop_denies if denies else writes.drop_allows).append(number + key)
    return writes


def _compare(identity: int, was: Block, now: Block, fill: Fill, writes: Writes) -> None:
    """The rows of one peer that differ."""
    for l4 in {**was, **now}:
        old_entry, entry = was.get(l4), now.get(l4)
        if old_entry == entry:
            continue
        key = PolicyKey(identity, *l4)
        before = fill.value(key, old_entry) if old_entry is not None else None
        after = fill.value(key, entry) if entry is not None else None
        packed = _KEY.pack(
            identity, l4.port.to_bytes(2, "big"), l4.proto, plen_egress(l4.plen, l4.egress)
        )
        denied = before is not None and bool(before[1] & POLICY_F_DENY)
        if after is None or entry is None:
            if before is not None:
                (writes.drop_denies if denied else writes.drop_allows).append(packed)
                writes.dropped += 1
            continue
        writes.added += before is None
        port, flags = after
        value = _VALUE.pack(entry.rule_id, port.to_bytes(2, "big"), flags, 0, 0)
        if flags & POLICY_F_DENY:
            writes.put_denies.append((packed, value))
        elif denied:
            writes.lift_denies.append((packed, value))
        else:
            writes.put_allows.append((packed, value))


def may_swap(old: MapState, new: MapState, before: str, after: str) -> bool:
    """Whether the proxy may enforce one L7 set (its digest) for another on the same port before
    rows go from `old` to `new`: no request may pass that neither of the two policies allows.

    So whatever the one set decides now, the other must decide then. No: where a peer or a port
    loses the rules rather than changes them, or a new row would decide in their place.
    """
    egress = next((x.egress for x in old.l7 if x.digest == before), None)
    seen: set[tuple[int, int]] = set()
    for _, was, now in new.moved(old):
        if (id(was), id(now)) in seen:
            continue
        seen.add((id(was), id(now)))
        for key, entry in was.items():
            then = now.get(key)
            if (
                entry.l7 is not None
                and entry.l7.digest == before
                and (then is None or then.l7 is None or then.l7.digest != after)
            ):
                return False
        for key, then in now.items():
            entry_before = was.get(key)
            if key.egress is not egress or (
                entry_before is not None and entry_before.deny == then.deny
            ):
                continue
            if then.deny or (then.l7 is not None and then.l7.digest != after):
                return False
    return True


def row_text(key: PolicyKey) -> str:
    """A row's key for people."""
    peer = f"identity {key.identity}" if key.identity else "anybody"
    where = f"egress to {peer}" if key.egress else f"ingress from {peer}"
    if key.plen <= PLEN_PROTO:
        return f"{where} on {PROTO_NAMES.get(key.proto, key.proto) if key.plen else 'any port'}"
    ports = f"{key.port}" if key.port == key.last_port else f"{key.port}-{key.last_port}"
    return f"{where} on {PROTO_NAMES.get(key.proto, key.proto)}/{ports}"


def _value(word: int) -> tuple[int, int, int]:
    """Rule, proxy port and flags."""
    rule_id, port_be, flags, _ = _WORD.unpack(int(word).to_bytes(8, sys.byteorder))
    return rule_id, int.from_bytes(port_be, "big"), flags


def value_text(word: int) -> str:
    """What a row says, from the lasting word of its value."""
    rule_id, port, flags = _value(word)
    how = "deny" if flags & POLICY_F_DENY else f"allow by proxy {port}" if port else "allow"
    how += ", which only looks on" if flags & POLICY_F_WATCH else ""
    audited = ", audited" if flags & POLICY_F_AUDIT else ""
    return f"{how}{audited}, {f'rule {rule_id}' if rule_id else 'no rule'}"


def row_differences(
    wanted: PolicyRows, found: PolicyRows, limit: int = 100
) -> Iterator[tuple[str, str, str, int]]:
    """(row, expected, found, rule) of rows that differ, as text; `limit` of them at most."""
    ours = dict(zip(wanted.keys.tolist(), wanted.values.tolist(), strict=True))
    theirs = dict(zip(found.keys.tolist(), found.values.tolist(), strict=True))
    differing = sorted(x for x in ours.keys() | theirs.keys() if ours.get(x) != theirs.get(x))
    for word in differing[:limit]:
        row = np.array([word], "u8").view(POLICY_KEY)[0]
        plen, egress = split_plen_egress(int(row["l4_plen_egress"]))
        key = PolicyKey(int(row["identity"]), egress, int(row["proto"]), int(row["dport_be"]), plen)
        now, due = theirs.get(word), ours.get(word)
        yield (
            row_text(key),
            value_text(due) if due is not None else "absent",
            value_text(now) if now is not None else "absent",
            _value(due if due is not None else now or 0)[0],
        )


def difference(old: PolicyRows, new: PolicyRows) -> RowsDelta:
    """What must be written where `old` is in force and `new` is wanted."""
    in_new = np.isin(old.keys, new.keys, assume_unique=True)
    in_old = np.isin(new.keys, old.keys, assume_unique=True)
    gone = old.take(~in_new)
    # Rows of one key in both, aligned, as both sides are sorted by key.
    common_old, common_new = old.take(in_new), new.take(in_old)
    changed = common_old.values != common_new.values
    was_deny = common_old.denies
    fresh = new.take(~in_old)
    lifted = changed & was_deny & ~common_new.denies
    rewritten = common_new.take(changed & ~lifted)
    put = PolicyRows(
        np.concatenate([fresh.keys, rewritten.keys]),
        np.concatenate([fresh.values, rewritten.values]),
    )
    return RowsDelta(
        put_denies=put.take(put.denies),
        put_allows=put.take(~put.denies),
        drop_allows=gone.take(~gone.denies),
        lift_denies=common_new.take(lifted),
        drop_denies=gone.take(gone.denies),
    )
