"""Observer for many nodes: the request goes to all of them unchanged, their answers are merged.

Nothing is decoded on the way but the time. The first message says which nodes answer, the next
which do not and why. A node that fails on the way is reported and the others go on; one that comes
while a stream is followed joins it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from google.protobuf.message import DecodeError, Message
from google.protobuf.wrappers_pb2 import UInt32Value

from cilia.controller import spawn
from protos.hubble.v1 import observer_pb2, relay_pb2
from services.flows.http2.client import Channel, Response
from services.flows.http2.connection import RpcFailure, Status, frame_message
from services.flows.http2.server import Call, Handler
from services.flows.http2.standard import decode
from services.flows.relay.merge import Merge
from services.flows.relay.peers import Peer, Peers

SERVICE: Final = "observer.Observer"
GET_FLOWS: Final = f"/{SERVICE}/GetFlows"
_UNARY_S: Final = 5.0
# A node that has said nothing for so long is left out of a stream that ends.
_STALLED_S: Final = 10.0
_JOIN_S: Final = 2.0
_TICK_S: Final = 0.05
# Messages that wait for other nodes' before their node is read no further.
_QUEUED: Final = 20_000
_NAMES: Final = 10
# Metadata that is the transport's own, and not passed on.
_OURS: Final = frozenset(("te", "user-agent", "grpc-timeout", "grpc-encoding", "content-type",
                          "grpc-accept-encoding", "accept-encoding"))  # fmt: skip


@dataclass(slots=True)
class _Answer:
    """What a node said to a unary call: a message, or why there is none."""

    peer: Peer
    message: bytes | None = None
    problem: str = ""


class RelayObserver:
    """The handlers. `version` is what ServerStatus says of this relay."""

    def __init__(self, peers: Peers, *, version: str) -> None:
        self._peers = peers
        self._version = version

    def handlers(self) -> Mapping[str, Handler]:
        prefix = f"/{SERVICE}/"
        return {
            GET_FLOWS: self._get_flows,
            prefix + "GetNodes": self._get_nodes,
            prefix + "GetNamespaces": self._get_namespaces,
            prefix + "ServerStatus": self._server_status,
            prefix + "GetAgentEvents": _not_here,
            prefix + "GetDebugEvents": _not_here,
        }

    # ---- unary

    async def _ask_all(self, method: str, request: bytes) -> list[_Answer]:
        answers = [_Answer(peer, problem=peer.message) for peer in self._peers.all()]

        async def ask(answer: _Answer, channel: Channel) -> None:
            try:
                answer.message = await channel.unary(
                    f"/{SERVICE}/{method}", request, timeout_s=_UNARY_S
                )
                answer.problem = ""
            except TimeoutError:
                answer.problem = f"no answer within {_UNARY_S:g} s"
            except RpcFailure as failure:
                answer.problem = failure.message

        async with asyncio.TaskGroup() as group:
            for answer in answers:
                if answer.peer.channel is not None:
                    spawn(group, ask(answer, answer.peer.channel), method)
        return answers

    async def _statuses(self) -> list[tuple[_Answer, observer_pb2.ServerStatusResponse | None]]:
        return [
            (answer, _parse(observer_pb2.ServerStatusResponse, answer))
            for answer in await self._ask_all("ServerStatus", b"")
        ]

    async def _server_status(self, call: Call) -> None:
        decode(observer_pb2.ServerStatusRequest, await call.message())
        total = observer_pb2.ServerStatusResponse(version=self._version)
        connected, away = 0, []
        for answer, status in await self._statuses():
            if status is None:
                away.append(answer.peer.info.name)
                continue
            connected += 1
            total.num_flows += status.num_flows
            total.max_flows += status.max_flows
            total.seen_flows += status.seen_flows
            total.flows_rate += status.flows_rate
            total.uptime_ns = max(total.uptime_ns, status.uptime_ns)
        total.num_connected_nodes.CopyFrom(UInt32Value(value=connected))
        total.num_unavailable_nodes.CopyFrom(UInt32Value(value=len(away)))
        total.unavailable_nodes.extend(away[:_NAMES])
        await call.send(total.SerializeToString())

    async def _get_nodes(self, call: Call) -> None:
        decode(observer_pb2.GetNodesRequest, await call.message())
        out = observer_pb2.GetNodesResponse()
        for answer, status in await self._statuses():
            info = answer.peer.info
            node = out.nodes.add(name=info.name, address=info.address)
            node.tls.enabled = bool(info.tls_server_name)
            node.tls.server_name = info.tls_server_name
            if status is None:
                up = answer.peer.connected
                node.state = relay_pb2.NODE_ERROR if up else relay_pb2.NODE_UNAVAILABLE
                continue
            node.state = relay_pb2.NODE_CONNECTED
            node.version = status.version
            node.uptime_ns = status.uptime_ns
            node.num_flows = status.num_flows
            node.max_flows = status.max_flows
            node.seen_flows = status.seen_flows
        await call.send(out.SerializeToString())

    async def _get_namespaces(self, call: Call) -> None:
        decode(observer_pb2.GetNamespacesRequest, await call.message())
        seen: set[tuple[str, str]] = set()
        for answer in await self._ask_all("GetNamespaces", b""):
            found = _parse(observer_pb2.GetNamespacesResponse, answer)
            if found is not None:
                seen |= {(n.cluster, n.namespace) for n in found.namespaces}
        out = observer_pb2.GetNamespacesResponse()
        for cluster, namespace in sorted(seen):
            out.namespaces.add(cluster=cluster, namespace=namespace)
        await call.send(out.SerializeToString())

    # ---- flows

    async def _get_flows(self, call: Call) -> None:
        request = await call.message()
        follow = decode(observer_pb2.GetFlowsRequest, request).follow
        async with asyncio.TaskGroup() as group:
            stream = _Stream(call, request, follow=follow, group=group)
            try:
                await stream.run(self._peers)
            finally:
                stream.stop()


class _Stream:
    """One GetFlows over all nodes."""

    def __init__(
        self, call: Call, request: bytes, *, follow: bool, group: asyncio.TaskGroup
    ) -> None:
        self._call = call
        self._request = request
        self._follow = follow
        self._group = group
        self._merge = Merge(follow=follow)
        self._metadata = [(k, v) for k, v in call.metadata.items() if k not in _OURS]
        self._readers: dict[str, asyncio.Task[None]] = {}
        self._heard: dict[str, float] = {}
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._reports: list[bytes] = []
        self._known: set[str] = set()

    async def run(self, peers: Peers) -> None:
        await self._call.start()
        nodes = peers.all()
        self._report(relay_pb2.NODE_CONNECTED, [peer.info.name for peer in nodes if peer.connected])
        away: dict[str, list[str]] = {}
        for peer in nodes:
            self._known.add(peer.info.name)
            if peer.connected:
                self._join(peer)
            else:
                away.setdefault(peer.message, []).append(peer.info.name)
        for message, names in sorted(away.items()):
            self._report(relay_pb2.NODE_UNAVAILABLE, names, message)
        look_again = time.monotonic() + _JOIN_S
        while True:
            await self._send_what_is_due()
            if not self._follow and self._merge.empty and not self._readers:
                return
            if self._follow and time.monotonic() >= look_again:
                look_again = time.monotonic() + _JOIN_S
                self._look_again(peers)
            if not self._follow:
                self._give_up_on_the_stalled()
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TICK_S):
                    await self._news.wait()

    def stop(self) -> None:
        for reader in self._readers.values():
            reader.cancel()

    async def _send_what_is_due(self) -> None:
        reports, self._reports = self._reports, []
        if reports:
            await self._call.send_framed(b"".join(map(frame_message, reports)))
        while messages := self._merge.take(time.time_ns()):
            await self._call.send_framed(b"".join(map(frame_message, messages)))
            self._room.set()

    # ---- nodes

    def _join(self, peer: Peer) -> None:
        name = peer.info.name
        if name in self._readers or peer.channel is None:
            return
        try:
            response = peer.channel.call(GET_FLOWS, self._request, self._metadata)
        except RpcFailure as failure:
            self._report(relay_pb2.NODE_ERROR, [name], failure.message)
            return
        self._merge.add(name)
        self._heard[name] = time.monotonic()
        self._readers[name] = spawn(self._group, self._read(name, response), f"relay-{name}")

    async def _read(self, name: str, response: Response) -> None:
        try:
            async for messages in response:
                self._heard[name] = time.monotonic()
                self._merge.push(name, messages)
                self._news.set()
                while self._merge.queued(name) > _QUEUED:
                    self._room.clear()
                    await self._room.wait()
                    self._heard[name] = time.monotonic()
        except RpcFailure as failure:
            self._report(relay_pb2.NODE_ERROR, [name], failure.message)
        except ValueError as error:
            self._report(relay_pb2.NODE_ERROR, [name], f"the node's answer is damaged: {error}")
        finally:
            response.cancel()
            self._merge.end(name)
            self._readers.pop(name, None)
            self._news.set()

    def _look_again(self, peers: Peers) -> None:
        """Nodes that came or came back take part; those that went are said to be gone."""
        names = set()
        for peer in peers.all():
            name = peer.info.name
            names.add(name)
            if peer.connected and name not in self._readers and self._merge.queued(name) == 0:
                self._report(relay_pb2.NODE_CONNECTED, [name])
                self._join(peer)
        if gone := sorted(self._known - names):
            self._report(relay_pb2.NODE_GONE, gone)
        self._known = names

    def _give_up_on_the_stalled(self) -> None:
        for name in self._merge.waits_for:
            if time.monotonic() - self._heard[name] > _STALLED_S and name in self._readers:
                self._report(
                    relay_pb2.NODE_ERROR, [name], f"the node said nothing for {_STALLED_S:g} s"
                )
                self._readers[name].cancel()

    def _report(
        self, state: relay_pb2.NodeState.ValueType, names: list[str], message: str = ""
    ) -> None:
        if not names and state != relay_pb2.NODE_CONNECTED:
            return
        report = observer_pb2.GetFlowsResponse()
        report.node_status.state_change = state
        report.node_status.node_names.extend(names)
        report.node_status.message = message
        report.time.GetCurrentTime()
        self._reports.append(report.SerializeToString())
        self._news.set()


async def _not_here(call: Call) -> None:
    raise RpcFailure(Status.UNIMPLEMENTED, "a relay has no events of its own: ask a node")


M = TypeVar("M", bound=Message)


def _parse(kind: type[M], answer: _Answer) -> M | None:
    if answer.message is None:
        return None
    try:
        return kind.FromString(answer.message)
    except DecodeError:
        answer.problem = "the node's answer cannot be read"
        return None
