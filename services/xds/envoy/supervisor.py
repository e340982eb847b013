"""Keeps one Envoy running: starts, adopts, replaces, restarts and ends it.

    start ──▶ found one with our configuration? ── yes ─▶ adopt: nothing changes for its connections
                │ no                  │ another one's
                ▼                     ▼
              spawn               it stops listening; spawn; once the new one is ready and the
                │                 old one had time for what it had begun, it ends. Who connects
                │                 meanwhile waits: nobody refuses him, and nothing lets him pass
                ▼
              watch ── ended ──▶ wait (0.1 s, doubling to 5 s; from the start after 10 s of life) ─┐
                ▲                                                                                  │
                └──────────────────────────────── spawn ◀──────────────────────────────────────────┘

While there is none, redirected connections fail: nobody listens at their port. A service that is
killed leaves Envoy enforcing; one that is stopped ends it, unless told to leave it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import structlog

from cilia.controller import spawn
from cilia.errors import DomainError
from cilia.telemetry import fields
from services.xds.envoy import bootstrap
from services.xds.envoy.admin import AdminClient, AdminUnavailable
from services.xds.envoy.bootstrap import Bootstrap, BootstrapSettings
from services.xds.envoy.log import LogFile
from services.xds.envoy.process import Account, Command, Process, account

log = structlog.get_logger()

_FIRST_WAIT_S: Final = 0.1
_LONGEST_WAIT_S: Final = 5.0
_HEALTHY_S: Final = 10.0
_GRACE_S: Final = 5.0
_SOCKETS: Final = "marked with their port;"  # how listeners are made


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvoySettings:
    """How Envoy is run."""

    binary: Path
    run_dir: Path
    """Of the service; Envoy's own files are in envoy/ below it."""
    node_id: str
    ads_socket: Path
    user: str = "cilia-envoy"
    concurrency: int = 2
    log_level: str = "info"
    max_connections: int = 100_000
    max_program_size: int = 1000
    keep: bool = False
    """Leave it running when the service stops."""
    drain_s: int = 5
    """How long connections of a listener that was removed or replaced may go on."""
    takeover_s: float = 15.0
    """How long one that is replaced may go on while its successor is not ready."""

    @property
    def directory(self) -> Path:
        return self.run_dir / "envoy"


@dataclass(frozen=True, slots=True)
class EnvoyState:
    """How it fares. `state` is starting, running, backoff or stopped; times are Unix ns."""

    state: str = "stopped"
    pid: int = 0
    version: str = ""
    started_ns: int = 0
    restarts: int = 0
    message: str = ""


