"""State of the world: the protocol as dialogues (dialogue.py says how to read them)."""

from __future__ import annotations

import pytest

from services.xds.resources import by_short_name
from services.xds.stream import StreamRefused
from tests.unit.xds.dialogue import LIMITS, Dialogue


def play(text: str) -> Dialogue:
    return Dialogue(delta=False).play(text)


@pytest.mark.parametrize("kind", ["LDS", "CDS", "NPDS"])
def test_a_first_request_without_names_asks_for_everything(kind: str) -> None:
    play(
        f"""
        == put {kind} a=1 b=1
        >> {kind}
        << {kind} a=1 b=1
        >> {kind} ack
        == put {kind} a=2
        << {kind} a=2 b=1
        >> {kind} ack
        == put {kind} c=1
        << {kind} a=2 b=1 c=1
        """
    )


def test_so_does_a_star_beside_names() -> None:
    play(
        """
        == put CDS a=1 b=1
        >> CDS * a
        << CDS a=1 b=1
        >> CDS ack
        >> CDS a                # the star is given up
        == put CDS b=2
        << nothing
        == put CDS a=2
        << CDS a=2
        """
    )


def test_names_end_the_wildcard_that_came_from_naming_nothing() -> None:
    play(
        """
        == put CDS a=1 b=1
        >> CDS
        << CDS a=1 b=1
        >> CDS ack a
        == put CDS b=2
        << nothing
        >> CDS ack              # naming nothing again does not bring it back
        """
    )
    d = Dialogue(delta=False)
    d.play("== put CDS a=1\n>> CDS a\n<< CDS a=1\n>> CDS ack")
    d.names["CDS"] = []
    d.play(">> CDS\n== put CDS a=2\n<< nothing")


def test_an_empty_wildcard_is_answered_so_that_the_client_goes_on() -> None:
    play(
        """
        >> CDS
        << CDS
        >> CDS ack
        >> LDS
        << LDS
        """
    )


def test_names_of_parts_are_sent_as_they_are_asked_for() -> None:
    play(
        """
        == put RDS a=1 b=1 c=1
        >> RDS a
        << RDS a=1
        >> RDS ack a b          # the answer is the new subscription too
        << RDS b=1
        >> RDS ack
        == put RDS a=2 c=2
        << RDS a=2              # only what changed and was asked for
        >> RDS ack
        """
    )


def test_an_unsubscribed_name_is_forgotten_and_sent_anew() -> None:
    play(
        """
        == put EDS a=1 b=1
        >> EDS a b
        << EDS a=1 b=1
        >> EDS ack a
        == put EDS b=2
        << nothing
        >> EDS a b
        << EDS b=2
        """
    )


def test_unknown_names_of_parts_are_waited_for() -> None:
    play(
        """
        >> RDS a
        << nothing
        == put RDS a=1
        << RDS a=1
        """
    )


@pytest.mark.parametrize("kind", ["LDS", "CDS", "NPDS", "type.example/some.Type"])
def test_unknown_names_of_whole_states_are_answered(kind: str) -> None:
    play(
        f"""
        >> {kind} a
        << {kind}
        >> {kind} ack
        == put {kind} a=1
        << {kind} a=1
        """
    )


def test_the_last_named_resource_disappears() -> None:
    play(
        """
        == put CDS a=1
        >> CDS a
        << CDS a=1
        >> CDS ack
        == put CDS -a
        << CDS
        >> CDS ack
        == put CDS a=1
        << CDS a=1
        """
    )


def test_the_last_resource_of_a_wildcard_disappears() -> None:
    play(
        """
        == put LDS a=1
        >> LDS
        << LDS a=1
        >> LDS ack
        == put LDS -a
        << LDS
        """
    )


def test_the_last_part_disappears() -> None:
    play(
        """
        == put RDS a=1 b=1
        >> RDS a b
        << RDS a=1 b=1
        >> RDS ack
        == put RDS -a
        << nothing              # parts cannot say that one is gone
        == put RDS -b
        << RDS
        """
    )


def test_a_refused_resource_is_sent_again_once_fixed() -> None:
    d = play(
        """
        == put LDS l=1
        >> LDS
        << LDS l=1
        >> LDS ack
        == put LDS l=bad
        << LDS l=bad
        >> LDS nack "l is bad"
        << nothing
        """
    )
    assert d.standing("LDS", "l") == "nacked l is bad"
    d.play(
        """
        == put LDS l=2
        << LDS l=2
        >> LDS ack
        """
    )
    assert d.standing("LDS", "l") == "acked"
    assert not d.hub.rejections


