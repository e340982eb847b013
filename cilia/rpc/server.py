"""gRPC servers as lifecycle parts, with health, reflection and readable errors: `Server` on a unix
socket, `TlsServer` on TCP with mutual TLS.

The socket is root's and, where the group `cilia` exists, that group's: who may connect may do
everything. The directory is created 0750, the socket is bound 0600 and then opened to the group, so
at no moment can anybody else connect. A socket file that nobody listens on is left from a killed
process and is replaced; a live one is refused, with the pid of its owner.
"""

from __future__ import annotations

import contextlib
import grp
import os
import socket as sockets
import stat
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import _async as health_aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cilia.errors import ConflictError, DomainError, PreconditionError
from cilia.rpc.interceptor import EdgeInterceptor
from cilia.telemetry import fields

if TYPE_CHECKING:  # it brings the cryptography library: 10 MB for who serves on a socket only
    from cilia.pki.files import Credentials, KeyPair

log = structlog.get_logger()

MAX_MESSAGE_BYTES: Final = 64 << 20
UNARY_LIMIT_S: Final = 120.0
GROUP: Final = "cilia"

# sun_path of a sockaddr_un, less the final zero (unix(7)).
_MAX_PATH_BYTES: Final = 107


class SocketInUse(ConflictError):
    """Another process serves on the socket."""

    def __init__(self, path: Path, pid: int | None) -> None:
        holder = f"process {pid}" if pid else "another process"
        super().__init__(
            f"{holder} is serving on {path} already",
            cure="Stop it first, or choose another --run-dir",
        )
        self.pid = pid


class SocketUnusable(PreconditionError):
    """The path cannot become a socket of ours."""


class _Listener:
    """What the servers have in common. Where they listen is the subclass's."""

    def __init__(
        self,
        *,
        services: Sequence[Callable[[grpc.aio.Server], None]],
        grace_s: float,
        unary_limit_s: float,
        max_message_bytes: int,
        with_reflection: bool = True,
    ) -> None:
        self._services = tuple(services)
        self._grace_s = grace_s
        self._unary_limit_s = unary_limit_s
        self._max_message_bytes = max_message_bytes
        self._with_reflection = with_reflection
        self._server: grpc.aio.Server | None = None
        self._health: Any = None
        self._names: tuple[str, ...] = ()
        self._serving = False

    @property
    def service_names(self) -> tuple[str, ...]:
        """Full names of what is served, once started."""
        return self._names

    async def _make(self) -> grpc.aio.Server:
        server = grpc.aio.server(
            interceptors=[EdgeInterceptor(unary_limit_s=self._unary_limit_s)],
            options=[
                ("grpc.max_receive_message_length", self._max_message_bytes),
                ("grpc.max_send_message_length", self._max_message_bytes),
                # Clients may ping idle streams as often as ours do; see channel.py.
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.so_reuseport", 0),
            ],
        )
        names = _NameRecorder(server)
        for add in self._services:
            add(names)  # type: ignore[arg-type]  # passes on what generated code calls, and no more
        self._names = tuple(names.seen)
        self._health = health_aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self._with_reflection:
            reflection.enable_server_reflection(
                (*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME), server
            )
        await self._publish_health()
        return server

    async def _stop(self) -> bool:
        """False when it was not running."""
        if self._server is None:
            return False
        server, self._server = self._server, None
        self._serving = False
        await self._publish_health()
        await server.stop(self._grace_s)
        return True

    async def set_serving(self, serving: bool) -> None:
        """What grpc.health.v1 answers for the server as a whole and for each of its services."""
        self._serving = serving
        if self._health is not None:
            await self._publish_health()

    async def _publish_health(self) -> None:
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if self._serving
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in ("", *self._names):
            await self._health.set(name, status)


