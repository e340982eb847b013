"""`cilia status`."""

from __future__ import annotations

import time
from typing import Any

import click

from cli import clients, render, shapes
from cli.errors import Exit
from cli.settings import Command, Settings, examples, pass_settings
from protos.agent.v1 import agent_pb2

NS_PER_S = 1_000_000_000


@click.command(
    "status",
    cls=Command,
    epilog=examples("""
cilia status
cilia status --brief && echo healthy
cilia status --tables
cilia status -o json | jq .ipam
"""),
)
@click.option("--brief", is_flag=True, help="One line: OK, or the first thing that is wrong.")
@click.option("--tables", is_flag=True, help="The agent's tables, row by row, with their status.")
@click.option("--all-controllers", is_flag=True, help="Healthy controllers too.")
@pass_settings
def status(settings: Settings, brief: bool, tables: bool, all_controllers: bool) -> None:
    """Show how the agent is. Exit code 1 when it is not Ok, 3 when it does not answer."""
    request = agent_pb2.StatusRequest(
        tables=tables, all_controllers=all_controllers or settings.json
    )
    reply = clients.agent(
        settings, lambda agent: agent.status.Status(request, timeout=agent.timeout_s)
    )
    healthy = reply.state.lower() == "ok"
    if settings.json:
        render.json(shapes.status(reply))
    elif brief:
        render.line(settings, "OK" if healthy else first_trouble(reply))
    else:
        _show(settings, reply, all_controllers)
    if not healthy:
        raise SystemExit(int(Exit.FAILED))


def first_trouble(reply: agent_pb2.StatusResponse) -> str:
    """`error in <component>: <message>`: a component, else a controller, else the whole."""
    for component in reply.components:
        if component.state.lower() not in ("ok", "disabled"):
            return f"error in {component.name}: {component.message or component.state}"
    for item in reply.controllers:
        if item.consecutive_failures:
            return f"error in controller {item.name}: {item.last_error}"
    return f"error in agent: {reply.message or reply.state}"


def ago(time_ns: int, now_ns: int) -> str:
    """`3s ago`, `2m ago`, `never`."""
    if not time_ns:
        return "never"
    seconds = max(0, now_ns - time_ns) // NS_PER_S
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= size:
            return f"{seconds // size}{unit} ago"
    return f"{seconds}s ago"


def _ipam(item: agent_pb2.IpamStatus) -> str:
    text = f"{item.allocated}/{item.capacity} allocated from {item.pool}, router {item.router}"
    return f"{text}, {item.quarantined} in quarantine" if item.quarantined else text


def _show(settings: Settings, reply: agent_pb2.StatusResponse, all_controllers: bool) -> None:
    now_ns = time.time_ns()
    rows: list[tuple[str, object]] = [
        ("Cilia", f"{reply.state}   {reply.message}".rstrip()),
        ("Node", f"{reply.node} (agent {reply.version}, started {ago(reply.started_ns, now_ns)})"),
    ]
    rows += [(c.name, f"{c.state}   {c.message}".rstrip()) for c in reply.components]
    states = ", ".join(f"{n} {state}" for state, n in sorted(reply.endpoint_states.items()))
    current = "current" if reply.realised_revision >= reply.policy_revision else "behind"
    rows += [
        ("Endpoints", states or "none"),
        (
            "Policy",
            f"{render.count(reply.policies, 'document')}, revision {reply.realised_revision} of "
            f"{reply.policy_revision} realised ({current}), enforcement {reply.enforcement_mode}",
        ),
        ("Identities", reply.identities),
    ]
    if reply.ipv4.pool:
        rows.append(("IPAM IPv4", _ipam(reply.ipv4)))
    if reply.ipv6.pool:
        rows.append(("IPAM IPv6", _ipam(reply.ipv6)))
    rows.append(
        (
            "Datapath",
            f"attached by {reply.attach_mode}, devices {' '.join(reply.devices) or 'none'}",
        )
    )
    if reply.events_lost:
        rows.append(("Events lost", reply.events_lost))
    failing = [c for c in reply.controllers if c.consecutive_failures]
    if reply.controllers:
        total = len(reply.controllers)
        rows.append(("Controllers", f"{total - len(failing)}/{total} healthy"))
    render.fields(settings, rows)
    shown = list(reply.controllers) if all_controllers else failing
    if shown:
        render.line(settings, "")
        _controllers(settings, shown, now_ns)
    for item in reply.tables:
        render.line(settings, "")
        render.line(settings, (f"Table {item.name} ({len(item.rows)} rows)", "bold"))
        render.table(settings, list(item.header), [list(row.cells) for row in item.rows])


def _controllers(settings: Settings, items: list[agent_pb2.Controller], now_ns: int) -> None:
    rows: list[list[Any]] = [
        [
            c.name,
            ago(c.last_success_ns, now_ns),
            ago(c.last_failure_ns, now_ns),
            c.consecutive_failures,
            c.last_error or "no error",
        ]
        for c in sorted(items, key=lambda c: c.name)
    ]
    render.table(settings, ["CONTROLLER", "LAST SUCCESS", "LAST ERROR", "COUNT", "MESSAGE"], rows)
