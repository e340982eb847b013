"""What a proxy must enforce: http, kafka, dns and generic rules, and TLS contexts.

Regular expressions are RE2, as Envoy's: compiled here once to be refused here, and dropped.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Final

from cilia.policy.api import (
    DNSRule,
    FQDNSelector,
    GenericRule,
    HeaderMatch,
    HTTPRule,
    KafkaRule,
    L7Rules,
    TLSContext,
)
from cilia.policy.schema import INVALID, Checking, Choice, ListOf, MapOf, Object, Text, shown
from cilia.policy.tree import Node

MAX_L7_RULES: Final = 1000  # in one list
MAX_REGEX: Final = 4096  # characters
MAX_PROGRAM_SIZE: Final = 1000  # instructions of a regular expression, as our Envoys are told
_MAX_MEMORY: Final = 256 << 10  # bytes to compile one with
_OF_TOO_LARGE: Final = 4 * MAX_PROGRAM_SIZE  # instructions that one given up on is counted for
_TOO_LARGE: Final = f"is too large: it compiles to more than {MAX_PROGRAM_SIZE} instructions"
MAX_HEADERS: Final = 256
# Names of Kafka's requests by their number, of which those that a client sends are here.
KAFKA_API_KEYS: Final = (
    "produce",
    "fetch",
    "offsets",
    "metadata",
    "leaderandisr",
    "stopreplica",
    "updatemetadata",
    "controlledshutdown",
    "offsetcommit",
    "offsetfetch",
    "findcoordinator",
    "joingroup",
    "heartbeat",
    "leavegroup",
    "syncgroup",
    "describegroups",
    "listgroups",
    "saslhandshake",
    "apiversions",
    "createtopics",
    "deletetopics",
    "deleterecords",
    "initproducerid",
    "offsetforleaderepoch",
    "addpartitionstotxn",
    "addoffsetstotxn",
    "endtxn",
    "writetxnmarkers",
    "txnoffsetcommit",
    "describeacls",
    "createacls",
    "deleteacls",
    "describeconfigs",
    "alterconfigs",
)
_KAFKA_TOPIC: Final = re.compile(r"[-a-zA-Z0-9._]{1,255}\Z")
_HEADER_NAME: Final = re.compile(r":?[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")  # a token, RFC 9110
_CONTROL: Final = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


@lru_cache(maxsize=4096)
def _program(text: str) -> tuple[int, str]:
    """The instructions that an expression compiles to, and why it cannot be taken, if so."""
    import re2  # slow to import, and only L7 rules have regular expressions

    options = re2.Options()
    options.log_errors = False
    options.max_mem = _MAX_MEMORY  # so that none takes longer than a few milliseconds
    try:
        size = int(re2.compile(text, options).programsize)
    except re2.error as error:
        reason = error.args[0] if error.args else "syntax error"
        if isinstance(reason, bytes):
            reason = reason.decode(errors="replace")
        if "too large" in str(reason):
            return _OF_TOO_LARGE, _TOO_LARGE
        return len(text), f"is not an RE2 regular expression: {reason}"
    return size, _TOO_LARGE if size > MAX_PROGRAM_SIZE else ""


class _Regex:
    model: Final = Text(max_length=MAX_REGEX)

    def check(self, node: Node, path: str, c: Checking) -> Any:
        text = self.model.check(node, path, c)
        if text is INVALID:
            return INVALID
        if _CONTROL.search(text):
            c.fault(path, node, "holds a control character, which no request has there")
            return INVALID
        if c.work.programs <= 0:
            c.fault(path, node, "the regular expressions of all documents together are too large")
            return INVALID
        size, wrong = _program(text)
        c.work.programs -= size
        if wrong:
            c.fault(path, node, f"{shown(text)} {wrong}")
            return INVALID
        return text


# ---- secrets and TLS

_SECRET: Final = Object(
    {"namespace": Text(max_length=63), "name": Text(max_length=253)},
    required=("name",),
    build=lambda v, node, path, c: (v.get("namespace", ""), v.get("name", "")),
)
TLS: Final = Object(
    {
        "secret": _SECRET,
        "trustedCA": Text(max_length=253),
        "certificate": Text(max_length=253),
        "privateKey": Text(max_length=253),
    },
    required=("secret",),
    build=lambda v, node, path, c: TLSContext(
        secret=v.get("secret", ("", "")),
        trusted_ca=v.get("trustedCA", ""),
        certificate=v.get("certificate", ""),
        private_key=v.get("privateKey", ""),
    ),
    name="TLSContext",
)


# ---- dns


def _fqdn_text(pattern: bool) -> Text:
    allowed = re.compile(r"[-a-zA-Z0-9._*]+\Z" if pattern else r"[-a-zA-Z0-9._]+\Z")

    def parse(text: str) -> str:
        if not allowed.match(text):
            star = " and '*'" if pattern else ""
            raise ValueError(f"{shown(text)} may hold letters, digits, '-', '_', '.'{star} only")
        name = text.lower().removesuffix(".")
        if not name or ".." in name or name.startswith("."):
            raise ValueError(f"{shown(text)} is not a DNS name: a part of it is empty")
        return name

    return Text(parse, max_length=255)


def _build_fqdn(v: dict[str, Any], node: Node, path: str, c: Checking) -> Any:
    given = [x for x in ("matchName", "matchPattern") if _given(node, x)]
    if len(given) != 1:
        c.fault(path, node, "needs either matchName or matchPattern")
        return INVALID
    return v.get("matchName", ""), v.get("matchPattern", "")


def _given(node: Node, name: str) -> bool:
    return name in node.value and node.value[name].value is not None


_FQDN_FIELDS: Final = {"matchName": _fqdn_text(False), "matchPattern": _fqdn_text(True)}


def _fqdn(make: type[FQDNSelector] | type[DNSRule]) -> Object:
    def build(v: dict[str, Any], node: Node, path: str, c: Checking) -> Any:
        found = _build_fqdn(v, node, path, c)
        return found if found is INVALID else make(*found)

    return Object(_FQDN_FIELDS, build=build, name="DNSNames")


FQDN_PEER: Final = _fqdn(FQDNSelector)
_DNS: Final = _fqdn(DNSRule)


# ---- kafka


def _build_kafka(v: dict[str, Any], node: Node, path: str, c: Checking) -> Any:
    if "role" in v and "apiKey" in v:
        c.fault(path, node, "role and apiKey cannot stand together")
    return KafkaRule(
        role=v.get("role", ""),
        api_key=v.get("apiKey", ""),
        api_version=v.get("apiVersion", ""),
        client_id=v.get("clientID", ""),
        topic=v.get("topic", ""),
    )


def _api_version(text: str) -> str:
    if text and not (text.isascii() and text.isdigit() and len(text) <= 5 and int(text) < 1 << 15):
        raise ValueError(f"{shown(text)} is not a version from 0 to 32767")
    return str(int(text)) if text else ""


def _topic(text: str) -> str:
    if text and not _KAFKA_TOPIC.match(text):
        raise ValueError(
            f"{shown(text)} is not a topic: letters, digits, '-', '_' and '.', at most 255"
        )
    return text


_KAFKA: Final = Object(
    {
        "role": Choice(("produce", "consume"), "role", any_case=True),
        "apiKey": Choice(KAFKA_API_KEYS, "Kafka request", any_case=True),
        "apiVersion": Text(_api_version, max_length=8),
        "clientID": Text(max_length=255),
        "topic": Text(_topic, max_length=1024),
    },
    build=_build_kafka,
)


# ---- http


def _header_name(text: str) -> str:
    if not _HEADER_NAME.match(text):
        raise ValueError(f"{shown(text)} is not the name of a header")
    return text


def _header_value(text: str) -> str:
    if _CONTROL.search(text):
        raise ValueError("a header's value has no control characters")
    return text


def _header(text: str) -> str:
    name, _, value = text.partition(" ")
    _header_name(name.removesuffix(":"))
    _header_value(value)
    return text


_HEADER_MATCH: Final = Object(
    {
        "name": Text(_header_name),
        "value": Text(_header_value, max_length=8192),
        "secret": _SECRET,
        "mismatch": Choice(("LOG", "ADD", "DELETE", "REPLACE"), "mismatch action"),
    },
    required=("name",),
    build=lambda v, node, path, c: HeaderMatch(
        name=v.get("name", ""),
        value=v.get("value", ""),
        mismatch=v.get("mismatch", ""),
        secret=v.get("secret"),
    ),
)
_HTTP: Final = Object(
    {
        "path": _Regex(),
        "method": _Regex(),
        "host": _Regex(),
        "headers": ListOf(Text(_header, max_length=8192), MAX_HEADERS),
        "headerMatches": ListOf(_HEADER_MATCH, MAX_HEADERS),
    },
    build=lambda v, node, path, c: HTTPRule(
        method=v.get("method", ""),
        path=v.get("path", ""),
        host=v.get("host", ""),
        headers=tuple(v.get("headers", ())),
        header_matches=tuple(v.get("headerMatches", ())),
    ),
)


# ---- any other parser


def _generic_key(text: str) -> str:
    if not text:
        raise ValueError("a field's name cannot be empty")
    return text


_GENERIC: Final = MapOf(Text(), max_items=256, key=_generic_key)
_L7PROTO: Final = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9._]{0,62}[A-Za-z0-9])?\Z")
_KNOWN_PARSERS: Final = ("http", "kafka", "dns")


def _l7proto(text: str) -> str:
    if text in (*_KNOWN_PARSERS, "tls", "listener"):
        known = f"write its rules under `{text}`" if text in _KNOWN_PARSERS else "it is reserved"
        raise ValueError(f"{shown(text)} cannot be an l7proto: {known}")
    if not _L7PROTO.match(text):
        raise ValueError(
            f"{shown(text)} is not the name of a parser: letters, digits, '-', '.' and '_', at "
            "most 64"
        )
    return text


def _build_l7(v: dict[str, Any], node: Node, path: str, c: Checking) -> Any:
    given = [name for name in (*_KNOWN_PARSERS, "l7proto") if _given(node, name)]
    if len(given) > 1:
        c.fault(path, node, f"{' and '.join(given)} rules cannot stand together")
        return INVALID
    if _given(node, "l7") and "l7proto" not in given:
        c.fault(f"{path}.l7", node.value["l7"], "needs l7proto")
        return INVALID
    kinds = [name for name in given if name in v]
    if not kinds:
        return None
    (kind,) = kinds
    if kind != "l7proto":
        if not v[kind] and not node.value[kind].value:
            c.warn(f"{path}.{kind}", node.value[kind], "is empty: it lets no request pass")
        return L7Rules(kind, tuple(dict.fromkeys(v[kind])))
    if "l7" not in v:
        return L7Rules(v["l7proto"], (GenericRule(),))
    if not v["l7"] and not node.value["l7"].value:
        c.warn(f"{path}.l7", node.value["l7"], "is empty: it lets no request pass")
    rules = (GenericRule(tuple(sorted(fields.items()))) for fields in v["l7"])
    return L7Rules(v["l7proto"], tuple(dict.fromkeys(rules)))


L7: Final = Object(
    {
        "http": ListOf(_HTTP, MAX_L7_RULES, "rules"),
        "kafka": ListOf(_KAFKA, MAX_L7_RULES, "rules"),
        "dns": ListOf(_DNS, MAX_L7_RULES, "rules"),
        "l7proto": Text(_l7proto, max_length=64),
        "l7": ListOf(_GENERIC, MAX_L7_RULES, "rules"),
    },
    build=_build_l7,
    name="L7Rules",
)
