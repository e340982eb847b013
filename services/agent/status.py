"""How this node is, for people and programs: components, controllers, pools, tables."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from cilia.controller import ControllerSet, ControllerStatus
from cilia.table import TableDump
from services.agent.clusterwatch import ClusterView
from services.agent.datapath import Datapath
from services.agent.endpoint import EndpointState
from services.agent.endpointtable import Endpoints
from services.agent.firewall import Firewall
from services.agent.host import HostNetwork
from services.agent.identityalloc import IdentityAllocator
from services.agent.ipam import Ipam, PoolStatus
from services.agent.kernelaudit import KernelAudit
from services.agent.monitor import Monitor
from services.agent.proxy import Proxy
from services.agent.regeneration import NO_POLICY_SET, Regeneration
from services.agent.session import Session, Watch

State = Literal["Ok", "Warning", "Failure"]
_RANK = {"Ok": 0, "Warning": 1, "Failure": 2}


@dataclass(frozen=True, slots=True)
class Component:
    name: str
    state: State
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStatus:
    state: State
    message: str
    components: tuple[Component, ...]
    controllers: tuple[ControllerStatus, ...]
    ipv4: PoolStatus
    ipv6: PoolStatus
    endpoint_states: dict[str, int]
    policy_revision: int
    realised_revision: int
    policies: int
    identities: int
    events_lost: int
    devices: tuple[str, ...]
    tables: tuple[TableDump, ...]


class Status:
    """Looks at everything, owns nothing."""

    def __init__(
        self,
        *,
        view: ClusterView,
        session: Session,
        watch: Watch,
        allocator: IdentityAllocator,
        endpoints: Endpoints,
        regeneration: Regeneration,
        datapath: Datapath,
        ipam: Ipam,
        host: HostNetwork,
        monitor: Monitor,
        proxy: Proxy,
        firewall: Firewall,
        controllers: ControllerSet,
        tables: Callable[[], tuple[TableDump, ...]],
        problems: list[str],
        kernel_audit: KernelAudit,
    ) -> None:
        self._view = view
        self._session = session
        self._watch = watch
        self._allocator = allocator
        self._endpoints = endpoints
        self._regeneration = regeneration
        self._datapath = datapath
        self._ipam = ipam
        self._host = host
        self._monitor = monitor
        self._proxy = proxy
        self._firewall = firewall
        self._controllers = controllers
        self._tables = tables
        self._problems = problems
        self._kernel_audit = kernel_audit
        self.started_ns = time.time_ns()

    def look(self, *, tables: bool) -> NodeStatus:
        components = (
            self._identity(),
            self._policy(),
            self._programs(),
            self._redirects(),
            self._host_firewall(),
            self._endpoint_component(),
            self._node_itself(),
            self._kernel_proof(),
            self._audit_mode(),
            self._pools(),
            self._state_files(),
        )
        worst = max(components, key=lambda c: _RANK[c.state])
        return NodeStatus(
            state=worst.state,
            message="OK" if worst.state == "Ok" else f"{worst.name}: {worst.message}",
            components=components,
            controllers=self._controllers.statuses(),
            ipv4=self._ipam.v4.status(),
            ipv6=self._ipam.v6.status(),
            endpoint_states=dict(Counter(e.shown_state for e in self._endpoints)),
            policy_revision=self._view.policy_revision,
            realised_revision=self._regeneration.realised_revision,
            policies=len(self._view.policies),
            identities=len(self._regeneration.calculation.identities),
            events_lost=self._monitor.lost,
            devices=tuple(row.name for row in self._host.devices),
            tables=self._tables() if tables else (),
        )

    def _identity(self) -> Component:
        if self._session.live and self._watch.connected and self._view.live:
            assert self._session.state is not None
            return Component("identity", "Ok", f"connected, lease {self._session.state.lease_id}")
        controller = self._controllers.get("identity-session")
        error = controller.status().last_error if controller is not None else ""
        kept = "what is known stays in force" if self._view.synced else "nothing is known yet"
        return Component("identity", "Warning", f"{error or 'not connected yet'}; {kept}")

    def _policy(self) -> Component:
        if not self._view.synced:
            return Component("policy", "Failure", NO_POLICY_SET)
        broken = self._regeneration.document_errors
        if broken:
            names = ", ".join(f"{name}: {why}" for name, why in broken.items())
            return Component("policy", "Failure", f"not understood: {names}")
        failing = self._regeneration.failing
        if failing:
            return Component("policy", "Failure", "; ".join(failing.values()))
        used = {endpoint.realised for endpoint in self._endpoints}
        rows = [x for x in self._regeneration.policies if x.subject in used]
        idle = sorted({f"{x.rule}: {x.why}" for row in rows for x in row.unenforced})
        if idle:
            more = f" (and {len(idle) - 1} more)" if len(idle) > 1 else ""
            return Component("policy", "Warning", f"allows nothing: {idle[0]}{more}")
        count = len(self._view.policies)
        what = "document" if count == 1 else "documents"
        source = "live" if self._view.live else "as last saved"
        return Component("policy", "Ok", f"{count} {what} in force, {source}")

    def _programs(self) -> Component:
        if self._datapath.load_error:
            return Component("datapath", "Warning", self._datapath.load_error)
        errors = self._regeneration.ipcache.errors or self._regeneration.endpointmap.errors
        if errors:
            return Component("datapath", "Failure", "; ".join(errors.values()))
        return Component("datapath", "Ok", "programs are loaded")

    def _redirects(self) -> Component:
        wrong = self._proxy.status()
        if wrong:
            return Component("proxy", "Warning", "; ".join(wrong))
        hidden = [
            f"{endpoint.qualified_name} {line}"
            for endpoint in self._endpoints
            for line in self._regeneration.not_shown(endpoint)
        ]
        more = f" (and {len(hidden) - 1} more)" if len(hidden) > 1 else ""
        hint = f"; not shown: {hidden[0]}{more}" if hidden else ""
        needed = self._needed_listeners()
        if not needed:
            return Component("proxy", "Ok", f"no L7 rules{hint}")
        connected = "" if self._proxy.connected else ", the xds service is not reached"
        return Component("proxy", "Ok", f"{needed} L7 rule sets are enforced{connected}{hint}")

    def _needed_listeners(self) -> int:
        listeners = self._proxy.redirects.listeners.values()
        return sum(x.idle_since is None and (x.ready or not x.watches) for x in listeners)

    def _host_firewall(self) -> Component:
        state, sentence = self._firewall.summary(redirects=self._needed_listeners() > 0)
        return Component("firewall", state, sentence)

    def _endpoint_component(self) -> Component:
        failing = [e for e in self._endpoints if e.message]
        if failing:
            first = failing[0]
            more = f" (and {len(failing) - 1} more)" if len(failing) > 1 else ""
            return Component(
                "endpoints", "Warning", f"{first.qualified_name}: {first.message}{more}"
            )
        ready = sum(e.state is EndpointState.READY for e in self._endpoints)
        return Component("endpoints", "Ok", f"{ready}/{len(self._endpoints.table)} ready")

    def _node_itself(self) -> Component:
        row = self._regeneration.node_policy
        if row is None:
            return Component("host-policy", "Ok", "no policy selects this node")
        blind = [device.name for device in self._host.devices if device.l3]
        if blind:
            return Component(
                "host-policy",
                "Warning",
                f"not enforced on {', '.join(blind)}: a device without link layer header",
            )
        how = [
            f"{name} {'enforced' if enforced else 'open'}"
            for name, enforced in (
                ("ingress", row.ingress_enforced),
                ("egress", row.egress_enforced),
            )
        ]
        audited = ", audited only" if row.subject.audit else ""
        return Component("host-policy", "Ok", f"{', '.join(how)}: {row.size} rows{audited}")

    def _kernel_proof(self) -> Component:
        state, sentence = self._kernel_audit.summary()
        return Component("kernel-proof", state, sentence)

    def _audit_mode(self) -> Component:
        test = self._kernel_audit.selftest
        return Component("audit-mode", "Failure" if test.state == "silent" else "Ok", str(test))

    def _pools(self) -> Component:
        for pool in self._ipam.pools:
            status = pool.status()
            if status.allocated + status.quarantined >= status.capacity:
                return Component("ipam", "Warning", f"pool {status.pool} is full")
        used = self._ipam.v4.status()
        return Component("ipam", "Ok", f"{used.allocated}/{used.capacity} of {used.pool}")

    def _state_files(self) -> Component:
        if self._problems:
            return Component("state", "Warning", "; ".join(self._problems))
        return Component("state", "Ok", "state files are whole")
