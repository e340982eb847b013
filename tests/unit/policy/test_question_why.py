"""`why`: the rules that deny, those that nearly allow, and edits that do what they promise."""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from cilia.policy import PROTO_BY_NAME, parse_documents
from cilia.policy.api import DNSRule, GenericRule, HeaderMatch, HTTPRule, KafkaRule
from cilia.policy.questions.inventory import Inventory, parse_inventory
from cilia.policy.questions.judge import Answer, End, Question, ask
from cilia.policy.questions.misses import near_misses
from cilia.policy.questions.repair import Proposal, propose
from cilia.policy.questions.requests import DNSRequest, HTTPRequest, KafkaRequest, passes
from cilia.policy.questions.scene import Scene
from cilia.policy.questions.yamledit import Op, apply_plain, edit, parse_path, path_text


def _module(name: str) -> Any:
    """A neighbour of this file; its examples and its naive evaluator are used here too."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


oracle = _module("oracle")
random_policies = _module("test_policy_property")
without_l7 = _module("test_question_matrix").without_l7

ENDPOINTS = """
- {name: web, labels: {app: web, tier: front}}
- {name: other, labels: {app: other, tier: front}}
- {name: db, labels: {app: db}, ports: [{name: sql, port: 5432}]}
- {name: far, namespace: x, labels: {app: web}}
"""
POLICY = """\
# Only the web may use the database.
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: db}
spec:
  endpointSelector:
    matchLabels: {app: db}
  ingress:
  - fromEndpoints:
    - matchLabels:
        app: web   # the shop
    toPorts:
    - ports:
      - {port: "5432", protocol: TCP}
