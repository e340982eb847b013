"""`cilia flows top|history|export|lost|stats`: what is kept, summed, written out, and missing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import click
from google.protobuf import json_format

from cli import flows_filter, flows_show, render
from cli.errors import CliError, Exit
from cli.flows_server import FilterCommand, Server, run, server_options, set_times, time_options
from cli.settings import Command, Settings, examples, pass_settings
from protos.flows.v1 import flows_pb2
from protos.hubble.v1 import flow_pb2, observer_pb2

COLUMNS: Final = (
    "source", "destination", "source_identity", "destination_identity", "source_ip",
    "destination_ip", "source_namespace", "destination_namespace", "port", "protocol", "verdict",
    "reason", "direction", "type", "policy", "http_method", "http_path", "http_status",
)  # fmt: skip
TOPICS: Final = {
    "pairs": ("source", "destination", "port", "protocol", "verdict"),
    "drops": ("source", "destination", "port", "protocol", "reason", "policy"),
    "ports": ("port", "protocol"),
    "sources": ("source",),
    "destinations": ("destination",),
    "policies": ("policy", "verdict"),
    "http": ("destination", "http_method", "http_path", "http_status"),
}


def _aggregate(
    settings: Settings,
    given: dict[str, Any],
    *,
    group_by: Sequence[str],
    since: str | None,
    until: str | None,
    limit: int,
    cel: Sequence[str] = (),
    only: flow_pb2.FlowFilter | None = None,
) -> None:
    request = flows_pb2.AggregateRequest(group_by=group_by, limit=limit)
    set_times(request, since, until)
    whitelist = flows_filter.build(given, cel=cel) or ([flow_pb2.FlowFilter()] if only else [])
    for item in whitelist:
        if only is not None:
            item.MergeFrom(only)
    request.whitelist.extend(whitelist)
    request.blacklist.extend(flows_filter.build(given, negated=True))
    reply = run(
        settings,
        given,
        lambda server: server.flows.Aggregate(request, timeout=server.timeout_s),
    )
    if settings.json:
        render.json(
            {
                "rows": [
                    {
                        **dict(zip(group_by, row.keys, strict=True)),
                        "flows": row.flows,
                        "bytes": row.bytes,
                        "first": flows_show.stamp(row.first, "rfc3339nano"),
                        "last": flows_show.stamp(row.last, "rfc3339nano"),
                    }
                    for row in reply.rows
                ],
                "groups": reply.groups,
                "flows": reply.flows,
                "bytes": reply.bytes,
                "scanned": reply.scanned,
            }
        )
        return
    render.table(
        settings,
        [*(name.upper().replace("_", " ") for name in group_by), "FLOWS", "BYTES", "LAST"],
        [
            [*row.keys, row.flows, row.bytes, flows_show.stamp(row.last, "short")]
            for row in reply.rows
        ],
    )
    hidden = reply.groups - len(reply.rows)
    more = f", {hidden} more rows (--limit)" if hidden else ""
    render.warn(f"{reply.flows} of {reply.scanned} flows{more}")


@click.command(
    "top",
    cls=FilterCommand,
    epilog=examples("""
cilia flows top pairs --since 5m
cilia flows top drops
cilia flows top ports --namespace lab
"""),
)
@click.argument("topic", type=click.Choice(list(TOPICS)), default="pairs")
@click.option("--limit", type=click.IntRange(min=1, max=10000), default=20, show_default=True)
@time_options
@flows_filter.options
@server_options
@pass_settings
def top(
    settings: Settings,
    /,
    topic: str,
    limit: int,
    since: str | None,
    until: str | None,
    **given: Any,
) -> None:
    """The largest sums: pairs, drops, ports, sources, destinations, policies, http."""
    only = None
    if topic == "drops":
        only = flow_pb2.FlowFilter(verdict=[flow_pb2.DROPPED])
    elif topic == "http":
        only = flow_pb2.FlowFilter(protocol=["http"])
    _aggregate(
        settings, given, group_by=TOPICS[topic], since=since, until=until, limit=limit, only=only
    )


@click.command(
    "history",
    cls=FilterCommand,
    epilog=examples("""
cilia flows history --since 1h --verdict DROPPED
cilia flows history --since 24h --group-by source,destination,port --namespace shop
"""),
)
@click.option(
    "--group-by",
    "group_by",
    default="source,destination,port,protocol,verdict",
    show_default=True,
    metavar="COLUMNS",
    help=f"Of {', '.join(COLUMNS)}.",
)
@click.option("--limit", type=click.IntRange(min=1, max=100000), default=100, show_default=True)
@click.option("--since", default="1h", show_default=True, metavar="TIME", help="From then on.")
@click.option("--until", metavar="TIME", help="Up to then.")
@flows_filter.options
@click.option("--cel-expression", "cel", multiple=True, metavar="CEL", help="Over _flow; any.")
@server_options
@pass_settings
def history(
    settings: Settings,
    /,
    group_by: str,
    limit: int,
    since: str,
    until: str | None,
    cel: tuple[str, ...],
    **given: Any,
) -> None:
    """Ask what is kept on disk and in memory, summed by columns."""
    chosen = [name.strip() for name in group_by.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in COLUMNS]
    if unknown or not chosen or len(set(chosen)) != len(chosen):
        raise CliError(
            f"--group-by {group_by}: {f'{unknown[0]} is no column' if unknown else 'each once'}",
            code=Exit.USAGE,
            hint=f"Columns are {', '.join(COLUMNS)}.",
        )
    _aggregate(settings, given, group_by=chosen, since=since, until=until, limit=limit, cel=cel)


# ---- export


@click.command(
    "export",
    cls=FilterCommand,
    epilog=examples("""
