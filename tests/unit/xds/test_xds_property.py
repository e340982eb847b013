"""Whatever happens, a client ends with what it should have: random changes, refusals, silences,
subscriptions, reconnects and restarts against a client that behaves as Envoy does."""

from __future__ import annotations

import os
from typing import Any

import pytest
from envoy.service.discovery.v3 import discovery_pb2 as pb
from hypothesis import given, settings
from hypothesis import strategies as st

from cilia.errors import DomainError
from services.xds.cache import ResourceCache
from services.xds.hub import Attached, Hub, Peer, State
from services.xds.resources import CDS, EDS, LDS, NPDS, RDS, NodeID, TypeURL, type_info
from services.xds.stream import Limits

EXAMPLES = int(os.environ.get("CILIA_PROPERTY_EXAMPLES", "150"))
TYPES = [CDS, EDS, LDS, RDS, NPDS, TypeURL("type.example/Other")]
NAMES = ["a", "b", "c", "d"]
ME = NodeID("me")


class Client:
    """Applies the good part of a response and refuses it if a part is bad, as Envoy does. `quiet`:
    it does not answer for now."""

    def __init__(self, hub: Hub, *, delta: bool, tells: bool) -> None:
        self.hub = hub
        self.delta = delta
        self.tells = tells  # names the bad ones when it refuses
        self.now = 0.0
        self.wild: set[TypeURL] = set()
        self.names: dict[TypeURL, set[str]] = {}
        self.has: dict[TypeURL, dict[str, tuple[str, str]]] = {}  # name: value, version
        self.accepted: dict[TypeURL, str] = {}
        self.reported: dict[TypeURL, dict[str, str]] = {}
        self.unanswered: list[Any] = []
        self.nonce: dict[TypeURL, str] = {}
        self.received = 0
        self.attached = self._attach()

    def _attach(self) -> Attached:
        return self.hub.attach(ME, delta=self.delta, peer=Peer(), wake=lambda: None, time=0)

    def send(self, request: Any) -> None:
        self.attached.stream.receive(request, self.now)
        self.pump()

    def pump(self) -> None:
        self.hub.settle(self.attached, self.now)
        kind: Any = pb.DeltaDiscoveryResponse if self.delta else pb.DiscoveryResponse
        self.unanswered += [kind.FromString(data) for data in self.attached.stream.send(self.now)]
        self.hub.settle(self.attached, self.now)

    def subscribe(self, url: TypeURL, names: set[str], *, wild: bool) -> None:
        before, was_wild = self.names.get(url), url in self.wild
        (self.wild.add if wild else self.wild.discard)(url)
        self.names[url] = names
        if self.delta:
            request = pb.DeltaDiscoveryRequest(type_url=url)
            request.resource_names_subscribe.extend(sorted(names - (before or set())))
            request.resource_names_unsubscribe.extend(sorted((before or set()) - names))
            if wild and not was_wild:
                request.resource_names_subscribe.append("*")
            if was_wild and not wild:
                request.resource_names_unsubscribe.append("*")
            if before is None and not wild and not names:
                # Naming nothing first would ask for everything.
                request.resource_names_subscribe.append("none")
                request.resource_names_unsubscribe.append("none")
            for name in list(self.has.get(url, {})):
                if not wild and name not in names:
                    self.has[url].pop(name)
                    self.reported.get(url, {}).pop(name, None)
        else:
            request = self._sotw(url)
            request.response_nonce = self.nonce.get(url, "")
            for name in list(self.has.get(url, {})):
                if not wild and name not in names:
                    self.has[url].pop(name)
        self.send(request)

    def _sotw(self, url: TypeURL) -> Any:
        names = sorted(self.names[url]) + (["*"] if url in self.wild else [])
        return pb.DiscoveryRequest(
            type_url=url,
            # An empty name is a name: it keeps "nothing" from meaning "everything".
            resource_names=names or [""],
            version_info=self.accepted.get(url, ""),
        )

    def answer(self) -> None:
        while self.unanswered:
            self._take(self.unanswered.pop(0))

    def _take(self, response: Any) -> None:
        self.received += 1
        assert self.received < 5000, "the server does not come to rest"
        url = TypeURL(response.type_url)
        has = self.has.setdefault(url, {})
        wanted = self.names.get(url, set())
        wild = url in self.wild
        given: dict[str, tuple[str, str]] = {}
        for resource in response.resources:
            value = (resource.resource if self.delta else resource).value.decode()
            name = value.partition("=")[0]
            given[name] = (value, resource.version if self.delta else "")
        bad = sorted(name for name, (value, _) in given.items() if "bad" in value)
        for name, pair in given.items():
            if name not in bad and (wild or name in wanted):
                has[name] = pair
        if self.delta:
            for name in response.removed_resources:
                has.pop(name, None)
                self.reported.get(url, {}).pop(name, None)
        elif type_info(url).whole:
            for name in [name for name in has if name not in given]:
                del has[name]
        self.nonce[url] = response.nonce
        request: Any
        if self.delta:
            request = pb.DeltaDiscoveryRequest(type_url=url, response_nonce=response.nonce)
        else:
            request = self._sotw(url)
        if bad:
            request.error_detail.message = f"{', '.join(bad)}: bad" if self.tells else "bad"
        elif self.delta:
            reported = self.reported.setdefault(url, {})
            reported |= {name: version for name, (_, version) in given.items() if name in has}
        else:
            self.accepted[url] = response.version_info
        if not self.delta:
            request.version_info = self.accepted.get(url, "")
            request.response_nonce = response.nonce
        self.send(request)

    def reconnect(self, hub: Hub) -> None:
        self.hub.detach(self.attached)
        self.hub = hub
        self.unanswered.clear()
        self.nonce.clear()
        self.attached = self._attach()
        for url, names in self.names.items():
            if self.delta:
                request: Any = pb.DeltaDiscoveryRequest(
                    type_url=url, initial_resource_versions=self.reported.get(url, {})
                )
                request.resource_names_subscribe.extend(sorted(names))
                if url in self.wild:
                    request.resource_names_subscribe.append("*")
                elif not names:
                    request.resource_names_subscribe.append("none")
            else:
                request = self._sotw(url)
            self.send(request)


