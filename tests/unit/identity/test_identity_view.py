"""The view's log and what feeds tell from it; each feed test reads as a dialogue."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cilia.kv import KeyValue, WatchBatch
from services.identity.keys import Kind, policy_key, quarantine_key
from services.identity.view import Change, View
from services.identity.watch import (
    EVENTS_A_BATCH,
    BatchMessage,
    Feed,
    Message,
    ResetMessage,
    SyncedMessage,
    split,
)

ALL = frozenset(Kind)
STORE = 7


def put(name: str, revision: int, value: bytes = b"v") -> KeyValue:
    return KeyValue(policy_key("Rules", "", name), value, revision, revision, 1)


def gone(name: str, revision: int) -> KeyValue:
    return KeyValue(policy_key("Rules", "", name), b"", 0, revision, 0)


def view_of(*batches: tuple[int, list[KeyValue]], graves: int = 100) -> View:
    view = View(graves=graves)
    view.load([], 1)
    for revision, changes in batches:
        view.apply(WatchBatch(revision, tuple(changes)))
    return view


def feed_of(view: View, *, resume: int = 0, from_store: int = STORE) -> Feed:
    return Feed(view, kinds=ALL, store_id=STORE, from_store=from_store, resume=resume)


def told(messages: tuple[Message, ...]) -> list[str]:
    """A message as a word: +a -b (names), synced@R, reset."""
    words = []
    for message in messages:
        match message:
            case BatchMessage():
                words.append("reserved" if message.reserved else "batch")
                words += [
                    ("-" if c.kv.deleted else "+") + c.kv.key.decode().rsplit("/", 1)[1]
                    for c in message.changes
                ]
            case SyncedMessage():
                words.append(f"synced@{message.revision}")
            case ResetMessage():
                words.append("reset")
            case _:
                words.append(type(message).__name__)
    return words


def test_a_new_client_gets_a_snapshot_then_changes() -> None:
    view = view_of((2, [put("a", 2)]), (3, [put("b", 3)]), (4, [gone("a", 4)]))
    feed = feed_of(view)
    assert told(feed.next()) == ["reserved", "+b", "synced@4"]
    assert feed.next() == ()
    view.apply(WatchBatch(5, (put("c", 5), gone("b", 5))))
    assert told(feed.next()) == ["batch", "+c", "-b"]
    assert feed.told == 5


def test_a_returning_client_gets_what_it_missed_once_a_key() -> None:
    view = view_of((2, [put("a", 2)]), (3, [put("a", 3)]), (4, [put("b", 4)]), (5, [put("a", 5)]))
    feed = feed_of(view, resume=2)
    assert told(feed.next()) == ["batch", "+b", "+a", "synced@5"]
    assert told(feed_of(view, resume=5).next()) == ["synced@5"]


def test_what_came_and_went_meanwhile_is_told_as_gone() -> None:
    view = view_of((2, [put("a", 2)]), (3, [put("b", 3)]), (4, [gone("b", 4)]))
    assert told(feed_of(view, resume=2).next()) == ["batch", "-b", "synced@4"]


def test_resume_points_that_mean_nothing_are_reset() -> None:
    view = view_of((2, [put("a", 2)]))
    for feed in (feed_of(view, resume=9), feed_of(view, resume=2, from_store=8)):
        assert told(feed.next()) == ["reset", "reserved", "+a", "synced@2"]
        assert feed.next() == ()


def test_a_client_slower_than_the_graves_is_reset() -> None:
    view = view_of((2, [put(name, 2) for name in "abc"]), graves=2)
    feed = feed_of(view)
    feed.next()
    for revision, name in enumerate("abc", start=3):
        view.apply(WatchBatch(revision, (gone(name, revision),)))
    assert told(feed.next()) == ["reset", "reserved", "synced@5"]


def test_a_relist_resets_everybody() -> None:
    view = view_of((2, [put("a", 2)]))
    feed = feed_of(view)
    feed.next()
    view.load([put("z", 9)], 9)
    assert told(feed.next()) == ["reset", "reserved", "+z", "synced@9"]


def test_irrelevant_changes_move_the_revision_silently() -> None:
    view = view_of((2, [put("a", 2)]))
    feed = Feed(view, kinds=frozenset({Kind.IP}), store_id=STORE, from_store=0, resume=0)
    assert told(feed.next()) == ["synced@2"]
    view.apply(WatchBatch(3, (put("b", 3),)))
    assert feed.next() == ()
    assert feed.told == 3


def test_big_batches_are_cut_and_only_the_last_ends_the_revision() -> None:
    changes = [Change(Kind.POLICY, put(str(n), 2)) for n in range(2 * EVENTS_A_BATCH + 1)]
    batches = list(split(changes, 2))
    assert [len(batch.changes) for batch in batches] == [EVENTS_A_BATCH, EVENTS_A_BATCH, 1]
    assert [batch.more for batch in batches] == [True, True, False]
    heavy = [Change(Kind.POLICY, put(str(n), 2, b"x" * 700_000)) for n in range(3)]
    assert [len(batch.changes) for batch in split(heavy, 2)] == [1, 1, 1]


def test_quarantine_is_counted_and_makes_a_number_taken() -> None:
    key = quarantine_key(300)
    view = view_of((2, [KeyValue(key, b"", 2, 2, 1)]))
    assert view.quarantined == 1
    assert 300 in view
    assert 301 not in view
    view.apply(WatchBatch(3, (KeyValue(key, b"", 0, 3, 0),)))
    assert view.quarantined == 0
    assert 300 not in view


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans()), max_size=60),
    st.lists(st.integers(0, 60), max_size=6),
    st.integers(1, 4),
)
def test_every_client_ends_with_the_state(
    steps: list[tuple[str, bool]], reads: list[int], graves: int
) -> None:
    """Clients that read at different times, some resuming, all know exactly what is there."""
    view = View(graves=graves)
    view.load([], 1)
    live: set[str] = set()
    clients: list[tuple[Feed, set[str]]] = [(feed_of(view), set()) for _ in reads]

    def read(feed: Feed, known: set[str]) -> None:
        for word in told(feed.next()):
            if word == "reset":
                known.clear()
            elif word[0] == "+":
                known.add(word[1:])
            elif word[0] == "-":
                known.discard(word[1:])

    for revision, (name, present) in enumerate(steps, start=2):
        if present:
            live.add(name)
            view.apply(WatchBatch(revision, (put(name, revision),)))
        else:
            live.discard(name)
            view.apply(WatchBatch(revision, (gone(name, revision),)))
        for number, when in enumerate(reads):
            feed, known = clients[number]
            if when and revision % when == 0:
                read(feed, known)
                assert known == live
                if revision % 2:  # the stream breaks; the client comes back with its revision
                    clients[number] = (feed_of(view, resume=feed.told), known)
    for feed, known in clients:
        read(feed, known)
        assert known == live
