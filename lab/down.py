"""Unmaking a lab, from whatever is left of it.

Order: processes first (a program in a namespace keeps the namespace), then mounts, namespaces
(their links, addresses, tc and nft go with them), cgroups, and last the directory. Each step starts
from what is there now, so it can be repeated and can begin after any crash.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from cilia.errors import Kind
from lab import host, process, state
from lab.errors import LabError
from lab.names import RUN_ROOT, Names, lab_of_namespace

KILL_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Removed:
    """What a `down` removed, for people and for `lab status`."""

    lab: str
    processes: int
    namespaces: int
    mounts: int
    cgroups: int

    @property
    def anything(self) -> bool:
        return bool(self.processes or self.namespaces or self.mounts or self.cgroups)


def labs() -> list[str]:
    """Every lab that has anything left: a directory, a namespace, a mount or a cgroup."""
    found = set(state.lab_names())
    found |= {lab for lab in map(lab_of_namespace, host.lab_namespaces()) if lab is not None}
    for point in host.mounts_below(RUN_ROOT):
        parts = point.relative_to(RUN_ROOT).parts
        if parts:
            found.add(parts[0])
    mount = host.cgroup2_mount()
    if mount is not None and (mount / "cilia-lab").is_dir():
        found |= {p.name for p in (mount / "cilia-lab").iterdir() if p.is_dir()}
    return sorted(found)


def down(lab: str) -> Removed:
    """Remove a lab. Nothing there is success. Raises LabError when something will not go."""
    if os.geteuid() != 0:  # half of it might go, and the rest stay without what holds it together
        raise LabError("removing a lab needs root", cure="Run it with sudo.", kind=Kind.DENIED)
    with state.locked(lab):
        return clear(lab)


def clear(lab: str, *, keep_dir: bool = False) -> Removed:
    """`down` for one who holds the lock. The directory goes last, and the lock with it.

    `keep_dir`: for `up`, which goes on holding the lock: the directory stays, empty.
    """
    names = Names(lab)
    cgroup = host.lab_cgroup(lab)
    namespaces = host.lab_namespaces(lab)
    processes = 0
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while True:
        # Again until nothing is left: what is killed may have been starting something.
        pids = _pids(lab, namespaces)
        if not pids:
            break
        if cgroup is not None:
            host.cgroup_kill(cgroup)
        left = process.kill_all(pids, timeout_s=max(0.1, deadline - time.monotonic()))
        processes += len(pids) - len(left)
        if left and time.monotonic() > deadline:
            raise LabError(
                f"lab {lab!r}: processes {left} do not die",
                cure="See `ps -o pid,stat,wchan,args -p PID`; then `cilia lab down` again.",
            )
    mounts = host.mounts_below(names.dir)
    for point in mounts:
        host.unmount(point)
    for name in namespaces:
        host.delete_netns(name)
    cgroups = 0
    if cgroup is not None:
        cgroups = len(list(host.cgroup_tree(cgroup)))
        host.remove_cgroup(cgroup)
        if cgroup.parent.is_dir():
            _rmdir(cgroup.parent)
    if keep_dir:
        for path in names.dir.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    else:
        shutil.rmtree(names.dir, ignore_errors=True)
        _rmdir(RUN_ROOT)
    return Removed(
        lab=lab,
        processes=processes,
        namespaces=len(namespaces),
        mounts=len(mounts),
        cgroups=cgroups,
    )


def _rmdir(path: Path) -> None:
    try:
        path.rmdir()
    except OSError:
        return  # another lab is in it


def _pids(lab: str, namespaces: list[str]) -> set[int]:
    pids: set[int] = set()
    cgroup = host.lab_cgroup(lab)
    if cgroup is not None:
        pids.update(host.cgroup_pids(cgroup))
    inodes = {i for i in map(host.netns_inode, namespaces) if i is not None}
    if inodes:
        pids.update(host.processes_in(inodes))
    recorded = state.read(lab)
    if recorded is not None and recorded.boot_id == state.boot_id():
        known = [recorded.world_process]
        known += [p for node in recorded.nodes for p in node.processes]
        known += [w.process for w in recorded.workloads]
        pids.update(p.pid for p in known if p is not None and process.alive(p))
    pids = {pid for pid in pids if process.start_ticks(pid) is not None}
    pids.discard(os.getpid())
    return pids