names = st.sets(st.sampled_from(NAMES))
kinds = st.sampled_from(TYPES)
changes = st.lists(
    st.tuples(
        kinds,
        st.sampled_from(NAMES),
        st.sampled_from(["1", "2", "3", "bad1", "bad2", None]),
        st.sampled_from([None, "me", "other"]),
    ),
    min_size=1,
    max_size=6,
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("change"), changes),
        st.tuples(st.just("subscribe"), st.tuples(kinds, names, st.booleans())),
        st.tuples(st.just("answer"), st.none()),
        st.tuples(st.just("wait"), st.sampled_from([0.1, 1.5, 40.0])),
        st.tuples(st.just("reconnect"), st.none()),
        st.tuples(st.just("restart"), st.none()),
    ),
    min_size=3,
    max_size=25,
)


@pytest.mark.parametrize("delta", [True, False], ids=["delta", "sotw"])
@settings(max_examples=EXAMPLES)
@given(steps=steps, tells=st.booleans())
def test_a_client_ends_with_what_it_should_have(delta: bool, steps: Any, tells: bool) -> None:
    limits = Limits(patience_s=1.0, retry_s=30.0)
    cache = ResourceCache()
    client = Client(Hub(cache, limits=limits), delta=delta, tells=tells)
    for what, argument in steps:
        match what:
            case "change":
                with cache.transaction() as change:
                    for url, name, value, node in argument:
                        nodes = None if node is None else [node]
                        if value is not None:
                            text = f"{name}={value}" + (f"@{node}" if node == "other" else "")
                            change.put(url, name, text.encode(), nodes=nodes)
                        elif node is None:
                            change.remove_common(url, name)
                        else:
                            change.remove(url, name, nodes=nodes)
            case "subscribe":
                url, wanted, wild = argument
                client.subscribe(url, wanted, wild=wild and type_info(url).whole)
            case "answer":
                client.answer()
            case "wait":
                client.now += argument
            case "reconnect":
                client.reconnect(client.hub)
            case "restart":
                # What a client refused in parts only the process knows: it is told it all anew.
                if not client.attached.stream.suspects():
                    fresh = ResourceCache()
                    with fresh.transaction() as change:
                        for r, owner in cache.rows():
                            nodes = None if owner is None else [owner]
                            change.put(r.url, r.name, r.value(), nodes=nodes)
                    cache = fresh
                    client.reconnect(Hub(cache, limits=limits))
        client.pump()
    for _ in range(60):
        client.answer()
        client.now += 1.1
        client.pump()
    # At rest, but for what is tried again now and then.
    client.answer()
    _judge(cache, client)