class Supervisor:
    """Run `run()` as a background task of the service."""

    def __init__(
        self, settings: EnvoySettings, *, on_change: Callable[[EnvoyState], None] | None = None
    ) -> None:
        self._settings = settings
        self._account: Account = account(settings.user)
        self._on_change = on_change
        self._state = EnvoyState()
        self._process: Process | None = None
        self._bootstrap = self._build()
        self.admin = AdminClient(self._bootstrap.admin_socket)

    @property
    def state(self) -> EnvoyState:
        return self._state

    @property
    def log_path(self) -> Path:
        return self._settings.directory / "envoy.log"

    def _build(self) -> Bootstrap:
        settings = self._settings
        status = settings.binary.stat() if settings.binary.exists() else None
        return bootstrap.build(
            BootstrapSettings(
                node_id=settings.node_id,
                ads_socket=settings.ads_socket,
                admin_directory=self._admin_directory,
                max_connections=settings.max_connections,
                max_program_size=settings.max_program_size,
            ),
            # Another binary, another user: another process. So is one whose listeners' sockets are
            # not what they would be now, for they cannot be changed while they are open.
            salt=f"{_SOCKETS}{settings.binary}{status and (status.st_size, status.st_mtime_ns)}"
            f"{self._account}{settings.concurrency}{settings.log_level}{settings.drain_s}",
        )

    @property
    def _admin_directory(self) -> Path:
        return self._settings.directory / "admin"

    @property
    def _config(self) -> Path:
        return self._settings.directory / f"bootstrap-{self._bootstrap.digest}.json"

    # ---- the loop

    async def run(self) -> None:
        """Keeps one running until cancelled. Raises nothing that a restart could heal."""
        self._prepare()
        async with asyncio.TaskGroup() as group:
            following = spawn(group, LogFile(self.log_path).run(), "envoy-log")
            try:
                await self._keep()
            finally:
                following.cancel()

    async def _keep(self) -> None:
        wait_s = _FIRST_WAIT_S
        try:
            others = self._adopt()
            await self._release_ports(others)
            while True:
                if self._process is None:
                    try:
                        self._process = self._spawn()
                    except DomainError as error:
                        self._note(state="backoff", pid=0, message=error.explain())
                        log.error(
                            "Envoy could not be started.",
                            **{fields.ERROR: error.message, fields.CURE: error.cure},
                        )
                        await asyncio.sleep(_LONGEST_WAIT_S)
                        continue
                began = time.monotonic()
                why = await self._watch(self._process, others)
                others = []
                self._process.close()
                self._process = None
                if time.monotonic() - began > _HEALTHY_S:
                    wait_s = _FIRST_WAIT_S
                self._note(state="backoff", pid=0, message=why, restarts=self._state.restarts + 1)
                log.warning(
                    "Envoy ended and will be started again.",
                    **{fields.REASON: why, fields.DURATION_S: wait_s},
                )
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
        finally:
            await self._stop()

    def _adopt(self) -> list[Process]:
        """Takes over what runs with our configuration; returns what runs with another."""
        others: list[Process] = []
        for process in Process.find(self._settings.directory, user=self._account):
            if process.config == self._config and self._process is None:
                self._process = process
                self._note(state="starting", pid=process.pid, started_ns=process.started_ns)
                log.info("A running Envoy was adopted.", **{fields.PID: process.pid})
            else:
                others.append(process)
        return others

    def _spawn(self) -> Process:
        settings = self._settings
        self._bootstrap.admin_socket.unlink(missing_ok=True)
        process = Process.start(
            Command(
                binary=settings.binary,
                config=self._config,
                account=self._account,
                log=self.log_path,
                concurrency=settings.concurrency,
                log_level=settings.log_level,
                drain_s=settings.drain_s,
            )
        )
        self._note(state="starting", pid=process.pid, started_ns=process.started_ns, message="")
        log.info("Envoy was started.", **{fields.PID: process.pid})
        return process

    async def _watch(self, process: Process, others: list[Process]) -> str:
        """Returns when it has ended, with the reason."""
        ended = ""
        async with asyncio.TaskGroup() as group:

            async def until_ready() -> None:
                deadline = time.monotonic() + self._settings.takeover_s
                while not await self.admin.ready():
                    if others and time.monotonic() > deadline:
                        await self._end(others)
                    await asyncio.sleep(0.05)
                await self._end(others)
                version = ""
                with contextlib.suppress(AdminUnavailable):
                    version = await self.admin.version()
                self._note(state="running", version=version, message="")
                log.info("Envoy is ready.", **{fields.PID: process.pid, fields.VERSION: version})

            waiting = spawn(group, until_ready(), "envoy-ready")
            ended = await process.wait()
            waiting.cancel()
        await self._end(others)
        return ended

    async def _release_ports(self, others: list[Process]) -> None:
        """Has them stop listening. They go on with the connections that they have."""
        for other in others:
            with contextlib.suppress(AdminUnavailable):
                await self._admin_of(other).stop_listening()

    async def _end(self, others: list[Process]) -> None:
        """Lets them finish what they have begun, and ends them."""
        if others:
            await asyncio.sleep(self._settings.drain_s)
        while others:
            other = others[-1]
            log.info("An Envoy of another configuration was replaced.", **{fields.PID: other.pid})
            await other.end(grace_s=_GRACE_S)
            others.pop()
            if other.config != self._config:
                self._admin_of(other).socket.unlink(missing_ok=True)
                other.config.unlink(missing_ok=True)

    def _admin_of(self, process: Process) -> AdminClient:
        digest = process.config.stem.rpartition("-")[2]
        return AdminClient(bootstrap.admin_socket(self._admin_directory, digest))

    async def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            self._note(state="stopped", pid=0)
            return
        if self._settings.keep:
            process.close()
            log.info("Envoy was left running.", **{fields.PID: process.pid})
            return
        await process.end(grace_s=_GRACE_S)
        self._bootstrap.admin_socket.unlink(missing_ok=True)
        self._note(state="stopped", pid=0)
        log.info("Envoy was stopped.", **{fields.PID: process.pid})

    # ---- files

    def _prepare(self) -> None:
        """The directory is root's and can be entered by Envoy; of its files it writes only its
        admin socket, in a directory of its own."""
        directory = self._settings.directory
        user = self._account
        directory.mkdir(mode=0o750, parents=True, exist_ok=True)
        os.chown(directory, 0, user.gid)
        directory.chmod(0o750)
        admin = self._admin_directory
        admin.mkdir(mode=0o700, exist_ok=True)
        os.chown(admin, user.uid, user.gid)
        temporary = self._config.with_suffix(".tmp")
        temporary.write_text(self._bootstrap.text)
        os.chown(temporary, 0, user.gid)
        temporary.chmod(0o640)
        temporary.rename(self._config)
        running = {process.config for process in self._found()}
        for old in directory.glob("bootstrap-*.json"):
            if old != self._config and old not in running:
                old.unlink(missing_ok=True)

    def _found(self) -> list[Process]:
        found = Process.find(self._settings.directory, user=self._account)
        for process in found:
            process.close()
        return found

    def _note(self, **changes: object) -> None:
        self._state = replace(self._state, **changes)  # type: ignore[arg-type]  # fields by name
        if self._on_change is not None:
            self._on_change(self._state)
