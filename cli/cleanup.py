"""`cilia cleanup`: no trace of us left on the host."""

from __future__ import annotations

import click

from cli.errors import CliError
from cli.settings import Command, Settings, examples, pass_settings


@click.command("cleanup", cls=Command, epilog=examples("cilia cleanup -f"))
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@pass_settings
def cleanup(settings: Settings, force: bool) -> None:
    """Remove every trace of Cilia from this host."""
    del settings, force
    raise CliError("not built yet")
