"""Bad input and bad surroundings: each is refused with a message that names the cure, and leaves
nothing behind."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cilia.labels import Labels
from cilia.rpc.convert import labels_to_proto
from protos.agent.v1 import agent_pb2 as pb
from tests.integration.agentnode import AgentNode, eventually, refused, run

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
    assert refused(lambda: node.endpoints.Get(ref, timeout=20))[0] is NOT_FOUND
    first = pb.EndpointRef(name="first")
    code, message = refused(
        lambda: node.endpoints.SetConfig(
            pb.SetConfigRequest(ref=first, options={"Debug": "on"}), timeout=20
        )
    )
    assert code is INVALID
    assert "unknown option Debug" in message
    code, message = refused(
        lambda: node.endpoints.SetLabels(
            pb.SetLabelsRequest(ref=first, remove=labels_to_proto(Labels.parse(["none=x"]))),
            timeout=20,
        )
    )
    assert code is INVALID
    assert "has no label" in message


PORT_80 = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: ports}
spec:
  endpointSelector: {matchLabels: {app: first}}
  ingress:
  - toPorts: [{ports: [{port: "80", protocol: TCP}]}]
"""


def with_twenty(document: str) -> str:
    ports = ", ".join(f'{{port: "{n}", protocol: TCP}}' for n in range(80, 100))
    return document.replace('{port: "80", protocol: TCP}', ports)


@pytest.mark.parametrize("dry_run", [False, True])
def test_policy_that_does_not_fit_is_refused_before_anything_is_stored(
    node: AgentNode, dry_run: bool
) -> None:
    node.apply(PORT_80)
    try:
        before = rows(node)
        code, message = refused(lambda: node.apply(with_twenty(PORT_80), dry_run=dry_run))
        assert code is EXHAUSTED
        assert f"default/first (identity {node.get('first').identity})" in message
        assert "needs 22 map entries, 4 are allowed; nothing was changed" in message
        assert rows(node) == before
        stored = node.policy.Get(pb.GetPoliciesRequest(), timeout=10).policies
        assert [b'"81"' in policy.document for policy in stored] == [False]
        assert node.get("first").state == "ready"
        assert node.component("policy").state == "Ok"
    finally:
        node.delete_policies()


def test_prefixes_count_without_being_numbered(node: AgentNode) -> None:
    prefixes = ", ".join(f"10.99.0.{n}/32" for n in range(20))
    document = PORT_80.replace('toPorts: [{ports: [{port: "80", protocol: TCP}]}]', "fromCIDR: [P]")
    code, message = refused(lambda: node.apply(document.replace("P]", f"{prefixes}]")))
    assert code is EXHAUSTED
    assert "needs 22 map entries" in message
    held = [row for reply in node.datapath.DumpIpcache(pb.DumpRequest()) for row in reply.rows]
    assert not any(row.prefix.startswith("10.99.") for row in held)


def test_documents_about_nobody_here_fit(node: AgentNode) -> None:
    node.apply(with_twenty(PORT_80).replace("app: first", "app: elsewhere"))
    node.delete_policies()


EVERYBODY = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: everybody}
spec:
  endpointSelector: {matchLabels: {app: first}}
  ingress:
  - fromEndpoints: [{matchExpressions: [{key: crowd, operator: Exists}]}]
"""


def test_policy_that_outgrows_its_map_later_is_told_and_concerns_nobody_else(
    node: AgentNode,
) -> None:
    node.apply(EVERYBODY)
    node.apply(PORT_80)
    names = ["grow1", "grow2", "grow3"]
    try:
        before = rows(node)
        for name in names:
            node.workload(name, f"crowd={name}")
        eventually(
            lambda: node.get("first").state == "not-ready", within_s=30, what="it is outgrown"
        )
        assert "needs 6 map entries, 4 are allowed" in node.get("first").message
        assert set(rows(node)) >= set(before)
        status = node.status()
        assert node.component("policy").state == "Failure"
        assert status.realised_revision < status.policy_revision
        # Others' documents can be applied and deleted; one about it is told the truth.
        elsewhere = PORT_80.replace("name: ports", "name: others").replace(
            "app: first", "app: elsewhere"
        )
        assert node.apply(elsewhere).realised
        assert node.status().realised_revision < node.status().policy_revision
        code, message = refused(
            lambda: node.apply(EVERYBODY.replace("app: first}", "app: first,}"))
        )
        assert code is EXHAUSTED
        assert "the policy is stored, but cannot be enforced" in message
        delete_one(node, "others")
        code, message = refused(lambda: delete_one(node, "ports"))
        assert code is EXHAUSTED
        assert "the policy is deleted, but what is left cannot be enforced" in message
        assert "needs 5 map entries" in message
        # What makes it smaller is taken.
        assert node.apply(EVERYBODY.replace("Exists", "In, values: [grow1]")).realised
        status = node.status()
        assert status.realised_revision == status.policy_revision
    finally:
        node.delete_policies()
        for name in names:
            node.delete(name)
            run("ip", "netns", "del", f"{node.base}-{name}")
            node.namespaces.remove(f"{node.base}-{name}")
    assert node.get("first").state == "ready"


def delete_one(node: AgentNode, name: str) -> None:
    from protos.identity.v1 import identity_pb2

    wanted = identity_pb2.PolicyName(kind="CiliumNetworkPolicy", namespace="default", name=name)
    node.policy.Delete(pb.DeleteRequest(names=[wanted], wait=True), timeout=20)


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
        assert str(node.run_dir) not in mounts()


def test_missing_objects_are_named_with_the_cure() -> None:
    with AgentNode("obj") as node:
        agent = node.start("agent", "--object-dir", "/nonexistent", wait=False)
        assert agent.wait(timeout=15) == 1
        assert "make bpf" in node.log("agent")
        assert str(node.run_dir) not in mounts()


def mounts() -> str:
    return Path("/proc/self/mountinfo").read_text()


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
