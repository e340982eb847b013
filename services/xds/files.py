"""Static resources: a directory of YAML and JSON that is served, and followed as it changes.

    resources:                    # or one resource by itself, or a list of them
    - "@type": type.googleapis.com/envoy.config.cluster.v3.Cluster
      name: backend
      ...
    nodes: [web-1, web-2]         # whose resources these are; left out: everybody's

Files end in .yaml, .yml or .json; directories below are read too, and what begins with a dot is
not, so an editor's or a config map's own files do no harm. A file may hold several YAML documents.
The directory counts as a whole: while one file is faulty, the last good state of all of them is
served and the fault is shown. Before the first good state nothing is said to any client.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import importlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import structlog
from google.protobuf import any_pb2, json_format
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from cilia.errors import InvalidError
from cilia.telemetry import fields
from services.xds.cache import ResourceCache
from services.xds.resources import PREFIX, NodeID, TypeURL, make

log = structlog.get_logger()

SUFFIXES: Final = (".yaml", ".yml", ".json")
MAX_FILE_BYTES: Final = 64 << 20
MAX_FILES: Final = 10_000
MAX_VALUES: Final = 5_000_000
"""Of one document, with aliases written out."""
_NAME_FIELDS: Final = ("name", "cluster_name", "route_config_name")
_WRAPPER: Final = "envoy.service.discovery.v3.Resource"


class FileFault(InvalidError):
    """A file that cannot be served."""


@dataclass(frozen=True, slots=True)
class Entry:
    url: TypeURL
    name: str
    value: bytes
    nodes: tuple[NodeID, ...] | None


@dataclass(frozen=True, slots=True)
class FileState:
    """How a file was when it was last read."""

    path: Path
    resources: int = 0
    error: str = ""
    loaded: float = 0.0


_Stamp = dict[Path, tuple[int, int, int]]


class ResourceDirectory:
    """Keeps a cache in step with a directory; `sync` is a controller's work."""

    def __init__(self, directory: Path, cache: ResourceCache) -> None:
        self.directory = directory
        self.files: list[FileState] = []
        self.loaded = False
        self._cache = cache
        self._seen: _Stamp | None = None
        self._served: dict[tuple[TypeURL, str, NodeID | None], bytes] = {}

    def prepare(self) -> None:
        """Keeps every client waiting for the first good state."""
        self._cache.hold()

    async def sync(self) -> None:
        """Reads the directory if it changed. Raises FileFault, and then nothing has changed."""
        stamp = await asyncio.to_thread(_stamp, self.directory)
        if stamp == self._seen:
            if fault := self._fault():
                raise FileFault(fault)
            return
        states, entries = await asyncio.to_thread(_read_all, sorted(stamp))
        # Written to while it was read: a half file is no fault, and no state.
        if await asyncio.to_thread(_stamp, self.directory) != stamp:
            return
        self._seen = stamp
        self.files = states
        if fault := self._fault():
            raise FileFault(fault, cure="The last good state of the directory is served meanwhile")
        self._serve(entries)

    def _fault(self) -> str:
        faulty = [state for state in self.files if state.error]
        if not faulty:
            return ""
        more = f" (and {len(faulty) - 1} more files)" if len(faulty) > 1 else ""
        return f"{faulty[0].path}: {faulty[0].error}{more}"

    def _serve(self, entries: list[Entry]) -> None:
        wanted: dict[tuple[TypeURL, str, NodeID | None], bytes] = {}
        for entry in entries:
            for node in entry.nodes if entry.nodes is not None else (None,):
                wanted[entry.url, entry.name, node] = entry.value
        with self._cache.transaction() as change:
            for (url, name, node), value in wanted.items():
                if self._served.get((url, name, node)) != value:
                    change.put(url, name, value, nodes=None if node is None else [node])
            for url, name, node in self._served.keys() - wanted.keys():
                if node is not None:
                    change.remove(url, name, nodes=[node])
                else:
                    change.remove_common(url, name)
        self._served = wanted
        log.info(
            "The resource directory was loaded.",
            **{fields.PATH: str(self.directory), fields.COUNT: len(wanted)},
        )
        if not self.loaded:
            self.loaded = True
            self._cache.release()


def _stamp(directory: Path) -> _Stamp:
    """What is there and when it was written. Raises FileFault."""
    try:
        found: _Stamp = {}
        for path in _walk(directory):
            status = path.stat()
            found[path] = (status.st_ino, status.st_mtime_ns, status.st_size)
            if len(found) > MAX_FILES:
                raise FileFault(f"{directory} holds more than {MAX_FILES} files")
    except OSError as error:
        raise FileFault(f"cannot read {error.filename or directory}: {error.strerror}") from error
    return found


