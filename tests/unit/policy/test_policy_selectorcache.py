"""The index of selectors and identities against one that compares each with each."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from cilia.identity import cidr_labels
from cilia.labels import Labels
from cilia.policy.api import CidrSelector, EndpointSelector, Requirement
from cilia.policy.selectorcache import SelectorCache

NETWORKS = [
    ip_network(x)
    for x in (
        "0.0.0.0/0", "10.0.0.0/8", "10.0.0.0/24", "10.0.0.128/26", "10.0.0.129/32", "10.1.0.0/16",
        "::/0", "2001:db8::/32", "2001:db8::/64", "2001:db8::1/128",
    )
]  # fmt: skip
LABELS = [cidr_labels(x) for x in NETWORKS] + [
    Labels.parse([f"k8s:app={a}", f"k8s:env={b}"]) for a in "xy" for b in "pq"
]
requirements = st.one_of(
    st.builds(
        Requirement,
        st.sampled_from(["k8s", "any"]),
        st.sampled_from(["app", "env"]),
        st.sampled_from(["In", "NotIn"]),
        st.lists(st.sampled_from("xypq"), min_size=1, max_size=2).map(lambda x: tuple(sorted(x))),
    ),
    st.builds(
        Requirement,
        st.sampled_from(["cidr", "any", "reserved", "k8s"]),
        st.sampled_from(["10.0.0.0/8", "world", "app", "world-ipv6"]),
        st.sampled_from(["Exists", "DoesNotExist"]),
    ),
)
selectors = st.one_of(
    st.lists(requirements, max_size=2).map(lambda x: EndpointSelector(tuple(x))),
    st.sampled_from(NETWORKS).flatmap(
        lambda outer: st.lists(
            st.sampled_from([x for x in NETWORKS if x.version == outer.version]), max_size=2
        ).map(
            lambda holes: CidrSelector(
                outer,
                tuple(x for x in holes if x.subnet_of(outer)),  # type: ignore[arg-type]  # of one family
            )
        )
    ),
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("identity"), st.integers(0, len(LABELS) - 1)),
        st.tuples(st.just("selector"), selectors),
    ),
    max_size=40,
)


@settings(deadline=None)
@given(steps)
def test_it_selects_what_a_plain_comparison_selects(steps: list[tuple[str, Any]]) -> None:
    cache: SelectorCache[str, int] = SelectorCache()
    present: set[int] = set()
    used: set[Any] = set()
    for what, n in steps:  # a second time takes away what the first one brought
        if what == "identity":
            told = cache.remove_identity(n) if n in present else cache.add_identity(n, LABELS[n])
            present ^= {n}
            assert set(told) == {x for x in used if x.matches(LABELS[n])}
        elif n in used:
            cache.release(n, "user")
            used.discard(n)
        else:
            cache.acquire(n, "user", 1)
            used.add(n)
        for selector in used:
            wanted = {x for x in present if selector.matches(LABELS[x])}
            assert cache.selected(selector) == wanted
            assert set(cache.search(selector)) == wanted
    assert len(cache) == len(used)
