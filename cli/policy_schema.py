"""`cilia policy schema`: what editors and Kubernetes validate policies with."""

from __future__ import annotations

import json

import click

from cli.settings import Command, Settings, examples, pass_settings


@click.command(
    "schema",
    cls=Command,
    epilog=examples("""
cilia policy schema > policy.schema.json
cilia policy schema --format crd | kubectl apply -f -
"""),
)
@click.option(
    "--format",
    "format_",
    type=click.Choice(["jsonschema", "crd"]),
    default="jsonschema",
    show_default=True,
    help="JSON Schema (2020-12), or CustomResourceDefinitions as YAML (-o json: as a List).",
)
@pass_settings
def schema(settings: Settings, format_: str) -> None:
    """Print the schema of policy documents. Needs no agent.

    It says what is structure: fields, types, words and bounds. `cilia policy validate` judges
    the rest too.
    """
    from cilia.policy import manifests

    if format_ == "jsonschema":
        click.echo(json.dumps(manifests.json_schema(), indent=2))
        return
    definitions = manifests.custom_resource_definitions()
    if settings.json:
        items = {"apiVersion": "v1", "kind": "List", "items": list(definitions)}
        click.echo(json.dumps(items, indent=2))
        return
    for index, manifest in enumerate(definitions):
        click.echo(("---\n" if index else "") + manifests.to_yaml(manifest), nl=False)
