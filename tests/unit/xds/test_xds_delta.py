"""Delta: the protocol as dialogues (dialogue.py says how to read them)."""

from __future__ import annotations

import pytest

from services.xds.resources import by_short_name
from services.xds.stream import StreamRefused
from tests.unit.xds.dialogue import LIMITS, Dialogue


def play(text: str) -> Dialogue:
    return Dialogue(delta=True).play(text)


@pytest.mark.parametrize("kind", ["LDS", "CDS", "NPDS"])
@pytest.mark.parametrize("ask", ["", " +*"])
def test_a_wildcard_gets_everything_then_what_changes(kind: str, ask: str) -> None:
    play(
        f"""
        == put {kind} a=1 b=1
        >> {kind}{ask}
        << {kind} a=1 b=1
        >> {kind} ack
        == put {kind} a=2 c=1
        << {kind} a=2 c=1
        >> {kind} ack
        == put {kind} -b
        << {kind} -b
        >> {kind} ack
        == put {kind} b=1
        << {kind} b=1
        """
    )


def test_an_empty_wildcard_is_answered() -> None:
    play(">> LDS\n<< LDS\n>> LDS ack\n== put LDS a=1\n<< LDS a=1")


def test_names_are_added_and_dropped() -> None:
    play(
        """
        == put RDS a=1 b=1
        >> RDS +a
        << RDS a=1
        >> RDS ack
        >> RDS +b
        << RDS b=1
        >> RDS ack
        >> RDS -a
        == put RDS a=2 b=2
        << RDS b=2
        """
    )


def test_an_answer_may_carry_a_change_of_names() -> None:
    play(
        """
        == put RDS a=1 b=1
        >> RDS +a
        << RDS a=1
        >> RDS ack +b
        << RDS b=1
        """
    )


def test_a_name_asked_for_again_is_sent_again() -> None:
    play(
        """
        == put EDS a=1
        >> EDS +a
        << EDS a=1
        >> EDS ack
        >> EDS +a
        << EDS a=1
        >> EDS ack
        >> EDS -a
        >> EDS +a
        << EDS a=1
        """
    )


@pytest.mark.parametrize("kind", ["EDS", "RDS", "SDS", "ECDS"])
def test_unknown_names_that_may_come_stay_silent(kind: str) -> None:
    play(
        f"""
        >> {kind} +a
        << nothing
        == put {kind} a=1
        << {kind} a=1
        """
    )


@pytest.mark.parametrize("kind", ["LDS", "CDS", "type.example/some.Type"])
def test_other_unknown_names_are_said_to_be_absent(kind: str) -> None:
    play(
        f"""
        >> {kind} +a
        << {kind} -a
        >> {kind} ack
        == put {kind} a=1
        << {kind} a=1
        """
    )


@pytest.mark.parametrize("kind", ["EDS", "RDS", "SDS", "LDS", "CDS"])
def test_the_last_resource_is_deleted(kind: str) -> None:
    play(
        f"""
        == put {kind} a=1
        >> {kind} +a
        << {kind} a=1
        >> {kind} ack
        == put {kind} -a
        << {kind} -a
        >> {kind} ack
        == put {kind} a=2
        << {kind} a=2
        """
    )


def test_a_star_is_dropped_and_names_stay() -> None:
    play(
        """
        == put CDS a=1 b=1
        >> CDS +* +a
        << CDS a=1 b=1
        >> CDS ack
        >> CDS -*
        == put CDS b=2
        << nothing
        == put CDS a=2
        << CDS a=2
        """
    )


def test_a_name_dropped_under_a_wildcard_is_said_again() -> None:
    """The client may have let go of it and is to learn whether it still gets it."""
    play(
        """
        == put CDS a=1 b=1
        >> CDS
        << CDS a=1 b=1
        >> CDS ack
        >> CDS +a
        << CDS a=1
        >> CDS ack
        >> CDS -a
        << CDS a=1
        >> CDS ack
        == put CDS a=2
        << CDS a=2
        """
    )
    play(
        """
        == put CDS b=1
        >> CDS +* +a
        << CDS b=1
        >> CDS ack
        << CDS -a
        >> CDS ack
        >> CDS -a
        << CDS -a
        """
    )


