"""Rules that nearly allow a connection, and what they lack."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from cilia.policy.api import (
    CidrSelector,
    Element,
    EndpointSelector,
    EntitySelector,
    HTTPRule,
    NamedPort,
    PeerSelector,
    PortRule,
    Requirement,
    RuleRef,
)
from cilia.policy.questions.judge import End, Question
from cilia.policy.questions.requests import PARSERS, HTTPRequest, any_passes, http_mismatches
from cilia.policy.questions.scene import PlacedRule, Scene

ConditionName = Literal["subject", "peers", "requires", "ports", "request", "enforcer"]


@dataclass(frozen=True, slots=True)
class Failure:
    """One condition of a rule that the connection does not meet, in words."""

    condition: ConditionName
    text: str
    distance: int


@dataclass(frozen=True, slots=True)
class Miss:
    """A rule that allows something else. `distance` 1: one small condition away."""

    rule: RuleRef
    placed: PlacedRule
    element: Element
    failures: tuple[Failure, ...]

    @property
    def distance(self) -> int:
        return sum(x.distance for x in self.failures)

    @property
    def failed(self) -> frozenset[str]:
        return frozenset(x.condition for x in self.failures)


def near_misses(scene: Scene, question: Question, egress: bool) -> list[Miss]:
    """Every rule that might have allowed the connection at one end, the nearest first."""
    subject, peer = question.src, question.dst
    if not egress:
        subject, peer = peer, subject
    required = [
        requirement
        for _, element in requiring(scene, subject, egress)
        for selector in element.requires or ()
        for requirement in selector.requirements
    ]
    found: list[Miss] = []
    ids = scene.engine.repository.ids
    for placed in scene.rules:
        failures: list[Failure] = []
        if not scene.judges(placed, subject.party):
            failures.append(_subject(placed, subject))
        for element in placed.rule.elements:
            if element.egress != egress or element.deny:
                continue
            own = [*failures, *_failures(scene, question, element, peer, required, egress)]
            ref = ids.ref(ids.number(placed.document.key, element.path))
            found.append(Miss(ref, placed, element, tuple(own)))
    found.sort(key=lambda x: (x.distance, str(x.rule.origin), x.rule.path))
    return found


def requiring(scene: Scene, subject: End, egress: bool) -> list[tuple[PlacedRule, Element]]:
    """The elements whose requirements every peer of the subject must meet."""
    return [
        (placed, element)
        for placed in scene.rules
        if scene.judges(placed, subject.party)
        for element in placed.rule.elements
        if element.egress == egress and not element.deny and element.requires
    ]


def unmet(scene: Scene, subject: End, peer: End, egress: bool) -> list[tuple[PlacedRule, Element]]:
    """Those of them whose requirements the peer does not meet."""
    labels = peer.party.labels
    return [
        (placed, element)
        for placed, element in requiring(scene, subject, egress)
        if not all(x.matches(labels) for x in element.requires or ())
    ]


def denying(scene: Scene, question: Question, egress: bool) -> Iterator[tuple[PlacedRule, Element]]:
    """The deny entries that are about the connection, whichever of them the kernel meets first."""
    subject, peer = question.src, question.dst
    if not egress:
        subject, peer = peer, subject
    for placed in scene.rules:
        if placed.document.audit or not scene.judges(placed, subject.party):
            continue
        for element in placed.rule.elements:
            if not element.deny or element.egress != egress or element.unenforced:
                continue
            if element.peers is None and (element.ports is None or element.requires is not None):
                continue
            peers = element.peers
            if peers is not None and not any(_one_peer(scene, x, peer) is None for x in peers):
                continue
            needs = [x for selector in element.requires or () for x in selector.requirements]
            by_labels = any(isinstance(x, EndpointSelector) for x in peers or ())
            if by_labels and not all(x.matches(peer.party.labels) for x in needs):
                continue
            if element.ports is None or any(covers(x, question) for x in element.ports):
                yield placed, element


def _subject(placed: PlacedRule, subject: End) -> Failure:
    rule = placed.rule
    lacking = [x for x in rule.selector.requirements if not x.matches(subject.party.labels)]
    if not lacking:
        return Failure("subject", "is about nodes" if rule.node else "is about endpoints", 9)
    text = f"is about other endpoints: {subject.name} is not {_requirements(lacking)}"
    return Failure("subject", text, 2 + len(lacking))


def _failures(
    scene: Scene,
    question: Question,
    element: Element,
    peer: End,
    required: list[Requirement],
    egress: bool,
) -> Iterator[Failure]:
    if element.unenforced:
        yield Failure("enforcer", element.unenforced, 5)
    if (failure := _peers(scene, element, peer)) is not None:
        yield failure
    elif element.peers is not None and any(isinstance(x, EndpointSelector) for x in element.peers):
        lacking = [x for x in required if not x.matches(peer.party.labels)]
        if lacking:
            side = "toRequires" if egress else "fromRequires"
            text = f"{side} asks that {peer.name} is {_requirements(lacking)}"
            yield Failure("requires", text, 1 + len(lacking))
    yield from _ports(question, element)


def _peers(scene: Scene, element: Element, peer: End) -> Failure | None:
    """Why the peer is none of the element's; None when it is one."""
    if element.peers is None:
        if element.ports is None:
            return Failure("peers", "names neither peers nor ports, so it allows nothing", 3)
        return None
    if not element.peers:
        return Failure("peers", "its list of peers is empty: nobody", 2)
    reasons = [_one_peer(scene, x, peer) for x in element.peers]
    if None in reasons:
        return None
    nearest = min((x for x in reasons if x is not None), key=lambda x: x[0])
    more = len(reasons) - 1
    others = f", nor any of {more} other peers" if more else ""
    return Failure("peers", f"{peer.name} is not {nearest[1]}{others}", nearest[0])


