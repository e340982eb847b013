"""From documents, identities and proxies to rows: what is looked at again, and what is left out."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, ip_network
from pathlib import Path
from typing import Any

import pytest

from cilia.bpf.constants import POLICY_F_AUDIT, POLICY_F_DENY, POLICY_F_WATCH
from cilia.bpf.layout import POLICY_KEY
from cilia.identity import EndpointID, NumericIdentity
from cilia.labels import Labels
from cilia.policy import ALL_PARSERS, L7Set, parse_documents
from cilia.policy.api import FQDNSelector
from services.agent.calculation import Calculation
from services.agent.clusterwatch import PolicyName
from services.agent.endpoint import Endpoint, EndpointOptions, SubjectKey
from services.agent.identityalloc import CidrIdentities
from services.agent.policyrows import PolicyRows, changes

NS = "k8s:io.kubernetes.pod.namespace=default"
WEB = Labels.parse(["k8s:app=web", NS])
DB = Labels.parse(["k8s:app=db", NS])
WEB_ID, DB_ID = NumericIdentity(300), NumericIdentity(301)
HTTP = """
- endpointSelector: {matchLabels: {app: web}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: db}}]
    toPorts: [{ports: [{port: "80", protocol: TCP}], rules: {http: [{method: GET}]}}]
