"""Redirects from the agent's stream to the proxy's answers, with a proxy that is a dialogue."""

from __future__ import annotations

from typing import Any

import pytest

from protos.xds.v1 import xds_pb2 as pb
from services.xds.cache import ResourceCache
from services.xds.hub import Hub
from services.xds.redirects import BadRedirect, Redirects, Session, Superseded
from services.xds.resources import CDS, LDS, RDS, SDS, NodeID
from services.xds.stream import Limits
from services.xds.translator import Item, Translation, Untranslatable
from tests.unit.xds.test_xds_property import Client

State = pb.RedirectState
PROXY = NodeID("me")  # whom the test's client is


class Plain:
    """A listener a port, its rules in routes of its own, and a secret that all share."""

    def __init__(self, node: pb.Node) -> None:
        self.node = node

    def base(self) -> list[Item]:
        return [Item(CDS, "upstream", f"upstream={self.node.ipv4}".encode())]

    def translate(self, redirect: pb.Redirect) -> Translation:
        if redirect.rules.parser != "http":
            raise Untranslatable(f"no parser {redirect.rules.parser}")
        name = f"p{redirect.port}"
        rules = redirect.digest
        items = [
            Item(LDS, name, f"{name}=listener".encode()),
            Item(RDS, name, f"{name}={rules}".encode()),
        ]
        if "tls" in rules:
            items.append(Item(SDS, "shared", b"shared=secret"))
        return Translation(tuple(items), (RDS, name))


class Bench:
    """The service's middle, an agent's session, and a proxy."""

    def __init__(self) -> None:
        self.cache = ResourceCache()
        self.hub = Hub(self.cache, limits=Limits())
        self.redirects = Redirects(
            cache=self.cache, hub=self.hub, make_translator=Plain, node=PROXY
        )
        self.redirects.prepare()
        self.sequence = 0
        self.session: Session | None = None
        self.proxy: Client | None = None

    def connect(self, ipv4: str = "10.0.0.1") -> Session:
        self.session = self.redirects.open(pb.Node(name="n", ipv4=ipv4), lambda: None, 0.0)
        return self.session

    def ask(self, *upserts: pb.Redirect, removed: tuple[int, ...] = (), synced: bool = True) -> int:
        assert self.session is not None
        self.sequence += 1
        self.redirects.apply(
            self.session,
            pb.SyncRequest(sequence=self.sequence, upserts=upserts, removed=removed, synced=synced),
        )
        return self.sequence

    def start_proxy(self) -> Client:
        self.proxy = Client(self.hub, delta=True, tells=True)
        self.proxy.subscribe(CDS, set(), wild=True)
        self.proxy.subscribe(LDS, set(), wild=True)
        return self.proxy

    def proxy_works(self) -> None:
        """It answers, and asks for the routes and secrets that its listeners name."""
        assert self.proxy is not None
        for _ in range(10):
            self.proxy.pump()
            self.proxy.answer()
            listeners = set(self.proxy.has.get(LDS, {}))
            if self.proxy.names.get(RDS, set()) != listeners:
                self.proxy.subscribe(RDS, listeners, wild=False)
                self.proxy.subscribe(SDS, {"shared"} if listeners else set(), wild=False)
            self.proxy.now += 0.01

    def told(self) -> list[tuple[int, str, str, int]]:
        assert self.session is not None
        return [
            (s.port, s.digest, State.State.Name(s.state), s.sequence)
            for s in self.redirects.news(self.session)
        ]


def redirect(port: int, digest: str, parser: str = "http") -> pb.Redirect:
    return pb.Redirect(
        port=port,
        digest=digest,
        direction=pb.INGRESS,
        rules=pb.RuleSet(parser=parser, rules=[pb.L7Rule(rule_id=1)]),
    )


def test_a_redirect_is_acknowledged_when_listener_and_rules_are() -> None:
    bench = Bench()
    bench.connect()
    bench.ask(redirect(1, "a"))
    assert bench.told() == [(1, "a", "PENDING", 1)]
    proxy = bench.start_proxy()
    proxy.pump()
    proxy.answer()  # clusters
    proxy.answer()  # the listener; its routes have not been asked for
    assert bench.told() == []
    bench.proxy_works()
    assert bench.told() == [(1, "a", "ACKED", 1)]
    assert bench.told() == []


