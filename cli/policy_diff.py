"""`cilia policy diff` and `whatif`: which connections change, whatever the texts."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import click

from cilia.policy import Document
from cilia.policy.questions.difference import Difference, Flip
from cilia.policy.questions.inventory import Inventory
from cilia.policy.questions.judge import ask
from cilia.policy.questions.sample import is_repeat, sample
from cli import asked, documents, ends, render
from cli.errors import CliError, Exit
from cli.policy import endpoints_option, enforcement_option, namespace_option, policies_option
from cli.policy_matrix import joined
from cli.settings import Command, Settings, examples, pass_settings

MAX_FLOWS = 1_000_000
SIGNS = {"opens": ("+", "green"), "closes": ("-", "red"), "requests": ("~", "yellow")}


@click.command(
    "diff",
    cls=Command,
    epilog=examples("""
cilia policy diff policies/old policies/new
cilia policy diff a.yaml b.yaml --endpoints endpoints.yaml -o json
"""),
)
@click.argument("before", metavar="A", type=click.Path())
@click.argument("after", metavar="B", type=click.Path())
@endpoints_option
@enforcement_option
@namespace_option
@pass_settings
def diff(
    settings: Settings,
    before: str,
    after: str,
    endpoints: str | None,
    enforcement: str | None,
    namespace: str,
) -> None:
    """Show which connections two sets of policies decide differently.

    Texts that differ and decide alike are equal. Needs no service. Without --endpoints, endpoints
    are made from what the policies speak of. Exit code 0 when equal, 1 when not.
    """
    one = asked.read_documents([before], namespace)
    other = asked.read_documents([after], namespace)
    inventory, origin = _inventory(endpoints, (*one, *other))
    mode = asked.MODES.get(enforcement or "", "default")
    about = asked.Asked(one, inventory, mode, live=False)
    _answer(settings, Difference(one, other, inventory, make=about.make), inventory, origin, None)


@click.command(
    "whatif",
    cls=Command,
    epilog=examples("""
