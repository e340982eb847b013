"""`policy matrix`: cases written by hand, feature by feature, and a naive count of every packet."""

from __future__ import annotations

import dataclasses
import importlib.util
import ipaddress
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings

from cilia.policy import parse_documents
from cilia.policy.questions.inventory import Inventory, InventoryError, parse_inventory
from cilia.policy.questions.matrix import Matrix
from cilia.policy.questions.scene import Scene
from cilia.policy.questions.world import network, partition
from tests.unit.policy.effort import calls


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

ENDPOINTS = """
namespaces: {default: , x: {team: red}}
endpoints:
- {name: web, labels: {app: web}, ips: [10.0.0.1, "fd00::1"],
   ports: [{name: http, port: 8080, protocol: TCP}, {name: dns, port: 5353, protocol: UDP}]}
- {name: db, labels: {app: db}, ips: [10.0.0.2]}
- {name: far, namespace: x, labels: {app: web}, ips: [10.0.1.1],
   ports: [{name: http, port: 80}]}
"""
ALL = {
    "TCP": "1-65535",
    "UDP": "1-65535",
    "SCTP": "1-65535",
    "ICMP": "0-255",
    "ICMPv6": "0-255",
}
V4 = {k: v for k, v in ALL.items() if k != "ICMPv6"}
V6 = {k: v for k, v in ALL.items() if k != "ICMP"}
WEB, DB, FAR, HOST = "default/web", "default/db", "x/far", "reserved:host"
Answer = dict[tuple[str, str], dict[str, str]]


def inventory(text: str = ENDPOINTS) -> Inventory:
    return parse_inventory(text, source="endpoints.yaml")


def scene(text: str, endpoints: str = ENDPOINTS, **options: Any) -> Scene:
    result = parse_documents(text, source="policy.yaml") if text else None
    assert result is None or result.faults == ()
    return Scene(result.documents if result else (), inventory(endpoints), **options)


def answer(text: str, endpoints: str = ENDPOINTS, **options: Any) -> Answer:
    """Rows without L7 as {(src, dst): {protocol: ports}}, those with it as protocol "TCP l7"."""
    found: Answer = {}
    for row in Matrix(scene(text, endpoints, **options)).rows():
        shape = row.shape()
        src, dst = (x if isinstance(x, str) else x["cidr"] for x in (shape["src"], shape["dst"]))
        protocol = shape["protocol"] + (" l7" if "l7" in shape else "")
        assert ("types" in shape) == protocol.startswith("ICMP")
        cell = found.setdefault((src, dst), {})
        assert protocol not in cell
        cell[protocol] = shape.get("ports") or shape["types"]
    return found


def cnp(spec: str, name: str = "p", namespace: str = "default") -> str:
    body = "\n".join(f"  {line}" for line in spec.strip("\n").splitlines())
    return (
        "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\n"
        f"metadata: {{name: {name}, namespace: {namespace}}}\nspec:\n{body}\n---\n"
    )


def ccnp(spec: str, name: str = "c") -> str:
    return (
        cnp(spec, name)
        .replace("kind: Cilium", "kind: CiliumClusterwide")
        .replace(", namespace: default", "")
    )


# ---- cases


def test_without_policies_everybody_may_do_everything_but_talk_to_themselves() -> None:
    found = answer("")
    parties = [WEB, DB, FAR, HOST]
    wanted = {(a, b): ALL for a in parties for b in parties if a != b}
    for a in parties:
        for cidr, cell in (("0.0.0.0/0", V4), ("::/0", V6)):
            wanted |= {(a, cidr): cell, (cidr, a): cell}
    assert found == wanted


def test_an_empty_ingress_rule_isolates_one_direction_and_spares_the_host() -> None:
    found = answer(cnp("endpointSelector: {matchLabels: {app: web}}\ningress: [{}]"))
    assert [src for src, dst in found if dst == WEB] == [HOST]
    assert found[WEB, DB] == found[WEB, FAR] == ALL
    assert found[DB, FAR] == ALL
    # without the host's privilege nobody is left
    only = answer(
        cnp("endpointSelector: {matchLabels: {app: web}}\ningress: [{}]"), allow_localhost=False
    )
    assert not [src for src, dst in only if dst == WEB]


def test_an_empty_egress_rule_isolates_the_other() -> None:
    found = answer(cnp("endpointSelector: {matchLabels: {app: web}}\negress: [{}]"))
    assert not [dst for src, dst in found if src == WEB]
    assert found[DB, WEB] == ALL