def _walk(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _walk(path)
        elif path.suffix in SUFFIXES:
            yield path


def _read_all(paths: list[Path]) -> tuple[list[FileState], list[Entry]]:
    states: list[FileState] = []
    entries: list[Entry] = []
    seen: dict[tuple[TypeURL, str, NodeID | None], Path] = {}
    for path in paths:
        try:
            mine = list(read_file(path))
            for entry in mine:
                for node in entry.nodes if entry.nodes is not None else (None,):
                    other = seen.setdefault((entry.url, entry.name, node), path)
                    if other is not path:
                        raise FileFault(f"{entry.name!r} is in {other} already")
        except FileFault as fault:
            states.append(FileState(path, error=fault.message, loaded=time.time()))
            continue
        entries += mine
        states.append(FileState(path, len(mine), loaded=time.time()))
    return states, entries


def read_file(path: Path) -> Iterator[Entry]:
    """The resources of one file. Raises FileFault."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise FileFault(f"cannot be read: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise FileFault(f"is larger than {MAX_FILE_BYTES >> 20} MiB")
    try:
        text = data.decode()
        if path.suffix == ".json":
            documents = [json.loads(text)]
        else:
            documents = list(YAML(typ="safe").load_all(text))
    except UnicodeDecodeError as error:
        raise FileFault(f"is not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise FileFault(f"line {error.lineno}: {error.msg}") from error
    except YAMLError as error:
        raise FileFault(_of_yaml(error)) from error
    except RecursionError as error:
        raise FileFault("is nested too deeply") from error
    for document in documents:
        if document is None:
            continue
        if _weight(document, {}) > MAX_VALUES:
            raise FileFault(f"a document has more than {MAX_VALUES} values")
        yield from _entries(document)


def _of_yaml(error: YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"line {mark.line + 1}: {problem}" if mark is not None else str(problem)


def _weight(value: Any, known: dict[int, int]) -> int:
    """How many values, every alias counted as often as it is used."""
    if not isinstance(value, dict | list):
        return 1
    found = known.get(id(value))
    if found is None:
        known[id(value)] = MAX_VALUES + 1  # within itself
        inner = value.values() if isinstance(value, dict) else value
        found = known[id(value)] = 1 + sum(_weight(item, known) for item in inner)
    return found


def _entries(document: Any) -> Iterator[Entry]:
    nodes: tuple[NodeID, ...] | None = None
    items = document
    if isinstance(document, dict) and "@type" not in document:
        extra = document.keys() - {"resources", "nodes", "version_info", "type_url"}
        if extra or "resources" not in document:
            raise FileFault(
                f"has {', '.join(sorted(map(str, extra))) or 'nothing'} at its top",
                cure='Write "resources:" and below it a list of resources with "@type"',
            )
        items = document["resources"]
        if (named := document.get("nodes")) is not None:
            if not isinstance(named, list) or not all(isinstance(n, str) and n for n in named):
                raise FileFault("nodes: is not a list of names")
            nodes = tuple(NodeID(name) for name in dict.fromkeys(named))
    elif isinstance(document, dict):
        items = [document]
    if not isinstance(items, list):
        raise FileFault("resources: is not a list")
    for number, item in enumerate(items):
        where = f"resources[{number}]"
        if not isinstance(item, dict) or not isinstance(item.get("@type"), str):
            raise FileFault(f'{where}: has no "@type"')
        try:
            url, name, value = _resource(item)
            make(url, name, value)
        except InvalidError as error:
            raise FileFault(f"{where}: {error.message}") from error
        yield Entry(url, name, value, nodes)


def _resource(item: dict[str, Any]) -> tuple[TypeURL, str, bytes]:
    kind = item["@type"].rpartition("/")[2]
    if kind == _WRAPPER:
        inner = item.get("resource")
        if not isinstance(inner, dict) or not isinstance(inner.get("@type"), str):
            raise FileFault('resource: has no "@type"')
        url, name, value = _resource(inner)
        return url, str(item.get("name", name)), value
    if "@value" in item:  # a type that we have no messages of
        try:
            value = base64.b64decode(str(item["@value"]), validate=True)
        except binascii.Error as error:
            raise FileFault(f"@value: {error}") from error
        return TypeURL(PREFIX + kind), _name({}, item), value
    _import_all()
    packed = any_pb2.Any()
    try:
        json_format.ParseDict({**item, "@type": PREFIX + kind}, packed)
    except (json_format.ParseError, TypeError, ValueError) as error:
        raise FileFault(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise FileFault("is nested too deeply") from error
    return TypeURL(PREFIX + kind), _name(item, item), packed.value


def _name(message: dict[str, Any], item: dict[str, Any]) -> str:
    found = {**message, **item}
    for field in _NAME_FIELDS:
        for spelling in (field, _camel(field)):
            if isinstance(found.get(spelling), str) and found[spelling]:
                return str(found[spelling])
    addresses = found.get("endpoint_ips", found.get("endpointIps"))
    if isinstance(addresses, list) and addresses:
        return str(addresses[0])
    if "policy" in found:  # cilium.NetworkPolicyHosts: an identity
        return str(found["policy"])
    raise FileFault("has no name")


def _camel(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(map(str.capitalize, others))


@cache
def _import_all() -> None:
    """Makes every message of the wheel known, for any of them may stand in an Any: a second."""
    for package in ("envoy", "xds", "udpa"):
        for root in map(Path, importlib.import_module(package).__path__):
            for path in sorted(root.rglob("*_pb2.py")):
                name = ".".join(path.relative_to(root.parent).with_suffix("").parts)
                importlib.import_module(name)
    importlib.import_module("protos.npds.v1.npds_pb2")
