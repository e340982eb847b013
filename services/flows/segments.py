"""Flows on disk: Parquet files of some hundred thousand rows each, complete in themselves.

    <directory>/<from>-<to>-<run>-<first>-<rows>.parquet        times in ns, run in hexadecimal

    columns   time_ns, pair, meta, sport, dport, length, l7      the ring's, numbered anew
    footer    "cilia.flows": what pairs, metas and l7 mean       compressed JSON and arrays

A file is written beside its place and renamed into it, so one that is there is whole, unless the
disk lies; pages carry checksums. What cannot be read is skipped, reported and kept. The oldest
files go when the directory grows over its size or they over their age.

Everything here but `freeze` and the listing is slow and is called in threads.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cilia.errors import DomainError, Kind
from services.flows.dimensions import L7, META, PAIR, Dimensions
from services.flows.interning import AnyArray
from services.flows.l7 import Dns, Http, Kafka, L7Kind, L7Record, L7Type
from services.flows.rows import ROW, Rows
from services.flows.world import Party, PolicyRef, Workload

_KEY: Final = b"cilia.flows"
_VERSION: Final = 1
_GROUP_ROWS: Final = 1 << 16
_SUFFIX: Final = ".parquet"
_PARTIAL: Final = ".partial"
_MAX_DIMENSIONS: Final = 1 << 30  # bytes, unpacked


# What reading a damaged file can raise: Arrow's own are among them, by inheritance or as they are.
_FAULTS: Final = (
    OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, MemoryError,
    pa.ArrowException,
)  # fmt: skip


class SegmentDamaged(DomainError):
    """A file of flows cannot be read; it is left as it is."""

    default_kind = Kind.DATA_LOSS

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(
            f"the flows in {path.name} cannot be read: {why}",
            cure="Move the file away; the others are not affected",
        )
        self.path = path


@dataclass(frozen=True, slots=True, order=True)
class Segment:
    """One file; what its name says."""

    from_ns: int
    to_ns: int
    run: int
    first: int
    rows: int
    path: Path
    size: int


@dataclass(frozen=True, slots=True)
class Frozen:
    """Rows and all that they name, apart from the ring."""

    run: int
    first: int
    rows: dict[str, AnyArray]
    pairs: dict[str, AnyArray]
    metas: dict[str, AnyArray]
    l7: dict[str, AnyArray]
    header: dict[str, Any]
    parties: list[Party]
    policies: list[tuple[PolicyRef, ...]]
    records: list[L7Record]


class Segments:
    def __init__(
        self,
        directory: Path,
        *,
        max_bytes: int,
        max_age_s: float,
        compression_level: int = 3,
    ) -> None:
        self.directory = directory
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._level = compression_level
        self._lock = threading.Lock()
        self._segments: list[Segment] = []
        self.damaged: dict[str, str] = {}  # file name -> why
        self._fresh_damage: list[Segment] = []  # not in the ledger yet
        self.expired_files = 0

    # ---- what there is

    def open(self) -> None:
        """Lists the directory; half-written files of a run that was killed are removed."""
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o750)
        found = []
        for path in sorted(self.directory.iterdir()):
            if path.name.endswith(_PARTIAL):
                path.unlink(missing_ok=True)
                continue
            segment = _parse(path)
            if segment is None:
                if path.suffix == _SUFFIX:
                    self.damaged[path.name] = "its name is not one of ours"
                continue
            if why := _foot_fault(path):
                self._damage(segment, why)
                continue
            found.append(segment)
        self._segments = sorted(found)

    def between(self, since_ns: int | None, until_ns: int | None) -> list[Segment]:
        """Files that may have flows of that time, oldest first."""
        with self._lock:
            return [
                segment
                for segment in self._segments
                if (since_ns is None or segment.to_ns >= since_ns)
                and (until_ns is None or segment.from_ns <= until_ns)
                and segment.path.name not in self.damaged
            ]

    @property
    def bytes(self) -> int:
        return sum(segment.size for segment in self._segments)

    @property
    def rows(self) -> int:
        return sum(segment.rows for segment in self._segments)

    @property
    def count(self) -> int:
        return len(self._segments)

    @property
    def oldest_ns(self) -> int:
        return self._segments[0].from_ns if self._segments else 0

    @property
    def newest_ns(self) -> int:
        return max((segment.to_ns for segment in self._segments), default=0)

    def take_damage(self) -> list[Segment]:
        """What was found damaged since last asked."""
        with self._lock:
            found, self._fresh_damage = self._fresh_damage, []
        return found

    def _damage(self, segment: Segment, why: str) -> None:
        if segment.path.name not in self.damaged:
            self.damaged[segment.path.name] = why
            self._fresh_damage.append(segment)

    # ---- writing

    @staticmethod
    def freeze(rows: Rows) -> Frozen:
        """Takes rows out of the ring's dimensions; quick, and on the event loop's thread."""
        dimensions = rows.dimensions
        columns = dict(rows.columns)
        pairs, columns["pair"] = _compact(dimensions.pairs, columns["pair"])
        metas, columns["meta"] = _compact(dimensions.metas, columns["meta"])
        numbers, columns["l7"] = _renumber(columns["l7"], zero=True)
        l7 = {name: column[numbers] for name, column in dimensions.l7.items()}
        records = [dimensions.records[number] for number in numbers[1:].tolist()]
        used, both = _renumber(np.concatenate([pairs["src"], pairs["dst"]]), zero=True)
        pairs["src"], pairs["dst"] = both[: len(pairs["src"])], both[len(pairs["src"]) :]
        parties = [dimensions.parties[number] for number in used.tolist()]
        used, metas["policies"] = _renumber(metas["policies"], zero=True)
        policies = [dimensions.policies[number] for number in used.tolist()]
        header: dict[str, Any] = {
            "node_name": dimensions.node_name,
            "node_labels": dimensions.node_labels,
        }
        for name, pool, sides in (
            ("strings", dimensions.strings, ("interface",)),
            ("names", dimensions.names, ("src_names", "dst_names")),
            ("services", dimensions.services, ("src_service", "dst_service")),
        ):
            used, both = _renumber(np.concatenate([pairs[side] for side in sides]), zero=True)
            for at, side in enumerate(sides):
                pairs[side] = both[at * len(pairs[side]) : (at + 1) * len(pairs[side])]
            header[name] = [pool[number] for number in used.tolist()]
        return Frozen(
            run=rows.run,
            first=int(rows.numbers[0]),
            rows=columns,
            pairs=pairs,
            metas=metas,
            l7=l7,
            header=header,
            parties=parties,
            policies=policies,
            records=records,
        )

    def write(self, frozen: Frozen) -> Segment:
        """Raises OSError, when the disk is full too; nothing half-written is left then."""
        table = pa.table(
            {name: pa.array(frozen.rows[name].astype(kind)) for name, kind in ROW.items()}
        )
        times = frozen.rows["time_ns"]
        from_ns, to_ns = int(times.min()), int(times.max())
        count = len(times)
        name = f"{from_ns:019d}-{to_ns:019d}-{frozen.run:015x}-{frozen.first}-{count}{_SUFFIX}"
        path = self.directory / name
        partial = self.directory / f".{name}{_PARTIAL}"
        try:
            with partial.open("wb") as file:
                with pq.ParquetWriter(
                    file,
                    table.schema,
                    compression="zstd",
                    compression_level=self._level,
                    use_dictionary=["pair", "meta", "dport", "length", "l7"],
                    column_encoding={"time_ns": "DELTA_BINARY_PACKED"},
                    write_statistics=["time_ns"],
                    write_page_checksum=True,
                    store_schema=False,
                ) as writer:
                    writer.write_table(table, row_group_size=_GROUP_ROWS)
                    writer.add_key_value_metadata({_KEY: _pack(frozen)})
                file.flush()
                os.fsync(file.fileno())
            partial.rename(path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        segment = Segment(
            from_ns, to_ns, frozen.run, frozen.first, count, path, path.stat().st_size
        )
        with self._lock:
            self._segments.append(segment)
            self._segments.sort()
        return segment

    def expire(self, now_ns: int) -> int:
        """Removes what is too old or too much; how many files went."""
        gone = 0
        with self._lock:
            total = self.bytes
            while self._segments:
                oldest = self._segments[0]
                if total <= self._max_bytes and oldest.to_ns >= now_ns - self._max_age_s * 1e9:
                    break
                total -= oldest.size
                del self._segments[0]
                self.damaged.pop(oldest.path.name, None)
                with contextlib.suppress(OSError):
                    oldest.path.unlink(missing_ok=True)
                gone += 1
        self.expired_files += gone
        return gone

    # ---- reading

    def read(
        self, segment: Segment, since_ns: int | None = None, until_ns: int | None = None
    ) -> Iterator[Rows]:
        """Its rows, some ten thousand at a time, leaving out groups that are of another time.

        A file that retention removed meanwhile has no rows. Raises SegmentDamaged.
        """
        try:
            with pq.ParquetFile(segment.path, page_checksum_verification=True) as file:
                metadata = file.metadata.metadata or {}
                if file.metadata.num_rows != segment.rows or _KEY not in metadata:
                    raise ValueError("it is not what its name says")
                dimensions = _unpack(metadata[_KEY])
                time_column = file.schema_arrow.names.index("time_ns")
                first = segment.first
                groups: list[tuple[int, int, int]] = []  # which, its first row, its rows
                for group in range(file.num_row_groups):
                    of = file.metadata.row_group(group)
                    start, first = first, first + of.num_rows
                    bounds = of.column(time_column).statistics
                    if bounds is not None and bounds.has_min_max:
                        if since_ns is not None and bounds.max < since_ns:
                            continue
                        if until_ns is not None and bounds.min > until_ns:
                            continue
                    groups.append((group, start, of.num_rows))
                if not groups:
                    return
                # All at once: a call costs as much as some ten thousand rows.
                table = file.read_row_groups([group for group, _, _ in groups])
                columns = {
                    name: table.column(name).to_numpy().astype(kind, copy=False)
                    for name, kind in ROW.items()
                }
                _check(columns, dimensions)
            at = 0
            for _, start, count in groups:
                yield Rows(
                    segment.run,
                    np.arange(start, start + count, dtype=np.uint64),
                    {name: column[at : at + count] for name, column in columns.items()},
                    dimensions,
                )
                at += count
        except FileNotFoundError:
            return
        except _FAULTS as error:
            why = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            with self._lock:
                self._damage(segment, why)
            raise SegmentDamaged(segment.path, why) from error


def _check(columns: dict[str, AnyArray], dimensions: Dimensions) -> None:
    for name, table in (
        ("pair", dimensions.pairs["src"]),
        ("meta", dimensions.metas["type"]),
        ("l7", dimensions.l7["kind"]),
    ):
        if len(columns[name]) and int(columns[name].max()) >= len(table):
            raise ValueError(f"a row names a {name} that is not there")


def _parse(path: Path) -> Segment | None:
    if path.suffix != _SUFFIX:
        return None
    parts = path.name.removesuffix(_SUFFIX).split("-")
    try:
        from_ns, to_ns, run, first, rows = (
            int(parts[0]),
            int(parts[1]),
            int(parts[2], 16),
            int(parts[3]),
            int(parts[4]),
        )
        size = path.stat().st_size
    except (ValueError, IndexError, OSError):
        return None
    if len(parts) != 5 or rows <= 0 or first < 0:
        return None
    return Segment(from_ns, to_ns, run, first, rows, path, size)


def _foot_fault(path: Path) -> str:
    """What is wrong with the end of the file; empty when nothing is."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size < 12:
                return "it is too short"
            file.seek(-8, os.SEEK_END)
            foot = file.read(8)
    except OSError as error:
        return error.strerror or str(error)
    length = int.from_bytes(foot[:4], "little")
    if foot[4:] != b"PAR1" or length + 12 > size:
        return "its end is missing or damaged"
    return ""


