"""A second opinion about policy: slow, plain, and written without looking at the engine.

It reads documents as mappings (what JSON gives), walks every rule of every document for every
question, and keeps nothing. It knows no rows: only what rules say of one packet. It shares no code
with cilia.policy; where both are wrong alike, both were misread from the language's description.
Labels are strings, `source:key=value`.
"""

from __future__ import annotations

import ipaddress
import json
from typing import Any

NAMESPACE = "io.kubernetes.pod.namespace"
CLUSTER = "io.cilium.k8s.policy.cluster"
NUMBERS = {"TCP": 6, "UDP": 17, "SCTP": 132}
Doc = dict[str, Any]


def split(label: str) -> tuple[str, str, str]:
    name, _, value = label.partition("=")
    source, _, key = name.partition(":")
    return source, key, value


def value_of(labels: list[str], wanted: str) -> str | None:
    """The value of a label asked for as `key` or `source:key`; None when there is none."""
    source, colon, key = wanted.partition(":")
    if not colon:
        source, key = "any", wanted
    for label in labels:
        s, k, v = split(label)
        if k == key and source in ("any", s):
            return v
    return None


def selects(selector: Doc, labels: list[str]) -> bool:
    for key, value in (selector.get("matchLabels") or {}).items():
        if value_of(labels, key) != value:
            return False
    for e in selector.get("matchExpressions") or []:
        found = value_of(labels, e["key"])
        if e["operator"] == "In" and found not in e["values"]:
            return False
        if e["operator"] == "NotIn" and found is not None and found in e["values"]:
            return False
        if e["operator"] == "Exists" and found is None:
            return False
        if e["operator"] == "DoesNotExist" and found is not None:
            return False
    return True


def keys_of(selector: Doc) -> list[str]:
    return [*(selector.get("matchLabels") or {})] + [
        e["key"] for e in selector.get("matchExpressions") or []
    ]


def about(doc: Doc, rule: Doc, subject: list[str]) -> bool:
    if ("nodeSelector" in rule) != ("reserved:host" in subject):
        return False
    if "nodeSelector" in rule:
        return selects(rule["nodeSelector"], subject)
    selector = rule["endpointSelector"]
    if doc["kind"] != "CiliumNetworkPolicy" or "reserved:init" in keys_of(selector):
        return selects(selector, subject)
    spaces = (NAMESPACE, f"k8s:{NAMESPACE}", f"any:{NAMESPACE}")
    stripped = {
        "matchLabels": {
            k: v for k, v in (selector.get("matchLabels") or {}).items() if k not in spaces
        },
        "matchExpressions": [
            e for e in selector.get("matchExpressions") or [] if e["key"] not in spaces
        ],
    }
    own = value_of(subject, f"k8s:{NAMESPACE}") == doc["metadata"].get("namespace", "default")
    return own and selects(stripped, subject)


def peer_selected(doc: Doc, rule: Doc, selector: Doc, peer: list[str], requiring: bool) -> bool:
    """A peer selector of fromEndpoints (or of fromRequires), as its document's kind scopes it."""
    if not selects(selector, peer):
        return False
    if doc["kind"] == "Rules":
        return True
    keys = keys_of(selector)
    if not requiring and any(k.startswith("reserved:") for k in keys):
        return True
    namespaced = doc["kind"] == "CiliumNetworkPolicy"
    if namespaced and "reserved:init" in keys_of(rule.get("endpointSelector", {})):
        return True
    space = value_of(peer, f"k8s:{NAMESPACE}")
    bare = [k.removeprefix("k8s:").removeprefix("any:") for k in keys]
    asked = any(k == NAMESPACE or k.startswith("io.cilium.k8s.namespace.labels.") for k in bare)
    if asked or not namespaced:
        return space is not None
    return bool(space == doc["metadata"].get("namespace", "default"))