def _one_peer(scene: Scene, selector: PeerSelector, peer: End) -> tuple[int, str] | None:
    labels = peer.party.labels
    match selector:
        case EndpointSelector(requirements):
            lacking = [x for x in requirements if not x.matches(labels)]
            return (len(lacking), _requirements(lacking)) if lacking else None
        case CidrSelector():
            if selector.matches(labels):
                return None
            if peer.party.kind != "prefix":
                return 3, f"outside: {selector} selects no endpoints and no nodes"
            return 2, f"in {selector}"
        case EntitySelector(entity):
            expanded = selector.expand(scene.engine.cluster_name)
            return None if any(x.matches(labels) for x in expanded) else (2, f"of entity {entity}")
        case _:
            return 4, f"known to be {selector}"


def _requirements(lacking: list[Requirement]) -> str:
    return " and ".join(map(str, lacking))


def _ports(question: Question, element: Element) -> Iterator[Failure]:
    if element.ports is None:
        return
    covering = [x for x in element.ports if covers(x, question)]
    if not covering:
        allowed = [str(x) for rule in element.ports for x in (*rule.l4, *rule.named)]
        shown = ", ".join(allowed[:5]) + (", ..." if len(allowed) > 5 else "")
        asked = question.what.partition(" with ")[0]
        yield Failure("ports", f"is about {shown or 'no ports'}, not {asked}", 1)
        return
    request = question.request
    if request is None or any(x.l7 is None for x in covering):
        return
    texts = []
    for rule in covering:
        assert rule.l7 is not None
        if rule.l7.parser == PARSERS[type(request)] and any_passes(rule.l7.rules, request):
            return
        texts += [
            ", ".join(http_mismatches(x, request))
            for x in rule.l7.rules
            if isinstance(x, HTTPRule) and isinstance(request, HTTPRequest)
        ]
        if rule.l7.parser != PARSERS[type(request)]:
            texts.append(f"it lets pass {rule.l7.parser} only")
    nearest = min(texts, key=lambda x: (x.count(","), len(x)), default="no request is let pass")
    yield Failure("request", f"does not let {request} pass: {nearest}", 1)


def covers(rule: PortRule, question: Question) -> bool:
    """Whether a port rule is about the port asked for; port 0 asks for every port."""
    for l4 in rule.l4:
        if l4.proto == question.proto and (
            l4.contains(question.proto, question.port)
            if question.port
            else (l4.first == 0 and l4.last >= 255)
        ):
            return True
        if l4.proto == question.proto and l4.first == l4.last == question.port:
            return True
    return any(_named(x, question) for x in rule.named)


def _named(port: NamedPort, question: Question) -> bool:
    return any(
        x.name == port.name
        and x.port == question.port
        and x.proto == question.proto
        and port.proto in (0, x.proto)
        for x in question.dst.party.ports
    )