class Server(_Listener):
    """Serves `services`, each the `add_XServicer_to_server` of generated code bound to its
    servicer: `lambda server: add_EndpointServiceServicer_to_server(servicer, server)`.

    It starts NOT_SERVING; call `set_serving(True)` when the service is ready and
    `set_serving(False)` when it begins to stop (`lifecycle.on_ready`, `on_stopping`).
    """

    def __init__(
        self,
        *,
        socket: Path,
        services: Sequence[Callable[[grpc.aio.Server], None]],
        group: str | int | None = GROUP,
        grace_s: float = 2.0,
        unary_limit_s: float = UNARY_LIMIT_S,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        super().__init__(
            services=services,
            grace_s=grace_s,
            unary_limit_s=unary_limit_s,
            max_message_bytes=max_message_bytes,
        )
        self.socket = socket
        self._group = group
        self._inode: tuple[int, int] | None = None

    async def start(self) -> None:
        _check_path(self.socket)
        gid = _gid(self._group)
        _ensure_run_directory(self.socket.parent, gid)
        remove_stale_socket(self.socket)
        server = await self._make()
        # The runtime binds here and now. The umask is the process's, but nothing else runs
        # meanwhile.
        old_umask = os.umask(0o177)
        try:
            server.add_insecure_port(f"unix:{self.socket}")
        except RuntimeError as error:
            raise SocketUnusable(
                f"cannot bind the socket {self.socket}: {error}",
                cure="Check that its directory exists on a writable file system",
            ) from error
        finally:
            os.umask(old_umask)
        if gid is not None:
            try:
                os.chown(self.socket, -1, gid)
                self.socket.chmod(0o660)
            except PermissionError:  # not root, and not of the group: it stays ours alone
                log.warning(
                    "The socket could not be given to its group.",
                    **{fields.SOCKET: str(self.socket)},
                )
        status = self.socket.stat()
        self._inode = (status.st_dev, status.st_ino)
        await server.start()
        self._server = server
        log.info("The server is listening.", **{fields.SOCKET: str(self.socket)})

    async def stop(self) -> None:
        if not await self._stop():
            return
        with contextlib.suppress(FileNotFoundError):
            status = self.socket.stat()
            # Not a successor's socket, should one have taken our place.
            if (status.st_dev, status.st_ino) == self._inode:
                self.socket.unlink()


class AddressUnusable(PreconditionError):
    """Nobody can listen there."""


class TlsServer(_Listener):
    """The same on TCP, for what leaves the node: both ends show a certificate, and the client's
    must be of an authority that ours trusts. Who the client is, `peer_names` tells a handler.

    Certificates are read at every handshake, so renewed ones are used without a restart.
    """

    def __init__(
        self,
        *,
        address: str,
        credentials: Credentials,
        services: Sequence[Callable[[grpc.aio.Server], None]],
        grace_s: float = 2.0,
        unary_limit_s: float = UNARY_LIMIT_S,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        super().__init__(
            services=services,
            grace_s=grace_s,
            unary_limit_s=unary_limit_s,
            max_message_bytes=max_message_bytes,
            with_reflection=False,
        )
        self.address = address
        self.port = 0
        self._credentials = credentials

    async def start(self) -> None:
        first = self._credentials.current()
        server = await self._make()
        try:
            self.port = server.add_secure_port(self.address, self._grpc_credentials(first))
        except RuntimeError as error:
            self.port = 0
            raise AddressUnusable(
                f"cannot listen at {self.address}: {error}",
                cure="Is the port in use, or the address not this host's?",
            ) from error
        await server.start()
        self._server = server
        log.info(
            "The server is listening.", **{fields.ADDRESS: self.address, fields.PORT: self.port}
        )

    async def stop(self) -> None:
        await self._stop()

    def _grpc_credentials(self, first: KeyPair) -> grpc.ServerCredentials:
        def configuration(pair: KeyPair) -> Any:
            return grpc.ssl_server_certificate_configuration(
                [(pair.key, pair.chain)], root_certificates=pair.roots
            )

        last = first

        def fetch() -> Any:
            """Called at each handshake; None: nothing has changed."""
            nonlocal last
            try:
                pair = self._credentials.current()
            except DomainError:  # pragma: no cover  # there was one at the start
                return None
            if pair is last:
                return None
            last = pair
            log.info("A renewed certificate is in use.", **{fields.ADDRESS: self.address})
            return configuration(pair)

        return grpc.dynamic_ssl_server_credentials(
            configuration(first), fetch, require_client_authentication=True
        )


def peer_names(context: Any) -> tuple[str, ...]:
    """The names in the certificate of the client of a call, URIs first; () on a unix socket."""
    try:
        found = context.auth_context()
    except (AttributeError, RuntimeError):
        return ()
    names = [
        value.decode("utf-8", "replace")
        for key in ("peer_uri", "peer_dns", "x509_subject_alternative_name", "x509_common_name")
        for value in found.get(key, ())
    ]
    return tuple(dict.fromkeys(sorted(names, key=lambda name: "://" not in name)))


class _NameRecorder:
    """Stands for the server while services are added, and notes their full names."""

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server: Any = server
        self.seen: list[str] = []

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        self._server.add_generic_rpc_handlers(handlers)

    def add_registered_method_handlers(self, service_name: str, handlers: Any) -> None:
        self.seen.append(service_name)
        self._server.add_registered_method_handlers(service_name, handlers)


def claim_socket_path(path: Path, group: str | None = GROUP) -> int | None:
    """Makes the path ready to be bound: its directory is there, and no dead socket in it.

    Returns the number of the group whose socket it shall be, None where that group does not exist.
    Raises SocketInUse or SocketUnusable.
    """
    _check_path(path)
    gid = _gid(group)
    _ensure_run_directory(path.parent, gid)
    remove_stale_socket(path)
    return gid


def open_to_group(path: Path, gid: int | None) -> None:
    """Lets the group connect to a socket that was bound for its owner alone."""
    if gid is None:
        return
    try:
        os.chown(path, -1, gid)
        path.chmod(0o660)
    except PermissionError:  # not root, and not of the group: it stays ours alone
        log.warning("The socket could not be given to its group.", **{fields.SOCKET: str(path)})


def listening_pid(path: Path) -> tuple[bool, int | None]:
    """Whether somebody listens on the unix socket, and who (SO_PEERCRED, unix(7))."""
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM | sockets.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False, None
        except BlockingIOError:  # its backlog is full: alive, and busy
            return True, None
        credentials = probe.getsockopt(sockets.SOL_SOCKET, sockets.SO_PEERCRED, 12)
        pid, _, _ = struct.unpack("iII", credentials)
        return True, pid or None


def remove_stale_socket(path: Path) -> None:
    """Removes a socket file that nobody listens on; an absent one is success.

    Raises SocketInUse or SocketUnusable.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise SocketUnusable(
            f"{path} exists and is not a socket", cure="Move it away, or choose another --run-dir"
        )
    alive, pid = listening_pid(path)
    if alive:
        raise SocketInUse(path, pid)
    path.unlink(missing_ok=True)


def _check_path(path: Path) -> None:
    length = len(os.fsencode(path))
    if length > _MAX_PATH_BYTES:
        raise SocketUnusable(
            f"the socket path {path} is {length} bytes long, the kernel allows {_MAX_PATH_BYTES}",
            cure="Choose a shorter --run-dir",
        )


def _gid(group: str | int | None) -> int | None:
    if group is None or isinstance(group, int):
        return group
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        return None


def _ensure_run_directory(path: Path, gid: int | None) -> None:
    """Creates the directory 0750 for the group, or 0700; one that exists is its owner's affair."""
    try:
        if not path.is_dir():
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if gid is not None:
                os.chown(path, -1, gid)
                path.chmod(0o750)
    except OSError as error:
        raise SocketUnusable(
            f"cannot create the directory {path}: {error.strerror}",
            cure="Run as root, or choose another --run-dir",
        ) from error
