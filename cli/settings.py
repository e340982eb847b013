"""The global options, and the base classes that give every command `-o` and lazy loading."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from cli.errors import CliError

DEFAULT_RUN_DIR = Path("/run/cilia")
DEFAULT_STATE_DIR = Path("/var/lib/cilia")


@dataclass(slots=True)
class Settings:
    """What the global options said. `timeout_s` bounds each call, streams excepted."""

    agent_socket: str
    identity_socket: str
    xds_socket: str = str(DEFAULT_RUN_DIR / "xds.sock")
    output: str = "table"
    color: bool = True
    timeout_s: float = 30.0
    timeout_given: bool = False

    @property
    def json(self) -> bool:
        """True when a program reads the output."""
        return self.output == "json"


def socket_path(text: str) -> str:
    """A unix socket's path, also when it is written as gRPC writes it: unix:///path."""
    return text.removeprefix("unix://") if text.startswith("unix:///") else text


def default_agent_socket() -> str:
    """CILIA_AGENT_SOCK, else the agent's default."""
    return os.environ.get("CILIA_AGENT_SOCK") or str(DEFAULT_RUN_DIR / "agent.sock")


def default_identity_socket() -> str:
    """CILIA_IDENTITY_SOCK, else the identity service's default."""
    return os.environ.get("CILIA_IDENTITY_SOCK") or str(DEFAULT_RUN_DIR / "identity.sock")


def default_xds_socket() -> str:
    """CILIA_XDS_SOCK, else the xDS service's default."""
    return os.environ.get("CILIA_XDS_SOCK") or str(DEFAULT_RUN_DIR / "xds.sock")


pass_settings = click.make_pass_decorator(Settings)


def _set_output(ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
    if value is not None and isinstance(ctx.find_root().obj, Settings):
        ctx.find_root().obj.output = value


class Command(click.Command):
    """A leaf command. `-o json` works after it as well as before it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not any("-o" in p.opts for p in self.params):
            self.params.append(
                click.Option(
                    ["-o", "--output", "_output"],
                    type=click.Choice(["table", "json"]),
                    expose_value=False,
                    callback=_set_output,
                    help="Table for people (the default) or JSON for programs.",
                )
            )


class Group(click.Group):
    """A noun. Its verbs are `Command`s."""

    command_class = Command


class LazyGroup(Group):
    """The root: a noun's module is imported when it is asked for, so `cilia version` is quick."""

    def __init__(self, *args: Any, lazy: dict[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lazy = lazy

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CliError as error:
            # Shown when the context is gone; how to show it is known here.
            error.as_json = isinstance(ctx.obj, Settings) and ctx.obj.json
            raise
        except OSError as error:
            if error.errno != errno.EPIPE:
                raise
            # The reader (`| head`) went away: that is its right, and no failure of ours.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise click.exceptions.Exit(0) from None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.exceptions.NoSuchCommand as error:
            # click knows only those that are imported; this one names those that are not, too.
            raise click.exceptions.NoSuchCommand(
                error.command_name, possibilities=self._lazy, ctx=ctx
            ) from None

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        where = self._lazy.get(cmd_name)
        if where is None:
            return None
        module, attribute = where[0].split(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self._lazy.items()])


def examples(text: str) -> str:
    """An epilog of examples that click shows line by line instead of as one paragraph."""
    paragraphs = text.strip("\n").split("\n\n")
    shown = ["\n".join(f"  {line}" for line in part.splitlines()) for part in paragraphs]
    return "\b\nExamples:\n" + "\n\n\b\n".join(shown)
