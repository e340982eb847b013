"""The services: Hubble's Observer and Peer, and what they lack.

GetFlows ──▶ Cursor.read ──▶ Encoder ──▶ Call.send_framed
                (a step)      (once for all who follow the same)
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from protos.flows.v1 import flows_pb2
from protos.hubble.v1 import observer_pb2, peer_pb2, relay_pb2
from services.flows import convert
from services.flows.aggregate import Sums
from services.flows.encoder import Encoder
from services.flows.fieldmask import FieldMask
from services.flows.filterspec import FlowQuery
from services.flows.grouping import columns_of
from services.flows.http2 import Call, Handler, RpcFailure, Status, frame_message
from services.flows.http2.standard import decode
from services.flows.ledger import Cause, Loss
from services.flows.notes import Note, Notes
from services.flows.query import State
from services.flows.rows import Rows
from services.flows.store import Store

OBSERVER: Final = "observer.Observer"
PEER: Final = "peer.Peer"
FLOWS: Final = "cilia.flows.v1.FlowsService"
HUBBLE_HEALTH: Final = "hubble.server.Observer"

_LOST_EVERY_S: Final = 1.0
_ENCODERS: Final = 16
_ENCODED: Final = 32
_MAX_GROUPS: Final = 100_000
_CHUNK: Final = 2048


@dataclass(frozen=True, slots=True)
class About:
    """What the server says of itself. `address` is host:port for relays; empty: none."""

    version: str
    node_name: Callable[[], str]
    address: str = ""
    tls_server_name: str = ""
    disk_bytes: int = 0  # how much history may take
    watching: Callable[[], str] = lambda: ""  # why the agent is not heard; "" when it is
    degraded: Callable[[], str] = lambda: ""  # what else is not as it should be


class Encoded:
    """Batches as they go out, made once for all who follow the same filters with the same mask.

    Followers at the newest row read the same spans; one that lags reads others, until it is there.
    """

    def __init__(self) -> None:
        self._encoders: OrderedDict[FieldMask, Encoder] = OrderedDict()
        self._made: OrderedDict[tuple[bytes, FieldMask, int, int, int], bytes] = OrderedDict()
        self.hits = 0

    def encode(self, rows: Rows, mask: FieldMask, filters: bytes) -> bytes:
        first, last = int(rows.numbers[0]), int(rows.numbers[-1])
        key = (filters, mask, rows.run << 64 | first, last, len(rows))
        made = self._made.get(key)
        if made is not None:
            self.hits += 1
            self._made.move_to_end(key)
            return made
        made = self._made[key] = self.once(rows, mask)
        if len(self._made) > _ENCODED:
            self._made.popitem(last=False)
        return made

    def once(self, rows: Rows, mask: FieldMask) -> bytes:
        """For one reader alone: nothing is kept, so that memory that is in the processor's caches
        is used again for the next batch."""
        encoder = self._encoders.get(mask)
        if encoder is None:
            encoder = self._encoders[mask] = Encoder(mask)
            if len(self._encoders) > _ENCODERS:
                self._encoders.popitem(last=False)
        else:
            self._encoders.move_to_end(mask)
        return encoder.encode(rows)


class _Lost:
    """What a reader missed, told at most once a second."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._sums: dict[Cause, Loss] = {}
        self._told = 0.0
        self._messages: list[bytes] = []

    def add(self, loss: Loss) -> None:
        if loss.cause is Cause.CLOCK:
            return
        if loss.count is None:
            self._tell(loss)
            return
        before = self._sums.get(loss.cause)
        if before is not None:
            loss = replace(
                loss,
                count=(before.count or 0) + loss.count,
                from_ns=min(before.from_ns, loss.from_ns),
                to_ns=max(before.to_ns, loss.to_ns),
            )
        self._sums[loss.cause] = loss

    def _tell(self, loss: Loss) -> None:
        message = convert.loss_to_response(loss, self._node)
        self._messages.append(frame_message(message.SerializeToString()))

    def take(self, *, at_end: bool = False) -> bytes:
        """What is to be told now, framed."""
        now = time.monotonic()
        if self._sums and (at_end or now - self._told >= _LOST_EVERY_S):
            self._told = now
            for loss in self._sums.values():
                self._tell(loss)
            self._sums.clear()
        out, self._messages = self._messages, []
        return b"".join(out)


