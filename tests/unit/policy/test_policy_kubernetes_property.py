"""NetworkPolicy against an evaluator that reads the documents as Kubernetes' API describes them.

It knows pods, namespaces and blocks, and nothing of identities, selectors or rows: each question
goes through all policies anew.
"""

from __future__ import annotations

import json
import os
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cilia.identity import cidr_labels
from cilia.labels import Label, Labels, namespace_labels
from cilia.policy import PolicyEngine, parse_documents

EXAMPLES = int(os.environ.get("CILIA_PROPERTY_EXAMPLES", "120"))

NAMESPACES = {"d": {"team": "red"}, "x": {"team": "blue", "tier": "a"}, "y": {}}
PODS = [(ns, app, env) for ns in NAMESPACES for app in ("a", "b") for env in ("p", "")]
OUTSIDE = ["10.1.2.3", "10.200.0.1", "192.0.2.7", "2001:db8::1", "fd00::5"]
BLOCKS = [
    "0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.2.3/32", "192.0.2.0/24",
    "::/0", "2001:db8::/32",
]  # fmt: skip
PORTS = [("TCP", 80), ("TCP", 81), ("TCP", 8080), ("UDP", 80), ("SCTP", 80), ("ICMP", 8)]
NAMED = {"web": ("TCP", 8080), "dns": ("UDP", 80)}

Pod = tuple[str, str, str]


def pod_labels(pod: Pod) -> dict[str, str]:
    _, app, env = pod
    return {"app": app, **({"env": env} if env else {})}


# ---- the evaluator


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    for key, value in (selector.get("matchLabels") or {}).items():
        if labels.get(key) != value:
            return False
    for x in selector.get("matchExpressions") or []:
        key, values = x["key"], x.get("values", [])
        holds = {
            "In": labels.get(key) in values,
            "NotIn": labels.get(key) not in values,
            "Exists": key in labels,
            "DoesNotExist": key not in labels,
        }[x["operator"]]
        if not holds:
            return False
    return True


def peer_matches(peer: dict[str, Any], policy_namespace: str, other: Pod | str) -> bool:
    if "ipBlock" in peer:
        if not isinstance(other, str):
            return False  # blocks are about what is outside the cluster
        address, block = ip_address(other), peer["ipBlock"]
        if address not in ip_network(block["cidr"]):
            return False
        return not any(address in ip_network(x) for x in block.get("except", []))
    if isinstance(other, str):
        return False
    namespace = other[0]
    if "namespaceSelector" in peer:
        labels = {**NAMESPACES[namespace], "kubernetes.io/metadata.name": namespace}
        if not selects(peer["namespaceSelector"], labels):
            return False
    elif namespace != policy_namespace:
        return False
    return selects(peer.get("podSelector", {}), pod_labels(other))


def port_matches(port: dict[str, Any], protocol: str, number: int, *, named: bool) -> bool:
    if port.get("protocol", "TCP") != protocol:
        return False
    wanted = port.get("port")
    if wanted is None:
        return True
    if isinstance(wanted, str):
        return named and NAMED.get(wanted) == (protocol, number)
    return bool(wanted <= number <= port.get("endPort", wanted))


def evaluate(
    policies: list[dict[str, Any]],
    pod: Pod,
    other: Pod | str,
    protocol: str,
    number: int,
    *,
    egress: bool,
) -> bool:
    isolated = False
    for policy in policies:
        spec, namespace = policy["spec"], policy["metadata"]["namespace"]
        if namespace != pod[0] or not selects(spec["podSelector"], pod_labels(pod)):
            continue
        side, field = ("egress", "to") if egress else ("ingress", "from")
        types = spec.get("policyTypes") or ["Ingress", *(["Egress"] if spec.get("egress") else [])]
        if side.title() not in types:
            continue
        isolated = True
        for rule in spec.get(side) or []:
            peers, ports = rule.get(field) or [], rule.get("ports") or []
            at_peer = not peers or any(peer_matches(x, namespace, other) for x in peers)
            # Only pods name ports; a port's name means the destination's.
            named = not egress or not isinstance(other, str)
            at_port = not ports or any(
                port_matches(x, protocol, number, named=named) for x in ports
            )
            if at_peer and at_port:
                return True
    return not isolated


# ---- policies

expressions = st.one_of(
    st.fixed_dictionaries(
        {
            "key": st.sampled_from(["app", "env", "team", "tier", "kubernetes.io/metadata.name"]),
            "operator": st.sampled_from(["In", "NotIn"]),
            "values": st.lists(
                st.sampled_from(["a", "b", "p", "red", "blue", "d", "x"]), min_size=1, max_size=2
            ),
        }
    ),
    st.fixed_dictionaries(
        {
            "key": st.sampled_from(["app", "env", "team", "tier", "kubernetes.io/metadata.name"]),
            "operator": st.sampled_from(["Exists", "DoesNotExist"]),
        }
    ),
)


