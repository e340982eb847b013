"""What policy costs: 10,000 rules, 10,000 identities and 200 endpoints on one core.

The baseline is plain evaluation in the same process: for one endpoint and one peer, every rule
there is compared with both. Maps are real. The world is made by numbers, the same in each run.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import structlog

from cilia.bpf import Map
from cilia.bpf.layout import POLICY_KEY, POLICY_META, POLICY_VALUE
from cilia.bpf.uapi import F_NO_PREALLOC, MapType
from cilia.identity import EndpointID, NumericIdentity
from cilia.labels import Labels
from cilia.policy import Document, PolicyEngine, parse_documents
from cilia.policy.api import EntitySelector
from services.agent.calculation import Calculation
from services.agent.clusterwatch import PolicyName
from services.agent.endpoint import Endpoint
from services.agent.identityalloc import CidrIdentities
from services.agent.reconcilers.policymap import PolicyMaps
from tests.bench.figure import figure, percentile
from tests.bench.node import Node

RULES = 10_000
IDENTITIES = 10_000
ENDPOINTS = 200
SLOTS = 1024
APPS = 1000  # ten identities each
CHANGES = 300  # measured
NAIVE_PAIRS = 10
PREFIXES = 50_000
QUESTIONS = 1_000_000
FIRST = 256

NS = "k8s:io.kubernetes.pod.namespace"


def labels_of(number: int) -> Labels:
    """App, tier (1 in 8), zone (1 in 5), version (1 in 10) and namespace (1 in 20)."""
    return Labels.parse(
        [
            f"k8s:app=app{number % APPS}",
            f"k8s:tier=tier{number % 8}",
            f"k8s:zone=zone{number % 5}",
            f"k8s:version=v{number // APPS}",
            f"{NS}=ns{number % 20}",
        ]
    )


def rule_text(number: int, rng: random.Random) -> dict[str, Any]:
    """Most rules are about one endpoint's app; one in 500 is about a tier, 25 endpoints."""
    app = number % ENDPOINTS
    subject = {"tier": f"tier{number % 8}"} if number % 500 == 0 else {"app": f"app{app}"}
    ports = [
        {"port": str(rng.choice((80, 443, 8080, 9090, 5432))), "protocol": "TCP"}
        for _ in range(rng.randint(1, 2))
    ]
    element: dict[str, Any] = {"toPorts": [{"ports": ports}]}
    egress = number % 4 == 0
    side = "to" if egress else "from"
    match rng.randint(0, 9):
        case 0:
            element[f"{side}CIDR"] = [f"10.{rng.randint(0, 255)}.{rng.randint(0, 255)}.0/24"]
        case 1:
            element[f"{side}Endpoints"] = [
                {"matchLabels": {"tier": f"tier{rng.randint(0, 7)}", "zone": "zone1"}}
            ]
        case _:
            element[f"{side}Endpoints"] = [
                {"matchLabels": {"app": f"app{rng.randrange(APPS)}"}} for _ in range(2)
            ]
    name = "egress" if egress else "ingress"
    if rng.randint(0, 19) == 0:
        name += "Deny"
    return {"endpointSelector": {"matchLabels": subject}, name: [element]}


def document(number: int, rng: random.Random) -> Document:
    body = {
        "kind": "Rules",
        "metadata": {"name": f"r{number}"},
        "rules": [rule_text(number, rng)],
    }
    result = parse_documents(json.dumps(body), source="bench.json")
    assert not result.faults, result.faults
    return result.documents[0]


def name_of(document: Document) -> PolicyName:
    return PolicyName(document.kind, document.namespace or "", document.name)


def endpoint(number: int) -> Endpoint:
    labels = labels_of(number)
    return Endpoint(
        id=EndpointID(number + 1),
        name=f"e{number}",
        namespace="default",
        labels=labels,
        identity_labels=labels,
        netns="/none",
        interface="eth0",
        host_interface="x",
        identity=NumericIdentity(FIRST + number),
    )


