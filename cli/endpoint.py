"""`cilia endpoint`: the workloads of this node."""

from __future__ import annotations

import click

from cli import clients, complete, refs, render, shapes
from cli.errors import CliError, Exit
from cli.settings import Group, Settings, examples, pass_settings
from protos.agent.v1 import agent_pb2

OPTIONS = (
    "Such as PolicyEnforcement=always, PolicyAudit=Enabled or Visibility='<Ingress/80/TCP/HTTP>'; "
    "without any they are shown."
)
# The agent gives up after 30 s and then undoes what it did: its reason is worth the wait.
ADD_S = 40.0


@click.group(cls=Group)
def endpoint() -> None:
    """Workloads under policy.

    REF is an endpoint's id, its name (default/web, or web), or one of its addresses.
    """


def _enforcement(item: agent_pb2.Endpoint) -> tuple[str, str]:
    return (
        "Enabled" if item.ingress_enforced else "Disabled",
        "Enabled" if item.egress_enforced else "Disabled",
    )


@endpoint.command(
    "list",
    epilog=examples("""
cilia endpoint list
cilia endpoint list -l org=empire
cilia endpoint list -o json | jq -r '.[].ipv4'
"""),
)
@click.option("-l", "--label", "label", multiple=True, help="Only endpoints with this label.")
@click.option("--no-headers", is_flag=True, help="Rows only.")
@pass_settings
def list_(settings: Settings, label: tuple[str, ...], no_headers: bool) -> None:
    """List the endpoints of this node."""
    request = agent_pb2.ListEndpointsRequest(labels=refs.labels(label))
    reply = clients.agent(
        settings, lambda agent: agent.endpoint.List(request, timeout=agent.timeout_s)
    )
    items = sorted(reply.endpoints, key=lambda e: e.id)
    if settings.json:
        render.json([shapes.endpoint(item) for item in items])
        return
    if not items:
        render.warn("No endpoints. Add one: cilia endpoint add --netns NAME --name web -l app=web")
        return
    rows: list[list[object]] = []
    for item in items:
        ingress, egress = _enforcement(item)
        texts = shapes.labels(item.identity_labels or item.labels) or ["no labels"]
        rows.append(
            [
                item.id,
                f"{item.namespace}/{item.name}",
                ingress,
                egress,
                item.identity or "<none>",
                texts[0],
                item.ipv6 or "-",
                item.ipv4 or "-",
                item.state,
            ]
        )
        rows.extend(["", "", "", "", "", text, "", "", ""] for text in texts[1:])
    header = [
        "ENDPOINT",
        "NAME",
        "INGRESS",
        "EGRESS",
        "IDENTITY",
        "LABELS",
        "IPv6",
        "IPv4",
        "STATUS",
    ]
    if no_headers:
        for row in rows:
            click.echo("   ".join(str(cell) for cell in row).rstrip())
        return
    render.table(settings, header, rows)


@endpoint.command("get")
@click.argument("ref", shell_complete=complete.endpoints)
@pass_settings
def get(settings: Settings, ref: str) -> None:
    """Show one endpoint."""
    request = refs.endpoint_ref(ref)
    item = clients.agent(
        settings, lambda agent: agent.endpoint.Get(request, timeout=agent.timeout_s)
    )
    _show(settings, item)