def test_both_ends_must_allow() -> None:
    found = answer(
        cnp("""
endpointSelector: {matchLabels: {app: db}}
ingress:
- fromEndpoints: [{matchLabels: {app: web}}]
  toPorts: [{ports: [{port: "5000", endPort: 6000, protocol: TCP}]}]
""")
        + cnp(
            """
endpointSelector: {matchLabels: {app: web}}
egress:
- toEndpoints: [{matchLabels: {app: db}}]
  toPorts: [{ports: [{port: "5432"}, {port: "5999", endPort: 7000}]}]
""",
            name="q",
        )
    )
    assert found[WEB, DB] == {"TCP": "5432,5999-6000"}
    assert (WEB, FAR) not in found
    assert (FAR, DB) not in found
    assert (WEB, "0.0.0.0/0") not in found


def test_ports_ranges_and_protocols() -> None:
    found = answer(
        cnp("""
endpointSelector: {matchLabels: {app: db}}
ingress:
- toPorts: [{ports: [{port: "80"}]}]
- toPorts: [{ports: [{port: "0", protocol: UDP}]}]
- toPorts: [{ports: [{port: "100", endPort: 199, protocol: SCTP}, {port: "81", protocol: TCP}]}]
""")
    )
    wanted = {"TCP": "80-81", "UDP": "1-65535", "SCTP": "80,100-199"}
    assert found[WEB, DB] == wanted
    assert found["0.0.0.0/0", DB] == wanted


def test_deny_takes_away_whatever_its_place() -> None:
    found = answer(
        cnp("""
endpointSelector: {matchLabels: {app: db}}
ingress: [{fromEntities: [all]}]
ingressDeny:
- toPorts: [{ports: [{port: "22", protocol: TCP}]}]
- fromEndpoints: [{matchLabels: {app: web}}]
  toPorts: [{ports: [{port: "80", endPort: 90}]}]
""")
    )
    assert found[WEB, DB] == {
        "TCP": "1-21,23-79,91-65535",
        "UDP": "1-79,91-65535",
        "SCTP": "1-79,91-65535",
        "ICMP": "0-255",
        "ICMPv6": "0-255",
    }
    assert found[FAR, DB] == {**ALL, "TCP": "1-21,23-65535"}
    assert found[HOST, DB] == {**ALL, "TCP": "1-21,23-65535"}
    assert found["::/0", DB] == {**V6, "TCP": "1-21,23-65535"}


def test_the_world_is_split_where_rules_tell_it_apart_and_nowhere_else() -> None:
    found = answer(
        cnp("""
endpointSelector: {matchLabels: {app: web}}
egress:
- toCIDRSet: [{cidr: 192.0.2.0/24, except: [192.0.2.64/26]}]
- toCIDR: ["192.0.3.0/24", "2001:db8::/32", "2001:db8:5::/48"]
""")
    )
    assert sorted(dst for src, dst in found if src == WEB) == [
        "192.0.2.0/26",
        "192.0.2.128/25",
        "192.0.3.0/24",
        "2001:db8::/32",
    ]
    assert found[WEB, "192.0.2.0/26"] == V4
    assert found[WEB, "2001:db8::/32"] == V6
    prefixes = Matrix(
        scene(cnp("endpointSelector: {}\negress: [{toCIDR: [192.0.2.0/24]}]"))
    ).prefixes
    for version in (4, 6):
        mine = [x for x in prefixes if x.version == version]
        assert sum(x.num_addresses for x in mine) == 1 << mine[0].max_prefixlen


def test_an_address_of_an_endpoint_is_no_part_of_a_prefix() -> None:
    found = answer(
        cnp("endpointSelector: {matchLabels: {app: web}}\negress: [{toCIDR: [10.0.0.0/8]}]")
    )
    assert (WEB, DB) not in found
    assert found[WEB, "10.0.0.0/8"] == V4


def test_too_many_prefixes_are_split_for_each_endpoint_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = cnp("endpointSelector: {matchLabels: {app: web}}\negress: [{toCIDR: [10.0.0.0/8]}]")
    text += cnp("endpointSelector: {matchLabels: {app: db}}\ningress: [{}]", name="q")
    assert destinations(answer(text), DB) - {WEB, FAR, HOST, "::/0"} == {
        str(x)
        for x in ipaddress.IPv4Network("0.0.0.0/0").address_exclude(
            ipaddress.IPv4Network("10.0.0.0/8")
        )
    } | {"10.0.0.0/8"}
    monkeypatch.setattr("cilia.policy.questions.matrix.MAX_SHARED", 10)
    alone = answer(text)
    assert destinations(alone, WEB) == {"10.0.0.0/8"}
    assert destinations(alone, DB) == {WEB, FAR, HOST, "0.0.0.0/0", "::/0"}
    assert not Matrix(scene(text)).shared


