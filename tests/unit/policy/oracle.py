"""A second opinion about policy: slow, plain, and written without looking at the engine.

It reads documents as mappings (what JSON gives), walks every rule of every document for every
question, and keeps nothing. It shares no code with cilia.policy; where both are wrong alike, both
were misread from the language's description. Labels are strings, `source:key=value`.
"""

from __future__ import annotations

import ipaddress
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
    if namespaced and "reserved:init" in keys_of(rule["endpointSelector"]):
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


def peers_ok(
    doc: Doc, rule: Doc, element: Doc, egress: bool, peer: list[str], needs: list[Any], cluster: str
) -> bool | None:
    """Whether the element's peers include this one; None when it names no peers."""
    side = "to" if egress else "from"
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
        return any(entity(name, peer, cluster) for name in found)
    if any(element.get(k) is not None for k in ("toFQDNs", "toServices", f"{side}Groups")):
        return False
    return None


def ports_ok(element: Doc, proto: int, port: int) -> bool | None:
    """Whether the element's ports include this one; None when it names no ports."""
    if element.get("toPorts"):
        for port_rule in element["toPorts"]:
            if port_rule.get("rules"):
                continue  # nobody enforces L7 yet
            for p in port_rule.get("ports") or []:
                word = p.get("protocol", "ANY").upper()
                if NUMBERS.get(word, proto) != proto or proto not in NUMBERS.values():
                    continue
                if not p["port"].isdigit():
                    continue  # a named port
                first = int(p["port"])
                last = p.get("endPort") or first
                if first == 0 or first <= port <= last:
                    return True
        return False
    if element.get("icmps"):
        for fields in element["icmps"]:
            for f in fields.get("fields") or []:
                number = 58 if f.get("family") == "IPv6" else 1
                if number == proto and int(f["type"]) == port:
                    return True
        return False
    return None


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
    """The verdict on the subject's side of one connection."""
    if mode == "never":
        return True
    mine = []
    for doc in documents:
        rules = list(doc.get("rules") or [])
        if doc.get("spec"):
            rules.append(doc["spec"])
        rules += doc.get("specs") or []
        mine += [(doc, rule) for rule in rules if about(doc, rule, subject)]
    direction = "egress" if egress else "ingress"
    side = "to" if egress else "from"

    def hit(name: str) -> bool:
        needs = [
            (doc, rule, need)
            for doc, rule in mine
            for element in rule.get(name) or []
            for need in element.get(f"{side}Requires") or []
        ]
        for doc, rule in mine:
            for element in rule.get(name) or []:
                if (element.get("authentication") or {}).get("mode", "disabled") != "disabled":
                    continue
                who = peers_ok(doc, rule, element, egress, peer, needs, cluster)
                what = ports_ok(element, proto, port)
                if who is None and (what is None or element.get(f"{side}Requires") is not None):
                    continue
                if who is not False and what is not False:
                    return True
        return False

    if hit(f"{direction}Deny"):
        return False
    isolated = mode == "always" or "reserved:init" in subject
    for _, rule in mine:
        wanted = (rule.get("enableDefaultDeny") or {}).get(direction)
        if wanted is not False and (rule.get(direction) or rule.get(f"{direction}Deny")):
            isolated = True
    if not isolated:
        return True
    if not egress and allow_localhost and "reserved:host" in peer:
        return True
    return hit(direction)
