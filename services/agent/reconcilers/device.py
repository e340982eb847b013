"""cilia_devices: the host's devices that lead to the world, with the addresses masquerade uses."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from cilia.bpf.constants import DEV_F_L3
from cilia.bpf.layout import DEVICE, U32, to_addr
from cilia.reconcile import Reconciler
from cilia.table import ReadTable
from services.agent.datapath import Datapath
from services.agent.rows import DeviceRow


def value_of(row: DeviceRow) -> bytes:
    """struct device."""
    value = np.zeros(1, DEVICE)
    if row.ipv4 is not None:
        value["ip4"] = np.void(to_addr(row.ipv4))
    if row.ipv6 is not None:
        value["ip6"] = np.void(to_addr(row.ipv6))
    value["mac"] = np.void(row.mac)
    value["flags"] = DEV_F_L3 if row.l3 else 0
    return value.tobytes()


class DeviceReconciler(Reconciler[int, DeviceRow]):
    """Keyed by interface index."""

    def __init__(self, desired: ReadTable[int, DeviceRow], datapath: Datapath) -> None:
        super().__init__("device", desired)
        self._datapath = datapath

    async def update(self, row: DeviceRow) -> None:
        await self._datapath.run(
            self._datapath.map("cilia_devices").update, _key(row.ifindex), value_of(row)
        )

    async def delete(self, row: DeviceRow) -> None:
        await self._datapath.run(self._datapath.map("cilia_devices").delete, _key(row.ifindex))

    async def prune(self, rows: Collection[DeviceRow]) -> None:
        wanted = {_key(row.ifindex) for row in rows}
        devices = self._datapath.map("cilia_devices")

        def sweep() -> None:
            for key in [key for key in devices.keys() if key not in wanted]:  # noqa: SIM118 -- not a dict
                devices.delete(key)

        await self._datapath.run(sweep)


def _key(ifindex: int) -> bytes:
    return ifindex.to_bytes(U32.itemsize, "little")