@contextlib.contextmanager
def maps(limit: int = 1 << 17) -> Iterator[PolicyMaps]:
    """The policy maps of a node, as the agent writes them."""
    with contextlib.ExitStack() as stack:
        inner = Map.create(
            MapType.HASH,
            "bench_inner",
            POLICY_KEY.itemsize,
            POLICY_VALUE.itemsize,
            1,
            F_NO_PREALLOC,
        )
        stack.callback(inner.close)
        policy = Map.create(MapType.ARRAY_OF_MAPS, "bench_policy", 4, 4, SLOTS, inner=inner)
        stack.callback(policy.close)
        meta = Map.create(MapType.ARRAY, "bench_meta", 4, POLICY_META.itemsize, SLOTS)
        stack.callback(meta.close)
        found = PolicyMaps(policy=policy, meta=meta, limit=limit)
        stack.callback(found.close)
        yield found


def calculation(directory: Path) -> Calculation:
    return Calculation(
        mode="default",
        audit=False,
        allow_localhost=True,
        cluster="default",
        slots=SLOTS,
        cidrs=CidrIdentities(directory / "cidrs.json", release_delay_s=60),
        router=[],
    )


def resident() -> int:
    """This process's memory, in bytes."""
    gc.collect()
    return _resident_of("self")


def _resident_of(pid: int | str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no VmRSS in /proc/{pid}/status")


def naive(documents: list[Document], subject: Labels, peer: Labels) -> list[tuple[Any, ...]]:
    """The rows of one pair, as whoever keeps nothing has to find them."""
    rows: list[tuple[Any, ...]] = []
    for document in documents:
        for rule in document.rules:
            if not rule.selector.matches(subject):
                continue
            for element in rule.elements:
                for selector in element.peers or ():
                    if isinstance(selector, EntitySelector):
                        continue
                    if selector.matches(peer):
                        rows.append((element.egress, element.deny, element.l4))
    return rows


def timed(function: Callable[..., object], *arguments: object) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


class Bench:
    """A calculation and the maps that it is written to."""

    def __init__(self, directory: str, kernel: PolicyMaps) -> None:
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.INFO))
        self.calc = calculation(Path(directory))
        self.kernel = kernel
        self.reached = 0  # maps, by the last change

    def write(self) -> None:
        """Make what changed real, as a flush does."""
        dirty, touched = self.calc.take_dirty(), self.calc.take_touched()
        rows = [self.calc.policy_row(key) for key in sorted(dirty)]
        rows += [self.calc.newer_row(key) for key in touched - dirty]
        failed = self.kernel.write(rows)
        assert not failed, failed
        self.reached = len(rows)

    def resolve(self) -> None:
        for key in self.calc.subjects:
            self.calc.resolve(key)

    def put(self, number: int, labels: Labels) -> None:
        self.calc.put_identity(NumericIdentity(number), labels)
        self.write()

    def remove(self, number: int) -> None:
        self.calc.remove_identity(NumericIdentity(number))
        self.write()

    def change(self, documents: list[Document]) -> None:
        self.calc.set_documents({name_of(x): x for x in documents})
        self.write()

    def take(self, documents: list[Document]) -> None:
        self.calc.set_documents({}, [name_of(x) for x in documents])
        self.write()


def rules(name: str, *found: object) -> list[Document]:
    text = json.dumps({"kind": "Rules", "metadata": {"name": name}, "rules": found})
    result = parse_documents(text, source="bench.json")
    assert not result.faults, result.faults[:3]
    return list(result.documents)


EVERYONE = {
    "endpointSelector": {},
    "ingress": [{"fromEndpoints": [{"matchLabels": {"everyone": "knows"}}]}],
}


