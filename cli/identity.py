"""`cilia identity`: numbers and the labels they stand for."""

from __future__ import annotations

import click

from cli import clients, refs, render, shapes
from cli.settings import Group, Settings, examples, pass_settings
from protos.identity.v1 import identity_pb2


@click.group(cls=Group)
def identity() -> None:
    """Identities: what the kernel checks instead of addresses."""


@identity.command(
    "list",
    epilog=examples("""
cilia identity list
cilia identity list org=empire
"""),
)
@click.argument("label", nargs=-1, metavar="[LABEL]...")
@pass_settings
def list_(settings: Settings, label: tuple[str, ...]) -> None:
    """List identities; with labels, those that have all of them."""
    request = identity_pb2.ListRequest(labels=refs.labels(label))
    reply = clients.identity(
        settings, lambda service: service.identity.List(request, timeout=service.timeout_s)
    )
    items = sorted(reply.identities, key=lambda i: i.id)
    if settings.json:
        render.json([shapes.identity(item) for item in items])
        return
    rows: list[list[object]] = []
    for item in items:
        texts = shapes.labels(item.labels) or ["<no label>"]
        rows.append([item.id, texts[0]])
        rows.extend(["", text] for text in texts[1:])
    render.table(settings, ["ID", "LABELS"], rows)


@identity.command(
    "get",
    epilog=examples("""
cilia identity get 1234
cilia identity get --label k8s:org=empire --label k8s:io.kubernetes.pod.namespace=default
"""),
)
@click.argument("number", required=False, metavar="[ID]")
@click.option("-l", "--label", "label", multiple=True, help="The exact label set, instead of ID.")
@pass_settings
def get(settings: Settings, number: str | None, label: tuple[str, ...]) -> None:
    """Show one identity and the nodes that hold it."""
    if (number is None) == (not label):
        raise click.UsageError("name the identity by either its ID or --label")
    if number is not None:
        request = identity_pb2.GetRequest(id=refs.identity_number(number))
    else:
        request = identity_pb2.GetRequest(labels=identity_pb2.LabelSet(labels=refs.labels(label)))
    reply = clients.identity(
        settings, lambda service: service.identity.Get(request, timeout=service.timeout_s)
    )
    if settings.json:
        render.json(shapes.identity(reply.identity, reply.nodes))
        return
    texts = shapes.labels(reply.identity.labels) or ["<no label>"]
    rows: list[list[object]] = [[reply.identity.id, texts[0], " ".join(reply.nodes)]]
    rows.extend(["", text, ""] for text in texts[1:])
    render.table(settings, ["ID", "LABELS", "NODES"], rows)
