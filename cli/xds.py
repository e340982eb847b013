"""`cilia xds` and `cilia redirect`: the control plane of the proxy and of other xDS clients."""

from __future__ import annotations

from typing import Any

import click

from cli import clients, render, shapes
from cli.settings import Group, Settings, examples, pass_settings
from protos.xds.v1 import xds_pb2 as pb

_SHORT = {
    "envoy.config.listener.v3.Listener": "LDS",
    "envoy.config.route.v3.RouteConfiguration": "RDS",
    "envoy.config.route.v3.ScopedRouteConfiguration": "SRDS",
    "envoy.config.route.v3.VirtualHost": "VHDS",
    "envoy.config.cluster.v3.Cluster": "CDS",
    "envoy.config.endpoint.v3.ClusterLoadAssignment": "EDS",
    "envoy.extensions.transport_sockets.tls.v3.Secret": "SDS",
    "envoy.config.core.v3.TypedExtensionConfig": "ECDS",
    "envoy.service.runtime.v3.Runtime": "RTDS",
    "cilium.NetworkPolicy": "NPDS",
    "cilium.NetworkPolicyHosts": "NPHDS",
}


@click.group(cls=Group)
def xds() -> None:
    """The xDS service: its clients, and what they accepted or refused."""


@click.group(cls=Group)
def redirect() -> None:
    """Redirects to the proxy: who listens where, and what passed."""


@xds.command(
    "status",
    epilog=examples("""
cilia xds status
cilia xds status -o json | jq '.rejections'
"""),
)
@pass_settings
def status(settings: Settings) -> None:
    """Show streams, versions, acknowledgements and refusals."""
    shape = _status(_ask(settings))
    if settings.json:
        render.json(shape)
        return
    agent, envoy, log = shape["agent"], shape["envoy"], shape["access_log"]
    rows: list[tuple[str, object]] = [
        ("Version", f"{shape['version']}, since {shape['started']}"),
    ]
    if agent is not None:
        connected = f"{agent['node']}, since {agent['since']}" if agent["connected"] else "away"
        told = "redirects complete" if agent["synced"] else "redirects not complete yet"
        rows.append(("Agent", f"{connected}; {told}"))
    if envoy is not None:
        parts = [envoy["state"]]
        parts += [f"pid {envoy['pid']}"] if envoy["pid"] else []
        parts += [envoy["version"]] if envoy["version"] else []
        parts += [render.count(envoy["restarts"], "restart")]
        text = ", ".join(parts) + (f": {envoy['message']}" if envoy["message"] else "")
        rows.append(("Envoy", text))
    rows.append(
        ("Access log", f"{log['records']} records, {log['readers']} readers, {log['lost']} lost")
    )
    rows += [
        ("Certificate", f"{c['path']} until {c['not_after']} {c['error'] or ''}".strip())
        for c in shape["certificates"]
    ]
    rows += [("Fault", f"{f['path']}: {f['error']}") for f in shape["files"] if f["error"]]
    render.fields(settings, rows)
    render.line(settings, "")
    render.table(
        settings,
        ["TYPE", "RESOURCES", "BYTES", "CHANGES"],
        [[t["type"], t["resources"], t["bytes"], t["changes"]] for t in shape["types"]],
    )
    render.line(settings, "")
    streams: list[list[object]] = []
    for stream in shape["streams"]:
        subscriptions: list[Any] = stream["subscriptions"] or [None]
        for number, sub in enumerate(subscriptions):
            head = ["", "", "", ""]
            if number == 0:
                via = f"{stream['protocol']} {stream['transport']}"
                if stream["method"] != "ads":
                    via += f" {stream['method']}"
                head = [str(stream["id"]), stream["node"], stream["user_agent"] or "", via]
            streams.append([*head, *_subscription_cells(sub)])
    render.table(
        settings,
        ["STREAM", "NODE", "CLIENT", "VIA", "TYPE", "ASKED", "HOLDS", "SENT", "ACKED", "STATE"],
        streams,
    )
    if shape["rejections"]:
        render.line(settings, "")
        render.table(
            settings,
            ["REFUSED", "NAME", "NODE", "VERSION", "REASON"],
            [
                [r["type"], r["name"], r["node"], r["version"][:12], r["reason"]]
                for r in shape["rejections"]
            ],
        )


