"""Random policies and packets: the engine's verdict, its map state, and a naive evaluator agree."""

from __future__ import annotations

import importlib.util
import ipaddress
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from cilia.identity import RESERVED, cidr_labels, reserved_labels
from cilia.labels import Labels
from cilia.policy import Document, MapState, PolicyEngine, parse_documents
from cilia.policy.api import FQDNSelector

_spec = importlib.util.spec_from_file_location("oracle", Path(__file__).parent / "oracle.py")
assert _spec is not None
assert _spec.loader is not None
oracle = importlib.util.module_from_spec(_spec)
sys.modules["oracle"] = oracle
_spec.loader.exec_module(oracle)

EXAMPLES = int(os.environ.get("CILIA_PROPERTY_EXAMPLES", "200"))
NS = "io.kubernetes.pod.namespace"

# ---- the world the policies are about

ENDPOINTS = [
    [f"k8s:app={app}", f"k8s:env={env}", f"k8s:{NS}={ns}", *extra]
    for app, env, ns, extra in (
        ("a", "prod", "default", []),
        ("a", "dev", "default", []),
        ("b", "prod", "default", ["k8s:io.cilium.k8s.policy.cluster=default"]),
        ("a", "prod", "x", ["k8s:io.cilium.k8s.namespace.labels.team=red"]),
        ("b", "dev", "x", ["k8s:io.cilium.k8s.policy.cluster=other"]),
    )
] + [["container:app=a", f"k8s:{NS}=default"], ["reserved:init"], ["reserved:health"]]
OUTSIDE = ["10.0.0.1", "10.1.0.1", "10.1.2.3", "192.0.2.7", "2001:db8::1", "2001:db8:1::1", "::1"]
PREFIXES = [
    "10.0.0.0/8",
    "10.1.0.0/16",
    "10.1.2.0/24",
    "10.1.2.3/32",
    "0.0.0.0/0",
    "192.0.2.0/25",
    "::/0",
    "2001:db8::/32",
    "2001:db8:1::/48",
]
ANSWERS = {
    "example.org": ["192.0.2.7/32", "2001:db8::1/128"],
    "example.com": ["10.1.2.3/32"],
    "example.net": [],
}
PORT_NAMES = {"http": (8080, 6)}
PORTS = [0, 1, 79, 80, 80, 80, 81, 8080, 65535]
PROTOS = [1, 6, 6, 6, 17, 58, 132]

# ---- documents

keys = st.sampled_from(["app", "env", "k8s:app", "container:app", "any:env", "missing"])
words = st.sampled_from(["a", "b", "prod", "dev"])
space_keys = st.sampled_from([NS, f"k8s:{NS}", "k8s:io.cilium.k8s.namespace.labels.team"])
space_words = st.sampled_from(["default", "x", "red"])


def expressions(key: st.SearchStrategy[str], word: st.SearchStrategy[str]) -> Any:
    return st.one_of(
        st.fixed_dictionaries(
            {
                "key": key,
                "operator": st.sampled_from(["In", "NotIn"]),
                "values": st.lists(word, min_size=1, max_size=2),
            }
        ),
        st.fixed_dictionaries(
            {"key": key, "operator": st.sampled_from(["Exists", "DoesNotExist"])}
        ),
    )


selectors = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"matchLabels": st.dictionaries(keys, words, max_size=2)}),
    st.fixed_dictionaries(
        {
            "matchLabels": st.dictionaries(keys, words, max_size=1),
            "matchExpressions": st.lists(expressions(keys, words), max_size=2),
        }
    ),
    st.fixed_dictionaries(
        {"matchExpressions": st.lists(expressions(space_keys, space_words), min_size=1, max_size=2)}
    ),
    st.fixed_dictionaries({"matchLabels": st.dictionaries(space_keys, space_words, min_size=1)}),
    st.just({"matchLabels": {"reserved:host": ""}}),
    st.just({"matchLabels": {"reserved:world": ""}}),
    st.just({"matchLabels": {"reserved:init": ""}}),
)
prefixes = st.sampled_from(PREFIXES)
entities = st.sampled_from(
    [
        "host",
        "remote-node",
        "world",
        "world-ipv4",
        "world-ipv6",
        "cluster",
        "init",
        "health",
        "all",
        "none",
    ]
)


