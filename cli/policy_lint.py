"""`cilia policy lint`: what is legal and probably not meant."""

from __future__ import annotations

import click

from cilia.policy.lint import lint as find
from cli import asked, documents, render
from cli.errors import Exit
from cli.policy import endpoints_option, namespace_option
from cli.settings import Command, Settings, examples, pass_settings


@click.command(
    "lint",
    cls=Command,
    epilog=examples("""
cilia policy lint policies/
cilia policy lint policies/ --endpoints endpoints.yaml
"""),
)
@click.argument("file", nargs=-1, required=True, type=click.Path(), metavar="FILE|DIR|-...")
@endpoints_option
@namespace_option
@pass_settings
def lint(settings: Settings, file: tuple[str, ...], endpoints: str | None, namespace: str) -> None:
    """Warn of what policies probably do not mean. Needs no service.

    With --endpoints also of selectors that select none of them. Exit code 1 when there is something
    to say, 4 when a document is invalid.
    """
    checked = documents.check(documents.read(file), default_namespace=namespace)
    if checked.faults:
        raise documents.invalid(checked.faults, changed_nothing=False)
    labels = None
    if endpoints is not None:
        labels = {x.ref: x.labels for x in asked.read_inventory(endpoints).endpoints}
    warnings = sorted(
        {*checked.warnings, *map(documents.fault_line, find(checked.documents, labels))},
        key=lambda x: (x.source, x.line, x.column, x.path, x.message),
    )
    if settings.json:
        render.json({"warnings": [x.shape() for x in warnings]})
    else:
        for warning in warnings:
            click.echo(warning.text())
        many = render.count(len(checked.documents), "document")
        if not warnings:
            render.line(settings, f"Nothing to say about {many}.")
    if warnings:
        raise SystemExit(int(Exit.FAILED))