def _subscription_cells(sub: dict[str, Any] | None) -> list[object]:
    if sub is None:
        return ["", "", "", "", "", ""]
    asked = "*" if sub["wildcard"] else ""
    if sub["names"]:
        asked += f"{'+' if asked else ''}{sub['names']}"
    state = "refused" if sub["nack"] else "waiting" if sub["waiting"] else "ok"
    return [
        sub["type"],
        asked,
        sub["resources"],
        (sub["sent_version"] or "")[:8],
        (sub["acked_version"] or "")[:8],
        state,
    ]


def _known_type(_ctx: click.Context, _param: click.Parameter, value: str) -> str:
    """A type URL, or the three letters of one; what is neither would only show nothing."""
    if value and "." not in value and value.upper() not in _SHORT.values():
        raise click.BadParameter(f"{value!r} is none of {', '.join(sorted(_SHORT.values()))}")
    return value if "." in value else value.upper()


@xds.command(
    "resources",
    epilog=examples("""
cilia xds resources
cilia xds resources --type LDS --node cilia-proxy
"""),
)
@click.option(
    "--type", "type_url", default="", callback=_known_type, help="LDS, RDS, ... or a type URL."
)
@click.option("--node", default="", help="What this node is served.")
@pass_settings
def resources(settings: Settings, type_url: str, node: str) -> None:
    """List single resources, and who has accepted or refused them."""

    async def read(service: clients.Xds) -> list[pb.ResourceStatus]:
        request = pb.ResourcesRequest(type_url=type_url, node=node)
        found: list[pb.ResourceStatus] = []
        async for chunk in service.status.Resources(request, timeout=service.timeout_s):
            found += chunk.resources
        return found

    shape = [_resource(item) for item in clients.xds(settings, read)]
    if settings.json:
        render.json(shape)
        return
    render.table(
        settings,
        ["TYPE", "NAME", "VERSION", "BYTES", "FOR", "STATE", "REASON"],
        [
            [
                r["type"],
                r["name"],
                r["version"][:12],
                r["bytes"],
                ",".join(r["nodes"]) or "all",
                " ".join(f"{s['node']}:{s['state']}" for s in r["states"][:4]),
                next((s["reason"] for s in r["states"] if s["reason"]), ""),
            ]
            for r in shape
        ],
    )


@redirect.command(
    "list",
    epilog=examples("""
cilia redirect list
cilia redirect list -o json | jq '.[] | select(.denied > 0)'
"""),
)
@pass_settings
def redirect_list(settings: Settings) -> None:
    """List redirects with their state, requests, denials and connections."""
    shape = [_redirect(item) for item in _ask(settings).redirects]
    if settings.json:
        render.json(shape)
        return
    render.table(
        settings,
        [
            "PORT", "DIRECTION", "PARSER", "RULES", "STATE", "REQUESTS", "DENIED", "CONNECTIONS",
            "ACTIVE", "DIGEST", "POLICY",
        ],
        [
            [
                r["port"], r["direction"], r["parser"], r["rules"],
                f"{r['state']}: {r['message']}" if r["message"] else r["state"],
                r["requests"], r["denied"], r["connections"], r["active"],
                r["digest"][:12], "; ".join(r["policies"]),
            ]
            for r in shape
        ],
    )  # fmt: skip


# ---- asking, and shapes


def _ask(settings: Settings) -> pb.StatusResponse:
    return clients.xds(
        settings,
        lambda service: service.status.Status(pb.StatusRequest(), timeout=service.timeout_s),
    )


def short_type(url: str) -> str:
    """`LDS` for a type that has a short name, else the type without its prefix."""
    name = url.removeprefix("type.googleapis.com/")
    return _SHORT.get(name, name)


