"""Questions about policy, answered by the compiled programs: loaded into the kernel for these
questions alone, attached to nothing, run by BPF_PROG_TEST_RUN over maps of their own.

So what is tested is the code that judges packets, with the rows that an agent would write; no agent
runs, and none that does is disturbed. Needs root.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np

from cilia.bpf import BpfError, Map, Object, constants, layout, probe
from cilia.bpf.auditor import Auditor
from cilia.bpf.uapi import MapType
from cilia.policy import ResolvedPolicy
from cilia.policy.api import PROTO_TCP
from cilia.policy.questions.conditions import Condition, condition_of
from cilia.policy.questions.judge import End, Question
from cilia.policy.questions.scene import Scene
from cli.errors import CliError, Exit

OBJECTS: Final = Path(__file__).resolve().parents[1] / "build" / "bpf"
BPF_F_NO_PREALLOC: Final = 1
MAX_SLOTS: Final = 4096
_SMALL: Final = {
    "cilia_ipcache": 16,
    "cilia_ct": 16,
    "cilia_nat": 16,
    "cilia_frag": 16,
    "cilia_events": 4096,
}


class KernelPolicies:
    """The programs that answer, and the policies of a scene in their maps."""

    def __init__(self, scene: Scene) -> None:
        if os.geteuid() != 0:
            raise CliError(
                "asking the kernel needs root: programs are loaded",
                code=Exit.PERMISSION,
                hint="Run it with sudo, or with --level engine.",
            )
        self._scene: Final = scene
        self._slots: Final[dict[int, int]] = {}
        self._inner: Final[list[Map]] = []
        self._proxies: Final[list[Condition | None]] = [None]  # by proxy port
        path = OBJECTS / "bpf_audit.o"
        if not path.is_file():
            raise CliError(
                f"no compiled programs in {OBJECTS}", code=Exit.NOT_FOUND, hint="Run `make bpf`."
            )
        try:
            with Object.open(path) as bare:
                known = set(bare.rodata())
            values = {"HAVE_KTIME_COARSE": int(probe.has_helper("bpf_ktime_get_coarse_ns"))}
            self._object = Object.open(
                path,
                rodata={k: v for k, v in values.items() if k in known},
                map_sizes={**_SMALL, "cilia_policy": MAX_SLOTS, "cilia_policy_meta": MAX_SLOTS},
                layouts=layout.CILIA,
            )
            try:
                self._object.load()
                self._policy = self._object.map("cilia_policy")
                self._meta = self._object.map("cilia_policy_meta")
                self._auditor = Auditor(
                    self._object.program("audit_policy"), self._object.program("audit_selftest")
                )
                runtime = np.zeros(1, layout.RUNTIME)
                self._object.map("cilia_runtime").update(bytes(4), runtime.tobytes())
            except BaseException:
                self._object.close()
                raise
        except BpfError as error:
            raise CliError(
                f"the programs cannot be loaded: {error}",
                hint=error.cure or "See `cilia bpf probe`.",
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._object.close()

    def answer(self, question: Question) -> tuple[bool, tuple[int, ...]]:
        """Whether both ends let a connection (and its request) pass, and the rules that decided."""
        rules: list[int] = []
        allowed = True
        for egress in (True, False):
            subject, peer = question.src, question.dst
            if not egress:
                subject, peer = peer, subject
            policy = self._scene.policy(subject.party)
            if policy is None:
                continue
            passed, found = self._ask(subject, peer, policy, question, egress)
            allowed = allowed and passed
            rules += found
        return allowed, tuple(rules)

    def _ask(
        self, subject: End, peer: End, policy: ResolvedPolicy, question: Question, egress: bool
    ) -> tuple[bool, Iterable[int]]:
        cell = np.zeros(1, layout.AUDIT_CELL)
        cell["policy_slot"] = self._slot(subject, policy)
        cell["identity"] = subject.party.identity
        cell["remote_id"] = peer.party.identity
        cell["proto"] = question.proto
        cell["dport_be"] = question.port
        cell["egress"] = egress
        cell["ep_id"] = 1
        cell["ep_flags"] = constants.EP_F_OPEN
        (answer,) = self._auditor.ask(cell)
        verdict, rule = int(answer["verdict"]), int(answer["rule_id"])
        if verdict < 0:
            return bool(answer["audited"]), [rule] if rule else []
        condition = self._proxies[verdict] if verdict else None
        if condition is None or question.request is None:
            return True, [rule] if rule else []
        # The kernel hands it to the proxy, which judges the request.
        passing = condition.passing(question.request)
        return bool(passing), passing

    def _slot(self, subject: End, policy: ResolvedPolicy) -> int:
        """Where a party's policy is, written there when it is first asked for."""
        identity = subject.party.identity
        known = self._slots.get(identity)
        if known is not None:
            return known
        slot = len(self._slots) + 1
        if slot >= MAX_SLOTS:
            raise CliError(f"more than {MAX_SLOTS - 1} policies in one run", code=Exit.INVALID)
        inner = Map.create(
            MapType.HASH,
            "policy",
            layout.POLICY_KEY.itemsize,
            layout.POLICY_VALUE.itemsize,
            max(len(policy.mapstate), 1),
            BPF_F_NO_PREALLOC,
        )
        meta = np.zeros(1, layout.POLICY_META)
        for key, entry in policy.mapstate.items():
            row = np.zeros(1, layout.POLICY_KEY)
            row["identity"], row["proto"], row["dport_be"] = key.identity, key.proto, key.port
            row["l4_plen_egress"] = layout.plen_egress(key.plen, key.egress)
            value = np.zeros(1, layout.POLICY_VALUE)
            value["rule_id"] = entry.rule_id
            value["flags"] = (constants.POLICY_F_DENY if entry.deny else 0) | (
                constants.POLICY_F_AUDIT if entry.audit else 0
            )
            condition = condition_of(entry)
            if condition is not None and not entry.deny:
                if key.proto == PROTO_TCP:
                    value["proxy_port_be"] = self._proxy(condition)
                elif policy.enforced(key.egress):
                    continue  # no proxy takes it, so an agent writes no such row
                else:
                    value["flags"] = constants.POLICY_F_DENY
            inner.update(row.tobytes(), value.tobytes())
            masks = meta["plens_id"] if key.identity else meta["plens_any"]
            masks[0, int(key.egress)] |= 1 << key.plen
            if value["flags"] & constants.POLICY_F_DENY:
                masks[0, int(key.egress)] |= constants.POLICY_META_HAS_DENY
        self._policy.set_inner(slot, inner)
        self._inner.append(inner)
        meta["rev"] = 1
        self._meta.update(slot.to_bytes(4, "little"), meta.tobytes())
        self._slots[identity] = slot
        return slot

    def _proxy(self, condition: Condition) -> int:
        """A number in place of a proxy's port, one for each set of rules."""
        if condition not in self._proxies:
            self._proxies.append(condition)
        return self._proxies.index(condition)
