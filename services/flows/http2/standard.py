"""What every gRPC server is expected to answer: grpc.health.v1 and server reflection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any, Final, TypeVar

from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha._async import ReflectionServicer

from services.flows.http2.connection import RpcFailure, Status
from services.flows.http2.server import Call, Handler

HEALTH: Final = "grpc.health.v1.Health"
REFLECTION: Final = "grpc.reflection.v1alpha.ServerReflection"
# The same messages under the name they have since 2023.
REFLECTION_V1: Final = "grpc.reflection.v1.ServerReflection"


M = TypeVar("M", bound=Message)


def decode(kind: type[M], data: bytes) -> M:
    """The request as a message. Raises RpcFailure when it is none."""
    try:
        return kind.FromString(data)
    except DecodeError:
        raise RpcFailure(
            Status.INVALID_ARGUMENT, f"the request is not a {kind.DESCRIPTOR.full_name}"
        ) from None


class Health:
    """SERVING or NOT_SERVING, the same for all services it knows."""

    def __init__(self, services: Iterable[str]) -> None:
        self._services: Final = frozenset(("", *services))
        self._serving = False
        self._changed = asyncio.Condition()

    async def set_serving(self, serving: bool) -> None:
        async with self._changed:
            self._serving = serving
            self._changed.notify_all()

    def handlers(self) -> Mapping[str, Handler]:
        return {f"/{HEALTH}/Check": self._check, f"/{HEALTH}/Watch": self._watch}

    def _answer(self, service: str) -> health_pb2.HealthCheckResponse:
        status = health_pb2.HealthCheckResponse
        if service not in self._services:
            return status(status=status.SERVICE_UNKNOWN)
        return status(status=status.SERVING if self._serving else status.NOT_SERVING)

    async def _check(self, call: Call) -> None:
        request = decode(health_pb2.HealthCheckRequest, await call.message())
        if request.service not in self._services:
            raise RpcFailure(Status.NOT_FOUND, f"no service {request.service[:100]}")
        await call.send(self._answer(request.service).SerializeToString())

    async def _watch(self, call: Call) -> None:
        request = decode(health_pb2.HealthCheckRequest, await call.message())
        said: bytes | None = None
        while True:
            answer = self._answer(request.service).SerializeToString()
            if answer != said:
                said = answer
                await call.send(answer)
            async with self._changed:
                await self._changed.wait()


def reflection_handlers(services: Iterable[str]) -> Mapping[str, Handler]:
    """Descriptors of these services, for grpcurl and `hubble reflect`."""
    servicer: Any = ReflectionServicer((*services, HEALTH, REFLECTION))

    async def info(call: Call) -> None:
        async def requests() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
            async for message in call.messages():
                yield decode(reflection_pb2.ServerReflectionRequest, message)

        async for answer in servicer.ServerReflectionInfo(requests(), None):
            await call.send(answer.SerializeToString())

    return {f"/{name}/ServerReflectionInfo": info for name in (REFLECTION, REFLECTION_V1)}
