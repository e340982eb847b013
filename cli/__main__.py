"""`python -m cli` and the console script `cilia`."""

from __future__ import annotations

import os
import sys

# The command starts processes (`lab`, `completion`) while channels may be open; gRPC's fork
# handlers would only complain about that. Read by grpc at import, so it comes first.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

from cli.root import cli


def main() -> None:
    """Run the command. Exit codes are those of cli.errors.Exit; 130 after Ctrl-C."""
    try:
        cli(prog_name="cilia")
    except BrokenPipeError:
        # The reader (`| head`) went away: that is its right. Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


if __name__ == "__main__":
    main()