def _status(item: pb.StatusResponse) -> dict[str, Any]:
    """`cilia xds status -o json`."""
    return {
        "version": item.version,
        "started": shapes.time_text(item.started_ns),
        "agent": (
            {
                "connected": item.agent.connected,
                "synced": item.agent.synced,
                "node": item.agent.node or None,
                "since": shapes.time_text(item.agent.since_ns),
            }
            if item.HasField("agent")
            else None
        ),
        "envoy": (
            {
                "state": item.envoy.state,
                "pid": item.envoy.pid or None,
                "version": item.envoy.version or None,
                "started": shapes.time_text(item.envoy.started_ns),
                "restarts": item.envoy.restarts,
                "message": item.envoy.message or None,
            }
            if item.HasField("envoy")
            else None
        ),
        "access_log": {
            "sources": item.access_log.sources,
            "readers": item.access_log.readers,
            "records": item.access_log.records,
            "lost": item.access_log.lost,
        },
        "types": [
            {
                "type": short_type(t.type_url),
                "type_url": t.type_url,
                "resources": t.resources,
                "bytes": t.bytes,
                "changes": t.changes,
            }
            for t in item.types
        ],
        "streams": [_stream(s) for s in item.streams],
        "rejections": [
            {
                "node": r.node,
                "type": short_type(r.type_url),
                "type_url": r.type_url,
                "name": r.name,
                "version": r.version,
                "reason": r.reason,
                "time": shapes.time_text(r.time_ns),
            }
            for r in item.rejections
        ],
        "files": [
            {
                "path": f.path,
                "resources": f.resources,
                "error": f.error or None,
                "loaded": shapes.time_text(f.loaded_ns),
            }
            for f in item.files
        ],
        "certificates": [
            {
                "path": c.path,
                "subject": c.subject,
                "names": list(c.names),
                "not_after": shapes.time_text(c.not_after_ns),
                "error": c.error or None,
            }
            for c in item.certificates
        ],
    }


def _stream(item: pb.Stream) -> dict[str, Any]:
    return {
        "id": item.id,
        "node": item.node,
        "claimed_node": item.claimed_node or None,
        "cluster": item.cluster or None,
        "user_agent": item.user_agent or None,
        "peer": item.peer,
        "transport": item.transport,
        "protocol": item.protocol,
        "method": item.method,
        "since": shapes.time_text(item.since_ns),
        "requests": item.requests,
        "responses": item.responses,
        "response_bytes": item.response_bytes,
        "acks": item.acks,
        "nacks": item.nacks,
        "subscriptions": [
            {
                "type": short_type(s.type_url),
                "type_url": s.type_url,
                "wildcard": s.wildcard,
                "names": s.names,
                "resources": s.resources,
                "sent_version": s.sent_version or None,
                "acked_version": s.acked_version or None,
                "waiting": s.waiting,
                "nack": s.nack or None,
                "nack_time": shapes.time_text(s.nack_ns),
            }
            for s in item.subscriptions
        ],
    }


def _resource(item: pb.ResourceStatus) -> dict[str, Any]:
    return {
        "type": short_type(item.type_url),
        "type_url": item.type_url,
        "name": item.name,
        "version": item.version,
        "bytes": item.bytes,
        "nodes": list(item.nodes),
        "states": [
            {
                "node": s.node,
                "state": pb.ResourceOnNode.State.Name(s.state).lower(),
                "version": s.version or None,
                "reason": s.reason or None,
            }
            for s in item.states
        ],
    }


def _redirect(item: pb.RedirectStatus) -> dict[str, Any]:
    state = item.state
    return {
        "port": state.port,
        "digest": state.digest,
        "direction": pb.Direction.Name(item.direction).lower(),
        "parser": item.parser,
        "rules": item.rules,
        "state": pb.RedirectState.State.Name(state.state).lower(),
        "message": state.message or None,
        "version": state.version or None,
        "requests": item.requests,
        "denied": item.denied,
        "connections": item.connections,
        "active": item.active,
        "policies": list(item.policies),
    }
