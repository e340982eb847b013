"""What names mean inside a lab."""

from __future__ import annotations

from lab.state import LabState, NodeState, WorkloadState
from lab.up import hosts_text


def _workload(name: str, group: str, namespace: str, last: int) -> WorkloadState:
    return WorkloadState(
        name=name,
        group=group,
        namespace=namespace,
        node="node1",
        netns="",
        labels=(),
        ipv4=f"10.0.0.{last}",
        ipv6=f"fd00::{last}",
    )


LAB = LabState(
    name="x",
    source="x.yaml",
    boot_id="",
    world_ipv4="198.18.0.100",
    world_ipv6="fd00:18::100",
    nodes=(
        NodeState(
            name="node1", netns="", run_dir="", bpffs="", cgroup=None, ipv4="198.18.0.1", ipv6="::2"
        ),
    ),
    workloads=(
        _workload("web-1", "web", "default", 1),
        _workload("web-2", "web", "default", 2),
        _workload("db", "db", "shop", 3),
    ),
)


def names(namespace: str) -> dict[str, set[str]]:
    """Name to addresses, as a resolver reads the file."""
    found: dict[str, set[str]] = {}
    for line in hosts_text(LAB, namespace).splitlines():
        address, *words = line.split()
        for word in words:
            found.setdefault(word, set()).add(address)
    return found


def test_a_group_is_all_its_replicas_in_both_families() -> None:
    assert names("default")["web"] == {"10.0.0.1", "10.0.0.2", "fd00::1", "fd00::2"}
    assert names("default")["web-2"] == {"10.0.0.2", "fd00::2"}


def test_bare_names_are_those_of_the_own_namespace() -> None:
    assert "db" not in names("default")
    assert "web" not in names("shop")
    assert names("shop")["db"] == names("default")["db.shop"] == {"10.0.0.3", "fd00::3"}
    assert names("shop")["web.default"] == names("default")["web"]


def test_the_world_and_the_node_are_known_everywhere() -> None:
    for namespace in ("default", "shop"):
        assert names(namespace)["world"] == {"198.18.0.100", "fd00:18::100"}
        assert names(namespace)["node1"] == {"198.18.0.1", "::2"}
        assert "127.0.0.1" in names(namespace)["localhost"]