"""


class Case:
    """A text of policies, and questions about it."""

    def __init__(self, text: str, endpoints: str = ENDPOINTS, mode: Any = "default") -> None:
        self.text, self.mode = text, mode
        self.inventory: Inventory = parse_inventory(endpoints, source="e.yaml")
        result = parse_documents(text, source="p.yaml") if text else None
        assert result is None or result.faults == ()
        self.documents = result.documents if result else ()
        self.scene = Scene(self.documents, self.inventory, mode=mode)

    def end(self, name: str) -> End:
        if (found := self.inventory.find(name)) is not None:
            return End(self.scene.party_of(found), found.ref)
        if name.startswith("reserved:"):
            party = self.scene.entity(name.removeprefix("reserved:"))
            assert party is not None
            return End(party, name)
        import ipaddress

        address = ipaddress.ip_address(name)
        return End(self.scene.region(address), name, address)

    def question(self, src: str, dst: str, dport: str, request: Any = None) -> Question:
        port, _, protocol = dport.partition("/")
        return Question(
            src=self.end(src),
            dst=self.end(dst),
            proto=PROTO_BY_NAME[protocol.upper()],
            port=int(port),
            request=request,
        )

    def ask(self, *what: Any) -> Answer:
        return ask(self.scene, self.question(*what))

    def repair(self, *what: Any) -> Proposal | None:
        return propose(
            self.documents,
            {"p.yaml": self.text},
            self.inventory,
            self.question(*what),
            make=functools.partial(Scene, mode=self.mode),
        )

    def mended(self, *what: Any) -> tuple[str, tuple[str, ...]]:
        """The text after the edit, seen to allow what was asked, and what else it allows."""
        assert not self.ask(*what).allowed
        proposal = self.repair(*what)
        assert proposal is not None
        text = "---\n".join(x.after for x in proposal.changed)
        if not any(x.source == "p.yaml" for x in proposal.changed):
            text += f"---\n{self.text}" if self.text else ""
        after = Case(text, mode=self.mode)
        after.inventory = self.inventory
        after.scene = Scene(after.documents, self.inventory, mode=self.mode)
        assert after.ask(*what).allowed
        return text, proposal.also


def added(before: str, after: str) -> list[str]:
    """The lines that are new, and a mark when something else changed."""
    kept = after.splitlines()
    for line in before.splitlines():
        if line not in kept:
            return ["(changed)"]
        kept.remove(line)
    return [x.strip() for x in kept]


# ---- what denies, and what nearly allows


def test_a_default_denial_names_what_isolates_and_what_was_near() -> None:
    case = Case(POLICY)
    answer = case.ask("other", "db", "5432/tcp")
    assert [x.egress for x in answer.denials] == [False]
    (denial,) = answer.denials
    assert denial.cause == "default"
    assert [(x.path, str(x.origin)) for x in denial.default_deny] == [("spec.ingress", "p.yaml:8")]
    (miss, *more) = near_misses(case.scene, answer.question, False)
    assert not more
    assert (miss.rule.path, str(miss.rule.origin)) == ("spec.ingress[0]", "p.yaml:9")
    assert miss.failed == {"peers"}
    assert miss.distance == 1
    assert miss.failures[0].text == "default/other is not app=web"


@pytest.mark.parametrize(
    ("src", "dport", "failed", "text"),
    [
        ("web", "80/tcp", {"ports"}, "is about 5432/TCP, not 80/TCP"),
        ("x/far", "5432/tcp", {"peers"}, "x/far is not k8s:io.kubernetes.pod.namespace=default"),
        ("other", "80/udp", {"peers", "ports"}, "default/other is not app=web"),
        ("192.0.2.1", "5432/tcp", {"peers"}, "192.0.2.1 is not app=web"),
    ],
)
def test_near_misses_say_which_condition_failed(
    src: str, dport: str, failed: set[str], text: str
) -> None:
    case = Case(POLICY)
    answer = case.ask(src, "db", dport)
    miss = near_misses(case.scene, answer.question, False)[0]
    assert miss.failed == failed
    assert any(text in x.text for x in miss.failures)


def test_rules_about_others_are_further_away() -> None:
    case = Case(
        POLICY
        + "---\n"
        + POLICY.replace("name: db", "name: two")
        .replace("app: db", "app: web")
        .replace("app: web   # the shop", "app: other")
    )
    answer = case.ask("other", "db", "5432/tcp")
    found = near_misses(case.scene, answer.question, False)
    assert [sorted(x.failed) for x in found] == [["peers"], ["subject"]]
    assert "is about other endpoints: default/db is not app=web" in found[1].failures[0].text


def test_allowed_answers_name_the_rule() -> None:
    answer = Case(POLICY).ask("web", "db", "5432/tcp")
    assert answer.allowed
    assert [x.path for x in answer.ingress.rules] == ["spec.ingress[0]"]
    assert answer.egress.cause == "open"
    assert Case(POLICY).ask("reserved:host", "db", "1/tcp").ingress.cause == "host"
    assert Case(POLICY).ask("192.0.2.1", "web", "1/tcp").egress.cause == "unjudged"


# ---- edits


def test_another_peer_is_put_beside_the_one_that_is_there() -> None:
    text, also = Case(POLICY).mended("other", "db", "5432/tcp")
    assert added(POLICY, text) == ["- matchLabels:", "app: other", "tier: front"]
    assert also == ()


def test_a_peer_of_another_namespace_is_named_with_it() -> None:
    text, _ = Case(POLICY).mended("x/far", "db", "5432/tcp")
    assert added(POLICY, text) == [
        "- matchLabels:",
        "app: web",
        '"k8s:io.kubernetes.pod.namespace": x',
    ] or added(POLICY, text) == ["- matchLabels:", "app: web", "k8s:io.kubernetes.pod.namespace: x"]


def test_another_port_is_put_beside_the_one_that_is_there() -> None:
    text, also = Case(POLICY).mended("web", "db", "80/tcp")
    assert added(POLICY, text) == ['- port: "80"', "protocol: TCP"]
    assert also == ()


def test_an_edit_that_would_open_more_is_not_taken() -> None:
    wide = POLICY.replace("app: web   # the shop", "tier: front")
    text, also = Case(wide).mended("web", "db", "80/tcp")
    # a port more would be for `other` too
    assert "- fromEndpoints:" in added(wide, text)
    assert also == ()


def test_outside_host_and_icmp() -> None:
    text, _ = Case(POLICY).mended("192.0.2.1", "db", "5432/tcp")
    assert '- "192.0.2.1/32"' in added(POLICY, text)
    text, _ = Case(POLICY).mended("web", "db", "8/icmp")
    assert "- family: IPv4" in added(POLICY, text)
    node = POLICY.replace("app: web   # the shop", "reserved:remote-node: ")
    text, _ = Case(node).mended("reserved:health", "db", "5432/tcp")
    assert "health" in text


def test_both_ends_are_mended() -> None:
    egress = """\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: web}
