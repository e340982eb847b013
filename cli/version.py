"""`cilia version`."""

from __future__ import annotations

from importlib import metadata

import click

from cli import clients, render
from cli.errors import CliError
from cli.settings import Command, Settings, pass_settings


def own_version() -> str:
    """The installed version; `unknown` in a tree that is not installed."""
    try:
        return metadata.version("cilia")
    except metadata.PackageNotFoundError:
        return "unknown (not installed)"


@click.command("version", cls=Command)
@pass_settings
def version(settings: Settings) -> None:
    """Print the version of this command and of the agent."""
    from protos.agent.v1 import agent_pb2

    agent: str | None
    try:
        reply = clients.agent(
            settings,
            lambda a: a.status.Status(agent_pb2.StatusRequest(), timeout=min(2.0, a.timeout_s)),
        )
        agent = reply.version
    except CliError:
        agent = None
    if settings.json:
        render.json({"client": own_version(), "agent": agent})
        return
    render.fields(settings, [("Client", own_version()), ("Agent", agent or "Not responding")])
