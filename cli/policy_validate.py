"""`cilia policy validate`: what is wrong with policy files, without any service."""

from __future__ import annotations

import click

from cli import documents, render
from cli.errors import Exit
from cli.policy import namespace_option
from cli.settings import Command, Settings, examples, pass_settings


@click.command(
    "validate",
    cls=Command,
    epilog=examples("""
cilia policy validate policies/
cat policy.yaml | cilia policy validate - -o json
"""),
)
@click.argument("file", nargs=-1, required=True, type=click.Path(), metavar="FILE|DIR|-...")
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
