"""What repeats from flow to flow, kept once: pairs of ends, metas, and what proxies saw.

    row of the ring    ts  sport  dport  length   pair  meta  l7
                                                    │     │    └─▶ L7Record
                                                    │     └─▶ type, verdict, reason, direction,
                                                    │         flags, policies …
                                                    └─▶ addresses, MACs, interface, names,
                                                        source and destination Party

A filter is decided for each pair and each meta, and then looked up for each row; a piece of a
message is encoded for each, once. `Dimensions` is what readers see, of memory and of a file alike;
`LiveDimensions` is filled as events arrive.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from cilia.bpf import constants as k
from services.flows.interning import I64, U64, AnyArray, Hasher, Slots
from services.flows.l7 import L7Record
from services.flows.world import NOBODY, Party, PolicyRef, Stale, World

T = TypeVar("T", bound=Hashable)

# flow.Verdict
FORWARDED: Final = 1
DROPPED: Final = 2
ERROR: Final = 3
AUDIT: Final = 4
REDIRECTED: Final = 5
# event_type.type
EVENT_L7: Final = 129
# metas["reply"]
REPLY_UNKNOWN: Final = 0
REPLY_NO: Final = 1
REPLY_YES: Final = 2

TO_ENDPOINT: Final = 101  # the wire's number of observation point 0
ICMP: Final = 1
TCP: Final = 6
UDP: Final = 17
ICMPV6: Final = 58
SCTP: Final = 132
_POLICY_DENIED: Final = (133, 181)

PAIR: Final[dict[str, str]] = {
    "src": "u4",  # parties
    "dst": "u4",
    "src_identity": "u4",
    "dst_identity": "u4",
    "src_ep": "u2",
    "dst_ep": "u2",
    # Addresses as numbers, high and low half; IPv4 in the mapped form.
    "s_hi": "u8",
    "s_lo": "u8",
    "d_hi": "u8",
    "d_lo": "u8",
    "smac": "V6",
    "dmac": "V6",
    "ifindex": "u4",
    "interface": "u4",  # strings
    "src_names": "u4",  # names
    "dst_names": "u4",
    "src_service": "u4",  # services
    "dst_service": "u4",
}
META: Final[dict[str, str]] = {
    "type": "u1",  # event_type.type
    "sub": "u1",  # event_type.sub_type
    "verdict": "u1",
    "drop": "u1",
    "direction": "u1",
    "observation": "u1",
    "reason": "u1",  # trace_reason
    "reply": "u1",
    "proto": "u1",
    "tcp_flags": "u1",
    "match": "u1",
    "flags": "u1",  # the event's own
    "denied": "u1",  # policies are of a denial
    "proxy_port": "u2",
    "icmp": "u2",  # type << 8 | code
    "rule": "u4",
    "policies": "u4",  # policies
}
L7: Final[dict[str, str]] = {"kind": "u1", "type": "u1", "code": "u2"}

V4_HI: Final = 0
V4_PREFIX: Final = 0xFFFF << 32  # in the low half


class Pool(Generic[T]):
    """Values by small numbers, equal ones once. Number 0 is `zero`."""

    def __init__(self, zero: T) -> None:
        self.values: list[T] = [zero]
        self._numbers: dict[T, int] = {zero: 0}
        self._free: list[int] = []
        self._collect_at = 1 << 16

    def __len__(self) -> int:
        return len(self.values) - len(self._free)

    def number(self, value: T) -> int:
        found = self._numbers.get(value)
        if found is None:
            if self._free:
                found = self._free.pop()
                self.values[found] = value
            else:
                found = len(self.values)
                self.values.append(value)
            self._numbers[value] = found
        return found

    @property
    def due(self) -> bool:
        """Whether so many were given out that those out of use should be looked for."""
        return len(self) >= self._collect_at

    def collect(self, used: AnyArray) -> None:
        """Gives all numbers but 0 and these out again."""
        keep = np.zeros(len(self.values), bool)
        keep[used] = True
        keep[0] = True
        keep[self._free] = True  # not given out twice
        for number in np.flatnonzero(~keep).tolist():
            del self._numbers[self.values[number]]
            self.values[number] = self.values[0]
            self._free.append(number)
        self._collect_at = max(1 << 16, 2 * len(self))


@dataclass(slots=True)
class Dimensions:
    """What the numbers in rows mean."""

    pairs: Mapping[str, AnyArray]
    metas: Mapping[str, AnyArray]
    l7: Mapping[str, AnyArray]
    node_name: str
    parties: Sequence[Party]
    policies: Sequence[tuple[PolicyRef, ...]]
    strings: Sequence[str]
    names: Sequence[tuple[str, ...]]
    services: Sequence[tuple[str, str]]  # namespace, name
    records: Mapping[int, L7Record]  # by number in `l7`
    # When each number got its contents, counted; and how often that has happened.
    pair_born: U64
    meta_born: U64
    pair_births: int
    meta_births: int
    node_labels: tuple[str, ...] = ()
    cache: dict[object, Any] = field(default_factory=dict)  # of readers, by their own keys


def words_of(events: AnyArray) -> U64:
    """Events as rows of sixteen 64-bit words."""
    return np.ascontiguousarray(events).view(np.uint64).reshape(len(events), 16)


class LiveDimensions:
    """The dimensions of the ring."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._hash = Hasher()
        self._pairs = Slots(PAIR)
        self._metas = Slots(META)
        self._l7 = Slots(L7)
        self._records: dict[int, L7Record] = {}
        self._parties: Pool[Party] = Pool(NOBODY)
        self._party_numbers: dict[tuple[int, int, str], int] = {}
        self._policies: Pool[tuple[PolicyRef, ...]] = Pool(())
        self._strings: Pool[str] = Pool("")
        self._names: Pool[tuple[str, ...]] = Pool(())
        self._services: Pool[tuple[str, str]] = Pool(("", ""))
        self._cache: dict[object, Any] = {}

    @property
    def pairs_used(self) -> int:
        return self._pairs.used

    def view(self) -> Dimensions:
        """As they are now: valid until the next event is taken in."""
        return Dimensions(
            pairs=self._pairs.columns,
            metas=self._metas.columns,
            l7=self._l7.columns,
            node_name=self._world.node_name,
            parties=self._parties.values,
            policies=self._policies.values,
            strings=self._strings.values,
            names=self._names.values,
            services=self._services.values,
            records=self._records,
            pair_born=self._pairs.born,
            meta_born=self._metas.born,
            pair_births=self._pairs.births,
            meta_births=self._metas.births,
            cache=self._cache,
        )

    # ---- events in

    def intern(self, events: AnyArray, *, head: int, tail: int) -> tuple[I64, I64]:
        """The pair and the meta of each event."""
        words = words_of(events)
        direction = events["direction"].astype(np.uint64)
        pair_keys = self._hash(
            words[:, 1],
            words[:, 2],
            words[:, 3],
            words[:, 4],
            words[:, 5],
            (words[:, 9] << np.uint64(32)) | (words[:, 7] & np.uint64(0xFFFFFFFF)),
            (words[:, 10] >> np.uint64(32)) | (direction << np.uint64(32)),
            words[:, 11],
        )
        pairs, new, where = self._pairs.intern(pair_keys, head=head, tail=tail)
        if len(new):
            self._fill_pairs(new, events[where])
        rule = events["rule_id"]
        denied = _denied(events)
        subject = np.zeros(len(events), np.uint64)
        unnamed = np.flatnonzero(denied & (rule == 0))
        if len(unnamed):
            columns = self._pairs.columns
            mine = pairs[unnamed]
            subject[unnamed] = np.where(
                direction[unnamed] == k.DIR_EGRESS, columns["src"][mine], columns["dst"][mine]
            )
        proto = events["proto"]
        icmp = np.where(
            (proto == ICMP) | (proto == ICMPV6),
            (events["sport_be"].astype(np.uint64) & np.uint64(255)) << np.uint64(8)
            | (events["dport_be"].astype(np.uint64) & np.uint64(255)),
            np.uint64(0),
        )
        meta_keys = self._hash(
            (words[:, 9] >> np.uint64(32)) | (words[:, 10] << np.uint64(32)),
            (words[:, 8] & np.uint64(0xFFFFFFFF)) | (words[:, 6] << np.uint64(32)),
            icmp | (subject << np.uint64(32)),
        )
        metas, new, where = self._metas.intern(meta_keys, head=head, tail=tail)
        if len(new):
            self._fill_metas(new, events[where], denied[where], icmp[where], subject[where])
        return pairs, metas

    def add_l7(self, records: Sequence[L7Record], *, head: int, tail: int) -> I64:
        """A number for each record."""
        slots = self._l7.add(len(records), head=head, tail=tail)
        columns = self._l7.columns
        for slot, record in zip(slots.tolist(), records, strict=True):
            self._records[slot] = record
            columns["kind"][slot] = record.kind
            columns["type"][slot] = record.type
            columns["code"][slot] = min(getattr(record.record, "code", 0), 0xFFFF)
        return slots

    def _fill_pairs(self, slots: I64, events: AnyArray) -> None:
        columns = self._pairs.columns
        egress = events["direction"] == k.DIR_EGRESS
        src_ep = np.where(egress, events["ep_id"], events["peer_ep_id"])
        dst_ep = np.where(egress, events["peer_ep_id"], events["ep_id"])
        addresses = words_of(events)[:, 1:5].byteswap()
        for at, name in enumerate(("s_hi", "s_lo", "d_hi", "d_lo")):
            columns[name][slots] = addresses[:, at]
        columns["smac"][slots] = events["smac"]
        columns["dmac"][slots] = events["dmac"]
        columns["ifindex"][slots] = events["ifindex"]
        columns["src_ep"][slots] = src_ep
        columns["dst_ep"][slots] = dst_ep
        for name in ("src_identity", "dst_identity"):
            columns[name][slots] = events[name]
        columns["src"][slots] = self._party_column(src_ep, events["src_identity"], events["saddr"])
        columns["dst"][slots] = self._party_column(dst_ep, events["dst_identity"], events["daddr"])
        columns["interface"][slots] = _by_value(
            events["ifindex"], lambda number: self._strings.number(self._world.interface(number))
        )
        for name, side in (("src_names", "saddr"), ("dst_names", "daddr")):
            columns[name][slots] = 0
            if self._world.has_names:
                raw = events[side].tobytes()
                columns[name][slots] = [
                    self._names.number(self._world.names(raw[at : at + 16]))
                    for at in range(0, len(raw), 16)
                ]
        columns["src_service"][slots] = 0
        columns["dst_service"][slots] = 0
        if self._parties.due:
            self._collect()

    def _party_column(self, endpoints: AnyArray, identities: AnyArray, addresses: AnyArray) -> I64:
        """Whose they are, a Python step a distinct endpoint and identity; and one an address for
        those that may be a workload that is known by its address alone.
        """
        both = endpoints.astype(np.uint64) << np.uint64(32) | identities.astype(np.uint64)
        found = _by_value(both, lambda key: self._party(key >> 32, key & 0xFFFFFFFF))
        identities = identities.astype(np.int64)
        maybe = (endpoints == 0) & (
            ((identities >= 256) & (identities < 1 << 24))
            | (identities == 0)
            | (identities == 4)
            | (identities == 5)
        )
        for at in np.flatnonzero(maybe).tolist():
            raw = addresses[at].tobytes()
            number = int(identities[at])
            if endpoint := self._world.endpoint_at(raw):
                found[at] = self._party(endpoint, number)
            elif remote := self._world.remote_at(raw):
                found[at] = self._parties.number(self._world.party(0, number, remote))
        return found

    def _party(self, endpoint: int, identity: int) -> int:
        return self._parties.number(self._world.party(endpoint, identity))

    def _collect(self) -> None:
        columns = self._pairs.columns
        used = np.union1d(columns["src"], columns["dst"])
        self._parties.collect(used)

    def _fill_metas(
        self, slots: I64, events: AnyArray, denied: AnyArray, icmp: U64, subject: U64
    ) -> None:
        columns = self._metas.columns
        kind, reason, verdict, flags, point = (
            events[name].astype(np.int64)
            for name in ("type", "reason", "verdict", "flags", "obs_point")
        )
        audited = (flags & k.EVENT_F_AUDITED) != 0
        drop, trace, policy = (
            kind == k.EVENT_DROP,
            kind == k.EVENT_TRACE,
            kind == k.EVENT_VERDICT,
        )
        replied = (flags & k.EVENT_F_REPLY) != 0
        refused = policy & (verdict < 0) & ~audited
        columns["type"][slots] = kind
        columns["sub"][slots] = np.select([drop, trace], [reason, point], 0)
        columns["verdict"][slots] = np.select(
            [drop, trace, policy & audited, refused, policy & (verdict > 0), policy],
            [DROPPED, FORWARDED, AUDIT, DROPPED, REDIRECTED, FORWARDED],
            reason,  # of an L7 event: the verdict
        )
        columns["drop"][slots] = np.select([drop, refused], [reason, -verdict], 0)
        columns["direction"][slots] = events["direction"]
        columns["observation"][slots] = np.where(trace, np.where(point == 0, TO_ENDPOINT, point), 0)
        columns["reason"][slots] = np.where(trace, reason + 1, 0)
        columns["reply"][slots] = np.select(
            [drop | refused, policy, (trace & (reason == k.CT_REPLY)) | replied],
            [REPLY_UNKNOWN, REPLY_NO, REPLY_YES],
            REPLY_NO,
        )
        for name in ("proto", "tcp_flags", "flags"):
            columns[name][slots] = events[name]
        columns["match"][slots] = np.where(policy, events["match_type"], 0)
        columns["denied"][slots] = denied
        columns["proxy_port"][slots] = np.where(verdict > 0, verdict, 0)
        columns["icmp"][slots] = icmp
        columns["rule"][slots] = events["rule_id"]
        egress = events["direction"] == k.DIR_EGRESS
        key = np.where(
            subject != 0,
            np.uint64(1 << 63) | egress.astype(np.uint64) << np.uint64(32) | subject,
            events["rule_id"].astype(np.uint64),
        )
        columns["policies"][slots] = _by_value(key, self._policies_of)

    def _policies_of(self, key: int) -> int:
        if not key:
            return 0
        if key >> 63:
            party = self._parties.values[key & 0xFFFFFFFF]
            return self._policies.number(
                party.egress_isolated_by if key >> 32 & 1 else party.ingress_isolated_by
            )
        return self._policies.number((self._world.rule(key),))

    # ---- what numbers mean changes

    def retire(self, stale: Stale) -> None:
        """Lets later events have the names that are true now."""
        if not stale:
            return
        pairs, metas = self._pairs.live(), self._metas.live()
        if not stale.everything:
            columns = self._pairs.columns
            gone = np.zeros(len(pairs), bool)
            for names, numbers in (
                (("src_ep", "dst_ep"), stale.endpoints),
                (("src_identity", "dst_identity"), stale.identities),
                (("ifindex",), stale.interfaces),
            ):
                if numbers:
                    wanted = np.fromiter(numbers, np.int64, len(numbers))
                    for name in names:
                        gone |= np.isin(columns[name][pairs], wanted)
            if stale.addresses:
                raw = np.frombuffer(b"".join(stale.addresses), ">u8").astype(np.uint64)
                hashed = self._hash(raw[::2], raw[1::2])
                for high, low in (("s_hi", "s_lo"), ("d_hi", "d_lo")):
                    gone |= np.isin(self._hash(columns[high][pairs], columns[low][pairs]), hashed)
            pairs = pairs[gone]
            if stale.rules:
                wanted = np.fromiter(stale.rules, np.int64, len(stale.rules))
                metas = metas[np.isin(self._metas.columns["rule"][metas], wanted)]
            else:
                metas = metas[:0]
        self._pairs.retire(pairs)
        self._metas.retire(metas)


def _denied(events: AnyArray) -> npt.NDArray[np.bool_]:
    """Whether policy refused, or would have but for audit."""
    reason = events["reason"]
    by_policy = (reason == _POLICY_DENIED[0]) | (reason == _POLICY_DENIED[1])
    return np.asarray(
        ((events["type"] == k.EVENT_DROP) & by_policy)
        | (
            (events["type"] == k.EVENT_VERDICT)
            & ((events["verdict"] < 0) | ((events["flags"] & k.EVENT_F_AUDITED) != 0))
        )
        | ((events["type"] == EVENT_L7) & (reason == DROPPED))
    )


def _by_value(values: AnyArray, make: Any) -> I64:
    """`make` of each, called once a distinct value."""
    distinct, inverse = np.unique(values, return_inverse=True)
    return np.array([make(value) for value in distinct.tolist()], np.int64)[inverse]
