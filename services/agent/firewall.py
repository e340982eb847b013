"""Would the host's own firewall drop what the datapath sends through its INPUT hook?

In netfilter a drop is final, whichever base chain says it, and an accept ends one chain only. Two
kinds of packets of ours meet that hook: connections to the L7 proxy, which no policy of the host's
knows, and connections of endpoints to the node itself. The rules are read and walked with such a
packet; what cannot be told of it (its ports, sets, rates) counts for nothing: an accept that
depends on it is no accept, and a drop that depends on it is somebody's intent about few. Nothing is
ever changed here: the status names the command.

            policy accept, or a rule that accepts it surely      -> passes
    packet  a rule that drops it surely, or the policy does      -> may be dropped
"""

from __future__ import annotations

import asyncio
import shlex
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

import structlog

from cilia.bpf.constants import MARK_MAGIC_MASK, MARK_TO_PROXY
from cilia.net import firewall
from cilia.telemetry import fields

log = structlog.get_logger()

_U32: Final = 0xFFFFFFFF
_JUMPS: Final = 16  # NFT_JUMP_STACK_SIZE, and more than any legacy table nests
_MATCH: Final = f"-m mark --mark {MARK_TO_PROXY:#x}/{MARK_MAGIC_MASK:#x} -j ACCEPT"

Family = Literal["ip", "ip6"]
_FAMILIES: Final[tuple[Family, ...]] = ("ip", "ip6")
Verdict = Literal["accept", "drop"]
#: Of a match: whether the packet has it; None where that cannot be told.
Truth = bool | None


@dataclass(frozen=True, slots=True)
class Packet:
    """The first one of a TCP connection, as far as it is known."""

    family: Family
    interface: str  # it came in by; a trailing * stands for any rest
    mark: int
    mark_known: int  # bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Hurdle:
    """A base chain that may drop."""

    program: Literal["nft", "iptables", "legacy"]
    family: str
    table: str
    chain: str
    ufw: bool

    def __str__(self) -> str:
        made_by = " (ufw)" if self.ufw else " (iptables-legacy)" if self.program == "legacy" else ""
        return f"{self.family} {self.table} {self.chain}{made_by}"

    @property
    def cure(self) -> str:
        """A command for a shell that lets the proxy's packets pass."""
        six = "6" if self.family == "ip6" else ""
        if self.ufw:  # which writes its chains anew from these files
            return (
                f"sed -i '/^# End required lines/a -A ufw{six}-before-input {_MATCH}' "
                f"/etc/ufw/before{six}.rules && ufw reload"
            )
        table = "" if self.table == "filter" else f"-t {self.table} "
        if self.program == "legacy":
            return f"ip{six}tables-legacy {table}-I {self.chain} {_MATCH}"
        if self.program == "iptables":
            return f"ip{six}tables-nft {table}-I {self.chain} {_MATCH}"
        where = shlex.join((self.family, self.table, self.chain))
        return (
            f"nft insert rule {where} "
            f"meta mark and {MARK_MAGIC_MASK:#x} == {MARK_TO_PROXY:#x} accept"
        )


class Firewall:
    """The host's rules as last read; a controller reads them again, at leisure."""

    def __init__(self, devices: Callable[[], Iterable[str]]) -> None:
        self._devices = devices
        self._to_proxy: tuple[Hurdle, ...] = ()
        self._to_node: tuple[Hurdle, ...] = ()
        self._unread = "not looked at yet"

    async def look(self) -> None:
        before = self._to_proxy
        interfaces = ("cil*", *self._devices())
        self._to_proxy, self._to_node, self._unread = await asyncio.to_thread(_look, interfaces)
        if self._to_proxy and self._to_proxy != before:
            log.warning(
                "A firewall of this host may drop what policy sends to the L7 proxy.",
                **{fields.REASON: _named(self._to_proxy), fields.CURE: _cure(self._to_proxy)},
            )

    @property
    def drops_to_proxy(self) -> bool:
        """Whether connections on their way to the proxy may be dropped, as far as is known."""
        return bool(self._to_proxy)

    def summary(self, *, redirects: bool) -> tuple[Literal["Ok", "Warning"], str]:
        """For the status; `redirects`: whether there are connections to the proxy now."""
        if self._to_proxy and redirects:
            return "Warning", (
                f"{_named(self._to_proxy)} may drop what L7 rules send to the proxy. "
                f"Run: {_cure(self._to_proxy)}"
            )
        said = []
        if self._to_node:
            said.append(f"{_named(self._to_node)} decides what endpoints reach on this node")
        if self._to_proxy:
            said.append(f"L7 rules will need: {_cure(self._to_proxy)}")
        if self._unread:
            said.append(f"not known: {self._unread}")
        return "Ok", "; ".join(said) or "no chain on the input hook drops what is not listed"


