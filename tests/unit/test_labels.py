"""Labels: parsing, bounds, canonical form, and the filter that picks identity labels."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cilia.labels import (
    Label,
    LabelError,
    LabelFilter,
    Labels,
    labels_from_mapping,
    parse_selector_key,
)


@pytest.mark.parametrize(
    ("text", "source", "key", "value"),
    [
        ("k8s:app=web", "k8s", "app", "web"),
        ("app=web", "unspec", "app", "web"),
        ("app", "unspec", "app", ""),
        ("$host", "reserved", "host", ""),
        ("reserved.host", "reserved", "host", ""),
        ("reserved:=host", "reserved", "host", ""),
        ("reserved:host", "reserved", "host", ""),
        ("foo:bar==v", "foo", "bar", "=v"),
        ("k8s:a:b=c", "k8s", "a:b", "c"),
        ("cidr:2001:db8::/32", "cidr", "2001:db8::/32", ""),
        ("container:note=two words", "container", "note", "two words"),
    ],
)
def test_parse(text: str, source: str, key: str, value: str) -> None:
    assert Label.parse(text) == Label(source, key, value)


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("", "cannot be empty"),
        (":a=b", "empty source"),
        ("k8s:=b", "empty key"),
        ("k8s:", "empty key"),
        ("=b", "empty key"),
        ("K8S:a=b", "lower case"),
        ("k8s:a=b;c", "cannot contain ';'"),
        ("k8s:a;b=c", "cannot contain ';'"),
        ("k8s:a b=c", "cannot contain a blank"),
        ("k8s:a=\x1b[31m", "cannot be printed"),
        ("k8s:" + "a" * 349, "longer than 348"),
        ("k8s:a=" + "b" * 1025, "longer than 1024"),
        ("s" * 64 + ":a", "at most 63"),
    ],
)
def test_mistakes_are_named(text: str, mistake: str) -> None:
    with pytest.raises(LabelError, match=mistake):
        Label.parse(text)


def test_printing_leaves_out_an_empty_value_and_the_canonical_form_does_not() -> None:
    labels = Labels.parse(["reserved:host", "k8s:app=web"])
    assert str(labels) == "k8s:app=web,reserved:host"
    assert labels.canonical() == b"k8s:app=web;reserved:host=;"


def test_one_label_a_key() -> None:
    merged = Labels.parse(["k8s:app=a", "k8s:x=1"]).merge(Labels.parse(["container:app=b"]))
    assert merged == Labels.parse(["container:app=b", "k8s:x=1"])
    with pytest.raises(LabelError, match="same key"):
        Labels.parse(["k8s:app=a", "container:app=a"])


def test_order_and_place_do_not_matter() -> None:
    a, b = Labels.parse(["k8s:b=1", "k8s:a=2"]), Labels.parse(["k8s:a=2", "k8s:b=1"])
    assert a == b
    assert hash(a) == hash(b)
    assert a.canonical() == b.canonical()
    assert [x.key for x in a] == ["a", "b"]


def test_get_by_source() -> None:
    labels = Labels.parse(["k8s:app=web"])
    assert labels.get("app") == labels.get("app", "any") == labels.get("app", "k8s")
    assert labels.get("app", "container") is None
    assert labels.get("other") is None


def test_too_many_labels() -> None:
    with pytest.raises(LabelError, match="257 labels"):
        Labels(Label("k8s", f"k{i}") for i in range(257))


def test_selector_keys_default_to_any_source() -> None:
    assert parse_selector_key("app") == ("any", "app")
    assert parse_selector_key("k8s:app") == ("k8s", "app")
    assert parse_selector_key("reserved.host") == ("reserved", "host")
    assert parse_selector_key("$host") == ("reserved", "host")
    with pytest.raises(LabelError, match="contains '='"):
        parse_selector_key("app=web")


label = st.builds(
    Label,
    st.sampled_from(["k8s", "container", "reserved"]),
    st.text(alphabet="ab:./-", min_size=1, max_size=5),
    st.text(alphabet="ab=:/. -", max_size=5),
)


@given(st.lists(label, max_size=5), st.lists(label, max_size=5))
def test_canonical_form_is_injective_and_reversible(a: list[Label], b: list[Label]) -> None:
    x, y = Labels(a), Labels(b)
    assert (x.canonical() == y.canonical()) == (x == y)
    assert Labels.from_canonical(x.canonical()) == x


@given(st.text(max_size=40))
def test_any_text_is_a_label_or_a_named_mistake(text: str) -> None:
    with contextlib.suppress(LabelError):
        found = Label.parse(text)
        assert Labels.from_canonical(Labels([found]).canonical()) == Labels([found])


def test_default_filter() -> None:
    labels = labels_from_mapping(
        {
            "app": "web",
            "app.kubernetes.io/name": "web",
            "io.kubernetes.pod.namespace": "default",
            "io.kubernetes.pod.name": "web-1",
            "io.cilium.k8s.namespace.labels.team": "red",
            "io.cilium.k8s.policy.cluster": "default",
            "kubernetes.io/arch": "amd64",
            "failure-domain.beta.kubernetes.io/zone": "z",
            "pod-template-hash": "1",
            "annotation.x": "y",
        }
    )
    identity, information = LabelFilter().split(labels)
    assert {x.key for x in identity} == {
        "app",
        "app.kubernetes.io/name",
        "io.kubernetes.pod.namespace",
        "io.cilium.k8s.namespace.labels.team",
        "io.cilium.k8s.policy.cluster",
    }
    assert identity.merge(information) == labels


def test_user_rules() -> None:
    labels = Labels.parse(["k8s:app=web", "k8s:foo=1", "container:foo2=2", "reserved:host"])
    ignoring, _ = LabelFilter.parse("k8s:!foo").split(labels)
    assert {x.key for x in ignoring} == {"app", "foo2", "host"}
    only, rest = LabelFilter.parse("k8s:app").split(labels)
    assert {x.key for x in only} == {"app", "host"}
    assert {x.key for x in rest} == {"foo", "foo2"}
    longest, _ = LabelFilter.parse("!fo foo2").split(labels)
    assert {x.key for x in longest} == {"foo2", "host"}
    with pytest.raises(LabelError, match="no pattern"):
        LabelFilter.parse("k8s:")
    with pytest.raises(LabelError, match="unterminated"):
        LabelFilter.parse("k8s:(")
