"""Channels to the services, and their errors as the command line tells them."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar, cast

import grpc

from cilia.errors import FaultLike, Kind
from cilia.rpc.channel import Channel
from cilia.rpc.errors import RpcError
from cilia.rpc.server import listening_pid
from cli.errors import CliError, Exit, FaultLine
from cli.settings import Settings
from protos.agent.v1 import agent_pb2_grpc
from protos.common.v1 import common_pb2
from protos.identity.v1 import identity_pb2_grpc
from protos.xds.v1 import xds_pb2_grpc

T = TypeVar("T")

HANDSHAKE_S = 10.0
LABS = Path("/run/cilia-lab")

EXIT_OF_KIND = {
    Kind.INVALID: Exit.INVALID,
    Kind.OUT_OF_RANGE: Exit.INVALID,
    Kind.NOT_FOUND: Exit.NOT_FOUND,
    Kind.CONFLICT: Exit.CONFLICT,
    Kind.ABORTED: Exit.CONFLICT,
    Kind.DEADLINE: Exit.TIMEOUT,
    Kind.DENIED: Exit.PERMISSION,
}


class Agent:
    """The agent's five services over one channel."""

    def __init__(self, channel: grpc.aio.Channel, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.endpoint = agent_pb2_grpc.EndpointServiceStub(channel)
        self.policy = agent_pb2_grpc.PolicyServiceStub(channel)
        self.datapath = agent_pb2_grpc.DatapathServiceStub(channel)
        self.monitor = agent_pb2_grpc.MonitorServiceStub(channel)
        self.status = agent_pb2_grpc.StatusServiceStub(channel)


class Identity:
    """The identity service's two services over one channel."""

    def __init__(self, channel: grpc.aio.Channel, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.identity = identity_pb2_grpc.IdentityServiceStub(channel)
        self.store = identity_pb2_grpc.StoreServiceStub(channel)


class Xds:
    """The xDS service's status."""

    def __init__(self, channel: grpc.aio.Channel, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.status = xds_pb2_grpc.XdsStatusServiceStub(channel)


def agent(settings: Settings, work: Callable[[Agent], Awaitable[T]]) -> T:
    """Run `work` against the agent. Raises CliError for whatever the agent answers."""
    return _run(settings, "agent", settings.agent_socket, Agent, work)


def identity(settings: Settings, work: Callable[[Identity], Awaitable[T]]) -> T:
    """Run `work` against the identity service. Raises CliError."""
    return _run(settings, "identity service", settings.identity_socket, Identity, work)


def xds(settings: Settings, work: Callable[[Xds], Awaitable[T]]) -> T:
    """Run `work` against the xDS service. Raises CliError."""
    return _run(settings, "xds service", settings.xds_socket, Xds, work)


C = TypeVar("C")


def _run(
    settings: Settings,
    name: str,
    socket: str,
    client: Callable[[grpc.aio.Channel, float], C],
    work: Callable[[C], Awaitable[T]],
) -> T:
    async def main() -> T:
        path = Path(socket)
        service = name.removesuffix(" service")
        async with Channel(path, service=service, deadline_s=settings.timeout_s) as channel:
            if answers(path):
                # It is there, perhaps busy: a slow handshake is no reason to say it is away.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(HANDSHAKE_S, settings.timeout_s)):
                        await channel.wait_ready()
            stubs = cast(grpc.aio.Channel, channel)
            return await work(client(stubs, settings.timeout_s))

    with translated(name, socket):
        return asyncio.run(main())


def answers(socket: Path) -> bool:
    """True when somebody listens on the socket."""
    try:
        return listening_pid(socket)[0]
    except OSError:
        return False


@contextmanager
def translated(name: str, socket: str) -> Iterator[None]:
    """Turn a failed call into a CliError that names the service, the cause and the cure."""
    try:
        yield
    except RpcError as error:
        raise to_cli_error(error, name=name, socket=socket) from error


def to_cli_error(error: RpcError, *, name: str, socket: str) -> CliError:
    """The CliError for a failed call. `reason` is empty when no answer of ours came."""
    match error.kind:
        case Kind.UNAVAILABLE if not error.reason:
            return unreachable(name, socket, error.message)
        case Kind.DENIED if not error.reason:
            return _no_permission(name, socket)
        case Kind.DEADLINE if not error.reason:
            return CliError(
                error.message,
                code=Exit.TIMEOUT,
                hint="Give it longer with --timeout, or see `cilia status` for what it waits for.",
            )
        case Kind.UNAVAILABLE:  # the service answered that something it needs is away
            code = Exit.UNREACHABLE
        case _:
            code = EXIT_OF_KIND.get(error.kind, Exit.FAILED)
    return CliError(
        error.message, code=code, hint=error.cure, faults=[fault_line(f) for f in error.faults]
    )


def unreachable(name: str, socket: str, details: str) -> CliError:
    """Why a service does not answer, as far as the socket tells."""
    module = name.removesuffix(" service")
    start = (
        f"start it with `python -m services.{module}`, or name its socket with --{module}-socket"
    )
    path = Path(socket)
    if path.parent.exists() and not os.access(path.parent, os.X_OK):
        return _no_permission(name, socket)
    if not path.exists():
        hint = f"Is it running? There is no such socket: {start}."
        labs = _lab_sockets(module)
        if labs:
            hint += f"\n  Labs that are up: {' '.join(labs)}"
        return CliError(f"{name} not reachable at {socket}", code=Exit.UNREACHABLE, hint=hint)
    if not path.is_socket():
        return CliError(
            f"{socket} is not a socket, so no {name} can be asked there",
            code=Exit.UNREACHABLE,
            hint=f"Name the socket of a running one with --{module}-socket.",
        )
    if not os.access(path, os.R_OK | os.W_OK):
        return _no_permission(name, socket)
    return CliError(
        f"{name} not reachable at {socket}",
        code=Exit.UNREACHABLE,
        hint=f"The socket is there but nobody answers ({details}).\n"
        f"  Was it killed? Traffic stays under policy meanwhile; {_again(path) or start}.",
    )


def _no_permission(name: str, socket: str) -> CliError:
    return CliError(
        f"not allowed to open the {name}'s socket {socket}",
        code=Exit.PERMISSION,
        hint="Run as root, or become a member of group `cilia`.",
    )


def _again(socket: Path) -> str:
    """How to have a lab's services again: they need its namespaces and settings."""
    if LABS not in socket.parents:
        return ""
    lab = socket.relative_to(LABS).parts[0]
    return f"see `cilia lab status {lab}`, or `cilia lab down {lab}` and up again"


def _lab_sockets(module: str) -> list[str]:
    flag = f"--{module}-socket"
    return [f"{flag} {p}" for p in sorted(LABS.glob(f"*/*/{module}.sock"))]


def fault_line(fault: FaultLike | common_pb2.Fault) -> FaultLine:
    """A fault as a line."""
    origin = fault.origin
    return FaultLine(
        source=origin.source if origin is not None else "",
        line=origin.line if origin is not None else 0,
        column=origin.column if origin is not None else 0,
        path=fault.path,
        message=fault.message,
        document=fault.document,
    )
