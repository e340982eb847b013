"""`policy test --level kernel`: the compiled programs answer as the engine does."""

from __future__ import annotations

import pytest

from cilia.policy import parse_documents
from cilia.policy.questions.inventory import parse_inventory
from cilia.policy.questions.judge import End, Question, ask
from cilia.policy.questions.requests import HTTPRequest
from cilia.policy.questions.scene import Scene
from cli.policy_kernel import KernelPolicies

ENDPOINTS = """
- {name: web, labels: {app: web}, ports: [{name: http, port: 8080}]}
- {name: db, labels: {app: db}}
- {name: other, labels: {app: other}}
"""
POLICIES = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: db}
spec:
  endpointSelector: {matchLabels: {app: db}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: web}}]
    toPorts:
    - ports: [{port: "80", protocol: TCP}]
      rules: {http: [{method: GET, path: /public}]}
  - fromEntities: [cluster]
    toPorts: [{ports: [{port: "1000", endPort: 1999}]}]
  - fromCIDRSet: [{cidr: 192.0.2.0/24, except: [192.0.2.128/25]}]
  - icmps: [{fields: [{type: 8}]}]
  ingressDeny:
  - fromEndpoints: [{matchLabels: {app: other}}]
    toPorts: [{ports: [{port: "1500", protocol: TCP}]}]
  egress:
  - toEndpoints: [{matchLabels: {app: web}}]
    toPorts: [{ports: [{port: http}]}]
  - toPorts:
    - ports: [{port: "53", protocol: UDP}]
      rules: {dns: [{matchPattern: "*"}]}
---
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: node}
spec:
  nodeSelector: {}
  ingress: [{toPorts: [{ports: [{port: "22", protocol: TCP}]}]}]
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: audited, annotations: {cilia.io/audit: "true"}}
spec:
  endpointSelector: {matchLabels: {app: other}}
  ingress: [{}]
"""
PORTS = [(6, n) for n in (22, 80, 999, 1000, 1500, 1999, 2000, 8080)]
PORTS += [(17, 1500), (17, 80), (132, 1000), (1, 8), (1, 0), (58, 128)]


@pytest.fixture
def scene(need_root: None, need_bpf: None, need_objects: None) -> Scene:
    """Every feature that is a row in the kernel."""
    result = parse_documents(POLICIES, source="p.yaml")
    assert result.faults == ()
    return Scene(result.documents, parse_inventory(ENDPOINTS, source="e.yaml"))


def test_the_kernel_answers_as_the_engine_does(scene: Scene) -> None:
    parties = (*scene.endpoints, scene.host, *scene.regions)
    asked = allowed = 0
    with KernelPolicies(scene) as kernel:
        for source in parties:
            for destination in parties:
                if source is destination or not (source.local or destination.local):
                    continue
                for proto, port in PORTS:
                    question = Question(
                        src=End(source, "s"), dst=End(destination, "d"), proto=proto, port=port
                    )
                    answer = ask(scene, question)
                    passed, rules = kernel.answer(question)
                    assert passed == answer.allowed, (answer.egress.reason, answer.ingress.reason)
                    known = {
                        int(x.rule_id) for y in (answer.egress, answer.ingress) for x in y.rules
                    }
                    assert set(rules) <= known, (rules, answer.egress.reason, answer.ingress.reason)
                    asked += 1
                    allowed += passed
    assert 0.2 < allowed / asked < 0.8


def test_requests_are_left_to_the_rules_of_the_proxy(scene: Scene) -> None:
    web, db = scene.endpoints[0], scene.endpoints[1]
    with KernelPolicies(scene) as kernel:
        for request, wanted in (
            (HTTPRequest("GET", "/public"), True),
            (HTTPRequest("POST", "/public"), False),
            (None, True),
        ):
            question = Question(
                src=End(web, "web"), dst=End(db, "db"), proto=6, port=80, request=request
            )
            assert kernel.answer(question)[0] == wanted
            assert ask(scene, question).allowed == wanted


def test_without_a_proxy_for_datagrams_they_are_denied(scene: Scene) -> None:
    """No proxy takes UDP, so the kernel denies what the engine alone would leave to it."""
    web, db = scene.endpoints[0], scene.endpoints[1]
    question = Question(src=End(db, "db"), dst=End(web, "web"), proto=17, port=53)
    with KernelPolicies(scene) as kernel:
        assert not kernel.answer(question)[0]
