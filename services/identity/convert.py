"""Between the wire and the domain. What comes in is checked here, field by field: everything a
stranger can send is either a valid value of the domain or an InvalidRequestField that names it."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar, assert_never

from cilia.errors import Fault, Origin
from cilia.identity import MAX_CLUSTER_ID, RESERVED, is_cluster, is_local, reserved_labels
from cilia.kv.backend import Limits
from cilia.labels import MAX_LABELS, Label, LabelError, Labels
from cilia.rpc.convert import identity_to_proto as to_proto_identity
from cilia.rpc.convert import labels_to_proto
from protos.common.v1 import common_pb2
from protos.identity.v1 import identity_pb2 as pb
from services.identity.identities import Identity
from services.identity.keys import Kind, identity_of, ip_prefix_of
from services.identity.policies import Change, Outcome, name_of
from services.identity.records import (
    InvalidRequestField,
    IpEntry,
    Policy,
    PolicyName,
)
from services.identity.sessions import SessionInfo
from services.identity.status import StatusReport
from services.identity.view import Change as ViewChange
from services.identity.watch import (
    BatchMessage,
    BookmarkMessage,
    Message,
    ResetMessage,
    SyncedMessage,
)

MAX_NODE = 253
MAX_NAME = 253
MAX_NAMESPACE = 63
MAX_WORKLOAD = 253
MAX_SOURCE = 4096
MAX_PATH = 1024
MAX_DOCUMENT_BYTES = 1280 * 1024
# As many as the parser gives a document; with it they stay below the store's bound of a request.
MAX_RULE_ORIGINS = 16384
MAX_POLICIES = 128
# What one transaction of the store takes, less keys and framing.
MAX_TOGETHER_BYTES = Limits().max_request_bytes - MAX_POLICIES * 1024
MAX_ANNOUNCED = 4096
MAX_LEASE_TTL_S = 86_400
MAX_CLUSTER_NUMBER = 0xFFFFFF
MAX_JSON_DEPTH = 64

POLICY_KINDS = (
    "CiliumNetworkPolicy",
    "CiliumClusterwideNetworkPolicy",
    "NetworkPolicy",
    "Rules",
)
_NAMESPACED = ("CiliumNetworkPolicy", "NetworkPolicy")

_NODE_RE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?\Z")
_NAMESPACE_RE = re.compile(r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?\Z")

_KINDS: dict[int, Kind] = {
    pb.KIND_IDENTITY: Kind.IDENTITY,
    pb.KIND_IP: Kind.IP,
    pb.KIND_POLICY: Kind.POLICY,
}
_CHANGES = {
    Change.UNCHANGED: pb.Outcome.UNCHANGED,
    Change.CREATED: pb.Outcome.CREATED,
    Change.CONFIGURED: pb.Outcome.CONFIGURED,
    Change.DELETED: pb.Outcome.DELETED,
}

T = TypeVar("T")
U = TypeVar("U")


def refuse(path: str, message: str, *, document: str = "") -> InvalidRequestField:
    return InvalidRequestField([Fault(document, path, message)])


# What comes in


def node(value: str, path: str = "node") -> str:
    if not value:
        raise refuse(path, "a node name is required")
    if len(value) > MAX_NODE or not _NODE_RE.match(value):
        raise refuse(
            path,
            f"{_shown(value)} is not a node name: letters, digits, '.', '_' and '-', at most "
            f"{MAX_NODE}, a letter or digit at both ends",
        )
    return value


def lease_ttl_s(value: int, default: int) -> int:
    if value > MAX_LEASE_TTL_S:
        raise refuse("lease_ttl_s", f"{value} is more than {MAX_LEASE_TTL_S} seconds")
    return value or default


def labels(values: Iterable[common_pb2.Label], path: str = "labels") -> Labels:
    """Each key once. An empty set is returned as such."""
    found: list[Label] = []
    keys: set[str] = set()
    for index, value in enumerate(values):
        if index >= MAX_LABELS:
            raise refuse(path, f"more than {MAX_LABELS} labels")
        try:
            label = Label(value.source, value.key, value.value)
        except LabelError as error:
            raise refuse(f"{path}[{index}]", str(error)) from None
        if ":" in label.source:
            raise refuse(f"{path}[{index}].source", "a source cannot contain ':'")
        if label.key in keys:
            raise refuse(f"{path}[{index}].key", f"the key {label.key} is given twice")
        keys.add(label.key)
        found.append(label)
    result = Labels(found)
    try:
        stable = Labels.from_canonical(result.canonical()) == result
    except LabelError:
        stable = False
    if not stable:
        # Two label sets that read the same when stored would share an identity.
        raise refuse(path, "the labels are ambiguous when written as source:key=value")
    return result


def required_labels(values: Iterable[common_pb2.Label], path: str = "labels") -> Labels:
    found = labels(values, path)
    if not found:
        raise refuse(path, "at least one label is required")
    return found


def identity_number(value: int, path: str = "id") -> int:
    if not 0 < value <= MAX_CLUSTER_NUMBER:
        raise refuse(path, f"{value} is not an identity of the cluster (1 to {MAX_CLUSTER_NUMBER})")
    return value


def ip_entry(value: pb.IpEntry, path: str, announcing: str) -> IpEntry:
    if value.node and value.node != announcing:
        raise refuse(f"{path}.node", f"node {announcing} cannot announce for {_shown(value.node)}")
    if is_local(value.identity):
        raise refuse(
            f"{path}.identity", f"{value.identity} is local to its node and cannot leave it"
        )
    if value.identity not in RESERVED and not is_cluster(value.identity):
        raise refuse(
            f"{path}.identity",
            f"{value.identity} is neither reserved nor of the cluster (256 to {MAX_CLUSTER_ID})",
        )
    host_ip = value.host_ip
    if host_ip:
        try:
            host_ip = str(ipaddress.ip_address(host_ip))
        except ValueError:
            raise refuse(f"{path}.host_ip", f"{_shown(host_ip)} is not an address") from None
    return IpEntry(
        prefix=prefix(value.prefix, f"{path}.prefix"),
        identity=value.identity,
        node=announcing,
        host_ip=host_ip,
        namespace=_namespace(value.namespace, f"{path}.namespace"),
        workload=_text(value.workload, f"{path}.workload", MAX_WORKLOAD),
    )


def prefix(value: str, path: str) -> str:
    """In its one normal form; a bare address is a whole-length prefix."""
    if not value:
        raise refuse(path, "a prefix is required")
    try:
        network = ipaddress.ip_network(value)
    except ValueError as error:
        raise refuse(path, f"{_shown(value)} is not a prefix: {error}") from None
    if "%" in value:
        raise refuse(path, f"{_shown(value)} has a zone, which means nothing on another node")
    return str(network)


def announcement(request: pb.AnnounceRequest) -> tuple[str, list[IpEntry], list[str]]:
    name = node(request.node)
    if len(request.put) + len(request.withdraw) > MAX_ANNOUNCED:
        raise refuse("put", f"more than {MAX_ANNOUNCED} entries in one request")
    entries = _each(request.put, lambda value, index: ip_entry(value, f"put[{index}]", name))
    gone = _each(request.withdraw, lambda value, index: prefix(value, f"withdraw[{index}]"))
    seen: set[str] = set()
    for index, entry in enumerate(entries):
        if entry.prefix in seen:
            raise refuse(f"put[{index}].prefix", f"{entry.prefix} is given twice")
        seen.add(entry.prefix)
    for index, text in enumerate(gone):
        if text in seen:
            raise refuse(f"withdraw[{index}]", f"{text} is both put and withdrawn")
    return name, entries, gone


def policies(values: Sequence[pb.Policy]) -> list[Policy]:
    """All of them, or every fault of all of them."""
    if not values:
        raise refuse("policies", "at least one policy is required")
    if len(values) > MAX_POLICIES:
        first = values[MAX_POLICIES]
        raise refuse(
            "",
            f"is one too many: {len(values)} documents at once are more than the {MAX_POLICIES} "
            "that are stored together; apply them in several parts",
            document=_title(first),
        )
    found = _each(values, _policy)
    seen: set[PolicyName] = set()
    for policy in found:
        if policy.name in seen:
            raise refuse("metadata.name", "is given twice", document=str(policy.name))
        seen.add(policy.name)
    sizes = [len(policy.encode()) for policy in found]
    if sum(sizes) > MAX_TOGETHER_BYTES:
        largest = found[sizes.index(max(sizes))]
        raise refuse(
            "",
            f"is the largest ({max(sizes)} bytes) of {len(found)} documents that have {sum(sizes)} "
            f"bytes as stored, {MAX_TOGETHER_BYTES} are stored together; apply them in several "
            "parts",
            document=str(largest.name),
        )
    return found


def policy_names(values: Sequence[pb.PolicyName]) -> list[PolicyName]:
    if not values:
        raise refuse("names", "at least one name is required, or all")
    if len(values) > MAX_POLICIES:
        raise refuse(
            "names",
            f"{len(values)} policies at once are more than the {MAX_POLICIES} that are deleted "
            "together; delete them in several parts, or all",
        )
    found = _each(
        values,
        lambda value, index: _policy_name(
            value.kind, value.namespace, value.name, f"names[{index}]"
        ),
    )
    return list(dict.fromkeys(found))


def kinds(values: Sequence[int]) -> frozenset[Kind]:
    """None asked for means all."""
    if len(values) > 16:
        raise refuse("kinds", "more kinds than there are")
    for index, value in enumerate(values):
        if value not in _KINDS:
            raise refuse(f"kinds[{index}]", f"{value} is not a kind that can be watched")
    return frozenset(_KINDS[value] for value in values) or frozenset(Kind)


def resume_revision(value: int) -> int:
    if value < 0:
        raise refuse("resume_revision", f"{value} is negative")
    return value


def _policy(value: pb.Policy, index: int) -> Policy:
    path = f"policies[{index}]"
    name = _policy_name(value.kind, value.namespace, value.name, path)
    title = str(name)
    if len(value.document) > MAX_DOCUMENT_BYTES:
        raise refuse(
            "",
            f"the document is {len(value.document)} bytes long, "
            f"{MAX_DOCUMENT_BYTES} are allowed: spread its rules over several documents",
            document=title,
        )
    if len(value.rule_origins) > MAX_RULE_ORIGINS:
        raise refuse(
            "",
            f"{len(value.rule_origins)} rules and entries of it have a place, {MAX_RULE_ORIGINS} "
            "are allowed: spread its rules over several documents",
            document=title,
        )
    try:
        document = json.loads(value.document)
        too_deep = _depth_exceeds(document, MAX_JSON_DEPTH)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise refuse("", f"the document is not JSON: {reason}", document=title) from None
    if too_deep:
        deep = f"the document is nested deeper than {MAX_JSON_DEPTH}"
        raise refuse("", deep, document=title)
    if not isinstance(document, dict | list):
        raise refuse("", "the document is neither an object nor a list", document=title)
    try:
        value.document.decode()
    except UnicodeDecodeError:
        raise refuse("", "the document is not UTF-8", document=title) from None
    return Policy(
        name=name,
        document=value.document,
        origin=_origin(value.origin, f"{path}.origin"),
        rule_origins=tuple(
            (
                _text(origin.path, f"{path}.rule_origins[{number}].path", MAX_PATH),
                _origin(origin.origin, f"{path}.rule_origins[{number}].origin"),
            )
            for number, origin in enumerate(value.rule_origins)
        ),
    )


def _title(value: pb.Policy) -> str:
    name = PolicyName(kind=value.kind, namespace=value.namespace, name=value.name)
    return _shown_title(str(name))


def _shown_title(text: str) -> str:
    return text if len(text) <= 300 and text.isprintable() else _shown(text)


def _policy_name(kind: str, namespace: str, name: str, path: str) -> PolicyName:
    if kind not in POLICY_KINDS:
        raise refuse(f"{path}.kind", f"{_shown(kind)} is not one of {', '.join(POLICY_KINDS)}")
    if kind in _NAMESPACED and not namespace:
        raise refuse(f"{path}.namespace", f"a {kind} has a namespace")
    if kind == "CiliumClusterwideNetworkPolicy" and namespace:
        raise refuse(f"{path}.namespace", f"a {kind} has no namespace")
    if not name:
        raise refuse(f"{path}.name", "a name is required")
    return PolicyName(
        kind=kind,
        namespace=_namespace(namespace, f"{path}.namespace"),
        name=_text(name, f"{path}.name", MAX_NAME),
    )


def _namespace(value: str, path: str) -> str:
    if value and (len(value) > MAX_NAMESPACE or not _NAMESPACE_RE.match(value)):
        raise refuse(
            path,
            f"{_shown(value)} is not a namespace: lower case letters, digits and '-', at most "
            f"{MAX_NAMESPACE}",
        )
    return value


def _text(value: str, path: str, limit: int) -> str:
    if len(value) > limit:
        raise refuse(path, f"longer than {limit} characters")
    if not value.isprintable():
        raise refuse(path, "contains a character that cannot be printed")
    return value


def _origin(value: common_pb2.Origin, path: str) -> Origin:
    return Origin(
        source=_text(value.source, f"{path}.source", MAX_SOURCE),
        line=value.line,
        column=value.column,
    )


def _depth_exceeds(value: object, limit: int) -> bool:
    level: list[object] = [value]
    for _ in range(limit):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return False
    return True


def _each(values: Iterable[T], check: Callable[[T, int], U]) -> list[U]:
    found: list[U] = []
    faults: list[Fault] = []
    for index, value in enumerate(values):
        try:
            found.append(check(value, index))
        except InvalidRequestField as error:
            faults += [fault for fault in error.faults if isinstance(fault, Fault)]
    if faults:
        raise InvalidRequestField(faults)
    return found


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


# What goes out


def identity_to_proto(identity: Identity) -> common_pb2.Identity:
    return to_proto_identity(identity.id, identity.labels)


def ip_to_proto(entry: IpEntry) -> pb.IpEntry:
    return pb.IpEntry(
        prefix=entry.prefix,
        identity=entry.identity,
        node=entry.node,
        host_ip=entry.host_ip,
        namespace=entry.namespace,
        workload=entry.workload,
    )


def policy_to_proto(policy: Policy, revision: int) -> pb.Policy:
    return pb.Policy(
        kind=policy.name.kind,
        namespace=policy.name.namespace,
        name=policy.name.name,
        document=policy.document,
        origin=_origin_to_proto(policy.origin),
        rule_origins=[
            pb.RuleOrigin(path=path, origin=_origin_to_proto(origin))
            for path, origin in policy.rule_origins
        ],
        revision=revision,
    )


def outcome_to_proto(outcome: Outcome) -> pb.Outcome:
    return pb.Outcome(
        kind=outcome.name.kind,
        namespace=outcome.name.namespace,
        name=outcome.name.name,
        change=_CHANGES[outcome.change],
    )


def session_to_proto(session: SessionInfo) -> pb.SessionStatus:
    return pb.SessionStatus(
        node=session.node,
        lease_id=session.lease,
        lease_ttl_s=session.ttl_s,
        lease_remaining_s=int(session.remaining_s),
        connected=session.connected,
    )


def status_to_proto(report: StatusReport) -> pb.StatusResponse:
    store = report.store
    return pb.StatusResponse(
        backend=store.backend,
        store_id=store.store_id,
        revision=store.revision,
        compacted=store.compacted,
        keys=store.keys,
        size_bytes=store.size_bytes,
        sessions=[session_to_proto(session) for session in report.sessions],
        message=store.message,
        identities=report.identities,
        quarantined=report.quarantined,
    )


def event_to_proto(change: ViewChange) -> pb.Event:
    """A deletion carries only the names, which are all in the key."""
    kv = change.kv
    kind: pb.Event.Type.ValueType = pb.Event.DELETE if kv.deleted else pb.Event.PUT
    match change.kind:
        case Kind.IDENTITY:
            number = identity_of(kv.key)
            known = () if kv.deleted else labels_to_proto(Labels.from_canonical(kv.value))
            return pb.Event(
                type=kind,
                kind=pb.KIND_IDENTITY,
                identity=common_pb2.Identity(id=number, labels=known),
            )
        case Kind.IP:
            text = ip_prefix_of(kv.key)
            entry = (
                pb.IpEntry(prefix=text)
                if kv.deleted
                else ip_to_proto(IpEntry.from_json(text, kv.value))
            )
            return pb.Event(type=kind, kind=pb.KIND_IP, ip=entry)
        case Kind.POLICY:
            name = name_of(kv.key)
            policy = (
                pb.Policy(kind=name.kind, namespace=name.namespace, name=name.name)
                if kv.deleted
                else policy_to_proto(Policy.decode(name, kv.value), kv.mod_revision)
            )
            return pb.Event(type=kind, kind=pb.KIND_POLICY, policy=policy)
        case _:
            assert_never(change.kind)


def reserved_events() -> list[pb.Event]:
    return [
        pb.Event(
            type=pb.Event.PUT,
            kind=pb.KIND_IDENTITY,
            identity=identity_to_proto(Identity(number, reserved_labels(number))),
        )
        for number in RESERVED
    ]


def message_to_proto(message: Message, store_id: int) -> pb.WatchResponse:
    response = pb.WatchResponse(store_id=store_id, revision=message.revision)
    match message:
        case BatchMessage():
            events = reserved_events() if message.reserved else []
            events += [event_to_proto(change) for change in message.changes]
            response.batch.CopyFrom(pb.Batch(events=events, more=message.more))
        case SyncedMessage():
            response.synced.SetInParent()
        case BookmarkMessage():
            response.bookmark.SetInParent()
        case ResetMessage():
            response.reset.reason = message.reason
        case _:
            assert_never(message)
    return response


def _origin_to_proto(origin: Origin) -> common_pb2.Origin:
    return common_pb2.Origin(source=origin.source, line=origin.line, column=origin.column)
