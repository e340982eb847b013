"""A lab's state file: what was started and where, for `status`, `exec` and `down`.

It is a convenience, not the truth: `down` finds namespaces, mounts, cgroups and processes without
it. Written atomically after every step of `up`; a reader may meet any step.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.errors import LabError, LabNotFound
from lab.names import RUN_ROOT, Names
from lab.process import Process

VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeState:
    """A node and its services (None: not started, or not wanted)."""

    name: str
    netns: str
    run_dir: str
    bpffs: str
    cgroup: str | None
    ipv4: str
    ipv6: str
    agent: Process | None = None
    identity: Process | None = None
    xds: Process | None = None
    flows: Process | None = None
    agent_argv: tuple[str, ...] = ()
    identity_argv: tuple[str, ...] = ()
    xds_argv: tuple[str, ...] = ()
    flows_argv: tuple[str, ...] = ()

    @property
    def agent_socket(self) -> str:
        return f"{self.run_dir}/agent.sock"

    @property
    def identity_socket(self) -> str:
        return f"{self.run_dir}/identity.sock"

    @property
    def xds_socket(self) -> str:
        return f"{self.run_dir}/xds.sock"

    @property
    def flows_socket(self) -> str:
        return f"{self.run_dir}/hubble.sock"

    @property
    def processes(self) -> tuple[Process | None, ...]:
        return self.identity, self.xds, self.agent, self.flows


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadState:
    """A workload; `endpoint_id` 0: not added yet."""

    name: str
    group: str
    namespace: str
    node: str
    netns: str
    labels: tuple[str, ...]
    endpoint_id: int = 0
    identity: int = 0
    ipv4: str = ""
    ipv6: str = ""
    process: Process | None = None

    @property
    def full_name(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LabState:
    """A lab. `ready`: `up` came to its end."""

    name: str
    source: str
    boot_id: str
    ready: bool = False
    world_netns: str = ""
    world_ipv4: str = ""
    world_ipv6: str = ""
    world_process: Process | None = None
    nodes: tuple[NodeState, ...] = ()
    workloads: tuple[WorkloadState, ...] = ()

    def node(self, name: str) -> NodeState:
        """Raises LabNotFound."""
        for item in self.nodes:
            if item.name == name:
                return item
        raise LabNotFound(f"no node {name!r} in lab {self.name!r}")

    def workload(self, text: str) -> WorkloadState:
        """By `name` or `namespace/name`. Raises LabNotFound when there is none, or several."""
        namespace, _, name = text.rpartition("/")
        found = [w for w in self.workloads if w.name == name and namespace in ("", w.namespace)]
        if len(found) == 1:
            return found[0]
        names = ", ".join(w.full_name for w in self.workloads) or "none"
        if found:
            raise LabNotFound(f"{text!r} names several workloads: write namespace/name")
        group = [w.name for w in self.workloads if w.group == text]
        if group:
            raise LabNotFound(f"{text!r} has replicas: choose one of {', '.join(group)}")
        raise LabNotFound(f"no workload {text!r} in lab {self.name!r}", cure=f"There are: {names}.")


def boot_id() -> str:
    """Of this boot: pids and start times of another one mean nothing."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def write(state: LabState) -> None:
    """Replace the state file atomically."""
    path = Names(state.name).state
    part = path.with_suffix(".part")
    part.write_text(json.dumps(dataclasses.asdict(state), indent=1) + "\n")
    part.replace(path)


def read(name: str) -> LabState | None:
    """The state of a lab; None when there is none, or nothing readable."""
    try:
        return _from_json(json.loads(Names(name).state.read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _process(value: Any) -> Process | None:
    return None if value is None else Process(**value)


def _from_json(value: dict[str, Any]) -> LabState:
    nodes = tuple(
        NodeState(
            **{
                **item,
                "agent": _process(item["agent"]),
                "identity": _process(item["identity"]),
                "xds": _process(item.get("xds")),
                "flows": _process(item.get("flows")),
                "agent_argv": tuple(item["agent_argv"]),
                "identity_argv": tuple(item["identity_argv"]),
                "xds_argv": tuple(item.get("xds_argv", ())),
                "flows_argv": tuple(item.get("flows_argv", ())),
            }
        )
        for item in value["nodes"]
    )
    workloads = tuple(
        WorkloadState(
            **{**item, "labels": tuple(item["labels"]), "process": _process(item["process"])}
        )
        for item in value["workloads"]
    )
    rest = {
        **value,
        "nodes": nodes,
        "workloads": workloads,
        "world_process": _process(value["world_process"]),
    }
    return LabState(**rest)


def require(name: str) -> LabState:
    """The state of a lab. Raises LabNotFound with what is up."""
    state = read(name)
    if state is None:
        up = ", ".join(lab_names()) or "none"
        raise LabNotFound(
            f"no lab {name!r}", cure=f"Labs that are up: {up}. Start one with `cilia lab up FILE`."
        )
    return state


def lab_names() -> list[str]:
    """Names of the labs that have a directory."""
    if not RUN_ROOT.is_dir():
        return []
    return sorted(p.name for p in RUN_ROOT.iterdir() if p.is_dir())


def only_lab(agent_socket: str | None = None) -> str:
    """The lab whose agent is spoken to, or the one that is up. Raises LabNotFound.

    `agent_socket` is what the user chose for the other commands, if it was chosen: who points it at
    a lab means that lab, whatever else is up.
    """
    names = lab_names()
    if agent_socket:
        socket = Path(agent_socket)
        for name in names:
            if socket.is_relative_to(Names(name).dir):
                return name
    if len(names) == 1:
        return names[0]
    if not names:
        raise LabNotFound("no lab is up", cure="Start one with `cilia lab up FILE`.")
    raise LabNotFound(f"several labs are up: {', '.join(names)}", cure="Choose one with --lab.")


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold a lab: two `up`s or `down`s of one lab wait for nobody and are refused.

    The lock is on the lab's directory and ends with the process, so nothing is left by a SIGKILL.
    Raises LabError when it is held.
    """
    path = Names(name).dir
    while True:
        path.mkdir(parents=True, exist_ok=True, mode=0o755)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            raise LabError(
                f"another command is at work on lab {name!r}", cure="Wait for it, or end it."
            ) from error
        try:
            # A `down` may have removed the directory between our open and our lock.
            if path.exists() and path.stat().st_ino == os.fstat(fd).st_ino:
                yield
                return
        finally:
            os.close(fd)
