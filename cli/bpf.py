"""`cilia bpf`: what the kernel holds, and what it can do."""

from __future__ import annotations

import os
from collections.abc import AsyncIterable, Callable
from typing import Any, TypeVar

import click

from cli import clients, refs, render, shapes
from cli.errors import CliError, Exit
from cli.settings import Group, Settings, examples, pass_settings
from protos.agent.v1 import agent_pb2

R = TypeVar("R")

limit_option = click.option(
    "--limit",
    type=click.IntRange(min=0),
    default=0,
    help="At most this many rows (0: all). A dump ends even while the map changes.",
)


@click.group(cls=Group)
def bpf() -> None:
    """What the kernel holds: decoded dumps of the maps, and the kernel's features."""


@bpf.group("policy", cls=Group)
def policy() -> None:
    """Policy maps."""


@bpf.group("ct", cls=Group)
def ct() -> None:
    """Tracked connections."""


@bpf.group("ipcache", cls=Group)
def ipcache() -> None:
    """Addresses and prefixes, and the identity behind each."""


@bpf.group("endpoint", cls=Group)
def endpoint() -> None:
    """The endpoint map."""


@bpf.group("metrics", cls=Group)
def metrics() -> None:
    """Packets and bytes by reason."""


async def _gather(
    stream: AsyncIterable[Any], shape: Callable[[Any], dict[str, Any]]
) -> tuple[list[dict[str, Any]], bool]:
    rows: list[dict[str, Any]] = []
    truncated = False
    async for chunk in stream:
        rows.extend(shape(row) for row in chunk.rows)
        truncated = truncated or bool(getattr(chunk, "truncated", False))
    return rows, truncated


def _dump(
    settings: Settings,
    call: Callable[[clients.Agent], AsyncIterable[Any]],
    shape: Callable[[Any], dict[str, Any]],
    header: list[str],
    cells: Callable[[dict[str, Any]], list[object]],
    *,
    key: Callable[[dict[str, Any]], Any] | None = None,
    empty: str = "No entries found.",
) -> None:
    async def work(agent: clients.Agent) -> tuple[list[dict[str, Any]], bool]:
        return await _gather(call(agent), shape)

    rows, truncated = clients.agent(settings, work)
    if key is not None:
        rows.sort(key=key)
    if settings.json:
        render.json(rows)
    elif rows:
        render.table(settings, header, [cells(row) for row in rows])
    else:
        render.warn(empty)
    if truncated:
        render.warn("Not all of it: the map changed faster than it could be read, or --limit.")


def _port(row: dict[str, Any]) -> str:
    if row["port"] is None:
        return row["protocol"] or "ANY"
    ports = str(row["port"])
    if row["end_port"] not in (None, row["port"]):
        ports += f"-{row['end_port']}"
    return f"{ports}/{row['protocol']}"


def _policy_cells(row: dict[str, Any]) -> list[object]:
    rule = row["rule"]
    return [
        row["slot"],
        row["direction"],
        "deny" if row["deny"] else "allow",
        row["identity"] if row["identity"] is not None else "ANY",
        shapes.short_labels(row["labels"]) or "-",
        _port(row),
        row["proxy_port"] or "NONE",
        row["hits"],
        shapes.rule_text(rule) if rule else "-",
    ]


@policy.command(
    "list",
    epilog=examples("""
cilia bpf policy list
cilia bpf policy list deathstar-1
"""),
)
@click.argument("ref", required=False, metavar="[ENDPOINT]")
@limit_option
@pass_settings
def policy_list(settings: Settings, ref: str | None, limit: int) -> None:
    """Show policy maps: of one endpoint, or all."""
    request = agent_pb2.DumpPolicyRequest(limit=limit)
    if ref is not None:
        request.ref.CopyFrom(refs.endpoint_ref(ref))
    _dump(
        settings,
        lambda agent: agent.datapath.DumpPolicy(request, timeout=agent.timeout_s),
        shapes.policy_row,
        [
            "SLOT",
            "DIRECTION",
            "VERDICT",
            "IDENTITY",
            "LABELS",
            "PORT/PROTO",
            "PROXY PORT",
            "HITS",
            "RULE",
        ],
        _policy_cells,
        key=lambda r: (
            r["slot"],
            r["direction"],
            r["identity"] or 0,
            r["protocol"],
            r["port"] or 0,
        ),
        empty="No entries found. Is enforcement off for this endpoint? See `cilia endpoint list`.",
    )


