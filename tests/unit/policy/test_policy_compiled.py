"""Many questions at once have the answers that the engine gives one by one."""

from __future__ import annotations

from cilia.identity import cidr_labels, reserved_labels
from cilia.labels import Labels
from cilia.policy import ALL_PARSERS, PolicyEngine, parse_documents

NS = "k8s:io.kubernetes.pod.namespace=default"
PEERS = [
    *(Labels.parse([f"k8s:app={app}", f"k8s:env={env}", NS]) for app in "abc" for env in "xy"),
    reserved_labels(1),
    reserved_labels(9),
    cidr_labels("192.0.2.7/32"),
    Labels.parse(["reserved:host", "k8s:type=worker"]),
]
RULES = """
- endpointSelector: {matchLabels: {app: a}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: b}}]
  - fromEndpoints: [{matchLabels: {env: y}}]
    toPorts: [{ports: [{port: "80", protocol: TCP}], rules: {http: [{path: /}]}}]
  egress:
  - toCIDR: [192.0.2.0/24]
  - toPorts: [{ports: [{port: web}]}]
- endpointSelector: {matchLabels: {env: x}}
  ingressDeny: [{fromEndpoints: [{matchLabels: {app: c}}]}]
  egressDeny: [{toEntities: [host], toPorts: [{ports: [{port: "22"}]}]}]
---
kind: CiliumClusterwideNetworkPolicy
apiVersion: cilium.io/v2
metadata: {name: node}
spec:
  nodeSelector: {matchLabels: {type: worker}}
  ingress: [{fromEntities: [cluster], toPorts: [{ports: [{port: "22", protocol: TCP}]}]}]
"""


def test_every_pair() -> None:
    engine = PolicyEngine(enforcers=ALL_PARSERS)
    result = parse_documents(RULES, source="r.yaml")
    assert result.faults == ()
    engine.set_documents(result.documents)
    ports = {"web": (8080, 6)}
    compiled = engine.compile()
    numbers = [compiled.add(x, ports if n % 2 else None) for n, x in enumerate(PEERS)]
    assert compiled.add(PEERS[0]) == numbers[0]
    questions = [
        (a, b, proto, port)
        for a in numbers
        for b in numbers
        for proto, port in ((6, 80), (6, 22), (17, 80), (1, 8), (6, 8080))
    ]
    answers = compiled.allows_many(questions)
    for (a, b, proto, port), answer in zip(questions, answers, strict=True):
        names = ports if b % 2 else None
        wanted = engine.trace(PEERS[a], PEERS[b], proto, port, dst_ports=names)
        assert answer == wanted.allowed, (PEERS[a], PEERS[b], proto, port)
        assert compiled.allows(a, b, proto, port) == answer
    assert 0 < sum(answers) < len(answers)
    # One that comes later is looked up, too.
    late = compiled.add(Labels.parse(["k8s:app=b", "k8s:env=z", NS]))
    assert compiled.allows(late, numbers[1], 6, 81)


def test_it_says_when_the_policies_are_others() -> None:
    engine = PolicyEngine()
    compiled = engine.compile()
    first, second = compiled.add(PEERS[0]), compiled.add(PEERS[1])
    assert compiled.allows(first, second, 6, 80)
    assert compiled.current
    (document,) = parse_documents(
        "- endpointSelector: {}\n  ingress: [{}]\n", source="r.yaml"
    ).documents
    engine.upsert(document)
    assert not compiled.current
    assert compiled.allows(first, second, 6, 80)
    again = engine.compile()
    assert not again.allows(again.add(PEERS[0]), again.add(PEERS[1]), 6, 80)
