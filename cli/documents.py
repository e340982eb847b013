"""Policy files on the command line: found, read, and checked with `cilia.policy` offline."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cilia.policy import Document, Fault, parse_documents
from cli.errors import CliError, Exit, FaultLine

SUFFIXES = (".yaml", ".yml", ".json")


@dataclass(frozen=True, slots=True)
class Source:
    """A document's text and the name it is known by in messages."""

    name: str
    text: bytes


@dataclass(frozen=True, slots=True)
class Checked:
    """What a set of files holds."""

    documents: tuple[Document, ...]
    faults: tuple[FaultLine, ...]
    warnings: tuple[FaultLine, ...]


def read(paths: Iterable[str]) -> list[Source]:
    """Read files, `-` (standard input), and directories (their .yaml, .yml and .json, sorted).

    Raises CliError when a file is not there, cannot be read, or a directory holds none.
    """
    sources: list[Source] = []
    for text in paths:
        if text == "-":
            sources.append(Source("-", sys.stdin.buffer.read()))
            continue
        path = Path(text)
        try:
            if path.is_dir():
                files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
                if not files:
                    raise CliError(f"no {', '.join(SUFFIXES)} file in {path}", code=Exit.NOT_FOUND)
                sources.extend(Source(str(p), p.read_bytes()) for p in files)
            else:
                sources.append(Source(text, path.read_bytes()))
        except OSError as error:
            code = Exit.NOT_FOUND if isinstance(error, FileNotFoundError) else Exit.FAILED
            if isinstance(error, PermissionError):
                code = Exit.PERMISSION
            raise CliError(f"cannot read {text}: {error.strerror}", code=code) from error
    if all(not source.text.strip() for source in sources):
        raise CliError("No policy specified: the input is empty", code=Exit.INVALID)
    return sources


def check(sources: Sequence[Source], *, default_namespace: str) -> Checked:
    """Parse every source; a fault in one does not hide those of the others."""
    documents: list[Document] = []
    faults: list[FaultLine] = []
    warnings: list[FaultLine] = []
    for source in sources:
        result = parse_documents(
            source.text, source=source.name, default_namespace=default_namespace
        )
        documents.extend(result.documents)
        faults.extend(map(fault_line, result.faults))
        warnings.extend(map(fault_line, result.warnings))
    return Checked(tuple(documents), tuple(faults), tuple(warnings))


def fault_line(fault: Fault) -> FaultLine:
    """A fault of the policy library as printed."""
    return FaultLine(
        source=fault.origin.source,
        line=fault.origin.line,
        column=fault.origin.column,
        path=fault.path,
        message=fault.message,
        document=fault.document,
    )


def invalid(faults: Sequence[FaultLine], *, changed_nothing: bool) -> CliError:
    """The error for documents with faults."""
    count = f"{len(faults)} fault" + ("s" if len(faults) != 1 else "")
    tail = "; nothing was changed" if changed_nothing else ""
    return CliError(f"invalid policy: {count}{tail}", code=Exit.INVALID, faults=faults)
