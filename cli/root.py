"""The command tree: global options, and where each noun lives."""

from __future__ import annotations

import sys

import click
from click.core import ParameterSource

from cli.settings import (
    LazyGroup,
    Settings,
    default_agent_socket,
    default_identity_socket,
    default_xds_socket,
    examples,
    socket_path,
)

NOUNS = {
    "status": ("cli.status:status", "How the agent, its endpoints and controllers are."),
    "endpoint": ("cli.endpoint:endpoint", "Workloads under policy: list, add, delete, explain."),
    "identity": ("cli.identity:identity", "Identities and the labels that make them."),
    "policy": ("cli.policy:policy", "Apply, delete, validate and trace policies."),
    "why": ("cli.why:why", "Why a connection is denied, and the smallest edit that allows it."),
    "bpf": ("cli.bpf:bpf", "What the kernel holds: policy, ct, ipcache, endpoint, metrics."),
    "monitor": ("cli.monitor:monitor", "Watch verdicts, drops and agent events as they happen."),
    "flows": ("cli.flows:flows", "Flows, live and past: observe, top, history, export, lost."),
    "lab": ("cli.lab:lab", "A node with workloads on this machine, from a YAML file."),
    "redirect": ("cli.xds:redirect", "Redirects to the proxy: rules, requests, denials."),
    "xds": ("cli.xds:xds", "The xDS service: clients, versions, refusals and their reasons."),
    "cert": ("cli.cert:cert", "Certificates of mutual TLS: init, issue, rotate, list."),
    "store": ("cli.store:store", "The cluster state store: status, backup, restore."),
    "cleanup": ("cli.cleanup:cleanup", "Remove every trace of Cilia from this host."),
    "completion": ("cli.completion:completion", "Shell completion for bash, zsh and fish."),
    "version": ("cli.version:version", "Version of this command and of the agent."),
}

EPILOG = """
cilia lab up examples/lab/star-wars.yaml
cilia endpoint add --netns web1 --name web -l app=web
cilia policy apply examples/policies/star-wars/l3-l4.yaml --wait
cilia monitor --type drop

Exit codes: 0 ok, 1 failed or not healthy, 2 usage, 3 service unreachable, 4 invalid input,
5 not found, 6 conflict, 7 timeout, 8 permission. See docs/cli.md.
"""


@click.group(
    cls=LazyGroup,
    lazy=NOUNS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=examples(EPILOG),
)
@click.option(
    "--agent-socket",
    envvar="CILIA_AGENT_SOCK",
    default=default_agent_socket,
    help="The agent's unix socket (or CILIA_AGENT_SOCK).  [default: /run/cilia/agent.sock]",
)
@click.option(
    "--identity-socket",
    envvar="CILIA_IDENTITY_SOCK",
    default=default_identity_socket,
    help="The identity service's unix socket (or CILIA_IDENTITY_SOCK).  "
    "[default: /run/cilia/identity.sock]",
)
@click.option(
    "--xds-socket",
    envvar="CILIA_XDS_SOCK",
    default=default_xds_socket,
    help="The xDS service's unix socket (or CILIA_XDS_SOCK).  [default: /run/cilia/xds.sock]",
)
@click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json"]),
    default="table",
    help="Table for people (the default) or JSON for programs.",
)
@click.option("--no-color", is_flag=True, envvar="NO_COLOR", help="No colours, even on a terminal.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0.1),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long a call may take. Streams (monitor) have no limit.",
)
@click.pass_context
def cli(
    ctx: click.Context,
    agent_socket: str,
    identity_socket: str,
    xds_socket: str,
    output: str,
    no_color: bool,
    timeout: float,
) -> None:
    """Identity-based networking and policy, enforced in the kernel by eBPF."""
    ctx.obj = Settings(
        agent_socket=socket_path(agent_socket),
        identity_socket=socket_path(identity_socket),
        xds_socket=socket_path(xds_socket),
        output=output,
        color=not no_color and sys.stdout.isatty(),
        timeout_s=timeout,
        timeout_given=ctx.get_parameter_source("timeout") is not ParameterSource.DEFAULT,
    )