"""


class Proxies:
    def __init__(self) -> None:
        self.ready: dict[str, int] = {}

    def __call__(self, needed: L7Set) -> int | None:
        return self.ready.get(needed.digest)


def calculation(directory: Path, ports: Any = lambda _: None) -> Calculation:
    found = Calculation(
        mode="default",
        audit=False,
        allow_localhost=True,
        cluster="default",
        slots=64,
        cidrs=CidrIdentities(directory / "cidrs.json", release_delay_s=60),
        router=[],
        ports=ports,
        enforcers=ALL_PARSERS,
    )
    found.put_identity(WEB_ID, WEB)
    found.put_identity(DB_ID, DB)
    return found


def endpoint(number: int, identity: NumericIdentity, labels: Labels, **more: Any) -> Endpoint:
    return Endpoint(
        id=EndpointID(number),
        name=f"e{number}",
        namespace="default",
        labels=labels,
        identity_labels=labels,
        netns="/none",
        interface="eth0",
        host_interface="x",
        ipv4=IPv4Address("10.0.0.1"),
        identity=identity,
        **more,
    )


def documents(text: str) -> dict[PolicyName, Any]:
    result = parse_documents(text, source="r.yaml")
    assert result.faults == ()
    return {PolicyName(x.kind, x.namespace or "", x.name): x for x in result.documents}


def values(rows: PolicyRows) -> dict[tuple[int, int, int, int], tuple[int, int]]:
    """(identity, port, protocol, length and direction): (proxy port, flags)."""
    return {
        (int(k["identity"]), int(k["dport_be"]), int(k["proto"]), int(k["l4_plen_egress"])): (
            int(v["proxy_port_be"]),
            int(v["flags"]),
        )
        for k, v in zip(rows.key_array(), rows.value_array(), strict=True)
    }


HTTP_ROW = (301, 80, 6, 24)
SUBJECT = SubjectKey(WEB_ID, "default", False)


def test_a_row_waits_for_its_proxy(tmp_path: Path) -> None:
    proxies = Proxies()
    calc = calculation(tmp_path, proxies)
    calc.set_users([endpoint(1, WEB_ID, WEB)])
    calc.set_documents(documents(HTTP))
    assert calc.take_dirty() == {SUBJECT}
    before = calc.policy_row(SUBJECT)
    assert HTTP_ROW not in values(before.rows)
    assert before.size == len(before.rows) == len(before.state) - 1
    assert not before.complete
    (needed,) = calc.l7_sets()
    assert (needed.parser, needed.egress) == ("http", False)

    proxies.ready[needed.digest] = 10007
    calc.proxies_changed({needed.digest})
    assert calc.take_touched() == {SUBJECT}
    after = calc.policy_row(SUBJECT)
    assert values(after.rows)[HTTP_ROW] == (10007, 0)
    assert after.complete
    assert after.size == len(after.rows) == before.size + 1
    assert after.masks == after.rows.masks()
    calc.proxies_changed({"another"})
    assert calc.take_touched() == set()

    calc.set_documents({}, documents(HTTP))
    calc.take_dirty()
    calc.policy_row(SUBJECT)
    assert calc.l7_sets() == frozenset()


def test_where_nothing_isolates_an_unready_proxy_denies(tmp_path: Path) -> None:
    calc = calculation(tmp_path)
    calc.set_users([endpoint(1, WEB_ID, WEB)])
    calc.set_documents(
        documents(HTTP.replace("  ingress:", "  enableDefaultDeny: {ingress: false}\n  ingress:"))
    )
    row = calc.policy_row(SUBJECT)
    assert values(row.rows)[HTTP_ROW] == (0, POLICY_F_DENY)
    assert row.masks == row.rows.masks()


def test_without_an_enforcer_nothing_is_asked_of_proxies(tmp_path: Path) -> None:
    calc = calculation(tmp_path)
    calc.set_users([endpoint(1, WEB_ID, WEB)])
    calc.set_documents(documents(HTTP))
    calc.take_dirty()
    assert not calc.policy_row(SUBJECT).complete
    calc.set_enforcers(())
    assert calc.take_dirty() == {SUBJECT}
    assert calc.policy_row(SUBJECT).complete
    assert calc.l7_sets() == frozenset()
    assert [x.why for x in calc.policy_row(SUBJECT).unenforced] == [
        "http rules have no proxy to enforce them yet"
    ]


def test_what_is_only_shown_passes_without_its_proxy(tmp_path: Path) -> None:
    proxies = Proxies()
    calc = calculation(tmp_path, proxies)
    shown = EndpointOptions(visibility="<Ingress/80/TCP/HTTP>")
    visible = endpoint(1, WEB_ID, WEB, options=shown)
    calc.set_users([visible, endpoint(2, WEB_ID, WEB)])
    key = calc.subject_of(visible)
    assert key is not None
    assert calc.take_dirty() == {key, SUBJECT}, "one who is not seen shares no policy with it"
    assert calc.policy_row(SUBJECT).not_shown == []
    row = calc.policy_row(key)
    assert set(values(row.rows)) == {(0, 0, 0, 0), (0, 0, 0, 128)}
    (line,) = row.not_shown
    assert "the proxy is not there" in line

    (needed,) = calc.l7_sets()
    proxies.ready[needed.digest] = 10007
    row = calc.policy_row(key)
    assert values(row.rows)[0, 80, 6, 24] == (10007, POLICY_F_WATCH)
    assert row.not_shown == []

    calc.set_documents(documents(HTTP))
    row = calc.policy_row(key)
    assert (0, 80, 6, 24) not in values(row.rows)
    assert row.not_shown == ["<Ingress/80/TCP/HTTP>: policy isolates this direction"]


def test_only_whom_it_concerns_is_looked_at_again(tmp_path: Path) -> None:
    calc = calculation(tmp_path)
    calc.set_users([endpoint(1, WEB_ID, WEB), endpoint(2, DB_ID, DB)])
    calc.set_documents(documents(HTTP))
    assert {x.identity for x in calc.take_dirty()} == {WEB_ID, DB_ID}  # both are new
    for key in calc.subjects:
        calc.policy_row(key)
    other = documents(HTTP.replace("{app: web}", "{app: none}"))
    calc.set_documents({PolicyName("Rules", "", "other"): replace(*other.values(), name="other")})
    assert calc.take_dirty() == set()
    calc.put_identity(NumericIdentity(400), DB)
    assert calc.take_dirty() == set()
    assert calc.take_touched() == {SUBJECT}
    calc.put_identity(NumericIdentity(401), WEB)
    assert calc.take_touched() == set()


def test_endpoints_differ_by_what_they_call_their_ports(tmp_path: Path) -> None:
    calc = calculation(tmp_path)
    named = endpoint(1, WEB_ID, WEB, ports=(("http", 8080, 6),))
    calc.set_users([named, endpoint(2, WEB_ID, WEB), endpoint(3, DB_ID, DB)])
    calc.set_documents(
        documents("""
- endpointSelector: {matchLabels: {app: web}}
  ingress: [{toPorts: [{ports: [{port: http}]}]}]
- endpointSelector: {matchLabels: {app: db}}
  egress: [{toPorts: [{ports: [{port: http, protocol: TCP}]}]}]