def _show(settings: Settings, item: agent_pb2.Endpoint) -> None:
    if settings.json:
        render.json(shapes.endpoint(item))
        return
    ingress, egress = _enforcement(item)
    rows: list[tuple[str, object]] = [
        ("Endpoint", item.id),
        ("Name", f"{item.namespace}/{item.name}"),
        ("State", item.state),
    ]
    if item.message:
        rows.append(("Message", item.message))
    rows += [
        ("Identity", item.identity or "<none>"),
        ("Labels", " ".join(shapes.labels(item.labels))),
        ("Identity labels", " ".join(shapes.labels(item.identity_labels))),
        ("IPv4", item.ipv4 or "-"),
        ("IPv6", item.ipv6 or "-"),
        ("MAC", item.mac),
        ("Interface", f"{item.interface} in {item.netns}"),
        ("Host interface", item.host_interface),
        ("Ports", " ".join(f"{x.name}={x.port}/{x.protocol}" for x in item.ports) or "-"),
        ("Policy ingress", ingress),
        ("Policy egress", egress),
        (
            "Policy revision",
            f"{item.policy_revision} realised, {item.desired_policy_revision} desired",
        ),
        ("Policy map", f"slot {item.policy_slot}, {item.policy_entries} entries"),
        ("Health", item.health.overall or "-"),
    ]
    rows += [("Not shown", line) for line in item.not_shown]
    rows += [(f"Option {key}", value) for key, value in sorted(item.options.items())]
    render.fields(settings, rows)


def _named_port(text: str) -> agent_pb2.NamedPort:
    """name=http,port=80,protocol=TCP"""
    given = dict(part.partition("=")[::2] for part in text.split(","))
    number = given.get("port", "")
    if not given.keys() <= {"name", "port", "protocol"} or not given.get("name"):
        raise CliError(
            f"{text!r} names no port: write name=http,port=80,protocol=TCP", code=Exit.INVALID
        )
    if not number.isascii() or not number.isdigit() or not 0 < int(number) <= 65535:
        raise CliError(f"{text!r}: port must be a number of 1 to 65535", code=Exit.INVALID)
    return agent_pb2.NamedPort(
        name=given["name"], port=int(number), protocol=given.get("protocol", "TCP").upper()
    )


def _key_value(text: str, what: str, hint: str = "") -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not (key and separator and value):
        raise CliError(f"{what} {text!r} is not KEY=VALUE", code=Exit.INVALID, hint=hint)
    return key, value


@endpoint.command(
    "add",
    epilog=examples("""
ip netns add web1 && cilia endpoint add --netns web1 --name web -l app=web
cilia endpoint add --pid 4242 --name db --namespace shop -l app=db -l tier=data
cilia endpoint add --netns /run/netns/web1 --name web -l app=web --ipv4 10.217.0.80
cilia endpoint add --netns web1 --name web -l app=web --port name=http,port=8080
cilia endpoint add --netns web1 --name web -l app=web \\
  --annotation 'io.cilium.proxy-visibility=<Ingress/80/TCP/HTTP>'
"""),
)
@click.option("--name", required=True, help="Name, unique in its namespace.")
@click.option("--namespace", "-n", default="default", show_default=True, help="Namespace.")
@click.option("-l", "--label", "label", multiple=True, help="Label, repeated or comma separated.")
@click.option("--netns", help="The workload's network namespace: a path, or a name of `ip netns`.")
@click.option("--pid", type=click.IntRange(min=1), help="A process in the workload's namespace.")
@click.option("--interface", default="", help="Interface name in the workload (eth0).")
@click.option("--ipv4", default="", help="Ask for this address instead of one from the pool.")
@click.option("--ipv6", default="", help="Ask for this address instead of one from the pool.")
@click.option(
    "--port",
    "ports",
    multiple=True,
    metavar="name=NAME,port=PORT[,protocol=TCP]",
    help="What the workload calls a port, for policies that name ports. Repeatable.",
)
@click.option(
    "--annotation",
    "annotations",
    multiple=True,
    metavar="KEY=VALUE",
    help="io.cilium.proxy-visibility='<Ingress/80/TCP/HTTP>' shows requests. Repeatable.",
)
@click.option("--no-wait", is_flag=True, help="Return once attached and dropping.")
@pass_settings
def add(
    settings: Settings,
    name: str,
    namespace: str,
    label: tuple[str, ...],
    netns: str | None,
    pid: int | None,
    interface: str,
    ipv4: str,
    ipv6: str,
    ports: tuple[str, ...],
    annotations: tuple[str, ...],
    no_wait: bool,
) -> None:
    """Put a network namespace under policy.

    Creates the interface, addresses and routes in the workload's namespace. Returns when the
    policy is in force: until then the endpoint drops everything.
    """
    if (netns is None) == (pid is None):
        raise click.UsageError("name the workload by either --netns or --pid")
    for text, version in ((ipv4, 4), (ipv6, 6)):
        if text and not (refs.is_address(text) and (":" in text) == (version == 6)):
            raise CliError(f"{text!r} is not an IPv{version} address", code=Exit.INVALID)
    request = agent_pb2.AddEndpointRequest(
        name=name,
        namespace=namespace,
        labels=refs.labels(label),
        interface=interface,
        ipv4=ipv4,
        ipv6=ipv6,
        ports=[_named_port(text) for text in ports],
        annotations=dict(_key_value(text, "annotation") for text in annotations),
        no_wait=no_wait,
    )
    if netns is not None:
        request.netns_path = refs.netns_path(netns)
    else:
        assert pid is not None
        request.pid = pid
    item = clients.agent(
        settings,
        lambda agent: agent.endpoint.Add(
            request, timeout=agent.timeout_s if settings.timeout_given else ADD_S
        ),
    )
    if settings.json:
        render.json(shapes.endpoint(item))
        return
    render.line(
        settings,
        f"Endpoint {item.id} ({item.namespace}/{item.name}) is {item.state}: identity "
        f"{item.identity or '<none yet>'}, {item.ipv4 or 'no IPv4'}, {item.ipv6 or 'no IPv6'}, "
        f"interface {item.interface}",
    )