def test_a_deny_of_a_prefix_with_an_exception() -> None:
    found = answer(
        cnp("""
endpointSelector: {matchLabels: {app: web}}
egress: [{toEntities: [world]}]
egressDeny: [{toCIDRSet: [{cidr: 10.0.0.0/8, except: [10.1.0.0/16]}]}]
""")
    )
    mine = [ipaddress.ip_network(dst) for src, dst in found if src == WEB]
    assert not [x for x in mine if x.version == 4 and ipaddress.ip_address("10.2.0.1") in x]
    assert ipaddress.ip_network("10.1.0.0/16") in mine
    assert sum(x.num_addresses for x in mine if x.version == 4) == 2**32 - 2**24 + 2**16
    assert found[WEB, "::/0"] == V6


def test_icmp_types() -> None:
    found = answer(
        cnp("""
endpointSelector: {matchLabels: {app: db}}
ingress:
- fromEntities: [all]
  icmps: [{fields: [{type: 8}, {type: 3}, {family: IPv6, type: EchoRequest}]}]
""")
    )
    assert found[WEB, DB] == {"ICMP": "3,8", "ICMPv6": "128"}
    assert found["0.0.0.0/0", DB] == {"ICMP": "3,8"}
    assert found["::/0", DB] == {"ICMPv6": "128"}


def test_entities_get_rows_where_policies_name_them() -> None:
    found = answer(
        cnp("""
endpointSelector: {matchLabels: {app: db}}
ingress:
- fromEntities: [remote-node]
- fromEntities: [world-ipv6]
  toPorts: [{ports: [{port: "443", protocol: TCP}]}]
- fromEndpoints: [{matchLabels: {"reserved:kube-apiserver": ""}}]
  toPorts: [{ports: [{port: "10250", protocol: TCP}]}]
""")
    )
    assert found["reserved:remote-node", DB] == ALL
    assert found["reserved:kube-apiserver", DB] == {"TCP": "10250"}
    assert found["::/0", DB] == {"TCP": "443"}
    assert ("0.0.0.0/0", DB) not in found
    assert found[WEB, "reserved:remote-node"] == ALL
    assert ("reserved:remote-node", "0.0.0.0/0") not in found
    assert not [x for pair in found for x in pair if x in ("reserved:world", "reserved:health")]
    assert not [x for pair in answer("") for x in pair if x == "reserved:remote-node"]


def test_entity_cluster_is_every_endpoint_and_the_host() -> None:
    found = answer(
        cnp("""
endpointSelector: {matchLabels: {app: db}}
ingress: [{fromEntities: [cluster]}]
""")
    )
    assert {src for src, dst in found if dst == DB} == {WEB, FAR, HOST}


def test_default_deny_can_be_switched_off_by_direction() -> None:
    found = answer(
        cnp("""
endpointSelector: {matchLabels: {app: db}}
enableDefaultDeny: {ingress: false}
ingress: [{fromEndpoints: [{matchLabels: {app: web}}]}]
egress: [{toEndpoints: [{matchLabels: {app: web}}]}]
""")
    )
    assert found[FAR, DB] == ALL
    assert found[DB, WEB] == ALL
    assert (DB, FAR) not in found


def test_namespaces_scope_peers_and_their_labels_select_them() -> None:
    scoped = answer(
        cnp("endpointSelector: {matchLabels: {app: db}}\ningress: [{fromEndpoints: [{}]}]")
    )
    assert {src for src, dst in scoped if dst == DB} == {WEB, HOST}
    by_label = answer(
        cnp("""
endpointSelector: {matchLabels: {app: db}}
ingress:
- fromEndpoints: [{matchLabels: {"k8s:io.cilium.k8s.namespace.labels.team": red}}]
""")
    )
    assert {src for src, dst in by_label if dst == DB} == {FAR, HOST}
    by_name = answer(
        cnp("""
endpointSelector: {matchLabels: {app: db}}
ingress:
- fromEndpoints: [{matchLabels: {"k8s:io.kubernetes.pod.namespace": x}}]
""")
    )
    assert by_name == by_label


def test_clusterwide() -> None:
    found = answer(ccnp("endpointSelector: {}\ningress: [{fromEndpoints: [{}]}]"))
    assert found[FAR, DB] == ALL
    assert ("0.0.0.0/0", DB) not in found
    assert found[DB, "0.0.0.0/0"] == V4


def test_enforcement_modes() -> None:
    policy = cnp("endpointSelector: {matchLabels: {app: web}}\ningress: [{}]")
    assert answer(policy, mode="never") == answer("")
    always = answer(policy, mode="always")
    # the node keeps its way to its endpoints, and itself is judged by no policy
    assert {pair for pair in always if "0.0.0.0/0" not in pair and "::/0" not in pair} == {
        (HOST, WEB),
        (HOST, DB),
        (HOST, FAR),
    }