def _judge(cache: ResourceCache, client: Client) -> None:
    view = cache.view(ME)
    for url in client.names:
        has = client.has.get(url, {})
        for name in NAMES:
            if url not in client.wild and name not in client.names[url]:
                continue
            desired = view.get(url, name)
            standing = client.hub.standing(ME, url, name)
            where = f"{type_info(url).short} {name}: {has.get(name)} for {desired}"
            if desired is None:
                # Parts cannot be taken back in the state of the world.
                if client.delta or type_info(url).whole:
                    assert name not in has, where
                assert standing.state is State.ACKED, (where, standing)
                continue
            value = desired.value().decode()
            assert "@other" not in value
            if "bad" in value:
                assert standing.state is State.NACKED, (where, standing)
                assert "bad" not in has.get(name, ("", ""))[0]
            else:
                assert has[name][0] == value, where
                assert standing.state is State.ACKED, (where, standing)


@settings(max_examples=EXAMPLES)
@given(
    delta=st.booleans(),
    requests=st.lists(
        st.one_of(
            st.builds(
                dict,
                type_url=st.sampled_from([*TYPES, "", "x" * 600, "\x00"]),
                response_nonce=st.sampled_from(["", "1", "2", "7", "x"]),
                names=st.lists(st.sampled_from([*NAMES, "*", "", "é" * 2000]), max_size=4),
                dropped=st.lists(st.sampled_from([*NAMES, "*"]), max_size=3),
                versions=st.dictionaries(st.sampled_from(NAMES), st.text(max_size=3), max_size=3),
                error=st.one_of(st.none(), st.text(max_size=30)),
                version=st.text(max_size=5),
            ),
        ),
        max_size=12,
    ),
)
def test_no_request_crashes_the_core(delta: bool, requests: Any) -> None:
    cache = ResourceCache()
    with cache.transaction() as change:
        for url in TYPES:
            change.put(url, "a", b"a=1")
    hub = Hub(cache, limits=Limits(types=4, names=6))
    attached = hub.attach(ME, delta=delta, peer=Peer(), wake=lambda: None, time=0)
    for number, fields in enumerate(requests):
        request: Any
        if delta:
            request = pb.DeltaDiscoveryRequest(
                resource_names_subscribe=fields["names"],
                resource_names_unsubscribe=fields["dropped"],
                initial_resource_versions=fields["versions"],
            )
        else:
            request = pb.DiscoveryRequest(
                resource_names=fields["names"], version_info=fields["version"]
            )
        request.type_url = fields["type_url"]
        request.response_nonce = fields["response_nonce"]
        if fields["error"] is not None:
            request.error_detail.message = fields["error"]
        try:
            attached.stream.receive(request, float(number))
        except DomainError:
            break
        hub.settle(attached, 0)
        for data in attached.stream.send(float(number)):
            (pb.DeltaDiscoveryResponse if delta else pb.DiscoveryResponse).FromString(data)
        cache.put(CDS, "a", f"a={number}".encode())
    hub.detach(attached)
    assert not hub.streams
    assert not hub._index
