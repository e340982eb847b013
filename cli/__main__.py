"""`python -m cli` and the console script `cilia`."""

from __future__ import annotations

import os
import signal
import sys
from itertools import pairwise

# The command starts processes (`lab`, `completion`) while channels may be open; gRPC's fork
# handlers would only complain about that. Read by grpc at import, so it comes first.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
# Until something is under way that may be interrupted in order, Ctrl-C just ends us: importing
# takes longer than some commands, and a traceback of it tells nobody anything.
_on_interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)

import click  # noqa: E402  # after what it must not run without

from cli.errors import CliError, Exit  # noqa: E402  # likewise
from cli.root import cli  # noqa: E402  # likewise

INTERRUPTED = 128 + signal.SIGINT


def main() -> None:
    """Run the command. Exit codes are those of cli.errors.Exit; 130 after Ctrl-C."""
    signal.signal(signal.SIGINT, _on_interrupt)
    try:
        try:
            code = cli.main(prog_name="cilia", standalone_mode=False)
            sys.stdout.flush()
        except click.exceptions.Abort as error:
            if isinstance(error.__cause__, KeyboardInterrupt):
                click.echo("Interrupted.", err=True)
                sys.exit(INTERRUPTED)
            click.echo("Aborted: nothing was answered.", err=True)
            sys.exit(int(Exit.FAILED))
        except click.UsageError as error:
            if not wants_json(sys.argv[1:]):
                error.show()
                sys.exit(error.exit_code)
            told = CliError(error.format_message(), code=Exit.USAGE, hint=_help_of(error))
            told.as_json = True
            told.show()
            sys.exit(int(Exit.USAGE))
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        sys.exit(code if isinstance(code, int) else 0)
    except BrokenPipeError:
        # The reader (`| head`) went away: that is its right. Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def wants_json(arguments: list[str]) -> bool:
    """Whether `-o json` is in a command line that could not be understood."""
    words = arguments[: arguments.index("--")] if "--" in arguments else arguments
    pairs = pairwise(words)
    return any(x in ("-ojson", "--output=json") for x in words) or any(
        flag in ("-o", "--output") and value == "json" for flag, value in pairs
    )


def _help_of(error: click.UsageError) -> str:
    return f"See `{error.ctx.command_path} --help`." if error.ctx is not None else ""


if __name__ == "__main__":
    main()