def selectors(*pairs: tuple[str, str]) -> st.SearchStrategy[dict[str, Any]]:
    return st.one_of(
        st.just({}),
        st.sampled_from([{"matchLabels": {k: v}} for k, v in pairs]),
        st.fixed_dictionaries({"matchExpressions": st.lists(expressions, min_size=1, max_size=2)}),
    )


pods = selectors(("app", "a"), ("app", "b"), ("env", "p"))
spaces = selectors(("team", "red"), ("tier", "a"), ("kubernetes.io/metadata.name", "y"))


@st.composite
def blocks(draw: st.DrawFn) -> dict[str, Any]:
    cidr = draw(st.sampled_from(BLOCKS))
    inside = [
        x for x in BLOCKS
        if ":" in x == ":" in cidr or (":" in x) == (":" in cidr)
        if x != cidr and ip_network(x).subnet_of(ip_network(cidr))  # type: ignore[arg-type]
    ]  # fmt: skip
    block: dict[str, Any] = {"cidr": cidr}
    if inside and draw(st.sampled_from([True, False])):
        block["except"] = [draw(st.sampled_from(inside))]
    return {"ipBlock": block}


peers = st.one_of(
    st.fixed_dictionaries({"podSelector": pods}),
    st.fixed_dictionaries({"namespaceSelector": spaces}),
    st.fixed_dictionaries({"podSelector": pods, "namespaceSelector": spaces}),
    blocks(),
)
protocols = st.sampled_from(["TCP", "UDP", "SCTP"])
port_entries: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"protocol": protocols}),
    st.fixed_dictionaries(
        {"port": st.sampled_from([80, 81, "web", "dns", "none"])}, optional={"protocol": protocols}
    ),
    st.fixed_dictionaries({"port": st.just(80), "endPort": st.sampled_from([80, 81, 9000])}),
)


def entries(field: str) -> st.SearchStrategy[list[dict[str, Any]]]:
    entry = st.fixed_dictionaries(
        {},
        optional={field: st.lists(peers, max_size=2), "ports": st.lists(port_entries, max_size=2)},
    )
    return st.lists(entry, min_size=1, max_size=2)


specs = st.fixed_dictionaries(
    {"podSelector": st.one_of(st.just({}), st.just({"matchLabels": {"app": "a"}}), pods)},
    optional={
        "policyTypes": st.lists(st.sampled_from(["Ingress", "Egress"]), max_size=2, unique=True),
        "ingress": entries("from"),
        "egress": entries("to"),
    },
)
policies = st.lists(st.tuples(st.sampled_from(["d", "d", "x"]), specs), min_size=1, max_size=3).map(
    lambda found: [
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": f"p{i}", "namespace": namespace},
            "spec": spec,
        }
        for i, (namespace, spec) in enumerate(found)
    ]
)


def identity(other: Pod | str) -> Labels:
    if isinstance(other, str):
        return cidr_labels(ip_network(other))
    own = [Label("k8s", key, value) for key, value in pod_labels(other).items()]
    return Labels(own).merge(namespace_labels(other[0], NAMESPACES[other[0]]))


@pytest.mark.timeout(900)
@settings(max_examples=EXAMPLES, deadline=None)
@given(policies, st.sampled_from(PODS[:6]))
def test_engine_and_evaluator_agree(documents: list[dict[str, Any]], pod: Pod) -> None:
    text = json.dumps({"kind": "List", "items": documents})
    result = parse_documents(text, source="np.json")
    assert result.faults == ()
    engine = PolicyEngine(allow_localhost=False)
    engine.set_documents(result.documents)
    numbers = {"TCP": 6, "UDP": 17}
    names = {name: (port, numbers[protocol]) for name, (protocol, port) in NAMED.items()}
    everybody: list[Pod | str] = [*PODS, *OUTSIDE]
    for number, other in enumerate(everybody, 1000):
        engine.add_identity(number, identity(other))
        if not isinstance(other, str):
            engine.set_port_names(number, names)
    for peer, other in enumerate(everybody, 1000):
        for egress in (False, True):
            for protocol, port in PORTS:
                verdict = engine.verdict(
                    identity(pod),
                    peer,
                    "egress" if egress else "ingress",
                    protocol,
                    port,
                    named_ports=names,
                )
                expected = evaluate(documents, pod, other, protocol, port, egress=egress)
                assert verdict.allowed == expected, (other, egress, protocol, port, verdict.reason)
