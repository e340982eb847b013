"""The options of `cilia flows observe` as Hubble's filters.

A two-sided option (`--pod`, `--ip`, `--port`) makes two filters: one for it as the source, one as
the destination; each carries all the one-sided conditions too. `--not` sends the option behind it
to the filters that hide: all that is negated forms one filter, which hides what matches all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import click

from cilia.identity import RESERVED_BY_NAME
from cilia.observation import POINTS
from cli.errors import CliError, Exit
from protos.hubble.v1 import flow_pb2

VERDICTS: Final = ("FORWARDED", "DROPPED", "AUDIT", "REDIRECTED", "ERROR", "TRACED", "TRANSLATED")
TYPES: Final = {"drop": 1, "trace": 4, "policy-verdict": 5, "trace-sock": 7, "l7": 129}
_POINTS: Final = {name: number for number, name in POINTS.items()}


@dataclass(frozen=True, slots=True)
class Condition:
    """An option: its name, the field of FlowFilter, and what makes a value of a text."""

    option: str
    help: str
    field: str  # without source_ or destination_ when two-sided
    metavar: str = "TEXT"
    two_sided: bool = False
    value: Callable[[str], Any] = str
    short: str = ""


def _bad(option: str, text: str, expected: str) -> CliError:
    return CliError(f"--{option} {text}: {expected}", code=Exit.USAGE)


def _verdict(text: str) -> int:
    try:
        return flow_pb2.Verdict.Value(text.upper())
    except ValueError:
        raise _bad("verdict", text, f"one of {', '.join(VERDICTS)}") from None


def _type(text: str) -> flow_pb2.EventTypeFilter:
    kind, _, sub = text.partition(":")
    if kind not in TYPES:
        raise _bad("type", text, f"one of {', '.join(TYPES)}, or trace:to-endpoint and the like")
    out = flow_pb2.EventTypeFilter(type=TYPES[kind])
    if sub:
        out.match_sub_type = True
        if kind == "trace" and sub in _POINTS:
            out.sub_type = _POINTS[sub]
        elif sub.isdigit():
            out.sub_type = int(sub)
        else:
            raise _bad("type", text, f"trace points are {', '.join(_POINTS)}")
    return out


def _direction(text: str) -> int:
    try:
        return flow_pb2.TrafficDirection.Value(text.upper())
    except ValueError:
        raise _bad("traffic-direction", text, "ingress or egress") from None


def _reason(text: str) -> int:
    if text.isdigit():
        return int(text)
    try:
        return flow_pb2.DropReason.Value(text.upper().replace("-", "_"))
    except ValueError:
        raise _bad(
            "drop-reason-desc", text, "a reason such as POLICY_DENIED, or its number"
        ) from None


def _identity(text: str) -> int:
    if text.isdigit() and int(text) < 1 << 32:
        return int(text)
    if text in RESERVED_BY_NAME:
        return RESERVED_BY_NAME[text]
    raise _bad("identity", text, f"a number, or one of {', '.join(RESERVED_BY_NAME)}")


def _flags(text: str) -> flow_pb2.TCPFlags:
    out = flow_pb2.TCPFlags()
    for name in text.upper().split(","):
        if name not in flow_pb2.TCPFlags.DESCRIPTOR.fields_by_name:
            raise _bad("tcp-flags", text, "flags such as syn,ack")
        setattr(out, name, True)
    return out


def _version(text: str) -> int:
    versions = {"4": flow_pb2.IPv4, "6": flow_pb2.IPv6}
    if text.lower().removeprefix("ipv").removeprefix("v") not in versions:
        raise _bad("ip-version", text, "4 or 6")
    return versions[text.lower().removeprefix("ipv").removeprefix("v")]


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise _bad("reply", text, "true or false")
    return text.lower() == "true"


def _header(text: str) -> flow_pb2.HTTPHeader:
    key, colon, value = text.partition(":")
    if not colon:
        raise _bad("http-header", text, "NAME:VALUE")
    return flow_pb2.HTTPHeader(key=key, value=value.strip())


def _workload(text: str) -> flow_pb2.Workload:
    kind, slash, name = text.rpartition("/")
    return flow_pb2.Workload(name=name, kind=kind if slash else "")


def _interface(text: str) -> flow_pb2.NetworkInterface:
    if text.isdigit():
        return flow_pb2.NetworkInterface(index=int(text))
    return flow_pb2.NetworkInterface(name=text)


CONDITIONS: Final = (
    Condition("verdict", "What became of it: DROPPED, FORWARDED, ...", "verdict", "VERDICT",
              value=_verdict),
    Condition("type", "drop, trace, policy-verdict, l7; trace:to-endpoint.", "event_type", "TYPE",
              value=_type, short="t"),
    Condition("protocol", "tcp, udp, icmp, sctp, http, dns, ...", "protocol", "PROTOCOL"),
    Condition("pod", "A workload: namespace/prefix, or prefix in namespace default.", "pod",
              "[NS/]NAME", two_sided=True),
    Condition("namespace", "All workloads of a namespace.", "pod", "NS", two_sided=True,
              value=lambda text: f"{text}/", short="n"),
    Condition("label", "A selector: app=web, app in (a,b), !app.", "label", "SELECTOR",
              two_sided=True, short="l"),
    Condition("ip", "An address or a CIDR.", "ip", "IP", two_sided=True),
    Condition("port", "A port number.", "port", "PORT", two_sided=True),
    Condition("identity", "A numeric identity, or host, world, ...", "identity", "ID",
              two_sided=True, value=_identity),
    Condition("fqdn", "A DNS name; * stands for any run.", "fqdn", "NAME", two_sided=True),
    Condition("service", "namespace/prefix of a service.", "service", "[NS/]NAME", two_sided=True),
    Condition("workload", "[KIND/]NAME of a workload.", "workload", "[KIND/]NAME", two_sided=True,
              value=_workload),
    Condition("cluster", "A cluster's name.", "cluster_name", "NAME", two_sided=True),
    Condition("http-status", "404, or 4+ for all that begin so.", "http_status_code", "CODE"),
    Condition("http-method", "GET, POST, ...", "http_method", "METHOD"),
    Condition("http-path", "A regular expression (RE2) on the path.", "http_path", "REGEX"),
    Condition("http-url", "A regular expression (RE2) on the URL.", "http_url", "REGEX"),
    Condition("http-header", "A header and its value.", "http_header", "NAME:VALUE",
              value=_header),
    Condition("dns-query", "A regular expression (RE2) on the name asked for.", "dns_query",
              "REGEX"),
    Condition("tcp-flags", "Flags that are all set: syn,ack.", "tcp_flags", "FLAGS",
              value=_flags),
    Condition("traffic-direction", "ingress or egress.", "traffic_direction", "DIRECTION",
              value=_direction),
    Condition("drop-reason-desc", "POLICY_DENIED, ... or a number.", "drop_reason_desc", "REASON",
              value=_reason),
    Condition("reply", "Whether it is a reply: true or false.", "reply", "BOOL", value=_truth),
    Condition("ip-version", "4 or 6.", "ip_version", "VERSION", value=_version),
    Condition("interface", "An interface's name or index.", "interface", "NAME",
              value=_interface),
    Condition("node-name", "[cluster/]node; * stands for any run.", "node_name", "NAME"),
    Condition("node-label", "A selector on the node's labels.", "node_labels", "SELECTOR"),
    Condition("uuid", "One flow, by its uuid.", "uuid", "UUID"),
    Condition("trace-id", "A trace id.", "trace_id", "ID"),
)  # fmt: skip

_BY_OPTION: Final = {condition.option: condition for condition in CONDITIONS}
_SHORT: Final = {f"-{c.short}": f"--{c.option}" for c in CONDITIONS if c.short}
_SIDES: Final = ("", "from-", "to-")


def _names(condition: Condition) -> list[str]:
    if not condition.two_sided:
        return [condition.option]
    return [f"{side}{condition.option}" for side in _SIDES]


def options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds all conditions, and a hidden negated twin of each, as options of a command."""
    for condition in reversed(CONDITIONS):
        for name in reversed(_names(condition)):
            for prefix in ("not-", ""):
                declared = [f"--{prefix}{name}"]
                if condition.short and not prefix and name == condition.option:
                    declared.insert(0, f"-{condition.short}")
                side = {"from-": " As the source.", "to-": " As the destination."}.get(
                    name.removesuffix(condition.option), ""
                )
                function = click.option(
                    *declared,
                    multiple=True,
                    metavar=condition.metavar,
                    help=condition.help + side,
                    hidden=bool(prefix) or bool(side),
                )(function)
    return function


