"""What a lab looks like right now, observed: processes by /proc, endpoints by the agent."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from lab import process
from lab.clients import AgentClient, EndpointInfo
from lab.errors import LabError
from lab.state import LabState, WorkloadState


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceView:
    """A service of a node: `running`, `dead`, or for the agent its own state."""

    node: str
    name: str
    pid: int
    state: str
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadView:
    """A workload, its process and its endpoint; endpoint None: the agent has none, or is away."""

    workload: WorkloadState
    process: str  # running, dead, none
    endpoint: EndpointInfo | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LabView:
    """A lab as it is."""

    lab: LabState
    services: tuple[ServiceView, ...]
    workloads: tuple[WorkloadView, ...]

    @property
    def healthy(self) -> bool:
        return (
            self.lab.ready
            and all(s.state in ("running", "Ok") for s in self.services)
            and all(
                w.process != "dead" and w.endpoint is not None and w.endpoint.state == "ready"
                for w in self.workloads
            )
        )


def view(lab: LabState) -> LabView:
    """Look at a lab."""
    return asyncio.run(_view(lab))


def _state(item: process.Process | None) -> str:
    if item is None:
        return "none"
    return "running" if process.alive(item) else "dead"


async def _view(lab: LabState) -> LabView:
    services: list[ServiceView] = []
    endpoints: dict[tuple[str, str], EndpointInfo] = {}
    for node in lab.nodes:
        identity = _state(node.identity)
        pid = node.identity.pid if node.identity else 0
        services.append(ServiceView(node=node.name, name="identity", pid=pid, state=identity))
        if node.xds_argv:
            pid = node.xds.pid if node.xds else 0
            services.append(
                ServiceView(node=node.name, name="xds", pid=pid, state=_state(node.xds))
            )
        if node.flows_argv:
            pid = node.flows.pid if node.flows else 0
            services.append(
                ServiceView(node=node.name, name="flows", pid=pid, state=_state(node.flows))
            )
        agent, message = _state(node.agent), ""
        if agent == "running":
            async with AgentClient(node.agent_socket) as client:
                try:
                    status = await client.status()
                except LabError as error:
                    status, message = None, error.message
                if message:
                    agent = "Failure"
                elif status is None:
                    agent, message = "silent", "runs, but does not answer"
                else:
                    agent, message = status.state, status.message
                    try:
                        for item in await client.endpoints():
                            endpoints[item.namespace, item.name] = item
                    except LabError as error:
                        message = str(error)
        pid = node.agent.pid if node.agent else 0
        services.append(
            ServiceView(node=node.name, name="agent", pid=pid, state=agent, message=message)
        )
    services.append(
        ServiceView(
            node="-",
            name="world",
            pid=lab.world_process.pid if lab.world_process else 0,
            state=_state(lab.world_process),
        )
    )
    return LabView(
        lab=lab,
        services=tuple(services),
        workloads=tuple(
            WorkloadView(
                workload=w,
                process=_state(w.process),
                endpoint=endpoints.get((w.namespace, w.name)),
            )
            for w in lab.workloads
        ),
    )
