"""The flow service beside a real agent: what passes and what does not, as clients see it."""

from __future__ import annotations

import contextlib
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from protos.hubble.v1 import flow_pb2, observer_pb2, observer_pb2_grpc, relay_pb2
from tests.integration.agentnode import AgentNode, eventually
from tests.integration.test_agent_proxy import EMPIRE, FIGHTER, Web, once

pytestmark = pytest.mark.usefixtures("need_bpf", "need_netns", "need_bpffs", "need_objects")

ALLOW_FRIEND = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: friends}
spec:
  endpointSelector: {matchLabels: {app: server}}
  ingress:
  - fromEndpoints:
    - matchLabels: {app: friend}
"""
DENY_STRANGER = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: no-strangers}
spec:
  endpointSelector: {matchLabels: {app: server}}
  ingressDeny:
  - fromEndpoints:
    - matchLabels: {app: stranger}
"""
Flow = flow_pb2.Flow


class FlowNode(AgentNode):
    """A node whose agent is heard."""

    def __enter__(self) -> FlowNode:
        super().__enter__()
        return self

    def start_flows(self, *flags: str) -> None:
        self.start("flows", "--segment-age", "1", *flags, wait=False)
        path = self.run_dir / "hubble.sock"

        def serving() -> bool:
            assert self.processes["flows"].poll() is None, self.log("flows")
            with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
                probe.connect(str(path))
                return True
            return False

        eventually(serving, within_s=20, what=f"flows serves: {self.log('flows')[-2000:]}")

    @contextlib.contextmanager
    def observer(self) -> Iterator[Any]:
        channel: Any = grpc.insecure_channel(
            f"unix:{self.run_dir / 'hubble.sock'}",
            options=[
                ("grpc.default_authority", "localhost"),
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )
        with channel:
            yield observer_pb2_grpc.ObserverStub(channel)

    def flows(self, *whitelist: flow_pb2.FlowFilter, **request: Any) -> list[Flow]:
        with self.observer() as stub:
            answers = stub.GetFlows(
                observer_pb2.GetFlowsRequest(whitelist=whitelist, **request), timeout=10
            )
            return [answer.flow for answer in answers if answer.HasField("flow")]

    def wait_flow(self, *whitelist: flow_pb2.FlowFilter, **request: Any) -> Flow:
        found: list[Flow] = eventually(
            lambda: self.flows(*whitelist, number=50, **request), within_s=30, what="a flow"
        )
        return found[-1]

    def watching(self) -> bool:
        with self.observer() as stub:
            status = stub.ServerStatus(observer_pb2.ServerStatusRequest(), timeout=10)
            return bool(status.num_connected_nodes.value)

    def status(self) -> Any:
        with self.observer() as stub:
            return stub.ServerStatus(observer_pb2.ServerStatusRequest(), timeout=10)


@pytest.fixture(scope="module")
def running() -> Iterator[FlowNode]:
    with FlowNode("flows") as node:
        node.start("identity")
        node.start("agent")
        node.workload("server", "app=server")
        node.workload("friend", "app=friend")
        node.workload("stranger", "app=stranger")
        node.start_flows()
        eventually(node.watching, within_s=30, what="the agent is heard")
        yield node


@pytest.fixture
def node(running: FlowNode) -> Iterator[FlowNode]:
    yield running
    running.delete_policies()


def connect(node: FlowNode, client: str, address: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with node.socket(client, family) as near:
        near.settimeout(0.3)
        try:
            near.connect((address, port))
        except TimeoutError:
            return False
        except ConnectionRefusedError:
            return True
        return True


def since() -> Any:
    made = Timestamp()
    made.FromNanoseconds(time.time_ns() - 100_000_000)
    return made


def test_a_ping_is_seen_with_names_and_labels(node: FlowNode) -> None:
    server, friend = node.get("server"), node.get("friend")
    for address in (server.ipv4, server.ipv6):
        start = since()
        assert node.ping("friend", address)
        flow = node.wait_flow(
            flow_pb2.FlowFilter(
                source_pod=["default/friend"],
                destination_pod=["default/server"],
                destination_ip=[address],
                protocol=["icmp"],
                reply=[False],
            ),
            since=start,
        )
        assert flow.verdict == flow_pb2.FORWARDED
        assert (flow.source.ID, flow.source.identity) == (friend.id, friend.identity)
        assert (flow.destination.ID, flow.destination.identity) == (server.id, server.identity)
        assert "k8s:app=friend" in flow.source.labels or any(
            label.endswith(":app=friend") for label in flow.source.labels
        )
        assert flow.node_name == "default/n1"
        assert "EchoRequest" in flow.Summary
        assert abs(flow.time.ToNanoseconds() - time.time_ns()) < 300 * 10**9
        assert flow.IP.destination == address


@pytest.mark.parametrize(
    ("policy", "reason", "name"),
    [
        (ALLOW_FRIEND, flow_pb2.POLICY_DENIED, "friends"),
        (DENY_STRANGER, flow_pb2.POLICY_DENY, "no-strangers"),
    ],
)
def test_a_drop_says_which_policy(node: FlowNode, policy: str, reason: int, name: str) -> None:
    node.apply(policy)
    start = since()
    assert not connect(node, "stranger", node.get("server").ipv4, 8080)
    flow = node.wait_flow(
        flow_pb2.FlowFilter(
            verdict=[flow_pb2.DROPPED], source_pod=["default/stranger"], destination_port=["8080"]
        ),
        since=start,
    )
    assert flow.drop_reason_desc == reason
    assert flow.l4.TCP.flags.SYN
    [by] = flow.ingress_denied_by
    assert (by.kind, by.namespace, by.name) == ("CiliumNetworkPolicy", "default", name)
    assert any(label.startswith("cilia:rule=spec") for label in by.labels)


def test_an_allowed_connection_says_which_policy(node: FlowNode) -> None:
    node.apply(ALLOW_FRIEND)
    start = since()
    assert connect(node, "friend", node.get("server").ipv4, 8081)
    flow = node.wait_flow(
        flow_pb2.FlowFilter(
            event_type=[flow_pb2.EventTypeFilter(type=5)],
            destination_port=["8081"],
            traffic_direction=[flow_pb2.INGRESS],
        ),
        since=start,
    )
    assert flow.verdict == flow_pb2.FORWARDED
    assert [by.name for by in flow.ingress_allowed_by] == ["friends"]


def test_a_follower_hears_at_once(node: FlowNode) -> None:
    with node.observer() as stub:
        stream = stub.GetFlows(
            observer_pb2.GetFlowsRequest(
                follow=True, whitelist=[flow_pb2.FlowFilter(destination_port=["8082"])]
            ),
            timeout=20,
        )
        stream.initial_metadata()
        connect(node, "friend", node.get("server").ipv4, 8082)
        # Before the call's deadline, with nothing after it that would push it along.
        answer = next(answer for answer in stream if answer.HasField("flow"))
        assert answer.flow.l4.TCP.destination_port == 8082
        stream.cancel()


def test_policy_changes_are_agent_events(node: FlowNode) -> None:
    with node.observer() as stub:
        stream = stub.GetAgentEvents(observer_pb2.GetAgentEventsRequest(follow=True), timeout=20)
        stream.initial_metadata()
        node.apply(ALLOW_FRIEND)
        event = next(
            answer.agent_event
            for answer in stream
            if answer.agent_event.type == flow_pb2.POLICY_UPDATED
        )
        assert any("friends" in label for label in event.policy_update.labels)
        stream.cancel()


def test_what_cannot_be_asked_is_refused(node: FlowNode) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        node.flows(flow_pb2.FlowFilter(source_ip=["nowhere"]))
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "source_ip" in error.details()


def _reads_until(stream: Any, wanted: Callable[[Any], bool]) -> Any:
    return next(answer for answer in stream if wanted(answer))


def test_an_agent_that_goes_is_told_and_heard_again(node: FlowNode) -> None:
    start = since()
    with node.observer() as stub:
        stream = stub.GetFlows(observer_pb2.GetFlowsRequest(follow=True), timeout=60)
        stream.initial_metadata()
        node.stop("agent", signal.SIGKILL)
        gone = _reads_until(stream, lambda answer: answer.HasField("node_status"))
        assert gone.node_status.state_change == relay_pb2.NODE_UNAVAILABLE
        assert list(gone.node_status.node_names) == ["default/n1"]
        eventually(lambda: not node.watching(), within_s=30, what="it is known to be away")
        node.start("agent")
        eventually(node.watching, within_s=30, what="the agent is heard again")
        assert connect(node, "friend", node.get("server").ipv4, 8083)
        flow = _reads_until(stream, lambda a: a.flow.l4.TCP.destination_port == 8083)
        assert flow.flow.source.pod_name == "friend"
        stream.cancel()
        # Who asks later is told that nobody watched, and for how long.
        answers = list(stub.GetFlows(observer_pb2.GetFlowsRequest(since=start), timeout=10))
    statuses = [answer.node_status for answer in answers if answer.HasField("node_status")]
    assert any("nothing was recorded for" in status.message for status in statuses)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_history_goes_on_after_a_restart(node: FlowNode, how: signal.Signals) -> None:
    port = 8084 if how is signal.SIGTERM else 8085
    wanted = flow_pb2.FlowFilter(destination_port=[str(port)])
    start = since()
    assert connect(node, "friend", node.get("server").ipv4, port)
    before = node.wait_flow(wanted, since=start)
    if how is signal.SIGKILL:
        segments = node.state_dir / "flows" / "segments"
        count = len(list(segments.glob("*.parquet")))
        eventually(
            lambda: len(list(segments.glob("*.parquet"))) > count, within_s=30, what="a file"
        )
    node.stop("flows", how)
    node.start_flows()
    eventually(node.watching, within_s=30, what="the agent is heard")
    found = node.flows(wanted, since=start)
    assert before.uuid in [flow.uuid for flow in found]
    assert next(flow for flow in found if flow.uuid == before.uuid) == before
    with node.observer() as stub:
        answers = list(stub.GetFlows(observer_pb2.GetFlowsRequest(since=start), timeout=10))
    messages = [answer.node_status.message for answer in answers if answer.HasField("node_status")]
    assert any("did not run" in message for message in messages)
    # New flows come after.
    assert connect(node, "friend", node.get("server").ipv4, port)
    eventually(
        lambda: len(node.flows(wanted, since=start)) > len(found), within_s=30, what="new flows"
    )


L7_POLICY = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: l7, namespace: default}
spec:
  endpointSelector: {matchLabels: {app: deathstar}}
  ingress:
  - fromEndpoints: [{matchLabels: {org: empire}}]
    toPorts:
    - ports: [{port: "8000", protocol: TCP}]
      rules:
        http:
        - {method: POST, path: /landing}
"""


def test_requests_at_the_proxy_are_flows(need_nft: None, need_redirect_peer: None) -> None:
    with FlowNode("flowl7") as node:
        node.start("identity")
        node.start("xds")
        node.start("agent")
        node.workload("deathstar", *EMPIRE)
        node.workload("tiefighter", *FIGHTER)
        node.start_flows()
        eventually(node.watching, within_s=30, what="the agent is heard")
        with contextlib.closing(Web(node, "deathstar")):
            node.apply(L7_POLICY)
            address = node.get("deathstar").ipv4
            eventually(
                lambda: once(node, "tiefighter", address, "POST", "/landing")[0] == 200,
                within_s=20,
                what="the proxy answers",
            )
            assert once(node, "tiefighter", address, "PUT", "/exhaust")[0] == 403
        refused = node.wait_flow(flow_pb2.FlowFilter(protocol=["http"], verdict=[flow_pb2.DROPPED]))
        assert (refused.source.pod_name, refused.destination.pod_name) == (
            "tiefighter", "deathstar",
        )  # fmt: skip
        assert refused.l7.http.method == "PUT"
        assert refused.l7.http.url.endswith("/exhaust")
        assert refused.l7.http.code == 403
        assert "PUT" in refused.Summary
        assert "l7" in [by.name for by in refused.ingress_denied_by]
        answered = node.wait_flow(
            flow_pb2.FlowFilter(http_status_code=["2+"], http_path=["^/landing"], reply=[True])
        )
        assert answered.source.pod_name == "deathstar"
        assert answered.l7.http.code == 200
        assert answered.l7.latency_ns > 0
        assert "l7" in [by.name for by in answered.ingress_allowed_by]
        # The connection's own verdict says that it was redirected, and to where.
        redirected = node.wait_flow(flow_pb2.FlowFilter(verdict=[flow_pb2.REDIRECTED]))
        assert redirected.proxy_port