def address_of(peer: list[str]) -> Any:
    """The prefix a peer from outside the cluster stands for."""
    for label in peer:
        if label.startswith("cidr:"):
            return ipaddress.ip_network(label[5:])
    if "reserved:world-ipv4" in peer:
        return ipaddress.ip_network("0.0.0.0/0")
    if "reserved:world-ipv6" in peer:
        return ipaddress.ip_network("::/0")
    return None


def inside(peer: list[str], prefix: str) -> bool:
    mine, other = address_of(peer), ipaddress.ip_network(prefix, strict=False)
    return mine is not None and mine.version == other.version and mine.subnet_of(other)


def entity(name: str, peer: list[str], cluster: str) -> bool:
    if name == "all":
        return True
    if name == "cluster":
        home = value_of(peer, f"k8s:{CLUSTER}")
        managed = value_of(peer, f"k8s:{NAMESPACE}") is not None
        inner = ("host", "remote-node", "init", "unmanaged", "health", "ingress", "kube-apiserver")
        return (
            any(f"reserved:{x}" in peer for x in inner)
            or home == cluster
            or (managed and home is None)
        )
    return f"reserved:{name}" in peer


class Question:
    """One side of one connection, and what the rules are read with."""

    def __init__(
        self,
        subject: list[str],
        peer: list[str],
        egress: bool,
        proto: int,
        port: int,
        *,
        mode: str = "default",
        allow_localhost: bool = True,
        cluster: str = "default",
        parsers: frozenset[str] = frozenset(),  # that somebody enforces
        names: dict[str, tuple[int, int]] | None = None,  # the destination's ports: (port, proto)
        answers: dict[str, list[str]] | None = None,  # of DNS: prefixes by name
    ) -> None:
        self.subject, self.peer, self.egress = subject, peer, egress
        self.proto, self.port = proto, port
        self.mode, self.allow_localhost, self.cluster = mode, allow_localhost, cluster
        self.parsers, self.names, self.answers = parsers, names or {}, answers or {}


class Answer:
    """Allowed or not; whether that is only so because some policies audit; and what the proxy is to
    let pass: None where there is no proxy, else rules as sorted JSON, "*" for everything."""

    def __init__(self, allowed: bool, audit: bool = False, l7: frozenset[str] | None = None):
        self.allowed, self.audit, self.l7 = allowed, audit, l7


def peers_ok(doc: Doc, rule: Doc, element: Doc, q: Question, needs: list[Any]) -> bool | None:
    """Whether the element's peers include this one; None when it names no peers."""
    side, peer = "to" if q.egress else "from", q.peer
    if (found := element.get(f"{side}Endpoints")) is not None:
        return any(
            peer_selected(doc, rule, s, peer, requiring=False)
            and all(peer_selected(d, r, n, peer, requiring=True) for d, r, n in needs)
            for s in found
        )
    if (found := element.get(f"{side}CIDR")) is not None:
        return any(inside(peer, prefix) for prefix in found)
    if (found := element.get(f"{side}CIDRSet")) is not None:
        return any(
            inside(peer, x["cidr"]) and not any(inside(peer, e) for e in x.get("except") or [])
            for x in found
        )
    if (found := element.get(f"{side}Entities")) is not None:
        return any(entity(name, peer, q.cluster) for name in found)
    if (found := element.get("toFQDNs")) is not None:
        return any(
            inside(peer, prefix) for x in found for prefix in q.answers.get(x["matchName"], [])
        )
    if any(element.get(k) is not None for k in ("toServices", f"{side}Groups")):
        return False
    return None


def port_fits(p: Doc, q: Question) -> bool:
    word = p.get("protocol", "ANY").upper()
    if NUMBERS.get(word, q.proto) != q.proto or q.proto not in NUMBERS.values():
        return False
    if not p["port"].isdigit():
        return q.names.get(p["port"]) == (q.port, q.proto)
    first = int(p["port"])
    return first == 0 or first <= q.port <= (p.get("endPort") or first)