def test_endpoints_may_have_modes_of_their_own() -> None:
    known = inventory("[{name: a, labels: {app: s}}, {name: b, labels: {app: s}}]")
    strict = dataclasses.replace(known.endpoints[1], mode="always")
    mixed = dataclasses.replace(known, endpoints=(known.endpoints[0], strict))
    cells = Matrix(Scene((), mixed)).cells
    assert ("default/a", "reserved:host") in cells
    assert not [dst for src, dst in cells if src == "default/b"]


def test_an_agent_without_a_proxy_allows_nothing_that_needs_one() -> None:
    (row,) = l7_of(cnp(HTTP), WEB, DB)
    assert row["ports"] == "80"
    assert answer(cnp(HTTP), parsers=())[WEB, DB] == {"TCP": "81"}


def test_endpoints_of_equal_labels_are_listed_one_by_one() -> None:
    found = answer(
        cnp("endpointSelector: {}\ningress: [{fromEndpoints: [{}]}]"),
        "[{name: a, labels: {app: s}}, {name: b, labels: {app: s}}, {name: c, labels: [z=1]}]",
    )
    inside = {(s, d) for s, d in found if s.startswith("default/") and d.startswith("default/")}
    assert len(inside) == 6


# ---- Kubernetes' own


def np(spec: str, name: str = "n", namespace: str = "default") -> str:
    return (
        cnp(spec, name, namespace)
        .replace("cilium.io/v2", "networking.k8s.io/v1")
        .replace("CiliumNetworkPolicy", "NetworkPolicy")
    )


def sources(found: Answer, destination: str) -> set[str]:
    return {src for src, dst in found if dst == destination}


def destinations(found: Answer, source: str) -> set[str]:
    return {dst for src, dst in found if src == source}


OUTSIDE = {"0.0.0.0/0", "::/0"}


def test_policy_types_say_which_directions_are_isolated() -> None:
    everybody = {WEB, FAR, HOST} | OUTSIDE
    for types, ingress, egress in (
        ("", True, False),
        ("policyTypes: [Ingress]", True, False),
        ("policyTypes: [Egress]", False, True),
        ("policyTypes: [Ingress, Egress]", True, True),
    ):
        found = answer(np(f"podSelector: {{matchLabels: {{app: db}}}}\n{types}"))
        assert sources(found, DB) == ({HOST} if ingress else everybody), types
        assert destinations(found, DB) == (set() if egress else everybody), types
    # what the types leave out is not looked at
    ignored = answer(
        np("podSelector: {matchLabels: {app: db}}\npolicyTypes: [Egress]\ningress: [{from: []}]")
    )
    assert sources(ignored, DB) == everybody
    # rules without types isolate by themselves
    implied = answer(
        np("podSelector: {matchLabels: {app: db}}\negress: [{to: [{podSelector: {}}]}]")
    )
    assert sources(implied, DB) == {HOST}
    assert destinations(implied, DB) == {WEB}


def test_an_empty_kubernetes_rule_allows_everything() -> None:
    found = answer(np("podSelector: {matchLabels: {app: db}}\ningress: [{}]"))
    assert found[FAR, DB] == ALL
    assert found["0.0.0.0/0", DB] == V4


def test_kubernetes_peers() -> None:
    by_pod = answer(
        np("podSelector: {matchLabels: {app: db}}\ningress: [{from: [{podSelector: {}}]}]")
    )
    assert sources(by_pod, DB) == {WEB, HOST}
    by_space = answer(
        np("""
podSelector: {matchLabels: {app: db}}
ingress: [{from: [{namespaceSelector: {matchLabels: {team: red}}}]}]
""")
    )
    assert sources(by_space, DB) == {FAR, HOST}
    by_name = answer(
        np("""
podSelector: {matchLabels: {app: db}}
ingress:
- from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: x}}}]
""")
    )
    assert by_name == by_space
    everywhere = answer(
        np("podSelector: {matchLabels: {app: db}}\ningress: [{from: [{namespaceSelector: {}}]}]")
    )
    assert sources(everywhere, DB) == {WEB, FAR, HOST}
    both = answer(
        np("""
podSelector: {matchLabels: {app: db}}
ingress:
- from:
  - {namespaceSelector: {matchLabels: {team: red}}, podSelector: {matchLabels: {app: none}}}
""")
    )
    assert sources(both, DB) == {HOST}
    either = answer(
        np("""
podSelector: {matchLabels: {app: db}}
ingress:
- from:
  - {namespaceSelector: {matchLabels: {team: red}}}
  - {podSelector: {matchLabels: {app: none}}}
""")
    )
    assert sources(either, DB) == {FAR, HOST}


