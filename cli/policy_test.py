"""`cilia policy test`: a table of expectations, asked of the engine, the kernel or a lab."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from cilia.policy import RuleRef
from cilia.policy.questions.expectations import (
    Expectation,
    Table,
    TableError,
    names_rule,
    parse_table,
)
from cilia.policy.questions.inventory import Inventory
from cilia.policy.questions.judge import Question, ask
from cilia.policy.questions.scene import Scene
from cli import asked, documents, ends, render
from cli.errors import CliError, Exit
from cli.policy import endpoints_option, enforcement_option, namespace_option, policies_option
from cli.settings import Command, Settings, examples, pass_settings

LEVELS = ("engine", "kernel", "live")


@dataclass(frozen=True, slots=True)
class Result:
    """What one expectation met. `seen` is allow, deny or unknown."""

    expectation: Expectation
    question: Question
    seen: str
    rules: tuple[RuleRef, ...]
    detail: str

    @property
    def tried(self) -> bool:
        """Whether there is an answer at all: a lab cannot try everything."""
        return self.seen != "unknown"

    @property
    def passed(self) -> bool:
        wanted = "allow" if self.expectation.allow else "deny"
        return self.seen == wanted and not self.wrong_rule

    @property
    def wrong_rule(self) -> bool:
        """Whether other rules decided than the one named. Connections alone do not tell."""
        wanted = self.expectation.rule
        return bool(wanted and self.rules) and not any(names_rule(wanted, x) for x in self.rules)

    def shape(self) -> dict[str, Any]:
        """The documented form."""
        return {
            "name": self.expectation.name,
            "file": self.expectation.origin.source,
            "line": self.expectation.origin.line,
            "from": self.question.src.name,
            "to": self.question.dst.name,
            "what": self.question.what,
            "expected": "allow" if self.expectation.allow else "deny",
            "seen": self.seen,
            "passed": self.passed if self.tried else None,
            "rules": [f"{x.policy} {x.path}" for x in self.rules],
            "detail": self.detail,
        }


@click.command(
    "test",
    cls=Command,
    epilog=examples("""