@st.composite
def cidr_sets(draw: st.DrawFn) -> Any:
    outer = ipaddress.ip_network(draw(prefixes))
    inner = [
        x
        for x in map(ipaddress.ip_network, PREFIXES)
        if x.version == outer.version and x.subnet_of(outer)  # type: ignore[arg-type]
    ]
    excepts = draw(st.lists(st.sampled_from(inner), max_size=2, unique=True))
    found: dict[str, Any] = {"cidr": str(outer)}
    if excepts:
        found["except"] = [str(x) for x in excepts]
    return found


@st.composite
def port(draw: st.DrawFn, named: bool) -> Any:
    first = draw(st.sampled_from(PORTS))
    found: dict[str, Any] = {"port": str(first)}
    if draw(st.booleans()):
        found["protocol"] = draw(st.sampled_from(["TCP", "UDP", "SCTP", "ANY", "tcp"]))
    if first and draw(st.booleans()):
        found["endPort"] = draw(st.sampled_from([p for p in PORTS if p >= first]))
    elif named and draw(st.integers(0, 9)) == 0:
        found["port"] = "http"
    return found


@st.composite
def requests(draw: st.DrawFn, egress: bool) -> Any:
    """A port rule with an L7 part; a parser a protocol, so that none meet on one row."""
    if egress and draw(st.booleans()):
        first = draw(st.sampled_from(["53", "80"]))
        rule: Any = st.fixed_dictionaries({"matchPattern": st.sampled_from(["*", "a.org"])})
        ports = [{"port": first, "protocol": "UDP"}]
        return {"ports": ports, "rules": {"dns": draw(st.lists(rule, min_size=1, max_size=2))}}
    one: dict[str, Any] = {"port": draw(st.sampled_from(["79", "80", "http"])), "protocol": "TCP"}
    if one["port"] != "http" and draw(st.booleans()):
        one["endPort"] = 81
    rule = st.sampled_from([{"method": "GET"}, {"path": "/x"}, {"method": "GET", "path": "/x"}, {}])
    return {"ports": [one], "rules": {"http": draw(st.lists(rule, min_size=1, max_size=2))}}


@st.composite
def elements(draw: st.DrawFn, egress: bool, deny: bool) -> Any:
    side = "to" if egress else "from"
    found: dict[str, Any] = {}
    kind = draw(st.sampled_from(["", "Endpoints", "Endpoints", "CIDR", "CIDRSet", "Entities"]))
    if kind:
        item = {
            "Endpoints": selectors,
            "CIDR": prefixes,
            "CIDRSet": cidr_sets(),
            "Entities": entities,
        }[kind]
        found[f"{side}{kind}"] = draw(st.lists(item, max_size=2))
    elif egress and not deny and draw(st.integers(0, 9)) == 0:
        found["toFQDNs"] = [{"matchName": draw(st.sampled_from(sorted(ANSWERS)))}]
    if draw(st.integers(0, 7)) == 0:
        found[f"{side}Requires"] = draw(st.lists(selectors, max_size=2))
    match draw(st.integers(0, 3)):
        case 0 | 1:
            rules = st.fixed_dictionaries({"ports": st.lists(port(named=not deny), max_size=3)})
            found["toPorts"] = draw(st.lists(rules, max_size=2))
            if not deny and draw(st.booleans()):
                found["toPorts"] = [*found["toPorts"][:1], draw(requests(egress))]
        case 2:
            field = st.fixed_dictionaries(
                {
                    "family": st.sampled_from(["IPv4", "IPv6"]),
                    "type": st.sampled_from(["0", "1", "80"]),
                }
            )
            found["icmps"] = [{"fields": draw(st.lists(field, max_size=2))}]
    return found


