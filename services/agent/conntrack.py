"""Conntrack seen from outside the programs: collecting what expired, purging an address.

The programs find an expired entry themselves when a packet comes; collecting frees the room of
those to whom none comes. The tables are LRU, so a missed round costs the oldest connections, never
correctness. An address is purged before it is given out again: its next owner must not inherit
another's connections, nor their masqueraded ports.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cilia.bpf import Map
from cilia.bpf.layout import CT_ENTRY, CT_KEY, NAT_KEY, NAT_VALUE, to_addr
from services.agent import metrics
from services.agent.datapath import Datapath, monotonic_s
from services.agent.ipam import Address

Tuple = tuple[Address, int, Address, int]  # source and its port, destination and its port
_TCP: Final = 6


@dataclass(frozen=True, slots=True)
class Collected:
    alive: int
    deleted: int


class Conntrack:
    """GC and purge of cilia_ct and cilia_nat."""

    def __init__(self, datapath: Datapath) -> None:
        self._datapath = datapath
        self.last = Collected(0, 0)

    async def collect(self) -> None:
        """Delete what expired."""
        self.last = await self._datapath.run(self._collect)
        metrics.CONNTRACK_ENTRIES.set(self.last.alive)
        metrics.CONNTRACK_COLLECTED.inc(self.last.deleted)

    def _collect(self) -> Collected:
        now = monotonic_s()
        keys, entries = self._ct.items_np(CT_KEY, CT_ENTRY)
        expired = entries["expires_s"] < now
        deleted = self._ct.delete_batch(keys[expired]) if expired.any() else 0
        nat_keys, nat_values = self._nat.items_np(NAT_KEY, NAT_VALUE)
        stale = nat_values["expires_s"] < now
        if stale.any():
            self._nat.delete_batch(nat_keys[stale])
        return Collected(len(keys) - deleted, deleted)

    async def purge(self, addresses: Iterable[Address]) -> int:
        """Delete every connection that has one of these addresses as an end."""
        raw = [to_addr(address) for address in addresses]
        if not raw:
            return 0
        return await self._datapath.run(self._purge, raw)

    def _purge(self, addresses: list[bytes]) -> int:
        keys, _ = self._ct.items_np(CT_KEY, CT_ENTRY)
        hit = _is_one_of(keys["lo"], addresses) | _is_one_of(keys["hi"], addresses)
        deleted = self._ct.delete_batch(keys[hit]) if hit.any() else 0
        nat_keys, nat_values = self._nat.items_np(NAT_KEY, NAT_VALUE)
        mine = _is_one_of(nat_values["addr"], addresses)
        if mine.any():
            self._nat.delete_batch(nat_keys[mine])
        return int(deleted)

    async def identities(self, tuples: Iterable[Tuple]) -> dict[Tuple, tuple[int, int]]:
        """(source's, destination's) identity of TCP connections, as their ends' policies were asked
        about them; 0 of an end that was not asked about. Those not known are left out."""
        return await self._datapath.run(self._identities, list(tuples))

    def _identities(self, tuples: list[Tuple]) -> dict[Tuple, tuple[int, int]]:
        found = {}
        for key in tuples:
            raw = self._ct.lookup(_ct_key(*key))
            if raw:
                egress, ingress = np.frombuffer(raw, CT_ENTRY)[0]["side"]
                found[key] = (
                    int(ingress["remote_id"]) if ingress["policy_rev"] else 0,
                    int(egress["remote_id"]) if egress["policy_rev"] else 0,
                )
        return found

    @property
    def _ct(self) -> Map:
        return self._datapath.map("cilia_ct")

    @property
    def _nat(self) -> Map:
        return self._datapath.map("cilia_nat")


def _ct_key(source: Address, sport: int, destination: Address, dport: int) -> bytes:
    """Of a TCP connection: its ends sorted as byte strings, address before port."""
    ends = sorted(((to_addr(source), sport), (to_addr(destination), dport)))
    key = np.zeros(1, CT_KEY)
    key["lo"], key["hi"] = np.void(ends[0][0]), np.void(ends[1][0])
    key["lo_port_be"], key["hi_port_be"] = ends[0][1], ends[1][1]
    key["proto"] = _TCP
    return key.tobytes()


def _is_one_of(column: npt.NDArray[Any], addresses: list[bytes]) -> npt.NDArray[np.bool_]:
    """Compare a column of `union addr` with a few addresses, 16 bytes as two words."""
    words = np.frombuffer(np.ascontiguousarray(column).tobytes(), "u8").reshape(len(column), 2)
    hit = np.zeros(len(column), bool)
    for address in addresses:
        low, high = np.frombuffer(address, "u8")
        hit |= (words[:, 0] == low) & (words[:, 1] == high)
    return hit