cilia policy test examples/expectations/star-wars.yaml
sudo cilia policy test examples/expectations/star-wars.yaml --level kernel
sudo cilia policy test examples/expectations/star-wars.yaml --level live --lab star-wars
"""),
)
@click.argument("file", type=click.Path())
@click.option(
    "--level",
    type=click.Choice(LEVELS),
    default="engine",
    show_default=True,
    help="Ask the engine, the compiled programs, or a lab by real connections.",
)
@click.option("--lab", "lab_name", metavar="NAME", help="The lab, with --level live.")
@policies_option
@endpoints_option
@enforcement_option
@namespace_option
@pass_settings
def test(
    settings: Settings,
    file: str,
    level: str,
    lab_name: str | None,
    policies: tuple[str, ...],
    endpoints: str | None,
    enforcement: str | None,
    namespace: str,
) -> None:
    """Check that policies allow and deny what a table says.

    One file, three levels: the policy engine (no service, no root); the programs that judge
    packets, loaded for the test and run in the kernel (root); connections between the workloads of
    a lab that is up, under the policies in force there (root). Exit code 0 when every expectation
    that could be tried held, 1 when one did not, or none could be tried.
    """
    table = _table(file)
    about = _about(settings, file, table, level, policies, endpoints, enforcement, namespace)
    scene = about.scene()
    questions = [(x, _question(scene, x, namespace)) for x in table.tests]
    match level:
        case "kernel":
            results = _by_kernel(scene, questions)
        case "live":
            results = _by_connections(settings, lab_name, questions)
        case _:
            results = [_by_engine(scene, x, question) for x, question in questions]
    _say(settings, level, results)
    tried = [x for x in results if x.tried]
    if (results and not tried) or not all(x.passed for x in tried):
        raise SystemExit(int(Exit.FAILED))


def _table(file: str) -> Table:
    source = documents.read([file])[0]
    try:
        return parse_table(source.text, source=source.name)
    except TableError as error:
        faults = [documents.fault_line(x) for x in error.faults]
        raise CliError(
            f"invalid expectations: {render.count(len(faults), 'fault')}",
            code=Exit.INVALID,
            faults=faults,
        ) from error


def _about(
    settings: Settings,
    file: str,
    table: Table,
    level: str,
    policies: Sequence[str],
    endpoints: str | None,
    enforcement: str | None,
    namespace: str,
) -> asked.Asked:
    """What options name, else what the file names, else what the agent has."""
    base = Path(file).parent
    mode = enforcement or (table.mode if table.policies else None)
    if level == "live":
        return asked.load(
            settings, policies=(), endpoints=None, enforcement=None, namespace=namespace
        )
    paths = list(policies) or [str(base / x) for x in table.policies]
    inventory: Inventory | None = None
    if endpoints is None:
        if isinstance(table.endpoints, str):
            endpoints = str(base / table.endpoints)
        else:
            inventory = table.endpoints
    if not paths:
        found = asked.load(
            settings, policies=(), endpoints=endpoints, enforcement=mode, namespace=namespace
        )
    else:
        found = asked.load(
            settings,
            policies=paths,
            endpoints=endpoints,
            enforcement=mode,
            namespace=namespace,
            need_endpoints=False,
        )
    return found if inventory is None else found.about(inventory)


def _question(scene: Scene, x: Expectation, namespace: str) -> Question:
    try:
        return Question(
            src=ends.end(scene, x.src, namespace),
            dst=ends.end(scene, x.dst, namespace),
            proto=x.proto,
            port=x.port,
            request=x.request,
        )
    except CliError as error:
        raise CliError(
            f"{x.origin}: {x.name}: {error.message}", code=error.code, hint=error.hint
        ) from error


def _by_engine(scene: Scene, x: Expectation, question: Question) -> Result:
    answer = ask(scene, question)
    deciding = answer.denials or (answer.egress, answer.ingress)
    rules = tuple(
        rule
        for judged in deciding
        for rule in (judged.rules or judged.default_deny if answer.denials else judged.rules)
    )
    seen = "allow" if answer.allowed else "deny"
    return Result(x, question, seen, rules, " ".join(judged.reason for judged in deciding))


def _by_kernel(scene: Scene, questions: list[tuple[Expectation, Question]]) -> list[Result]:
    from cli.policy_kernel import KernelPolicies  # libbpf: needed only here

    results = []
    with KernelPolicies(scene) as kernel:
        for x, question in questions:
            allowed, ids = kernel.answer(question)
            known = (scene.engine.repository.ids.get(i) for i in ids)
            rules = tuple(rule for rule in known if rule is not None)
            if not allowed and not rules:
                rules = tuple(r for y in ask(scene, question).denials for r in y.default_deny)
            detail = f"the kernel says {'allow' if allowed else 'deny'}"
            results.append(Result(x, question, "allow" if allowed else "deny", rules, detail))
    return results


def _by_connections(
    settings: Settings, lab_name: str | None, questions: list[tuple[Expectation, Question]]
) -> list[Result]:
    from cli.policy_live import LiveConnections  # the lab: needed only here

    live = LiveConnections(lab_name, settings.agent_socket)
    words: Callable[[bool | None], str] = {
        True: "allow",
        False: "deny",
        None: "unknown",
    }.__getitem__
    found = live.try_all([question for _, question in questions])
    return [
        Result(x, question, words(seen.allowed), (), seen.detail)
        for (x, question), seen in zip(questions, found, strict=True)
    ]


def _say(settings: Settings, level: str, results: list[Result]) -> None:
    passed = sum(x.passed for x in results)
    untried = sum(not x.tried for x in results)
    if settings.json:
        render.json(
            {
                "level": level,
                "passed": passed,
                "failed": len(results) - passed - untried,
                "untried": untried,
                "tests": [x.shape() for x in results],
            }
        )
        return
    for x in results:
        mark = ("ok    ", "green") if x.passed else ("FAILED", "bold red")
        if not x.tried:
            mark = ("-     ", "yellow")
        what = f"{x.question.src.name} to {x.question.dst.name} on {x.question.what}"
        render.line(settings, mark, f"  {x.expectation.name}: {what}: {x.seen}")
        if x.passed:
            continue
        wanted = "allow" if x.expectation.allow else "deny"
        if not x.tried:
            render.line(settings, f"        not tried: {x.detail}")
        elif x.seen != wanted:
            render.line(settings, f"        expected {wanted} ({x.expectation.origin}): {x.detail}")
        elif x.wrong_rule:
            by = ", ".join(f"{r.policy} {r.path}" for r in x.rules)
            render.line(
                settings,
                f"        expected by {x.expectation.rule} ({x.expectation.origin}), not by {by}",
            )
    more = f", {untried} could not be tried" if untried else ""
    render.line(settings, f"{passed} of {len(results)} expectations held{more} (level {level})")
