"""Real servers and clients on unix sockets: errors, deadlines, health, reflection, permissions."""

# ruff: noqa: ASYNC240 -- nothing else runs on the loop while a test looks at a file

from __future__ import annotations

import asyncio
import os
import socket
import stat
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from structlog.testing import capture_logs

from cilia.errors import Fault, InvalidError, Kind, NotFoundError, Origin
from cilia.rpc.channel import Channel
from cilia.rpc.errors import RpcError
from cilia.rpc.server import Server, SocketInUse, SocketUnusable
from protos.agent.v1 import agent_pb2, agent_pb2_grpc


class EndpointNotFound(NotFoundError):
    pass


class Endpoints(agent_pb2_grpc.EndpointServiceServicer):
    """Does what the name in the request says."""

    async def Get(self, request: Any, context: Any) -> Any:
        match request.name:
            case "absent":
                raise EndpointNotFound("there is no endpoint absent", cure="List them")
            case "bug":
                raise ZeroDivisionError("secret detail")
            case "slow":
                await asyncio.Event().wait()
            case "abort":
                await context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you")
            case "faults":
                origin = Origin("a.yaml", 3, 7)
                raise InvalidError(
                    "refused",
                    faults=[Fault("doc", f"spec[{i}]", "x" * 100, origin) for i in range(200)],
                )
        return agent_pb2.Endpoint(id=7, name=request.name)


def _endpoints() -> Any:
    return Endpoints()  # type: ignore[abstract]  # two calls are enough here