def test_nothing_is_said_to_the_proxy_before_the_snapshot_is_complete() -> None:
    bench = Bench()
    proxy = bench.start_proxy()
    bench.connect()
    bench.ask(redirect(1, "a"), synced=False)
    bench.ask(redirect(2, "b"), synced=False)
    proxy.pump()
    assert not proxy.unanswered
    bench.ask(redirect(2, "c"), removed=(1,))
    bench.proxy_works()
    assert set(proxy.has[LDS]) == {"p2"}
    assert bench.told() == [(2, "c", "ACKED", 3)]


def test_other_rules_on_a_port_are_a_change_of_its_routes_only() -> None:
    bench = Bench()
    bench.connect()
    bench.ask(redirect(1, "a"))
    proxy = bench.start_proxy()
    bench.proxy_works()
    bench.told()
    received = proxy.received
    bench.ask(redirect(1, "b"))
    bench.proxy_works()
    assert bench.told() == [(1, "b", "ACKED", 2)]
    assert proxy.received == received + 1
    # The same again is no push at all, but it is answered.
    bench.ask(redirect(1, "b"))
    bench.proxy_works()
    assert proxy.received == received + 1
    assert bench.told() == [(1, "b", "ACKED", 3)]


def test_rules_that_go_back_are_acknowledged_anew() -> None:
    bench = Bench()
    bench.connect()
    bench.ask(redirect(1, "a"))
    bench.start_proxy()
    bench.proxy_works()
    bench.told()
    bench.ask(redirect(1, "b"))
    bench.ask(redirect(1, "a"))
    # It never saw b: what it has is a, and the state says of which request.
    bench.proxy_works()
    assert bench.told() == [(1, "a", "ACKED", 3)]


def test_a_refused_listener_fails_and_others_work() -> None:
    bench = Bench()
    bench.connect()
    bench.ask(redirect(1, "bad"), redirect(2, "fine"))
    bench.start_proxy()
    bench.proxy_works()
    told = {port: state for port, _, state, _ in bench.told()}
    assert told == {1: "FAILED", 2: "ACKED"}
    row = bench.redirects.rows[1]
    assert "bad" in row.message
    bench.ask(redirect(1, "mended"))
    bench.proxy_works()
    assert bench.told() == [(1, "mended", "ACKED", 2)]


def test_what_cannot_be_translated_fails_at_once_and_leaves_what_was() -> None:
    bench = Bench()
    bench.connect()
    bench.ask(redirect(1, "a"))
    proxy = bench.start_proxy()
    bench.proxy_works()
    bench.told()
    bench.ask(redirect(1, "k", parser="kafka"))
    bench.proxy_works()
    assert bench.told() == [(1, "k", "FAILED", 2)]
    assert proxy.has[RDS]["p1"][0] == "p1=a"
    bench.ask(removed=(1,))
    bench.proxy_works()
    assert bench.told()[-1][2] == "REMOVED"
    assert not proxy.has[LDS]


def test_a_port_is_free_when_the_proxy_has_let_go() -> None:
    bench = Bench()
    bench.connect()
    bench.ask(redirect(1, "a"), redirect(2, "b"))
    proxy = bench.start_proxy()
    bench.proxy_works()
    bench.told()
    bench.ask(removed=(1,))
    assert [state for *_, state, _ in bench.told()] == ["PENDING"]
    proxy.pump()
    assert bench.told() == []  # it was told, and has not answered
    bench.proxy_works()
    assert [(port, state) for port, _, state, _ in bench.told()] == [(1, "REMOVED")]
    assert set(proxy.has[LDS]) == {"p2"}
    assert set(bench.redirects.rows) == {2}
    # What nobody has is gone already.
    bench.ask(removed=(9,))
    assert [(port, state) for port, _, state, _ in bench.told()] == [(9, "REMOVED")]


def test_a_shared_resource_lives_as_long_as_one_that_uses_it() -> None:
    bench = Bench()
    bench.connect()
    bench.ask(redirect(1, "tls1"), redirect(2, "tls2"))
    bench.start_proxy()
    bench.proxy_works()
    view = bench.cache.view(PROXY)
    bench.ask(removed=(1,))
    assert view.get(SDS, "shared") is not None
    bench.ask(redirect(2, "plain"))
    assert view.get(SDS, "shared") is None


