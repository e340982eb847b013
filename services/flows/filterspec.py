"""What a client asks for, as domain values: Hubble's FlowFilter, field by field, and GetFlows."""

from __future__ import annotations

from dataclasses import dataclass

from cilia.errors import InvalidError


class FilterInvalid(InvalidError):
    """A filter that cannot be, or that is not understood; never ignored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EventTypeSpec:
    type: int = 0  # 0: any
    sub_type: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class InterfaceSpec:
    index: int = 0
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterSpec:
    """All that is set must match; of several values, any. Empty: not set."""

    source_ip: tuple[str, ...] = ()
    destination_ip: tuple[str, ...] = ()
    source_ip_xlated: tuple[str, ...] = ()
    source_pod: tuple[str, ...] = ()
    destination_pod: tuple[str, ...] = ()
    source_fqdn: tuple[str, ...] = ()
    destination_fqdn: tuple[str, ...] = ()
    source_label: tuple[str, ...] = ()
    destination_label: tuple[str, ...] = ()
    source_service: tuple[str, ...] = ()
    destination_service: tuple[str, ...] = ()
    source_workload: tuple[tuple[str, str], ...] = ()  # name, kind
    destination_workload: tuple[tuple[str, str], ...] = ()
    source_cluster_name: tuple[str, ...] = ()
    destination_cluster_name: tuple[str, ...] = ()
    source_identity: tuple[int, ...] = ()
    destination_identity: tuple[int, ...] = ()
    source_port: tuple[str, ...] = ()
    destination_port: tuple[str, ...] = ()
    verdict: tuple[int, ...] = ()
    drop_reason_desc: tuple[int, ...] = ()
    event_type: tuple[EventTypeSpec, ...] = ()
    traffic_direction: tuple[int, ...] = ()
    reply: tuple[bool, ...] = ()
    protocol: tuple[str, ...] = ()
    ip_version: tuple[int, ...] = ()
    tcp_flags: tuple[int, ...] = ()  # bits, FIN lowest; all of one must be set
    encrypted: tuple[bool, ...] = ()
    interface: tuple[InterfaceSpec, ...] = ()
    http_status_code: tuple[str, ...] = ()
    http_method: tuple[str, ...] = ()
    http_path: tuple[str, ...] = ()
    http_url: tuple[str, ...] = ()
    http_header: tuple[tuple[str, str], ...] = ()
    dns_query: tuple[str, ...] = ()
    node_name: tuple[str, ...] = ()
    node_labels: tuple[str, ...] = ()
    uuid: tuple[str, ...] = ()
    trace_id: tuple[str, ...] = ()
    ip_trace_id: tuple[int, ...] = ()
    cel_expression: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowQuery:
    """What GetFlows asks, without the field mask.

    `since_ns` chooses the start, else `first` the oldest flow, else the `number` newest that match;
    without any, and with `follow`, only what comes from now on. Both times are inclusive. `number`
    0 is no limit. With `follow` it never ends, but by `until_ns`.
    """

    whitelist: tuple[FilterSpec, ...] = ()
    blacklist: tuple[FilterSpec, ...] = ()
    number: int = 0
    first: bool = False
    follow: bool = False
    since_ns: int | None = None
    until_ns: int | None = None

    def __post_init__(self) -> None:
        if self.first and self.follow:
            raise FilterInvalid(
                "first and follow exclude each other", cure="Ask for one of the two"
            )
