"""The real command, a lab driven by it, and what must not be left of one.

Lab names carry the pid of the run; labs of runs that are gone are removed before a new one starts.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab import down, host
from lab.names import RUN_ROOT

REPOSITORY = Path(__file__).resolve().parents[2]
NAME = re.compile(r"e2e(\d+)-")

LAB = """\
name: placeholder
workloads:
  - name: server
    labels: {app: server}
    command: python -m lab.httpd --name server
    ports: [80]
  - name: client
    labels: {app: client}
  - name: other
    labels: {app: other}
  - name: far
    namespace: test
    labels: {app: server}
    command: python -m lab.httpd --name far
    ports: [80]
"""


@dataclass(frozen=True, slots=True)
class Cilia:
    """Runs `cilia` as a user would."""

    env: Mapping[str, str] = field(default_factory=dict)

    def run(
        self, *args: str, stdin: str | None = None, timeout_s: float = 60
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "cli", *args],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            cwd=REPOSITORY,
            env={**os.environ, **self.env},
            check=False,
        )

    def ok(self, *args: str, stdin: str | None = None) -> str:
        done = self.run(*args, stdin=stdin)
        assert done.returncode == 0, f"cilia {' '.join(args)}: {done.stdout}{done.stderr}"
        return done.stdout

    def json(self, *args: str, stdin: str | None = None) -> Any:
        return json.loads(self.ok(*args, "-o", "json", stdin=stdin))

    def fails(self, code: int, *args: str, stdin: str | None = None) -> str:
        done = self.run(*args, stdin=stdin)
        assert done.returncode == code, f"cilia {' '.join(args)}: {done.stdout}{done.stderr}"
        return done.stderr


@dataclass(frozen=True, slots=True)
class Lab:
    """A lab that is up."""

    name: str
    cilia: Cilia

    def http(self, workload: str, url: str, *flags: str, timeout_s: float = 3.0) -> dict[str, Any]:
        """One request from a workload; what its client saw."""
        done = self.cilia.run(
            "lab", "exec", "--lab", self.name, workload, "--",
            "python", "-m", "lab.httpc", "--json", "--timeout", str(timeout_s), *flags, "GET", url,
        )  # fmt: skip
        result: dict[str, Any] = json.loads(done.stdout)
        assert done.returncode == result["exit"]
        return result


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def remove_remains() -> None:
    for name in down.labs():
        match = NAME.match(name)
        if match and (int(match[1]) == os.getpid() or not alive(int(match[1]))):
            down.down(name)


def remains_of(name: str) -> list[str]:
    """What is left of a lab anywhere on the machine."""
    found = [f"namespace {n}" for n in host.lab_namespaces(name)]
    found += [f"mount {p}" for p in host.mounts_below(RUN_ROOT / name)]
    if (RUN_ROOT / name).exists():
        found.append(f"directory {RUN_ROOT / name}")
    cgroup = host.lab_cgroup(name)
    if cgroup is not None and cgroup.exists():
        found.append(f"cgroup {cgroup}")
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if f"{RUN_ROOT}/{name}/".encode() in command:
                found.append(f"process {entry.name} {command!r}")
    return found


def traces_of_ours() -> set[str]:
    """Things in the machine's own namespace that a lab must not make there."""
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True)
    names = {line.split(": ")[1].partition("@")[0] for line in links.stdout.splitlines()}
    found = {f"link {n}" for n in names if n.startswith(("cil", "lxc")) and "cilt" not in n}
    tables = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=False)
    found |= {f"nft {line}" for line in tables.stdout.splitlines() if "cil" in line}
    filters = subprocess.run(["tc", "qdisc"], capture_output=True, text=True, check=True)
    found |= {f"tc {line}" for line in filters.stdout.splitlines() if " cil" in line}
    if Path("/etc/netns").is_dir():
        found |= {f"/etc/netns/{p.name}" for p in Path("/etc/netns").iterdir()}
    return found
