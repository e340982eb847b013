"""What the flow store costs, one processor: taking events in, searching them, encoding, disk.

Times are of this thread's processor time, so that what else the machine does is not counted, but
for reading history, which uses several threads and is measured by the clock as well.
"""

from __future__ import annotations

import asyncio
import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from cilia.bpf import constants as k
from cilia.bpf.layout import EVENT, to_addr
from protos.hubble.v1 import flow_pb2 as pb
from protos.hubble.v1 import observer_pb2
from services.flows import convert
from services.flows.encoder import Encoder
from services.flows.fieldmask import FieldMask
from services.flows.filterspec import FlowQuery
from services.flows.history import History
from services.flows.ledger import Ledger
from services.flows.matching import compile_filters
from services.flows.query import Cursor, State
from services.flows.rows import Rows
from services.flows.segments import Segments
from services.flows.store import Store
from services.flows.world import EndpointInfo, Meaning, PolicyRef
from tests.bench.figure import figure

ROWS: Final = 1 << 20
BATCH: Final = 4096
PAIRS: Final = 4000
ENDPOINTS: Final = 500
IDENTITIES: Final = 120
DISK_ROWS: Final = 10_000_000
DISK_SECONDS: Final = 3600
CLI_MASK: Final = (
    "time", "verdict", "ethernet", "IP", "l4", "source.identity", "source.namespace",
    "source.pod_name", "destination.identity", "destination.namespace", "destination.pod_name",
    "Type", "node_name", "l7", "event_type", "source_service", "destination_service", "is_reply",
    "Summary", "ip_trace_id",
)  # fmt: skip


def _meaning() -> Meaning:
    def labels(identity: int) -> tuple[str, ...]:
        return (
            f"k8s:app=svc-{identity}",
            "k8s:io.cilium.k8s.policy.cluster=default",
            f"k8s:io.kubernetes.pod.namespace=team-{identity % 24}",
            f"k8s:tier={'front' if identity % 3 else 'back'}",
        )

    return Meaning(
        reset=True,
        node="node1",
        cluster="default",
        endpoints=tuple(
            EndpointInfo(
                id=number,
                name=f"svc-{number % IDENTITIES}-{number:05d}",
                namespace=f"team-{number % IDENTITIES % 24}",
                labels=labels(number % IDENTITIES),
                identity=1000 + number % IDENTITIES,
                ifindex=100 + number,
                interface=f"lxc{number}",
            )
            for number in range(1, ENDPOINTS + 1)
        ),
        identities={1000 + number: labels(number) for number in range(IDENTITIES)},
        rules={7: PolicyRef("CiliumNetworkPolicy", "default", "allow", "spec.ingress[0]")},
    )


def _events(count: int, *, seed: int = 0, churn: bool = False) -> Any:
    """Traffic among 4000 pairs, some busier than others; `churn`: of a new address each time."""
    r = np.random.default_rng(seed)
    events = np.zeros(count, EVENT)
    events["time_ns"] = 10**12 + np.cumsum(r.integers(100, 2000, count))
    which = (PAIRS * r.random(count) ** 3).astype(np.int64)
    pair = np.random.default_rng(1)
    source = pair.integers(1, ENDPOINTS + 1, PAIRS)[which]
    destination = pair.integers(1, ENDPOINTS + 1, PAIRS)[which]
    addresses = np.array(
        [to_addr(f"10.0.{n // 250}.{n % 250 + 1}") for n in range(ENDPOINTS + 1)], "V16"
    )
    events["saddr"], events["daddr"] = addresses[source], addresses[destination]
    if churn:
        raw = events.view("u1").reshape(count, EVENT.itemsize)
        at = EVENT.fields["saddr"][1]  # type: ignore[index]  # it has fields
        raw[:, at + 12 : at + 16] = r.integers(1, 255, (count, 4))
    events["src_identity"] = 9 if churn else 1000 + source % IDENTITIES
    events["dst_identity"] = 1000 + destination % IDENTITIES
    events["ep_id"], events["peer_ep_id"] = destination, 0 if churn else source
    events["direction"] = k.DIR_INGRESS
    dropped = r.random(count) < 0.1
    events["type"] = np.where(dropped, k.EVENT_DROP, k.EVENT_TRACE)
    events["reason"] = np.where(dropped, 133, r.integers(0, 3, count))
    events["sport_be"] = r.integers(32768, 61000, count)
    ports = np.array([80, 443, 8080, 53, 5432, 6379, 9092])
    events["dport_be"] = r.choice(ports, count)
    events["proto"] = np.where(events["dport_be"] == 53, 17, 6)
    flags = r.choice(np.array([2, 18, 16, 24, 17], np.uint8), count)
    events["tcp_flags"] = np.where(events["proto"] == 6, flags, 0)
    events["flags"] = np.where(r.random(count) < 0.5, k.EVENT_F_REPLY, 0)
    events["length"] = r.choice(np.array([60, 66, 590, 1514]), count)
    events["ifindex"] = 100 + destination
    return events


