"""Policy for a proxy with Cilium's filters, down to the bytes that such a proxy reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from envoy.config.route.v3 import route_components_pb2

from protos.npds.v1 import npds_pb2 as npds
from protos.xds.v1 import xds_pb2 as pb
from services.xds.cilium import PortRules, hosts, network_policy
from services.xds.files import read_file
from services.xds.resources import NPDS, NPHDS, PREFIX
from services.xds.translator import Untranslatable


def http(**fields: object) -> pb.L7Rule:
    return pb.L7Rule(rule_id=1, http=pb.HTTPRule(**fields))  # type: ignore[arg-type]  # by name


def policy(*rules: pb.L7Rule, parser: str = "http") -> npds.NetworkPolicy:
    rule_set = pb.RuleSet(parser=parser, rules=rules)
    row = PortRules(port=80, remotes=(2, 1), rules=rule_set)
    return network_policy(["10.0.0.1", "fd00::1"], 7, ingress=[row], egress=None)


def test_http_rules_are_matchers_that_envoy_reads() -> None:
    made = policy(
        http(method="GET", path="/v1/.*", headers=["X-Up", "Team: red"]),
        http(header_matches=[pb.HeaderMatch(name="x", value="1", mismatch="REPLACE")]),
    )
    [port] = made.ingress_per_port_policies
    [rule] = port.rules
    assert (port.port, port.protocol, list(rule.remote_policies)) == (80, npds.TCP, [1, 2])
    one, two = rule.http_rules.http_rules
    # The bytes are those of Envoy's own message.
    read = [
        route_components_pb2.HeaderMatcher.FromString(header.SerializeToString())
        for header in one.headers
    ]
    assert [header.name for header in read] == [":method", ":path", "X-Up", "Team"]
    assert read[1].string_match.safe_regex.regex == "/v1/.*"
    assert read[1].string_match.safe_regex.HasField("google_re2")
    assert read[2].present_match
    assert read[3].string_match.exact == "red"
    [match] = two.header_matches
    assert match.mismatch_action == npds.HeaderMatch.REPLACE_ON_MISMATCH


def test_what_is_allowed_wholly_has_no_rules_and_what_is_not_is_not_there() -> None:
    assert (
        not policy(http(path="/x"), pb.L7Rule())
        .ingress_per_port_policies[0]
        .rules[0]
        .HasField("http_rules")
    )
    assert not policy().ingress_per_port_policies
    everything = network_policy(["10.0.0.1"], 7, ingress=[PortRules(port=0)], egress=[])
    assert len(everything.ingress_per_port_policies[0].rules) == 1
    assert not everything.egress_per_port_policies
    # A direction that is not enforced allows both protocols.
    assert [p.protocol for p in policy().egress_per_port_policies] == [npds.TCP, npds.UDP]


def test_kafka_and_generic_rules() -> None:
    made = policy(
        pb.L7Rule(kafka=pb.KafkaRule(role="Produce", topic="plans")),
        pb.L7Rule(kafka=pb.KafkaRule(api_key="apiversions", api_version="3")),
        parser="kafka",
    )
    one, two = made.ingress_per_port_policies[0].rules[0].kafka_rules.kafka_rules
    assert (list(one.api_keys), one.api_version, one.topic) == ([0, 3, 18], -1, "plans")
    assert (list(two.api_keys), two.api_version) == ([18], 3)
    made = policy(pb.L7Rule(generic=pb.GenericRule(fields={"cmd": "READ"})), parser="r2d2")
    rule = made.ingress_per_port_policies[0].rules[0]
    assert rule.l7_proto == "r2d2"
    assert dict(rule.l7_rules.l7_allow_rules[0].rule) == {"cmd": "READ"}


@pytest.mark.parametrize(
    "rule",
    [
        pb.L7Rule(kafka=pb.KafkaRule(role="drink")),
        pb.L7Rule(kafka=pb.KafkaRule(api_key="none")),
        pb.L7Rule(dns=pb.DNSRule(match_name="x.example")),
        http(header_matches=[pb.HeaderMatch(name="x", mismatch="SING")]),
    ],
)
def test_what_the_proxy_cannot_do_is_refused(rule: pb.L7Rule) -> None:
    with pytest.raises(Untranslatable):
        policy(rule)


def test_a_resource_directory_may_hold_them(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(
        json.dumps(
            [
                {
                    "@type": PREFIX + "cilium.NetworkPolicy",
                    "endpoint_ips": ["10.0.0.1"],
                    "endpoint_id": 7,
                    "ingress_per_port_policies": [{"port": 80}],
                },
                {
                    "@type": PREFIX + "cilium.NetworkPolicyHosts",
                    "policy": 1234,
                    "host_addresses": ["10.0.0.1"],
                },
            ]
        )
    )
    one, two = read_file(path)
    assert (one.url, one.name) == (NPDS, "10.0.0.1")
    assert (two.url, two.name) == (NPHDS, "1234")
    assert npds.NetworkPolicyHosts.FromString(two.value) == hosts(1234, ["10.0.0.1"])
