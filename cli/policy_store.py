"""`cilia policy apply`, `get` and `delete`: the policies in force."""

from __future__ import annotations

import io
import json
from typing import Any

import click

from cli import clients, documents, refs, render, shapes
from cli.errors import CliError, Exit
from cli.policy import namespace_option
from cli.settings import Command, Settings, examples, pass_settings
from protos.agent.v1 import agent_pb2
from protos.identity.v1 import identity_pb2

CHANGED = {
    "unchanged": "unchanged",
    "created": "created",
    "configured": "configured",
    "deleted": "deleted",
}


def _named(kind: str, namespace: str | None, name: str) -> str:
    return f"{kind} {namespace}/{name}" if namespace else f"{kind} {name}"


def _outcomes(settings: Settings, outcomes: list[dict[str, Any]]) -> None:
    for item in outcomes:
        render.line(
            settings,
            f"{_named(item['kind'], item['namespace'], item['name'])} {CHANGED[item['change']]}",
        )


@click.command(
    "apply",
    cls=Command,
    epilog=examples("""
cilia policy apply examples/policies/star-wars/l3-l4.yaml --wait
cilia policy apply policies/ --dry-run
kubectl get cnp -A -o yaml | cilia policy apply -
"""),
)
@click.argument("file", nargs=-1, required=True, type=click.Path(), metavar="FILE|DIR|-...")
@click.option("--wait", is_flag=True, help="Return when this node enforces it.")
@click.option("--dry-run", is_flag=True, help="Check, say what would change, change nothing.")
@click.option(
    "--confirm",
    is_flag=True,
    help="Also policies that isolate a node: rolled back unless `policy confirm` follows.",
)
@namespace_option
@pass_settings
def apply(
    settings: Settings,
    file: tuple[str, ...],
    wait: bool,
    dry_run: bool,
    confirm: bool,
    namespace: str,
) -> None:
    """Store policies and enforce them."""
    sources = documents.read(file)
    request = agent_pb2.ApplyRequest(
        documents=[agent_pb2.Document(source=s.name, text=s.text) for s in sources],
        dry_run=dry_run,
        wait=wait,
        confirm=confirm,
        default_namespace=namespace,
    )
    try:
        reply = clients.agent(
            settings, lambda agent: agent.policy.Apply(request, timeout=agent.timeout_s)
        )
    except CliError as error:
        if error.code is not Exit.INVALID or not error.faults:
            raise
        # Faults travel in a header and a header is small: what did not fit is found again here.
        here = documents.check(sources, default_namespace=namespace).faults
        faults = max(error.faults, here, key=len)
        raise documents.invalid(faults, changed_nothing=True) from error
    outcomes = [shapes.outcome(item) for item in reply.outcomes]
    if settings.json:
        render.json(
            {
                "revision": reply.revision,
                "realised": reply.realised,
                "dry_run": dry_run,
                "outcomes": outcomes,
                "warnings": [shapes.fault(item) for item in reply.warnings],
                "confirm_within_s": reply.confirm_within_s or None,
            }
        )
    else:
        for item in reply.warnings:
            render.warn(f"warning: {clients.fault_line(item).text()}")
        _outcomes(settings, outcomes)
        if dry_run:
            render.line(settings, "Dry run: nothing was changed")
        elif reply.realised:
            render.line(settings, f"Revision: {reply.revision} (enforced)")
        else:
            render.line(settings, f"Revision: {reply.revision}")
        if reply.confirm_within_s:
            render.warn(
                "A node is isolated: run `cilia policy confirm` within "
                f"{reply.confirm_within_s} s, or it is rolled back"
            )
    if wait and not dry_run and not reply.realised:
        raise CliError(
            f"revision {reply.revision} is stored but not yet enforced on this node",
            code=Exit.TIMEOUT,
            hint="See `cilia status` and `cilia endpoint list` for what is not ready.",
        )


@click.command("confirm", cls=Command, epilog=examples("cilia policy confirm"))
@pass_settings
def confirm(settings: Settings) -> None:
    """Keep the policies that `apply --confirm` stored on trial.

    Policies that isolate a node that was open are rolled back after a minute, unless you can still
    say that you meant them.
    """
    reply = clients.agent(
        settings,
        lambda agent: agent.policy.Confirm(agent_pb2.ConfirmRequest(), timeout=agent.timeout_s),
    )
    if settings.json:
        found = [
            {"kind": x.kind, "namespace": x.namespace or None, "name": x.name} for x in reply.names
        ]
        render.json({"confirmed": found})
        return
    for item in reply.names:
        render.line(settings, f"{_named(item.kind, item.namespace, item.name)} confirmed")


async def _fetch(agent: clients.Agent) -> agent_pb2.GetPoliciesResponse:
    return await agent.policy.Get(agent_pb2.GetPoliciesRequest(), timeout=agent.timeout_s)


