"""`cilia monitor`: what the kernel decided, as it decides.

A verdict line for people, after Cilium's:

    xx drop (Policy denied) 10.217.0.7:40112 -> 10.217.0.5:80 tcp SYN identity 31234(org=alliance)
       ->5123(org=empire) endpoint 5 ingress: no rule allows it; isolated by CiliumNetworkPolicy
       default/rule1 spec.ingress[0] (l3-l4.yaml:12:5)

(on one line). `-o json` prints one object a line: docs/cli.md.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import click

from cilia.errors import Kind
from cilia.rpc.errors import RpcError
from cli import clients, refs, render, shapes
from cli.settings import Command, Settings, examples, pass_settings
from protos.agent.v1 import agent_pb2

RETRY_S = 0.2

TYPES = ("drop", "trace", "verdict", "l7", "agent")


@click.command(
    "monitor",
    cls=Command,
    epilog=examples("""
cilia monitor
cilia monitor --type drop --type verdict --endpoint xwing
cilia monitor --type l7
cilia monitor -o json | jq -r 'select(.verdict=="DENIED") | .explanation'
"""),
)
@click.option(
    "-t",
    "--type",
    "types",
    multiple=True,
    type=click.Choice(TYPES),
    help="Only these, repeated. Default: all.",
)
@click.option(
    "-e",
    "--endpoint",
    "endpoint",
    multiple=True,
    metavar="REF",
    help="Only of these endpoints, repeated.",
)
@click.option("--denied", is_flag=True, help="Of the verdicts, only denials.")
@click.option("-n", "--count", type=click.IntRange(min=1), help="Stop after this many events.")
@pass_settings
def monitor(
    settings: Settings,
    types: tuple[str, ...],
    endpoint: tuple[str, ...],
    denied: bool,
    count: int | None,
) -> None:
    """Watch verdicts, drops, traces and agent events until Ctrl-C.

    Goes on when the agent was restarted; what happened meanwhile is not shown.
    """

    async def work(agent: clients.Agent) -> None:
        request = agent_pb2.MonitorRequest(types=types, verdicts_denied_only=denied)
        for text in endpoint:
            if text.isdigit():
                request.endpoint_ids.append(int(text))
            else:
                found = await agent.endpoint.Get(refs.endpoint_ref(text), timeout=agent.timeout_s)
                request.endpoint_ids.append(found.id)
        left = count
        while True:
            stream = agent.monitor.Monitor(request)
            # The agent sends its headers once subscribed: from here on nothing is missed.
            await stream.initial_metadata()
            listened = not stream.done()
            if listened:
                _say(settings, "Listening for events. Press Ctrl-C to quit.")
            try:
                async for item in stream:
                    _show(settings, shapes.event(item))
                    if left is not None:
                        left -= 1
                        if left == 0:
                            return
            except RpcError as error:
                if not listened or error.kind is not Kind.UNAVAILABLE:
                    raise
            _say(settings, "The agent went away. Waiting until it is back.")
            while not clients.answers(Path(settings.agent_socket)):  # noqa: ASYNC110  # its file tells nothing
                await asyncio.sleep(RETRY_S)

    try:
        clients.agent(settings, work)
    except KeyboardInterrupt:
        _say(settings, "\nDisconnected.")


def _say(settings: Settings, text: str) -> None:
    if not settings.json:
        render.warn(text)


def _show(settings: Settings, shape: dict[str, Any]) -> None:
    if settings.json:
        render.json_line(shape)
    else:
        render.line(settings, *event_line(shape))
        sys.stdout.flush()


def who(peer: dict[str, Any]) -> str:
    """`31234(org=alliance)`"""
    labels = shapes.short_labels(peer["labels"])
    number = peer["identity"] if peer["identity"] is not None else "?"
    return f"{number}({labels})" if labels else str(number)


def where(peer: dict[str, Any]) -> str:
    """`10.0.0.1:80`, `[fd00::1]:80`, or without a port the address."""
    address = peer["address"] or "?"
    if peer["port"] is None:
        return address
    return f"[{address}]:{peer['port']}" if ":" in address else f"{address}:{peer['port']}"


def _what(shape: dict[str, Any]) -> str:
    text = (shape["protocol"] or "").lower()
    if shape["icmp"]:
        text += f" type {shape['icmp']['type']}"
    if shape["tcp_flags"]:
        text += f" {shape['tcp_flags']}"
    return text


def why(shape: dict[str, Any]) -> str:
    """The service's explanation, with the rules that decided unless it names them itself."""
    explanation = shape["explanation"] or ""
    # The service's sentence begins with who and what, which the line has said already.
    port = shape["destination"]["port"]
    said = f" on {port}/{shape['protocol']}: "
    if port is not None and said in explanation:
        explanation = explanation.partition(said)[2]
    parts = [explanation.rstrip(".")] if explanation else []
    rules = [shape["rule"]] if shape["rule"] else shape["default_deny"]
    word = "rule" if shape["rule"] else "isolated by"
    for rule in rules:
        place = f"{rule['file']}:{rule['line']}"
        if rule["name"] not in explanation:
            parts.append(f"{word} {shapes.rule_text(rule)}")
        elif rule["file"] and rule["line"] and place not in explanation:
            parts.append(f"at {shapes.rule_place(rule)}")
    return "; ".join(parts)


