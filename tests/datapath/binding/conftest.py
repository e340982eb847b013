"""Objects compiled for the binding's tests, a bpffs of one's own, and work in a fresh namespace."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from cilia.bpf import sys


class Build(Protocol):
    """Compile the harness: build("v2", "GENERATION=2") -> object file."""

    def __call__(self, name: str, *defines: str) -> Path: ...


@pytest.fixture(scope="session")
def build(repository: Path, need_clang: None, need_bpf: None) -> Build:
    """Compile bpf/tests/binding.bpf.c in variants; a name stands for one set of definitions."""
    source = repository / "bpf/tests/binding.bpf.c"
    # a directory a process: several runs may share the tree
    directory = repository / "build/tests/binding"
    directory.mkdir(parents=True, exist_ok=True)
    done: dict[tuple[str, ...], Path] = {}

    def compile_variant(name: str, *defines: str) -> Path:
        if (path := done.get((name, *defines))) is not None:
            return path
        path = directory / f"{name}.o"
        temporary = directory / f"{name}.{os.getpid()}.tmp"
        subprocess.run(
            ["clang", "-O2", "-g", "-target", "bpf", "-mcpu=v3", "-Wall", "-Wextra", "-Werror"]
            + [f"-I/usr/include/{platform.machine()}-linux-gnu"]
            + [f"-D{define}" for define in defines]
            + ["-c", str(source), "-o", str(temporary)],
            check=True,
        )
        temporary.rename(path)
        done[name, *defines] = path
        return path

    return compile_variant


def _umount(path: Path) -> None:
    subprocess.run(["umount", "-l", str(path)], check=False, stderr=subprocess.DEVNULL)
    with contextlib.suppress(OSError):
        path.rmdir()


@pytest.fixture
def bpffs(need_bpffs: None) -> Iterator[Path]:
    """An empty bpffs, unmounted afterwards; those of runs that were killed are removed first."""
    for stale in Path("/run").glob("cilt-*-binding"):
        if not Path(f"/proc/{stale.name.split('-')[1]}").exists():
            _umount(stale)
    path = Path(f"/run/cilt-{os.getpid()}-binding")
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "bpf", "bpf", str(path)], check=True)
    try:
        yield path
    finally:
        _umount(path)


@pytest.fixture
def in_netns(need_netns: None) -> Callable[[Callable[[], None]], None]:
    """Run a function on a thread in a new namespace, loopback up, that ends with it."""

    def run(work: Callable[[], None]) -> None:
        failures: list[BaseException] = []

        def body() -> None:
            try:
                sys.unshare_net()
                subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
                work()
            except BaseException as error:  # carried to the test's own thread
                failures.append(error)

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        if failures:
            raise failures[0]

    return run
