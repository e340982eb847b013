"""The agent, over gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from cilia.rpc.channel import connect
from protos.agent.v1 import agent_pb2, agent_pb2_grpc
from services.flows import convert
from services.flows.ingest import AgentBatch


class GrpcAgentClient:
    def __init__(self, socket: Path) -> None:
        self._socket = socket

    async def batches(self) -> AsyncIterator[AgentBatch]:
        channel: Any = connect(self._socket, service="agent")
        try:
            stub = agent_pb2_grpc.MonitorServiceStub(channel)
            stream = stub.Events(agent_pb2.EventsRequest(from_now=True))
            async for message in stream:
                yield convert.agent_batch(message)
        finally:
            await channel.close()
