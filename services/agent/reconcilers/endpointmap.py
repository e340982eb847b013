"""cilia_lxc and cilia_ifindex: one struct endpoint, under each address and under its interface.

The node itself has one such row while policy is about it, under interface 0 alone.

A row goes to its addresses before its interface when it opens, and leaves the other way round when
it closes: a packet from the workload is judged by the interface's row, which is the last to say
"open" and the first to say "closed".
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import numpy as np

from cilia.bpf.constants import EP_F_HOST, EP_F_OPEN
from cilia.bpf.layout import ADDR, ENDPOINT, U32, from_addr, to_addr
from cilia.identity import EndpointID
from cilia.reconcile import Reconciler
from cilia.table import ReadTable
from services.agent.datapath import Datapath
from services.agent.drift import Drift, compare
from services.agent.rows import EndpointMapRow

assert ENDPOINT.fields is not None
_SLOT_AT: Final = ENDPOINT.fields["policy_slot"][1]
_ID_AT: Final = ENDPOINT.fields["id"][1]
_ID: Final = slice(_ID_AT, _ID_AT + ENDPOINT.fields["id"][0].itemsize)
_NODE: Final = bytes(4)  # the key of the node's own row
_FEW: Final = 8  # rows, which the kernel takes one by one in some 15 us
_SLOT: Final = slice(_SLOT_AT, _SLOT_AT + U32.itemsize)


def value_of(row: EndpointMapRow) -> bytes:
    """struct endpoint."""
    value = np.zeros(1, ENDPOINT)
    # The node's row has a key that no interface has, and an index that no endpoint has: loopback's.
    value["ifindex"] = 1 if row.flags & EP_F_HOST else row.ifindex
    value["identity"] = row.identity
    value["policy_slot"] = row.slot
    value["id"] = row.id
    value["flags"] = row.flags
    value["mac"] = np.void(row.mac)
    value["node_mac"] = np.void(row.node_mac)
    if row.ipv4 is not None:
        value["ip4"] = np.void(to_addr(row.ipv4))
    if row.ipv6 is not None:
        value["ip6"] = np.void(to_addr(row.ipv6))
    return value.tobytes()


def _text(value: bytes) -> str:
    row = np.frombuffer(value, ENDPOINT)[0]
    return (
        f"endpoint {int(row['id'])}, identity {int(row['identity'])}, slot "
        f"{int(row['policy_slot'])}, flags {int(row['flags']):#x}, interface "
        f"{int(row['ifindex'])}, {from_addr(row['ip4'])}, {from_addr(row['ip6'])}, "
        f"{bytes(row['mac']).hex(':')}, {bytes(row['node_mac']).hex(':')}"
    )


class EndpointMapReconciler(Reconciler[EndpointID, EndpointMapRow]):
    """Keeps the actual content of both maps, so that a restart writes only what differs."""

    updates_first = False  # an address may move from a deleted endpoint to a new one

    def __init__(self, desired: ReadTable[EndpointID, EndpointMapRow], datapath: Datapath) -> None:
        super().__init__("endpointmap", desired)
        self._datapath = datapath
        self._by_address: dict[bytes, bytes] = {}
        self._by_ifindex: dict[bytes, bytes] = {}
        self.identity_changes = 0  # addresses whose identity became another since start

    async def read_back(self) -> list[np.void]:
        """Take what is pinned as actual; returns the rows of cilia_ifindex."""

        self._by_address, self._by_ifindex = await self._datapath.run(self._read)
        return [np.frombuffer(value, ENDPOINT)[0] for value in self._by_ifindex.values()]

    def _read(self) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
        return (
            dict(self._datapath.map("cilia_lxc").items()),
            dict(self._datapath.map("cilia_ifindex").items()),
        )

    async def reread(self) -> list[Drift]:
        """Look at both maps again; what is not as it was written is due at the next flush."""
        async with self.paused():
            by_address, by_ifindex = await self._datapath.run(self._read)
            drifts = compare(
                "cilia_lxc",
                self._by_address,
                by_address,
                key_text=lambda key: str(from_addr(key)),
                value_text=_text,
            )
            drifts += compare(
                "cilia_ifindex",
                self._by_ifindex,
                by_ifindex,
                key_text=lambda key: f"interface {int.from_bytes(key, 'little')}",
                value_text=_text,
            )
            if drifts:
                self._by_address, self._by_ifindex = by_address, by_ifindex
                self.identity_changes += 1  # somebody may have been taken for somebody else
                self.trigger_resync()
        return drifts

    @property
    def size(self) -> int:
        return len(self._by_address) + len(self._by_ifindex)

    @property
    def has_node(self) -> bool:
        """Whether the programs find a row of the node itself."""
        return _NODE in self._by_ifindex

    def slots(self) -> frozenset[int]:
        """The policy slots that rows in the kernel lead to."""
        return frozenset(
            int.from_bytes(value[_SLOT], "little")
            for rows in (self._by_address, self._by_ifindex)
            for value in rows.values()
        )

    def keys_of(self, row: EndpointMapRow) -> tuple[list[bytes], bytes]:
        addresses = [to_addr(a) for a in (row.ipv4, row.ipv6) if a is not None]
        return addresses, row.ifindex.to_bytes(U32.itemsize, "little")

    async def update(self, row: EndpointMapRow) -> None:
        addresses, ifindex = self.keys_of(row)
        value = value_of(row)
        stale = [
            key
            for key, old in self._by_ifindex.items()
            if key != ifindex and self._owner(old) == row.id
        ]
        changed = [key for key in addresses if self._by_address.get(key) != value]
        if not changed and not stale and self._by_ifindex.get(ifindex) == value:
            return
        self._write(addresses, ifindex, value, stale)
        for key in stale:
            del self._by_ifindex[key]
        for key in addresses:
            old = self._by_address.get(key)
            if old is None or int(np.frombuffer(old, ENDPOINT)[0]["identity"]) != row.identity:
                self.identity_changes += 1
            self._by_address[key] = value
        self._by_ifindex[ifindex] = value

    def _write(
        self, addresses: list[bytes], ifindex: bytes, value: bytes, stale: list[bytes]
    ) -> None:
        # On the event loop: two hash maps answer at once, and another thread may be busy.
        lxc, by_ifindex = self._datapath.map("cilia_lxc"), self._datapath.map("cilia_ifindex")
        for key in stale:
            by_ifindex.delete(key)
        opening = int(np.frombuffer(value, ENDPOINT)[0]["flags"]) & EP_F_OPEN
        if not opening:
            by_ifindex.update(ifindex, value)
        for key in addresses:
            lxc.update(key, value)
        if opening:
            by_ifindex.update(ifindex, value)

    async def delete(self, row: EndpointMapRow) -> None:
        addresses, ifindex = self.keys_of(row)
        await self._remove(
            [key for key in addresses if self._owner(self._by_address.get(key)) == row.id],
            [ifindex] if self._owner(self._by_ifindex.get(ifindex)) == row.id else [],
        )

    async def prune(self, rows: Collection[EndpointMapRow]) -> None:
        addresses: set[bytes] = set()
        interfaces: set[bytes] = set()
        for row in rows:
            keys, ifindex = self.keys_of(row)
            addresses.update(keys)
            interfaces.add(ifindex)
        await self._remove(
            [key for key in self._by_address if key not in addresses],
            [key for key in self._by_ifindex if key not in interfaces],
        )

    @staticmethod
    def _owner(value: bytes | None) -> int:
        return int.from_bytes(value[_ID], "little") if value is not None else -1

    async def _remove(self, addresses: list[bytes], interfaces: list[bytes]) -> None:
        def erase() -> None:
            for key in interfaces:
                self._datapath.map("cilia_ifindex").delete(key)
            for key in addresses:
                assert len(key) == ADDR.itemsize
                self._datapath.map("cilia_lxc").delete(key)

        if addresses or interfaces:
            if len(addresses) + len(interfaces) <= _FEW:
                erase()
            else:
                await self._datapath.run(erase)
            for key in interfaces:
                self._by_ifindex.pop(key, None)
            for key in addresses:
                self._by_address.pop(key, None)
                self.identity_changes += 1