cilia policy whatif new-policy.yaml
cilia policy whatif --delete old-policy.yaml
cilia policy whatif new.yaml --policies policies/ --endpoints endpoints.yaml
cilia flows observe -o json --last 10000 | cilia policy whatif new.yaml --flows -
"""),
)
@click.argument("file", nargs=-1, required=True, type=click.Path(), metavar="FILE|DIR...")
@click.option("--delete", is_flag=True, help="What if these policies were deleted?")
@click.option(
    "--flows",
    type=click.Path(allow_dash=True),
    metavar="FILE|-",
    help="Recorded flows, one JSON object a line: which of them would fare otherwise?",
)
@policies_option
@endpoints_option
@enforcement_option
@namespace_option
@pass_settings
def whatif(
    settings: Settings,
    file: tuple[str, ...],
    delete: bool,
    flows: str | None,
    policies: tuple[str, ...],
    endpoints: str | None,
    enforcement: str | None,
    namespace: str,
) -> None:
    """Show which connections would change if policies were applied. Changes nothing.

    Against the agent's policies and endpoints, or with --policies against those of files. Exit code
    0 when nothing would change, 1 when something would.
    """
    new = asked.read_documents(file, namespace)
    now = asked.load(
        settings,
        policies=policies,
        endpoints=endpoints,
        enforcement=enforcement,
        namespace=namespace,
        need_endpoints=False,
    )
    keys = {x.key for x in new}
    after = tuple(x for x in now.documents if x.key not in keys) + (() if delete else new)
    inventory, origin = now.inventory, "live" if now.live else "given"
    if not now.live and endpoints is None:
        inventory, origin = _inventory(None, (*now.documents, *new))
    found = Difference(now.documents, after, inventory, make=now.make)
    recorded = _recorded(found, flows) if flows is not None else None
    _answer(settings, found, inventory, origin, recorded)


def _inventory(path: str | None, given: Sequence[Document]) -> tuple[Inventory, str]:
    if path is not None:
        return asked.read_inventory(path), "given"
    return sample(given), "sampled"


def _recorded(difference: Difference, path: str) -> list[dict[str, Any]]:
    """Recorded flows that would fare otherwise, alike ones counted together."""
    (source,) = documents.read([path])
    counts: Counter[tuple[str, str, str, str, str]] = Counter()
    for number, line in enumerate(source.text.decode("utf-8", "replace").splitlines(), 1):
        if not line.strip():
            continue
        if number > MAX_FLOWS:
            raise CliError(f"{path} has more than {MAX_FLOWS} flows", code=Exit.INVALID)
        try:
            if _skipped(line):
                continue
            before = ask(difference.before, ends.flow(difference.before, line))
            after = ask(difference.after, ends.flow(difference.after, line))
        except CliError as error:
            raise CliError(f"{path}:{number}: {error.message}", code=Exit.INVALID) from error
        if before.allowed != after.allowed:
            asked_ = before.question
            change = "opens" if after.allowed else "closes"
            worst = (before if after.allowed else after).denials[0]
            counts[change, asked_.src.name, asked_.dst.name, asked_.what, worst.reason] += 1
    return [
        {"change": change, "src": src, "dst": dst, "what": what, "flows": n, "reason": reason}
        for (change, src, dst, what, reason), n in sorted(counts.items())
    ]


def _skipped(line: str) -> bool:
    """Lines of a stream that are about no connection: losses, agent notifications, replies."""
    try:
        value = json.loads(line)
    except ValueError:
        return False
    if not isinstance(value, dict):
        return False
    inner = value.get("flow", value)
    if not isinstance(inner, dict) or "source" not in inner:
        return "flow" not in value and value.get("type") in ("agent", "lost", None)
    return bool(inner.get("is_reply") or inner.get("reply"))


def _answer(
    settings: Settings,
    difference: Difference,
    inventory: Inventory,
    origin: str,
    recorded: list[dict[str, Any]] | None,
) -> None:
    flips = [x for x in difference.flips() if origin != "sampled" or not is_repeat(x.src, x.dst)]
    equal = not flips and not recorded
    if settings.json:
        render.json(
            {
                "equal": equal,
                "endpoints": {"count": len(inventory.endpoints), "origin": origin},
                "changes": [x.shape() for x in flips],
                "flows": recorded,
            }
        )
    else:
        _show(settings, flips)
        if recorded is not None:
            _show_recorded(settings, recorded)
        many = render.count(len(inventory.endpoints), "endpoint")
        how = {"sampled": "made from the policies", "given": "given", "live": "of the agent"}
        if equal:
            render.line(settings, f"No connection changes ({many} {how[origin]}).")
        else:
            counts = Counter(x.kind for x in flips)
            told = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))
            render.line(settings, f"Rows: {told or 'none'} ({many} {how[origin]}).")
    if not equal:
        raise SystemExit(int(Exit.FAILED))


def _show(settings: Settings, flips: list[Flip]) -> None:
    for (src, dst, kind), group in itertools.groupby(flips, key=lambda x: (x.src, x.dst, x.kind)):
        sign, style = SIGNS[kind]
        for protocol, numbers, condition in joined(src, dst, [_cells(flip) for flip in group]):
            text = f"{sign} {src} to {dst}: {protocol} {numbers}{condition}"
            render.line(settings, (text, style))


def _cells(flip: Flip) -> tuple[str, str, str]:
    shape = flip.shape()
    condition = "".join(
        f" ({word}: {json.dumps(shape[key], ensure_ascii=False)})"
        for key, word in (("l7_before", "before"), ("l7", "requests"))
        if key in shape
    )
    return shape["protocol"], shape.get("ports") or shape["types"], condition


def _show_recorded(settings: Settings, recorded: list[dict[str, Any]]) -> None:
    for item in recorded:
        sign, style = SIGNS[item["change"]]
        many = render.count(item["flows"], "recorded flow")
        text = f"{sign} {many}: {item['src']} to {item['dst']} on {item['what']}"
        render.line(settings, (text, style))
    if not recorded:
        render.line(settings, "No recorded flow would fare otherwise.")
