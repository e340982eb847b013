"""Columns to group flows by: names for people, made once for each pair, meta or L7 record.

A column gives each row a small number, and each number a text. What is said of a row follows from
its pair, its meta, its L7 record or a column of its own, so only distinct ones cost a Python step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal
from urllib.parse import urlsplit

import numpy as np

from cilia.bpf import constants as k
from cilia.bpf.dropreason import reason_text
from cilia.errors import InvalidError
from cilia.identity import RESERVED, NumericIdentity
from services.flows.dimensions import ICMP, ICMPV6, SCTP, TCP, UDP, Dimensions
from services.flows.encoder import address_text
from services.flows.interning import I64
from services.flows.l7 import Http
from services.flows.rows import Rows
from services.flows.world import Party, PolicyRef

Source = Literal["pair", "meta", "l7", "sport", "dport"]
_MAX_COLUMNS: Final = 8

PROTOCOLS: Final[Mapping[int, str]] = {
    TCP: "TCP", UDP: "UDP", SCTP: "SCTP", ICMP: "ICMPv4", ICMPV6: "ICMPv6",
}  # fmt: skip
_VERDICTS: Final[Mapping[int, str]] = {
    0: "VERDICT_UNKNOWN", 1: "FORWARDED", 2: "DROPPED", 3: "ERROR", 4: "AUDIT", 5: "REDIRECTED",
}  # fmt: skip
_TYPES: Final[Mapping[int, str]] = {1: "drop", 4: "trace", 5: "policy-verdict", 129: "l7"}
_DIRECTIONS: Final = {k.DIR_INGRESS: "INGRESS", k.DIR_EGRESS: "EGRESS"}


class ColumnUnknown(InvalidError):
    default_cure = "Group by columns that there are"


@dataclass(frozen=True, slots=True)
class Column:
    """`text` says what the number of a pair, meta, L7 record or port stands for."""

    name: str
    source: Source
    text: Callable[[Dimensions, int], str]


def codes(column: Column, rows: Rows) -> tuple[I64, list[str]]:
    """For each row a number below the length of the texts, and the texts, each once."""
    numbers = rows.columns[column.source]
    distinct, inverse = np.unique(numbers, return_inverse=True)
    texts: dict[str, int] = {}
    of_distinct = np.fromiter(
        (
            texts.setdefault(column.text(rows.dimensions, number), len(texts))
            for number in distinct.tolist()
        ),
        np.int64,
        len(distinct),
    )
    return of_distinct[inverse], list(texts)


# ---- texts


def party_text(party: Party) -> str:
    """namespace/name, a reserved identity's name, or the labels that tell it apart."""
    if party.name:
        return f"{party.namespace}/{party.name}" if party.namespace else party.name
    if name := RESERVED.get(NumericIdentity(party.identity)):
        return f"reserved:{name}"
    cidrs = [label for label in party.labels if label.startswith("cidr:")]
    if cidrs:
        return max(cidrs, key=len)
    return f"identity:{party.identity}" if party.identity else "unknown"


def policy_text(ref: PolicyRef) -> str:
    """kind namespace/name path (file:line)."""
    name = f"{ref.namespace}/{ref.name}" if ref.namespace else ref.name
    text = " ".join(part for part in (ref.kind, name, ref.path) if part)
    return f"{text} ({ref.origin})" if ref.origin else text


def _party(side: str) -> Callable[[Dimensions, int], str]:
    return lambda dims, pair: party_text(dims.parties[int(dims.pairs[side][pair])])


def _namespace(side: str) -> Callable[[Dimensions, int], str]:
    return lambda dims, pair: dims.parties[int(dims.pairs[side][pair])].namespace


def _identity(side: str) -> Callable[[Dimensions, int], str]:
    return lambda dims, pair: str(int(dims.pairs[f"{side}_identity"][pair]))


def _address(side: str) -> Callable[[Dimensions, int], str]:
    high, low = f"{side}_hi", f"{side}_lo"
    return lambda dims, pair: address_text(int(dims.pairs[high][pair]), int(dims.pairs[low][pair]))


def _reason(dims: Dimensions, meta: int) -> str:
    number = int(dims.metas["drop"][meta])
    return reason_text(number) if number else ""


def _protocol(dims: Dimensions, meta: int) -> str:
    number = int(dims.metas["proto"][meta])
    return PROTOCOLS.get(number, str(number))


def _policy(dims: Dimensions, meta: int) -> str:
    refs = dims.policies[int(dims.metas["policies"][meta])]
    text = ", ".join(map(policy_text, refs))
    return f"isolated by {text}" if text and not dims.metas["rule"][meta] else text


def _http(read: Callable[[Http], str]) -> Callable[[Dimensions, int], str]:
    def text(dims: Dimensions, number: int) -> str:
        record = dims.records.get(number)
        return read(record.record) if record and isinstance(record.record, Http) else ""

    return text


def _path(http: Http) -> str:
    try:
        return urlsplit(http.url).path
    except ValueError:
        return http.url


_COLUMNS: Final[Mapping[str, Column]] = {
    column.name: column
    for column in (
        Column("source", "pair", _party("src")),
        Column("destination", "pair", _party("dst")),
        Column("source_identity", "pair", _identity("src")),
        Column("destination_identity", "pair", _identity("dst")),
        Column("source_ip", "pair", _address("s")),
        Column("destination_ip", "pair", _address("d")),
        Column("source_namespace", "pair", _namespace("src")),
        Column("destination_namespace", "pair", _namespace("dst")),
        Column("port", "dport", lambda _, number: str(number)),
        Column("protocol", "meta", _protocol),
        Column("verdict", "meta", lambda dims, meta: _VERDICTS[int(dims.metas["verdict"][meta])]),
        Column("reason", "meta", _reason),
        Column(
            "direction",
            "meta",
            lambda dims, meta: _DIRECTIONS.get(int(dims.metas["direction"][meta]), "UNKNOWN"),
        ),
        Column(
            "type",
            "meta",
            lambda dims, meta: _TYPES.get(int(dims.metas["type"][meta]), "unknown"),
        ),
        Column("policy", "meta", _policy),
        Column("http_method", "l7", _http(lambda http: http.method)),
        Column("http_path", "l7", _http(_path)),
        Column("http_status", "l7", _http(lambda http: str(http.code) if http.code else "")),
    )
}


def columns_of(names: Iterable[str]) -> tuple[Column, ...]:
    """The columns of these names. Raises ColumnUnknown."""
    wanted = tuple(names)
    if not wanted or len(wanted) > _MAX_COLUMNS or len(set(wanted)) != len(wanted):
        raise ColumnUnknown(f"group by 1 to {_MAX_COLUMNS} different columns")
    for name in wanted:
        if name not in _COLUMNS:
            raise ColumnUnknown(
                f"{name[:100]!r} is no column", cure=f"Columns are {', '.join(_COLUMNS)}"
            )
    return tuple(_COLUMNS[name] for name in wanted)


def keys_of(columns: Sequence[Column], rows: Rows) -> tuple[I64, list[list[str]]]:
    """One number a row for all columns together, mixed of the columns' numbers, and their texts:
    number = ((c0 * n1 + c1) * n2 + c2) ... where n is how many texts a column has.
    """
    mixed = np.zeros(len(rows), np.int64)
    texts = []
    for column in columns:
        numbers, words = codes(column, rows)
        mixed = mixed * len(words) + numbers
        texts.append(words)
    return mixed, texts


def unmix(number: int, texts: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The texts of a mixed number."""
    out = []
    for words in reversed(texts):
        number, at = divmod(number, len(words))
        out.append(words[at])
    return tuple(reversed(out))