def test_a_refusal_stops_no_other_resource() -> None:
    d = play(
        """
        == put LDS a=1
        >> LDS
        << LDS a=1
        >> LDS ack
        == put LDS a=2 bad=1 c=1
        << LDS a=2 bad=1 c=1
        >> LDS nack "Error adding/updating listener(s) bad: no such thing"
        << LDS a=2 c=1                  # the others, to be told apart
        >> LDS ack
        << LDS a=2 bad=1 c=1            # the suspect, alone among changes
        >> LDS nack "Error adding/updating listener(s) bad: no such thing"
        """
    )
    assert d.standing("LDS", "a") == "acked"
    assert d.standing("LDS", "c") == "acked"
    assert d.standing("LDS", "bad").startswith("nacked Error adding")
    d.play(
        """
        == put LDS c=2
        << LDS a=2 c=2                  # without the bad one, which never was accepted
        >> LDS ack
        == put LDS bad=2
        << LDS a=2 bad=2 c=2
        >> LDS ack
        """
    )


def test_the_last_accepted_version_stands_in_for_a_refused_one() -> None:
    play(
        """
        == put CDS a=1 b=1
        >> CDS
        << CDS a=1 b=1
        >> CDS ack
        == put CDS a=bad
        << CDS a=bad b=1
        >> CDS nack "a"
        == put CDS b=2
        << CDS a=1 b=2
        >> CDS ack
        """
    )


def test_a_reason_that_names_nobody_is_traced_one_at_a_time() -> None:
    d = play(
        """
        == put RDS a=1 b=bad
        >> RDS a b
        << RDS a=1 b=bad
        >> RDS nack "something is wrong"
        << RDS a=1
        >> RDS ack
        << RDS b=bad
        >> RDS nack "something is wrong"
        """
    )
    assert d.standing("RDS", "a") == "acked"
    assert d.standing("RDS", "b") == "nacked something is wrong"


def test_a_reason_that_names_the_wrong_one_does_it_no_harm() -> None:
    d = play(
        """
        == put RDS a=1 b=bad
        >> RDS a b
        << RDS a=1 b=bad
        >> RDS nack "cluster a is unknown"
        << RDS b=bad
        >> RDS nack "cluster a is unknown"
        << RDS a=1
        >> RDS ack
        """
    )
    assert d.standing("RDS", "a") == "acked"
    assert d.standing("RDS", "b").startswith("nacked")


def test_what_was_refused_is_tried_again_after_a_while() -> None:
    d = play(
        """
        == put LDS l=1
        >> LDS
        << LDS l=1
        >> LDS nack "port in use"
        == wait 29
        << nothing
        == wait 2
        << LDS l=1
        >> LDS nack "port in use"
        == wait 31
        << nothing              # twice as long
        == wait 30
        << LDS l=1
        >> LDS ack
        """
    )
    assert d.standing("LDS", "l") == "acked"


def test_changes_meanwhile_become_one_response() -> None:
    play(
        """
        == put CDS a=1
        >> CDS
        << CDS a=1
        == put CDS a=2
        == put CDS a=3
        << nothing
        >> CDS ack
        << CDS a=3
        """
    )


def test_a_client_that_does_not_answer_is_told_the_news_after_a_while() -> None:
    play(
        """
        == put CDS a=1
        >> CDS
        << CDS a=1
        == put CDS a=2
        << nothing
        == wait 1.1
        << CDS a=2
        >> CDS ack
        == put CDS a=3
        << CDS a=3
        """
    )


def test_an_answer_to_an_older_response_is_no_answer_to_the_newest() -> None:
    d = play("== put CDS a=1\n>> CDS\n<< CDS a=1")
    old = d.last["CDS"]
    d.play("== put CDS a=2\n== wait 1.1\n<< CDS a=2")
    d.last["CDS"] = old
    d.play(">> CDS ack")
    assert d.standing("CDS", "a").startswith("pending")


def test_an_answer_with_a_made_up_nonce_is_ignored() -> None:
    d = play("== put RDS a=1 b=1\n>> RDS a\n<< RDS a=1")
    d.last["RDS"].nonce = "invented"
    d.play(">> RDS ack a b\n<< nothing")
    assert d.standing("RDS", "a").startswith("pending")


@pytest.mark.parametrize("back", ["reconnect", "restart"])
def test_a_client_that_comes_back_with_everything_is_sent_nothing(back: str) -> None:
    d = play(
        f"""
        == put CDS a=1 b=1 RDS r=1 s=1 t=1
        >> CDS
        << CDS a=1 b=1
        >> CDS ack
        >> RDS r s
        << RDS r=1 s=1
        >> RDS ack
        == {back}
        << nothing
        """
    )
    assert d.standing("CDS", "a") == d.standing("RDS", "s") == "acked"
    d.play("== put RDS r=2\n<< RDS r=2")


def test_a_client_that_missed_something_gets_it_when_it_comes_back() -> None:
    d = play("== put CDS a=1\n>> CDS\n<< CDS a=1\n>> CDS ack")
    d.hub.detach(d.attached)
    with d.cache.transaction() as change:
        change.put(by_short_name("CDS"), "a", b"a=2")
    d.play("== reconnect\n<< CDS a=2")


