"""What a question about policy is about: documents and endpoints, from files or from the agent.

With `--policies` nothing is asked of any service, and gRPC is not even imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final, Literal

from cilia.identity import HOST, reserved_labels
from cilia.labels import Label, Labels
from cilia.policy import (
    PROTO_BY_NAME,
    Document,
    DocumentError,
    Origin,
    RuleRef,
    document_from_parts,
)
from cilia.policy.questions.inventory import (
    DEFAULT_CLUSTER,
    EndpointPort,
    Inventory,
    InventoryEndpoint,
    InventoryError,
    parse_inventory,
)
from cilia.policy.questions.judge import Answer, Judged
from cilia.policy.questions.scene import Scene
from cli import documents, render
from cli.errors import CliError, Exit
from cli.settings import Settings

Mode = Literal["default", "always", "never"]
MODES: Final[dict[str, Mode]] = {"default": "default", "always": "always", "never": "never"}


@dataclass(frozen=True, slots=True)
class Asked:
    """Everything a question needs; `live` says whether the agent was asked."""

    documents: tuple[Document, ...]
    inventory: Inventory
    mode: Mode
    live: bool
    # What verdicts depend on besides; of files, whoever would be needed is taken to be there.
    parsers: tuple[str, ...] | None = None
    allow_localhost: bool = True
    cluster: str = DEFAULT_CLUSTER
    texts: Mapping[str, str] = field(default_factory=dict)  # of the documents' files, by name

    def about(self, inventory: Inventory) -> Asked:
        """The same documents, about other endpoints."""
        return replace(self, inventory=inventory)

    def scene(self) -> Scene:
        """An engine with all of it."""
        return self.make(self.documents, self.inventory)

    def make(self, documents: Iterable[Document], inventory: Inventory, **more: Any) -> Scene:
        """A scene with these settings and other documents."""
        return Scene(
            documents,
            inventory,
            mode=self.mode,
            allow_localhost=self.allow_localhost,
            cluster_name=self.cluster,
            parsers=self.parsers,
            **more,
        )


def load(
    settings: Settings,
    *,
    policies: Sequence[str],
    endpoints: str | None,
    enforcement: str | None,
    namespace: str = "default",
    need_endpoints: bool = True,
) -> Asked:
    """Read the files, and ask the agent for what they are not given for. Raises CliError."""
    mode = MODES.get(enforcement or "")
    if policies:
        if endpoints is None and need_endpoints:
            raise CliError(
                "--policies needs --endpoints: a matrix is about endpoints",
                code=Exit.USAGE,
                hint="Its form is in docs/cli.md; without --policies the agent is asked for both.",
            )
        sources = documents.read(policies)
        return Asked(
            _checked(sources, namespace),
            read_inventory(endpoints) if endpoints is not None else Inventory(),
            mode or "default",
            live=False,
            texts={x.name: x.text.decode("utf-8-sig", "replace") for x in sources},
        )
    asked = _live(settings)
    if endpoints is not None:
        asked = replace(asked, inventory=read_inventory(endpoints))
    if mode is None:
        return asked
    alike = tuple(replace(x, mode=None) for x in asked.inventory.endpoints)
    return replace(asked, mode=mode, inventory=replace(asked.inventory, endpoints=alike))


def read_documents(paths: Sequence[str], namespace: str = "default") -> tuple[Document, ...]:
    """Documents of files and directories, as applying them one after the other would leave them.

    Raises CliError with every fault.
    """
    return _checked(documents.read(paths), namespace)


def _checked(sources: Sequence[documents.Source], namespace: str) -> tuple[Document, ...]:
    checked = documents.check(sources, default_namespace=namespace)
    if checked.faults:
        raise documents.invalid(checked.faults, changed_nothing=False)
    found: dict[object, Document] = {}
    for document in checked.documents:
        if (before := found.get(document.key)) is not None:
            render.warn(
                f"warning: {document.origin}: {document.ref} is also the name of the one at "
                f"{before.origin}: the later one counts, as when both are applied"
            )
        found[document.key] = document
    return tuple(found.values())


def read_inventory(path: str) -> Inventory:
    """Endpoints of a file. Raises CliError with every fault."""
    source = documents.read([path])[0]
    try:
        return parse_inventory(source.text, source=source.name)
    except InventoryError as error:
        faults = [documents.fault_line(x) for x in error.faults]
        raise CliError(
            f"invalid endpoints: {render.count(len(faults), 'fault')}",
            code=Exit.INVALID,
            faults=faults,
        ) from error


def _live(settings: Settings) -> Asked:
    """What the agent has now. Documents keep the files and lines they were written at."""
    from cli import clients  # gRPC: needed only here
    from protos.agent.v1 import agent_pb2
    from protos.identity.v1 import identity_pb2

    async def fetch(
        agent: clients.Agent,
    ) -> tuple[list[identity_pb2.Policy], list[agent_pb2.Endpoint], agent_pb2.StatusResponse]:
        policies = await agent.policy.Get(agent_pb2.GetPoliciesRequest(), timeout=agent.timeout_s)
        found = await agent.endpoint.List(agent_pb2.ListEndpointsRequest(), timeout=agent.timeout_s)
        status = await agent.status.Status(agent_pb2.StatusRequest(), timeout=agent.timeout_s)
        return list(policies.policies), list(found.endpoints), status

    items, endpoints, status = clients.agent(settings, fetch)
    try:
        stored = tuple(
            document_from_parts(
                kind=x.kind,
                namespace=x.namespace or None,
                name=x.name,
                body=x.document,
                origin=Origin(x.origin.source, x.origin.line, x.origin.column),
                origins={
                    o.path: Origin(o.origin.source, o.origin.line, o.origin.column)
                    for o in x.rule_origins
                },
            )
            for x in items
        )
    except DocumentError as error:
        raise CliError(
            "the agent holds a policy that this command cannot read",
            code=Exit.INVALID,
            hint="Is the command older than the agent? See `cilia version`.",
            faults=[documents.fault_line(x) for x in error.faults],
        ) from error
    known = sorted(endpoints, key=lambda x: (x.namespace, x.name, x.id))
    inventory = Inventory(
        endpoints=tuple(
            InventoryEndpoint(
                name=x.name,
                namespace=x.namespace,
                labels=Labels(
                    Label(y.source, y.key, y.value) for y in (x.identity_labels or x.labels)
                ),
                ips=tuple(ip_address(y) for y in (x.ipv4, x.ipv6) if y),
                ports=tuple(
                    EndpointPort(y.name, y.port, PROTO_BY_NAME[y.protocol.upper() or "TCP"])
                    for y in x.ports
                ),
                mode=MODES.get(x.options.get("PolicyEnforcement", "")),
            )
            for x in known
        ),
        host=Labels(
            (
                *reserved_labels(HOST),
                *(Label(y.source, y.key, y.value) for y in status.policy.node_labels),
            )
        ),
    )
    return Asked(
        stored,
        inventory,
        MODES.get(status.enforcement_mode, "default"),
        live=True,
        parsers=tuple(status.policy.l7_parsers),
        allow_localhost=status.policy.allow_localhost,
        cluster=status.policy.cluster or DEFAULT_CLUSTER,
        texts=_files_of(stored),
    )


def _files_of(stored: Sequence[Document]) -> dict[str, str]:
    """The files that stored documents were applied from, as far as they are here and unchanged."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(x.origin.source for x in stored):
        try:
            text = Path(name).read_bytes()
        except (OSError, ValueError):
            continue
        mine = [x for x in stored if x.origin.source == name]
        parsed = documents.check([documents.Source(name, text)], default_namespace="default")
        here = {x.key: x for x in parsed.documents}
        if all(x.key in here and here[x.key] == x for x in mine):
            found[name] = text.decode("utf-8-sig", "replace")
    return found


