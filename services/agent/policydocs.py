"""Policy documents as people apply them: checked here, stored in the cluster, enforced by everyone.

All or nothing: a batch with one fault changes nothing, and every fault is named. With `wait`, a
call returns when this node's endpoints enforce what was stored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cilia.errors import DomainError, InvalidError, Kind, NotFoundError
from cilia.policy import Document, Fault, parse_documents
from services.agent.clients import IdentityClient, Outcome
from services.agent.clusterwatch import ClusterView, PolicyEntry, PolicyName
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
    """It is stored, but this node does not enforce it yet."""

    default_kind = Kind.DEADLINE
    default_cure = "It is stored and will be enforced; `cilia status` says what is in the way"


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


class PolicyDocuments:
    def __init__(
        self,
        *,
        client: IdentityClient,
        view: ClusterView,
        regeneration: Regeneration,
        changed: asyncio.Condition,
        wait_timeout_s: float,
    ) -> None:
        self._client = client
        self._view = view
        self._regeneration = regeneration
        self._changed = changed
        self._wait_timeout_s = wait_timeout_s

    async def apply(
        self, sources: Sequence[Source], *, default_namespace: str, dry_run: bool, wait: bool
    ) -> Applied:
        """Raises DocumentsInvalid, NoDocuments, IdentityUnavailable, NotRealised."""
        documents: dict[PolicyName, Document] = {}
        faults: list[Fault] = []
        warnings: list[Fault] = []
        for source in sources:
            result = parse_documents(
                source.text, source=source.name, default_namespace=default_namespace or "default"
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
        entries = [PolicyEntry.of(document) for document in documents.values()]
        revision, outcomes = await self._client.apply_policies(entries, dry_run=dry_run)
        realised = False
        if wait and not dry_run:
            wanted = {entry.name: entry for entry in entries}
            await self._wait(
                lambda: all(self._view.policies.get(name) == e for name, e in wanted.items())
            )
            realised = True
        return Applied(revision, outcomes, tuple(warnings), realised)

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
        revision, outcomes = await self._client.delete_policies(names, everything=everything)
        if wait:
            gone = [PolicyName(o.kind, o.namespace, o.name) for o in outcomes]
            await self._wait(lambda: not any(name in self._view.policies for name in gone))
        return revision, outcomes

    async def _wait(self, known: object) -> None:
        """Until the view has it, and then until what follows from it is in the kernel."""
        assert callable(known)
        try:
            async with asyncio.timeout(self._wait_timeout_s):
                async with self._changed:
                    await self._changed.wait_for(known)
                await self._regeneration.wait_folded()
        except TimeoutError:
            failing = "; ".join(
                f"{subject}: {why}" for subject, why in self._regeneration.failing.items()
            )
            raise NotRealised(
                f"the policy is stored, but was not enforced within {self._wait_timeout_s:g} s"
                + (f": {failing}" if failing else "")
            ) from None
        failing = "; ".join(self._regeneration.failing.values())
        if failing:
            raise NotRealised(
                f"the policy is stored, but cannot be enforced: {failing}",
                kind=Kind.EXHAUSTED,
                cure="The old policy stays until then; `cilia status` shows whether it still fails",
            )
