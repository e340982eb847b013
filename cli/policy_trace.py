"""`cilia policy trace`: whether a connection would be allowed, and which rule decides."""

from __future__ import annotations

from typing import Any

import click

from cli import clients, offline, refs, render, shapes
from cli.errors import Exit
from cli.policy import namespace_option
from cli.settings import Command, Settings, examples, pass_settings
from protos.agent.v1 import agent_pb2


@click.command(
    "trace",
    cls=Command,
    epilog=examples("""
cilia policy trace --src xwing --dst deathstar-1 --dport 80/tcp
cilia policy trace -s org=alliance -d org=empire,class=deathstar --dport 80/tcp
cilia policy trace --policies policies/ -s org=alliance -d class=deathstar --dport 80/tcp
cilia policy trace -s identity:1234 -d 192.0.2.1 --dport 443/tcp --exit-code
"""),
)
@click.option(
    "-s",
    "--src",
    "src",
    multiple=True,
    required=True,
    metavar="SUBJECT",
    help="Who asks: labels, an endpoint, identity:N, or an address.",
)
@click.option(
    "-d", "--dst", "dst", multiple=True, required=True, metavar="SUBJECT", help="Who is asked."
)
@click.option(
    "-p",
    "--dport",
    "dport",
    default="0/ANY",
    metavar="PORT[/PROTOCOL]",
    help="Destination port, for example 80/tcp. Without it: any port at all.",
)
@click.option(
    "--policies",
    multiple=True,
    type=click.Path(),
    metavar="FILE|DIR",
    help="Ask these files instead of the agent (labels and addresses only).",
)
@click.option(
    "--mode",
    type=click.Choice(["default", "always", "never"]),
    default="default",
    help="Enforcement mode, with --policies.",
)
@click.option("--exit-code", is_flag=True, help="Exit with 1 when denied.")
@namespace_option
@pass_settings
def trace(
    settings: Settings,
    src: tuple[str, ...],
    dst: tuple[str, ...],
    dport: str,
    policies: tuple[str, ...],
    mode: offline.Mode,
    exit_code: bool,
    namespace: str,
) -> None:
    """Say whether a connection would be allowed, and which rule decides.

    The same engine that programs the kernel answers, on both sides: the source's egress and the
    destination's ingress.
    """
    port, protocol = refs.port(dport)
    if policies:
        shape = offline.trace(
            src=src,
            dst=dst,
            port=port,
            protocol=protocol,
            paths=policies,
            mode=mode,
            namespace=namespace,
        )
    else:
        request = agent_pb2.TraceRequest(
            source=refs.subject(src, namespace),
            destination=refs.subject(dst, namespace),
            port=port,
            protocol=protocol,
        )
        reply = clients.agent(
            settings, lambda agent: agent.policy.Trace(request, timeout=agent.timeout_s)
        )
        shape = shapes.trace(reply)
    if settings.json:
        render.json(shape)
    else:
        _show_trace(settings, shape, src, dst, port, protocol)
    if exit_code and shape["verdict"] != "allowed":
        raise SystemExit(int(Exit.FAILED))


def _show_trace(
    settings: Settings,
    shape: dict[str, Any],
    src: tuple[str, ...],
    dst: tuple[str, ...],
    port: int,
    protocol: str,
) -> None:
    ports = f"{port}/{protocol}" if port else protocol
    render.line(
        settings, f"Tracing From: [{', '.join(src)}] => To: [{', '.join(dst)}] Ports: [{ports}]"
    )
    for side, title in (
        ("egress", "Egress of the source"),
        ("ingress", "Ingress of the destination"),
    ):
        verdict = shape[side]
        style = "green" if verdict["verdict"] == "allowed" else "bold red"
        render.line(settings, "")
        render.line(settings, f"{title}: ", (verdict["verdict"], style))
        if verdict["reason"]:
            render.line(settings, f"  {verdict['reason']}")
        isolating = verdict["default_deny"] if verdict["verdict"] != "allowed" else []
        for word, rules in (("decided", verdict["rules"]), ("isolated", isolating)):
            for rule in rules:
                if rule["name"] not in verdict["reason"]:
                    render.line(settings, f"  {word} by {shapes.rule_text(rule)}")
    final = shape["verdict"].upper()
    render.line(settings, "")
    render.line(
        settings, "Final verdict: ", (final, "bold green" if final == "ALLOWED" else "bold red")
    )