def ports_ok(element: Doc, q: Question) -> list[Any] | None:
    """What the element says of this port: an item for each port rule that includes it, None or its
    L7 rules. None when it names no ports."""
    if element.get("toPorts"):
        found: list[Any] = []
        for port_rule in element["toPorts"]:
            l7 = port_rule.get("rules")
            if l7 and not q.parsers.issuperset(l7):
                continue  # nobody enforces it
            if any(port_fits(p, q) for p in port_rule.get("ports") or []):
                found.append(l7 or None)
        return found
    if element.get("icmps"):
        for fields in element["icmps"]:
            for f in fields.get("fields") or []:
                number = 58 if f.get("family") == "IPv6" else 1
                if number == q.proto and int(f["type"]) == q.port:
                    return [None]
        return []
    return None


def hits(mine: list[tuple[Doc, Doc]], name: str, q: Question) -> list[tuple[Doc, Any]]:
    """(document, L7 rules or None) of all that rules under this name say of the connection."""
    side = "to" if q.egress else "from"
    needs = [
        (doc, rule, need)
        for doc, rule in mine
        for element in rule.get(name) or []
        for need in element.get(f"{side}Requires") or []
    ]
    found: list[tuple[Doc, Any]] = []
    for doc, rule in mine:
        for element in rule.get(name) or []:
            if (element.get("authentication") or {}).get("mode", "disabled") != "disabled":
                continue
            who = peers_ok(doc, rule, element, q, needs)
            what = ports_ok(element, q)
            if who is None and (what is None or element.get(f"{side}Requires") is not None):
                continue
            if who is not False:
                found += [(doc, l7) for l7 in ([None] if what is None else what)]
    return found


def audits(doc: Doc) -> bool:
    return bool((doc["metadata"].get("annotations") or {}).get("cilia.io/audit") == "true")


def answer(documents: list[Doc], q: Question) -> Answer:
    """The verdict on the subject's side of one connection."""
    if q.mode == "never":
        return Answer(True)
    node = "reserved:host" in q.subject
    mine = []
    for doc in documents:
        rules = list(doc.get("rules") or [])
        if doc.get("spec"):
            rules.append(doc["spec"])
        rules += doc.get("specs") or []
        mine += [(doc, rule) for rule in rules if about(doc, rule, q.subject)]
    direction = "egress" if q.egress else "ingress"

    denials = hits(mine, f"{direction}Deny", q)
    if any(not audits(doc) for doc, _ in denials):
        return Answer(False)
    isolated = not node and (q.mode == "always" or "reserved:init" in q.subject)
    would_isolate = False
    for doc, rule in mine:
        wanted = (rule.get("enableDefaultDeny") or {}).get(direction)
        if wanted is not False and (rule.get(direction) or rule.get(f"{direction}Deny")):
            isolated = isolated or not audits(doc)
            would_isolate = True
    allowing = hits(mine, direction, q)
    if (
        not q.egress
        and not node
        and q.allow_localhost
        and "reserved:host" in q.peer
        and (isolated or would_isolate)
    ):
        allowing.append(({}, None))
    if isolated and not allowing:
        return Answer(False)
    l7 = None
    if any(rules is not None for _, rules in allowing):
        l7 = frozenset(
            "*" if rules is None else json.dumps(rule, sort_keys=True)
            for _, rules in allowing
            for rule in (next(iter(rules.values())) if rules else [None])
        )
    reported = bool(denials) or (not allowing and would_isolate)
    return Answer(True, reported, l7)


def allowed(
    documents: list[Doc],
    subject: list[str],
    peer: list[str],
    *,
    egress: bool,
    proto: int,
    port: int,
    mode: str = "default",
    allow_localhost: bool = True,
    cluster: str = "default",
) -> bool:
    """Whether the subject's side of one connection allows it, where nobody enforces L7."""
    q = Question(
        subject, peer, egress, proto, port, mode=mode, allow_localhost=allow_localhost,
        cluster=cluster,
    )  # fmt: skip
    return answer(documents, q).allowed