def bench_policy() -> list[dict[str, Any]]:
    """Full resolution, one identity, one rule, memory; against plain evaluation."""
    rng = random.Random(1)
    with tempfile.TemporaryDirectory() as directory, maps() as kernel:
        started = time.perf_counter()
        documents = [document(number, rng) for number in range(RULES)]
        parsing = time.perf_counter() - started
        before = resident()
        bench = Bench(directory, kernel)
        started = time.perf_counter()
        for number in range(IDENTITIES):
            bench.calc.put_identity(NumericIdentity(FIRST + number), labels_of(number))
        bench.calc.set_documents({name_of(x): x for x in documents})
        bench.calc.set_users([endpoint(number) for number in range(ENDPOINTS)])
        bench.resolve()
        full = time.perf_counter() - started
        rows = sum(len(bench.calc.resolve(key).mapstate) for key in bench.calc.subjects)
        memory = (resident() - before) / 1e6
        writing = timed(bench.write)
        gc.freeze()  # as the agent does

        # One identity comes, and goes.
        reach, touched = [], []
        first = FIRST + IDENTITIES
        for number in range(first, first + CHANGES):
            labels = labels_of(rng.randrange(IDENTITIES)).merge(Labels.parse(["k8s:new=yes"]))
            reach.append(timed(bench.put, number, labels))
            touched.append(bench.reached)
        reach += [timed(bench.remove, number) for number in range(first, first + CHANGES)]

        # One that every endpoint's rules select.
        broad = timed(bench.change, rules("everyone", EVERYONE))
        wide = []
        for number in range(first, first + CHANGES // 3):
            labels = labels_of(number).merge(Labels.parse(["k8s:everyone=knows"]))
            wide.append(timed(bench.put, number, labels))
            assert bench.reached == ENDPOINTS
            bench.remove(number)

        # One rule says something else.
        again = [document(rng.randrange(RULES), random.Random(n)) for n in range(CHANGES)]
        rule = [timed(bench.change, [changed]) for changed in again]

        # Plain evaluation of some pairs, and what that makes for all.
        pairs = [(rng.randrange(ENDPOINTS), rng.randrange(IDENTITIES)) for _ in range(NAIVE_PAIRS)]
        each = statistics.median(
            timed(naive, documents, labels_of(a), labels_of(b)) for a, b in pairs
        )
        plain_full, plain_identity = each * ENDPOINTS * IDENTITIES, each * ENDPOINTS
        gc.unfreeze()
    return [
        figure("policy_parse_rules", parsing, "s"),
        figure("policy_resolve_full", full, "s", goal=10, floor=10, less_is_better=True),
        figure("policy_resolve_times_faster", plain_full / full, "x", baseline=1,
               ratio=plain_full / full, goal=100, floor=100),
        figure("policy_rows", rows, "rows"),
        figure("policy_write_full", writing, "s"),
        figure("policy_memory", memory, "MB"),
        figure("policy_identity_maps_touched", statistics.mean(touched), "maps"),
        figure("policy_identity_p50", percentile(reach, 50) * 1e3, "ms"),
        figure("policy_identity_p99", percentile(reach, 99) * 1e3, "ms",
               goal=10, floor=10, less_is_better=True),
        figure("policy_identity_all_maps_p99", percentile(wide, 99) * 1e3, "ms",
               goal=10, less_is_better=True),
        figure("policy_identity_times_faster", plain_identity / percentile(reach, 50), "x",
               baseline=1, ratio=plain_identity / percentile(reach, 50), goal=100),
        figure("policy_rule_of_everyone", broad * 1e3, "ms"),
        figure("policy_rule_p50", percentile(rule, 50) * 1e3, "ms"),
        figure("policy_rule_p99", percentile(rule, 99) * 1e3, "ms",
               goal=100, floor=100, less_is_better=True),
    ]  # fmt: skip


def _cidr_texts() -> list[str]:
    """A CIDRSet of 50,000 prefixes, one exception each, as ten documents."""
    nets = [IPv4Network(((10 << 24) + (n << 8), 24)) for n in range(PREFIXES)]
    sets = [{"cidr": str(net), "except": [f"{net.network_address + 128}/26"]} for net in nets]
    return [
        json.dumps(_rule_list(f"c{at}", sets[at : at + 5000])) for at in range(0, PREFIXES, 5000)
    ]


def _rule_list(name: str, sets: list[dict[str, Any]]) -> dict[str, Any]:
    rule = {"endpointSelector": {}, "egress": [{"toCIDRSet": sets}]}
    return {"kind": "Rules", "metadata": {"name": name}, "rules": [rule]}


MORE = _rule_list("more", [{"cidr": "172.16.0.0/24", "except": ["172.16.0.128/26"]}])


def _parsed(texts: list[str]) -> list[Document]:
    results = [parse_documents(text, source="bench.json") for text in texts]
    assert not any(x.faults for x in results)
    return [document for x in results for document in x.documents]


def bench_policy_cidrs() -> list[dict[str, Any]]:
    """A CIDRSet of 50,000 prefixes: parsed, calculated, in a policy map; one more, and one less."""
    texts = _cidr_texts()
    started = time.perf_counter()
    documents = _parsed(texts)
    parsing = time.perf_counter() - started
    before = resident()
    with tempfile.TemporaryDirectory() as directory, maps() as kernel:
        bench = Bench(directory, kernel)
        bench.calc.set_users([endpoint(0)])
        bench.write()
        enforced = timed(bench.change, documents)
        (key,) = bench.calc.subjects
        state = bench.calc.resolve(key).mapstate
        entries = len(state)
        memory = (resident() - before) / 1e6
        numbers = bench.calc.cidrs.numbers
        net = IPv4Network("10.0.7.0/24")
        assert state.allows(numbers[net], True, 6, 80)
        assert not state.allows(numbers[IPv4Network("10.0.7.128/26")], True, 6, 80)
        gc.freeze()  # as the agent does
        (more,) = _parsed([json.dumps(MORE)])
        changes: list[float] = []
        for _ in range(CHANGES):
            changes += [timed(bench.change, [more]), timed(bench.take, [more])]
        gc.unfreeze()
    return [
        figure("policy_cidrs_parse", parsing, "s"),
        figure("policy_cidrs_enforced", enforced, "s"),
        figure("policy_cidrs_entries", entries, "rows"),
        figure("policy_cidrs_identities", len(numbers), "ids"),
        figure("policy_cidrs_memory", memory, "MB"),
        figure("policy_cidr50k_one_more", percentile(changes, 99) * 1e3, "ms",
               goal=10, less_is_better=True),
    ]  # fmt: skip


def bench_policy_cidrs_node() -> list[dict[str, Any]]:
    """The same at a running agent: from `policy apply` to enforced, stored and in every map."""
    with Node("--bpf-policy-map-max", str(1 << 17)) as node:
        node.add("one", node.namespace("one"), "app=one")
        before = _resident_of(node.pid("agent"))
        texts = _cidr_texts()
        # In parts: so much is stored at once.
        enforced = sum(timed(node.apply, *texts[at : at + 2]) for at in range(0, len(texts), 2))
        memory = (_resident_of(node.pid("agent")) - before) / 1e6
        changes = []
        for _ in range(50):
            changes.append(timed(node.apply, json.dumps(MORE)))
            changes.append(timed(node.delete_policy, "Rules", "more"))
    return [
        figure("policy_cidrs_node_enforced", enforced, "s", goal=5, less_is_better=True),
        figure("policy_cidrs_node_memory", memory, "MB"),
        figure("policy_cidrs_node_one_more_p50", percentile(changes, 50) * 1e3, "ms"),
        figure("policy_cidrs_node_one_more_p99", percentile(changes, 99) * 1e3, "ms",
               goal=100, less_is_better=True),
    ]  # fmt: skip


def bench_policy_questions() -> list[dict[str, Any]]:
    """A million questions who may reach whom, against plain evaluation of some."""
    rng = random.Random(2)
    documents = [document(number, rng) for number in range(RULES)]
    engine = PolicyEngine()
    engine.set_documents(documents)
    started = time.perf_counter()
    compiled = engine.compile()
    numbers = [compiled.add(labels_of(number)) for number in range(IDENTITIES)]
    compiled.allows(numbers[0], numbers[1], 6, 80)
    compiling = time.perf_counter() - started
    questions = [
        (rng.randrange(IDENTITIES), rng.randrange(IDENTITIES), 6, rng.choice((80, 443, 9090, 22)))
        for _ in range(QUESTIONS)
    ]
    started = time.perf_counter()
    answers = compiled.allows_many(questions)
    rate = QUESTIONS / (time.perf_counter() - started)
    for source, destination, proto, port in questions[:200]:
        wanted = engine.trace(labels_of(source), labels_of(destination), proto, port).allowed
        assert answers[questions.index((source, destination, proto, port))] == wanted
    each = statistics.median(
        timed(naive, documents, labels_of(a), labels_of(b))
        + timed(naive, documents, labels_of(b), labels_of(a))
        for a, b, _, _ in questions[:NAIVE_PAIRS]
    )
    return [
        figure("policy_questions_compile", compiling, "s"),
        figure("policy_questions", rate, "1/s", goal=100_000, floor=100_000),
        figure("policy_questions_times_faster", rate * each, "x", baseline=1, ratio=rate * each,
               goal=100, floor=100),
        figure("policy_questions_allowed", sum(answers) / QUESTIONS * 100, "%"),
    ]  # fmt: skip