def test_ip_blocks_mean_addresses_outside() -> None:
    found = answer(
        np("""
podSelector: {matchLabels: {app: db}}
ingress:
- from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.128.0.0/9]}}]
  ports: [{port: 5432, endPort: 5440}]
""")
    )
    assert sources(found, DB) == {"10.0.0.0/9", HOST}
    assert found["10.0.0.0/9", DB] == {"TCP": "5432-5440"}


def test_kubernetes_ports() -> None:
    found = answer(
        np("""
podSelector: {matchLabels: {app: db}}
ingress:
- from: [{podSelector: {}}]
  ports: [{protocol: UDP}, {port: 80}, {port: 90, endPort: 95, protocol: SCTP}]
- from: [{namespaceSelector: {matchLabels: {team: red}}}]
  ports: [{}]
""")
    )
    assert found[WEB, DB] == {"TCP": "80", "UDP": "1-65535", "SCTP": "90-95"}
    assert found[FAR, DB] == {"TCP": "1-65535"}


def test_kinds_add_up() -> None:
    found = answer(
        np("podSelector: {matchLabels: {app: db}}\ningress: [{from: [{podSelector: {}}]}]")
        + ccnp('endpointSelector: {}\ningressDeny: [{toPorts: [{ports: [{port: "22"}]}]}]')
    )
    assert found[WEB, DB]["TCP"] == "1-21,23-65535"
    assert sources(found, WEB) == {HOST}


# ---- L7


HTTP = """
endpointSelector: {matchLabels: {app: db}}
ingress:
- fromEndpoints: [{matchLabels: {app: web}}]
  toPorts:
  - ports: [{port: "80", protocol: TCP}]
    rules: {http: [{method: GET, path: /public}]}
  - ports: [{port: "81", protocol: TCP}]
"""


def l7_of(text: str, src: str, dst: str, **options: Any) -> list[dict[str, Any]]:
    rows = [x.shape() for x in Matrix(scene(text, **options)).rows()]
    return [x for x in rows if (x["src"], x["dst"]) == (src, dst) and "l7" in x]


def test_what_needs_a_proxy_is_a_row_of_its_own() -> None:
    found = answer(cnp(HTTP))
    assert found[WEB, DB] == {"TCP": "81", "TCP l7": "80"}
    (row,) = l7_of(cnp(HTTP), WEB, DB)
    assert row["l7"] == [
        {
            "direction": "ingress",
            "parser": "http",
            "rules": [{"method": "GET", "path": "/public"}],
        }
    ]


def test_requests_of_several_rules_add_up_and_a_plain_rule_lifts_them() -> None:
    more = cnp(HTTP) + cnp(HTTP.replace("/public", "/other"), name="q")
    (row,) = l7_of(more, WEB, DB)
    assert row["l7"][0]["rules"] == [
        {"method": "GET", "path": "/other"},
        {"method": "GET", "path": "/public"},
    ]
    plain = cnp(
        "endpointSelector: {matchLabels: {app: db}}\n"
        'ingress: [{toPorts: [{ports: [{port: "80", protocol: TCP}]}]}]',
        name="q",
    )
    lifted = answer(cnp(HTTP) + plain)
    assert lifted[WEB, DB] == {"TCP": "80-81"}
    assert lifted["0.0.0.0/0", DB] == {"TCP": "80"}


def test_requests_are_judged_at_both_ends() -> None:
    egress = """
endpointSelector: {matchLabels: {app: web}}
egress:
- toPorts:
  - ports: [{port: "80", protocol: TCP}]
    rules: {http: [{method: GET}]}
- toPorts:
  - ports: [{port: "53", protocol: UDP}]
    rules: {dns: [{matchPattern: "*.example.org"}]}
"""
    text = cnp(HTTP) + cnp(egress, name="q")
    assert answer(text)[WEB, DB] == {"TCP l7": "80"}
    (row,) = l7_of(text, WEB, DB)
    assert [x["direction"] for x in row["l7"]] == ["egress", "ingress"]
    assert answer(text)[WEB, "0.0.0.0/0"] == {"TCP l7": "80", "UDP l7": "53"}
    dns = next(x for x in l7_of(text, WEB, FAR) if x["protocol"] == "UDP")
    assert dns["l7"][0]["rules"] == [{"matchPattern": "*.example.org"}]


