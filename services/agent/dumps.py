"""What the kernel's maps hold, read back in bounded portions and named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from cilia.bpf import Map
from cilia.bpf import constants as k
from cilia.bpf.dropreason import reason_text
from cilia.bpf.layout import (
    ADDR,
    CT_ENTRY,
    CT_KEY,
    ENDPOINT,
    IPCACHE_KEY,
    IPCACHE_VALUE,
    METRIC,
    POLICY_KEY,
    POLICY_META,
    POLICY_VALUE,
    U32,
    from_addr,
)
from cilia.identity import NumericIdentity
from cilia.labels import Labels
from cilia.policy import PROTO_NAMES, RuleRef
from services.agent.calculation import Calculation
from services.agent.datapath import Datapath, monotonic_s
from services.agent.reconcilers.ipcache import prefix_of

CHUNK_ROWS: Final = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyDump:
    slot: int
    egress: bool
    identity: int
    labels: Labels | None
    protocol: str
    port: int
    end_port: int
    deny: bool
    proxy_port: int
    rule: RuleRef | None
    hits: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ConntrackDump:
    protocol: str
    source: str
    source_port: int
    destination: str
    destination_port: int
    expires_in_s: int
    flags: tuple[str, ...]
    packets: tuple[int, int]
    octets: tuple[int, int]
    source_identity: int
    destination_identity: int
    nat: str


@dataclass(frozen=True, slots=True, kw_only=True)
class IpcacheDump:
    prefix: str
    identity: int
    labels: Labels | None
    tunnel: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointDump:
    address: str
    id: int
    identity: int
    ifindex: int
    slot: int
    rev: int
    mac: str
    node_mac: str
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricDump:
    reason: int
    text: str
    direction: str
    packets: int
    octets: int


class Dumps:
    """Every method reads a bounded snapshot on the executor; rows are named afterwards."""

    def __init__(self, datapath: Datapath, calculation: Calculation) -> None:
        self._datapath = datapath
        self._calculation = calculation

    def _labels(self, identity: int) -> Labels | None:
        return self._calculation.labels_of(NumericIdentity(identity))

    def _rule(self, rule_id: int) -> RuleRef | None:
        try:
            return self._calculation.engine.rule(rule_id) if rule_id else None
        except KeyError:
            return None

    async def policy_slots(self) -> list[int]:
        """Slots that hold a policy."""

        def read() -> list[int]:
            slots, metas = self._datapath.map("cilia_policy_meta").items_np(U32, POLICY_META)
            outer = self._datapath.map("cilia_policy")
            return [s for s in slots[metas["rev"] != 0].tolist() if outer.inner_id(s) is not None]

        return await self._datapath.run(read)

    async def policy(self, slot: int, limit: int | None) -> Iterator[PolicyDump]:
        def read() -> tuple[np.ndarray, np.ndarray]:
            inner_id = self._datapath.map("cilia_policy").inner_id(slot)
            if inner_id is None:
                return np.empty(0, POLICY_KEY), np.empty(0, POLICY_VALUE)
            inner = Map.from_id(inner_id)
            try:
                return inner.items_np(POLICY_KEY, POLICY_VALUE, limit)
            finally:
                inner.close()

        keys, values = await self._datapath.run(read)
        order = np.lexsort(
            (keys["dport_be"], keys["proto"], keys["identity"], keys["l4_plen_egress"] >> 7)
        )
        return (self._policy_row(slot, keys[i], values[i]) for i in order)

    def _policy_row(self, slot: int, key: np.void, value: np.void) -> PolicyDump:
        plen = int(key["l4_plen_egress"]) & 0x7F
        port = int(key["dport_be"])
        spread = 0xFFFF >> (plen - 8) if plen > 8 else 0xFFFF
        identity = int(key["identity"])
        return PolicyDump(
            slot=slot,
            egress=bool(int(key["l4_plen_egress"]) & 0x80),
            identity=identity,
            labels=self._labels(identity) if identity else None,
            protocol=PROTO_NAMES.get(int(key["proto"]), str(int(key["proto"]))),
            port=port if plen > 8 else 0,
            end_port=port | spread if plen > 8 else 0,
            deny=bool(int(value["flags"]) & k.POLICY_F_DENY),
            proxy_port=int(value["proxy_port_be"]),
            rule=self._rule(int(value["rule_id"])),
            hits=int(value["hits"]),
        )

    async def conntrack(self, limit: int | None) -> tuple[Iterator[ConntrackDump], bool]:
        ct = self._datapath.map("cilia_ct")
        keys, entries = await self._datapath.run(ct.items_np, CT_KEY, CT_ENTRY, limit)
        now = monotonic_s()
        rows = (_conntrack_row(keys[i], entries[i], now) for i in range(len(keys)))
        return rows, limit is not None and len(keys) >= limit

    async def ipcache(self, limit: int | None) -> tuple[Iterator[IpcacheDump], bool]:
        ipcache = self._datapath.map("cilia_ipcache")
        keys, values = await self._datapath.run(ipcache.items_np, IPCACHE_KEY, IPCACHE_VALUE, limit)

        def rows() -> Iterator[IpcacheDump]:
            for key, value in zip(keys, values, strict=True):
                identity, tunnel = int(value["identity"]), int(value["tunnel_be"])
                yield IpcacheDump(
                    prefix=str(prefix_of(key)),
                    identity=identity,
                    labels=self._labels(identity),
                    tunnel=".".join(map(str, tunnel.to_bytes(4, "big"))) if tunnel else "",
                )

        return rows(), limit is not None and len(keys) >= limit

    async def endpoints(self, limit: int | None) -> tuple[Iterator[EndpointDump], bool]:
        lxc = self._datapath.map("cilia_lxc")
        meta = self._datapath.map("cilia_policy_meta")

        def read() -> list[tuple[bytes, np.void, int]]:
            keys, values = lxc.items_np(ADDR, ENDPOINT, limit)
            found = []
            for key, value in zip(keys, values, strict=True):
                raw = meta.lookup(int(value["policy_slot"]).to_bytes(4, "little"))
                rev = int(np.frombuffer(raw, POLICY_META)[0]["rev"]) if raw else 0
                found.append((bytes(key), value, rev))
            return found

        raw_rows = await self._datapath.run(read)
        raw_rows.sort(key=lambda row: (int(row[1]["id"]), row[0]))
        return (
            (
                EndpointDump(
                    address=str(from_addr(address)),
                    id=int(value["id"]),
                    identity=int(value["identity"]),
                    ifindex=int(value["ifindex"]),
                    slot=int(value["policy_slot"]),
                    rev=rev,
                    mac=bytes(value["mac"]).hex(":"),
                    node_mac=bytes(value["node_mac"]).hex(":"),
                    flags=tuple(
                        name
                        for bit, name in ((k.EP_F_OPEN, "open"), (k.EP_F_AUDIT, "audit"))
                        if int(value["flags"]) & bit
                    ),
                )
                for address, value, rev in raw_rows
            ),
            limit is not None and len(raw_rows) >= limit,
        )

    async def metrics(self) -> list[MetricDump]:
        keys, values = await self._datapath.run(
            self._datapath.map("cilia_metrics").items_np, U32, METRIC
        )
        packets = values["packets"].sum(axis=1)
        octets = values["bytes"].sum(axis=1)
        names = {k.DIR_NONE: "", k.DIR_INGRESS: "INGRESS", k.DIR_EGRESS: "EGRESS"}
        return [
            MetricDump(
                reason=int(keys[i]) >> 2,
                text=reason_text(int(keys[i]) >> 2),
                direction=names.get(int(keys[i]) & 3, ""),
                packets=int(packets[i]),
                octets=int(octets[i]),
            )
            for i in np.flatnonzero(packets)
        ]


def _conntrack_row(key: np.void, entry: np.void, now_s: int) -> ConntrackDump:
    lo = (str(from_addr(key["lo"])), int(key["lo_port_be"]))
    hi = (str(from_addr(key["hi"])), int(key["hi_port_be"]))
    flags = int(entry["flags"])
    source, destination = (lo, hi) if flags & k.CT_F_INIT_LO else (hi, lo)
    seen = [int(x) for x in entry["seen"]]
    names = [
        name
        for wanted, name in (
            (flags & k.CT_F_NAT, "nat"),
            (flags & k.CT_F_FROM_HOST, "from-host"),
            (flags & k.CT_F_OUTSIDE, "outside"),
            (int(entry["packets"][1]) > 0, "seen-reply"),
            ((seen[0] | seen[1]) & k.CT_SEEN_NON_SYN, "seen-non-syn"),
            (seen[0] & k.CT_SEEN_CLOSING, "tx-closing"),
            (seen[1] & k.CT_SEEN_CLOSING, "rx-closing"),
        )
        if wanted
    ]
    nat = ""
    if flags & k.CT_F_NAT:
        nat = f"{from_addr(entry['nat_addr'])}:{int(entry['nat_port_be'])}"
    proto = int(key["proto"])
    return ConntrackDump(
        protocol=PROTO_NAMES.get(proto, str(proto)),
        source=source[0],
        source_port=source[1],
        destination=destination[0],
        destination_port=destination[1],
        expires_in_s=int(entry["expires_s"]) - now_s,
        flags=tuple(names),
        packets=(int(entry["packets"][0]), int(entry["packets"][1])),
        octets=(int(entry["bytes"][0]), int(entry["bytes"][1])),
        # A side's remote is the other end.
        source_identity=int(entry["side"][1]["remote_id"]),
        destination_identity=int(entry["side"][0]["remote_id"]),
        nat=nat,
    )