def test_a_refused_resource_is_sent_again_once_fixed() -> None:
    d = play(
        """
        == put RDS r=1
        >> RDS +r
        << RDS r=1
        >> RDS ack
        == put RDS r=bad
        << RDS r=bad
        >> RDS nack "r is bad"
        << nothing
        """
    )
    assert d.standing("RDS", "r") == "nacked r is bad"
    d.play("== put RDS r=2\n<< RDS r=2\n>> RDS ack")
    assert d.standing("RDS", "r") == "acked"
    assert not d.hub.rejections


def test_what_was_accepted_before_is_not_sent_when_it_returns() -> None:
    d = play(
        """
        == put RDS r=1
        >> RDS +r
        << RDS r=1
        >> RDS ack
        == put RDS r=bad
        << RDS r=bad
        >> RDS nack "no"
        == put RDS r=1
        << nothing
        """
    )
    assert d.standing("RDS", "r") == "acked"
    assert not d.hub.rejections


def test_a_refusal_stops_no_other_resource() -> None:
    d = play(
        """
        == put LDS a=1 bad=1 c=1
        >> LDS
        << LDS a=1 bad=1 c=1
        >> LDS nack "Error adding/updating listener(s) bad: no such thing"
        << LDS a=1 c=1
        >> LDS ack
        << LDS bad=1
        >> LDS nack "Error adding/updating listener(s) bad: no such thing"
        == put LDS a=2
        << LDS a=2
        >> LDS ack
        """
    )
    assert d.standing("LDS", "a") == d.standing("LDS", "c") == "acked"
    assert d.standing("LDS", "bad").startswith("nacked")
    [rejection] = d.hub.rejections.values()
    assert (rejection.name, rejection.node) == ("bad", "n1")


def test_a_refused_resource_that_is_removed_is_forgotten() -> None:
    d = play(
        """
        == put LDS bad=1
        >> LDS
        << LDS bad=1
        >> LDS nack "bad"
        == put LDS -bad
        << nothing
        == put LDS bad=1
        << LDS bad=1
        >> LDS ack
        """
    )
    assert d.standing("LDS", "bad") == "acked"
    assert not d.hub.rejections


def test_two_bad_ones_are_both_found() -> None:
    d = play(
        """
        == put LDS x=bad y=1 z=bad
        >> LDS +x +y +z
        << LDS x=bad y=1 z=bad
        >> LDS nack "x: bad; z: bad"
        << LDS y=1
        >> LDS ack
        << LDS x=bad
        >> LDS nack "x: bad"
        << LDS z=bad
        >> LDS nack "z: bad"
        == put LDS x=1
        << LDS x=1
        >> LDS ack
        """
    )
    assert d.standing("LDS", "x") == d.standing("LDS", "y") == "acked"
    assert d.standing("LDS", "z") == "nacked z: bad"


@pytest.mark.parametrize("back", ["reconnect", "restart"])
def test_a_client_that_comes_back_gets_what_it_lacks_only(back: str) -> None:
    d = play(
        f"""
        == put CDS a=1 b=1 RDS r=1
        >> CDS
        << CDS a=1 b=1
        >> CDS ack
        >> RDS +r
        << RDS r=1
        >> RDS ack
        == {back}
        << nothing
        """
    )
    assert d.standing("CDS", "a") == d.standing("RDS", "r") == "acked"
    d.hub.detach(d.attached)
    with d.cache.transaction() as change:
        change.put(by_short_name("CDS"), "a", b"a=2")
        change.put(by_short_name("CDS"), "c", b"c=1")
        change.remove(by_short_name("CDS"), "b")
    d.play(f"== {back}\n<< CDS a=2 c=1\n>> CDS ack\n<< CDS -b\n>> CDS ack")


def test_parts_that_went_while_it_was_away_are_removed() -> None:
    d = play("== put RDS r=1\n>> RDS +r\n<< RDS r=1\n>> RDS ack")
    d.hub.detach(d.attached)
    d.cache.remove(by_short_name("RDS"), "r")
    d.play("== reconnect\n<< RDS -r")


def test_what_an_unproven_refusal_may_have_left_is_removed() -> None:
    """Envoy applied `good` but does not name it when it comes back, for it refused the response."""
    d = play(
        """
        == put LDS a=1
        >> LDS
        << LDS a=1
        >> LDS ack
        == put LDS good=1 bad=1
        << LDS bad=1 good=1
        >> LDS nack "bad"
        << LDS good=1
        """
    )
    d.hub.detach(d.attached)
    with d.cache.transaction() as change:
        change.remove(by_short_name("LDS"), "good")
        change.remove(by_short_name("LDS"), "bad")
    d.play("== reconnect\n<< LDS -bad -good")


