"""`cilia why`: why a connection is allowed or denied, and what would change that."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from cilia.policy.questions.judge import Answer, Question, ask
from cilia.policy.questions.misses import Miss, near_misses
from cilia.policy.questions.repair import Proposal, propose
from cilia.policy.questions.scene import Scene
from cli import asked, ends, render
from cli.errors import CliError, Exit
from cli.policy import (
    endpoints_option,
    enforcement_option,
    namespace_option,
    policies_option,
    request_options,
)
from cli.settings import Command, Settings, examples, pass_settings

MAX_MISSES = 5
MAX_FLOW_BYTES = 1 << 20


ALL_PORTS = "0/ANY"


@click.command(
    "why",
    cls=Command,
    epilog=examples("""
cilia why xwing deathstar-1 --dport 80/tcp
cilia monitor --denied -o json -n 1 | cilia why
cilia why xwing deathstar-1 -o yaml | cilia policy apply -
cilia why app=web 192.0.2.1 --dport 443/tcp --policies policies/ --endpoints endpoints.yaml
"""),
)
@click.argument("who", nargs=-1, metavar="[FLOW | SRC DST]")
@click.option(
    "-p",
    "--dport",
    "dport",
    default=ALL_PORTS,
    metavar="PORT[/PROTOCOL]",
    help="Destination port, for example 80/tcp; of ICMP the type. Without it all ports are asked "
    "about: allowed when each of them is.",
)
@request_options
@policies_option
@endpoints_option
@enforcement_option
@namespace_option
@click.option(
    "--write-edit",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Write the edited policy, complete, to a file.",
)
@click.option(
    "-o",
    "--output",
    "output",
    type=click.Choice(["table", "json", "yaml"]),
    help="For people (the default), JSON for programs, or the edited policy as YAML.",
)
@pass_settings
def why(
    settings: Settings,
    who: tuple[str, ...],
    dport: str,
    method: str,
    path: str,
    host: str,
    header: tuple[str, ...],
    policies: tuple[str, ...],
    endpoints: str | None,
    enforcement: str | None,
    namespace: str,
    write_edit: str | None,
    output: str | None,
) -> None:
    """Explain a verdict: what isolates, which rules nearly allow it, and the smallest edit.

    FLOW is one JSON object as `cilia monitor -o json` and `cilia flows observe -o json` print it,
    here or on standard input. SRC and DST are endpoints, addresses, reserved identities
    (reserved:host) or labels (app=web,tier=front). Exit code 0 when allowed, 1 when denied.
    """
    if output == "json":
        settings.output = "json"
    question_of = _reader(who, dport, method, path, host, header, namespace)
    about = asked.load(
        settings,
        policies=policies,
        endpoints=endpoints,
        enforcement=enforcement,
        namespace=namespace,
        need_endpoints=False,
    )
    scene = about.scene()
    question = question_of(scene)
    answer = ask(scene, question)
    proposal = None
    if not answer.allowed:
        proposal = propose(about.documents, about.texts, about.inventory, question, make=about.make)
    if write_edit is not None and proposal is not None:
        _write(write_edit, proposal)
    misses = {x.egress: near_misses(scene, question, x.egress) for x in answer.denials}
    match output or settings.output:
        case "json":
            render.json(shape(answer, misses, proposal))
        case "yaml":
            _yaml(answer, proposal)
        case _:
            _show(settings, answer, misses, proposal)
    if write_edit is not None:
        _say_written(write_edit, answer, proposal)
    if not answer.allowed:
        if len(who) == 2 and dport == ALL_PORTS:
            render.warn("All ports were asked about; --dport asks about one.")
        raise SystemExit(int(Exit.FAILED))


def _reader(
    who: tuple[str, ...],
    dport: str,
    method: str,
    path: str,
    host: str,
    header: tuple[str, ...],
    namespace: str,
) -> Any:
    """What makes the question, once there is a scene to find its ends in."""
    if len(who) == 2:
        proto, port = ends.port(dport)
        request = ends.request(method, path, host, header)

        def of_words(scene: Scene) -> Question:
            return Question(
                src=ends.end(scene, who[:1], namespace),
                dst=ends.end(scene, who[1:], namespace),
                proto=proto,
                port=port,
                request=request,
            )

        return of_words
    if len(who) > 2:
        raise click.UsageError("give one flow, or a source and a destination")
    text = who[0] if who else "-"
    if text == "-":
        if not who and sys.stdin.isatty():
            raise click.UsageError("give a source and a destination, or a flow on standard input")
        text = next((x for x in sys.stdin.read(MAX_FLOW_BYTES).splitlines() if x.strip()), "")
    if not text:
        raise click.UsageError(
            "give a source and a destination, or a flow on standard input, which is empty"
        )
    if not text.lstrip().startswith("{"):
        raise click.UsageError(
            "one word is no question: give a source and a destination, or a flow as JSON"
        )
    return lambda scene: ends.flow(scene, text)


# ---- answers


def _miss_shape(miss: Miss) -> dict[str, Any]:
    return {
        "rule": asked.rule_shape(miss.rule),
        "distance": miss.distance,
        "failed": [{"condition": x.condition, "text": x.text} for x in miss.failures],
    }


def shape(
    answer: Answer, misses: dict[bool, list[Miss]], proposal: Proposal | None
) -> dict[str, Any]:
    """The documented form of an answer."""
    return {
        "verdict": "allowed" if answer.allowed else "denied",
        "source": answer.question.src.name,
        "destination": answer.question.dst.name,
        "what": answer.question.what,
        "egress": asked.judged_shape(answer.egress),
        "ingress": asked.judged_shape(answer.ingress),
        "denials": [
            {
                "direction": "egress" if x.egress else "ingress",
                "cause": x.cause,
                "endpoint": x.subject.name,
                "default_deny": [asked.rule_shape(y) for y in x.default_deny],
                "denied_by": [asked.rule_shape(y) for y in x.rules] if x.cause == "deny" else [],
                "near_misses": [_miss_shape(y) for y in misses[x.egress][:MAX_MISSES]],
            }
            for x in answer.denials
        ],
        "edit": _edit_shape(proposal) if proposal is not None else None,
    }


def _edit_shape(proposal: Proposal) -> dict[str, Any]:
    return {
        "steps": [
            {
                "policy": x.document.ref,
                "file": x.document.origin.source,
                "line": x.line,
                "path": x.op.path_text,
                "action": "create" if x.new else x.op.action,
                "value": x.op.value,
                "yaml": x.yaml or None,
            }
            for x in proposal.steps
        ],
        "patch": "".join(x.patch for x in proposal.changed),
        "documents": [
            {"policy": document.ref, "file": document.origin.source, "text": text}
            for document, text in proposal.edited
        ],
        "also_allows": list(proposal.also),
    }


def _text(proposal: Proposal) -> str:
    return "---\n".join(text for _, text in proposal.edited)


def _yaml(answer: Answer, proposal: Proposal | None) -> None:
    if answer.allowed:
        render.warn("It is allowed: there is nothing to edit.")
    elif proposal is None:
        raise CliError("no edit was found that would allow it")
    else:
        sys.stdout.write(_text(proposal))


def _write(name: str, proposal: Proposal) -> None:
    path = Path(name)
    text = _text(proposal)
    for changed in proposal.changed:
        source = Path(changed.source)
        if source.exists() and path.exists() and source.samefile(path):
            text = changed.after  # the file itself: its other documents stay
    try:
        path.write_text(text)
    except OSError as error:
        raise CliError(f"cannot write {name}: {error.strerror}") from error


def _say_written(name: str, answer: Answer, proposal: Proposal | None) -> None:
    if answer.allowed:
        render.warn("It is allowed: there is nothing to edit, and nothing was written.")
    elif proposal is None:
        render.warn("No edit was found that would allow it; nothing was written.")
    else:
        render.warn(f"Wrote {name}.")


def _show(
    settings: Settings,
    answer: Answer,
    misses: dict[bool, list[Miss]],
    proposal: Proposal | None,
) -> None:
    question = answer.question
    verdict = ("ALLOWED", "bold green") if answer.allowed else ("DENIED", "bold red")
    render.line(
        settings, f"{question.src.name} to {question.dst.name} on {question.what}: ", verdict
    )
    for judged, title in ((answer.egress, "Egress of"), (answer.ingress, "Ingress of")):
        style = "green" if judged.allowed else "bold red"
        word = "allowed" if judged.allowed else "denied"
        render.line(settings, "")
        render.line(settings, f"{title} {judged.subject.name}: ", (word, style))
        reason = judged.reason.removeprefix(
            f"{question.src.name} to {question.dst.name} on {question.what}: "
        )
        render.line(settings, f"  {reason[:1].upper()}{reason[1:]}")
        if judged.allowed:
            continue
        near = misses[judged.egress][:MAX_MISSES]
        if near and judged.cause != "deny":
            render.line(settings, "  Nearest rules:")
            for miss in near:
                render.line(settings, f"    {miss.rule}:")
                for failure in miss.failures:
                    render.line(settings, f"      {failure.text}")
    if answer.allowed:
        return
    render.line(settings, "")
    if proposal is None:
        render.line(settings, "No edit was found that would allow it.")
        return
    steps = proposal.steps
    where = ", ".join(
        f"a new policy {x.document.ref}"
        if x.new
        else f"{x.op.path_text} of {x.document.ref} ({x.document.origin.source}:{x.line})"
        for x in steps
    )
    render.line(settings, f"The smallest edit that allows it: {where}")
    for changed in proposal.changed:
        for line in changed.patch.splitlines():
            style = {"+": "green", "-": "red"}.get(line[:1], "dim")
            render.line(settings, ("  " + line, style))
    if proposal.also:
        render.line(settings, f"It allows these too: {'; '.join(proposal.also[:10])}")
    else:
        render.line(settings, "Of what is known here, it allows nothing else.")