class FlowServer:
    """The handlers."""

    def __init__(self, store: Store, notes: Notes, about: About) -> None:
        self._store = store
        self._notes = notes
        self._about = about
        self._encoded = Encoded()
        self.followers = 0
        self.clients: Callable[[], int] = lambda: 0

    def handlers(self) -> Mapping[str, Handler]:
        return {
            f"/{OBSERVER}/GetFlows": self.get_flows,
            f"/{OBSERVER}/GetAgentEvents": self.get_agent_events,
            f"/{OBSERVER}/GetDebugEvents": _no_debug_events,
            f"/{OBSERVER}/GetNodes": self.get_nodes,
            f"/{OBSERVER}/GetNamespaces": self.get_namespaces,
            f"/{OBSERVER}/ServerStatus": self.server_status,
            f"/{PEER}/Notify": self.notify,
            "/recorder.Recorder/Record": _no_recorder,
            f"/{FLOWS}/Aggregate": self.aggregate,
            f"/{FLOWS}/Losses": self.losses,
            f"/{FLOWS}/Stats": self.stats,
        }

    # ---- flows

    async def get_flows(self, call: Call) -> None:
        request = decode(observer_pb2.GetFlowsRequest, await call.message())
        query, mask = convert.flows_request(request)
        store = self._store
        cursor = store.query(query)
        filters = _filter_key(request)
        lost = _Lost(self._about.node_name())
        await call.start()
        self.followers += query.follow
        try:
            while True:
                if cursor.state is State.DISK:
                    items = await asyncio.to_thread(cursor.read)
                else:
                    items = cursor.read()
                payloads: list[bytes] = []
                for item in items:
                    if isinstance(item, Loss):
                        lost.add(item)
                        if told := lost.take():
                            payloads.append(told)
                        continue
                    for at in range(0, len(item), _CHUNK):
                        part = item if len(item) <= _CHUNK else item.take(slice(at, at + _CHUNK))
                        payloads.append(
                            self._encoded.encode(part, mask, filters)
                            if query.follow and self.followers > 1
                            else self._encoded.once(part, mask)
                        )
                for payload in payloads:
                    await call.send_framed(payload)
                if cursor.state is State.DONE:
                    break
                if cursor.state is State.WAITING:
                    await store.wait_for_rows(cursor)
                elif not payloads:
                    await asyncio.sleep(0)
            if told := lost.take(at_end=True):
                await call.send_framed(told)
        finally:
            self.followers -= query.follow

    async def get_agent_events(self, call: Call) -> None:
        request = decode(observer_pb2.GetAgentEventsRequest, await call.message())
        if request.first and request.follow:
            raise RpcFailure(Status.INVALID_ARGUMENT, "first and follow exclude each other")
        since, until = _times(request)
        notes = self._notes
        await call.start()
        found = [
            note
            for note in notes.since(0)
            if (since is None or note.time_ns >= since) and (until is None or note.time_ns <= until)
        ]
        position = notes.head
        if since is None:
            if request.first:
                found = found[: request.number or None]
            elif request.number:
                found = found[-request.number :] if request.number < len(found) else found
            elif request.follow:
                found = []
        elif request.number and not request.follow:
            found = found[: request.number]
        node = self._about.node_name()
        for note in found:
            await call.send(_agent_event(note, node))
        while request.follow:
            await notes.wait_beyond(position)
            fresh = notes.since(position)
            position = notes.head
            for note in fresh:
                if until is not None and note.time_ns > until:
                    return
                await call.send(_agent_event(note, node))

    # ---- the node

    async def server_status(self, call: Call) -> None:
        decode(observer_pb2.ServerStatusRequest, await call.message())
        store = self._store
        status = observer_pb2.ServerStatusResponse(
            num_flows=len(store.ring),
            max_flows=store.ring.capacity,
            seen_flows=store.counters.seen,
            uptime_ns=time.time_ns() - store.counters.started_ns,
            version=self._about.version,
            flows_rate=store.rate,
        )
        away = bool(self._about.watching())
        status.num_connected_nodes.value = int(not away)
        status.num_unavailable_nodes.value = int(away)
        if away:
            status.unavailable_nodes.append(self._about.node_name())
        await call.send(status.SerializeToString())

    async def get_nodes(self, call: Call) -> None:
        decode(observer_pb2.GetNodesRequest, await call.message())
        store, about = self._store, self._about
        response = observer_pb2.GetNodesResponse()
        node = response.nodes.add(
            name=about.node_name(),
            version=about.version,
            address=about.address,
            state=relay_pb2.NODE_UNAVAILABLE if about.watching() else relay_pb2.NODE_CONNECTED,
            uptime_ns=time.time_ns() - store.counters.started_ns,
            num_flows=len(store.ring),
            max_flows=store.ring.capacity,
            seen_flows=store.counters.seen,
        )
        node.tls.enabled = bool(about.tls_server_name)
        node.tls.server_name = about.tls_server_name
        await call.send(response.SerializeToString())

    async def get_namespaces(self, call: Call) -> None:
        decode(observer_pb2.GetNamespacesRequest, await call.message())
        self._store.note_namespaces(time.monotonic())
        response = observer_pb2.GetNamespacesResponse()
        for cluster, namespace in sorted(self._store.namespaces):
            response.namespaces.add(cluster=cluster, namespace=namespace)
        await call.send(response.SerializeToString())

    async def notify(self, call: Call) -> None:
        """This node is all there is to tell; it is announced, and stays."""
        decode(peer_pb2.NotifyRequest, await call.message())
        change = peer_pb2.ChangeNotification(
            name=self._about.node_name(), address=self._about.address, type=peer_pb2.PEER_ADDED
        )
        if self._about.tls_server_name:
            change.tls.server_name = self._about.tls_server_name
        await call.send(change.SerializeToString())
        await asyncio.Event().wait()

    # ---- what Hubble lacks

    async def aggregate(self, call: Call) -> None:
        request = decode(flows_pb2.AggregateRequest, await call.message())
        columns = columns_of(request.group_by)
        convert.refuse_unknown(request, "AggregateRequest")
        since, until = _times(request)
        cursor = self._store.query(
            FlowQuery(
                whitelist=tuple(map(convert.filter_from_proto, request.whitelist)),
                blacklist=tuple(map(convert.filter_from_proto, request.blacklist)),
                since_ns=since or 0,
                until_ns=until,
            )
        )
        sums = Sums(columns, limit=_MAX_GROUPS)
        while True:
            if cursor.state is State.DISK:
                items = await asyncio.to_thread(cursor.read)
            else:
                items = cursor.read()
            for item in items:
                if isinstance(item, Rows):
                    sums.add(item)
            if cursor.state in (State.DONE, State.WAITING):
                break
            await asyncio.sleep(0)
        response = flows_pb2.AggregateResponse(
            groups=len(sums), flows=sums.flows, bytes=sums.bytes, scanned=self._store.counters.seen
        )
        for keys, group in sums.largest(request.limit or 1000):
            row = response.rows.add(keys=keys, flows=group.flows, bytes=group.bytes)
            row.first.FromNanoseconds(group.first_ns)
            row.last.FromNanoseconds(group.last_ns)
        await call.send(response.SerializeToString())

    async def losses(self, call: Call) -> None:
        request = decode(flows_pb2.LossesRequest, await call.message())
        ledger = self._store.ledger
        response = flows_pb2.LossesResponse(
            watching=not self._about.watching(), forgotten=ledger.forgotten
        )
        for loss in ledger.between(*_times(request)):
            row = response.losses.add(
                count=loss.count or 0,
                unknown_count=loss.count is None,
                cause=loss.cause,
                detail=loss.detail,
            )
            getattr(row, "from").CopyFrom(convert.to_timestamp(loss.from_ns))
            row.to.CopyFrom(convert.to_timestamp(loss.to_ns))
        await call.send(response.SerializeToString())

    async def stats(self, call: Call) -> None:
        decode(flows_pb2.StatsRequest, await call.message())
        store = self._store
        ring, segments = store.ring, store.segments
        why = self._about.watching()
        response = flows_pb2.StatsResponse(
            version=self._about.version,
            node=self._about.node_name(),
            uptime_ns=time.time_ns() - store.counters.started_ns,
            seen=store.counters.seen,
            rate_per_s=store.rate,
            clients=self.clients(),
            followers=self.followers,
            watching=not why,
            message=why or store.counters.last_spill_error or self._about.degraded(),
            lost={cause.value: count for cause, count in store.ledger.totals.items()},
        )
        memory = response.memory
        memory.flows = len(ring)
        memory.capacity = ring.capacity
        memory.bytes = sum(column.nbytes for column in ring.columns.values())
        if len(ring):
            memory.oldest.FromNanoseconds(ring.oldest_time())
            memory.newest.FromNanoseconds(ring.newest_time())
        if segments is not None:
            disk = response.disk
            disk.flows, disk.bytes, disk.files = segments.rows, segments.bytes, segments.count
            disk.capacity, disk.damaged_files = self._about.disk_bytes, len(segments.damaged)
            if segments.rows:
                disk.oldest.FromNanoseconds(segments.oldest_ns)
                disk.newest.FromNanoseconds(segments.newest_ns)
        await call.send(response.SerializeToString())


def _times(request: Any) -> tuple[int | None, int | None]:
    """Since and until of a request, where given. Raises RequestInvalid."""
    since, until = (
        convert.timestamp_ns(getattr(request, name), name) if request.HasField(name) else None
        for name in ("since", "until")
    )
    return since, until


def _agent_event(note: Note, node: str) -> bytes:
    response = observer_pb2.GetAgentEventsResponse(
        node_name=node, time=convert.to_timestamp(note.time_ns)
    )
    response.agent_event.ParseFromString(note.event)
    return response.SerializeToString()


def _filter_key(request: observer_pb2.GetFlowsRequest) -> bytes:
    """Equal for requests that select the same flows."""
    only = observer_pb2.GetFlowsRequest(whitelist=request.whitelist, blacklist=request.blacklist)
    return only.SerializeToString(deterministic=True)


async def _no_debug_events(call: Call) -> None:
    raise RpcFailure(Status.UNIMPLEMENTED, "this datapath makes no debug events")


async def _no_recorder(call: Call) -> None:
    raise RpcFailure(
        Status.UNIMPLEMENTED,
        "packets are not recorded here: use tcpdump in the workload's namespace",
    )