class Monitor(agent_pb2_grpc.MonitorServiceServicer):
    async def Monitor(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield agent_pb2.MonitorEvent()
        yield agent_pb2.MonitorEvent()
        raise EndpointNotFound("it went away")

    async def Events(  # type: ignore[override]  # the stubs know generators only
        self, request: Any, context: Any
    ) -> None:
        await context.write(agent_pb2.EventBatch())
        raise ZeroDivisionError


class Endless(agent_pb2_grpc.MonitorServiceServicer):
    """A stream that only its reader ends."""

    async def Monitor(self, request: Any, context: Any) -> AsyncIterator[Any]:
        while True:
            yield agent_pb2.MonitorEvent()
            await asyncio.sleep(0)


@asynccontextmanager
async def serving(path: Path, **options: Any) -> AsyncIterator[Server]:
    server = Server(
        socket=path,
        services=[
            lambda s: agent_pb2_grpc.add_EndpointServiceServicer_to_server(_endpoints(), s),
            lambda s: agent_pb2_grpc.add_MonitorServiceServicer_to_server(Monitor(), s),
        ],
        grace_s=0.1,
        **options,
    )
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@pytest.fixture
async def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "a.sock"


async def get(channel: Channel, name: str, **options: Any) -> Any:
    return await agent_pb2_grpc.EndpointServiceStub(channel).Get(  # type: ignore[arg-type]
        agent_pb2.EndpointRef(name=name), **options
    )


async def test_domain_errors_arrive_with_name_and_cure(path: Path) -> None:
    async with serving(path), Channel(path, service="agent") as channel:
        assert (await get(channel, "x")).id == 7
        with pytest.raises(RpcError) as caught:
            await get(channel, "absent")
        error = caught.value
        assert (error.kind, error.reason, error.cure) == (
            Kind.NOT_FOUND,
            "EndpointNotFound",
            "List them",
        )
        assert error.message == "there is no endpoint absent"
        assert error.method == "/cilia.agent.v1.EndpointService/Get"


async def test_many_faults_fit_into_the_header_or_say_that_they_do_not(path: Path) -> None:
    async with serving(path), Channel(path, service="agent") as channel:
        with pytest.raises(RpcError) as caught:
            await get(channel, "faults")
        error = caught.value
        assert error.kind is Kind.INVALID
        assert 5 < len(error.faults) < 200
        assert error.faults[3].path == "spec[3]"
        assert error.faults[3].origin == Origin("a.yaml", 3, 7)
        assert f"the first {len(error.faults)} of 200 faults" in error.message


async def test_a_bug_is_internal_logged_and_not_told(path: Path) -> None:
    async with serving(path), Channel(path, service="agent") as channel:
        with capture_logs() as logs, pytest.raises(RpcError) as caught:
            await get(channel, "bug")
        assert caught.value.kind is Kind.INTERNAL
        assert "secret" not in caught.value.message
        assert any(isinstance(entry.get("exc_info"), ZeroDivisionError) for entry in logs)
        assert (await get(channel, "still-alive")).name == "still-alive"


async def test_a_handlers_own_abort_passes_through(path: Path) -> None:
    async with serving(path), Channel(path, service="agent") as channel:
        with pytest.raises(RpcError, match="who are you") as caught:
            await get(channel, "abort")
        assert caught.value.kind is Kind.DENIED


async def test_streams_map_errors_too(path: Path) -> None:
    async with serving(path), Channel(path, service="agent") as channel:
        stub = agent_pb2_grpc.MonitorServiceStub(channel)  # type: ignore[arg-type]
        seen = 0

        async def read_all() -> None:
            nonlocal seen
            async for _ in stub.Monitor(agent_pb2.MonitorRequest()):
                seen += 1

        with pytest.raises(RpcError, match="it went away") as caught:
            await read_all()
        assert seen == 2
        assert caught.value.kind is Kind.NOT_FOUND
        call = stub.Events(agent_pb2.EventsRequest())
        assert isinstance(await call.read(), agent_pb2.EventBatch)
        with pytest.raises(RpcError, match="internal error"):
            await call.read()


SERVE_ENDLESSLY = """
import asyncio, sys
from pathlib import Path
from cilia.rpc.server import Server
from protos.agent.v1 import agent_pb2_grpc
from test_rpc_server import Endless, _endpoints

async def main():
    server = Server(
        socket=Path(sys.argv[1]),
        services=[
            lambda s: agent_pb2_grpc.add_EndpointServiceServicer_to_server(_endpoints(), s),
            lambda s: agent_pb2_grpc.add_MonitorServiceServicer_to_server(Endless(), s),
        ],
        grace_s=0.1,
    )
    await server.start()
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_readers_that_go_away_again_and_again_do_no_harm(path: Path) -> None:
    """In a process of its own: what it guards against killed the server, not the call."""
    here = Path(__file__).parent
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SERVE_ENDLESSLY, str(path)),
        cwd=here.parents[2],
        env={**os.environ, "PYTHONPATH": f"{here.parents[2]}:{here}"},
        stdout=asyncio.subprocess.DEVNULL,  # a pipe that nobody reads would stop it
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(30):
            async with Channel(path, service="agent") as channel:
                await get(channel, "x", wait_for_ready=True)
                stub = agent_pb2_grpc.MonitorServiceStub(channel)  # type: ignore[arg-type]
                for turn in range(200):
                    call = stub.Monitor(agent_pb2.MonitorRequest())
                    for _ in range(turn % 3):
                        await call.read()
                    call.cancel()
                    if turn % 20 == 0:
                        assert (await get(channel, "x")).id == 7
                assert (await get(channel, "x")).id == 7
        assert server.returncode is None
    finally:
        if server.returncode is None:
            server.kill()
        await server.wait()


async def test_the_servers_own_limit_ends_a_call_without_deadline(path: Path) -> None:
    async with (
        serving(path, unary_limit_s=0.05),
        grpc.aio.insecure_channel(f"unix:{path}") as raw,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await agent_pb2_grpc.EndpointServiceStub(raw).Get(agent_pb2.EndpointRef(name="slow"))
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "did not finish within" in (caught.value.details() or "")


async def test_the_clients_default_deadline(path: Path) -> None:
    async with serving(path), Channel(path, service="agent", deadline_s=0.05) as channel:
        with pytest.raises(RpcError) as caught:
            await get(channel, "slow")
        assert caught.value.kind is Kind.DEADLINE


async def test_unreachable_services_are_explained(path: Path) -> None:
    async with Channel(path, service="agent") as channel:
        with pytest.raises(RpcError, match="no such socket") as caught:
            await get(channel, "x")
        assert caught.value.kind is Kind.UNAVAILABLE
        assert caught.value.cure == "Is the agent running?"
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(path))
    async with Channel(path, service="agent") as channel:
        with pytest.raises(RpcError, match="nobody listens"):
            await get(channel, "x")


async def test_a_channel_survives_the_servers_restart(path: Path) -> None:
    async with Channel(path, service="agent") as channel:
        async with serving(path):
            await get(channel, "x")
        async with serving(path):
            async with asyncio.timeout(5):
                await get(channel, "x", wait_for_ready=True)


async def test_health_and_reflection(path: Path) -> None:
    async with serving(path) as server, grpc.aio.insecure_channel(f"unix:{path}") as raw:
        checker = health_pb2_grpc.HealthStub(raw)

        async def state(name: str) -> Any:
            return (await checker.Check(health_pb2.HealthCheckRequest(service=name))).status

        assert await state("") == health_pb2.HealthCheckResponse.NOT_SERVING
        await server.set_serving(True)
        assert await state("") == health_pb2.HealthCheckResponse.SERVING
        assert (
            await state("cilia.agent.v1.EndpointService") == health_pb2.HealthCheckResponse.SERVING
        )
        await server.set_serving(False)
        assert await state("") == health_pb2.HealthCheckResponse.NOT_SERVING

        async def ask() -> AsyncIterator[Any]:
            yield reflection_pb2.ServerReflectionRequest(list_services="")

        stub = reflection_pb2_grpc.ServerReflectionStub(raw)
        async for answer in stub.ServerReflectionInfo(ask()):
            names = {service.name for service in answer.list_services_response.service}
            assert {
                "cilia.agent.v1.EndpointService",
                "cilia.agent.v1.MonitorService",
                "grpc.health.v1.Health",
            } <= names


async def test_socket_permissions(path: Path) -> None:
    async with serving(path, group=None):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not path.exists()
    path.parent.rmdir()
    async with serving(path, group="daemon"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o750
        assert path.stat().st_gid == path.parent.stat().st_gid != 0


async def test_a_stale_socket_is_replaced_and_a_live_one_refused(path: Path) -> None:
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(path))
    async with serving(path), Channel(path, service="agent") as channel:
        with pytest.raises(SocketInUse, match=f"process {os.getpid()} is serving"):
            async with serving(path):
                pass
        assert (await get(channel, "x")).id == 7
    path.write_text("precious")
    with pytest.raises(SocketUnusable, match="is not a socket"):
        async with serving(path):
            pass
    assert path.read_text() == "precious"


async def test_a_path_too_long_is_explained(tmp_path: Path) -> None:
    with pytest.raises(SocketUnusable, match="the kernel allows 107"):
        async with serving(tmp_path / ("x" * 120) / "a.sock"):
            pass