@st.composite
def rules(draw: st.DrawFn) -> Any:
    subject: st.SearchStrategy[Any] = st.one_of(
        st.just({}), selectors, st.just({"matchLabels": {"app": "a"}})
    )
    found: dict[str, Any] = {"endpointSelector": draw(subject)}
    for name in ("ingress", "egress", "ingressDeny", "egressDeny"):
        if draw(st.integers(0, 2)) == 0 or (name == "ingress" and draw(st.booleans())):
            item = elements(name.startswith("egress"), name.endswith("Deny"))
            found[name] = draw(st.lists(item, max_size=3))
    if draw(st.integers(0, 3)) == 0:
        # The same element allowed and denied, so that rows collide, or one of them without its
        # ports, so that they nest.
        direction = draw(st.sampled_from(["ingress", "egress"]))
        side = "to" if direction == "egress" else "from"
        element = draw(
            st.one_of(
                elements(direction == "egress", deny=True),
                st.fixed_dictionaries(
                    {
                        f"{side}Entities": st.sampled_from([["all"], ["world"], ["cluster"]]),
                        "toPorts": st.sampled_from([[{"ports": [{"port": "80"}]}]]),
                    }
                ),
            )
        )
        wide = {k: v for k, v in element.items() if k not in ("toPorts", "icmps")}
        allow, deny = draw(st.sampled_from([(element, element), (element, wide), (wide, element)]))
        found.setdefault(direction, []).append(allow)
        found.setdefault(f"{direction}Deny", []).append(deny)
    if draw(st.integers(0, 4)) == 0:
        found["enableDefaultDeny"] = draw(
            st.dictionaries(st.sampled_from(["ingress", "egress"]), st.booleans())
        )
    return found


def about_nodes(rule: dict[str, Any]) -> None:
    """Make an endpoint rule one about nodes: those have no L7 parts."""
    del rule["endpointSelector"]
    rule["nodeSelector"] = {"matchLabels": {"type": "worker"}}
    for name in ("ingress", "egress"):
        for element in rule.get(name, ()):
            kept = [x for x in element.get("toPorts", ()) if "rules" not in x]
            if "toPorts" in element:
                element["toPorts"] = kept


@st.composite
def about_requests(draw: st.DrawFn) -> dict[str, Any]:
    """A rule with an L7 part that many peers meet: among random ones few do."""
    egress = draw(st.booleans())
    side, direction = ("to", "egress") if egress else ("from", "ingress")
    peer: dict[str, Any] = draw(
        st.sampled_from(
            [{}, {f"{side}Entities": ["all"]}, {f"{side}CIDR": ["0.0.0.0/0", "2001:db8::/32"]}]
        )
    )
    rule = {
        "endpointSelector": {"matchLabels": {"app": "a"}},
        direction: [peer | {"toPorts": [draw(requests(egress))]}],
    }
    return {"kind": "Rules", "metadata": {"name": "requests"}, "rules": [rule]}


@st.composite
def document_lists(draw: st.DrawFn) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for i in range(draw(st.integers(0, 4))):
        kind = draw(
            st.sampled_from(
                [
                    "CiliumNetworkPolicy",
                    "CiliumNetworkPolicy",
                    "CiliumClusterwideNetworkPolicy",
                    "Rules",
                ]
            )
        )
        doc: dict[str, Any] = {"kind": kind, "metadata": {"name": f"p{i}"}}
        if kind == "Rules":
            doc["rules"] = draw(st.lists(rules(), max_size=2))
        else:
            doc["apiVersion"] = "cilium.io/v2"
            doc["spec"] = draw(rules())
            if draw(st.integers(0, 3)) == 0:
                doc["specs"] = draw(st.lists(rules(), max_size=2))
        if kind == "CiliumNetworkPolicy" and draw(st.booleans()):
            doc["metadata"]["namespace"] = draw(st.sampled_from(["default", "x"]))
        if kind != "Rules" and draw(st.integers(0, 3)) == 0:
            doc["metadata"]["annotations"] = {"cilia.io/audit": "true"}
        if kind == "CiliumClusterwideNetworkPolicy" and draw(st.integers(0, 3)) == 0:
            about_nodes(doc["spec"])
        found.append(doc)
    if draw(st.booleans()):
        found.append(draw(about_requests()))
    return found


def parse(documents: list[dict[str, Any]]) -> tuple[Document, ...]:
    text = json.dumps({"kind": "List", "items": documents})
    result = parse_documents(text, source="random.json")
    assert result.faults == ()
    return result.documents


IDS: dict[int, Labels] = {
    **{int(i): reserved_labels(i) for i in RESERVED},
    **{256 + i: Labels.parse(x) for i, x in enumerate(ENDPOINTS)},
}


def peers(engine: PolicyEngine, local: dict[int, Labels]) -> list[tuple[Labels, int]]:
    """Every peer as (labels, the identity that the datapath would find)."""
    found = [(labels, number) for number, labels in IDS.items() if number != 2]
    networks = {ipaddress.ip_network(_prefix(x)): i for i, x in local.items()}
    networks |= {ipaddress.ip_network("0.0.0.0/0"): 9, ipaddress.ip_network("::/0"): 10}
    for text in OUTSIDE:
        address = ipaddress.ip_address(text)
        best = max((n for n in networks if address in n), key=lambda n: n.prefixlen)
        host = ipaddress.ip_network(address)
        found.append((cidr_labels(host), networks[best]))
    return found


