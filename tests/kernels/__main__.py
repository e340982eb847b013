"""`python -m tests.kernels`: boots other kernels than this one and checks the datapath on them.

    python -m tests.kernels                          every series, the default checks
    python -m tests.kernels --kernel 6.1             one
    python -m tests.kernels --kernel 6.1 -- ARGS     pytest ARGS in the guest instead
    python -m tests.kernels --kernel 6.1 --command -- uname -a

The exit code is that of the first guest that failed; 77 when one could not be booted for want of
something, which is said.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from tests.kernels import machine, packages

SKIPPED = 77


def main() -> int:
    arguments, rest = sys.argv[1:], []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, rest = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser(
        prog="python -m tests.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kernel", action="append", choices=packages.SERIES, help="a series")
    parser.add_argument("--accel", default="tcg", help="tcg (software, the default) or kvm")
    parser.add_argument("--timeout", type=float, default=2400, help="seconds a guest may run")
    parser.add_argument("--command", action="store_true", help="what follows -- is a command")
    options = parser.parse_args(arguments)

    command: Sequence[str] = machine.CHECKS
    if options.command:
        command = rest
    elif rest:
        command = [machine.PYTHON, "-m", "pytest", "--color=no", "--timeout=600", *rest]
    worst = 0
    for series in options.kernel or packages.SERIES:
        try:
            kernel = packages.kernel(series)
            print(f"---- {series}: {kernel.package} {kernel.version}", flush=True)
            began = time.monotonic()
            code = machine.run(
                kernel, command, accelerator=options.accel, timeout_s=options.timeout
            )
        except packages.Unavailable as reason:
            print(f"---- {series}: not booted: {reason}", flush=True)
            code, began = SKIPPED, time.monotonic()
        meaning = machine.STATUS.get(code, "of the command")
        print(
            f"---- {series}: status {code} ({meaning}) after {time.monotonic() - began:.0f} s",
            flush=True,
        )
        worst = worst or code
    return worst


if __name__ == "__main__":
    sys.exit(main())