def test_other_parsers_are_taken_to_be_there() -> None:
    text = cnp("""
endpointSelector: {matchLabels: {app: db}}
ingress:
- toPorts:
  - ports: [{port: "9092", protocol: TCP}]
    rules: {kafka: [{apiKey: produce, topic: t}]}
- toPorts:
  - ports: [{port: "7", protocol: TCP}]
    rules: {l7proto: r2d2, l7: [{cmd: READ}]}
""")
    rows = {x["ports"]: x["l7"][0] for x in l7_of(text, WEB, DB)}
    assert rows["9092"]["rules"] == [{"apiKey": "produce", "topic": "t"}]
    assert rows["7"] == {"direction": "ingress", "parser": "r2d2", "rules": [{"cmd": "READ"}]}


# ---- named ports


def test_named_ports_are_those_of_the_destination() -> None:
    found = answer(
        ccnp("""
endpointSelector: {matchLabels: {app: web}}
ingress: [{fromEndpoints: [{}], toPorts: [{ports: [{port: http}]}]}]
""")
        + ccnp(
            """
endpointSelector: {matchLabels: {app: db}}
egress: [{toEndpoints: [{}], toPorts: [{ports: [{port: http, protocol: TCP}, {port: dns}]}]}]
""",
            name="q",
        )
    )
    assert found[DB, WEB] == {"TCP": "8080"}
    assert found[DB, FAR] == {"TCP": "80"}
    assert (WEB, DB) in found
    only = answer(
        ccnp("""
endpointSelector: {matchLabels: {app: db}}
egress: [{toEndpoints: [{}], toPorts: [{ports: [{port: http, protocol: TCP}, {port: dns}]}]}]
""")
    )
    assert only[DB, WEB] == {"TCP": "8080", "UDP": "5353"}
    assert only[DB, FAR] == {"TCP": "80"}


def test_named_ports_tell_endpoints_of_equal_labels_apart() -> None:
    endpoints = """
- {name: a, labels: {app: s}, ports: [{name: web, port: 80}]}
- {name: b, labels: {app: s}, ports: [{name: web, port: 8080}]}
- {name: c, labels: {app: t}}
"""
    policy = cnp("""
endpointSelector: {matchLabels: {app: t}}
egress: [{toEndpoints: [{matchLabels: {app: s}}], toPorts: [{ports: [{port: web}]}]}]
""")
    found = answer(policy, endpoints)
    assert found["default/c", "default/a"] == {"TCP": "80"}
    assert found["default/c", "default/b"] == {"TCP": "8080"}
    np_policy = np("""
podSelector: {matchLabels: {app: s}}
ingress: [{ports: [{port: web}]}]
""")
    found = answer(np_policy, endpoints)
    assert found["default/c", "default/a"] == {"TCP": "80"}
    assert found["default/c", "default/b"] == {"TCP": "8080"}
    assert found["::/0", "default/b"] == {"TCP": "8080"}


# ---- host policy


def test_rules_about_the_node_judge_its_own_traffic() -> None:
    text = ccnp("""
nodeSelector: {}
ingress:
- fromEntities: [cluster]
- toPorts: [{ports: [{port: "22", protocol: TCP}]}]
""")
    found = answer(text)
    assert found["0.0.0.0/0", HOST] == {"TCP": "22"}
    assert found[WEB, HOST] == ALL
    assert found[HOST, "0.0.0.0/0"] == V4
    assert found["0.0.0.0/0", WEB] == V4
    egress = answer(ccnp("nodeSelector: {}\negress: [{toCIDR: [192.0.2.0/24]}]"))
    assert egress[HOST, "192.0.2.0/24"] == V4
    assert (HOST, "::/0") not in egress
    assert (HOST, WEB) not in egress


def test_the_node_has_labels_of_its_own() -> None:
    text = ccnp("nodeSelector: {matchLabels: {rack: r7}}\ningress: [{fromEntities: [remote-node]}]")
    assert answer(text)[WEB, HOST] == ALL
    labelled = ENDPOINTS.replace("endpoints:", "host: {labels: {rack: r7}}\nendpoints:", 1)
    found = answer(text, labelled)
    assert sources(found, HOST) == {"reserved:remote-node"}


def test_audit_reports_and_allows() -> None:
    text = cnp("endpointSelector: {matchLabels: {app: db}}\ningress: [{}]").replace(
        "namespace: default}", 'namespace: default, annotations: {cilia.io/audit: "true"}}'
    )
    assert answer(text) == answer("")


# ---- the file of endpoints


def test_inventory_forms() -> None:
    one = inventory('[{"name": "a", "namespace": "n", "labels": {"x": "1", "container:y": "2"}}]')
    assert str(one.endpoints[0].labels) == (
        "k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name=n,"
        "k8s:io.cilium.k8s.policy.cluster=default,k8s:io.kubernetes.pod.namespace=n,"
        "k8s:x=1,container:y=2"
    )
    two = inventory(ENDPOINTS)
    assert two.endpoints[2].labels.get("io.cilium.k8s.namespace.labels.team") is not None
    assert two.find("web") is two.endpoints[0]
    assert two.find("x/far") is two.find("10.0.1.1") is two.endpoints[2]
    assert two.find("fd00::1") is two.endpoints[0]
    assert two.find("far") is None
    assert inventory("[]").endpoints == inventory("").endpoints == ()


