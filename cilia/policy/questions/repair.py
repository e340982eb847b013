"""The smallest edit that would allow a denied connection.

Candidates are made from the rules that nearly allow it and from those that deny it. Each is applied
to the text, read again and judged by the engine; only one that is found to allow the connection is
proposed, and of those the one that allows the least beside it, then the one of the fewest lines.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from cilia.labels import (
    CLUSTER_KEY,
    NAMESPACE_KEY,
    NAMESPACE_LABELS_PREFIX,
    SOURCE_K8S,
    Label,
)
from cilia.policy.api import (
    MAX_PORT,
    PROTO_ICMP,
    PROTO_ICMPV6,
    PROTO_NAMES,
    CidrSelector,
    Document,
    Element,
    EndpointSelector,
    Kind,
    Origin,
)
from cilia.policy.language import parse_documents
from cilia.policy.questions import ports
from cilia.policy.questions.inventory import Inventory
from cilia.policy.questions.judge import End, Judged, Question, ask, one_end
from cilia.policy.questions.misses import Miss, denying, near_misses, unmet
from cilia.policy.questions.requests import DNSRequest, HTTPRequest, KafkaRequest, Request
from cilia.policy.questions.scene import Party, PlacedRule, Scene
from cilia.policy.questions.yamledit import (
    Op,
    Path,
    block,
    edit,
    excerpt,
    parse_path,
)

MAX_STEPS: Final = 12
MAX_CANDIDATES: Final = 32
NEW: Final = "new document"
_ICMPS: Final = (PROTO_ICMP, PROTO_ICMPV6)


@dataclass(frozen=True, slots=True)
class Step:
    """One change of one document: where, and what is written there."""

    document: Document
    op: Op
    line: int
    new: bool = False

    @property
    def yaml(self) -> str:
        """What is added, as YAML; empty when something is removed."""
        if self.op.action == "remove":
            return ""
        value = self.op.value
        if self.op.action == "append":
            value = [value]
        elif isinstance(self.op.path[-1], str):
            value = {self.op.path[-1]: value}
        return "\n".join(block(value))


@dataclass(frozen=True, slots=True)
class Changed:
    """A text before and after."""

    source: str
    before: str
    after: str

    @property
    def patch(self) -> str:
        """As a unified diff."""
        return "".join(
            difflib.unified_diff(
                self.before.splitlines(keepends=True),
                self.after.splitlines(keepends=True),
                self.source if self.before else "/dev/null",
                self.source,
            )
        )


@dataclass(frozen=True, slots=True)
class Proposal:
    """Changes that together allow the connection."""

    steps: tuple[Step, ...]
    changed: tuple[Changed, ...]
    documents: tuple[Document, ...]  # all of them, as they would be
    edited: tuple[tuple[Document, str], ...]  # the changed ones, each with its own whole text
    also: tuple[str, ...]  # other connections that become possible


@dataclass(frozen=True, slots=True)
class _Candidate:
    document: Document | None  # None: a new one
    ops: tuple[Op, ...]
    new: str = ""


@dataclass(frozen=True, slots=True)
class _State:
    """The documents, with their texts, as some edits leave them."""

    documents: tuple[Document, ...]
    texts: Mapping[str, str]
    inventory: Inventory
    make: Callable[[tuple[Document, ...], Inventory], Scene]

    def scene(self) -> Scene:
        return self.make(self.documents, self.inventory)


def place(scene: Scene, end: End) -> End:
    """The same end in another scene."""
    party = end.party
    if party.kind == "endpoint":
        return replace(end, party=scene.guest(party.labels, party.ports, party.mode))
    if party.kind == "entity":
        known = scene.entity(party.entity)
        assert known is not None
        return replace(end, party=known)
    assert party.prefix is not None
    return replace(end, party=scene.region(end.address or party.prefix.network_address))


def propose(
    documents: Iterable[Document],
    texts: Mapping[str, str],
    inventory: Inventory,
    question: Question,
    *,
    make: Callable[[tuple[Document, ...], Inventory], Scene] = Scene,
) -> Proposal | None:
    """Find the edit. `texts` holds what documents were read from, by their source; a document whose
    text is not there is written anew from what is stored of it. `make` makes a scene, with the
    settings that verdicts depend on. None: no edit was found.
    """
    state = _State(tuple(documents), dict(texts), inventory, make)
    first = state
    steps: list[Step] = []
    also: dict[str, None] = {}
    for _ in range(MAX_STEPS):
        scene = state.scene()
        asked = _again(scene, question)
        denials = ask(scene, asked).denials
        if not denials:
            return _proposal(first, state, steps, also)
        best = _best(state, scene, asked, denials[0])
        if best is None:
            return None
        state, more, opened = best
        steps += more
        also.update(dict.fromkeys(opened))
    return None


def _again(scene: Scene, question: Question) -> Question:
    return replace(question, src=place(scene, question.src), dst=place(scene, question.dst))


def _proposal(
    first: _State, last: _State, steps: list[Step], also: Iterable[str]
) -> Proposal | None:
    if not steps:
        return None
    touched = dict.fromkeys(x.document.key for x in steps)
    by_key = {x.key: x for x in last.documents}
    before = {x.origin.source: first.texts.get(x.origin.source, "") for x in first.documents}
    sources = dict.fromkeys(by_key[key].origin.source for key in touched)
    return Proposal(
        steps=tuple(steps),
        changed=tuple(
            Changed(source, first.texts.get(source, before.get(source, "")), last.texts[source])
            for source in sources
        ),
        documents=last.documents,
        edited=tuple(
            (by_key[key], excerpt(last.texts[by_key[key].origin.source], by_key[key]))
            for key in touched
        ),
        also=tuple(also),
    )


# ---- trying


def _best(
    state: _State, scene: Scene, question: Question, judged: Judged
) -> tuple[_State, list[Step], tuple[str, ...]] | None:
    found = []
    seen = set()
    ailing = _ails(scene, question, judged)
    for candidate in _candidates(scene, question, judged):
        key = (candidate.document and candidate.document.key, repr(candidate.ops), candidate.new)
        if key in seen:
            continue
        seen.add(key)
        if len(seen) > MAX_CANDIDATES:
            break
        tried = _apply(state, candidate)
        if tried is None:
            continue
        after, steps, lines = tried
        stage = after.scene()
        asked = _again(stage, question)
        now = one_end(stage, asked, judged.egress)
        if not now.allowed and _ails(stage, asked, now) >= ailing:
            continue
        opened, extra = _opened(scene, stage, question, asked, judged.egress, candidate)
        found.append((not now.allowed, len(opened), extra, lines, after, steps, opened))
    if not found:
        return None
    *_, after, steps, opened = min(found, key=lambda x: x[:4])
    return after, steps, opened


def _ails(scene: Scene, question: Question, judged: Judged) -> tuple[int, int]:
    """How far from allowed: an edit that makes it less is a step, if none is enough by itself."""
    return (
        sum(1 for _ in denying(scene, question, judged.egress)),
        len(unmet(scene, judged.subject, judged.peer, judged.egress)),
    )


def _apply(state: _State, candidate: _Candidate) -> tuple[_State, list[Step], int] | None:
    if candidate.document is None:
        return _add(state, candidate.new)
    state, document = _with_text(state, candidate.document)
    source = document.origin.source
    text = state.texts[source]
    before = text
    steps = []
    parsed: tuple[Document, ...] | None = ()
    for op in candidate.ops:
        try:
            changed = edit(text, document, op)
        except (LookupError, TypeError):
            return None
        text = changed.text
        steps.append(Step(document, op, changed.line))
        parsed = _parse(text, source, document.namespace)
        if parsed is None:
            return None
        again = next((x for x in parsed if x.key == document.key), None)
        if again is None:
            return None
        document = again
    others = {x.key: x for x in parsed or ()}
    documents = tuple(others.get(x.key, x) for x in state.documents)
    lines = sum(1 for x in difflib.ndiff(before.splitlines(), text.splitlines()) if x[0] in "+-")
    return replace(state, documents=documents, texts={**state.texts, source: text}), steps, lines


def _parse(text: str, source: str, namespace: str | None) -> tuple[Document, ...] | None:
    result = parse_documents(text, source=source, default_namespace=namespace or "default")
    return None if result.faults else result.documents


def _with_text(state: _State, document: Document) -> tuple[_State, Document]:
    """The document with a text to edit; one that is only stored is written out first."""
    if document.origin.source in state.texts:
        return state, document
    body = json.loads(document.body)
    if document.kind == Kind.RULES and isinstance(body, list):
        body = {"kind": "Rules", "metadata": {"name": document.name}, "rules": body}
    source = f"{document.ref} (as stored)"
    text = "\n".join(block(body)) + "\n"
    parsed = _parse(text, source, document.namespace)
    assert parsed is not None
    written = parsed[0]
    documents = tuple(written if x.key == document.key else x for x in state.documents)
    return replace(state, documents=documents, texts={**state.texts, source: text}), written


def _add(state: _State, text: str) -> tuple[_State, list[Step], int] | None:
    names = (f"{NEW} {i}" for i in range(1, MAX_STEPS + 2))
    source = next(name for name in names if name not in state.texts)
    parsed = _parse(text, source, None)
    if parsed is None or any(x.key == parsed[0].key for x in state.documents):
        return None
    op = Op("set", ("spec",), json.loads(parsed[0].body)["spec"])
    texts = {**state.texts, source: text}
    after = replace(state, documents=(*state.documents, *parsed), texts=texts)
    return after, [Step(parsed[0], op, 1, new=True)], text.count("\n")


def _opened(
    before: Scene,
    after: Scene,
    old: Question,
    new: Question,
    egress: bool,
    candidate: _Candidate,
) -> tuple[tuple[str, ...], int]:
    """Other pairs that an edit lets talk (at this end), and how many other numbers the asked one
    may use."""
    subject = new.src if egress else new.dst
    peer = new.dst if egress else new.src
    key = candidate.document.key if candidate.document is not None else None
    rules = [x for x in after.rules if key is None or x.document.key == key]
    locals_ = [x for x in (*after.endpoints, *after.entities) if x.local]
    if subject.party not in locals_:
        locals_.append(subject.party)
    parties: list[Party] = [*after.endpoints, *after.entities, *after.regions]
    if peer.party not in parties:
        parties.append(peer.party)
    opened: list[str] = []
    extra = 0
    for mine in locals_:
        if not any(after.judges(x, mine) for x in rules):
            continue
        mine_before = _counterpart(before, mine, old)
        for theirs in parties:
            if mine is theirs and len(mine.members) < 2:
                continue  # nobody talks to itself
            one = before.side(mine_before, _counterpart(before, theirs, old), egress=egress)
            other = after.side(mine, theirs, egress=egress)
            if one == other:
                continue
            gained = [ports.less(b, a) for a, b in zip(one, other, strict=True)]
            count = sum(last - first + 1 for part in gained for first, last, _ in part)
            if not count:
                continue
            if mine is subject.party and theirs is peer.party:
                extra = count
            else:
                source, destination = (mine, theirs) if egress else (theirs, mine)
                opened.append(f"{_title(source)} to {_title(destination)}")
    return tuple(opened), extra


def _counterpart(scene: Scene, party: Party, question: Question) -> Party:
    for end in (question.src, question.dst):
        if end.party.kind == party.kind != "prefix" and end.party.labels == party.labels:
            return end.party
    return place(scene, End(party, "")).party


def _title(party: Party) -> str:
    if party.members:
        first = party.members[0].ref
        more = len(party.members) - 1
        return f"{first} and {more} like it" if more else first
    if party.prefix is not None:
        return str(party.prefix)
    return f"reserved:{party.entity}" if party.entity else str(party.labels)


# ---- candidates


def _candidates(scene: Scene, question: Question, judged: Judged) -> Iterator[_Candidate]:
    if judged.cause == "deny":
        yield from _against_denials(scene, question, judged)
        return
    misses = near_misses(scene, question, judged.egress)
    mine = [x for x in misses if "subject" not in x.failed]
    for miss in mine:
        yield from _at_miss(question, judged, miss)
    if judged.cause == "request":
        return
    name = "toRequires" if judged.egress else "fromRequires"
    for rule, element in unmet(scene, judged.subject, judged.peer, judged.egress):
        where = (*parse_path(element.path), name)
        yield _Candidate(rule.document, (Op("remove", where),))
    placed = {id(x.placed): x.placed for x in mine}
    isolating = {(ref.policy, ref.path.rpartition(".")[0]) for ref in judged.default_deny}
    rules = [x for x in scene.rules if scene.judges(x, judged.subject.party)]
    rules.sort(
        key=lambda x: (
            (x.document.ref, x.rule.path) not in isolating and id(x) not in placed,
            x.document.ref,
        )
    )
    for rule in rules[:6]:
        yield from _new_element(question, judged, rule)
    if not rules:
        yield from _new_document(question, judged)


def _at_miss(question: Question, judged: Judged, miss: Miss) -> Iterator[_Candidate]:
    document = miss.placed.document
    path = parse_path(miss.element.path)
    plain = _get(document, path)
    if not isinstance(plain, dict):
        return
    match sorted(miss.failed):
        case ["peers"]:
            if document.kind == Kind.NP:
                peer = _kubernetes_peer(judged.peer, document)
                side = "to" if judged.egress else "from"
                listing = path[:-1] if path and path[-2:-1] == (side,) else (*path, side)
                if peer is not None and isinstance(_get(document, listing), list):
                    yield _Candidate(document, (Op("append", listing, peer),))
                return
            for name, value in _peer_items(judged.peer, document, judged.egress):
                if plain.get(name):
                    yield _Candidate(document, (Op("append", (*path, name), value),))
        case ["ports"]:
            yield from _more_ports(question, document, path, plain)
        case ["request"]:
            yield from _more_requests(question, document, path, plain)
        case _:
            return


def _more_ports(
    question: Question, document: Document, path: Path, plain: dict[str, Any]
) -> Iterator[_Candidate]:
    if document.kind == Kind.NP:
        entry = path[:-2] if path[-2:-1] in (("from",), ("to",)) else path
        wanted = _kubernetes_ports(question)
        if wanted and isinstance(_get(document, (*entry, "ports")), list):
            yield _Candidate(document, (Op("append", (*entry, "ports"), wanted[0]),))
        return
    if question.proto in _ICMPS:
        if plain.get("icmps"):
            at = (*path, "icmps", 0, "fields")
            yield _Candidate(document, (Op("append", at, _icmp(question)),))
        return
    for i, rule in enumerate(plain.get("toPorts") or ()):
        if isinstance(rule, dict) and not rule.get("rules") and isinstance(rule.get("ports"), list):
            at = (*path, "toPorts", i, "ports")
            yield _Candidate(document, (Op("append", at, _port(question)),))
            return
    if plain.get("toPorts"):
        yield _Candidate(
            document, (Op("append", (*path, "toPorts"), {"ports": [_port(question)]}),)
        )


def _more_requests(
    question: Question, document: Document, path: Path, plain: dict[str, Any]
) -> Iterator[_Candidate]:
    assert question.request is not None
    name, value = _request_rule(question.request)
    for i, rule in enumerate(plain.get("toPorts") or ()):
        found = rule.get("rules") if isinstance(rule, dict) else None
        if isinstance(found, dict) and isinstance(found.get(name), list):
            at = (*path, "toPorts", i, "rules", name)
            yield _Candidate(document, (Op("append", at, value),))


def _new_element(question: Question, judged: Judged, placed: PlacedRule) -> Iterator[_Candidate]:
    document = placed.document
    base = parse_path(placed.rule.path)
    name = "egress" if judged.egress else "ingress"
    element = _element(question, judged, document)
    if element is None:
        return
    present = _get(document, (*base, name))
    if isinstance(present, list) and present:
        yield _Candidate(document, (Op("append", (*base, name), element),))
    else:
        yield _Candidate(document, (Op("set", (*base, name), [element]),))


def _new_document(question: Question, judged: Judged) -> Iterator[_Candidate]:
    """A policy of its own, where no rule is about the end that denies."""
    subject = judged.subject.party
    space = subject.labels.get(NAMESPACE_KEY)
    if subject.kind != "endpoint" or space is None:
        return
    direction = "egress" if judged.egress else "ingress"
    shell = Document(
        kind=Kind.CNP,
        namespace=space.value,
        name="",
        rules=(),
        body=b"{}",
        origin=Origin(NEW),
    )
    element = _element(question, judged, shell)
    if element is None:
        return
    word = re.sub(r"[^a-z0-9]+", "-", judged.subject.name.rpartition("/")[2].lower()).strip("-")
    body = {
        "apiVersion": "cilium.io/v2",
        "kind": str(Kind.CNP),
        "metadata": {"name": f"allow-{direction}-{word[:40] or 'endpoint'}".rstrip("-")},
        "spec": {"endpointSelector": _selector(judged.subject, shell), direction: [element]},
    }
    body["metadata"] = {**body["metadata"], "namespace": space.value}  # type: ignore[dict-item]  # a mapping
    yield _Candidate(None, (), "\n".join(block(body)) + "\n")


def _element(question: Question, judged: Judged, document: Document) -> dict[str, Any] | None:
    """An entry of ingress or egress that allows just what is asked for."""
    element: dict[str, Any] = {}
    if document.kind == Kind.NP:
        peer = _kubernetes_peer(judged.peer, document)
        listing = _kubernetes_ports(question)
        if peer is None or listing is None:
            return None
        element["to" if judged.egress else "from"] = [peer]
        if listing:
            element["ports"] = listing
        return element
    name, value = next(_peer_items(judged.peer, document, judged.egress))
    element[name] = [value]
    if question.proto in _ICMPS:
        element["icmps"] = [{"fields": [_icmp(question)]}]
    elif question.proto:
        element["toPorts"] = [{"ports": [_port(question)]}]
    return element


# ---- against deny rules


def _against_denials(scene: Scene, question: Question, judged: Judged) -> Iterator[_Candidate]:
    for placed, element in denying(scene, question, judged.egress):
        yield from _narrowed(question, judged, placed, element)


def _narrowed(
    question: Question, judged: Judged, placed: PlacedRule, element: Element
) -> Iterator[_Candidate]:
    document, path = placed.document, parse_path(element.path)
    plain = _get(document, path)
    if not isinstance(plain, dict):
        return
    side = "to" if judged.egress else "from"
    labels = judged.peer.party.labels
    network = judged.peer.address or judged.peer.party.prefix
    for i, selector in enumerate(element.peers or ()):
        match selector:
            case EndpointSelector() if selector.matches(labels):
                where = (*path, f"{side}Endpoints", i)
                item = _get(document, where)
                if not isinstance(item, dict):
                    continue
                for key, value in _own_labels(judged.peer):
                    spared = {"key": key, "operator": "NotIn", "values": [value]}
                    if isinstance(item.get("matchExpressions"), list):
                        op = Op("append", (*where, "matchExpressions"), spared)
                    else:
                        op = Op("set", (*where, "matchExpressions"), [spared])
                    yield _Candidate(document, (op,))
                if len(element.peers or ()) > 1:
                    yield _Candidate(document, (Op("remove", where),))
            case CidrSelector(prefix) if selector.matches(labels) and network is not None:
                hole = str(network) if "/" in str(network) else f"{network}/{prefix.max_prefixlen}"
                if isinstance(plain.get(f"{side}CIDRSet"), list):
                    at = (*path, f"{side}CIDRSet", i)
                    item = _get(document, at)
                    if isinstance(item, dict) and item.get("except"):
                        op = Op("append", (*at, "except"), hole)
                    else:
                        op = Op("set", (*at, "except"), [hole])
                    yield _Candidate(document, (op,))
                elif isinstance(plain.get(f"{side}CIDR"), list):
                    sets = [
                        {"cidr": str(x), **({"except": [hole]} if j == i else {})}
                        for j, x in enumerate(element.peers or ())
                    ]
                    yield _Candidate(
                        document,
                        (
                            Op("remove", (*path, f"{side}CIDR")),
                            Op("set", (*path, f"{side}CIDRSet"), sets),
                        ),
                    )
            case _:
                if len(element.peers or ()) > 1:
                    for name in (f"{side}Entities", f"{side}Endpoints"):
                        if isinstance(plain.get(name), list):
                            yield _Candidate(document, (Op("remove", (*path, name, i)),))
    yield from _without_port(question, document, path, plain)
    yield _Candidate(document, (Op("remove", path),))


def _without_port(
    question: Question, document: Document, path: Path, plain: dict[str, Any]
) -> Iterator[_Candidate]:
    """The denial without the one port: others stay denied."""
    if not question.port:
        return
    name = PROTO_NAMES.get(question.proto, "")
    for i, rule in enumerate(plain.get("toPorts") or ()):
        entries = rule.get("ports") if isinstance(rule, dict) else None
        if not isinstance(entries, list):
            continue
        for j, entry in enumerate(entries):
            at = (*path, "toPorts", i, "ports")
            text = str(entry.get("port", ""))
            if not text.isdigit():
                continue
            first = int(text)
            last = int(entry.get("endPort") or (first or MAX_PORT))
            said = str(entry.get("protocol", "ANY")).upper()
            if said not in (name, "ANY") or not first <= question.port <= last:
                continue
            kept = [
                {"port": str(low), **({"endPort": high} if high > low else {}), "protocol": said}
                for low, high in ((max(first, 1), question.port - 1), (question.port + 1, last))
                if low <= high
            ]
            if said == "ANY":
                kept += [
                    {"port": text, **({"endPort": last} if last > first > 0 else {}), "protocol": x}
                    for x in ("TCP", "UDP", "SCTP")
                    if x != name
                ]
            left = [x for k, x in enumerate(entries) if k != j] + kept
            if left:
                yield _Candidate(document, (Op("set", at, left),))


# ---- values


def _get(document: Document, path: Path) -> Any:
    """What a document holds at a path; None where it leads nowhere."""
    value = json.loads(document.body)
    try:
        for step in path:
            value = value[step]
    except (LookupError, TypeError):
        return None
    return value


def _own_labels(end: End) -> list[tuple[str, str]]:
    """The labels that tell an endpoint from others, not those of its place, as selectors name
    them."""
    return [
        (x.key if x.source == SOURCE_K8S else f"{x.source}:{x.key}", x.value)
        for x in end.party.labels
        if not _of_place(x)
    ]


def _of_place(label: Label) -> bool:
    return label.source == SOURCE_K8S and (
        label.key in (NAMESPACE_KEY, CLUSTER_KEY)
        or label.key.startswith((NAMESPACE_LABELS_PREFIX, "io.cilium.k8s.policy."))
    )


def _selector(end: End, document: Document) -> dict[str, Any]:
    """A selector of just the endpoints with these labels, as this document must say it."""
    labels = dict(_own_labels(end))
    space = end.party.labels.get(NAMESPACE_KEY)
    if space is not None and space.value != document.namespace:
        labels[f"{SOURCE_K8S}:{NAMESPACE_KEY}"] = space.value
    return {"matchLabels": labels} if labels else {}


def _peer_items(end: End, document: Document, egress: bool) -> Iterator[tuple[str, Any]]:
    """(field, item) that name a peer, the narrowest first."""
    side = "to" if egress else "from"
    match end.party.kind:
        case "endpoint":
            yield f"{side}Endpoints", _selector(end, document)
        case "entity":
            yield f"{side}Entities", end.party.entity
            yield f"{side}Endpoints", {"matchLabels": {f"reserved:{end.party.entity}": ""}}
        case "prefix":
            network = _network(end)
            yield f"{side}CIDR", network
            yield f"{side}CIDRSet", {"cidr": network}


def _network(end: End) -> str:
    if end.address is not None:
        return f"{end.address}/{end.address.max_prefixlen}"
    return str(end.party.prefix)


def _kubernetes_peer(end: End, document: Document) -> dict[str, Any] | None:
    """A peer as NetworkPolicy says it; None for what it cannot say."""
    match end.party.kind:
        case "endpoint":
            labels = _own_labels(end)
            space = end.party.labels.get(NAMESPACE_KEY)
            if space is None or any(":" in key for key, _ in labels):
                return None
            peer: dict[str, Any] = {"podSelector": {"matchLabels": dict(labels)} if labels else {}}
            if space.value != document.namespace:
                name = {"kubernetes.io/metadata.name": space.value}
                peer["namespaceSelector"] = {"matchLabels": name}
            return peer
        case "prefix":
            return {"ipBlock": {"cidr": _network(end)}}
        case _:
            return None


def _kubernetes_ports(question: Question) -> list[dict[str, Any]] | None:
    if question.proto == 0:
        return []
    if question.proto in _ICMPS:
        return None
    protocol = PROTO_NAMES[question.proto]
    if not question.port:
        return [{"protocol": protocol}]
    return [{"port": question.port, "protocol": protocol}]


def _port(question: Question) -> dict[str, Any]:
    return {"port": str(question.port), "protocol": PROTO_NAMES.get(question.proto, "ANY")}


def _icmp(question: Question) -> dict[str, Any]:
    family = "IPv4" if question.proto == PROTO_ICMP else "IPv6"
    return {"family": family, "type": question.port}


def _request_rule(request: Request) -> tuple[str, dict[str, Any]]:
    match request:
        case HTTPRequest(method, path):
            return "http", {"method": method, "path": _literal(path)}
        case DNSRequest(name):
            return "dns", {"matchName": name.lower().removesuffix(".")}
        case KafkaRequest(api_key, topic):
            return "kafka", {"apiKey": api_key, **({"topic": topic} if topic else {})}


def _literal(text: str) -> str:
    """A regular expression that matches the text only."""
    return re.sub(r"([.+*?()|\[\]{}^$\\])", r"\\\1", text)
