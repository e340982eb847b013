"""What can be said on the command line, and what it means."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli import refs
from cli.errors import CliError, Exit


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("42", "id", 42),
        ("web", "name", "web"),
        ("shop/web", "name", "shop/web"),
        ("10.217.0.5", "address", "10.217.0.5"),
        ("FD00:C111:0::5", "address", "fd00:c111::5"),
        ("4294967295", "id", 4294967295),
        ("web42", "name", "web42"),
    ],
)
def test_endpoint_reference(text: str, field: str, value: object) -> None:
    ref = refs.endpoint_ref(text)
    assert ref.WhichOneof("ref") == field
    assert getattr(ref, field) == value


@pytest.mark.parametrize(("text", "code"), [("", Exit.USAGE), ("4294967296", Exit.INVALID)])
def test_endpoint_reference_refused(text: str, code: Exit) -> None:
    with pytest.raises(CliError) as caught:
        refs.endpoint_ref(text)
    assert caught.value.code is code


def test_labels_are_split_at_commas_and_keep_their_source() -> None:
    parsed = refs.labels(["app=web,tier=front", "reserved:world", "k8s:a=b=c"])
    assert [(item.source, item.key, item.value) for item in parsed] == [
        ("k8s", "app", "web"),
        ("k8s", "tier", "front"),
        ("reserved", "world", ""),
        ("k8s", "a", "b=c"),
    ]


def test_bad_label_names_the_label_and_the_cure() -> None:
    with pytest.raises(CliError) as caught:
        refs.parse_label("=web")
    assert caught.value.code is Exit.INVALID
    assert "=web" in caught.value.message
    assert "key=value" in caught.value.hint


@pytest.mark.parametrize(
    ("texts", "kind"),
    [
        (["10.0.0.1"], "address"),
        (["2001:db8::1"], "address"),
        (["identity:1234"], "identity"),
        (["endpoint:42"], "endpoint"),
        (["xwing"], "endpoint"),
        (["default/xwing"], "endpoint"),
        (["org=empire"], "labels"),
        (["reserved:world"], "labels"),
        (["org=empire", "class=deathstar"], "labels"),
        (["xwing", "class=deathstar"], "labels"),
    ],
)
def test_subject(texts: list[str], kind: str) -> None:
    assert refs.subject(texts).WhichOneof("subject") == kind


@pytest.mark.parametrize(
    ("text", "expected"),
    [("80", (80, "ANY")), ("80/tcp", (80, "TCP")), ("0/ICMPv6", (0, "ICMPV6"))],
)
def test_port(text: str, expected: tuple[int, str]) -> None:
    assert refs.port(text) == expected


@pytest.mark.parametrize("text", ["", "x", "65536", "-1", "80/tpc", "80/tcp/x", "²"])
def test_port_refused(text: str) -> None:
    with pytest.raises(CliError) as caught:
        refs.port(text)
    assert caught.value.code is Exit.INVALID


@pytest.mark.parametrize("text", ["0", "-1", "x", "4294967296", ""])
def test_identity_number_refused(text: str) -> None:
    with pytest.raises(CliError):
        refs.identity_number(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rule1", refs.PolicyPattern("rule1")),
        ("shop/rule1", refs.PolicyPattern("rule1", namespace="shop")),
        ("ccnp/rule1", refs.PolicyPattern("rule1", kind="CiliumClusterwideNetworkPolicy")),
        ("CNP/shop/rule1", refs.PolicyPattern("rule1", "CiliumNetworkPolicy", "shop")),
    ],
)
def test_policy_pattern(text: str, expected: refs.PolicyPattern) -> None:
    assert refs.policy_pattern(text) == expected


@pytest.mark.parametrize("text", ["", "/x", "a/b/c/d", "nokind/ns/x", "x/"])
def test_policy_pattern_refused(text: str) -> None:
    with pytest.raises(CliError) as caught:
        refs.policy_pattern(text)
    assert caught.value.code is Exit.INVALID


def test_policy_pattern_matches_only_what_it_says() -> None:
    pattern = refs.PolicyPattern("rule1", namespace="shop")
    assert pattern.matches("CiliumNetworkPolicy", "shop", "rule1")
    assert not pattern.matches("CiliumNetworkPolicy", "default", "rule1")
    assert not pattern.matches("CiliumNetworkPolicy", "shop", "rule2")


def test_of_many_namespaces_the_nearest_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"pod-{number}" for number in range(100)] + ["web-1"]
    monkeypatch.setattr(Path, "glob", lambda _self, _pattern: map(Path, names))
    with pytest.raises(CliError) as caught:
        refs.netns_path("wbe-1")
    assert caught.value.hint.endswith("Known: web-1, and 100 more.")
    with pytest.raises(CliError) as caught:
        refs.netns_path("zzz")
    assert len(caught.value.hint) < 250


def test_missing_namespace_names_the_cure(tmp_path: Path) -> None:
    with pytest.raises(CliError) as caught:
        refs.netns_path(str(tmp_path / "absent"))
    assert caught.value.code is Exit.NOT_FOUND
    assert "ip netns add" in caught.value.hint