@pytest.mark.parametrize(
    ("text", "path", "message"),
    [
        ("[{labels: {}}]", "[0].name", "is missing"),
        ("[{name: a, lables: {}}]", "[0].lables", 'did you mean "labels"'),
        ("{apiVersion: v1, kind: Pod, metadata: {}}", "", "this is a 'Pod', not endpoints"),
        ("[{name: a}, {name: a}]", "[1]", "also the name of the one in line 1"),
        ("[{name: a, ips: [10.0.0]}]", "[0].ips[0]", "not an IPv4 or IPv6 address"),
        ("[{name: a, ports: [{name: x, port: 0}]}]", "[0].ports[0].port", "outside 1 to 65535"),
        (
            "[{name: a, ports: [{port: 1, protocol: ICMP}]}]",
            "[0].ports[0].protocol",
            "not a known protocol",
        ),
        ("[{name: a, labels: {x: [1]}}]", "[0].labels[x]", "must be text"),
        (
            "[{name: a, labels: {io.kubernetes.pod.namespace: z}}]",
            "[0].labels",
            "contradicts the namespace default",
        ),
        ("{namespaces: {}}", "endpoints", "is missing"),
        ("a: [", "", "invalid YAML"),
        ("[]\n---\n[]", "", "second document"),
    ],
)
def test_inventory_faults_name_the_place(text: str, path: str, message: str) -> None:
    with pytest.raises(InventoryError) as caught:
        inventory(text)
    fault = caught.value.faults[0]
    assert fault.path == path
    assert message in fault.message


# ---- against a naive count


def test_partition_is_minimal() -> None:
    net = ipaddress.ip_network
    inside = {net("10.0.0.0/9"): 1, net("10.128.0.0/9"): 1, net("10.3.0.0/16"): 0}
    found = [(network(4, block), value) for block, value in partition(4, 0, inside)]
    assert sum(p.num_addresses for p, _ in found) == 2**32
    ones = [p for p, value in found if value == 1]
    assert len(ones) == 8
    assert partition(6, "x", {}) == [((0, 0), "x")]
    assert network(6, (0, 0)) == net("::/0")
    assert partition(4, 0, {net("10.0.0.0/9"): 0}) == [((0, 0), 0)]


MINE = [
    {"name": f"e{i}", "namespace": ns, "labels": [x for x in labels if "pod.namespace" not in x]}
    for i, labels in enumerate(random_policies.ENDPOINTS)
    for ns in [oracle.value_of(labels, random_policies.NS) or "default"]
]
ADDRESSES = ["10.0.0.1", "10.1.0.1", "10.1.2.3", "192.0.2.7", "192.0.2.200", "198.51.100.1", "::1"]
ADDRESSES += ["2001:db8::1", "2001:db8:1::1"]
PROBES = [(6, 1), (6, 79), (6, 80), (6, 81), (6, 8080), (6, 65535), (17, 80), (132, 80)]
PROBES += [(1, 0), (1, 1), (1, 80), (58, 0), (58, 80)]
SAID = {"TCP": 6, "UDP": 17, "SCTP": 132, "ICMP": 1, "ICMPv6": 58}


def _holds(text: str, number: int) -> bool:
    for part in text.split(","):
        first, _, last = part.partition("-")
        if int(first) <= number <= int(last or first):
            return True
    return False


