"""What is known of a node before anybody has spoken to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

DEFAULT_PORT: Final = 4244


@dataclass(frozen=True, slots=True)
class PeerInfo:
    """A node as it is announced. `address` is host:port, or unix:///path."""

    name: str
    address: str
    tls_server_name: str = ""


def with_port(address: str) -> str:
    """The address with Hubble's port, where it has none."""
    if address.startswith("unix:"):
        return address
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and (":" not in host or host.startswith("[")):
        return address
    return f"[{address}]:{DEFAULT_PORT}" if ":" in address else f"{address}:{DEFAULT_PORT}"