def _store(capacity: int = ROWS) -> Store:
    store = Store(capacity=capacity, run=1, cel=convert.compile_cel, encode_flows=Encoder().flows)
    store.learn(_meaning())
    return store


def _take(store: Store, events: Any, batch: int) -> None:
    for at in range(0, len(events), batch):
        store.take(events[at : at + batch], wall_offset_ns=0)


def _best(work: Callable[[], object], rounds: int = 5) -> float:
    """Seconds of this thread's processor time, the best of some rounds."""
    best = float("inf")
    gc.collect()
    for _ in range(rounds):
        started = time.thread_time()
        work()
        best = min(best, time.thread_time() - started)
    return best


def bench_flows_ingest() -> list[dict[str, Any]]:
    """Raw events to the ring, pairs and metas numbered."""
    figures = []
    events = _events(1 << 18)
    for batch in (64, 1024, BATCH):
        store = _store()
        count = min(len(events), batch * 256)
        _take(store, events[:count], batch)
        taken = _best(lambda s=store, b=batch, n=count: _take(s, events[:n], b), 3)  # type: ignore[misc]  # bound now
        figures.append(
            figure(
                f"ingest, batches of {batch}",
                count / taken,
                "events/s",
                goal=2e6 if batch == BATCH else None,
                floor=1e6 if batch == BATCH else None,
            )
        )
    churn = _events(1 << 18, seed=2, churn=True)
    store = _store()
    taken = _best(lambda: _take(store, churn, BATCH), 1)
    figures.append(
        figure("ingest, an address never seen in each event", len(churn) / taken, "events/s")
    )
    store = _store()
    single = events[:1]
    store.take(single, wall_offset_ns=0)
    taken = _best(lambda: _take(store, np.repeat(single, 200), 1)) / 200
    figures.append(figure("ingest, one event alone", taken * 1e6, "us", less_is_better=True))
    return figures


