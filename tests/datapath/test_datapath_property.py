"""Random policies and packets: the engine, its map state and the loaded programs agree."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, TCP, UDP
from scapy.layers.inet6 import ICMPv6Unknown
from scapy.layers.sctp import SCTP
from scapy.packet import Packet, Raw

from cilia.identity import cidr_labels
from cilia.labels import Labels
from cilia.policy import PolicyEngine
from tests.datapath.harness import ALLOW_ALL, TC_REDIRECT, Node, Rule
from tests.datapath.packets import ip
from tests.unit.policy.test_policy_property import (
    IDS,
    document_lists,
    parse,
    peers,
    probes,
)

EXAMPLES = max(8, int(os.environ.get("CILIA_PROPERTY_EXAMPLES", "200")) // 25)


def probe(proto: int, port: int, number: int) -> Packet | None:
    """What asks the policy about (proto, port); None when no packet can."""
    match proto:
        case 6:
            return TCP(sport=number, dport=port, flags="S")
        case 17:
            return UDP(sport=number, dport=port)
        case 132:
            return SCTP(sport=number, dport=port)
        case 1 if port < 256:
            return ICMP(type=port) / Raw(bytes(8))
        case 58 if port < 128:
            return ICMPv6Unknown(type=port) / Raw(bytes(8))
    return None


@pytest.mark.timeout(1800)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,
    ],
)
@given(
    documents=document_lists(),
    mode=st.sampled_from(["default", "default", "always", "never"]),
    questions=probes,
)
def test_engine_mapstate_and_programs_agree(
    shared_node: Node, documents: list[dict[str, Any]], mode: Any, questions: list[Any]
) -> None:
    node = shared_node
    node.reset()
    node.runtime(aggregation=3, flags=0)
    engine = PolicyEngine(mode, True, "default")
    for number, labels in IDS.items():
        engine.add_identity(number, labels)
    engine.set_documents(parse(documents))
    local = {
        (1 << 24) + i: cidr_labels(prefix)
        for i, prefix in enumerate(sorted(engine.cidr_prefixes(), key=str), start=1)
    }
    for number, labels in local.items():
        engine.add_identity(number, labels)
    a, b = node.a, node.b
    source_port = 1024
    loaded: Labels | None = None
    for subject_texts, egress, proto, port in questions[:4]:
        subject = Labels.parse(subject_texts)
        state = engine.resolve(subject).mapstate
        if subject != loaded:
            node.policy(
                a,
                [
                    Rule(
                        k.egress,
                        k.identity,
                        k.proto,
                        k.port,
                        k.plen,
                        entry.deny,
                        entry.audit,
                        entry.rule_id,
                    )
                    for k, entry in state.items()
                ],
            )
            loaded = subject
        node.policy(b, ALLOW_ALL)
        for labels, identity in peers(engine, local):
            source_port += 1
            packet = probe(proto, port, source_port)
            if packet is None:
                continue
            node.endpoint("b", 12, identity)
            v6 = proto == 58
            src, dst = (a, b) if egress else (b, a)
            result = node.send(src, ip(v6, src, dst) / packet)
            direction: Any = "egress" if egress else "ingress"
            verdict = engine.verdict(subject, labels, direction, proto, port)
            context = (subject, labels, identity, direction, proto, port, mode)
            assert (result.verdict == TC_REDIRECT) == verdict.allowed, context
            assert state.allows(identity, egress, proto, port) == verdict.allowed, context
            judged = next(e for e in result.verdicts if e["ep_id"] == a.id)
            found = state.lookup(identity, egress, proto, port)
            assert int(judged["rule_id"]) == (found.entry.rule_id if found else 0), context
