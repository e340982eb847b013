"""One connection, judged at both of its ends by the rows that the kernel would look up."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final, Literal

from cilia.policy.api import PROTO_ICMP, PROTO_ICMPV6, PROTO_NAMES, RuleRef
from cilia.policy.engine import describe
from cilia.policy.mapstate import Match
from cilia.policy.questions.conditions import condition_of
from cilia.policy.questions.requests import Request
from cilia.policy.questions.scene import Party, Scene

# unjudged  no policy judges this end          rule     a rule allows it
# open      nothing isolates the end           host     the local host may always
# default   isolated, and no rule allows it    deny     a rule denies it
# request   the connection is allowed, this request is not
Cause = Literal["unjudged", "open", "rule", "host", "default", "deny", "request"]
_TYPED: Final = (PROTO_ICMP, PROTO_ICMPV6)


@dataclass(frozen=True, slots=True)
class End:
    """One end of a connection: a party, what it is called, and where it is if that was said."""

    party: Party
    name: str
    address: IPv4Address | IPv6Address | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """May `src` reach `dst`? `port` is the destination's; of ICMP, the type."""

    src: End
    dst: End
    proto: int
    port: int
    request: Request | None = None

    @property
    def what(self) -> str:
        """``80/TCP``, ``ICMP type 8``, with the request if there is one."""
        name = PROTO_NAMES.get(self.proto, f"protocol {self.proto}")
        text = f"{name} type {self.port}" if self.proto in _TYPED else f"{self.port}/{name}"
        if not self.port and self.proto not in _TYPED:
            text = f"every port of {name}" if self.proto else "all ports"
        return f"{text} with {self.request}" if self.request is not None else text


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What one end says, and why. `reason` is a sentence for people."""

    subject: End
    peer: End
    egress: bool
    allowed: bool
    enforced: bool
    cause: Cause
    reason: str
    rules: tuple[RuleRef, ...] = ()  # that decided
    default_deny: tuple[RuleRef, ...] = ()  # that isolate the subject


@dataclass(frozen=True, slots=True)
class Answer:
    """Both ends' answers: the connection works only if both allow it."""

    question: Question
    egress: Judged
    ingress: Judged

    @property
    def allowed(self) -> bool:
        return self.egress.allowed and self.ingress.allowed

    @property
    def denials(self) -> tuple[Judged, ...]:
        return tuple(x for x in (self.egress, self.ingress) if not x.allowed)


def ask(scene: Scene, question: Question) -> Answer:
    """Judge a connection at both ends."""
    return Answer(question, one_end(scene, question, True), one_end(scene, question, False))


def one_end(scene: Scene, question: Question, egress: bool) -> Judged:
    """Judge a connection at one end: its source (egress) or its destination."""
    subject, peer = question.src, question.dst
    if not egress:
        subject, peer = peer, subject
    policy = scene.policy(subject.party)
    direction = "egress" if egress else "ingress"
    what = f"{question.src.name} to {question.dst.name} on {question.what}"
    if policy is None:
        return Judged(
            subject=subject,
            peer=peer,
            egress=egress,
            allowed=True,
            enforced=False,
            cause="unjudged",
            reason=f"{subject.name} is no endpoint, so no policy judges its {direction}.",
        )
    match = policy.mapstate.lookup(peer.party.identity, egress, question.proto, question.port)
    isolating = policy.default_deny(egress)
    rules: tuple[RuleRef, ...] = ()
    if match is not None:
        rules = tuple(scene.engine.rule(x) for x in match.entry.rules)
    cause = _cause(match, rules, policy.enforced(egress))
    condition = condition_of(match.entry) if match is not None else None
    if cause == "rule" and condition is not None and question.request is not None:
        passing = condition.passing(question.request)
        cause = "rule" if passing else "request"
        rules = tuple(scene.engine.rule(x) for x in passing or condition.rule_ids)
    said = _reason(cause, subject, direction, rules, isolating, policy.mode)
    if cause == "rule" and condition is not None and question.request is None:
        said += f", as far as its {condition.parser} rules let requests pass"
    if match is not None and match.entry.audit:
        said = f"allowed, but reported: policy that only audits would deny it{_by(rules)}"
    return Judged(
        subject=subject,
        peer=peer,
        egress=egress,
        allowed=cause in ("rule", "open", "host"),
        enforced=policy.enforced(egress),
        cause=cause,
        reason=f"{what}: {said}.",
        rules=rules,
        default_deny=isolating,
    )


def _cause(match: Match | None, rules: tuple[RuleRef, ...], enforced: bool) -> Cause:
    if match is None:
        return "default"
    if match.entry.deny:
        return "deny"
    if rules:
        return "rule"
    return "host" if enforced else "open"


def _reason(
    cause: Cause,
    subject: End,
    direction: str,
    rules: tuple[RuleRef, ...],
    isolating: tuple[RuleRef, ...],
    mode: str,
) -> str:
    match cause:
        case "default" if isolating:
            return (
                f"denied by default: {subject.name} is isolated on {direction} by "
                f"{listed(isolating)}, and no rule allows this"
            )
        case "default" if mode == "always":
            return (
                "denied by default: enforcement mode always isolates every endpoint, and no rule "
                "allows this"
            )
        case "default":
            return (
                f"denied by default: {describe(subject.party.labels)} has no identity of its own "
                "yet, and no rule allows this"
            )
        case "deny":
            return f"denied by {listed(rules)}"
        case "request":
            return (
                f"the connection is allowed by {listed(rules)}, and no rule lets this request pass"
            )
        case "rule":
            return f"allowed by {listed(rules)}"
        case "host":
            return "allowed: the local host may always reach its endpoints"
        case "open" if mode == "never":
            return "allowed: policy enforcement is off (mode never)"
        case _:
            return f"allowed: no rule isolates {subject.name} on {direction}"


def _by(rules: tuple[RuleRef, ...]) -> str:
    return f" ({listed(rules)})" if rules else ""


def listed(refs: tuple[RuleRef, ...], limit: int = 3) -> str:
    """Rules in a sentence."""
    shown = " and ".join(map(str, refs[:limit]))
    return f"{shown} and {len(refs) - limit} more" if len(refs) > limit else shown
