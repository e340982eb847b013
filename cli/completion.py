"""`cilia completion`: click's own completion scripts."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from cli.errors import CliError
from cli.settings import Command, examples


@click.command(
    "completion",
    cls=Command,
    epilog=examples("""
eval "$(cilia completion bash)"
cilia completion zsh > "${fpath[1]}/_cilia"
cilia completion fish > ~/.config/fish/completions/cilia.fish
"""),
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell."""
    found = get_completion_class(shell)
    if found is None:
        raise CliError(f"no completion for {shell}")
    root = ctx.find_root().command
    complete = found(root, {}, "cilia", "_CILIA_COMPLETE")
    # Not complete.source(): it starts the shell to check its version, and warns when the
    # script is made on a machine that has not got that shell.
    click.echo(complete.source_template % complete.source_vars())
