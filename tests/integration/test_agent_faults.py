"""Bad input and bad surroundings: each is refused with a message that names the cure, and leaves
nothing behind."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from cilia.labels import Labels
from cilia.rpc.convert import labels_to_proto
from protos.agent.v1 import agent_pb2 as pb
from tests.integration.agentnode import AgentNode, refused, run

pytestmark = pytest.mark.usefixtures("need_bpf", "need_netns", "need_bpffs", "need_objects")

INVALID = grpc.StatusCode.INVALID_ARGUMENT
EXISTS = grpc.StatusCode.ALREADY_EXISTS
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
NOT_FOUND = grpc.StatusCode.NOT_FOUND


@pytest.fixture(scope="module")
def node() -> Iterator[AgentNode]:
    with AgentNode("bad") as node:
        # .8/29: router .9, endpoints .10 to .14
        node.flags = ("--ipv4-pool", "10.9.0.8/29", "--bpf-policy-map-max", "4")
        node.start("identity")
        node.start("agent")
        node.workload("first", "app=first")
        node.netns("spare")
        yield node


@pytest.fixture(autouse=True)
def leaves_nothing(node: AgentNode) -> Iterator[None]:
    """A refused request changes neither tables nor links nor pools."""
    yield
    names = [e.name for e in node.endpoints.List(pb.ListEndpointsRequest()).endpoints]
    assert names == ["first"]
    status = node.status()
    assert (status.ipv4.allocated, status.ipv4.quarantined) == (1, 0)
    links = subprocess.run(
        ["ip", "-n", f"{node.base}-node", "-br", "link"], capture_output=True, text=True
    ).stdout
    assert links.count("cil0") == 1
    inside = subprocess.run(
        ["ip", "-n", f"{node.base}-spare", "-br", "link"], capture_output=True, text=True
    ).stdout
    assert "eth0" not in inside


def add_refused(node: AgentNode, name: str, *labels: str, **more: Any) -> tuple[Any, str]:
    more.setdefault("netns", node.path("spare"))
    return refused(lambda: node.add(name, *labels, **more))


def test_duplicate_name(node: AgentNode) -> None:
    code, message = add_refused(node, "first", "app=x")
    assert code is EXISTS
    assert "default/first" in message


def test_interface_that_an_endpoint_has(node: AgentNode) -> None:
    code, message = add_refused(node, "other", netns=node.path("first"))
    assert code is EXISTS
    assert "eth0" in message


@pytest.mark.parametrize("label", ["reserved:host", "reserved:world", "cidr:10.0.0.0/8"])
def test_reserved_label(node: AgentNode, label: str) -> None:
    code, message = add_refused(node, "other", label)
    assert code is INVALID
    assert f"not allowed to add {label.split(':')[0]} labels" in message


def test_unknown_label_syntax(node: AgentNode) -> None:
    from protos.common.v1 import common_pb2

    request = pb.AddEndpointRequest(
        name="other",
        labels=[common_pb2.Label(source="BAD SOURCE", key="a")],
        netns_path=node.path("spare"),
    )
    code, message = refused(lambda: node.endpoints.Add(request, timeout=10))
    assert code is INVALID
    assert "BAD SOURCE" in message


def test_namespace_label_that_contradicts_the_namespace(node: AgentNode) -> None:
    code, message = add_refused(node, "other", "k8s:io.kubernetes.pod.namespace=prod")
    assert code is INVALID
    assert "contradicts namespace default" in message


def test_address_in_use_out_of_pool_and_the_router(node: AgentNode) -> None:
    taken = node.get("first").ipv4
    code, message = add_refused(node, "other", ipv4=taken)
    assert code is EXISTS
    assert f"{taken} is in use by default/first" in message
    code, message = add_refused(node, "other", ipv4="10.10.0.1")
    assert code is INVALID
    assert "10.9.0.8/29" in message
    code, message = add_refused(node, "other", ipv4="10.9.0.9")
    assert code is EXISTS
    assert "router" in message
    code, message = add_refused(node, "other", ipv4="fd00::1")
    assert code is INVALID


def test_full_pool(node: AgentNode) -> None:
    names = [f"full{n}" for n in range(4)]
    try:
        for name in names:
            node.workload(name, f"app={name}")
        code, message = add_refused(node, "other")
        assert code is EXHAUSTED
        assert "10.9.0.8/29" in message
        assert "5 in use" in message
    finally:
        for name in names:
            node.delete(name)
            run("ip", "netns", "del", f"{node.base}-{name}")
            node.namespaces.remove(f"{node.base}-{name}")


def test_namespace_that_is_gone_or_none(node: AgentNode) -> None:
    code, message = add_refused(node, "other", netns="/run/netns/no-such-thing")
    assert code is NOT_FOUND
    assert "no-such-thing" in message
    code, message = add_refused(node, "other", netns="/etc/passwd")
    assert code is INVALID
    assert "not a network namespace" in message
    code, message = add_refused(node, "other", netns=node.path("node"))
    assert code is INVALID
    code, _ = refused(lambda: node.endpoints.Add(pb.AddEndpointRequest(name="other"), timeout=10))
    assert code is INVALID


def test_names_that_cannot_be(node: AgentNode) -> None:
    assert add_refused(node, "../escape")[0] is INVALID
    assert add_refused(node, "")[0] is INVALID
    assert add_refused(node, "other", interface="much-too-long-a-name")[0] is INVALID


def test_unknown_endpoint_option_and_label(node: AgentNode) -> None:
    ref = pb.EndpointRef(name="nobody")
    assert refused(lambda: node.endpoints.Get(ref, timeout=5))[0] is NOT_FOUND
    first = pb.EndpointRef(name="first")
    code, message = refused(
        lambda: node.endpoints.SetConfig(
            pb.SetConfigRequest(ref=first, options={"Debug": "on"}), timeout=5
        )
    )
    assert code is INVALID
    assert "PolicyEnforcement" in message
    code, message = refused(
        lambda: node.endpoints.SetLabels(
            pb.SetLabelsRequest(ref=first, remove=labels_to_proto(Labels.parse(["none=x"]))),
            timeout=5,
        )
    )
    assert code is INVALID
    assert "has no label" in message


def test_policy_that_does_not_fit_is_refused_before_anything_is_programmed(
    node: AgentNode,
) -> None:
    good = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: ports}
spec:
  endpointSelector: {matchLabels: {app: first}}
  ingress:
  - toPorts: [{ports: [{port: "80", protocol: TCP}]}]
"""
    node.apply(good)
    try:
        before = rows(node)
        ports = ", ".join(f'{{port: "{n}", protocol: TCP}}' for n in range(80, 100))
        code, message = refused(
            lambda: node.apply(good.replace('{port: "80", protocol: TCP}', ports))
        )
        assert code is EXHAUSTED
        assert "default/first" in message
        assert "needs 22 map entries, 4 are allowed" in message
        assert rows(node) == before
        assert node.get("first").state == "not-ready"
        assert "needs 22" in node.get("first").message
        log = node.endpoints.Log(pb.EndpointRef(name="first"), timeout=10).entries
        told = {entry.code for entry in log if "needs 22" in entry.message}
        assert told == {"Failure"}
        assert node.component("policy").state == "Failure"
    finally:
        node.delete_policies()
    assert node.get("first").state == "ready"


