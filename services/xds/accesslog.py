"""What the proxy logs, to those who read it: bounded, and with counts of loss.

a receiver of access logs ─▶ publish(records) ─▶ readers' queues ─▶ L7Batch
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from cilia.rpc.fanout import BoundedFanout
from protos.xds.v1 import xds_pb2 as pb

Records = tuple[pb.L7Record, ...]


class AccessLog:
    """`capacity` bounds the records that wait for one reader."""

    def __init__(self, *, capacity: int = 65_536, batch: int = 1024) -> None:
        self.records = 0
        self._batch = batch
        self._fanout: BoundedFanout[Records] = BoundedFanout(capacity=capacity, weigh=len)

    @property
    def readers(self) -> int:
        return len(self._fanout)

    @property
    def lost(self) -> int:
        """Records that readers lost who have left since, and those of today's."""
        return self._fanout.lost_total + sum(s.lost_total for s in self._fanout.subscriptions)

    def publish(self, records: Sequence[pb.L7Record]) -> None:
        """Never blocks. Gives each record its number."""
        for record in records:
            self.records += 1
            record.node_records = self.records
        if self.readers and records:
            self._fanout.publish(tuple(records))

    async def read(self) -> AsyncIterator[pb.L7Batch]:
        """What is published from now on."""
        with self._fanout.subscribe() as subscription:
            async for delivery in subscription:
                lost = delivery.lost
                records = [record for group in delivery.items for record in group]
                for start in range(0, max(len(records), 1), self._batch):
                    yield pb.L7Batch(records=records[start : start + self._batch], lost=lost)
                    lost = 0

    def close(self) -> None:
        """Lets readers end."""
        self._fanout.close()