def fold_not(args: Sequence[str]) -> list[str]:
    """`--not --verdict X` as `--not-verdict X`. Raises CliError for a --not with nothing behind."""
    out: list[str] = []
    waiting = False
    known = {f"--{name}" for condition in CONDITIONS for name in _names(condition)}
    for arg in args:
        if arg == "--not":
            waiting = True
        elif waiting:
            name, equals, value = arg.partition("=")
            name = _SHORT.get(name, name)
            if name not in known:
                raise CliError(
                    f"--not {arg}: only a filter can be negated, as in --not --verdict FORWARDED",
                    code=Exit.USAGE,
                )
            out.append(f"--not-{name[2:]}{equals}{value}")
            waiting = False
        else:
            out.append(arg)
    if waiting:
        raise CliError("--not needs a filter behind it", code=Exit.USAGE)
    return out


def build(
    given: dict[str, Sequence[str]], *, negated: bool = False, cel: Sequence[str] = ()
) -> list[flow_pb2.FlowFilter]:
    """The filters of all options that were given (by option name with underscores)."""
    prefix = "not_" if negated else ""
    common = flow_pb2.FlowFilter()
    sides = (flow_pb2.FlowFilter(), flow_pb2.FlowFilter())
    two_sided = False

    def add(target: flow_pb2.FlowFilter, field: str, value: Any) -> None:
        repeated = getattr(target, field)
        if isinstance(value, str | int | bool):
            repeated.append(value)
        else:
            repeated.add().CopyFrom(value)

    for name, texts in _joined(given, prefix).items():
        side = next((s for s in ("from-", "to-") if name.startswith(s)), "")
        condition = _BY_OPTION[name.removeprefix(side)]
        for value in map(condition.value, texts):
            if not condition.two_sided:
                add(common, condition.field, value)
            elif side:
                end = "source" if side == "from-" else "destination"
                add(common, f"{end}_{condition.field}", value)
            else:
                two_sided = True
                add(sides[0], f"source_{condition.field}", value)
                add(sides[1], f"destination_{condition.field}", value)
    if cel:
        common.experimental.cel_expression.extend(cel)
    out = []
    for one in sides if two_sided else sides[:1]:
        whole = flow_pb2.FlowFilter()
        whole.CopyFrom(common)
        whole.MergeFrom(one)
        if whole.ByteSize() and whole not in out:
            out.append(whole)
    return out


def _joined(given: dict[str, Sequence[str]], prefix: str) -> dict[str, list[str]]:
    """Options by name. A namespace and a pod without one are one condition, as in Hubble."""
    found: dict[str, list[str]] = {}
    for condition in CONDITIONS:
        for name in _names(condition):
            texts = given.get(prefix + name.replace("-", "_"), ())
            if texts:
                found[name] = list(texts)
    for side in _SIDES:
        namespaces = found.get(f"{side}namespace")
        pods = found.get(f"{side}pod")
        if namespaces and pods:
            found[f"{side}pod"] = [
                pod if "/" in pod else f"{namespace}/{pod}"
                for pod in pods
                for namespace in namespaces
            ]
            del found[f"{side}namespace"]
    return found
