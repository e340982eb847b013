"""Policy documents as people apply them: checked here, stored in the cluster, enforced by everyone.

All or nothing: a batch with one fault changes nothing, and every fault is named. With `wait`, a
call returns when this node's endpoints enforce what was stored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from cilia.errors import DomainError, InvalidError, Kind, NotFoundError
from cilia.policy import Document, Fault, Rule, parse_documents
from cilia.policy.lint import Enforcers, lint
from services.agent.clients import IdentityClient, Outcome
from services.agent.clusterwatch import ClusterView, PolicyEntry, PolicyName
from services.agent.confirmation import CONFIRM_S, Confirmation, NodeIsolated
from services.agent.endpoint import SubjectKey
from services.agent.reconcilers.policymap import PolicyTooLarge
from services.agent.regeneration import Regeneration


class DocumentsInvalid(InvalidError):
    default_cure = "Nothing was changed; mend the documents and apply them again"

    def __init__(self, faults: Sequence[Fault]) -> None:
        first = str(faults[0]) if faults else "no document"
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        super().__init__(f"{first}{more}", faults=faults)


class NoDocuments(InvalidError):
    default_cure = "Give at least one policy document"

    def __init__(self) -> None:
        super().__init__("there is no policy document in what was given")


class PolicyNotFound(NotFoundError):
    default_cure = "See `cilia policy get` for those there are"

    def __init__(self, names: Iterable[PolicyName]) -> None:
        super().__init__(f"there is no policy {', '.join(map(str, names))}")


class NotRealised(DomainError):
    """The change is stored, but this node does not enforce it yet."""

    default_kind = Kind.DEADLINE


@dataclass(frozen=True, slots=True)
class _Told:
    """How a change that does not become real is told."""

    done: str
    late: str
    late_cure: str
    failed: str
    failed_cure: str


_APPLIED: Final = _Told(
    done="the policy is stored",
    late="was not enforced",
    late_cure="It is stored and will be enforced; `cilia status` says what is in the way",
    failed="cannot be enforced",
    failed_cure="The old policy stays until then; `cilia status` shows whether it still fails",
)
_DELETED: Final = _Told(
    done="the policy is deleted",
    late="was still enforced",
    late_cure="It will cease to be enforced; `cilia status` says what is in the way",
    failed="what is left cannot be enforced",
    failed_cure="The old policy stays until then; `cilia status` shows whether it still fails",
)


@dataclass(frozen=True, slots=True)
class Source:
    name: str
    text: bytes


@dataclass(frozen=True, slots=True)
class Applied:
    revision: int
    outcomes: tuple[Outcome, ...]
    warnings: tuple[Fault, ...]
    realised: bool
    confirm_within_s: int = 0  # 0: nothing waits to be confirmed


def _isolating(documents: Iterable[Document], egress: bool) -> Iterator[tuple[Rule, Document]]:
    """The rules that isolate nodes in a direction."""
    for document in documents:
        for rule in document.rules if not document.audit else ():
            if rule.node and rule.isolates(egress) is not None:
                yield rule, document


class PolicyDocuments:
    def __init__(
        self,
        *,
        client: IdentityClient,
        view: ClusterView,
        regeneration: Regeneration,
        changed: asyncio.Condition,
        wait_timeout_s: float,
        confirmation: Confirmation,
    ) -> None:
        self._client = client
        self._view = view
        self._regeneration = regeneration
        self._changed = changed
        self._wait_timeout_s = wait_timeout_s
        self._confirmation = confirmation

    async def apply(
        self,
        sources: Sequence[Source],
        *,
        default_namespace: str,
        dry_run: bool,
        wait: bool,
        confirm: bool = False,
    ) -> Applied:
        """Raises DocumentsInvalid, NoDocuments, PolicyTooLarge, NodeIsolated: nothing was stored.

        Raises IdentityUnavailable, and with `wait` NotRealised.
        """
        documents: dict[PolicyName, Document] = {}
        faults: list[Fault] = []
        warnings: list[Fault] = []
        for source in sources:
            # Reading a large text must not hold the loop.
            result = await asyncio.to_thread(
                parse_documents,
                source.text,
                source=source.name,
                default_namespace=default_namespace or "default",
            )
            faults += result.faults
            warnings += result.warnings
            for document in result.documents:
                name = PolicyEntry.of(document).name
                if name in documents:
                    faults.append(
                        Fault(
                            document.ref,
                            "metadata.name",
                            f"the same policy is given before, in {documents[name].origin}",
                            document.origin,
                        )
                    )
                documents[name] = document
        if faults:
            raise DocumentsInvalid(faults)
        if not documents:
            raise NoDocuments
        isolated = self._isolated_nodes(documents)
        if isolated and not confirm and not dry_run:
            raise NodeIsolated(
                f"{isolated[0].document} would isolate {isolated[0].message} that was open "
                f"({isolated[0].origin}): who is not allowed is cut off from it"
            )
        if dry_run and not confirm:
            warnings += [
                replace(x, message=f"isolates {x.message} that was open: --confirm is needed")
                for x in isolated
            ]
        await self._refuse_overflow(documents)
        warnings += await self._lint(documents.values())
        concerned = [*documents.values(), *self._in_force(documents)]
        failed_before = frozenset(self._regeneration.failing)
        entries = [PolicyEntry.of(document) for document in documents.values()]
        trial = isolated and not dry_run
        waited = self._confirmation.waiting
        if trial:
            self._confirmation.begin(entries)
        with self._regeneration.expecting(documents):
            try:
                revision, outcomes = await self._client.apply_policies(entries, dry_run=dry_run)
            except DomainError as error:
                if (
                    trial and error.kind is not Kind.UNAVAILABLE
                ):  # else it may be stored all the same
                    self._confirmation.cancel(waited)
                raise
            realised = False
            if wait and not dry_run:
                wanted = {entry.name: entry for entry in entries}
                await self._wait(
                    lambda: all(self._view.policies.get(name) == e for name, e in wanted.items()),
                    concerned=concerned,
                    failed_before=failed_before,
                    told=_APPLIED,
                )
                realised = True
        within_s = CONFIRM_S if trial else 0
        return Applied(revision, outcomes, tuple(warnings), realised, within_s)

    def _isolated_nodes(self, documents: Mapping[PolicyName, Document]) -> list[Fault]:
        """Where these would isolate a node that is open now: this one, by all rules there are; of
        others, those whom a selector names that isolates nobody yet."""
        calculation, labels = self._regeneration.calculation, self._regeneration.node_labels
        present = calculation.documents
        after = {**present, **documents}
        found = []
        for egress in (False, True):
            direction = "egress" if egress else "ingress"
            open_now = not any(
                rule.selector.matches(labels) for rule, _ in _isolating(present.values(), egress)
            )
            known = {rule.selector for rule, _ in _isolating(present.values(), egress)}
            for rule, document in _isolating(after.values(), egress):
                if PolicyEntry.of(document).name not in documents:
                    continue
                here = rule.selector.matches(labels)
                if open_now if here else rule.selector not in known:
                    path, origin = rule.isolates(egress) or ("", document.origin)
                    who = "this node" if here else f"nodes with {rule.selector}"
                    found.append(Fault(document.ref, path, f"{who} on {direction}", origin))
        return found

    def confirm(self) -> tuple[PolicyName, ...]:
        """Keep the policies that were applied on trial. Raises NothingToConfirm."""
        return self._confirmation.confirm()

    async def delete(
        self, names: Sequence[PolicyName], *, everything: bool, wait: bool
    ) -> tuple[int, tuple[Outcome, ...]]:
        """Raises PolicyNotFound (then nothing was deleted), IdentityUnavailable, NotRealised."""
        if not everything:
            if not names:
                raise NoDocuments
            missing = [name for name in names if name not in self._view.policies]
            if missing and self._view.live:
                raise PolicyNotFound(missing)
        concerned = self._in_force(self._view.policies if everything else names)
        failed_before = frozenset(self._regeneration.failing)
        revision, outcomes = await self._client.delete_policies(names, everything=everything)
        if wait:
            gone = [PolicyName(o.kind, o.namespace, o.name) for o in outcomes]
            await self._wait(
                lambda: not any(name in self._view.policies for name in gone),
                concerned=concerned,
                failed_before=failed_before,
                told=_DELETED,
            )
        return revision, outcomes

    async def _lint(self, documents: Iterable[Document]) -> tuple[Fault, ...]:
        """What is legal and probably not meant, for the endpoints and enforcers of this node."""
        calculation = self._regeneration.calculation
        names, services = calculation.engine.watched
        enforcers = Enforcers(parsers=calculation.engine.enforcers, names=names, services=services)
        endpoints = {
            name: subject.labels
            for subject in calculation.subjects.values()
            for name in subject.users.values()
        }
        before = tuple(calculation.documents.values())
        given = tuple(documents)
        # A large policy set must not hold the loop; documents never change.
        return await asyncio.to_thread(lint, given, endpoints, before=before, enforcers=enforcers)

    def _in_force(self, names: Iterable[PolicyName]) -> list[Document]:
        """The present form of these."""
        documents = self._regeneration.calculation.documents
        return [documents[name] for name in names if name in documents]

    async def _refuse_overflow(self, documents: Mapping[PolicyName, Document]) -> None:
        """Raises PolicyTooLarge if the policy of an endpoint here would not fit its map.

        One that is too large already may be made smaller, step by step. What other nodes store,
        and new identities, are met later: the policy map refuses what does not fit.
        """
        limit = self._regeneration.policy_limit
        for preview in self._regeneration.calculation.preview(documents):
            if preview.rows > limit and preview.rows > preview.rows_now:
                raise PolicyTooLarge(
                    preview.subject,
                    preview.users,
                    needed=preview.rows,
                    allowed=limit,
                    outcome="nothing was changed",
                )
            await asyncio.sleep(0)  # a large policy set must not hold the loop

    async def _wait(
        self,
        known: Callable[[], bool],
        *,
        concerned: Sequence[Document],
        failed_before: Collection[SubjectKey],
        told: _Told,
    ) -> None:
        """Until the view has it, and then until what follows from it is in the kernel."""

        def failing() -> str:
            """Of whom the documents are about, and of whom nothing was known to fail before."""
            about = self._regeneration.calculation.subjects_of(concerned)
            failures = self._regeneration.failing
            return "; ".join(
                failures[key] for key in failures if key in about or key not in failed_before
            )

        try:
            async with asyncio.timeout(self._wait_timeout_s):
                async with self._changed:
                    await self._changed.wait_for(known)
                await self._regeneration.wait_folded()
        except TimeoutError:
            why = failing()
            raise NotRealised(
                f"{told.done}, but {told.late} within {self._wait_timeout_s:g} s"
                + (f": {why}" if why else ""),
                cure=told.late_cure,
            ) from None
        if why := failing():
            raise NotRealised(
                f"{told.done}, but {told.failed}: {why}", kind=Kind.EXHAUSTED, cure=told.failed_cure
            )
