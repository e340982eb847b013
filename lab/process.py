"""Processes of a lab: started in their namespaces and cgroup, known by pid and start time.

A pid alone is never killed: the kernel gives it out again. A process is the pair (pid, start time
in clock ticks since boot, /proc/<pid>/stat field 22).
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TAIL_WIDTH = 400  # characters of a log line shown in an error

# $1 cgroup or empty, $2 network namespace or empty, $3 hosts file or empty, $4 resolver file; then
# the command. The shell puts itself into the cgroup before anything else, so a lab killed at any
# point leaves no process that the cgroup does not know. Every step is an exec: the pid stays.
_LAUNCH = r"""
set -e
cgroup=$1 netns=$2 hosts=$3 resolv=$4
shift 4
[ -z "$cgroup" ] || echo $$ > "$cgroup/cgroup.procs"
if [ -n "$hosts" ]; then
    set -- unshare --mount --propagation slave \
        /bin/sh -c "$CILIA_LAB_PRIVATE" sh "$hosts" "$resolv" "$@"
fi
[ -z "$netns" ] || set -- nsenter --net="$netns" -- "$@"
exec "$@"
"""

# In the workload's private mount namespace: its names, and no copies of mounts that would keep
# other namespaces' and labs' objects alive after they are gone from the machine.
_PRIVATE = r"""
hosts=$1 resolv=$2
shift 2
for point in $(while read -r _ _ _ _ point _; do
    case $point in /run/netns/*|/run/cilia*/*|/run/cilt-*) echo "$point";; esac
done < /proc/self/mountinfo); do umount -l "$point" 2>/dev/null || true; done
[ ! -e /etc/hosts ] || mount --bind "$hosts" /etc/hosts
[ ! -e /etc/resolv.conf ] || mount --bind "$resolv" /etc/resolv.conf
unset CILIA_LAB_PRIVATE
exec "$@"
"""


@dataclass(frozen=True, slots=True)
class Process:
    """A process that was started, as the state file keeps it."""

    name: str
    pid: int
    start_ticks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a process runs. `hosts` set: in a mount namespace of its own with these files."""

    netns: Path | None = None
    cgroup: Path | None = None
    hosts: Path | None = None
    resolv: Path | None = None


def command_line(argv: Sequence[str], place: Place) -> list[str]:
    """The command that becomes `argv` in its place."""
    return [
        "/bin/sh", "-c", _LAUNCH, "sh",
        str(place.cgroup or ""), str(place.netns or ""), str(place.hosts or ""),
        str(place.resolv or ""), *argv,
    ]  # fmt: skip


def launch_environment(env: Mapping[str, str], place: Place) -> dict[str, str]:
    """The process's environment, with what command_line() needs."""
    return {**env, "CILIA_LAB_PRIVATE": _PRIVATE} if place.hosts is not None else dict(env)


def spawn(
    name: str, argv: Sequence[str], *, place: Place, env: Mapping[str, str], log: Path
) -> Process:
    """Start a process in a session of its own, its output appended to `log`."""
    with log.open("ab") as out:
        child = subprocess.Popen(
            command_line(argv, place),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=launch_environment(env, place),
            cwd="/",
            start_new_session=True,
        )
    _children[child.pid] = child
    return Process(name=name, pid=child.pid, start_ticks=start_ticks(child.pid) or 0)


# Children of this very process: they must be reaped, or they stay as zombies while we live.
_children: dict[int, subprocess.Popen[bytes]] = {}


def reap() -> None:
    """Collect those of our children that ended."""
    for pid in [pid for pid, child in _children.items() if child.poll() is not None]:
        del _children[pid]


def start_ticks(pid: int) -> int | None:
    """Start time of a process, None when there is none or it is a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command, field 2, is in brackets and may hold anything, brackets too.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])


def alive(process: Process) -> bool:
    """True when exactly this process still runs."""
    return start_ticks(process.pid) == process.start_ticks


def send(process: Process, number: signal.Signals) -> bool:
    """Signal exactly this process. False when it is gone; a recycled pid is never hit."""
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        # The descriptor pins the process, so after this check it cannot become another one.
        if start_ticks(process.pid) != process.start_ticks:
            return False
        signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(fd)
    return True


def wait_gone(process: Process, timeout_s: float) -> bool:
    """Wait until exactly this process has ended; False when it has not in time."""
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if start_ticks(process.pid) == process.start_ticks:
            poll.poll(timeout_s * 1000)
    finally:
        os.close(fd)
    reap()
    return not alive(process)


def kill_all(pids: Iterable[int], *, timeout_s: float) -> list[int]:
    """SIGKILL processes and wait until they are gone; returns those that are not.

    The caller vouches for the pids: members of the lab's cgroup or namespaces, read just now.
    """
    waiting: dict[int, int] = {}
    for pid in pids:
        if pid == os.getpid():
            continue
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        waiting[fd] = pid
        try:
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        except ProcessLookupError:
            continue
    poll = select.poll()
    for fd in waiting:
        poll.register(fd, select.POLLIN)
    deadline = time.monotonic() + timeout_s
    while waiting:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        for fd, _ in poll.poll(left * 1000):
            poll.unregister(fd)
            del waiting[fd]
            os.close(fd)
    for fd in waiting:
        os.close(fd)
    reap()
    return list(waiting.values())


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log, for an error message."""
    try:
        text = log.read_text(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(line[:TAIL_WIDTH] for line in text.splitlines()[-lines:])
