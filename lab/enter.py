"""Running a command inside a lab: a workload, the world, or a node."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from cilia.errors import Kind
from lab import process, state
from lab.errors import LabError
from lab.names import netns_path
from lab.state import LabState
from lab.up import environment, place_of, world_place


def place_named(lab: LabState, text: str) -> process.Place:
    """The place of `world`, of a node, or of a workload. Raises LabNotFound."""
    if text == "world":
        return world_place(lab)
    for node in lab.nodes:
        if node.name == text:
            # In the machine's own mount namespace: a node's bpffs is seen from the node.
            return process.Place(
                netns=netns_path(node.netns), cgroup=Path(node.cgroup) if node.cgroup else None
            )
    return place_of(lab, lab.workload(text))


def node_environment(lab: LabState, text: str) -> list[tuple[str, str]]:
    """So that `cilia` run in there talks to the lab's services."""
    names = {w.name: w.node for w in lab.workloads} | {w.full_name: w.node for w in lab.workloads}
    node = lab.node(names.get(text, lab.nodes[0].name if lab.nodes else text))
    return [
        ("CILIA_AGENT_SOCK", node.agent_socket),
        ("CILIA_IDENTITY_SOCK", node.identity_socket),
        ("CILIA_XDS_SOCK", node.xds_socket),
        ("CILIA_FLOWS_SERVER", f"unix://{node.flows_socket}"),
    ]


def execute(lab: LabState, text: str, argv: Sequence[str]) -> NoReturn:
    """Become `argv` in the workload's namespaces. Raises LabError when that cannot be."""
    if os.geteuid() != 0:
        raise LabError("entering a workload needs root", cure="Run it with sudo.", kind=Kind.DENIED)
    place = place_named(lab, text)
    assert place.netns is not None
    if not place.netns.exists():
        raise LabError(
            f"the namespace of {text} is gone", cure=f"`cilia lab down {lab.name}`, then up again."
        )
    if place.cgroup is not None and not place.cgroup.is_dir():
        raise LabError(f"the cgroup of {text} is gone", cure=f"`cilia lab down {lab.name}`.")
    env = {**os.environ, **environment(), **dict(node_environment(lab, text))}
    command = process.command_line(argv, place)
    os.execve(command[0], command, process.launch_environment(env, place))


def current(name: str | None, *, agent_socket: str | None = None) -> LabState:
    """The lab named, or that of the agent's socket, or the only one. Raises LabNotFound."""
    return state.require(name if name is not None else state.only_lab(agent_socket))