def test_an_agent_that_comes_back_gets_the_states_and_pushes_nothing() -> None:
    bench = Bench()
    bench.connect()
    bench.ask(redirect(1, "a"), redirect(2, "b"))
    proxy = bench.start_proxy()
    bench.proxy_works()
    session = bench.session
    assert session is not None
    bench.redirects.close(session)
    received = proxy.received
    bench.connect()
    bench.sequence = 0
    bench.ask(redirect(1, "a"))
    bench.proxy_works()
    told = {port: state for port, _, state, _ in bench.told()}
    assert told == {1: "ACKED", 2: "REMOVED"}
    # The listener's removal, and nothing of port 1 (its routes: the proxy lets go by itself).
    assert proxy.received <= received + 2
    assert proxy.has[RDS].keys() == {"p1"}


def test_a_restarted_service_acknowledges_what_the_proxy_holds() -> None:
    bench = Bench()
    bench.connect()
    bench.ask(redirect(1, "a"))
    proxy = bench.start_proxy()
    bench.proxy_works()
    received = proxy.received

    again = Bench()
    again.proxy = proxy
    proxy.reconnect(again.hub)
    again.proxy_works()
    assert proxy.has[LDS], "it let go of its listeners before the agent had spoken"
    again.connect()
    again.ask(redirect(1, "a"))
    again.proxy_works()
    assert again.told() == [(1, "a", "ACKED", 1)]
    assert proxy.received == received
    # And rules that changed meanwhile are not believed before they are acknowledged.
    other = Bench()
    other.proxy = proxy
    proxy.reconnect(other.hub)
    other.connect()
    other.ask(redirect(1, "b"))
    assert other.told() == [(1, "b", "PENDING", 1)]
    other.proxy_works()
    assert other.told() == [(1, "b", "ACKED", 1)]


def test_a_proxy_that_is_away_leaves_acknowledged_what_was() -> None:
    bench = Bench()
    bench.connect()
    bench.ask(redirect(1, "a"))
    proxy = bench.start_proxy()
    bench.proxy_works()
    bench.told()
    bench.hub.detach(proxy.attached)
    assert bench.told() == []  # nobody listens at the port: nothing passes
    bench.ask(redirect(1, "b"))
    assert bench.told() == [(1, "b", "PENDING", 2)]


def test_other_addresses_of_the_node_change_what_is_always_there() -> None:
    bench = Bench()
    bench.connect()
    bench.ask(redirect(1, "a"))
    proxy = bench.start_proxy()
    bench.proxy_works()
    assert proxy.has[CDS]["upstream"][0] == "upstream=10.0.0.1"
    bench.connect(ipv4="10.0.0.2")
    bench.ask(redirect(1, "a"))
    bench.proxy_works()
    assert proxy.has[CDS]["upstream"][0] == "upstream=10.0.0.2"


def test_a_newer_session_ends_the_older() -> None:
    bench = Bench()
    old = bench.connect()
    new = bench.connect()
    bench.ask(redirect(1, "a"))
    with pytest.raises(Superseded):
        bench.redirects.apply(old, pb.SyncRequest(synced=True))
    with pytest.raises(Superseded):
        bench.redirects.news(old)
    bench.redirects.close(old)
    assert bench.redirects.session is new


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"port": 0}, "outside 1 to 65535"),
        ({"port": 70_000}, "outside 1 to 65535"),
        ({"digest": ""}, "digest has 0"),
        ({"digest": "x" * 300}, "digest has 300"),
        ({"direction": pb.DIRECTION_UNSPECIFIED}, "direction 0"),
        ({"direction": pb.BOTH}, "ingress_rules"),
        ({"rules": None}, "no rules"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_changes_nothing(
    change: dict[str, Any], said: str
) -> None:
    bench = Bench()
    bench.connect()
    bench.ask(redirect(1, "a"))
    wrong = redirect(2, "b")
    for name, value in change.items():
        if value is None:
            wrong.ClearField(name)  # type: ignore[arg-type]  # by its name
        else:
            setattr(wrong, name, value)
    with pytest.raises(BadRedirect, match=said):
        bench.ask(redirect(3, "c"), wrong)
    assert set(bench.redirects.rows) == {1}
