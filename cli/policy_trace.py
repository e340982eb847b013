"""`cilia policy trace`: whether a connection would be allowed, and which rule decides."""

from __future__ import annotations

from typing import Any

import click

from cilia.policy import PROTO_NAMES
from cilia.policy.questions.judge import Question, ask
from cli import asked, ends, render
from cli.errors import Exit
from cli.policy import endpoints_option, namespace_option, policies_option, request_options
from cli.settings import Command, Settings, examples, pass_settings


@click.command(
    "trace",
    cls=Command,
    epilog=examples("""
cilia policy trace --src xwing --dst deathstar-1 --dport 80/tcp
cilia policy trace -s org=alliance -d org=empire,class=deathstar --dport 80/tcp
cilia policy trace --policies policies/ -s org=alliance -d class=deathstar --dport 80/tcp
cilia policy trace -s web -d db -p 80/tcp --method GET --path /public
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
    metavar="PORT[/PROTOCOL]",
    help="Destination port, for example 80/tcp; a number alone is TCP's. Without it all ports are "
    "asked about: allowed when each of them is.",
)
@request_options
@policies_option
@endpoints_option
@click.option(
    "--mode",
    "--enforcement",
    "enforcement",
    type=click.Choice(["default", "always", "never"]),
    help="Enforcement mode.  [default: the agent's; of files: default]",
)
@click.option("--exit-code", is_flag=True, help="Exit with 1 when denied.")
@namespace_option
@pass_settings
def trace(
    settings: Settings,
    src: tuple[str, ...],
    dst: tuple[str, ...],
    dport: str | None,
    method: str,
    path: str,
    host: str,
    header: tuple[str, ...],
    policies: tuple[str, ...],
    endpoints: str | None,
    enforcement: str | None,
    exit_code: bool,
    namespace: str,
) -> None:
    """Say whether a connection would be allowed, and which rule decides.

    The same engine that programs the kernel answers, on both sides: the source's egress and the
    destination's ingress. With --method, --path, --host or --header, about an HTTP request.
    `cilia why` says more about a denial.
    """
    proto, port = ends.port(dport or "0/ANY")
    request = ends.request(method, path, host, header)
    if policies or endpoints or enforcement or request:
        about = asked.load(
            settings,
            policies=policies,
            endpoints=endpoints,
            enforcement=enforcement,
            namespace=namespace,
            need_endpoints=False,
        )
        scene = about.scene()
        question = Question(
            src=ends.end(scene, src, namespace),
            dst=ends.end(scene, dst, namespace),
            proto=proto,
            port=port,
            request=request,
        )
        shape = asked.trace_shape(ask(scene, question))
    else:
        shape = _by_agent(settings, src, dst, proto, port, namespace)
    if settings.json:
        render.json(shape)
    else:
        _show_trace(settings, shape, src, dst, port, PROTO_NAMES[proto])
        if dport is None and shape["verdict"] != "allowed":
            render.warn("All ports were asked about; --dport asks about one.")
    if exit_code and shape["verdict"] != "allowed":
        raise SystemExit(int(Exit.FAILED))


def _by_agent(
    settings: Settings,
    src: tuple[str, ...],
    dst: tuple[str, ...],
    proto: int,
    port: int,
    namespace: str,
) -> dict[str, Any]:
    """The agent's answer: it knows identities by number, and what is enforced here."""
    from cli import clients, refs, shapes  # gRPC: needed only here
    from protos.agent.v1 import agent_pb2

    request = agent_pb2.TraceRequest(
        source=refs.subject(src, namespace),
        destination=refs.subject(dst, namespace),
        port=port,
        protocol=PROTO_NAMES[proto].upper(),
    )
    reply = clients.agent(
        settings, lambda agent: agent.policy.Trace(request, timeout=agent.timeout_s)
    )
    return shapes.trace(reply)


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
                    render.line(settings, f"  {word} by {asked.rule_text(rule)}")
    final = shape["verdict"].upper()
    render.line(settings, "")
    render.line(
        settings, "Final verdict: ", (final, "bold green" if final == "ALLOWED" else "bold red")
    )