def _mentioned(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [x for v in value.values() for x in _mentioned(v)]
    if isinstance(value, list):
        return [x for v in value for x in _mentioned(v)]
    return [value] if isinstance(value, str) and "/" in value and value[0] in "0123456789:" else []


def _outside(address: str, documents: list[dict[str, Any]]) -> list[str]:
    """The labels that an address outside has: of the longest prefix mentioned, and the world."""
    ip = ipaddress.ip_address(address)
    nets = [ipaddress.ip_network(x) for x in _mentioned(documents)]
    mine = [x for x in nets if x.version == ip.version and ip in x and x.prefixlen]
    labels = ["reserved:world", f"reserved:world-ipv{ip.version}"]
    return labels + [f"cidr:{x}" for x in sorted(mine, key=lambda x: x.prefixlen)[-1:]]


def without_l7(value: Any) -> Any:
    """Documents without their L7 parts: what may be connected to, whatever is then said."""
    if isinstance(value, dict):
        plain = {k: without_l7(v) for k, v in value.items()}
        return {k: v for k, v in plain.items() if k != "rules" or "ports" not in plain}
    return [without_l7(v) for v in value] if isinstance(value, list) else value


def _judged(labels: list[str]) -> bool:
    return not any(
        x.startswith("cidr:") or x in ("reserved:host", "reserved:world") for x in labels
    )


@settings(
    max_examples=max(random_policies.EXAMPLES // 8, 10),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(documents=random_policies.document_lists())
@example(documents=[])
def test_every_packet_of_a_naive_count(documents: list[dict[str, Any]]) -> None:
    stage = Scene(random_policies.parse(documents), inventory(json.dumps(MINE)), mode="default")
    rows = [row.shape() for row in Matrix(stage).rows()]
    labels = {x.ref: [str(y) for y in x.labels] for x in stage.inventory.endpoints}
    labels[HOST] = ["reserved:host"]
    by_pair: dict[tuple[str, str], list[dict[str, Any]]] = {}
    cidrs: dict[str, ipaddress.IPv4Network | ipaddress.IPv6Network] = {}
    for row in rows:
        ends = [x if isinstance(x, str) else x["cidr"] for x in (row["src"], row["dst"])]
        by_pair.setdefault((ends[0], ends[1]), []).append(row)
        cidrs |= {x: ipaddress.ip_network(x) for x in ends if x[0] in "0123456789:"}
    known = list(cidrs.values())
    bare = without_l7(documents)
    assert not any(a != b and a.overlaps(b) for a in known for b in known)

    def place(address: str) -> str:
        ip = ipaddress.ip_address(address)
        return next((name for name, net in cidrs.items() if ip in net), "nowhere")

    parties = [(name, name, found) for name, found in labels.items()]
    parties += [(x, place(x), _outside(x, documents)) for x in ADDRESSES]
    for i, (src, src_row, src_labels) in enumerate(parties):
        for j, (dst, dst_row, dst_labels) in enumerate(parties):
            if src == dst or (i >= len(labels) and j >= len(labels)):
                continue
            foreign = {1 if ":" in x else 58 for x in (src, dst) if x in ADDRESSES}
            for proto, number in PROBES:
                if proto in foreign:
                    continue
                wanted = all(
                    not _judged(subject)
                    or oracle.allowed(bare, subject, peer, egress=egress, proto=proto, port=number)
                    for subject, peer, egress in (
                        (src_labels, dst_labels, True),
                        (dst_labels, src_labels, False),
                    )
                )
                seen = any(
                    SAID[row["protocol"]] == proto
                    and _holds(row.get("ports") or row["types"], number)
                    for row in by_pair.get((src_row, dst_row), [])
                )
                assert seen == wanted, (src, dst, proto, number)


@pytest.mark.parametrize("shared", [True, False])
def test_effort_grows_with_the_pairs_and_no_more(
    monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """As many policies as endpoints; the outside split once for all, or for each by itself."""
    if not shared:
        monkeypatch.setattr("cilia.policy.questions.matrix.MAX_SHARED", 0)

    def effort(count: int) -> int:
        stage = crowd(count)
        made = calls(lambda: list(Matrix(stage).rows()))
        matrix = Matrix(stage)
        assert matrix.shared is shared
        assert len(list(matrix.rows())) > 10 * count
        return made

    large = effort(60)
    assert large < 4.1 * effort(30)  # four times the pairs
    assert large < 1000 * 60 * 60


def crowd(count: int) -> Scene:
    endpoints = json.dumps(
        [
            {
                "name": f"e{i}",
                "namespace": f"n{i % 10}",
                "labels": {"app": f"a{i}", "tier": f"t{i % 7}"},
            }
            for i in range(count)
        ]
    )
    policies = "".join(
        cnp(
            f"""
endpointSelector: {{matchLabels: {{app: a{i}}}}}
ingress:
- fromEndpoints: [{{matchLabels: {{tier: t{i % 5}, "k8s:io.kubernetes.pod.namespace": n{i % 3}}}}}]
  toPorts: [{{ports: [{{port: "{i + 1}", endPort: {i + 100}, protocol: TCP}}]}}]
- fromCIDRSet: [{{cidr: 10.{i}.0.0/16, except: [10.{i}.{i}.0/24]}}]
egress:
- toEndpoints: [{{matchExpressions: [{{key: tier, operator: NotIn, values: [t{i % 4}]}},
    {{key: "k8s:io.kubernetes.pod.namespace", operator: Exists}}]}}]
""",
            name=f"p{i}",
            namespace=f"n{i % 10}",
        )
        for i in range(count)
    )
    return scene(policies, endpoints)