# ---- answers


def rule_shape(ref: RuleRef) -> dict[str, Any]:
    """``{id, name, path, file, line, column}``"""
    return {
        "id": int(ref.rule_id),
        "name": ref.policy,
        "path": ref.path,
        "file": ref.origin.source or None,
        "line": ref.origin.line or None,
        "column": ref.origin.column or None,
    }


def rule_text(shape: dict[str, Any]) -> str:
    """`CiliumNetworkPolicy default/rule1 spec.ingress[0] (file:line:column)`"""
    place = ":".join(str(shape[x]) for x in ("file", "line", "column") if shape[x] is not None)
    return f"{shape['name']} {shape['path']}" + (f" ({place})" if place else "")


def judged_shape(judged: Judged) -> dict[str, Any]:
    """One end's answer."""
    return {
        "verdict": "allowed" if judged.allowed else "denied",
        "enforced": judged.enforced,
        "reason": judged.reason,
        "rules": [rule_shape(x) for x in judged.rules],
        "default_deny": [rule_shape(x) for x in judged.default_deny],
    }


def trace_shape(answer: Answer) -> dict[str, Any]:
    """Both ends' answers, as the agent gives them too."""
    return {
        "verdict": "allowed" if answer.allowed else "denied",
        "egress": judged_shape(answer.egress),
        "ingress": judged_shape(answer.ingress),
    }