def _named(hurdles: Sequence[Hurdle]) -> str:
    return ", ".join(map(str, hurdles))


def _cure(hurdles: Sequence[Hurdle]) -> str:
    return " && ".join(dict.fromkeys(hurdle.cure for hurdle in hurdles))


def _look(interfaces: Sequence[str]) -> tuple[tuple[Hurdle, ...], tuple[Hurdle, ...], str]:
    """To the proxy, to the node, and what could not be read. Blocking."""
    rulesets: list[Ruleset] = []
    unread = []
    try:
        iptables = shutil.which("iptables-nft") is not None
        rulesets += from_nft(firewall.nftables_on("input"), iptables=iptables)
    except firewall.FirewallUnread as error:
        unread.append(error.message)
    for family in _FAMILIES:
        try:
            rulesets += from_iptables_save(family, firewall.legacy_tables(family))
        except firewall.FirewallUnread as error:
            unread.append(error.message)
    return (
        hurdles(rulesets, to_proxy(interfaces)),
        hurdles(rulesets, to_node()),
        "; ".join(dict.fromkeys(unread)),
    )


def to_proxy(interfaces: Iterable[str]) -> list[Packet]:
    """From endpoints and from devices; the port is in the upper half of the mark."""
    return [Packet(f, name, MARK_TO_PROXY, 0xFFFF) for f in _FAMILIES for name in interfaces]


def to_node() -> list[Packet]:
    """From endpoints. Marks of another namespace do not come along."""
    return [Packet(family, "cil*", 0, _U32) for family in _FAMILIES]


# ---- rules, whatever wrote them

Match = Callable[[Packet], Truth]
#: "accept", "drop", "return"; or "jump", "goto" with a chain.
Decided = tuple[str, str]
Decide = Callable[[Packet], Decided | None]


def _unknown(_: Packet) -> Truth:
    return None


def _undecided(_: Packet) -> Decided | None:
    return None


def _always(decided: Decided) -> Decide:
    return lambda _: decided


@dataclass(frozen=True, slots=True)
class Rule:
    """Matches that must all hold, then a verdict or a chain to go on in."""

    matches: tuple[Match, ...]
    verdict: Decide


@dataclass(frozen=True, slots=True, kw_only=True)
class Ruleset:
    """One table and the base chains of it that are on the hook."""

    program: Literal["nft", "iptables", "legacy"]
    family: str  # ip, ip6, inet
    table: str
    base: Mapping[str, Verdict]  # by policy
    chains: Mapping[str, Sequence[Rule]]


def hurdles(rulesets: Iterable[Ruleset], packets: Sequence[Packet]) -> tuple[Hurdle, ...]:
    """The base chains that may drop one of the packets."""
    return tuple(
        Hurdle(
            program=rules.program,
            family=rules.family,
            table=rules.table,
            chain=chain,
            ufw=any(name.startswith(("ufw-", "ufw6-")) for name in rules.chains),
        )
        for rules in rulesets
        for chain, policy in rules.base.items()
        if any(
            (_walk(rules.chains, chain, packet, 0) or policy) == "drop"
            for packet in packets
            if rules.family in ("inet", packet.family)
        )
    )


def _walk(
    chains: Mapping[str, Sequence[Rule]], name: str, packet: Packet, depth: int
) -> Verdict | None:
    """What a chain surely decides; None when it may go back to who called it."""
    if depth > _JUMPS:
        return None
    for rule in chains.get(name, ()):
        if not all(match(packet) for match in rule.matches):
            continue  # surely not, or who knows
        match rule.verdict(packet):
            case ("accept", _):
                return "accept"
            case ("drop", _):
                return "drop"
            case ("return", _):
                return None
            case ("jump", chain):
                decided = _walk(chains, chain, packet, depth + 1)
                if decided is not None:
                    return decided
            case ("goto", chain):
                return _walk(chains, chain, packet, depth + 1)
            case _:
                pass
    return None