def rows(node: AgentNode) -> list[tuple[int, int, str]]:
    request = pb.DumpPolicyRequest(ref=pb.EndpointRef(name="first"))
    return [
        (row.identity, row.port, row.direction)
        for reply in node.datapath.DumpPolicy(request)
        for row in reply.rows
    ]


def test_no_labels_is_init_and_isolated(node: AgentNode) -> None:
    node.netns("bare")
    try:
        endpoint = node.add("bare")
        assert endpoint.identity == 5
        assert endpoint.ingress_enforced
        assert not node.ping("first", endpoint.ipv4)
    finally:
        node.delete("bare")
        run("ip", "netns", "del", f"{node.base}-bare")
        node.namespaces.remove(f"{node.base}-bare")


def test_two_agents_on_one_state_directory(node: AgentNode) -> None:
    other = node.start("agent", "--run-dir", str(node.run_dir / "other"), wait=False)
    try:
        assert other.wait(timeout=15) == 1
    finally:
        node.processes["agent"] = first_agent(node, other)
    assert "is in use by process" in node.log("agent")


def first_agent(node: AgentNode, other: Any) -> Any:
    """`start` replaced the entry of the running agent: find it again by its lock."""
    pid = int((node.state_dir / "agent" / "lock").read_text().split()[0])

    class Adopted:
        def send_signal(self, how: int) -> None:
            import os

            os.kill(pid, how)

        def poll(self) -> None:
            return None

        def wait(self, timeout: float) -> int:
            del timeout
            return int(other.wait())

    return Adopted()


def test_pool_that_overlaps_a_route_is_refused_at_start() -> None:
    with AgentNode("ovl") as node:
        run("ip", "-n", f"{node.base}-node", "route", "add", "10.217.8.0/24", "via", "192.168.77.1")
        agent = node.start("agent", wait=False)
        assert agent.wait(timeout=15) == 1
        log = node.log("agent")
        assert "overlaps route 10.217.8.0/24 via 192.168.77.1 dev up0" in log
        assert "--ipv4-pool" in log


def test_missing_objects_are_named_with_the_cure() -> None:
    with AgentNode("obj") as node:
        agent = node.start("agent", "--object-dir", "/nonexistent", wait=False)
        assert agent.wait(timeout=15) == 1
        assert "make bpf" in node.log("agent")


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--ipv4-pool", "10.0.0.0/30"), "too small"),
        (("--nat-ports", "9-1"), "rising range"),
        (("--labels", "k8s:["), "--labels"),
    ],
)
def test_configuration_that_cannot_be(flags: tuple[str, ...], text: str) -> None:
    import sys

    from tests.integration.agentnode import ROOT

    done = subprocess.run(
        [sys.executable, "-m", "services.agent", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 78
    assert text in done.stderr