def _endpoint_port(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


@ct.command("list")
@limit_option
@pass_settings
def ct_list(settings: Settings, limit: int) -> None:
    """Show tracked connections."""
    request = agent_pb2.DumpRequest(limit=limit)
    _dump(
        settings,
        lambda agent: agent.datapath.DumpConntrack(request, timeout=agent.timeout_s),
        shapes.conntrack_row,
        [
            "PROTO",
            "SOURCE",
            "DESTINATION",
            "IDENTITIES",
            "EXPIRES",
            "OUT PKTS",
            "OUT BYTES",
            "BACK PKTS",
            "BACK BYTES",
            "FLAGS",
            "NAT",
        ],
        lambda r: [
            r["protocol"],
            _endpoint_port(r["source"], r["source_port"]),
            _endpoint_port(r["destination"], r["destination_port"]),
            f"{r['source_identity'] or '-'}->{r['destination_identity'] or '-'}",
            f"{r['expires_in_s']}s",
            r["packets_out"],
            r["bytes_out"],
            r["packets_back"],
            r["bytes_back"],
            " ".join(r["flags"]) or "-",
            r["nat"] or "-",
        ],
    )


@ipcache.command("list")
@limit_option
@pass_settings
def ipcache_list(settings: Settings, limit: int) -> None:
    """Show which identity each address or prefix has."""
    request = agent_pb2.DumpRequest(limit=limit)
    _dump(
        settings,
        lambda agent: agent.datapath.DumpIpcache(request, timeout=agent.timeout_s),
        shapes.ipcache_row,
        ["IP PREFIX/ADDRESS", "IDENTITY", "LABELS", "TUNNEL"],
        lambda r: [
            r["prefix"],
            r["identity"],
            shapes.short_labels(r["labels"]) or "-",
            r["tunnel"] or "-",
        ],
        key=lambda r: (":" in r["prefix"], r["prefix"]),
    )


@endpoint.command("list")
@limit_option
@pass_settings
def endpoint_list(settings: Settings, limit: int) -> None:
    """Show the endpoint map: address to interface, identity and policy."""
    request = agent_pb2.DumpRequest(limit=limit)
    _dump(
        settings,
        lambda agent: agent.datapath.DumpEndpoints(request, timeout=agent.timeout_s),
        shapes.endpoint_row,
        [
            "IP ADDRESS",
            "ID",
            "IDENTITY",
            "IFINDEX",
            "POLICY SLOT",
            "POLICY REV",
            "MAC",
            "NODE MAC",
            "FLAGS",
        ],
        lambda r: [
            r["address"],
            r["id"],
            r["identity"],
            r["ifindex"],
            r["policy_slot"],
            r["policy_revision"],
            r["mac"],
            r["node_mac"],
            " ".join(r["flags"]) or "-",
        ],
        key=lambda r: (":" in r["address"], r["id"]),
    )


@metrics.command("list")
@pass_settings
def metrics_list(settings: Settings) -> None:
    """Show packets and bytes by reason and direction."""
    reply = clients.agent(
        settings,
        lambda agent: agent.datapath.Metrics(agent_pb2.MetricsRequest(), timeout=agent.timeout_s),
    )
    rows = sorted(
        map(shapes.metric_row, reply.rows), key=lambda r: (r["reason_text"], r["direction"])
    )
    if settings.json:
        render.json({"metrics": rows, "events_lost": reply.events_lost})
        return
    render.table(
        settings,
        ["REASON", "CODE", "DIRECTION", "PACKETS", "BYTES"],
        [[r["reason_text"], r["reason"], r["direction"], r["packets"], r["bytes"]] for r in rows],
    )
    if reply.events_lost:
        render.warn(f"{reply.events_lost} events lost: the ring buffer was full")


@bpf.command(
    "probe",
    epilog=examples("""
cilia bpf probe
cilia bpf probe -o json | jq '.[] | select(.present | not)'
"""),
)
@pass_settings
def probe(settings: Settings) -> None:
    """Show which kernel features are there. Needs no agent, but root.

    Exit code 1 when a required one is missing.
    """
    try:
        from cilia.bpf import probe as kernel

        features = list(kernel.features())
    except PermissionError as error:
        raise CliError(f"probing needs root: {error}", code=Exit.PERMISSION) from error
    except OSError as error:
        raise CliError(
            f"cannot probe: {error}",
            hint="libbpf is needed: apt install libbpf1 (or `make setup`).",
        ) from error
    missing = [f for f in features if f.required and not f.present]
    if settings.json:
        render.json(
            [
                {
                    "name": f.name,
                    "present": f.present,
                    "required": f.required,
                    "detail": f.detail,
                    "effect": f.effect,
                }
                for f in features
            ]
        )
    else:
        render.table(
            settings,
            ["FEATURE", "PRESENT", "REQUIRED", "DETAIL", "WITHOUT IT"],
            [
                [
                    f.name,
                    "yes" if f.present else ("missing" if f.required else "no"),
                    "yes" if f.required else "-",
                    f.detail,
                    "" if f.present else f.effect,
                ]
                for f in features
            ],
        )
    if missing and os.geteuid() != 0:
        raise CliError(
            "probing needs root: without it everything is refused, and nothing is learned",
            code=Exit.PERMISSION,
            hint="Run it with sudo.",
        )
    if missing:
        raise CliError("this kernel lacks: " + ", ".join(f.name for f in missing))