def _same_interface(pattern: str, name: str) -> Truth:
    """Whether an interface is the one, or one of those, that a rule names."""
    if pattern.endswith("*"):
        stem = pattern[:-1]
        if name.rstrip("*").startswith(stem):
            return True
        return None if name.endswith("*") and stem.startswith(name[:-1]) else False
    if name.endswith("*"):
        return None if pattern.startswith(name[:-1]) else False
    return pattern == name


def _same_mark(packet: Packet, mask: int, value: int) -> Truth:
    if (packet.mark ^ value) & mask & packet.mark_known:
        return False
    return True if not mask & ~packet.mark_known & _U32 else None


def _not(truth: Truth) -> Truth:
    return None if truth is None else not truth


def _any(truths: Iterable[Truth]) -> Truth:
    found = list(truths)
    return True if True in found else None if None in found else False


# ---- nftables


def from_nft(items: Iterable[Mapping[str, Any]], *, iptables: bool) -> list[Ruleset]:
    """Of `nft -j list table`: what has a base chain on the input hook of ip, ip6 or inet.

    `iptables`: whether iptables-nft is installed, which owns the tables with its chains' names.
    """
    tables: dict[tuple[str, str], tuple[dict[str, Verdict], dict[str, list[Rule]]]] = {}
    for item in items:
        for kind, what in item.items():
            if what.get("family") not in ("ip", "ip6", "inet"):
                continue
            key = (what["family"], what["name"] if kind == "table" else what.get("table", ""))
            base, chains = tables.setdefault(key, ({}, {}))
            if kind == "chain":
                chains.setdefault(what["name"], [])
                if what.get("hook") == "input":
                    base[what["name"]] = "drop" if what.get("policy") == "drop" else "accept"
            elif kind == "rule":
                chains.setdefault(what["chain"], []).append(_nft_rule(what.get("expr", ())))
    return [
        Ruleset(
            program="iptables" if iptables and "INPUT" in base and family != "inet" else "nft",
            family=family,
            table=table,
            base=base,
            chains=chains,
        )
        for (family, table), (base, chains) in tables.items()
        if base
    ]


_VERDICTS: Final = {"accept": "accept", "drop": "drop", "reject": "drop", "return": "return"}


def _nft_rule(expressions: Iterable[Any]) -> Rule:
    matches: list[Match] = []
    verdict: Decide = _undecided
    for expression in expressions:
        match expression:
            case {"match": what}:
                matches.append(partial(_nft_match, what))
            case {"vmap": what}:
                verdict = partial(_nft_vmap, what)
            case {"xt": {"type": "target", "name": name}}:  # of iptables, unknown to nft
                if name in ("REJECT", "DROP"):
                    verdict = _always(("drop", ""))
            case {"limit": _} | {"quota": _} | {"ct count": _} | {"xt": _}:
                matches.append(_unknown)
            case dict():
                found = _nft_verdict(expression)
                if found is not None:
                    verdict = _always(found)
            case _:
                pass
    return Rule(tuple(matches), verdict)


def _nft_verdict(expression: Mapping[str, Any]) -> Decided | None:
    for kind, what in expression.items():
        if kind in _VERDICTS:
            return _VERDICTS[kind], ""
        if kind in ("jump", "goto"):
            return kind, what["target"]
    return None


def _nft_vmap(what: Mapping[str, Any], packet: Packet) -> Decided | None:
    data = what.get("data")
    if not isinstance(data, dict):
        return None  # a named map, whose elements are not read
    for value, verdict in data.get("set", ()):
        holds = _nft_equal(packet, what.get("key"), value)
        if holds is None:
            return None
        if holds:
            return _nft_verdict(verdict)
    return None


def _nft_match(what: Mapping[str, Any], packet: Packet) -> Truth:
    left, right, operator = what.get("left"), what.get("right"), what.get("op")
    if operator not in ("==", "!=", "in"):
        return None
    # A set {a, b}; or flags [a, b], of which ct state's stand for any.
    values = right.get("set") if isinstance(right, dict) and "set" in right else right
    if not isinstance(values, list):
        values = [values]
    holds = _any(_nft_equal(packet, left, value) for value in values)
    return _not(holds) if operator == "!=" else holds


