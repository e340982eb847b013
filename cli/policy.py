"""`cilia policy`: apply, get, delete, validate, trace."""

from __future__ import annotations

import io
import json
from typing import Any

import click

from cli import clients, documents, offline, refs, render, shapes
from cli.errors import CliError, Exit
from cli.settings import Group, Settings, examples, pass_settings
from protos.agent.v1 import agent_pb2
from protos.identity.v1 import identity_pb2

CHANGED = {
    "unchanged": "unchanged",
    "created": "created",
    "configured": "configured",
    "deleted": "deleted",
}

namespace_option = click.option(
    "-n",
    "--namespace",
    default="default",
    show_default=True,
    help="Namespace of documents that name none.",
)


@click.group(cls=Group)
def policy() -> None:
    """Policies: CiliumNetworkPolicy, CiliumClusterwideNetworkPolicy, or rules, YAML or JSON.

    All or nothing: an invalid document changes nothing, and every fault is reported with its
    file, line and field.
    """


def _named(kind: str, namespace: str | None, name: str) -> str:
    return f"{kind} {namespace}/{name}" if namespace else f"{kind} {name}"


def _outcomes(settings: Settings, outcomes: list[dict[str, Any]]) -> None:
    for item in outcomes:
        render.line(
            settings,
            f"{_named(item['kind'], item['namespace'], item['name'])} {CHANGED[item['change']]}",
        )


@policy.command(
    "apply",
    epilog=examples("""
cilia policy apply examples/policies/star-wars/l3-l4.yaml --wait
cilia policy apply policies/ --dry-run
kubectl get cnp -A -o yaml | cilia policy apply -
"""),
)
@click.argument("file", nargs=-1, required=True, metavar="FILE|DIR|-...")
@click.option("--wait", is_flag=True, help="Return when this node enforces it.")
@click.option("--dry-run", is_flag=True, help="Check, say what would change, change nothing.")
@namespace_option
@pass_settings
def apply(
    settings: Settings, file: tuple[str, ...], wait: bool, dry_run: bool, namespace: str
) -> None:
    """Store policies and enforce them."""
    sources = documents.read(file)
    request = agent_pb2.ApplyRequest(
        documents=[agent_pb2.Document(source=s.name, text=s.text) for s in sources],
        dry_run=dry_run,
        wait=wait,
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
    if wait and not dry_run and not reply.realised:
        raise CliError(
            f"revision {reply.revision} is stored but not yet enforced on this node",
            code=Exit.TIMEOUT,
            hint="See `cilia status` and `cilia endpoint list` for what is not ready.",
        )


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


@policy.command(
    "get",
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


@policy.command(
    "delete",
    epilog=examples("""
cilia policy delete rule1
cilia policy delete -f examples/policies/star-wars/l3-l4.yaml --wait
cilia policy delete --all
"""),
)
@click.argument("name", nargs=-1, metavar="[[KIND/][NAMESPACE/]NAME]...")
@click.option("-f", "--file", "file", multiple=True, help="Delete the policies of this file.")
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


@policy.command(
    "validate",
    epilog=examples("""
cilia policy validate policies/
cat policy.yaml | cilia policy validate - -o json
"""),
)
@click.argument("file", nargs=-1, required=True, metavar="FILE|DIR|-...")
@click.option("--strict", is_flag=True, help="Warnings fail too.")
@namespace_option
@pass_settings
def validate(settings: Settings, file: tuple[str, ...], strict: bool, namespace: str) -> None:
    """Check policy files. Needs no agent. Exit code 4 when one is invalid."""
    checked = documents.check(documents.read(file), default_namespace=namespace)
    valid = not checked.faults and not (strict and checked.warnings)
    if settings.json:
        render.json(
            {
                "valid": valid,
                "documents": [
                    {
                        "kind": str(d.kind),
                        "namespace": d.namespace,
                        "name": d.name,
                        "rules": len(d.rules),
                    }
                    for d in checked.documents
                ],
                "faults": [f.shape() for f in checked.faults],
                "warnings": [f.shape() for f in checked.warnings],
            }
        )
    else:
        for fault in checked.warnings:
            render.warn(f"warning: {fault.text()}")
        if valid:
            many = render.count(len(checked.documents), "document")
            render.line(settings, f"All policy elements are valid ({many}).")
        else:
            faults = checked.faults or checked.warnings
            raise documents.invalid(faults, changed_nothing=False)
    if not valid:
        raise SystemExit(int(Exit.INVALID))


@policy.command(
    "trace",
    epilog=examples("""
cilia policy trace --src xwing --dst deathstar-1 --dport 80/tcp
cilia policy trace -s org=alliance -d org=empire,class=deathstar --dport 80/tcp
cilia policy trace --policies policies/ -s org=alliance -d class=deathstar --dport 80/tcp
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
    default="0/ANY",
    metavar="PORT[/PROTOCOL]",
    help="Destination port, for example 80/tcp. Without it: any port at all.",
)
@click.option(
    "--policies",
    multiple=True,
    type=click.Path(),
    metavar="FILE|DIR",
    help="Ask these files instead of the agent (labels and addresses only).",
)
@click.option(
    "--mode",
    type=click.Choice(["default", "always", "never"]),
    default="default",
    help="Enforcement mode, with --policies.",
)
@click.option("--exit-code", is_flag=True, help="Exit with 1 when denied.")
@namespace_option
@pass_settings
def trace(
    settings: Settings,
    src: tuple[str, ...],
    dst: tuple[str, ...],
    dport: str,
    policies: tuple[str, ...],
    mode: offline.Mode,
    exit_code: bool,
    namespace: str,
) -> None:
    """Say whether a connection would be allowed, and which rule decides.

    The same engine that programs the kernel answers, on both sides: the source's egress and the
    destination's ingress.
    """
    port, protocol = refs.port(dport)
    if policies:
        shape = offline.trace(
            src=src,
            dst=dst,
            port=port,
            protocol=protocol,
            paths=policies,
            mode=mode,
            namespace=namespace,
        )
    else:
        request = agent_pb2.TraceRequest(
            source=refs.subject(src, namespace),
            destination=refs.subject(dst, namespace),
            port=port,
            protocol=protocol,
        )
        reply = clients.agent(
            settings, lambda agent: agent.policy.Trace(request, timeout=agent.timeout_s)
        )
        shape = shapes.trace(reply)
    if settings.json:
        render.json(shape)
    else:
        _show_trace(settings, shape, src, dst, port, protocol)
    if exit_code and shape["verdict"] != "allowed":
        raise SystemExit(int(Exit.FAILED))


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
                    render.line(settings, f"  {word} by {shapes.rule_text(rule)}")
    final = shape["verdict"].upper()
    render.line(settings, "")
    render.line(
        settings, "Final verdict: ", (final, "bold green" if final == "ALLOWED" else "bold red")
    )
