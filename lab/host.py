"""The machine under a lab: network namespaces, links, mounts and cgroups, made and found again.

Everything here is synchronous, idempotent where it removes, and speaks to the kernel through `ip`
(iproute2) and mount(8): at a lab's size their cost does not matter.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from lab.errors import LabError
from lab.names import NETNS_DIR, lab_of_namespace, netns_path


def run(argv: Sequence[str], *, stdin: str | None = None) -> str:
    """Run a tool. Raises LabError with what it said on stderr."""
    try:
        done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise LabError(
            f"{argv[0]} is not installed", cure="apt install iproute2 util-linux, or `make setup`"
        ) from error
    if done.returncode:
        raise LabError(f"`{' '.join(argv)}` failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def ip_batch(commands: Sequence[str]) -> None:
    """Several `ip` commands at once. Raises LabError naming the one that failed."""
    try:
        run(["ip", "-batch", "-"], stdin="\n".join(commands) + "\n")
    except LabError as error:
        raise LabError(f"{error.message}\n  in:\n    " + "\n    ".join(commands)) from error


# ---- network namespaces


def add_netns(names: Sequence[str]) -> None:
    """Create named network namespaces with their loopback up."""
    ip_batch([f"netns add {name}" for name in names])
    for name in names:
        run(["ip", "-n", name, "link", "set", "lo", "up"])


def lab_namespaces(lab: str | None = None) -> list[str]:
    """Names of the namespaces of one lab, or of all."""
    if not NETNS_DIR.is_dir():
        return []
    found = []
    for path in NETNS_DIR.iterdir():
        owner = lab_of_namespace(path.name)
        if owner is not None and lab in (None, owner):
            found.append(path.name)
    return sorted(found)


def delete_netns(name: str) -> None:
    """Remove a named namespace; absent is success."""
    path = netns_path(name)
    subprocess.run(["umount", "-l", str(path)], capture_output=True, check=False)
    path.unlink(missing_ok=True)


def netns_inode(name: str) -> int | None:
    """The namespace's inode; None when there is no namespace behind the name."""
    try:
        return netns_path(name).stat().st_ino
    except OSError:
        return None


def processes_in(inodes: set[int]) -> list[int]:
    """Pids of the processes whose network namespace is one of these."""
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            if Path(f"/proc/{entry.name}/ns/net").stat().st_ino in inodes:
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def listens(pid: int, port: int) -> bool:
    """True when a TCP socket listens on `port` in the network namespace of `pid`."""
    for name in ("tcp", "tcp6"):
        try:
            text = Path(f"/proc/{pid}/net/{name}").read_text()
        except OSError:
            continue
        for row in text.splitlines()[1:]:
            cells = row.split()
            if cells[3] == "0A" and int(cells[1].rpartition(":")[2], 16) == port:
                return True
    return False


# ---- mounts


def mounts_below(directory: Path) -> list[Path]:
    """Mount points at or below a directory, the deepest first."""
    found = []
    for row in Path("/proc/self/mountinfo").read_text().splitlines():
        point = row.split()[4].encode().decode("unicode_escape")
        if point == str(directory) or point.startswith(f"{directory}/"):
            found.append(Path(point))
    return sorted(found, key=lambda p: len(p.parts), reverse=True)


def mount_bpffs(path: Path) -> None:
    """Mount a BPF filesystem. Never under /sys, which `ip netns exec` replaces."""
    path.mkdir(parents=True, exist_ok=True)
    run(["mount", "-t", "bpf", "-o", "mode=0700", "bpf", str(path)])


def unmount(path: Path) -> None:
    """Unmount; what is not mounted is fine."""
    subprocess.run(["umount", "-l", str(path)], capture_output=True, check=False)


# ---- cgroups


def cgroup2_mount() -> Path | None:
    """Where the unified hierarchy is mounted, None when it is not."""
    for row in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = row.partition(" - ")
        if right.split()[0] == "cgroup2":
            return Path(left.split()[4])
    return None


def lab_cgroup(lab: str) -> Path | None:
    """The cgroup of a lab, whether it is there or not; None without cgroup2."""
    mount = cgroup2_mount()
    return None if mount is None else mount / "cilia-lab" / lab


def cgroup_tree(path: Path) -> Iterator[Path]:
    """A cgroup and those below it, the deepest first."""
    for child in sorted(path.iterdir()) if path.is_dir() else []:
        if child.is_dir():
            yield from cgroup_tree(child)
    if path.is_dir():
        yield path


def cgroup_pids(path: Path) -> list[int]:
    """Processes in a cgroup and below."""
    pids: list[int] = []
    for part in cgroup_tree(path):
        try:
            pids.extend(int(line) for line in (part / "cgroup.procs").read_text().split())
        except OSError:
            continue
    return [pid for pid in pids if pid]


def cgroup_kill(path: Path) -> None:
    """SIGKILL all of a cgroup at once, forks in flight too (Linux 5.14; older: see kill_all)."""
    try:
        (path / "cgroup.kill").write_text("1")
    except OSError:
        return


def remove_cgroup(path: Path) -> None:
    """Remove a cgroup and those below it; absent is success."""
    for part in cgroup_tree(path):
        try:
            part.rmdir()
        except OSError:
            continue
