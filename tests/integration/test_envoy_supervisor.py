"""Envoy's life: few rights, restarted when it ends, found again when its service was killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import structlog

from services.xds.envoy.process import (
    FALLBACK_ID,
    Account,
    EnvoyUserInvalid,
    Process,
    account,
    binary,
)
from services.xds.envoy.supervisor import EnvoySettings, Supervisor


@pytest.fixture
def run_dir(need_root: None) -> Iterator[Path]:
    path = Path(f"/run/cilt-{os.getpid()}-e-sup")
    path.mkdir()
    yield path
    for process in Process.find(path / "envoy"):
        process.signal(signal.SIGKILL)
        process.close()
    for file in sorted(path.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    path.rmdir()


def settings(run_dir: Path, **more: object) -> EnvoySettings:
    return EnvoySettings(
        binary=binary(),
        run_dir=run_dir,
        node_id="n1",
        ads_socket=run_dir / "ads.sock",
        concurrency=1,
        **more,  # type: ignore[arg-type]  # fields by name
    )


@contextlib.asynccontextmanager
async def running(supervisor: Supervisor) -> AsyncIterator[None]:
    """The supervisor at work; it is stopped at the end."""
    async with asyncio.TaskGroup() as group:
        task = group.create_task(supervisor.run())
        try:
            yield
        finally:
            task.cancel()


async def another_pid(supervisor: Supervisor, before: int = 0, within_s: float = 30) -> int:
    """The pid of an Envoy that answers and is not `before`."""
    async with asyncio.timeout(within_s):
        while True:
            pid = supervisor.state.pid
            if pid not in (0, before):
                with contextlib.suppress(Exception):
                    await supervisor.admin.version()
                    return pid
            await asyncio.sleep(0.02)


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def environment(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_text().rstrip("\0").split("\0")


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}/exe").exists()


async def test_it_has_one_capability_and_a_user_of_its_own(run_dir: Path) -> None:
    supervisor = Supervisor(settings(run_dir))
    async with running(supervisor):
        pid = await another_pid(supervisor)
        status = status_of(pid)
        net_admin = f"{1 << 12:016x}"
        for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb", "CapInh"):
            assert status[name] == net_admin, name
        assert status["NoNewPrivs"] == "1"
        uid = str(account("cilia-envoy").uid)
        assert status["Uid"].split() == [uid] * 4
        assert status["Groups"] == ""
        directory = run_dir / "envoy"
        assert directory.stat().st_uid == 0
        # Nothing in it is Envoy's to write but the directory of its admin socket.
        for path in directory.iterdir():
            mode = path.stat()
            if path.name != "admin":
                assert mode.st_uid == 0, path
                assert not mode.st_mode & 0o022, path
        assert supervisor.admin.socket.stat().st_mode & 0o777 == 0o600
        assert environment(pid) == ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]
    assert not alive(pid)
    assert supervisor.state.state == "stopped"


def waits(lines: Sequence[MutableMapping[str, Any]]) -> list[float]:
    """Seconds that the supervisor waited before each start but the first."""
    told = "Envoy ended and will be started again."
    return [line["duration_s"] for line in lines if line["event"] == told]


async def test_one_that_is_killed_is_started_again_at_once(run_dir: Path) -> None:
    supervisor = Supervisor(settings(run_dir))
    with structlog.testing.capture_logs() as lines:
        async with running(supervisor):
            first = await another_pid(supervisor)
            os.kill(first, signal.SIGKILL)
            second = await another_pid(supervisor, first)
            assert waits(lines) == [0.1]
            assert supervisor.state.restarts == 1
    assert not alive(second)


async def test_one_that_cannot_run_is_tried_again_ever_more_slowly(run_dir: Path) -> None:
    broken = run_dir / "envoy-binary"
    broken.write_text("#!/bin/sh\necho broken; exit 3\n")
    broken.chmod(0o755)
    supervisor = Supervisor(
        EnvoySettings(binary=broken, run_dir=run_dir, node_id="n", ads_socket=run_dir / "ads.sock")
    )
    with structlog.testing.capture_logs() as lines:
        async with running(supervisor), asyncio.timeout(60):
            while supervisor.state.restarts < 4:
                assert supervisor.state.state in ("stopped", "backoff", "starting")
                await asyncio.sleep(0.01)
    assert waits(lines)[:4] == [0.1, 0.2, 0.4, 0.8]
    assert "broken" in supervisor.log_path.read_text()


async def test_a_killed_services_envoy_is_adopted_and_one_of_another_configuration_replaced(
    run_dir: Path,
) -> None:
    # What a killed service leaves behind, a service that keeps Envoy leaves too.
    async with running(first := Supervisor(settings(run_dir, keep=True))):
        pid = await another_pid(first)
    assert alive(pid)
    async with running(second := Supervisor(settings(run_dir, keep=True))):
        assert await another_pid(second) == pid
        assert second.state.restarts == 0
        # An adopted one that ends is missed as well, though it is nobody's child here.
        os.kill(pid, signal.SIGKILL)
        pid = await another_pid(second, pid)
    assert alive(pid)
    async with running(third := Supervisor(settings(run_dir, max_connections=7, takeover_s=1.0))):
        other = await another_pid(third)
        assert other != pid
        # The old one is ended once the new one is ready, or when it takes too long: nothing is
        # ready here, for there is no control plane.
        assert alive(pid)
        with Process.find(run_dir / "envoy")[0] as old:
            assert old.pid == pid
            async with asyncio.timeout(10):
                await old.wait()
        assert alive(other)
    assert not alive(other)
    assert [p.name for p in (run_dir / "envoy").glob("bootstrap-*")] == [third._config.name]


async def test_envoys_that_are_others_are_not_found(run_dir: Path) -> None:
    async with running(supervisor := Supervisor(settings(run_dir))):
        pid = await another_pid(supervisor)
        assert Process.find(run_dir / "other") == []
        (found,) = Process.find(run_dir / "envoy")
        assert found.pid == pid
        assert abs(found.started_ns / 1e9 - time.time()) < 60
        found.close()


async def test_what_only_looks_like_our_envoy_is_left_alone(run_dir: Path) -> None:
    supervisor = Supervisor(settings(run_dir))
    # Anybody's process may say what it likes on its command line.
    words = ["sh", "--config-path", str(supervisor._config)]
    with subprocess.Popen(  # noqa: ASYNC220 - it waits for its input to end, and does nothing
        ["setpriv", "--reuid", "65533", "--clear-groups", "sh", "-c", "echo; read x; :", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as impostor:
        assert impostor.stdout is not None
        impostor.stdout.readline()  # it has its command line by now
        assert [p.pid for p in Process.find(run_dir / "envoy")] == [impostor.pid]
        async with running(supervisor):
            assert await another_pid(supervisor) != impostor.pid
            assert impostor.poll() is None
        assert impostor.poll() is None
        impostor.kill()


def test_the_user_is_never_root() -> None:
    assert account("1234") == Account(1234, 1234)
    assert account("cilia-envoy").uid in (FALLBACK_ID, account("cilia-envoy").gid)
    for name in ("root", "0", "no-such-user-here"):
        with pytest.raises(EnvoyUserInvalid):
            account(name)
