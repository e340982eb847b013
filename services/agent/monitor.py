"""What the programs report: the kernel's ring, read in batches, handed on to subscribers.

    cilia_events --epoll--> RingReader --copy--> BoundedFanout --> Events (raw) | Monitor (decoded)

A batch is one array; no Python object is made per event unless a person watches. Losses are counted
where they happen: in the ring (the kernel had no room) and per subscriber (it was too slow).
Without a subscriber the ring is emptied now and then, and nothing is copied.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cilia.bpf import constants as k
from cilia.bpf.dropreason import reason_text
from cilia.bpf.layout import EVENT, from_addr
from cilia.bpf.ring import RingReader
from cilia.identity import NumericIdentity
from cilia.labels import Labels
from cilia.observation import MATCHES, POINTS
from cilia.policy import PROTO_NAMES, RuleRef
from cilia.policy.l7 import PortNames
from cilia.rpc.fanout import BoundedFanout, Subscription
from services.agent import metrics
from services.agent.calculation import Calculation
from services.agent.datapath import Datapath, wall_offset_ns
from services.agent.endpointtable import Endpoints
from services.agent.notifications import Notification

_READ_MAX: Final = 8192
_PACE_S: Final = 0.01  # between reads while events flow: batches instead of wake-ups
_IDLE_S: Final = 0.5  # between emptyings while nobody listens
_QUEUE_EVENTS: Final = 1 << 17

_CT_STATE: Final = {
    k.CT_NEW: "new",
    k.CT_ESTABLISHED: "established",
    k.CT_REPLY: "reply",
    k.CT_RELATED: "related",
}
_DIRECTION: Final = {k.DIR_NONE: "", k.DIR_INGRESS: "ingress", k.DIR_EGRESS: "egress"}
_TYPE: Final = {k.EVENT_DROP: "drop", k.EVENT_TRACE: "trace", k.EVENT_VERDICT: "verdict"}
_TCP_FLAGS: Final = ("FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR")
_PROTO_ICMP, _PROTO_TCP, _PROTO_ICMPV6 = 1, 6, 58
_POLICY_DENIED, _POLICY_DENYLIST = 133, 181

EventArray = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Batch:
    """What subscribers get: raw events, or a notification, and what the ring lost before them."""

    events: EventArray | None = None
    note: Notification | None = None
    lost: int = 0
    l7: tuple[Any, ...] = ()  # records of requests, messages of the xds service
    lost_l7: int = 0

    @property
    def weight(self) -> int:
        return len(self.events) if self.events is not None else max(1, len(self.l7))


class Monitor:
    """Reads the ring for as long as the agent runs; a lifecycle part."""

    def __init__(self, datapath: Datapath) -> None:
        self._datapath = datapath
        self._fanout: BoundedFanout[Batch] = BoundedFanout(
            capacity=_QUEUE_EVENTS, weigh=lambda batch: batch.weight
        )
        self._ring: RingReader | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._lost_seen = 0
        self.lost = 0

    async def start(self) -> None:
        self._ring = RingReader(
            self._datapath.map("cilia_events"), EVENT, lost=self._datapath.map("cilia_lost")
        )
        self._lost_seen = self.lost = self._ring.lost
        self._arm()

    async def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._ring is not None:
            asyncio.get_running_loop().remove_reader(self._ring.fileno())
            self._ring.close()
            self._ring = None
        self._fanout.close()

    def subscribe(self) -> Subscription[Batch]:
        if len(self._fanout) == 0:
            self._discard()  # what came while nobody listened is nobody's
        subscription = self._fanout.subscribe()
        self._arm()
        return subscription

    def notify(self, note: Notification) -> None:
        self._fanout.publish(Batch(note=note))

    @property
    def listened(self) -> bool:
        return len(self._fanout) > 0

    def publish_l7(self, records: tuple[Any, ...], lost: int) -> None:
        self._fanout.publish(Batch(l7=records, lost_l7=lost))

    def _arm(self) -> None:
        """Wait for the ring if somebody listens, else for the next emptying."""
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._ring is None:
            return
        if len(self._fanout):
            loop.add_reader(self._ring.fileno(), self._readable)
        else:
            loop.remove_reader(self._ring.fileno())
            self._timer = loop.call_later(_IDLE_S, self._idle)

    def _idle(self) -> None:
        self._timer = None
        self._discard()
        self._arm()

    def _discard(self) -> None:
        if self._ring is None:
            return
        for _ in range(64):
            if not len(self._ring.read(_READ_MAX)):
                break
        self._count_lost()

    def _count_lost(self) -> int:
        """Losses of the ring since last asked."""
        if self._ring is None:
            return 0
        now = self._ring.lost
        fresh, self._lost_seen, self.lost = now - self._lost_seen, now, now
        metrics.EVENTS_LOST.set(now)
        return fresh

    def _readable(self) -> None:
        if self._ring is None:
            return
        asyncio.get_running_loop().remove_reader(self._ring.fileno())
        for _ in range(8):
            events = self._ring.read(_READ_MAX)
            if not len(events):
                break
            metrics.EVENTS.inc(len(events))
            self._fanout.publish(Batch(events=events, lost=self._count_lost()))
        self._timer = asyncio.get_running_loop().call_later(_PACE_S, self._arm)


@dataclass(frozen=True, slots=True, kw_only=True)
class Party:
    """One end of a packet, named as well as this node can."""

    address: str
    port: int
    identity: int
    labels: Labels | None
    ep_id: int
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """One event for people."""

    time_ns: int  # wall clock
    type: str
    verdict: str
    direction: str
    reason: str
    reason_code: int
    observation_point: str
    ct_state: str
    source: Party
    destination: Party
    protocol: str
    tcp_flags: str
    length: int
    rule: RuleRef | None
    default_deny: tuple[RuleRef, ...]
    match: str
    reply: bool
    ep_id: int
    explanation: str
    icmp_type: int
    icmp_code: int


class Decoder:
    """Names what an event says: identities by labels, rules by document and place."""

    def __init__(self, calculation: Calculation, endpoints: Endpoints) -> None:
        self._calculation = calculation
        self._endpoints = endpoints

    @staticmethod
    def select(
        events: EventArray, *, types: Collection[int], endpoints: Collection[int], denied_only: bool
    ) -> EventArray:
        """The rows to decode, chosen on whole columns."""
        chosen = np.ones(len(events), bool)
        if types:
            chosen &= np.isin(events["type"], list(types))
        if endpoints:
            ids = list(endpoints)
            chosen &= np.isin(events["ep_id"], ids) | np.isin(events["peer_ep_id"], ids)
        if denied_only:
            chosen &= (events["type"] == k.EVENT_VERDICT) & (events["verdict"] < 0)
        return events[chosen]

    def decode(self, event: np.void) -> Decoded:
        kind = int(event["type"])
        proto = int(event["proto"])
        flags = int(event["flags"])
        sport, dport = int(event["sport_be"]), int(event["dport_be"])
        icmp = proto in (_PROTO_ICMP, _PROTO_ICMPV6)
        direction = int(event["direction"])
        own, peer = int(event["ep_id"]), int(event["peer_ep_id"])
        egress = direction == k.DIR_EGRESS
        # ep_id is whose packet or policy it is: with egress it is the source.
        source_ep, destination_ep = (own, peer) if egress else (peer, own)
        source = self._party(
            from_addr(event["saddr"]),
            0 if icmp else sport,
            int(event["src_identity"]),
            source_ep,
        )
        destination = self._party(
            from_addr(event["daddr"]),
            0 if icmp else dport,
            int(event["dst_identity"]),
            destination_ep,
        )
        code = 0
        verdict = ""
        verdict_value = int(event["verdict"])
        if kind == k.EVENT_DROP:
            code = int(event["reason"])
            verdict = "DENIED"
        elif kind == k.EVENT_VERDICT:
            code = -verdict_value if verdict_value < 0 else 0
            verdict = "DENIED" if verdict_value < 0 else "ALLOWED"
            if verdict_value > 0:
                verdict = "REDIRECTED"
            if flags & k.EVENT_F_AUDITED:
                verdict = "AUDIT"
                code = code or int(event["reason"])
        rule = self._rule(int(event["rule_id"]))
        default_deny: tuple[RuleRef, ...] = ()
        explanation = ""
        if code in (_POLICY_DENIED, _POLICY_DENYLIST) or kind == k.EVENT_VERDICT:
            default_deny, explanation = self._explain(
                egress, source, destination, proto, sport if icmp else dport
            )
            if rule is not None or code != _POLICY_DENIED:
                default_deny = ()
        reason = reason_text(code) if code else ""
        if not explanation or (
            # The engine speaks of policy as it is now; the event of what was.
            kind == k.EVENT_VERDICT and (verdict == "ALLOWED") == (": denied" in explanation)
        ):
            explanation = f"{verdict.lower() or 'forwarded'}{f': {reason}' if reason else ''}" + (
                f", by {rule}" if rule is not None else ""
            )
        if flags & k.EVENT_F_SELFTEST:
            explanation = f"self-test of the audit path, no packet: {explanation}"
        return Decoded(
            time_ns=int(event["time_ns"]) + wall_offset_ns(),
            type=_TYPE.get(kind, str(kind)),
            verdict=verdict,
            direction=_DIRECTION.get(direction, ""),
            reason=reason,
            reason_code=code,
            observation_point=POINTS.get(int(event["obs_point"]), "")
            if kind == k.EVENT_TRACE
            else "",
            ct_state=_CT_STATE.get(int(event["reason"]), "") if kind == k.EVENT_TRACE else "",
            source=source,
            destination=destination,
            protocol=PROTO_NAMES.get(proto, str(proto)) if proto else "",
            tcp_flags=_flags_text(int(event["tcp_flags"])) if proto == _PROTO_TCP else "",
            length=int(event["length"]),
            rule=rule,
            default_deny=default_deny,
            match=MATCHES.get(int(event["match_type"]), "") if kind == k.EVENT_VERDICT else "",
            reply=bool(flags & k.EVENT_F_REPLY),
            ep_id=own,
            explanation=explanation,
            icmp_type=sport if icmp else 0,
            icmp_code=dport if icmp else 0,
        )

    def _party(
        self, address: IPv4Address | IPv6Address, port: int, identity: int, ep_id: int
    ) -> Party:
        name = ""
        endpoint = None
        if ep_id:
            endpoint = next((e for e in self._endpoints if e.id == ep_id), None)
        if endpoint is None:
            found = self._endpoints.table.by("address", address)
            endpoint = found[0] if found else None
        if endpoint is not None:
            name = endpoint.qualified_name
            ep_id = endpoint.id
        return Party(
            address=str(address),
            port=port,
            identity=identity,
            labels=self._calculation.labels_of(NumericIdentity(identity)),
            ep_id=ep_id,
            name=name,
        )

    def _rule(self, rule_id: int) -> RuleRef | None:
        if not rule_id:
            return None
        try:
            return self._calculation.engine.rule(rule_id)
        except KeyError:
            return None  # its document is gone meanwhile

    def _ports_of(self, party: Party) -> PortNames:
        endpoint = self._endpoints.table.get(party.ep_id)  # type: ignore[arg-type]  # 0 is none
        return endpoint.ports if endpoint is not None else ()

    def _explain(
        self, egress: bool, source: Party, destination: Party, proto: int, port: int
    ) -> tuple[tuple[RuleRef, ...], str]:
        subject, peer = (source, destination) if egress else (destination, source)
        if subject.labels is None or peer.labels is None:
            return (), ""
        endpoint = self._endpoints.table.get(subject.ep_id)  # type: ignore[arg-type]  # 0 is none
        key = self._calculation.subject_of(endpoint) if endpoint is not None else None
        try:
            verdict = self._calculation.engine.verdict(
                subject.labels,
                peer.labels,
                "egress" if egress else "ingress",
                proto,
                port,
                mode=key.mode if key is not None else None,
                named_ports=() if egress or endpoint is None else endpoint.ports,
                peer_ports=self._ports_of(peer) if egress else (),
            )
        except (KeyError, ValueError):
            return (), ""
        return verdict.default_deny, verdict.reason


def _flags_text(flags: int) -> str:
    return ",".join(name for bit, name in enumerate(_TCP_FLAGS) if flags >> bit & 1)