cilia flows export --since 1h --verdict DROPPED drops.jsonl
"""),
)
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path))
@time_options
@flows_filter.options
@click.option("--cel-expression", "cel", multiple=True, metavar="CEL", help="Over _flow; any.")
@click.option("--force", is_flag=True, help="Replace the file when it exists.")
@server_options
@pass_settings
def export(
    settings: Settings,
    /,
    path: Path,
    since: str | None,
    until: str | None,
    cel: tuple[str, ...],
    force: bool,
    **given: Any,
) -> None:
    """Write flows to a file of JSON lines, in the format of Hubble's exporter."""
    if path.exists() and not force:
        raise CliError(f"{path} exists", code=Exit.CONFLICT, hint="Replace it with --force.")
    request = observer_pb2.GetFlowsRequest(number=(1 << 64) - 1)
    set_times(request, since, until)
    request.whitelist.extend(flows_filter.build(given, cel=cel))
    request.blacklist.extend(flows_filter.build(given, negated=True))
    partial = path.with_name(f".{path.name}.partial")
    count = 0

    async def work(server: Server) -> None:
        nonlocal count
        with partial.open("w", encoding="utf-8") as out:
            async for response in server.observer.GetFlows(request):
                text = json_format.MessageToJson(
                    response, preserving_proto_field_name=True, indent=None
                )
                out.write(text + "\n")
                count += response.HasField("flow")
                if count % 1000 == 0:
                    render.progress(f"{count} flows")

    try:
        run(settings, given, work)
        partial.replace(path)
    except OSError as error:
        raise CliError(f"cannot write {path}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)
        render.progress("")
    if settings.json:
        render.json({"path": str(path), "flows": count})
    else:
        render.warn(f"{count} flows in {path}")


# ---- what is kept and what is not


@click.command("lost", cls=Command, epilog=examples("cilia flows lost --since 1h"))
@time_options
@server_options
@pass_settings
def lost(settings: Settings, /, since: str | None, until: str | None, **given: Any) -> None:
    """Every known gap: from when to when, how many events, and why."""
    request = flows_pb2.LossesRequest()
    set_times(request, since, until)
    reply = run(
        settings, given, lambda server: server.flows.Losses(request, timeout=server.timeout_s)
    )
    if settings.json:
        render.json(
            {
                "watching": reply.watching,
                "forgotten": reply.forgotten,
                "losses": [
                    {
                        "from": flows_show.stamp(getattr(item, "from"), "rfc3339nano"),
                        "to": flows_show.stamp(item.to, "rfc3339nano"),
                        "count": None if item.unknown_count else item.count,
                        "cause": item.cause,
                        "detail": item.detail or None,
                    }
                    for item in reply.losses
                ],
            }
        )
        return
    if reply.losses:
        render.table(
            settings,
            ["FROM", "TO", "EVENTS", "CAUSE", "DETAIL"],
            [
                [
                    flows_show.stamp(getattr(item, "from"), "short"),
                    flows_show.stamp(item.to, "short"),
                    "unknown" if item.unknown_count else item.count,
                    item.cause,
                    item.detail,
                ]
                for item in reply.losses
            ],
        )
    now_text = "The agent is heard." if reply.watching else "The agent is not heard now."
    render.warn(f"{render.count(len(reply.losses), 'gap')}. {now_text}")


@click.command("stats", cls=Command, epilog=examples("cilia flows stats -o json"))
@server_options
@pass_settings
def stats(settings: Settings, /, **given: Any) -> None:
    """How much is kept, seen and lost, and whether the agent is heard."""
    reply = run(
        settings,
        given,
        lambda server: server.flows.Stats(flows_pb2.StatsRequest(), timeout=server.timeout_s),
    )
    if settings.json:
        render.json(
            {
                "version": reply.version,
                "node": reply.node,
                "uptime_s": reply.uptime_ns / 1e9,
                "watching": reply.watching,
                "message": reply.message or None,
                "seen": reply.seen,
                "rate_per_s": reply.rate_per_s,
                "clients": reply.clients,
                "followers": reply.followers,
                "memory": _store(reply.memory),
                "disk": _store(reply.disk) if reply.disk.capacity else None,
                "lost": dict(sorted(reply.lost.items())),
            }
        )
        return
    lost_text = ", ".join(f"{cause} {n}" for cause, n in sorted(reply.lost.items()) if n)
    disk = reply.disk
    render.fields(
        settings,
        [
            ("Node", reply.node),
            ("Watching", "yes" if reply.watching else "no"),
            *([("Message", reply.message)] if reply.message else []),
            ("Seen", f"{reply.seen} flows, {reply.rate_per_s:.1f}/s in the last minute"),
            ("In memory", f"{reply.memory.flows} of {reply.memory.capacity} flows"),
            (
                "On disk",
                f"{disk.flows} flows in {render.count(disk.files, 'file')}, {disk.bytes} bytes"
                if disk.capacity
                else "not kept",
            ),
            ("Lost", lost_text or "nothing"),
            ("Clients", f"{reply.clients}, {reply.followers} following"),
        ],
    )


def _store(item: flows_pb2.Store) -> dict[str, Any]:
    return {
        "flows": item.flows,
        "capacity": item.capacity,
        "bytes": item.bytes,
        "files": item.files,
        "damaged_files": item.damaged_files,
        "oldest": flows_show.stamp(item.oldest, "rfc3339nano") if item.flows else None,
        "newest": flows_show.stamp(item.newest, "rfc3339nano") if item.flows else None,
    }