def _select(
    items: list[identity_pb2.Policy], patterns: list[refs.PolicyPattern]
) -> list[identity_pb2.Policy]:
    """Those named; every pattern must name exactly one. Raises CliError."""
    chosen: list[identity_pb2.Policy] = []
    for pattern in patterns:
        found = [p for p in items if pattern.matches(p.kind, p.namespace, p.name)]
        if not found:
            raise CliError(
                f"no policy {pattern.name!r}"
                + (f" in namespace {pattern.namespace!r}" if pattern.namespace else ""),
                code=Exit.NOT_FOUND,
                hint="List them with `cilia policy get`.",
            )
        if len(found) > 1:
            names = ", ".join(_named(p.kind, p.namespace, p.name) for p in found)
            raise CliError(
                f"{pattern.name!r} names several policies: {names}",
                code=Exit.INVALID,
                hint="Write KIND/NAMESPACE/NAME.",
            )
        chosen.extend(found)
    return chosen


@click.command(
    "get",
    cls=Command,
    epilog=examples("""
cilia policy get
cilia policy get default/rule1
cilia policy get -o json | jq -r '.policies[].name'
"""),
)
@click.argument("name", nargs=-1, metavar="[[KIND/][NAMESPACE/]NAME]...")
@pass_settings
def get(settings: Settings, name: tuple[str, ...]) -> None:
    """List policies, or show the documents named."""
    patterns = [refs.policy_pattern(text) for text in name]
    reply = clients.agent(settings, _fetch)
    items = sorted(reply.policies, key=lambda p: (p.kind, p.namespace, p.name))
    if patterns:
        items = _select(items, patterns)
    if settings.json:
        render.json(
            {
                "revision": reply.revision,
                "realised_revision": reply.realised_revision,
                "policies": [shapes.policy(item) for item in items],
            }
        )
        return
    if patterns:
        for index, item in enumerate(items):
            if index:
                click.echo("---")
            click.echo(yaml_text(shapes.policy(item)["document"]), nl=False)
        return
    if items:
        render.table(
            settings,
            ["KIND", "NAMESPACE", "NAME", "WRITTEN IN", "REVISION"],
            [
                [
                    p.kind,
                    p.namespace or "-",
                    p.name,
                    p.origin.source + (f":{p.origin.line}" if p.origin.line else ""),
                    p.revision,
                ]
                for p in items
            ],
        )
    render.line(settings, f"Revision: {reply.revision} ({reply.realised_revision} enforced here)")


def yaml_text(document: Any) -> str:
    """A document as block-style YAML."""
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.default_flow_style = False
    out = io.StringIO()
    yaml.dump(json.loads(json.dumps(document)), out)
    return out.getvalue()


@click.command(
    "delete",
    cls=Command,
    epilog=examples("""
cilia policy delete rule1
cilia policy delete -f examples/policies/star-wars/l3-l4.yaml --wait
cilia policy delete --all
"""),
)
@click.argument("name", nargs=-1, metavar="[[KIND/][NAMESPACE/]NAME]...")
@click.option(
    "-f",
    "--file",
    "file",
    multiple=True,
    type=click.Path(),
    metavar="FILE",
    help="Delete the policies of this file.",
)
@click.option("--all", "everything", is_flag=True, help="Delete every policy.")
@click.option("--wait", is_flag=True, help="Return when this node enforces it.")
@namespace_option
@pass_settings
def delete(
    settings: Settings,
    name: tuple[str, ...],
    file: tuple[str, ...],
    everything: bool,
    wait: bool,
    namespace: str,
) -> None:
    """Delete policies: what they allowed is cut, live connections too."""
    if everything == bool(name or file):
        raise click.UsageError("name policies, or give -f FILE, or --all to delete every one")
    patterns = [refs.policy_pattern(text) for text in name]
    if file:
        checked = documents.check(documents.read(file), default_namespace=namespace)
        if checked.faults:
            raise documents.invalid(checked.faults, changed_nothing=True)
        patterns += [
            refs.PolicyPattern(d.name, kind=str(d.kind), namespace=d.namespace or "")
            for d in checked.documents
        ]

    async def work(agent: clients.Agent) -> agent_pb2.DeleteResponse:
        request = agent_pb2.DeleteRequest(all=everything, wait=wait)
        if patterns:
            chosen = _select(list((await _fetch(agent)).policies), patterns)
            request.names.extend(
                identity_pb2.PolicyName(kind=p.kind, namespace=p.namespace, name=p.name)
                for p in chosen
            )
        return await agent.policy.Delete(request, timeout=agent.timeout_s)

    reply = clients.agent(settings, work)
    outcomes = [shapes.outcome(item) for item in reply.outcomes]
    if settings.json:
        render.json({"revision": reply.revision, "realised": wait, "outcomes": outcomes})
        return
    _outcomes(settings, outcomes)
    # With --wait the answer comes when this node enforces it, or is an error.
    render.line(settings, f"Revision: {reply.revision}" + (" (enforced)" if wait else ""))