def _renumber(numbers: AnyArray, *, zero: bool = False) -> tuple[AnyArray, AnyArray]:
    """The distinct numbers, and the column in terms of their places; `zero`: 0 is the first."""
    size = int(numbers.max()) + 1 if len(numbers) else 1
    present = np.zeros(size, bool)
    present[numbers] = True
    if zero:
        present[0] = True
    used = np.flatnonzero(present)
    places = np.zeros(size, np.uint32)
    places[used] = np.arange(len(used), dtype=np.uint32)
    return used, places[numbers]


def _compact(table: Any, numbers: AnyArray) -> tuple[dict[str, AnyArray], AnyArray]:
    used, places = _renumber(numbers)
    return {name: column[used] for name, column in table.items()}, places


# ---- dimensions as bytes

_TABLES: Final = (("pairs", PAIR), ("metas", META), ("l7", L7))


def _pack(frozen: Frozen) -> bytes:
    header = {
        **frozen.header,
        "version": _VERSION,
        "parties": [_party_to(party) for party in frozen.parties],
        "policies": [[_policy_to(ref) for ref in refs] for refs in frozen.policies],
        "records": [_record_to(record) for record in frozen.records],
        "counts": [len(frozen.pairs["src"]), len(frozen.metas["type"]), len(frozen.l7["kind"])],
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    pieces = [len(text).to_bytes(8, "little"), text]
    for name, dtype in _TABLES:
        columns = getattr(frozen, name)
        pieces += [np.ascontiguousarray(columns[key].astype(dtype[key])).tobytes() for key in dtype]
    raw = b"".join(pieces)
    packed: bytes = pa.compress(raw, codec="zstd", asbytes=True)
    # Arrow checks pages, not the footer.
    return len(raw).to_bytes(8, "little") + crc32(packed).to_bytes(4, "little") + packed


def _unpack(packed: bytes) -> Dimensions:
    size = int.from_bytes(packed[:8], "little")
    if size > _MAX_DIMENSIONS:
        raise ValueError("its footer says it is too large")
    if crc32(packed[12:]) != int.from_bytes(packed[8:12], "little"):
        raise ValueError("its footer is damaged")
    raw = pa.decompress(packed[12:], size, codec="zstd", asbytes=True)
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    if header["version"] != _VERSION:
        raise ValueError(f"it is of version {header['version']}")
    at = 8 + length
    tables: dict[str, dict[str, AnyArray]] = {}
    for (name, dtype), count in zip(_TABLES, header["counts"], strict=True):
        columns = tables[name] = {}
        for key, kind in dtype.items():
            columns[key] = np.frombuffer(raw, kind, count, at)
            at += columns[key].nbytes
    pairs, metas, l7 = tables["pairs"], tables["metas"], tables["l7"]
    return Dimensions(
        pairs=pairs,
        metas=metas,
        l7=l7,
        node_name=header["node_name"],
        node_labels=tuple(header["node_labels"]),
        parties=[_party_from(row) for row in header["parties"]],
        policies=[tuple(PolicyRef(*ref) for ref in refs) for refs in header["policies"]],
        strings=header["strings"],
        names=[tuple(names) for names in header["names"]],
        services=[(namespace, name) for namespace, name in header["services"]],
        records={at + 1: _record_from(row) for at, row in enumerate(header["records"])},
        pair_born=np.ones(len(pairs["src"]), np.uint64),
        meta_born=np.ones(len(metas["type"]), np.uint64),
        pair_births=1,
        meta_births=1,
    )


def _policy_to(ref: PolicyRef) -> list[str]:
    return [ref.kind, ref.namespace, ref.name, ref.path, ref.origin]


def _party_to(party: Party) -> list[Any]:
    return [
        party.ep_id,
        party.identity,
        party.namespace,
        party.name,
        party.labels,
        [[own.name, own.kind] for own in party.workloads],
        party.cluster,
    ]


def _party_from(row: list[Any]) -> Party:
    ep_id, identity, namespace, name, labels, workloads, cluster = row
    return Party(
        ep_id=ep_id,
        identity=identity,
        namespace=namespace,
        name=name,
        labels=tuple(labels),
        workloads=tuple(Workload(*own) for own in workloads),
        cluster=cluster,
    )


def _record_to(record: L7Record) -> list[Any]:
    return [
        int(record.kind),
        int(record.type),
        record.latency_ns,
        record.trace_id,
        asdict(record.record),
    ]


def _record_from(row: list[Any]) -> L7Record:
    kind, record_type, latency_ns, trace_id, values = row
    own: Http | Dns | Kafka
    match L7Kind(kind):
        case L7Kind.HTTP:
            headers = tuple((key, value) for key, value in values.pop("headers"))
            own = Http(**values, headers=headers)
        case L7Kind.DNS:
            lists: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value
                for key, value in values.items()
            }
            own = Dns(**lists)
        case L7Kind.KAFKA:
            own = Kafka(**values)
        case L7Kind.NONE:
            raise ValueError("a record of no kind")
    return L7Record(type=L7Type(record_type), record=own, latency_ns=latency_ns, trace_id=trace_id)