def _nft_equal(packet: Packet, left: Any, value: Any) -> Truth:
    mask = _U32
    if isinstance(value, str) and value.startswith("@"):
        return None  # a named set, whose elements are not read
    if isinstance(left, dict) and "&" in left:
        left, mask = left["&"]
    if not isinstance(left, dict) or not isinstance(mask, int):
        return None
    protocol = 4 if packet.family == "ip" else 6
    match left:
        case {"meta": {"key": "mark"}} if isinstance(value, int):
            return _same_mark(packet, mask, value)
        case {"meta": {"key": "iifname" | "iif"}} if isinstance(value, str):
            return _same_interface(value, packet.interface)
        case {"meta": {"key": "nfproto"}}:
            return bool(value in (f"ipv{protocol}", 2 if protocol == 4 else 10))
        case {"meta": {"key": "protocol"}}:
            return bool(value == packet.family)
        case {"meta": {"key": "l4proto"}} | {"payload": {"protocol": "ip", "field": "protocol"}}:
            return value in ("tcp", 6) if isinstance(value, str | int) else None
        case {"ct": {"key": "state"}}:
            return bool(value == "new")
        case {"payload": {"protocol": "ip" | "ip6" as name}}:
            return None if name == packet.family else False
        case {"payload": {"protocol": "udp" | "icmp" | "icmpv6" | "sctp" | "dccp" | "esp" | "ah"}}:
            return False
        case _:
            return None


# ---- iptables-legacy


def from_iptables_save(family: str, text: str) -> list[Ruleset]:
    """Of `iptables-legacy-save`: the tables with an INPUT chain."""
    found = []
    table, base, chains = "", {}, {}  # type: tuple[str, dict[str, Verdict], dict[str, list[Rule]]]
    for line in text.splitlines():
        if line.startswith("*"):
            table, base, chains = line[1:].strip(), {}, {}
        elif line.startswith(":"):
            name, policy, *_ = line[1:].split()
            chains[name] = []
            if name == "INPUT":
                base[name] = "drop" if policy == "DROP" else "accept"
        elif line.startswith("-A "):
            _, name, *words = shlex.split(line)
            chains.setdefault(name, []).append(_iptables_rule(words))
        elif line == "COMMIT" and base:
            found.append(
                Ruleset(program="legacy", family=family, table=table, base=base, chains=chains)
            )
    return found


def _iptables_rule(words: Sequence[str]) -> Rule:
    matches: list[Match] = []
    verdict: Decide = _undecided
    module, negated, position = "", False, 0
    while position < len(words):
        word, position = words[position], position + 1
        if word == "!":
            negated = True
            continue
        values = []
        while position < len(words) and not words[position].startswith(("-", "!")):
            values.append(words[position])
            position += 1
        value = values[0] if values else ""
        if word in ("-j", "-g"):
            kind = "goto" if word == "-g" else "jump"
            verdict = _always(_IPTABLES_TARGETS.get(value, (kind, value)))
            break  # what follows is about the target
        if word == "-m":
            module = value  # by itself it matches anything
        elif word != "--comment":
            matches.append(_iptables_match(module, word, value, negated=negated))
        negated = False
    return Rule(tuple(matches), verdict)


#: Other targets are chains, or go on behind them, as LOG: there is no chain of that name.
_IPTABLES_TARGETS: Final = {
    "ACCEPT": ("accept", ""),
    "DROP": ("drop", ""),
    "REJECT": ("drop", ""),
    "RETURN": ("return", ""),
}


def _iptables_match(module: str, word: str, value: str, *, negated: bool) -> Match:
    def holds(packet: Packet) -> Truth:
        match module, word:
            case _, "-i":
                return _same_interface(value.replace("+", "*"), packet.interface)
            case _, "-p":
                return value == "tcp"
            case "mark", "--mark":
                number, _, mask = value.partition("/")
                return _same_mark(packet, int(mask or "0xffffffff", 0), int(number, 0))
            case ("conntrack", "--ctstate") | ("state", "--state"):
                return "NEW" in value.split(",")
            case _:
                return None

    return (lambda packet: _not(holds(packet))) if negated else holds
