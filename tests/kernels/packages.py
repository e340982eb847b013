"""Debian's kernels, unpacked under build/kernels: fetched by apt from this machine's own mirrors.

A series is a kernel's first two numbers. Each comes from one release of Debian; where that is not
the machine's own, apt is given lists of its own under build/kernels, so the machine's configuration
is neither read for anything but the mirror nor changed.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).resolve().parents[2]
CACHE: Final = REPOSITORY / "build" / "kernels"

# The release of Debian that a series comes from.
SERIES: Final = {"5.10": "bullseye", "6.1": "bookworm", "6.12": "bookworm"}
KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


class Unavailable(Exception):
    """What is needed to boot another kernel cannot be had here; the text says why."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One unpacked kernel: `tree` is the root of its files, `release` what uname will say."""

    series: str
    package: str
    version: str
    tree: Path

    @property
    def release(self) -> str:
        return self.image.name.removeprefix("vmlinuz-")

    @property
    def image(self) -> Path:
        return next((self.tree / "boot").glob("vmlinuz-*"))

    @property
    def modules(self) -> Path:
        return next(self.tree.glob("**/lib/modules")) / self.release


def _run(*command: str, cwd: Path | None = None, timeout_s: float = 300) -> str:
    try:
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, check=True, timeout=timeout_s
        )
    except FileNotFoundError as error:
        raise Unavailable(f"needs {command[0]}") from error
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{command[0]} took more than {timeout_s:.0f} s") from error
    except subprocess.CalledProcessError as error:
        text = error.stderr.strip().splitlines() or ["said nothing"]
        raise Unavailable(f"{command[0]} failed: {text[-1]}") from error
    return done.stdout


def _sources(release: str) -> str:
    """Source lines for a release of Debian, on the mirrors that this machine has configured."""
    lines = set()
    shown = _run(
        "apt-get",
        "indextargets",
        "--format",
        "$(REPO_URI) $(RELEASE)",
        "Created-By: Packages",
        "Origin: Debian",
    )
    for line in shown.splitlines():
        uri, suite = line.split()
        if "security" in suite:
            lines.add(f"deb [signed-by={KEYRING}] {uri} {release}-security main")
        elif "-" not in suite:
            lines.add(f"deb [signed-by={KEYRING}] {uri} {release} main")
    if not lines:
        raise Unavailable("apt knows no Debian mirror on this machine")
    return "\n".join(sorted(lines)) + "\n"


def _apt(release: str) -> list[str]:
    """Options that give apt lists of its own for a release, fetched when they are a day old."""
    state = CACHE / "apt" / release
    (state / "lists/partial").mkdir(parents=True, exist_ok=True)
    (state / "archives/partial").mkdir(parents=True, exist_ok=True)
    sources = state / "sources.list"
    options = [
        f"-oDir::Etc::sourcelist={sources}",
        "-oDir::Etc::sourceparts=-",
        f"-oDir::State::lists={state / 'lists'}",
        f"-oDir::Cache={state}",
        # the cache is root's, and may lie where apt's own user cannot go
        "-oAPT::Sandbox::User=root",
        "-oAcquire::Retries=2",
        "-oAcquire::http::Timeout=30",
        "-oAPT::Update::Error-Mode=any",
    ]
    if not any((state / "lists").glob("*Packages*")):
        sources.write_text(_sources(release))
        _run("apt-get", *options, "update", "-q")
    return options


_SORT: Final = re.compile(r"\d+")


def _newest(options: list[str], series: str) -> str:
    names = _run(
        "apt-cache",
        *options,
        "search",
        "--names-only",
        rf"^linux-image-{re.escape(series)}\.[0-9].*-amd64$",
    )
    found = [
        name
        for name in (line.split()[0] for line in names.splitlines())
        if not re.search(r"-(cloud|rt)-amd64$|~bpo|dbg", name)
    ]
    if not found:
        raise Unavailable(f"Debian's mirror offers no kernel of series {series}")
    return max(found, key=lambda name: [int(number) for number in _SORT.findall(name)])


@contextmanager
def _locked() -> Iterator[None]:
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def kernel(series: str) -> Kernel:
    """The newest kernel of a series, unpacked; what an earlier call fetched is used again.

    Raises Unavailable with the reason.
    """
    if series not in SERIES:
        raise Unavailable(f"no kernel of series {series}: there are {', '.join(SERIES)}")
    with _locked():
        directory = CACHE / series
        if not (directory / "package").exists():
            _fetch(series, directory)
        package, version = (directory / "package").read_text().split()
    return Kernel(series, package, version, directory / "tree")


def _fetch(series: str, directory: Path) -> None:
    if os.uname().machine != "x86_64":
        raise Unavailable("only kernels for amd64 are known here")
    options = _apt(SERIES[series])
    package = _newest(options, series)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    _run("apt-get", *options, "download", package, cwd=directory, timeout_s=600)
    (archive,) = directory.glob("*.deb")
    tree = directory / "tree"
    _run("dpkg", "-x", str(archive), str(tree))
    version = _run("dpkg-deb", "--field", str(archive), "Version").strip()
    archive.unlink()
    unpacked = Kernel(series, package, version, tree)
    base = unpacked.modules.parents[2]
    _run("/sbin/depmod", "-b", str(base), unpacked.release)
    # last, so that an unpacking that was killed is begun anew
    (directory / "package").write_text(f"{package} {version}\n")