""")
    )
    keys = {str(key): key for key in calc.subjects}
    assert sorted(keys) == ["300/default", "300/default/http=8080", "301/default"]
    assert (0, 8080, 6, 24) in values(calc.policy_row(keys["300/default/http=8080"]).rows)
    assert (0, 8080, 6, 24) not in values(calc.policy_row(keys["300/default"]).rows)
    egress = 24 | 0x80
    assert (300, 8080, 6, egress) in values(calc.policy_row(keys["301/default"]).rows)
    calc.take_touched()
    calc.set_users([endpoint(2, WEB_ID, WEB), endpoint(3, DB_ID, DB)])
    assert calc.take_touched() == {keys["301/default"]}
    assert (300, 8080, 6, egress) not in values(calc.policy_row(keys["301/default"]).rows)


def test_the_node_is_a_subject_of_its_own_rules(tmp_path: Path) -> None:
    calc = calculation(tmp_path)
    key = calc.set_node(Labels.parse(["reserved:host", "k8s:type=worker"]))
    assert key is not None
    calc.set_users([endpoint(1, WEB_ID, WEB)])
    assert not calc.policy_row(key).ingress_enforced
    calc.set_documents(
        documents("""
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: node}
spec:
  nodeSelector: {matchLabels: {type: worker}}
  ingress: [{toPorts: [{ports: [{port: "22", protocol: TCP}]}]}]
""")
    )
    assert calc.take_dirty() >= {key}
    row = calc.policy_row(key)
    assert row.ingress_enforced
    assert set(values(row.rows)) == {(0, 22, 6, 24), (0, 0, 0, 0x80)}
    assert not calc.policy_row(SUBJECT).ingress_enforced


def test_names_get_identities_and_rows(tmp_path: Path) -> None:
    calc = calculation(tmp_path)
    calc.set_users([endpoint(1, WEB_ID, WEB)])
    calc.set_documents(
        documents(
            "- endpointSelector: {}\n  egress: [{toFQDNs: [{matchName: a.org}]}]\n"
            "- endpointSelector: {}\n  egress: [{toCIDR: [192.0.2.2]}]\n"
        )
    )
    selector = FQDNSelector("a.org")
    addresses = [ip_network("192.0.2.1"), ip_network("192.0.2.2")]
    calc.set_fqdn(selector, addresses)
    number = calc.cidrs.numbers[ip_network("192.0.2.1")]
    assert (number, 0, 0, 0x80) in values(calc.policy_row(SUBJECT).rows)
    calc.set_fqdn(selector, [])
    assert (number, 0, 0, 0x80) not in values(calc.policy_row(SUBJECT).rows)
    other = calc.cidrs.numbers[ip_network("192.0.2.2")]
    assert (other, 0, 0, 0x80) in values(calc.policy_row(SUBJECT).rows)
    assert calc.cidrs.next_release_s is not None


def test_a_policy_that_only_audits_marks_its_rows(tmp_path: Path) -> None:
    calc = calculation(tmp_path)
    calc.set_users([endpoint(1, WEB_ID, WEB)])
    calc.set_documents(
        documents("""
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: a, annotations: {cilia.io/audit: "true"}}
spec: {endpointSelector: {}, ingress: [{}]}
""")
    )
    row = calc.policy_row(SUBJECT)
    assert values(row.rows)[0, 0, 0, 0] == (0, POLICY_F_AUDIT)


@pytest.mark.parametrize("trimmed", [False, True])
def test_what_changed_is_what_is_written(tmp_path: Path, *, trimmed: bool) -> None:
    """Applied to what the map held, the engine's difference gives what it is to hold."""
    calc = calculation(tmp_path)
    calc.set_users([endpoint(1, WEB_ID, WEB)])
    calc.set_documents(documents(HTTP))
    deny = HTTP.replace("ingress:", "ingressDeny:").replace(", rules: {http: [{method: GET}]}", "")
    old = calc.policy_row(SUBJECT)
    for step in range(40):
        if step % 3 == 0:
            calc.put_identity(NumericIdentity(500 + step), DB)
        elif step % 3 == 1:
            calc.remove_identity(NumericIdentity(499 + step))
        else:
            calc.set_documents(documents(deny if step % 2 else HTTP))
        new = calc.policy_row(SUBJECT)
        assert new.state is old.state or new.state.follows(old.state)
        content = dict(zip(old.rows.keys.tolist(), old.rows.values.tolist(), strict=True))
        writes = changes(old.state, new.state, new.fill)
        assert writes.added - writes.dropped == new.size - old.size
        for key, value in (*writes.put_denies, *writes.put_allows, *writes.lift_denies):
            content[int.from_bytes(key, "little")] = int.from_bytes(value[:8], "little")
        for key in (*writes.drop_allows, *writes.drop_denies):
            del content[int.from_bytes(key, "little")]
        wanted = new.rows
        assert content == dict(zip(wanted.keys.tolist(), wanted.values.tolist(), strict=True))
        assert new.masks == new.rows.masks()
        old = new
    assert POLICY_KEY.itemsize == 8
    if trimmed:
        before = dict(old.state)
        old.state.detach()
        assert dict(old.state) == before
        assert not calc.policy_row(SUBJECT).state.follows(old.state)
