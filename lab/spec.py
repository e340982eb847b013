"""A lab file: YAML into frozen types, every fault with its field and line.

name: star-wars
nodes: [{name: node1}]                # one for now; this is the default
pools: {ipv4: 10.217.0.0/16, ipv6: "fd00:c111::/64"}
enforcement: default                  # default | always | never
policies: [../policies/star-wars/l3-l4.yaml]   # relative to this file; in force before any workload
workloads:
  - name: deathstar
    namespace: default
    labels: {org: empire, class: deathstar}    # or ["k8s:org=empire", ...]
    replicas: 2                       # deathstar-1, deathstar-2; `deathstar` resolves to both
    command: python -m lab.httpd --name deathstar   # or a list; none: an empty namespace
    ports: [80]                       # `up` waits until these listen
    env: {COLOUR: black}
    annotations: {io.cilium.proxy-visibility: <Ingress/80/TCP/HTTP>}   # shows requests
"""

from __future__ import annotations

import ipaddress
import re
import shlex
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

from cilia.labels import Label, LabelError
from cilia.policy import VISIBILITY_ANNOTATION, parse_visibility
from lab.errors import LabInvalid, LabNotFound
from lab.names import LAB_NAME, RESERVED_NODE_NAMES

DNS_LABEL = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?\Z")
DEFAULT_POOL4 = "10.217.0.0/16"
DEFAULT_POOL6 = "fd00:c111::/64"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpec:
    """A node; `agent_args` and the like are added to the services' command lines. `xds`: it has
    the xDS service, and with it Envoy; `flows`: the flow service."""

    name: str
    agent_args: tuple[str, ...] = ()
    identity_args: tuple[str, ...] = ()
    xds: bool = False
    xds_args: tuple[str, ...] = ()
    flows: bool = False
    flows_args: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSpec:
    """One workload, replicas already told apart. `group` is the name all replicas share."""

    name: str
    group: str
    namespace: str
    labels: tuple[str, ...]
    command: tuple[str, ...]
    ports: tuple[int, ...]
    env: tuple[tuple[str, str], ...]
    annotations: tuple[tuple[str, str], ...]
    node: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LabSpec:
    """A whole lab."""

    name: str
    nodes: tuple[NodeSpec, ...]
    pool4: str
    pool6: str
    enforcement: str
    policies: tuple[Path, ...]
    workloads: tuple[WorkloadSpec, ...]
    source: str


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Node(_Document):
    name: str = "node1"
    agent_args: list[str] = []
    identity_args: list[str] = []
    xds: bool = False
    xds_args: list[str] = []
    flows: bool = False
    flows_args: list[str] = []

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not LAB_NAME.match(value) or value in RESERVED_NODE_NAMES:
            raise ValueError(
                "a node's name is lower case letters, digits and dashes, at most 24, and none of "
                + ", ".join(sorted(RESERVED_NODE_NAMES))
            )
        return value


class _Pools(_Document):
    ipv4: str = DEFAULT_POOL4
    ipv6: str = DEFAULT_POOL6

    @field_validator("ipv4")
    @classmethod
    def _ipv4(cls, value: str) -> str:
        return str(ipaddress.IPv4Network(value))

    @field_validator("ipv6")
    @classmethod
    def _ipv6(cls, value: str) -> str:
        return str(ipaddress.IPv6Network(value))


Port = Annotated[int, Field(ge=1, le=65535)]


class _Workload(_Document):
    name: str
    namespace: str = "default"
    labels: dict[str, str | int | bool] | list[str] = Field(default_factory=list)
    replicas: Annotated[int, Field(ge=1, le=250)] = 1
    command: str | list[str] = Field(default_factory=list)
    ports: list[Port] = []
    env: dict[str, str | int] = {}
    annotations: dict[str, str] = {}
    node: str | None = None

    @field_validator("name", "namespace")
    @classmethod
    def _dns_label(cls, value: str) -> str:
        if not DNS_LABEL.match(value):
            raise ValueError("must be lower case letters, digits and dashes, at most 63")
        return value

    @field_validator("labels")
    @classmethod
    def _labels(cls, value: dict[str, Any] | list[str]) -> list[str]:
        texts = (
            [f"{key}={_scalar(item)}" for key, item in value.items()]
            if isinstance(value, dict)
            else value
        )
        try:
            return [str(_as_kubernetes(Label.parse(text))) for text in texts]
        except LabelError as error:
            raise ValueError(str(error)) from error

    @field_validator("annotations")
    @classmethod
    def _annotations(cls, value: dict[str, str]) -> dict[str, str]:
        for key, text in value.items():
            if key != VISIBILITY_ANNOTATION:
                raise ValueError(f"{key} means nothing here; there is {VISIBILITY_ANNOTATION}")
            parse_visibility(text)
        return value

    @field_validator("command")
    @classmethod
    def _command(cls, value: str | list[str]) -> list[str]:
        return shlex.split(value) if isinstance(value, str) else value


