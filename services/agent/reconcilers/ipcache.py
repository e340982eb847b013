"""The ipcache: prefix -> identity, an LPM trie that every program asks "who is that?".

After any change the runtime epoch is raised: connections admitted under an older epoch look their
peer up again. Rows first, epoch after; a reader that sees the new epoch sees the new rows. (The
epoch is raised by Regeneration, once for all that a flush changed.)
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from ipaddress import IPv4Address
from typing import Any

import numpy as np
import numpy.typing as npt

from cilia.bpf import Map
from cilia.bpf.layout import IPCACHE_KEY, IPCACHE_VALUE, from_addr, to_addr
from cilia.identity import NumericIdentity
from cilia.reconcile import Reconciler
from cilia.table import ReadTable
from services.agent.datapath import Datapath
from services.agent.drift import Drift, compare
from services.agent.rows import IpcacheRow, Network

_V4_BITS = 96  # of the IPv4-mapped prefix
_FEW = 16  # rows, which the kernel takes one by one in some 30 us
# As IPCACHE_KEY and IPCACHE_VALUE: an array for each of many rows costs more than the rows.
_KEY = struct.Struct("=I16s")
_VALUE = struct.Struct("=I4sII")
assert (_KEY.size, _VALUE.size) == (IPCACHE_KEY.itemsize, IPCACHE_VALUE.itemsize)


def key_of(prefix: Network) -> bytes:
    """struct ipcache_key of a prefix."""
    length = prefix.prefixlen + (_V4_BITS if prefix.version == 4 else 0)
    return _KEY.pack(length, to_addr(prefix.network_address))


def prefix_of(key: np.void) -> Network:
    """The prefix of a struct ipcache_key."""
    from ipaddress import ip_network

    raw = bytes(key["addr"])
    length = int(key["prefixlen"])
    if length >= _V4_BITS and raw.startswith(b"\0" * 10 + b"\xff\xff"):
        return ip_network((from_addr(raw), length - _V4_BITS))
    return ip_network((raw, length))


def value_of(row: IpcacheRow) -> bytes:
    return _VALUE.pack(row.identity, row.tunnel.packed if row.tunnel else bytes(4), 0, 0)


def _rows(array: npt.NDArray[Any]) -> list[bytes]:
    raw, size = array.tobytes(), array.dtype.itemsize
    return [raw[at : at + size] for at in range(0, len(raw), size)]


def _prefix_text(key: bytes) -> str:
    return str(prefix_of(np.frombuffer(key, IPCACHE_KEY)[0]))


def _value_text(value: bytes) -> str:
    row = np.frombuffer(value, IPCACHE_VALUE)[0]
    tunnel = f", tunnel {IPv4Address(int(row['tunnel_be']))}" if row["tunnel_be"] else ""
    flags = f", flags {int(row['flags']):#x}" if row["flags"] else ""
    return f"identity {int(row['identity'])}{tunnel}{flags}"


class IpcacheReconciler(Reconciler[Network, IpcacheRow]):
    """Knows what the trie holds, so unchanged rows cost nothing and raise no epoch."""

    def __init__(self, desired: ReadTable[Network, IpcacheRow], datapath: Datapath) -> None:
        super().__init__("ipcache", desired)
        self._datapath = datapath
        self._actual: dict[bytes, bytes] = {}
        self.changes = 0  # rows written or removed since start

    @property
    def _map(self) -> Map:
        return self._datapath.map("cilia_ipcache")

    async def read_back(self) -> None:
        self._actual = await self._datapath.run(lambda: dict(self._map.items()))

    async def reread(self) -> list[Drift]:
        """Look at the trie again; what is not as it was written is due at the next flush."""
        async with self.paused():
            keys, values = await self._datapath.run(self._map.items_np, IPCACHE_KEY, IPCACHE_VALUE)
            found = dict(zip(_rows(keys), _rows(values), strict=True))
            drifts = compare(
                "cilia_ipcache", self._actual, found, key_text=_prefix_text, value_text=_value_text
            )
            if drifts:
                self._actual = found
                self.changes += 1  # somebody may have been admitted by it
                self.trigger_resync()
        return drifts

    @property
    def size(self) -> int:
        return len(self._actual)

    def identities(self) -> frozenset[NumericIdentity]:
        """Those that the kernel calls some prefix by."""
        values = np.frombuffer(b"".join(self._actual.values()), IPCACHE_VALUE)
        return frozenset(map(NumericIdentity, values["identity"].tolist()))

    async def update_batch(self, rows: Mapping[Network, IpcacheRow]) -> Mapping[Network, Exception]:
        wanted = {key_of(prefix): value_of(row) for prefix, row in rows.items()}
        changed = {k: v for k, v in wanted.items() if self._actual.get(k) != v}
        if changed:
            self.changes += len(changed)  # first: a write that fails may have written some
            if len(changed) <= _FEW:
                self._write(changed)  # at once: a thread would take longer to be asked
            else:
                await self._datapath.run(self._write, changed)
            self._actual.update(changed)
        return {}

    def _write(self, rows: dict[bytes, bytes]) -> None:
        if len(rows) <= _FEW:
            for key, value in rows.items():
                self._map.update(key, value)
            return
        self._map.update_batch(
            np.frombuffer(b"".join(rows), IPCACHE_KEY),
            np.frombuffer(b"".join(rows.values()), IPCACHE_VALUE),
        )

    async def delete_batch(self, rows: Mapping[Network, IpcacheRow]) -> Mapping[Network, Exception]:
        await self._remove([key_of(prefix) for prefix in rows])
        return {}

    async def prune(self, rows: Collection[IpcacheRow]) -> None:
        wanted = {key_of(row.prefix) for row in rows}
        await self._remove([key for key in self._actual if key not in wanted])

    async def _remove(self, keys: list[bytes]) -> None:
        present = [key for key in keys if key in self._actual]
        if present:
            self.changes += len(present)
            await self._datapath.run(lambda: [self._map.delete(key) for key in present])
            for key in present:
                del self._actual[key]
