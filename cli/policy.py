"""`cilia policy`: where each verb lives, and the options that several have."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import click

from cli.settings import LazyGroup

VERBS = {
    "apply": ("cli.policy_store:apply", "Store policies and enforce them."),
    "get": ("cli.policy_store:get", "List policies, or show the documents named."),
    "confirm": ("cli.policy_store:confirm", "Keep policies that isolate a node."),
    "delete": ("cli.policy_store:delete", "Delete policies: what they allowed is cut."),
    "validate": ("cli.policy_validate:validate", "Check policy files."),
    "schema": ("cli.policy_schema:schema", "JSON Schema or CRDs of policy documents."),
    "trace": ("cli.policy_trace:trace", "Would a connection be allowed, and by which rule?"),
    "diff": ("cli.policy_diff:diff", "Which connections two sets of policies decide differently."),
    "whatif": ("cli.policy_diff:whatif", "Which connections would change with other policies."),
    "test": ("cli.policy_test:test", "Does policy allow and deny what a table says?"),
    "lint": ("cli.policy_lint:lint", "What policies probably do not mean."),
    "audit-kernel": ("cli.policy_audit:audit_kernel", "Does the kernel do what policy says?"),
    "matrix": ("cli.policy_matrix:matrix", "Who may talk to whom on what."),
}

namespace_option = click.option(
    "-n",
    "--namespace",
    default="default",
    show_default=True,
    help="Namespace of documents that name none.",
)
policies_option = click.option(
    "--policies",
    multiple=True,
    type=click.Path(),
    metavar="FILE|DIR",
    help="Ask these files instead of the agent.",
)
endpoints_option = click.option(
    "--endpoints",
    type=click.Path(),
    metavar="FILE",
    help="The endpoints to ask about, YAML or JSON (docs/cli.md), instead of the agent's.",
)
enforcement_option = click.option(
    "--enforcement",
    type=click.Choice(["default", "always", "never"]),
    help="Enforcement mode.  [default: the agent's; of files: default]",
)


F = TypeVar("F", bound=Callable[..., None])


def request_options(command: F) -> F:
    """--method, --path, --host and --header: an HTTP request to ask about."""
    for option in (
        click.option("--header", multiple=True, metavar="'NAME: VALUE'", help="Its headers."),
        click.option("--host", default="", help="Its host."),
        click.option("--path", default="", help="Its path."),
        click.option("--method", default="", help="Ask about an HTTP request: its method."),
    ):
        command = option(command)
    return command


@click.group(cls=LazyGroup, lazy=VERBS)
def policy() -> None:
    """Policies: NetworkPolicy, CiliumNetworkPolicy, CiliumClusterwideNetworkPolicy, or rules.

    YAML or JSON. All or nothing: an invalid document changes nothing, and every fault is reported
    with its file, line and field.
    """
