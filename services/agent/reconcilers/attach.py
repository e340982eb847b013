"""Programs on their hooks. A pinned link, or a filter, outlives this process; attaching again
replaces the program in place, without a packet passing by neither.

To put a link where none was takes a grace period of the kernel, in which it holds the lock of all
network configuration; a filter takes none. So a new endpoint's programs are filters first (`quick`
rows), and links when its owner asks for that: the link is there before the filter goes."""

from __future__ import annotations

import errno
from collections.abc import Collection, Mapping

from cilia.bpf import BpfError
from cilia.bpf.attach import attach_tc, detach_tc, filter_is_there
from cilia.net.errors import NetworkError
from cilia.net.rtnl import RouteSocket
from cilia.reconcile import Reconciler
from cilia.table import ReadTable
from services.agent.config import AttachMode
from services.agent.datapath import Datapath
from services.agent.rows import AttachRow


class AttachReconciler(Reconciler[str, AttachRow]):
    """Keyed by hook name, which names the pin too."""

    def __init__(
        self, desired: ReadTable[str, AttachRow], datapath: Datapath, *, mode: AttachMode
    ) -> None:
        super().__init__("attach", desired)
        self._datapath = datapath
        self._mode = mode

    async def update_batch(self, rows: Mapping[str, AttachRow]) -> Mapping[str, Exception]:
        return await self._datapath.run(self._attach_all, list(rows.values()))

    def _attach_all(self, rows: list[AttachRow]) -> dict[str, Exception]:
        failed: dict[str, Exception] = {}
        with RouteSocket() as socket:
            for row in rows:
                try:
                    self._attach(row, socket)
                except (OSError, NetworkError) as error:
                    failed[row.hook] = error
        return failed

    def _attach(self, row: AttachRow, socket: RouteSocket) -> None:
        program = self._datapath.program(row.program)
        pin = self._datapath.links_dir / row.hook
        # A link is given its program once more by one call; a filter, by a dozen messages.
        mode = "clsact" if row.quick else self._mode
        if mode == "clsact" and filter_is_there(socket, row.ifindex, row.direction, program, pin):
            return
        attach_tc(row.ifindex, row.direction, program, mode=mode, pin=pin).close()

    async def delete(self, row: AttachRow) -> None:
        await self._datapath.run(self._detach, row)

    def _detach(self, row: AttachRow) -> None:
        try:
            detach_tc(row.ifindex, row.direction, self._datapath.links_dir / row.hook)
        except BpfError as error:
            if error.errno not in (errno.ENODEV, errno.ENOENT):
                raise

    async def prune(self, rows: Collection[AttachRow]) -> None:
        """Unpins links that no row wants: with its pin a link of ours goes."""
        wanted = {row.hook for row in rows}

        def sweep() -> None:
            for pin in self._datapath.links_dir.iterdir():
                if pin.name.removesuffix("_clsact") not in wanted:
                    pin.unlink(missing_ok=True)

        await self._datapath.run(sweep)
