"""The xDS service as a process of its own, what tests ask it, and Envoys that are its clients."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cilia.rpc.server import listening_pid
from services.xds.envoy.process import binary

ROOT = Path(__file__).resolve().parents[2]


def eventually(check: Callable[[], Any], *, within_s: float = 40.0, what: str = "") -> Any:
    """The first value that is true. A check that raises is not true yet."""
    deadline = time.monotonic() + within_s
    last: object = None
    while time.monotonic() < deadline:
        try:
            last = check()
        except (OSError, subprocess.CalledProcessError, KeyError, IndexError) as error:
            last = error
        if last and not isinstance(last, BaseException):
            return last
        time.sleep(0.02)
    raise AssertionError(f"not within {within_s:g} s: {what or check}; last: {last}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(url: str, timeout_s: float = 3.0) -> tuple[int, str]:
    """(status, body); (0, reason) when nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)


class XdsService:
    """`python -m services.xds` in a directory."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.directory = directory
        self.socket = directory / "xds.sock"
        self.arguments = arguments
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.directory / "xds.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "services.xds",
                    "--run-dir", str(self.directory), *self.arguments,
                ],
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )  # fmt: skip
        eventually(lambda: listening_pid(self.socket)[0], what=self.log())

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.process = None

    def log(self) -> str:
        path = self.directory / "xds.log"
        return path.read_text() if path.exists() else ""

    def ask(self, *arguments: str) -> Any:
        """What the command says in JSON."""
        done = subprocess.run(
            [
                sys.executable, "-m", "cli", "--xds-socket", str(self.socket),
                *arguments, "-o", "json",
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "CILIA_XDS_SOCK": ""},
        )  # fmt: skip
        return json.loads(done.stdout)

    def __enter__(self) -> XdsService:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@contextlib.contextmanager
def envoy(directory: Path, bootstrap: dict[str, Any]) -> Iterator[Path]:
    """A stock Envoy with this bootstrap and an admin socket, which is yielded."""
    admin = directory / "admin.sock"
    config = directory / "bootstrap.json"
    config.write_text(
        json.dumps({**bootstrap, "admin": {"address": {"pipe": {"path": str(admin)}}}})
    )
    with (directory / "envoy.log").open("wb") as log:
        process = subprocess.Popen(
            [
                binary(), "-c", config, "--concurrency", "1", "--use-dynamic-base-id",
                "--log-level", "warning",
            ],
            stdout=log,
            stderr=log,
        )  # fmt: skip
    try:
        yield admin
    finally:
        process.kill()
        process.wait()


def ads_bootstrap(
    node: str, *, delta: bool, cluster: dict[str, Any], **more: Any
) -> dict[str, Any]:
    """A bootstrap that takes everything from one stream to `cluster`, a socket or an address."""
    source = {"resource_api_version": "V3", "ads": {}}
    return {
        "node": {"id": node, "cluster": "tests"},
        "dynamic_resources": {
            "ads_config": {
                "api_type": "DELTA_GRPC" if delta else "GRPC",
                "transport_api_version": "V3",
                "set_node_on_first_message_only": True,
                "grpc_services": [{"envoy_grpc": {"cluster_name": "xds"}}],
            },
            "lds_config": source,
            "cds_config": source,
        },
        "static_resources": {
            "clusters": [
                {
                    "name": "xds",
                    "type": "STATIC",
                    "connect_timeout": "1s",
                    "typed_extension_protocol_options": {
                        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                            "@type": "type.googleapis.com/"
                            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                            "explicit_http_config": {"http2_protocol_options": {}},
                        }
                    },
                    **cluster,
                }
            ]
        },
        **more,
    }


def endpoint(address: dict[str, Any]) -> dict[str, Any]:
    """A cluster of one endpoint."""
    return {
        "load_assignment": {
            "cluster_name": "xds",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
        }
    }
