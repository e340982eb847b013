"""`python -m services.xds`: configuration, then the service, then an exit code.

0 stopped when asked to; 1 an operating error (the socket is in use, Envoy is not there);
70 a bug; 78 the configuration is wrong (2: a flag that does not exist).
"""

from __future__ import annotations

import os
import sys

from cilia import lifecycle
from cilia.errors import InvalidError
from cilia.lifecycle import ExitCode, Lifecycle
from cilia.telemetry import log
from services.xds.app import build
from services.xds.config import parse


def main() -> int:
    try:
        config = parse(sys.argv[1:], os.environ)
        as_json = None if config.log_format == "auto" else config.log_format == "json"
        log.setup("xds", level=config.log_level, json=as_json)
    except InvalidError as error:
        sys.stderr.write(f"xds: {error.explain()}\n")
        return ExitCode.CONFIG

    async def build_service(running: Lifecycle) -> None:
        await build(config, running)

    return lifecycle.run(build_service, service="xds")


if __name__ == "__main__":
    sys.exit(main())
