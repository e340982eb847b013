"""The delta tracker against the plain definition of a difference."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cilia.delta import DeltaTracker

_KEYS = st.sampled_from("abcde")
_STEP = st.one_of(
    st.tuples(st.just("set_desired"), _KEYS, st.integers(0, 2)),
    st.tuples(st.just("set_actual"), _KEYS, st.integers(0, 2)),
    st.tuples(st.just("delete_desired"), _KEYS),
    st.tuples(st.just("delete_actual"), _KEYS),
    st.tuples(st.just("replace_desired"), st.dictionaries(_KEYS, st.integers(0, 2))),
    st.tuples(st.just("replace_actual"), st.dictionaries(_KEYS, st.integers(0, 2))),
)


@given(st.lists(_STEP, max_size=30))
def test_pending_is_the_difference(steps: list[tuple[str, ...]]) -> None:
    tracker: DeltaTracker[str, int] = DeltaTracker()
    for name, *arguments in steps:
        getattr(tracker, name)(*arguments)
        desired, actual = tracker.desired, tracker.actual
        assert tracker.pending_updates == {
            k: v for k, v in desired.items() if k not in actual or actual[k] != v
        }
        assert tracker.pending_deletes == {k: v for k, v in actual.items() if k not in desired}
    for key, value in list(tracker.pending_updates.items()):
        tracker.set_actual(key, value)
    for key in list(tracker.pending_deletes):
        tracker.delete_actual(key)
    assert tracker.in_sync
    assert tracker.actual == tracker.desired


def test_equality_may_ignore_what_the_store_counts() -> None:
    tracker: DeltaTracker[str, tuple[int, int]] = DeltaTracker(equal=lambda a, b: a[0] == b[0])
    tracker.replace_actual({"a": (1, 99)})
    tracker.set_desired("a", (1, 0))
    assert tracker.in_sync
    tracker.set_desired("a", (2, 0))
    assert not tracker.in_sync
