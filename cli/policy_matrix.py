"""`cilia policy matrix`: who may talk to whom on what."""

from __future__ import annotations

import html
import itertools
import json
import sys
from collections.abc import Iterable, Iterator

import click

from cilia.policy.questions.matrix import Matrix, Name, Row
from cli import asked, render
from cli.policy import endpoints_option, enforcement_option, namespace_option, policies_option
from cli.settings import Command, Settings, examples, pass_settings


@click.command(
    "matrix",
    cls=Command,
    epilog=examples("""
cilia policy matrix
cilia policy matrix --policies examples/policies --endpoints endpoints.yaml -o json
cilia policy matrix --policies policies/ --endpoints endpoints.yaml -o html > matrix.html
"""),
)
@policies_option
@endpoints_option
@enforcement_option
@namespace_option
@click.option(
    "-o",
    "--output",
    "output",
    type=click.Choice(["table", "json", "html"]),
    help="Table for people (the default), JSON for programs, or a page for a browser.",
)
@pass_settings
def matrix(
    settings: Settings,
    policies: tuple[str, ...],
    endpoints: str | None,
    enforcement: str | None,
    namespace: str,
    output: str | None,
) -> None:
    """Show every connection that policy allows, at both of its ends.

    Of the agent's endpoints and policies, or with --policies and --endpoints of files, when no
    service is needed. What is not shown is denied.
    """
    if output == "json":
        settings.output = "json"
    question = asked.load(
        settings,
        policies=policies,
        endpoints=endpoints,
        enforcement=enforcement,
        namespace=namespace,
    )
    answer = Matrix(question.scene())
    if not answer.shared:
        render.warn(
            "warning: policies tell too many prefixes apart: each endpoint has its own split"
        )
    match output or settings.output:
        case "json":
            write_rows(row.shape() for row in answer.rows())
        case "html":
            sys.stdout.write(page(answer))
        case _:
            render.table(
                settings,
                ["SOURCE", "DESTINATION", "PROTOCOL", "PORTS OR TYPES", "L7"],
                lines(answer.rows()),
            )


def write_rows(rows: Iterable[object]) -> None:
    """A JSON list, one row a line: large ones can be read, compared and searched by lines."""
    write = sys.stdout.write
    write("[")
    separator = "\n"
    for row in rows:
        write(separator + json.dumps(row, ensure_ascii=False))
        separator = ",\n"
    write("\n]\n")


def lines(rows: Iterable[Row]) -> Iterator[tuple[str, str, str, str, str]]:
    """For people: of a pair to which everything is open, one line instead of one a protocol."""
    for (src, dst), group in itertools.groupby(rows, key=lambda row: (row.src, row.dst)):
        for cells in joined(src, dst, [what(row) for row in group]):
            yield (shown(src), shown(dst), *cells)


def joined(src: Name, dst: Name, cells: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Protocol, ports and condition of a pair's rows: one row if they are all there is."""
    every = _EVERY[next((x.version for x in (src, dst) if not isinstance(x, str)), 0)]
    return [("ANY", "all", "")] if set(cells) == every else cells


#: What is open between two ends when everything is; of prefixes ICMP is that of the family.
_OPEN = {(name, "1-65535", "") for name in ("TCP", "UDP", "SCTP")}
_EVERY = {
    0: _OPEN | {("ICMP", "0-255", ""), ("ICMPv6", "0-255", "")},
    4: _OPEN | {("ICMP", "0-255", "")},
    6: _OPEN | {("ICMPv6", "0-255", "")},
}


def shown(name: Name) -> str:
    """A party as people read it."""
    return str(name)


def what(row: Row) -> tuple[str, str, str]:
    """Protocol, ports and condition."""
    shape = row.shape()
    return (
        shape["protocol"],
        shape.get("ports") or shape["types"],
        json.dumps(shape["l7"], ensure_ascii=False) if "l7" in shape else "",
    )


_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 1.5rem; color: #1a1a1a; background: #fff }
table { border-collapse: collapse }
th, td { border: 1px solid #ccc; padding: .25rem .5rem; vertical-align: top; text-align: left }
thead th { position: sticky; top: 0; background: #f2f2f2 }
tbody th { position: sticky; left: 0; background: #f2f2f2; font-weight: 600; white-space: nowrap }
td { white-space: pre; background: #eaf6ea }
td.no { background: #fbeaea }
td.all { background: #d3efd3 }
td.self { background: #eee }
"""


def page(answer: Matrix) -> str:
    """One self-contained page: sources down, destinations across."""
    return "".join(_page(answer))


def _page(answer: Matrix) -> Iterator[str]:
    found: dict[tuple[Name, Name], list[str]] = {}
    for row in answer.rows():
        protocol, numbers, condition = what(row)
        note = f" {condition}" if condition else ""
        found.setdefault((row.src, row.dst), []).append(f"{protocol} {numbers}{note}")
    parties = answer.parties
    yield (
        "<!doctype html>\n<html lang=en>\n<meta charset=utf-8>\n<title>Policy matrix</title>\n"
        f"<style>{_STYLE}</style>\n<h1>Who may talk to whom</h1>\n"
        "<p>Sources down, destinations across. What is empty is denied.</p>\n<table>\n<thead><tr>"
        "<th></th>"
    )
    for dst in parties:
        yield f"<th>{html.escape(shown(dst))}</th>"
    yield "</tr></thead>\n<tbody>\n"
    for src in parties:
        yield f"<tr><th>{html.escape(shown(src))}</th>"
        for dst in parties:
            if not answer.asked(src, dst):
                yield "<td class=self></td>"
            elif lines := found.get((src, dst)):
                yield f"<td>{html.escape(chr(10).join(lines))}</td>"
            else:
                yield "<td class=no></td>"
        yield "</tr>\n"
    yield "</tbody>\n</table>\n</html>\n"
