"""Where flows are asked for: addresses, TLS, times, and what a failed call means."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar

import click
import grpc
import grpc.aio
from google.protobuf.timestamp_pb2 import Timestamp

from cli import flows_filter
from cli.clients import HANDSHAKE_S, LABS, answers
from cli.errors import CliError, Exit
from cli.settings import DEFAULT_RUN_DIR, Command, Settings
from protos.flows.v1 import flows_pb2_grpc
from protos.hubble.v1 import observer_pb2_grpc

T = TypeVar("T")

_UNITS: Final = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)(ns|us|ms|s|m|h|d)")


def default_server() -> str:
    """CILIA_FLOWS_SERVER, else the socket of this node's flow service."""
    return os.environ.get("CILIA_FLOWS_SERVER") or f"unix://{DEFAULT_RUN_DIR / 'hubble.sock'}"


class Server:
    """The stubs over one channel."""

    def __init__(self, channel: grpc.aio.Channel, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.observer = observer_pb2_grpc.ObserverStub(channel)
        self.flows = flows_pb2_grpc.FlowsServiceStub(channel)


# ---- options that several commands share

_SERVER_OPTIONS = [
    click.option(
        "--server",
        envvar="CILIA_FLOWS_SERVER",
        default=default_server,
        metavar="ADDRESS",
        help="unix:///path, host:port or tls://host:port.  [default: unix:///run/cilia/hubble.sock]",
    ),
    click.option("--tls-ca-cert-file", "ca", type=click.Path(exists=True, dir_okay=False),
                 help="The authority that signed the server's certificate."),
    click.option("--tls-client-cert-file", "cert", type=click.Path(exists=True, dir_okay=False),
                 help="Our own certificate."),
    click.option("--tls-client-key-file", "key", type=click.Path(exists=True, dir_okay=False),
                 help="Its key."),
    click.option("--tls-server-name", "server_name", help="The name in the server's certificate."),
]  # fmt: skip
_TIME_OPTIONS = [
    click.option("--since", metavar="TIME", help="From then on: 5m ago, or an RFC 3339 time."),
    click.option("--until", metavar="TIME", help="Up to then."),
]


def server_options(function: Any) -> Any:
    """Whom to ask."""
    return _with(_SERVER_OPTIONS, function)


def time_options(function: Any) -> Any:
    """--since and --until."""
    return _with(_TIME_OPTIONS, function)


def _with(declared: Sequence[Callable[[Any], Any]], function: Any) -> Any:
    for option in reversed(declared):
        function = option(function)
    return function


class FilterCommand(Command):
    """A command with filters: understands --not."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, flows_filter.fold_not(args))


def parse_time(text: str, now_ns: int) -> Timestamp:
    """A time: RFC 3339, a date, or how long ago (1h30m). Raises CliError."""
    out = Timestamp()
    if (pieces := _DURATION.findall(text)) and "".join(a + b for a, b in pieces) == text:
        ago_s = sum(float(number) * _UNITS[unit] for number, unit in pieces)
        out.FromNanoseconds(max(0, now_ns - int(ago_s * 1e9)))
        return out
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise CliError(
            f"{text} is no time",
            code=Exit.USAGE,
            hint="Write 5m, 1h30m, 2026-01-31 or 2026-01-31T15:04:05Z.",
        ) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    out.FromDatetime(moment)
    return out


def run(settings: Settings, tls: dict[str, Any], work: Callable[[Server], Awaitable[T]]) -> T:
    """Run `work` against the server. Raises CliError for whatever goes wrong."""
    target: str = tls["server"]

    async def main() -> T:
        address = target.removeprefix("tls://")
        ca, cert, key = (_read(tls.get(name)) for name in ("ca", "cert", "key"))
        options: list[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", 64 << 20),
            ("grpc.enable_retries", 0),
        ]
        channel: grpc.aio.Channel
        if target.startswith("tls://") or ca or cert:
            if tls.get("server_name"):
                options.append(("grpc.ssl_target_name_override", tls["server_name"]))
            credentials = grpc.ssl_channel_credentials(ca, key, cert)
            channel = grpc.aio.secure_channel(address, credentials, options)
        else:
            channel = grpc.aio.insecure_channel(address, options)
        async with channel:
            if target.startswith("unix:///") and answers(Path(target.removeprefix("unix://"))):
                # A stream has no deadline; whoever takes the connection must say hello in time.
                limit_s = min(HANDSHAKE_S, settings.timeout_s)
                try:
                    async with asyncio.timeout(limit_s):
                        await channel.channel_ready()
                except TimeoutError:
                    raise CliError(
                        f"the flow service at {target} is there and did not answer within "
                        f"{limit_s:g} s",
                        code=Exit.TIMEOUT,
                        hint="Give it longer with --timeout; is its process stopped?",
                    ) from None
            return await work(Server(channel, settings.timeout_s))

    try:
        return asyncio.run(main())
    except grpc.aio.AioRpcError as error:
        raise _explain(error, target) from error


def _read(path: str | None) -> bytes | None:
    return Path(path).read_bytes() if path else None


def _explain(error: grpc.aio.AioRpcError, target: str) -> CliError:
    details = error.details() or error.code().name
    match error.code():
        case grpc.StatusCode.UNAVAILABLE:
            hint = (
                "Is it running? Start it with `python -m services.flows`, or name it with --server."
            )
            labs = sorted(LABS.glob("*/*/hubble.sock"))
            if labs:
                hint += f"\n  Labs that are up: {' '.join(f'--server unix://{p}' for p in labs)}"
            if target.startswith("unix:///"):
                # gRPC says so as well, in a line with three names of the same.
                found = Path(target.removeprefix("unix://")).exists()
                details = "nobody listens on it" if found else "there is no such socket"
            return CliError(
                f"flow service not reachable at {target}: {details}",
                code=Exit.UNREACHABLE,
                hint=hint,
            )
        case grpc.StatusCode.INVALID_ARGUMENT:
            return CliError(details, code=Exit.INVALID)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return CliError(details, code=Exit.TIMEOUT, hint="Give it longer with --timeout.")
        case grpc.StatusCode.UNIMPLEMENTED:
            return CliError(
                details, hint="The server has not got this call; a relay answers only Hubble's."
            )
        case _:
            return CliError(details)


def set_times(request: Any, since: str | None, until: str | None) -> None:
    """Fill `since` and `until` of a request. Raises CliError."""
    now = time.time_ns()
    if since:
        request.since.CopyFrom(parse_time(since, now))
    if until:
        request.until.CopyFrom(parse_time(until, now))