def _request_line(shape: dict[str, Any], verdict: str) -> list[str | tuple[str, str]]:
    word = {"DENIED": "denied", "ERROR": "failed"}.get(verdict, "forwarded")
    style = {"DENIED": "bold red", "ERROR": "yellow"}.get(verdict, "green")
    mark = "xx" if verdict == "DENIED" else "->"
    return [
        (f"{mark} {shape['protocol'] or 'request'} {word}", style),
        f" {where(shape['source'])} -> {where(shape['destination'])}",
        f" identity {who(shape['source'])}->{who(shape['destination'])}",
        f" {shape['direction'] or ''}: {shape['explanation'] or ''}",
    ]


def event_line(shape: dict[str, Any]) -> list[str | tuple[str, str]]:
    """One event as styled parts."""
    if shape["type"] == "lost":
        return [(f"!! {shape['lost']} events lost", "yellow")]
    if shape["type"] == "agent":
        note = shape["notification"]
        body = note if isinstance(note, str) else json.dumps(note, ensure_ascii=False)
        return [(">> agent ", "cyan"), shape["explanation"] or "", " ", body if note else ""]
    verdict = (shape["verdict"] or "").upper()
    if shape["type"] == "l7":
        return _request_line(shape, verdict)
    if shape["type"] == "drop":
        head = (f"xx drop ({shape['reason'] or 'unknown'})", "bold red")
    elif verdict == "DENIED":
        head = (f"xx verdict denied ({shape['reason'] or 'Policy denied'})", "bold red")
    elif verdict == "AUDIT":
        head = ("-- verdict audit", "yellow")
    elif verdict == "REDIRECTED":
        head = ("-> verdict redirected to the proxy", "green")
    elif shape["type"] == "verdict":
        head = ("-> verdict allowed", "green")
    else:
        head = (f"-> {shape['observation_point'] or 'trace'}", "")
    parts: list[str | tuple[str, str]] = [
        head,
        f" {where(shape['source'])} -> {where(shape['destination'])} {_what(shape)}",
        f" identity {who(shape['source'])}->{who(shape['destination'])}",
    ]
    if shape["endpoint_id"]:
        parts.append(f" endpoint {shape['endpoint_id']}")
    if shape["direction"]:
        parts.append(f" {shape['direction']}")
    if shape["type"] == "trace" and shape["ct_state"]:
        parts.append(f" {shape['ct_state']}{' reply' if shape['reply'] else ''}")
    reason = why(shape)
    if reason:
        parts.append(f": {reason}")
    return parts
