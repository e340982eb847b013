"""Policy for an Envoy that has Cilium's filters: rule sets as cilium.NetworkPolicy, and which
addresses an identity has as cilium.NetworkPolicyHosts.

Both are resources like others: `cache.put(NPDS, policy.endpoint_ips[0], policy, nodes=...)`, or a
file of a resource directory. Such a proxy knows identities by itself, so a policy names the peers;
a stock Envoy gets redirects instead, where the kernel knows them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from protos.npds.v1 import npds_pb2 as npds
from protos.xds.v1 import xds_pb2 as pb
from services.xds.translator import Untranslatable

_MISMATCH: Final = {
    "": npds.HeaderMatch.FAIL_ON_MISMATCH,
    "LOG": npds.HeaderMatch.CONTINUE_ON_MISMATCH,
    "ADD": npds.HeaderMatch.ADD_ON_MISMATCH,
    "DELETE": npds.HeaderMatch.DELETE_ON_MISMATCH,
    "REPLACE": npds.HeaderMatch.REPLACE_ON_MISMATCH,
}
# Numbers of the Kafka protocol; what a role may call, as Cilium's policy language says.
_API_NAMES: Final = (
    "produce", "fetch", "offsets", "metadata", "leaderandisr", "stopreplica", "updatemetadata",
    "controlledshutdown", "offsetcommit", "offsetfetch", "findcoordinator", "joingroup",
    "heartbeat", "leavegroup", "syncgroup", "describegroups", "listgroups", "saslhandshake",
    "apiversions", "createtopics", "deletetopics", "deleterecords", "initproducerid",
    "offsetforleaderepoch", "addpartitionstotxn", "addoffsetstotxn", "endtxn",
    "writetxnmarkers", "txnoffsetcommit", "describeacls", "createacls", "deleteacls",
    "describeconfigs", "alterconfigs",
)  # fmt: skip
_API_KEYS: Final = {name: number for number, name in enumerate(_API_NAMES)}
_ROLES: Final = {
    "produce": (0, 3, 18),
    "consume": (1, 2, 3, 8, 9, 10, 11, 12, 13, 14, 18),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PortRules:
    """What some peers may do on a port. `rules` None: everything. `remotes` empty: everybody."""

    port: int  # 0: all
    protocol: int = npds.TCP
    remotes: tuple[int, ...] = ()
    rules: pb.RuleSet | None = None


def network_policy(
    addresses: Sequence[str],
    endpoint_id: int,
    *,
    ingress: Iterable[PortRules] | None,
    egress: Iterable[PortRules] | None,
) -> npds.NetworkPolicy:
    """The policy of one endpoint; a direction that is None is not enforced.

    Raises Untranslatable.
    """
    policy = npds.NetworkPolicy(endpoint_ips=addresses, endpoint_id=endpoint_id)
    for rows, into in (
        (ingress, policy.ingress_per_port_policies),
        (egress, policy.egress_per_port_policies),
    ):
        if rows is None:
            into.add(protocol=npds.TCP)
            into.add(protocol=npds.UDP)
        else:
            into.extend(_ports(rows))
    return policy


def hosts(identity: int, addresses: Iterable[str]) -> npds.NetworkPolicyHosts:
    return npds.NetworkPolicyHosts(policy=identity, host_addresses=sorted(addresses))


def _ports(rows: Iterable[PortRules]) -> Iterable[npds.PortNetworkPolicy]:
    ports: dict[tuple[int, int], npds.PortNetworkPolicy] = {}
    for row in sorted(rows, key=lambda row: (row.port, row.protocol, row.remotes)):
        rule = _rule(row)
        if rule is None:
            continue  # nothing is allowed, and a rule without requests would allow all
        key = (row.port, row.protocol)
        if key not in ports:
            ports[key] = npds.PortNetworkPolicy(
                port=row.port, protocol=npds.Protocol.ValueType(row.protocol)
            )
        ports[key].rules.append(rule)
    return ports.values()


def _rule(row: PortRules) -> npds.PortNetworkPolicyRule | None:
    made = npds.PortNetworkPolicyRule(remote_policies=sorted(row.remotes))
    if row.rules is None:
        return made
    rules = row.rules
    if not rules.rules:
        return None
    made.server_names.extend(rules.server_names)
    for context, into in (
        ("terminating_tls", made.downstream_tls_context),
        ("originating_tls", made.upstream_tls_context),
    ):
        if rules.HasField(context):  # type: ignore[arg-type]  # one of two names
            secret = getattr(rules, context).secret
            into.tls_sds_secret = f"{secret.namespace}/{secret.name}"
    if any(rule.WhichOneof("rule") is None for rule in rules.rules):
        return made  # one of them allows every request
    for rule in rules.rules:
        match rule.WhichOneof("rule"):
            case "http":
                made.http_rules.http_rules.append(_http(rule.http))
            case "kafka":
                made.kafka_rules.kafka_rules.append(_kafka(rule.kafka))
            case "generic":
                made.l7_proto = rules.parser
                made.l7_rules.l7_allow_rules.add(rule=dict(rule.generic.fields))
            case other:
                raise Untranslatable(f"the proxy has no rules of kind {other}")
    return made


def _http(rule: pb.HTTPRule) -> npds.HttpNetworkPolicyRule:
    made = npds.HttpNetworkPolicyRule()
    for name, expression in (
        (":method", rule.method),
        (":path", rule.path),
        (":authority", rule.host),
    ):
        if expression:
            _regex(made.headers.add(name=name), expression)
    for header in rule.headers:
        name, blank, value = header.partition(" ")
        if blank:
            made.headers.add(name=name.rstrip(":")).string_match.exact = value
        else:
            made.headers.add(name=name).present_match = True
    for match in rule.header_matches:
        if match.mismatch not in _MISMATCH:
            raise Untranslatable(f"mismatch action {match.mismatch[:20]!r} is unknown")
        entry = made.header_matches.add(
            name=match.name, value=match.value, mismatch_action=_MISMATCH[match.mismatch]
        )
        if match.HasField("secret"):
            entry.value_sds_secret = f"{match.secret.namespace}/{match.secret.name}"
    return made


def _regex(header: npds.HeaderMatcher, expression: str) -> None:
    regex = header.string_match.safe_regex
    regex.google_re2.SetInParent()
    regex.regex = expression


def _kafka(rule: pb.KafkaRule) -> npds.KafkaNetworkPolicyRule:
    made = npds.KafkaNetworkPolicyRule(
        api_version=int(rule.api_version) if rule.api_version else -1,
        client_id=rule.client_id,
        topic=rule.topic,
    )
    if rule.role:
        if rule.role.lower() not in _ROLES:
            raise Untranslatable(f"the role {rule.role[:20]!r} is neither produce nor consume")
        made.api_keys.extend(_ROLES[rule.role.lower()])
    elif rule.api_key:
        if rule.api_key.lower() not in _API_KEYS:
            raise Untranslatable(f"the Kafka API key {rule.api_key[:40]!r} is unknown")
        made.api_keys.append(_API_KEYS[rule.api_key.lower()])
    return made