@endpoint.command("delete")
@click.argument("ref", nargs=-1, required=True, metavar="REF...", shell_complete=complete.endpoints)
@pass_settings
def delete(settings: Settings, ref: tuple[str, ...]) -> None:
    """Remove endpoints: links, addresses, map entries and the identity reference."""
    results: list[dict[str, object]] = []
    failed = False
    for text in ref:
        request = agent_pb2.DeleteEndpointRequest(ref=refs.endpoint_ref(text))
        reply = clients.agent(
            settings,
            lambda agent, request=request: agent.endpoint.Delete(  # type: ignore[misc]  # bound early
                request, timeout=agent.timeout_s
            ),
        )
        results.append({"endpoint": text, "errors": list(reply.errors)})
        failed = failed or bool(reply.errors)
        if not settings.json:
            render.line(settings, f"Endpoint {text} deleted")
            for error in reply.errors:
                render.warn(f"  while deleting {text}: {error}")
    if settings.json:
        render.json(results)
    if failed:
        raise SystemExit(int(Exit.FAILED))


@endpoint.command(
    "labels",
    epilog=examples("""
cilia endpoint labels web
cilia endpoint labels web --add tier=front --delete tier
"""),
)
@click.argument("ref", shell_complete=complete.endpoints)
@click.option("-a", "--add", "add", multiple=True, help="Add or change a label.")
@click.option("-d", "--delete", "remove", multiple=True, help="Remove a label (a key is enough).")
@click.option("--no-wait", is_flag=True, help="Do not wait until the new policy is in force.")
@pass_settings
def labels(
    settings: Settings, ref: str, add: tuple[str, ...], remove: tuple[str, ...], no_wait: bool
) -> None:
    """Show or change an endpoint's labels; a change may give it another identity."""
    target = refs.endpoint_ref(ref)
    if add or remove:
        request = agent_pb2.SetLabelsRequest(
            ref=target, add=refs.labels(add), remove=refs.labels(remove), no_wait=no_wait
        )
        item = clients.agent(
            settings, lambda agent: agent.endpoint.SetLabels(request, timeout=agent.timeout_s)
        )
    else:
        item = clients.agent(
            settings, lambda agent: agent.endpoint.Get(target, timeout=agent.timeout_s)
        )
    made_of = set(shapes.labels(item.identity_labels))
    shown = shapes.labels(item.labels)
    extra = [text for text in sorted(made_of) if text not in shown]
    if settings.json:
        render.json(
            {
                "id": item.id,
                "identity": item.identity or None,
                "labels": shown,
                "identity_labels": shapes.labels(item.identity_labels),
            }
        )
        return
    render.line(settings, f"Endpoint {item.id}, identity {item.identity or '<none>'}")
    render.table(
        settings,
        ["LABEL", "IN IDENTITY"],
        [[text, "yes" if text in made_of else "no"] for text in [*shown, *extra]],
    )