def _filled() -> Store:
    store = _store()
    for seed in range(4):
        _take(store, _events(ROWS // 4, seed=seed), BATCH)
    return store


def _drain(cursor: Cursor) -> int:
    count = 0
    while True:
        count += sum(len(item) for item in cursor.read() if isinstance(item, Rows))
        if cursor.state in (State.DONE, State.WAITING):
            return count


def bench_flows_scan() -> list[dict[str, Any]]:
    """The whole of memory, 2^20 rows, by one filter each."""
    store = _filled()
    wanted = {
        "verdict": pb.FlowFilter(verdict=[pb.DROPPED]),
        "port": pb.FlowFilter(destination_port=["443"]),
        "three ports": pb.FlowFilter(destination_port=["443", "80", "53"]),
        "pod": pb.FlowFilter(source_pod=["team-3/svc-3"]),
        "namespace": pb.FlowFilter(destination_pod=["team-3/"]),
        "label": pb.FlowFilter(source_label=["app in (svc-1, svc-2, svc-3)"]),
        "identities": pb.FlowFilter(source_identity=range(1000, 1020)),
        "cidr": pb.FlowFilter(source_ip=["10.0.1.0/24"]),
        "ip": pb.FlowFilter(destination_ip=["10.0.1.7"]),
        "flags": pb.FlowFilter(tcp_flags=[pb.TCPFlags(SYN=True)], reply=[False]),
        "protocol": pb.FlowFilter(protocol=["udp"]),
        "workload": pb.FlowFilter(source_workload=[pb.Workload(name="svc-3-00003")]),
        "event type": pb.FlowFilter(event_type=[pb.EventTypeFilter(type=4, match_sub_type=True)]),
        "uuid": pb.FlowFilter(uuid=["00000000-0000-8001-8000-000000000007"]),
        "http status": pb.FlowFilter(http_status_code=["5+"]),
        "interface": pb.FlowFilter(interface=[pb.NetworkInterface(name="lxc7")]),
        "dropped, namespace, port": pb.FlowFilter(
            verdict=[pb.DROPPED], source_pod=["team-3/"], destination_port=["443"]
        ),
        "fqdn": pb.FlowFilter(destination_fqdn=["*.example.com"]),
        "http path (regex)": pb.FlowFilter(http_path=["/v1/.*"]),
    }
    figures = []
    worst = 0.0
    for name, one in wanted.items():
        spec = convert.filter_from_proto(one)

        def scan(spec: Any = spec) -> int:
            matcher = compile_filters([spec], [])
            return sum(
                int(np.count_nonzero(matcher.mask(store.rows(first, count))))
                for first, count in store.ring.spans(store.ring.tail, store.ring.head)
            )

        taken = _best(scan) * 1e3
        worst = max(worst, taken)
        figures.append(figure(f"scan, {name}", taken, "ms", less_is_better=True))
    figures.append(
        figure("scan of 2^20 rows, the dearest filter", worst, "ms", goal=20, less_is_better=True)
    )
    cel = pb.FlowFilter()
    cel.experimental.cel_expression.append("_flow.verdict == Verdict.DROPPED")
    matcher = compile_filters(
        [convert.filter_from_proto(cel)], [], cel=convert.compile_cel, encode=Encoder().flows
    )
    part = store.rows(store.ring.spans(store.ring.tail, store.ring.head)[0][0], 8192)
    taken = _best(lambda: matcher.mask(part), 2) / len(part) * 1e6
    figures.append(figure("CEL", taken, "us/flow", less_is_better=True))
    return figures


def bench_flows_encode() -> list[dict[str, Any]]:
    """Rows to framed GetFlowsResponse messages, against protobuf making the same ones."""
    store = _filled()
    head = store.ring.head
    figures = []
    masks: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("all fields", ()),
        ("the command's fields", CLI_MASK),
    )
    for name, paths in masks:
        encoder = Encoder(FieldMask(paths))
        parts = [store.rows(first, 2048) for first in range(head - 65536, head, 2048)]
        size = sum(len(encoder.encode(part)) for part in parts)
        rows = sum(map(len, parts))
        ours = _best(lambda e=encoder, p=parts: [e.encode(part) for part in p]) / rows  # type: ignore[misc]  # bound now
        messages = [
            observer_pb2.GetFlowsResponse.FromString(raw) for raw in encoder.messages(parts[0])
        ]
        theirs = _best(lambda m=messages: [_rebuild(one) for one in m], 3) / len(messages)  # type: ignore[misc]  # bound now
        figures += [
            figure(
                f"encode {name} ({size // rows} bytes)",
                1 / ours,
                "flows/s",
                baseline=1 / theirs,
                goal=20,
                floor=10,
            )
        ]
    part = store.rows(head - 64, 64)
    encoder = Encoder()
    encoder.encode(part)
    taken = _best(lambda: [encoder.encode(part) for _ in range(100)]) / 6400
    figures.append(figure("encode, 64 at a time", 1 / taken, "flows/s"))
    return figures


def _rebuild(one: observer_pb2.GetFlowsResponse) -> bytes:
    """A message built field by field, as a server with an object a flow does, and serialised."""
    made = observer_pb2.GetFlowsResponse(node_name=one.node_name)
    made.time.CopyFrom(one.time)
    source, flow = one.flow, made.flow
    for descriptor, value in source.ListFields():
        if descriptor.is_repeated:
            getattr(flow, descriptor.name).extend(value)
        elif descriptor.message_type is not None:
            getattr(flow, descriptor.name).CopyFrom(value)
        else:
            setattr(flow, descriptor.name, value)
    return made.SerializeToString()


def bench_flows_history() -> list[dict[str, Any]]:
    """Ten million flows of an hour on disk: how large, and how long a search takes."""
    with tempfile.TemporaryDirectory(prefix="cilt-bench-flows-") as directory:
        return asyncio.run(_history(Path(directory)))


async def _history(path: Path) -> list[dict[str, Any]]:
    segments = Segments(path / "segments", max_bytes=1 << 40, max_age_s=1e12)
    store = Store(
        capacity=ROWS, run=1, segments=segments, ledger=Ledger(path / "ledger.jsonl", run=1)
    )
    store.learn(_meaning())
    history = History(store, segments, directory=path, segment_rows=1 << 18, segment_age_s=1e9)
    await history.start()
    events = _events(1 << 20)
    step_ns = DISK_SECONDS * 10**9 // DISK_ROWS
    now = time.time_ns()
    start_ns = now - DISK_SECONDS * 10**9
    done = 0
    spilling = 0.0
    while done < DISK_ROWS:
        part = events[: min(1 << 18, DISK_ROWS - done)].copy()
        part["time_ns"] = start_ns + (done + np.arange(len(part))) * step_ns
        part["sport_be"] = np.roll(part["sport_be"], done % 977)
        _take(store, part, BATCH * 4)
        started = time.perf_counter()
        await history.spill_due()
        spilling += time.perf_counter() - started
        done += len(part)
    await store.spill(1 << 20)
    size = segments.bytes / segments.rows

    def search(wanted: pb.FlowFilter) -> tuple[float, float, int]:
        query = FlowQuery(since_ns=start_ns, whitelist=(convert.filter_from_proto(wanted),))
        started, used = time.perf_counter(), time.process_time()
        count = _drain(store.query(query))
        return time.perf_counter() - started, time.process_time() - used, count

    figures = [
        figure("history, bytes a flow", size, "bytes", goal=20, less_is_better=True),
        figure("history, written", segments.rows / spilling, "flows/s"),
    ]
    for name, wanted in (
        ("a pod's drops", pb.FlowFilter(verdict=[pb.DROPPED], source_pod=["team-3/svc-3"])),
        ("a port", pb.FlowFilter(destination_port=["5432"], source_pod=["team-5/"])),
    ):
        taken, used, count = min(search(wanted) for _ in range(2))
        figures.append(figure(f"history, {name}, processor time", used, "s", less_is_better=True))
        figures.append(
            figure(
                f"history --since 1h, {name} ({count} of {segments.rows})",
                taken,
                "s",
                goal=2,
                less_is_better=True,
            )
        )
    return figures