def _prefix(labels: Labels) -> str:
    return next(x.key for x in labels if x.source == "cidr")


NODE = ["k8s:type=worker", "reserved:host"]
NAMED_SUBJECTS = ENDPOINTS[:3]
probe = st.one_of(
    st.tuples(
        st.sampled_from([*ENDPOINTS, NODE]),
        st.booleans(),
        st.sampled_from(PROTOS),
        st.sampled_from(PORTS),
    ),
    # Where rules with L7 parts are, which chance alone would seldom hit.
    st.tuples(
        st.sampled_from(ENDPOINTS[:2]),
        st.booleans(),
        st.just(6),
        st.sampled_from([79, 80]),
    ),
)
probes = st.lists(probe, min_size=3, max_size=8)


def l7_of(found: Any) -> frozenset[str] | None:
    """An L7 set as the oracle says it."""
    if found is None:
        return None
    words = {"method": "method", "path": "path", "match_pattern": "matchPattern"}
    return frozenset(
        "*"
        if entry.rule is None
        else json.dumps(
            {words[name]: value for name in words if (value := getattr(entry.rule, name, ""))},
            sort_keys=True,
        )
        for entry in found.rules
    )


def agree(
    documents: list[dict[str, Any]],
    mode: Any,
    localhost: bool,
    parsers: frozenset[str],
    named: set[int],
    probes: list[Any],
) -> None:
    """The engine's verdict, the kernel's rows and the naive evaluator say the same."""
    engine = PolicyEngine(mode, localhost, "default", enforcers=parsers)
    for number, labels in IDS.items():
        engine.add_identity(number, labels)
    for number in named:
        engine.set_port_names(number, PORT_NAMES)
    engine.set_documents(parse(documents))
    for name, found in ANSWERS.items():
        engine.set_fqdn(FQDNSelector(name), map(ipaddress.ip_network, found))
    local = {
        (1 << 24) + i: cidr_labels(prefix)
        for i, prefix in enumerate(sorted(engine.cidr_prefixes(), key=str), start=1)
    }
    for number, labels in local.items():
        engine.add_identity(number, labels)
    world = peers(engine, local)
    questions = ((*probe, *peer) for probe in probes for peer in world)
    for subject_texts, egress, proto, port_number, labels, identity in questions:
        subject = Labels.parse(subject_texts)
        own = PORT_NAMES if subject_texts in NAMED_SUBJECTS else {}
        theirs = PORT_NAMES if identity in named else {}
        expected = oracle.answer(
            documents,
            oracle.Question(
                subject_texts,
                [str(x) for x in labels],
                egress,
                proto,
                port_number,
                mode=mode,
                allow_localhost=localhost,
                parsers=parsers,
                names=theirs if egress else own,
                answers=ANSWERS,
            ),
        )
        wanted = (expected.allowed, expected.audit, expected.l7)
        direction: Any = "egress" if egress else "ingress"
        state = engine.resolve(subject, named_ports=own).mapstate
        context = (subject, labels, identity, direction, proto, port_number, mode)
        verdict = engine.verdict(
            subject, labels, direction, proto, port_number, named_ports=own, peer_ports=theirs
        )
        assert (verdict.allowed, verdict.audit, l7_of(verdict.l7)) == wanted, context
        match = state.lookup(identity, egress, proto, port_number)
        found_row = (
            (False, False, None)
            if match is None or match.entry.deny
            else (True, match.entry.audit, l7_of(match.entry.l7))
        )
        assert found_row == wanted, context
        event(
            "denied"
            if not expected.allowed
            else "reported"
            if expected.audit
            else "allowed"
            if expected.l7 is None
            else "proxied"
        )


worlds = {
    "documents": document_lists(),
    "mode": st.sampled_from(["default", "default", "default", "always", "never"]),
    "localhost": st.booleans(),
    "parsers": st.sampled_from(
        [frozenset(("http", "dns")), frozenset(("http", "dns")), frozenset(("http",)), frozenset()]
    ),
    "named": st.sets(st.sampled_from([256, 257, 258])),
}
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]