@endpoint.command(
    "config",
    epilog=examples("""
cilia endpoint config web
cilia endpoint config web PolicyEnforcement=always PolicyAudit=Enabled
cilia endpoint config web 'Visibility=<Ingress/80/TCP/HTTP>,<Egress/443/TCP/HTTP>'
cilia endpoint config web Visibility=none
"""),
)
@click.argument("ref", shell_complete=complete.endpoints)
@click.argument("option", nargs=-1, metavar="[KEY=VALUE]...")
@pass_settings
def config(settings: Settings, ref: str, option: tuple[str, ...]) -> None:
    """Show or set an endpoint's options."""
    target = refs.endpoint_ref(ref)
    if option:
        options = dict(_key_value(text, "option", OPTIONS) for text in option)
        request = agent_pb2.SetConfigRequest(ref=target, options=options)
        item = clients.agent(
            settings, lambda agent: agent.endpoint.SetConfig(request, timeout=agent.timeout_s)
        )
    else:
        item = clients.agent(
            settings, lambda agent: agent.endpoint.Get(target, timeout=agent.timeout_s)
        )
    if settings.json:
        render.json(dict(sorted(item.options.items())))
        return
    if option:
        render.line(settings, f"Endpoint {item.id} configuration updated successfully")
    for key, value in sorted(item.options.items()):
        render.line(settings, f"{key:<24} {value}")


@endpoint.command("log")
@click.argument("ref", shell_complete=complete.endpoints)
@pass_settings
def log(settings: Settings, ref: str) -> None:
    """Show what happened to an endpoint, newest first."""
    request = refs.endpoint_ref(ref)
    reply = clients.agent(
        settings, lambda agent: agent.endpoint.Log(request, timeout=agent.timeout_s)
    )
    if settings.json:
        render.json([shapes.log_entry(entry) for entry in reply.entries])
        return
    render.table(
        settings,
        ["TIMESTAMP", "STATUS", "STATE", "MESSAGE"],
        [[shapes.time_text(e.time_ns), e.code, e.state, e.message] for e in reply.entries],
    )


@endpoint.command("health")
@click.argument("ref", shell_complete=complete.endpoints)
@pass_settings
def health(settings: Settings, ref: str) -> None:
    """Show an endpoint's health."""
    request = refs.endpoint_ref(ref)
    item = clients.agent(
        settings, lambda agent: agent.endpoint.Get(request, timeout=agent.timeout_s)
    )
    if settings.json:
        render.json(
            {"id": item.id, "state": item.state, "message": item.message}
            | shapes.endpoint_health(item.health)
        )
        return
    render.fields(
        settings,
        [
            ("Overall Health", item.health.overall),
            ("BPF Health", item.health.bpf),
            ("Policy Health", item.health.policy),
            ("Connected", "yes" if item.health.connected else "no"),
        ],
    )
    if item.message:
        render.line(settings, item.message)


@endpoint.command("regenerate")
@click.argument("ref", shell_complete=complete.endpoints)
@pass_settings
def regenerate(settings: Settings, ref: str) -> None:
    """Resolve an endpoint's policy again and write it to the kernel."""
    request = refs.endpoint_ref(ref)
    item = clients.agent(
        settings, lambda agent: agent.endpoint.Regenerate(request, timeout=agent.timeout_s)
    )
    if settings.json:
        render.json(shapes.endpoint(item))
        return
    render.line(settings, f"Endpoint {item.id} successfully regenerated ({item.state})")
