"""`cilia flows`: what passed and what did not, live and from the past.

`observe` speaks Hubble's API, so it works with any server of it (`--server`): the flow service of a
node, or a relay before many.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Final

import click
import grpc
import grpc.aio
from google.protobuf import json_format

from cli import flows_filter, flows_show, render
from cli.errors import CliError, Exit
from cli.flows_server import FilterCommand, Server, run, server_options, set_times, time_options
from cli.flows_store import export, history, lost, stats, top
from cli.settings import Group, Settings, examples, pass_settings
from protos.hubble.v1 import observer_pb2, relay_pb2

DEFAULT_NUMBER: Final = 20
# What the formats for people show; the server need not send the rest.
MASK: Final = (
    "time", "verdict", "IP", "l4", "source.identity", "source.namespace", "source.pod_name",
    "destination.identity", "destination.namespace", "destination.pod_name", "Type", "node_name",
    "l7", "event_type", "is_reply", "Summary", "source_names", "destination_names",
    "traffic_direction", "policy_match_type", "drop_reason_desc", "egress_allowed_by",
    "ingress_allowed_by", "egress_denied_by", "ingress_denied_by", "policy_log",
)  # fmt: skip


@click.group(cls=Group)
def flows() -> None:
    """Flows: who spoke to whom, what became of it, and which rule decided."""


# ---- observe


@flows.command(
    "observe",
    cls=FilterCommand,
    epilog=examples("""
cilia flows observe --verdict DROPPED -f
cilia flows observe --pod lab/xwing --to-port 80 --since 5m
cilia flows observe --not --verdict FORWARDED --last 100 -o jsonpb
cilia flows observe --http-path '/v1/.*' --http-status 4+ -o table
""")
    + "\n\nEvery two-sided filter has --from- and --to- forms, and --not before it negates one.",
)
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes.")
@click.option(
    "--last", "last", type=click.IntRange(min=0), help="The newest so many. [default: 20]"
)
@click.option("--first", "first", type=click.IntRange(min=1), help="The oldest so many.")
@click.option("--all", "everything", is_flag=True, help="All that is kept.")
@time_options
@flows_filter.options
@click.option(
    "--cel-expression",
    "cel",
    multiple=True,
    metavar="CEL",
    help="A CEL expression over _flow; of several, any.",
)
@click.option("--field-mask", "mask", metavar="PATHS", help="Fields to send, with -o json.")
@click.option("--print-node-name", "node", is_flag=True, help="Show which node saw it.")
@click.option(
    "--time-format",
    default="short",
    show_default=True,
    type=click.Choice(["short", "rfc3339milli", "rfc3339nano", "unix"]),
)
@click.option(
    "--print-raw-filters", "raw", is_flag=True, help="Print the filters as sent, and stop."
)
@click.option(
    "-o",
    "--output",
    "output",
    default=None,
    type=click.Choice(["compact", "dict", "table", "json", "jsonpb"]),
    help="A line, a block or a row for people; JSON lines for programs. [compact]",
)
@server_options
@pass_settings
def observe(
    settings: Settings,
    /,
    follow: bool,
    last: int | None,
    first: int | None,
    everything: bool,
    since: str | None,
    until: str | None,
    cel: tuple[str, ...],
    mask: str | None,
    node: bool,
    time_format: str,
    raw: bool,
    output: str | None,
    **given: Any,
) -> None:
    """Show flows, the newest or those that come. JSON: Hubble's, one response a line."""
    output = output or ("jsonpb" if settings.json else "compact")
    if sum((last is not None, first is not None, everything)) > 1:
        raise CliError("choose one of --first, --last and --all", code=Exit.USAGE)
    if first is not None and follow:
        raise CliError("--first and --follow exclude one another", code=Exit.USAGE)
    request = observer_pb2.GetFlowsRequest(follow=follow)
    if everything:
        request.number = (1 << 64) - 1
    elif first is not None:
        request.number, request.first = first, True
    elif last is not None:
        request.number = last
    elif not (since or until or follow):
        request.number = DEFAULT_NUMBER
    set_times(request, since, None if follow else until)
    request.whitelist.extend(flows_filter.build(given, cel=cel))
    request.blacklist.extend(flows_filter.build(given, negated=True))
    if mask is not None:
        if output not in ("json", "jsonpb"):
            raise CliError("--field-mask needs -o json", code=Exit.USAGE)
        request.field_mask.paths.extend(part for part in mask.split(",") if part)
    elif output not in ("json", "jsonpb"):
        request.field_mask.paths.extend(MASK)
    if raw:
        render.json(
            {
                "allowlist": [_message(item) for item in request.whitelist],
                "denylist": [_message(item) for item in request.blacklist],
            }
        )
        return
    printer = _Printer(settings, output, time_format, node)

    async def work(server: Server) -> None:
        stream = server.observer.GetFlows(request)
        try:
            async for response in stream:
                printer.show(response)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.CANCELLED:
                raise

    try:
        run(settings, given, work)
        if not printer.flows and not follow and output not in ("json", "jsonpb"):
            render.warn("No flow that is kept matches.")
    except KeyboardInterrupt:
        pass
    finally:
        printer.end()


class _Printer:
    """Responses as they come; a table needs all of them first."""

    def __init__(self, settings: Settings, output: str, time_format: str, node: bool) -> None:
        self._settings = settings
        self._output = output
        self._time_format = time_format
        self._node = node
        self._rows: list[Sequence[str]] = []
        self.flows = 0

    def show(self, response: observer_pb2.GetFlowsResponse) -> None:
        if self._output in ("json", "jsonpb"):
            render.json_line(_message(response))
            return
        match response.WhichOneof("response_types"):
            case "flow":
                self._flow(response)
            case "lost_events":
                render.warn(flows_show.lost(response.lost_events))
            case "node_status":
                status = response.node_status
                if status.state_change != relay_pb2.NODE_CONNECTED:
                    state = relay_pb2.NodeState.Name(status.state_change).removeprefix("NODE_")
                    names = ", ".join(status.node_names)
                    render.warn(f"{names}: {state.lower()}: {status.message}")
            case _:
                pass

    def _flow(self, response: observer_pb2.GetFlowsResponse) -> None:
        if self._output == "table":
            self._rows.append(flows_show.columns(response, self._time_format))
        elif self._output == "dict":
            separator = "------------\n" if self.flows else ""
            render.line(
                self._settings, separator + flows_show.dictionary(response, self._time_format)
            )
        else:
            render.line(
                self._settings,
                *flows_show.compact(response, self._time_format, node=self._node),
            )
        self.flows += 1
        sys.stdout.flush()

    def end(self) -> None:
        if self._rows:
            render.table(self._settings, flows_show.HEADER, self._rows)


def _message(message: Any) -> dict[str, Any]:
    shape: dict[str, Any] = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return shape


for command in (top, history, export, lost, stats):
    flows.add_command(command)