@pytest.mark.timeout(120 + EXAMPLES)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=SLOW)
@given(**worlds, probes=probes)
def test_engine_mapstate_and_oracle_agree(**world: Any) -> None:
    agree(**world)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=max(EXAMPLES, 10_000), deadline=None, suppress_health_check=SLOW)
@given(**worlds, probes=st.lists(probe, min_size=1, max_size=1))
def test_ten_thousand_policy_sets_agree(**world: Any) -> None:
    agree(**world)


WALK = ["add", "remove", "put", "take", "mode", "names", "answers", "parsers"]
steps = st.lists(
    st.tuples(st.sampled_from(WALK), st.integers(0, 1000)),
    max_size=25,
)


@pytest.mark.timeout(120 + EXAMPLES)
@settings(max_examples=max(EXAMPLES // 3, 20), deadline=None)
@given(documents=document_lists(), steps=steps)
def test_incremental_equals_from_scratch(
    documents: list[dict[str, Any]], steps: list[tuple[str, int]]
) -> None:
    """Whatever the order of changes, the state depends on what is there, and deltas lead to it."""
    docs = parse(documents)
    pool = dict(IDS)
    engine = PolicyEngine()
    engine.set_documents(docs)
    prefixes = engine.cidr_prefixes()
    for i, prefix in enumerate(sorted(prefixes, key=str), start=1):
        pool[(1 << 24) + i] = cidr_labels(prefix)
    numbers = list(pool)
    subjects = [Labels.parse(x) for x in [*ENDPOINTS, NODE]]
    present: set[int] = set()
    inforce = set(docs)
    names: dict[int, dict[str, tuple[int, int]]] = {}
    answers: dict[str, list[str]] = {}
    parsers: frozenset[str] = frozenset()
    kernel: dict[Labels, dict[Any, Any]] = {s: {} for s in subjects}
    before: dict[Labels, MapState | None] = dict.fromkeys(subjects)

    def refresh(subject: Labels) -> None:
        state = engine.resolve(subject).mapstate
        delta = state.delta(before[subject])
        for key in delta.deletes:
            del kernel[subject][key]
        kernel[subject].update(delta.upserts)
        before[subject] = state

    for subject in subjects:
        refresh(subject)
    for what, n in steps:
        changed: Any = subjects
        number = numbers[n % len(numbers)]
        match what:
            case "add":
                changed = engine.add_identity(number, pool[number])
                present.add(number)
            case "remove":
                changed = engine.remove_identity(number)
                present.discard(number)
            case "put" if docs:
                preview = engine.preview([docs[n % len(docs)]], numbered=prefixes)
                foreseen = [preview.rows(x, mode="default") for x in subjects]
                changed = engine.apply([docs[n % len(docs)]]).subjects
                inforce.add(docs[n % len(docs)])
                assert [len(engine.resolve(x).mapstate) for x in subjects] == foreseen
            case "take" if docs:
                doc = docs[n % len(docs)]
                changed = engine.apply([], [doc.key]).subjects
                inforce.discard(doc)
            case "mode" if n % 5 == 0:
                for subject in subjects[:2]:
                    engine.forget(subject)
            case "names":
                names[256 + n % 3] = {"http": (8080 + n % 2, 6)} if n % 5 else {}
                changed = engine.set_port_names(256 + n % 3, names[256 + n % 3])
            case "answers":
                name = sorted(ANSWERS)[n % 3]
                answers[name] = [] if n % 4 == 0 else [PREFIXES[3], PREFIXES[2]][: 1 + n % 2]
                changed = engine.set_fqdn(
                    FQDNSelector(name), map(ipaddress.ip_network, answers[name])
                )
            case "parsers":
                parsers = frozenset(["http", "dns"][: n % 3])
                changed = engine.set_enforcers(parsers)
        for subject in changed:
            refresh(subject)
    fresh = PolicyEngine(enforcers=parsers)
    for number in sorted(present):
        fresh.add_identity(number, pool[number])
    for number, named in names.items():
        fresh.set_port_names(number, named)
    for name, found in answers.items():
        fresh.set_fqdn(FQDNSelector(name), map(ipaddress.ip_network, found))
    fresh.set_documents(inforce)
    for subject in subjects:
        wanted = dict(fresh.resolve(subject).mapstate)
        assert dict(engine.resolve(subject).mapstate) == wanted
        assert kernel[subject] == wanted
