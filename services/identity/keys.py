"""Where things lie in the store, below `/cilia/v1/`; identities are laid out by cilia.kv.allocator.

ip/<prefix>                  -> JSON  (leased)   an announced address
policy/<kind>/<ns or _>/<name>                 a policy document; parts are percent-encoded
session/<node>               -> JSON  (leased)   the node's lease
"""

from __future__ import annotations

import enum
from urllib.parse import quote, unquote

from cilia.kv.allocator import ID_PREFIX, QUARANTINE_PREFIX

ROOT = b"/cilia/v1/"
IP_PREFIX = ROOT + b"ip/"
POLICY_PREFIX = ROOT + b"policy/"
SESSION_PREFIX = ROOT + b"session/"

_NO_NAMESPACE = "_"


class Kind(enum.Enum):
    """What can be watched."""

    IDENTITY = "identity"
    IP = "ip"
    POLICY = "policy"


_PREFIXES = {ID_PREFIX: Kind.IDENTITY, IP_PREFIX: Kind.IP, POLICY_PREFIX: Kind.POLICY}


def kind_of(key: bytes) -> Kind | None:
    """What lies at this key, None for what nobody watches."""
    for prefix, kind in _PREFIXES.items():
        if key.startswith(prefix):
            return kind
    return None


def ip_key(prefix: str) -> bytes:
    return IP_PREFIX + prefix.encode()


def ip_prefix_of(key: bytes) -> str:
    return key[len(IP_PREFIX) :].decode()


def policy_key(kind: str, namespace: str, name: str) -> bytes:
    """Different names give different keys: a namespace is never `_`, and `/` is encoded."""
    parts = (kind, namespace or _NO_NAMESPACE, name)
    return POLICY_PREFIX + "/".join(quote(part, safe="") for part in parts).encode()


def policy_name_of(key: bytes) -> tuple[str, str, str]:
    """(kind, namespace, name)."""
    kind, namespace, name = key[len(POLICY_PREFIX) :].decode().split("/")
    return unquote(kind), "" if namespace == _NO_NAMESPACE else unquote(namespace), unquote(name)


def session_key(node: str) -> bytes:
    return SESSION_PREFIX + node.encode()


def node_of_session(key: bytes) -> str:
    return key[len(SESSION_PREFIX) :].decode()


def identity_of(key: bytes) -> int:
    return int(key[len(ID_PREFIX) :])


def quarantine_key(identity: int) -> bytes:
    return QUARANTINE_PREFIX + b"%d" % identity
