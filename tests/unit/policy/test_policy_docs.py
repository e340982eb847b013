"""The guide to the language is true: its examples are taken, its numbers are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cilia.policy import Kind, parse_documents, tree
from cilia.policy.api import ENTITIES
from cilia.policy.language import documents, elements, parse_visibility, ports, requests, rules
from cilia.policy.schema import MAX_FAULTS, Work

GUIDE = (Path(__file__).parents[3] / "docs/policy-language.md").read_text()
EXAMPLES = re.findall(r"^```yaml\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("text", EXAMPLES)
def test_examples_are_taken_without_a_warning(text: str) -> None:
    result = parse_documents(text, source="guide.yaml")
    assert (result.faults, result.warnings) == ((), ())


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 3


def section(title: str) -> str:
    found = re.search(rf"^## {title}$(.*?)(?=^## |\Z)", GUIDE, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def test_bounds() -> None:
    expected = [
        (tree.MAX_YAML_BYTES >> 20, "MiB of YAML"),
        (tree.MAX_JSON_BYTES >> 20, "MiB of JSON"),
        (tree.MAX_NODES, "values"),
        (tree.MAX_DEPTH, "levels"),
        (tree.MAX_ALIASED_NODES, "values from aliases"),
        (documents.MAX_DOCUMENTS, "documents"),
        (documents.MAX_DOCUMENT_BYTES >> 10, "KiB as JSON"),
        (documents.MAX_RULES, "rules"),
        (documents.MAX_ORIGINS, "rules, entries and L7 port rules"),
        (rules.MAX_ELEMENTS, "|"),
        (elements.MAX_PEERS, "|"),
        (ports.MAX_PORTS, "; port rules of an entry"),
        (ports.MAX_PORT_RULES, "|"),
        (requests.MAX_L7_RULES, "|"),
        (requests.MAX_REGEX, "characters"),
        (requests.MAX_PROGRAM_SIZE, "RE2 instructions"),
        (Work().programs, "in one text"),
        (MAX_FAULTS, "of a document"),
    ]
    bounds = section("Bounds")
    assert [
        (n, what) for n, what in expected if not re.search(rf"\b{n:,} ?{re.escape(what)}", bounds)
    ] == []


def test_every_kind_and_entity_is_named() -> None:
    assert [kind for kind in Kind if f"`{kind}`" not in section("Files")] == []
    assert [x for x in ENTITIES if f"`{x}`" not in section("A rule")] == []


def test_the_visibility_shown_is_one() -> None:
    (text,) = re.findall(r"`(<Ingress.*?>)`", GUIDE)
    assert len(parse_visibility(text)) == 3