spec:
  endpointSelector: {matchLabels: {app: other}}
  egress: [{toEntities: [world]}]
"""
    both = POLICY + "---\n" + egress
    text, also = Case(both).mended("other", "db", "5432/tcp")
    assert added(POLICY, text.partition("---")[0])[:1] == ["- matchLabels:"]
    assert "egress: [{toEntities: [world]}, {toEndpoints:" in text
    assert also == ()


def test_without_any_rule_a_policy_is_written() -> None:
    text, _ = Case("", mode="always").mended("web", "db", "5432/tcp")
    assert text.count("kind: CiliumNetworkPolicy") == 2
    assert "name: allow-egress-web" in text


@pytest.mark.parametrize(
    ("denial", "src", "gone"),
    [
        ("ingressDeny: [{fromEndpoints: [{matchLabels: {tier: front}}]}]", "web", ""),
        ('ingressDeny: [{fromCIDR: ["192.0.2.0/24"]}]', "192.0.2.1", "fromCIDR:"),
        ("ingressDeny: [{fromCIDRSet: [{cidr: 192.0.2.0/24}]}]", "192.0.2.1", ""),
        ('ingressDeny: [{toPorts: [{ports: [{port: "1", endPort: 6000}]}]}]', "web", ""),
        ("ingressDeny: [{fromEntities: [world]}]", "192.0.2.1", "world"),
    ],
)
def test_denials_are_narrowed(denial: str, src: str, gone: str) -> None:
    allow = POLICY.partition("  - fromEndpoints")[0] + "  - fromEntities: [all]\n"
    before = allow + f"  {denial}\n"
    text, also = Case(before).mended(src, "db", "5432/tcp")
    assert not gone or gone not in text
    if "Ports" in denial:  # it denies everybody, so everybody is let in; other ports stay denied
        assert "default/other to default/db" in also
        assert not Case(text).ask("web", "db", "99/tcp").allowed
        assert not Case(text).ask("web", "db", "5433/tcp").allowed
    elif src == "web":
        assert also == ()
        assert not Case(text).ask("other", "db", "5432/tcp").allowed


def test_a_denial_and_the_lack_of_an_allow_are_both_mended() -> None:
    before = POLICY + "  ingressDeny:\n  - fromEndpoints:\n    - matchLabels: {app: other}\n"
    text, _ = Case(before).mended("other", "db", "5432/tcp")
    assert "NotIn" in text or "ingressDeny: []" in text


def test_requirements_are_taken_away() -> None:
    before = POLICY + "  - fromRequires: [{matchLabels: {env: prod}}]\n"
    text, _ = Case(before).mended("web", "db", "5432/tcp")
    assert "env" not in text


def test_kubernetes_policies_are_edited_in_their_own_words() -> None:
    before = """\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: db
spec:
  podSelector: {matchLabels: {app: db}}
  ingress:
    - from:
        - podSelector: {matchLabels: {app: web}}
      ports:
        - port: 5432
