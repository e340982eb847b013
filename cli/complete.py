"""What the shell offers while a name is typed: endpoints and labs as they are right now.

A completion must never hang or complain: no answer in time is no offer.
"""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem

from cli.errors import CliError
from cli.settings import Settings, default_agent_socket, default_identity_socket

ANSWER_S = 1.0


def endpoints(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of the agent's endpoints, with their labels as help."""
    from cli import clients, shapes
    from protos.agent.v1 import agent_pb2

    given = ctx.find_root().params
    settings = Settings(
        agent_socket=given.get("agent_socket") or default_agent_socket(),
        identity_socket=default_identity_socket(),
        timeout_s=ANSWER_S,
    )
    try:
        reply = clients.agent(
            settings, lambda a: a.endpoint.List(agent_pb2.ListEndpointsRequest(), timeout=ANSWER_S)
        )
    except CliError:
        return []
    offered = []
    for item in reply.endpoints:
        name = item.name if item.namespace == "default" else f"{item.namespace}/{item.name}"
        if name.startswith(incomplete):
            help_ = shapes.short_labels(shapes.labels(item.labels))
            offered.append(CompletionItem(name, help=help_))
    return offered


def labs(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of the labs that are up."""
    from lab import state

    return [CompletionItem(name) for name in state.lab_names() if name.startswith(incomplete)]


def workloads(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Workloads, nodes and the world of the lab chosen, or of the only one."""
    from cilia.errors import DomainError
    from lab import enter

    try:
        lab = enter.current(ctx.params.get("lab_name"))
    except DomainError:
        return []
    names = [w.name for w in lab.workloads] + [n.name for n in lab.nodes] + ["world"]
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]