def test_after_an_unproven_refusal_a_client_that_comes_back_gets_everything() -> None:
    """It may have applied a part of what it refused, which its version does not tell."""
    play(
        """
        == put LDS a=1
        >> LDS
        << LDS a=1
        >> LDS ack
        == put LDS b=1 bad=1
        << LDS a=1 b=1 bad=1
        >> LDS nack "bad"
        << LDS a=1 b=1
        == reconnect
        << LDS a=1 b=1 bad=1
        """
    )


def test_nothing_is_said_before_all_resources_are_there() -> None:
    d = play(
        """
        == put LDS l=1 RDS r=1
        >> LDS
        << LDS l=1
        >> LDS ack
        >> RDS r
        << RDS r=1
        >> RDS ack
        """
    )
    d.cache.hold("n1")
    with d.cache.transaction() as change:
        change.remove(by_short_name("LDS"), "l")
    d.play(
        """
        == reconnect
        << nothing
        == put LDS l=1
        << nothing
        == release
        << nothing                # it has what it should have
        """
    )
    assert d.standing("LDS", "l") == "acked"


def test_dependencies_come_first_and_their_answer_is_waited_for() -> None:
    play(
        """
        == put CDS c=1 EDS c=1 LDS l=1 RDS r=1
        >> CDS
        << CDS c=1
        >> CDS ack
        >> EDS c
        << EDS c=1
        >> EDS ack
        >> LDS
        << LDS l=1
        >> LDS ack
        >> RDS r
        << RDS r=1
        >> RDS ack
        == put CDS d=1 RDS r=2 LDS l=2
        << CDS c=1 d=1
        >> CDS ack
        << LDS l=2
        << RDS r=2
        """
    )


def test_the_wait_for_a_dependency_is_bounded() -> None:
    """Envoy keeps back the answer about clusters while one of them warms."""
    play(
        """
        == put CDS c=1 LDS l=1
        >> CDS
        << CDS c=1
        >> LDS
        << nothing
        == wait 1.1
        << LDS l=1
        """
    )


def test_what_refers_goes_before_what_it_refers_to() -> None:
    play(
        """
        == put CDS c=1 LDS l=1 RDS r=1
        >> CDS
        << CDS c=1
        >> CDS ack
        >> LDS
        << LDS l=1
        >> LDS ack
        >> RDS r
        << RDS r=1
        >> RDS ack
        == put CDS d=1 -c RDS r=2 LDS -l
        << CDS c=1 d=1            # the old one stays
        >> CDS ack
        << RDS r=2
        >> RDS ack
        << LDS
        >> LDS ack
        << CDS d=1
        """
    )


def test_what_is_removed_and_put_again_never_leaves() -> None:
    play(
        """
        == put CDS a=1 b=1
        >> CDS
        << CDS a=1 b=1
        == put CDS -a
        == put CDS a=1
        >> CDS ack
        << nothing
        """
    )


def test_a_node_sees_its_own_resources_and_those_of_all() -> None:
    d = play(
        """
        == put LDS all=1 own@n1=1 other@n2=1 both@n1=1 both@n2=2
        >> LDS
        << LDS all=1 both=1 own=1
        >> LDS ack
        == put LDS other@n2=2
        << nothing
        >> LDS ack other          # not by its name either
        << LDS
        """
    )
    assert d.standing("LDS", "other") == "acked"  # there is none, and it holds none


def test_a_nodes_own_resource_hides_the_common_one() -> None:
    play(
        """
        == put RDS r=common
        >> RDS r
        << RDS r=common
        >> RDS ack
        == put RDS r@n1=own
        << RDS r=own
        >> RDS ack
        == put RDS r=common2
        << nothing
        """
    )


def test_putting_what_is_there_changes_nothing() -> None:
    play(
        """
        == put CDS a=1
        >> CDS
        << CDS a=1
        >> CDS ack
        == put CDS a=1
        << nothing
        """
    )


def test_bounds_end_the_stream() -> None:
    d = Dialogue(delta=False)
    with pytest.raises(StreamRefused, match="1000 resources"):
        d.play(">> RDS " + " ".join(f"r{n}" for n in range(LIMITS.names + 1)))
    d = Dialogue(delta=False)
    with pytest.raises(StreamRefused, match="8 types"):
        d.play("\n".join(f">> type.example/T{n}\n<< type.example/T{n}" for n in range(9)))
    with pytest.raises(StreamRefused, match="2000 characters"):
        Dialogue(delta=False).play(f">> RDS {'x' * 2000}")


def test_an_unreadable_reason_is_made_readable() -> None:
    d = play('== put CDS a=1\n>> CDS\n<< CDS a=1\n>> CDS nack "\x1b[31mred\t\x07bell"')
    assert d.standing("CDS", "a") == "nacked [31mred bell"