class _Lab(_Document):
    name: str
    nodes: list[_Node] = Field(default_factory=lambda: [_Node()])
    pools: _Pools = Field(default_factory=_Pools)
    enforcement: Literal["default", "always", "never"] = "default"
    policies: list[str] = []
    workloads: list[_Workload] = []

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not LAB_NAME.match(value):
            raise ValueError("must be lower case letters, digits and dashes, at most 24")
        return value

    @field_validator("nodes")
    @classmethod
    def _nodes(cls, value: list[_Node]) -> list[_Node]:
        if len(value) != 1:
            raise ValueError(f"{len(value)} nodes: a lab has exactly one node for now")
        return value


def _as_kubernetes(label: Label) -> Label:
    """A label without a source is written as Kubernetes writes labels, and means what it means
    there; the command takes it the same way."""
    return Label("k8s", label.key, label.value) if label.source == "unspec" else label


def _scalar(value: object) -> str:
    if isinstance(value, bool):  # YAML's `true`; labels are text
        return "true" if value else "false"
    return str(value)


def load(path: Path, *, name: str | None = None) -> LabSpec:
    """Read a lab file; `name` overrides the lab's name. Raises LabInvalid, LabNotFound."""
    try:
        text = path.read_text()
    except FileNotFoundError as error:
        raise LabNotFound(
            f"no lab file {path}", cure="There are some to start from in examples/lab."
        ) from error
    except OSError as error:
        raise LabInvalid(f"cannot read lab file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise LabInvalid(f"{path} is not text: {error}") from error
    return parse(text, source=str(path), base=path.resolve().parent, name=name)


def parse(text: str, *, source: str, base: Path, name: str | None = None) -> LabSpec:
    """Parse a lab file's text. Raises LabInvalid naming every fault."""
    try:
        tree = YAML(typ="rt").load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark is not None else ""
        raise LabInvalid(f"{source}{place}: {error.problem}") from error
    if not isinstance(tree, MutableMapping):
        raise LabInvalid(f"{source}: a lab file is a mapping with `name` and `workloads`")
    if "kind" in tree and "apiVersion" in tree:
        raise LabInvalid(
            f"{source}: this is a {tree['kind']}, not a lab",
            cure="`cilia policy apply` takes policies; a lab is as examples/lab/star-wars.yaml",
        )
    if name is not None:
        tree["name"] = name
    try:
        document = _Lab.model_validate(_plain(tree))
    except ValidationError as error:
        faults = [_fault(source, tree, item["loc"], item["msg"]) for item in error.errors()]
        raise LabInvalid("\n".join(faults)) from error
    return _to_spec(document, source=source, base=base)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


_IN_OUR_WORDS = {
    "Extra inputs are not permitted": "unknown field",
    "Field required": "is missing",
    "Input should be a valid list": "must be a list",
}


def _fault(source: str, tree: Any, loc: tuple[int | str, ...], message: str) -> str:
    line = 0
    node = tree
    path = ""
    for part in loc:
        try:
            mark = node.lc.key(part) if isinstance(part, str) else node.lc.item(part)
            line = mark[0] + 1
            node = node[part]
        except (AttributeError, KeyError, IndexError, TypeError):
            if isinstance(part, str) and part.startswith(("dict", "list", "str", "int", "bool")):
                continue  # pydantic names the branch of a union; the reader wrote none
        path += f"[{part}]" if isinstance(part, int) else (f".{part}" if path else part)
    place = f"{source}:{line}" if line else source
    message = _IN_OUR_WORDS.get(message, message.removeprefix("Value error, "))
    return f"{place}: {path}: {message}"


def _to_spec(document: _Lab, *, source: str, base: Path) -> LabSpec:
    nodes = tuple(
        NodeSpec(
            name=n.name,
            agent_args=tuple(n.agent_args),
            identity_args=tuple(n.identity_args),
            xds=n.xds,
            xds_args=tuple(n.xds_args),
            flows=n.flows,
            flows_args=tuple(n.flows_args),
        )
        for n in document.nodes
    )
    known = {n.name for n in nodes}
    workloads: list[WorkloadSpec] = []
    seen: set[tuple[str, str]] = set()
    for index, item in enumerate(document.workloads):
        node = item.node or nodes[0].name
        if node not in known:
            raise LabInvalid(f"{source}: workloads[{index}].node: no node {node!r} in this lab")
        for number in range(1, item.replicas + 1):
            name = item.name if item.replicas == 1 else f"{item.name}-{number}"
            if (item.namespace, name) in seen:
                raise LabInvalid(
                    f"{source}: workloads[{index}].name: {item.namespace}/{name} is there twice"
                )
            seen.add((item.namespace, name))
            assert isinstance(item.labels, list)
            workloads.append(
                WorkloadSpec(
                    name=name,
                    group=item.name,
                    namespace=item.namespace,
                    labels=tuple(item.labels),
                    command=tuple(item.command),
                    ports=tuple(item.ports),
                    env=tuple((key, str(value)) for key, value in item.env.items()),
                    annotations=tuple(item.annotations.items()),
                    node=node,
                )
            )
    policies = tuple(base / text for text in document.policies)
    for path in policies:
        if not path.is_file():
            raise LabInvalid(f"{source}: policies: no file {path}")
    return LabSpec(
        name=document.name,
        nodes=nodes,
        pool4=document.pools.ipv4,
        pool6=document.pools.ipv6,
        enforcement=document.enforcement,
        policies=policies,
        workloads=tuple(workloads),
        source=source,
    )
