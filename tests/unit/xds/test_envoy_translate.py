"""Redirects become resources: what each rule turns into, and what is refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from envoy.config.listener.v3 import listener_pb2
from envoy.config.route.v3 import route_pb2
from envoy.extensions.filters.http.rbac.v3 import rbac_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import (
    http_connection_manager_pb2 as hcm_pb2,
)
from hypothesis import given
from hypothesis import strategies as st

from cilia.policy.api import HeaderMatch, HTTPRule, TLSContext
from services.xds.translate import expressions
from services.xds.translate.model import (
    MAX_PROGRAM_SIZE,
    Direction,
    NodeSettings,
    Redirect,
    Rule,
    RuleRefused,
    RuleSet,
)
from services.xds.translate.translate import (
    CLUSTER,
    LISTENER,
    ROUTES,
    SECRET,
    Resource,
    base,
    translate,
)

SETTINGS = NodeSettings()


def redirect(*rules: HTTPRule | None, **more: object) -> Redirect:
    made = tuple(Rule(number, rule) for number, rule in enumerate(rules, start=1))
    return Redirect(
        port=10_000,
        direction=Direction.INGRESS,
        rules=RuleSet(rules=made, **more),  # type: ignore[arg-type]  # fields by name
    )


def resource(what: Redirect, type_url: str, **more: object) -> Any:
    made = translate(what, SETTINGS, **more)  # type: ignore[arg-type]  # the secret reader
    (found,) = [x.message for x in made if x.type_url == type_url]
    return found


def bodies(made: Iterable[Resource]) -> list[Any]:
    """The messages, whose types no stub tells."""
    return [x.message for x in made]


def rbacs(what: Redirect) -> dict[str, rbac_pb2.RBAC]:
    """By filter, as the routes carry them."""
    config = resource(what, ROUTES)
    assert isinstance(config, route_pb2.RouteConfiguration)
    found = {}
    for name, packed in config.typed_per_filter_config.items():
        message = rbac_pb2.RBACPerRoute()
        if packed.Unpack(message):
            found[name] = message.rbac
    return found


def permissions(what: Redirect, rule_id: int = 1) -> list[list[tuple[str, str, str]]]:
    """Of a rule: for each way to be allowed, its conditions as (header, how, value)."""
    (rbac,) = rbacs(what).values()
    found = []
    for permission in rbac.rules.policies[str(rule_id)].permissions:
        conditions = []
        for part in permission.and_rules.rules:
            header = part.header
            if header.WhichOneof("header_match_specifier") == "present_match":
                how, value = "absent" if header.invert_match else "present", ""
            else:
                how = str(header.string_match.WhichOneof("match_pattern"))
                match = getattr(header.string_match, how)
                value = match.regex if how == "safe_regex" else match
            conditions.append((header.name, how, value))
        found.append(conditions)
    return found


def manager(what: Redirect) -> hcm_pb2.HttpConnectionManager:
    listener = resource(what, LISTENER)
    assert isinstance(listener, listener_pb2.Listener)
    message = hcm_pb2.HttpConnectionManager()
    assert listener.default_filter_chain.filters[0].typed_config.Unpack(message)
    return message


# ---- expressions


@pytest.mark.parametrize(
    ("expression", "how", "value"),
    [
        ("GET", "exact", "GET"),
        ("GET|POST", "safe_regex", "GET|POST"),
        ("/public/.*", "prefix", "/public/"),
        ("^/public/.*$", "prefix", "/public/"),
        (r"/index\.html", "exact", "/index.html"),
        (r"/a\.b.*", "prefix", "/a.b"),
        (r"/v\d", "safe_regex", r"/v\d"),
        (r"/a\.*", "safe_regex", r"/a\.*"),
        ("/a?", "safe_regex", "/a?"),
        (r"/price\$", "exact", "/price$"),
        (r"\x41", "safe_regex", r"\x41"),
        ("(?i)/A", "safe_regex", "(?i)/A"),
        ("/a|/b.*", "safe_regex", "/a|/b.*"),
    ],
)
def test_an_expression_that_is_a_text_or_a_prefix_is_matched_as_one(
    expression: str, how: str, value: str
) -> None:
    made = expressions.matcher(expression, what="the path")
    assert made is not None
    assert made.WhichOneof("match_pattern") == how
    found = getattr(made, how)
    assert (found.regex if how == "safe_regex" else found) == value


def test_an_expression_that_matches_everything_is_no_condition() -> None:
    assert expressions.matcher(".*", what="the path") is None
    assert permissions(redirect(HTTPRule(method="GET", path=".*"))) == [
        [(":method", "exact", "GET")]
    ]


@given(
    st.text(alphabet="/ab.*\\$^|[]{}()?+-", max_size=8),
    st.text(alphabet="/ab.*$-\\", max_size=6),
)
def test_a_matcher_decides_as_its_expression_does(expression: str, text: str) -> None:
    import re2

    if expressions.check(expression):
        with pytest.raises(RuleRefused):
            expressions.matcher(expression, what="x")
        return
    made = expressions.matcher(expression, what="x")
    if made is None:
        matched = True
    elif made.WhichOneof("match_pattern") == "exact":
        matched = text == made.exact
    elif made.WhichOneof("match_pattern") == "prefix":
        matched = text.startswith(made.prefix)
    else:
        matched = re2.fullmatch(made.safe_regex.regex, text) is not None
    assert matched == (re2.fullmatch(expression, text) is not None)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/(", "is no RE2 expression"),
        (r"/(?=x)", "is no RE2 expression"),
        ("/[a-z]{1000}", f"over the limit of {MAX_PROGRAM_SIZE}"),
        ("/" + "a" * 5000, "longer than"),
        ("/a\r\nX: b", "control character"),
    ],
)
def test_an_expression_that_envoy_would_refuse_is_refused_by_the_rules_name(
    path: str, why: str
) -> None:
    with pytest.raises(RuleRefused, match="rule 2: the path") as raised:
        translate(redirect(None, HTTPRule(path=path)), SETTINGS)
    assert why in str(raised.value)


# ---- rules


def test_all_fields_of_a_rule_must_match() -> None:
    rule = HTTPRule(
        method="GET", path="/v1/.*", host=r"api\.example", headers=("X-Up", "Team: blue red")
    )
    assert permissions(redirect(rule)) == [
        [
            (":path", "prefix", "/v1/"),
            (":authority", "exact", "api.example"),
            ("x-up", "present", ""),
            ("x_up", "absent", ""),
            ("team", "exact", "blue red"),
            (":method", "exact", "GET"),
        ]
    ]


def test_what_is_cheap_is_asked_first() -> None:
    rule = HTTPRule(method="GET|PUT", path="/v[12]/.*", host="a", headers=("B",))
    (conditions,) = permissions(redirect(rule))
    assert [name for name, _, _ in conditions] == [":authority", "b", ":path", ":method"]


def test_rules_of_one_id_are_ways_of_one_policy() -> None:
    rules = RuleSet(rules=(Rule(7, HTTPRule(path="/a")), Rule(7, HTTPRule(path="/b"))))
    what = Redirect(port=1, direction=Direction.EGRESS, rules=rules)
    assert permissions(what, 7) == [[(":path", "exact", "/a")], [(":path", "exact", "/b")]]


def test_a_rule_without_conditions_allows_everything() -> None:
    for rule in (None, HTTPRule()):
        (rbac,) = rbacs(redirect(rule)).values()
        assert [p.any for p in rbac.rules.policies["1"].permissions] == [True]


def test_no_rules_deny_everything() -> None:
    (rbac,) = rbacs(redirect()).values()
    assert rbac.HasField("rules")
    assert not rbac.rules.policies


def test_a_headers_other_spellings_must_be_absent() -> None:
    rule = HTTPRule(headers=("X-My-Role: user",))
    (conditions,) = permissions(redirect(rule))
    assert conditions == [
        ("x-my-role", "exact", "user"),
        ("x-my_role", "absent", ""),
        ("x_my-role", "absent", ""),
        ("x_my_role", "absent", ""),
    ]


@pytest.mark.parametrize("name", ["", "a b", "a\r", "é", "a-" * 20 + "b"])
def test_a_name_that_is_no_headers_is_refused(name: str) -> None:
    with pytest.raises(RuleRefused, match="header"):
        translate(redirect(HTTPRule(header_matches=(HeaderMatch(name, "v"),))), SETTINGS)


def test_a_header_match_without_an_action_is_a_condition() -> None:
    rule = HTTPRule(header_matches=(HeaderMatch("A", "v"), HeaderMatch("B")))
    assert permissions(redirect(rule)) == [[("a", "exact", "v"), ("b", "present", "")]]
    assert not [f for f in manager(redirect(rule)).http_filters if "headers" in f.name]


@pytest.mark.parametrize(
    ("items", "fallback", "expected"),
    [
        ({"k": b"s3cret\n"}, "", "s3cret"),
        (None, "fallback", "fallback"),
        ({"a": b"1", "b": b"2"}, "fallback", "fallback"),
        (None, "", None),
    ],
)
def test_the_value_of_a_header_may_be_a_secret(
    items: dict[str, bytes] | None, fallback: str, expected: str | None
) -> None:
    match = HeaderMatch("token", fallback, secret=("default", "t"))
    what = redirect(HTTPRule(header_matches=(match,)))
    made = translate(what, SETTINGS, lambda secret: items if secret == ("default", "t") else None)
    (config,) = bodies(x for x in made if x.type_url == ROUTES)
    per_route = rbac_pb2.RBACPerRoute()
    assert config.typed_per_filter_config["cilia.rbac.ingress"].Unpack(per_route)
    policies = per_route.rbac.rules.policies
    if expected is None:  # it never matches
        assert not policies
    else:
        condition = policies["1"].permissions[0].and_rules.rules[0]
        assert condition.header.string_match.exact == expected


def test_each_action_on_a_header_has_a_filter_of_its_own() -> None:
    matches = tuple(HeaderMatch("a", "v", how) for how in ("LOG", "ADD", "DELETE", "REPLACE"))
    what = redirect(HTTPRule(path="/x", header_matches=matches))
    names = [f.name for f in manager(what).http_filters]
    assert names == ["cilia.rbac.ingress", *(f"cilia.headers.{n}" for n in range(4)), "router"]
    config = resource(what, ROUTES)
    assert isinstance(config, route_pb2.RouteConfiguration)
    assert set(config.typed_per_filter_config) == set(names) - {"router"}


# ---- the listener


def test_the_listener_denies_by_itself_and_does_not_change_with_the_rules() -> None:
    one, other = redirect(HTTPRule(path="/a")), redirect(HTTPRule(path="/b"), None)
    assert resource(one, LISTENER) == resource(other, LISTENER)
    first = manager(one).http_filters[0]
    base_rule = rbac_pb2.RBAC()
    assert first.typed_config.Unpack(base_rule)
    assert base_rule.HasField("rules")
    assert not base_rule.rules.policies
    assert base_rule.rules.action == 0  # ALLOW: what no policy names is denied


def test_equal_redirects_are_equal_bytes() -> None:
    rules = [HTTPRule(path=f"/{n}", headers=("A: b",)) for n in range(50)]
    first, second = (translate(redirect(*rules), SETTINGS) for _ in range(2))
    assert [x.message.SerializeToString(deterministic=True) for x in first] == [
        x.message.SerializeToString(deterministic=True) for x in second
    ]


def test_both_ends_rules_are_two_filters() -> None:
    what = Redirect(
        port=10_001,
        direction=Direction.BOTH,
        rules=RuleSet(rules=(Rule(1),)),
        ingress_rules=RuleSet(),
    )
    found = rbacs(what)
    assert set(found) == {"cilia.rbac.egress", "cilia.rbac.ingress"}
    assert "1" in found["cilia.rbac.egress"].rules.policies
    assert not found["cilia.rbac.ingress"].rules.policies
    assert [f.name for f in manager(what).http_filters[:2]] == sorted(found)


def test_another_parser_is_refused() -> None:
    with pytest.raises(RuleRefused, match="'kafka'"):
        translate(redirect(parser="kafka"), SETTINGS)


def test_the_mark_and_the_source_of_each_direction() -> None:
    settings = NodeSettings(ingress_sources=("10.1.0.1", "fd00::1"))
    ingress, egress = bodies(base(settings))
    for cluster, mark, sources in (
        (ingress, 0xA00, ["10.1.0.1", "fd00::1"]),
        (egress, 0xB00, []),
    ):
        bind = cluster.upstream_bind_config
        assert [o.int_value for o in bind.socket_options if o.name == 36] == [mark]
        found = [bind.source_address.address] if bind.source_address.address else []
        assert found + [x.address.address for x in bind.extra_source_addresses] == sources


# ---- TLS

CONTEXT = TLSContext(secret=("default", "deathstar"))


def test_tls_that_is_opened_brings_its_secrets() -> None:
    what = redirect(None, terminating_tls=CONTEXT, originating_tls=CONTEXT, server_names=("a.b",))
    items = {"tls.crt": b"C", "tls.key": b"K", "ca.crt": b"A"}
    made = translate(what, SETTINGS, lambda _: items)
    assert [(x.type_url, x.name) for x in made] == [
        (CLUSTER, "tls-redirect-10000"),
        (SECRET, "certificate:default/deathstar/tls.crt"),
        (SECRET, "authority:default/deathstar/ca.crt"),
        (ROUTES, "redirect-10000"),
        (LISTENER, "redirect-10000"),
    ]
    _, _, _, routes, listener = bodies(made)
    chains = {chain.name: chain for chain in listener.filter_chains}
    assert list(chains["https"].filter_chain_match.server_names) == ["a.b"]
    # TLS for another name meets a chain without filters, which closes.
    assert not chains["other-names"].filters
    assert chains["other-names"].filter_chain_match.transport_protocol == "tls"
    assert routes.virtual_hosts[0].routes[-1].route.cluster == "tls-redirect-10000"


@pytest.mark.parametrize("items", [None, {}, {"tls.crt": b"C"}, {"tls.crt": b"C", "tls.key": b""}])
def test_a_certificate_that_is_not_whole_is_refused(items: dict[str, bytes] | None) -> None:
    with pytest.raises(RuleRefused, match="default/deathstar"):
        translate(redirect(None, terminating_tls=CONTEXT), SETTINGS, lambda _: items)