def test_nothing_is_said_before_all_resources_are_there() -> None:
    d = play("== put LDS l=1 m=1\n>> LDS\n<< LDS l=1 m=1\n>> LDS ack")
    d.cache.hold("n1")
    with d.cache.transaction() as change:
        change.remove(by_short_name("LDS"), "l")
        change.remove(by_short_name("LDS"), "m")
    d.play(
        """
        == reconnect
        << nothing
        == put LDS l=1
        << nothing
        == release
        << LDS -m
        >> LDS ack
        """
    )
    assert d.standing("LDS", "l") == d.standing("LDS", "m") == "acked"


def test_make_before_break_in_one_transaction() -> None:
    play(
        """
        == put CDS c=1 LDS l=1 RDS r=1
        >> CDS
        << CDS c=1
        >> CDS ack
        >> LDS
        << LDS l=1
        >> LDS ack
        >> RDS +r
        << RDS r=1
        >> RDS ack
        == put CDS d=1 -c RDS r=2 LDS m=1 -l
        << CDS d=1
        >> CDS ack
        << LDS m=1
        << RDS r=2
        >> LDS ack
        << nothing
        >> RDS ack
        << LDS -l
        >> LDS ack
        << CDS -c
        """
    )


def test_a_changed_cluster_gets_its_endpoints_again() -> None:
    from envoy.config.cluster.v3 import cluster_pb2

    d = Dialogue(delta=True)

    def put(timeout_s: int) -> None:
        cluster = cluster_pb2.Cluster(name="c", type=cluster_pb2.Cluster.EDS)
        cluster.eds_cluster_config.service_name = "s"
        cluster.connect_timeout.seconds = timeout_s
        d.cache.put(by_short_name("CDS"), "c", cluster)

    put(1)
    d.cache.put(by_short_name("EDS"), "s", b"s=1")
    stream = d.attached.stream
    from envoy.service.discovery.v3 import discovery_pb2 as pb

    def ask(short: str, **fields: object) -> list[pb.DeltaDiscoveryResponse]:
        stream.receive(pb.DeltaDiscoveryRequest(type_url=by_short_name(short), **fields), d.now)
        d.hub.settle(d.attached, d.now)
        return [pb.DeltaDiscoveryResponse.FromString(data) for data in stream.send(d.now)]

    [clusters] = ask("CDS")
    [endpoints] = ask("EDS", resource_names_subscribe=["s"])
    ask("CDS", response_nonce=clusters.nonce)
    ask("EDS", response_nonce=endpoints.nonce)
    put(2)
    sent = [pb.DeltaDiscoveryResponse.FromString(data) for data in stream.send(d.now)]
    assert [(r.type_url, r.resources[0].name) for r in sent] == [
        (by_short_name("CDS"), "c"),
        (by_short_name("EDS"), "s"),
    ]


def test_a_large_state_comes_in_parts_that_grpc_takes() -> None:
    d = Dialogue(delta=True)
    with d.cache.transaction() as change:
        for number in range(9):
            name = f"n{number}"
            change.put(by_short_name("CDS"), name, name.encode() + b"=" + b"x" * (1 << 20))
    seen: list[str] = []
    d._say("CDS")
    while d.heard:
        response = d.heard.pop(0)
        assert response.ByteSize() < 4 << 20
        seen += [resource.name for resource in response.resources]
        d.last["CDS"] = response
        d._say("CDS ack")
    assert sorted(seen) == [f"n{number}" for number in range(9)]


def test_a_node_sees_its_own_resources_and_those_of_all() -> None:
    play(
        """
        == put RDS all=1 own@n1=1 other@n2=1
        >> RDS +all +own +other
        << RDS all=1 own=1
        >> RDS ack
        == put RDS other@n2=2
        << nothing
        == put RDS own@n1=2
        << RDS own=2
        """
    )


def test_bounds_end_the_stream() -> None:
    with pytest.raises(StreamRefused, match="1000 resources"):
        Dialogue(delta=True).play(">> RDS " + " ".join(f"+r{n}" for n in range(LIMITS.names + 1)))
    d = Dialogue(delta=True)
    d.names["LDS"] = []
    d.held["LDS"] = {f"l{n}": "1" for n in range(LIMITS.names + 1)}
    with pytest.raises(StreamRefused, match="1000 resources"):
        d.play("== reconnect")
