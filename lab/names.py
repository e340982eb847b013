"""How a lab's objects are called, so that they are found again without any state file.

Namespaces: `cil-<lab>-<kind>.<rest>`, kind one of node, pod, net. Neither lab nor kind has a dot,
so the lab of a namespace is unambiguous even when one lab's name begins with another's.
Directory: /run/cilia-lab/<lab>, a node's run directory /run/cilia-lab/<lab>/<node>.
Cgroup (v2): <mount>/cilia-lab/<lab>/<node or world>.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

RUN_ROOT = Path(os.environ.get("CILIA_LAB_DIR", "/run/cilia-lab"))
NETNS_DIR = Path("/run/netns")
KINDS = ("node", "pod", "net")

_NAMESPACE = re.compile(r"cil-(?P<lab>[-a-z0-9]+)-(?P<kind>node|pod|net)\.(?P<rest>.+)\Z")
LAB_NAME = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,22}[a-z0-9])?\Z")

# Directories of a lab that are not nodes.
RESERVED_NODE_NAMES = frozenset({"etc", "log", "world", "wire", "net"})


@dataclass(frozen=True, slots=True)
class Names:
    """The names of one lab's objects."""

    lab: str

    @property
    def dir(self) -> Path:
        return RUN_ROOT / self.lab

    @property
    def etc(self) -> Path:
        """Hosts and resolver files that workloads see as theirs."""
        return self.dir / "etc"

    @property
    def log(self) -> Path:
        """What the processes print, a file each."""
        return self.dir / "log"

    @property
    def state(self) -> Path:
        return self.dir / "state.json"

    def run_dir(self, node: str) -> Path:
        return self.dir / node

    def state_dir(self, node: str) -> Path:
        return self.dir / node / "state"

    @property
    def wire(self) -> str:
        return f"cil-{self.lab}-net.wire"

    @property
    def world(self) -> str:
        return f"cil-{self.lab}-net.world"

    def node(self, node: str) -> str:
        return f"cil-{self.lab}-node.{node}"

    def pod(self, namespace: str, name: str) -> str:
        return f"cil-{self.lab}-pod.{namespace}.{name}"

    def hosts(self, namespace: str) -> Path:
        """The hosts file for workloads of a namespace: bare names mean those of their own."""
        return self.etc / f"hosts.{namespace}"


def lab_of_namespace(name: str) -> str | None:
    """The lab a network namespace belongs to; None when it is not a lab's."""
    match = _NAMESPACE.match(name)
    return match["lab"] if match else None


def netns_path(name: str) -> Path:
    """Where a named network namespace is found."""
    return NETNS_DIR / name