"""
    text, _ = Case(before).mended("other", "db", "5432/tcp")
    assert added(before, text) == ["- podSelector:", "matchLabels:", "app: other", "tier: front"]
    text, _ = Case(before).mended("x/far", "db", "5432/tcp")
    assert "kubernetes.io/metadata.name: x" in text
    text, _ = Case(before).mended("192.0.2.1", "db", "5432/tcp")
    assert 'cidr: "192.0.2.1/32"' in text
    text, _ = Case(before).mended("web", "db", "53/udp")
    assert "protocol: UDP" in text


def test_json_and_lists_of_rules() -> None:
    rules = json.dumps(
        [
            {
                "endpointSelector": {"matchLabels": {"app": "db"}},
                "ingress": [{"fromEndpoints": [{"matchLabels": {"app": "nobody"}}]}],
            }
        ]
    )
    text, _ = Case(rules).mended("web", "db", "5432/tcp")
    assert isinstance(json.loads(text), list)
    listing = (
        '{"kind": "List", "items": ['
        + json.dumps(
            {
                "apiVersion": "cilium.io/v2",
                "kind": "CiliumNetworkPolicy",
                "metadata": {"name": "a"},
                "spec": {"endpointSelector": {}, "ingress": [{}]},
            }
        )
        + "]}"
    )
    text, _ = Case(listing).mended("web", "db", "5432/tcp")
    assert json.loads(text)["kind"] == "List"


def test_a_stored_document_without_its_file_is_written_anew() -> None:
    case = Case(POLICY)
    proposal = propose(case.documents, {}, case.inventory, case.question("other", "db", "5432/tcp"))
    assert proposal is not None
    ((document, text),) = proposal.edited
    assert document.name == "db"
    assert Case(text).ask("other", "db", "5432/tcp").allowed


def test_edited_documents_stand_alone() -> None:
    two = POLICY + "---\n" + POLICY.replace("name: db", "name: two").replace("app: db", "app: web")
    case = Case(two)
    proposal = case.repair("other", "db", "5432/tcp")
    assert proposal is not None
    ((_, text),) = proposal.edited
    assert text.count("kind:") == 1
    assert "name: db" in text
    assert proposal.changed[0].after.count("kind:") == 2


# ---- editing text


@pytest.mark.parametrize("path", ["spec.ingress[0].fromEndpoints", "[0].ingress[1]", "spec"])
def test_paths(path: str) -> None:
    assert path_text(parse_path(path)) == path


@pytest.mark.parametrize(
    ("op", "same_comments"),
    [
        (Op("append", ("spec", "ingress"), {"fromEntities": ["world"]}), True),
        (Op("append", ("spec", "ingress", 0, "toPorts", 0, "ports"), {"port": "1"}), True),
        (Op("set", ("spec", "egress"), [{"toEntities": ["all"]}]), True),
        (Op("set", ("spec", "endpointSelector", "matchLabels", "x"), "y"), True),
        (Op("set", ("spec", "ingress", 0, "toPorts"), [{"ports": [{"port": "2"}]}]), True),
        (Op("set", ("metadata", "namespace"), "shop"), True),
        (Op("remove", ("spec", "ingress", 0, "toPorts")), True),
        (Op("remove", ("spec", "ingress", 0, "fromEndpoints")), False),
        (Op("remove", ("spec", "ingress", 0)), False),
        (Op("remove", ("spec", "ingress")), False),
    ],
    ids=lambda x: f"{x.action} {x.path_text}" if isinstance(x, Op) else "",
)
def test_edits_read_back_as_meant(op: Op, same_comments: bool) -> None:
    (document,) = parse_documents(POLICY, source="p.yaml").documents
    changed = edit(POLICY, document, op)
    assert changed.text != POLICY
    again = parse_documents(changed.text, source="p.yaml", default_namespace="default")
    if not again.faults:
        (after,) = again.documents
        assert json.loads(after.body) == apply_plain(json.loads(document.body), op)
    assert changed.text.startswith("# Only the web")
    assert ("# the shop" in changed.text) == same_comments


# ---- requests


HTTP = POLICY.replace(
    '      - {port: "5432", protocol: TCP}\n',
    '      - {port: "5432", protocol: TCP}\n      rules:\n        http:\n'
    '        - {method: GET, path: "/public.*"}\n',
)


def test_a_request_that_no_rule_lets_pass() -> None:
    request = HTTPRequest("POST", "/admin(1)")
    case = Case(HTTP)
    assert case.ask("web", "db", "5432/tcp").allowed
    assert case.ask("web", "db", "5432/tcp", HTTPRequest("GET", "/public/x")).allowed
    answer = case.ask("web", "db", "5432/tcp", request)
    (denial,) = answer.denials
    assert denial.cause == "request"
    (miss,) = near_misses(case.scene, answer.question, False)
    assert miss.failed == {"request"}
    assert "method POST is not GET, path /admin(1) is not /public.*" in miss.failures[0].text
    text, _ = case.mended("web", "db", "5432/tcp", request)
    assert added(HTTP, text) == ["- method: POST", 'path: "/admin\\\\(1\\\\)"']


@pytest.mark.parametrize(
    ("rule", "request_", "passes_"),
    [
        (HTTPRule(), HTTPRequest(), True),
        (HTTPRule(method="GET|HEAD"), HTTPRequest("HEAD"), True),
        (HTTPRule(path="/a"), HTTPRequest("GET", "/a/b"), False),
        (HTTPRule(path="/a$"), HTTPRequest("GET", "/a"), True),
        (HTTPRule(host="a[.]org"), HTTPRequest(host="a.org"), True),
        (HTTPRule(host="a[.]org"), HTTPRequest(), False),
        (HTTPRule(headers=("X-A: 1",)), HTTPRequest(headers=(("x-a", "1"),)), True),
        (HTTPRule(headers=("X-A: 1",)), HTTPRequest(headers=(("x-a", "2"),)), False),
        (HTTPRule(headers=("X-A",)), HTTPRequest(headers=(("x-a", "2"),)), True),
        (HTTPRule(header_matches=(HeaderMatch("t", "1"),)), HTTPRequest(), False),
        (HTTPRule(header_matches=(HeaderMatch("t", "1", "LOG"),)), HTTPRequest(), True),
        (DNSRule(match_pattern="*.a.org"), DNSRequest("b.A.org."), True),
        (DNSRule(match_pattern="*.a.org"), DNSRequest("a.org"), False),
        (DNSRule(match_name="a.org"), HTTPRequest(), False),
        (KafkaRule(role="produce", topic="t"), KafkaRequest("Produce", "t"), True),
        (KafkaRule(role="consume", topic="t"), KafkaRequest("produce", "t"), False),
        (KafkaRule(api_key="fetch"), KafkaRequest("fetch", "x", "c", "3"), True),
        (GenericRule((("cmd", "READ"),)), HTTPRequest(), False),
    ],
)
def test_which_requests_pass(rule: Any, request_: Any, passes_: bool) -> None:
    assert passes(rule, request_) == passes_


# ---- whatever the policies


MINE = json.dumps(
    [
        {"name": f"e{i}", "namespace": ns, "labels": [x for x in labels if "pod.names" not in x]}
        for i, labels in enumerate(random_policies.ENDPOINTS[:6])
        for ns in [oracle.value_of(labels, random_policies.NS) or "default"]
    ]
)


@settings(
    max_examples=max(random_policies.EXAMPLES // 5, 10),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    documents=random_policies.document_lists(),
    src=st.integers(0, 5),
    dst=st.integers(0, 5),
    proto=st.sampled_from([6, 6, 17, 1]),
    port=st.sampled_from([1, 80, 81, 200]),
)
def test_every_proposal_allows_what_it_promises(
    documents: list[dict[str, Any]], src: int, dst: int, proto: int, port: int
) -> None:
    text = json.dumps({"kind": "List", "items": documents})
    case = Case(text if documents else "", MINE)
    if src == dst:
        return
    names = [x.ref for x in case.inventory.endpoints]
    what = (names[src], names[dst], f"{port}/{ {6: 'tcp', 17: 'udp', 1: 'icmp'}[proto] }")
    if case.ask(*what).allowed:
        event("allowed")
        return
    proposal = case.repair(*what)
    event("mended" if proposal is not None else "not mended")
    assert proposal is not None
    edited = without_l7([json.loads(x.body) for x in proposal.documents])
    labels = [[str(y) for y in x.labels] for x in case.inventory.endpoints]
    for subject, peer, egress in ((src, dst, True), (dst, src, False)):
        assert oracle.allowed(
            edited, labels[subject], labels[peer], egress=egress, proto=proto, port=port
        )
