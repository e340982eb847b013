"""The dialogue of the watch: no half snapshot is ever in force."""

from __future__ import annotations

from cilia.identity import NumericIdentity
from cilia.labels import Labels
from services.agent.clusterwatch import (
    Bookmark,
    ClusterEvents,
    ClusterView,
    IdentityEntry,
    PolicyEntry,
    PolicyName,
    Reset,
    Synced,
)

A = PolicyName("CiliumNetworkPolicy", "default", "a")
B = PolicyName("CiliumNetworkPolicy", "default", "b")


def policy(name: PolicyName, body: bytes = b"{}", revision: int = 1) -> PolicyEntry:
    return PolicyEntry(name, body, revision=revision)


def events(revision: int, *, more: bool = False, **policies: PolicyEntry | None) -> ClusterEvents:
    names = {"a": A, "b": B}
    return ClusterEvents(
        7, revision, more, policies={names[key]: value for key, value in policies.items()}
    )


def synced_view() -> ClusterView:
    view = ClusterView()
    view.begin()
    view.feed(events(1, a=policy(A)))
    view.feed(Synced(7, 1))
    return view


def test_snapshot_takes_force_as_one() -> None:
    view = ClusterView()
    view.begin()
    assert not view.feed(events(1, a=policy(A)))
    assert not view.synced
    assert not view.policies
    changes = view.feed(Synced(7, 3))
    assert changes.policies == {A}
    assert changes.synced
    assert view.synced
    assert view.resume_point() == (7, 3)


def test_reset_keeps_the_old_state_until_the_new_one_is_whole() -> None:
    view = synced_view()
    view.feed(Reset(7, 5, "compacted"))
    assert not view.feed(events(5, b=policy(B)))
    assert set(view.policies) == {A}
    changes = view.feed(Synced(7, 6))
    assert set(view.policies) == {B}
    assert changes.policies == {A, B}
    assert not changes.synced, "only the first one is news"


def test_unchanged_snapshot_changes_nothing() -> None:
    view = synced_view()
    view.feed(Reset(7, 5, "compacted"))
    view.feed(events(5, a=policy(A)))
    assert not view.feed(Synced(7, 6))


def test_pieces_of_one_revision_are_one_change() -> None:
    view = synced_view()
    assert not view.feed(events(9, more=True, a=None))
    assert set(view.policies) == {A}
    assert view.resume_point() == (7, 1), "a stream that breaks here resumes before the revision"
    assert view.feed(events(9, b=policy(B, revision=9))).policies == {A, B}
    assert set(view.policies) == {B}
    assert view.policy_revision == 9


def test_half_of_a_revision_is_forgotten_when_the_stream_breaks() -> None:
    view = synced_view()
    view.feed(events(9, more=True, a=None))
    view.begin()
    view.feed(Bookmark(7, 9))
    assert set(view.policies) == {A}


def test_resumed_stream_sends_changes_only() -> None:
    view = synced_view()
    view.begin()
    assert view.feed(events(4, b=policy(B))).policies == {B}
    assert set(view.policies) == {A, B}


def test_saved_set_counts_as_whole_and_live_one_replaces_it() -> None:
    view = ClusterView()
    view.load(
        policies=[policy(A)],
        policy_revision=3,
        identities=[IdentityEntry(NumericIdentity(300), Labels.parse(["app=a"]))],
        store_id=7,
    )
    assert view.synced
    assert not view.live
    assert view.resume_point() == (0, 0), "what was saved is no place to resume from"
    view.begin()
    view.feed(events(8, b=policy(B, revision=8)))
    assert set(view.policies) == {A}
    changes = view.feed(Synced(7, 8))
    assert changes.policies == {A, B}
    assert changes.identities == {300}


def test_nothing_saved_is_not_an_empty_policy_set() -> None:
    view = ClusterView()
    view.load(policies=None, policy_revision=0, identities=[], store_id=0)
    assert not view.synced


def test_another_store_starts_its_own_count() -> None:
    view = synced_view()
    view.feed(Reset(8, 1, "another store"))
    view.feed(ClusterEvents(8, 1, policies={B: policy(B, revision=1)}))
    view.feed(Synced(8, 2))
    assert view.store_id == 8
    assert view.policy_revision <= 2
