"""What rules do to requests that lack a header (`mismatch` LOG, ADD, DELETE, REPLACE).

Each such header match is one composite filter in the listener: without a configuration in the
route it does nothing; with one it runs when the rule's hard conditions hold and the header does
not match. What it did is left in the request's metadata for the access log.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from envoy.config.core.v3 import base_pb2, extension_pb2
from envoy.config.route.v3 import route_components_pb2 as route_pb2
from envoy.extensions.common.matching.v3 import extension_matcher_pb2
from envoy.extensions.filters.http.composite.v3 import composite_pb2
from envoy.extensions.filters.http.header_mutation.v3 import header_mutation_pb2
from envoy.extensions.filters.http.set_metadata.v3 import set_metadata_pb2
from envoy.type.matcher.v3 import http_inputs_pb2
from google.protobuf.message import Message
from xds.core.v3 import extension_pb2 as xds_extension_pb2
from xds.type.matcher.v3 import matcher_pb2

from cilia.policy.api import HeaderMatch
from services.xds.translate.clusters import packed
from services.xds.translate.model import Redirect, Rule, RuleRefused, SecretReader
from services.xds.translate.rbac import check_header, expected_value, hard_conditions

MISSING: Final = "cilia.missing"
REJECTED: Final = "cilia.rejected"
MAX_ACTIONS: Final = 64
REDACTED: Final = "[redacted]"


def _matches(redirect: Redirect) -> list[tuple[Rule, HeaderMatch]]:
    return [
        (rule, match)
        for _, rules in redirect.sets
        for rule in rules.rules
        if rule.http is not None
        for match in rule.http.header_matches
        if match.mismatch
    ]


def filter_name(number: int) -> str:
    return f"cilia.headers.{number}"


def filter_names(redirect: Redirect) -> list[str]:
    """Of the filters that the redirect's listener needs. Raises RuleRefused."""
    count = len(_matches(redirect))
    if count > MAX_ACTIONS:
        raise RuleRefused(
            f"a redirect has {count} header matches with an action, over the limit of {MAX_ACTIONS}"
        )
    return [filter_name(number) for number in range(count)]


def idle_filter() -> extension_matcher_pb2.ExtensionWithMatcher:
    """As it stands in the listener: matches nothing."""
    config = extension_matcher_pb2.ExtensionWithMatcher()
    config.extension_config.name = "composite"
    config.extension_config.typed_config.CopyFrom(packed(composite_pb2.Composite()))
    # A matcher must have something to match; no request has a header of this name.
    entry = config.xds_matcher.matcher_list.matchers.add()
    single = entry.predicate.single_predicate
    single.input.CopyFrom(_input("cilia-none"))
    single.value_match.exact = "none"
    entry.on_match.action.name = "skip"
    skip = _execute([])
    entry.on_match.action.typed_config.CopyFrom(packed(skip))
    return config


def actions(
    redirect: Redirect, secrets: SecretReader
) -> Iterator[tuple[str, extension_matcher_pb2.ExtensionWithMatcherPerRoute]]:
    """What the routes give to the filters. Raises RuleRefused."""
    for name, (rule, match) in zip(filter_names(redirect), _matches(redirect), strict=True):
        config = _action(rule, match, secrets)
        if config is not None:
            yield name, config


def _action(
    rule: Rule, match: HeaderMatch, secrets: SecretReader
) -> extension_matcher_pb2.ExtensionWithMatcherPerRoute | None:
    assert rule.http is not None
    conditions = hard_conditions(rule.rule_id, rule.http, secrets)
    expected = expected_value(match, secrets)
    if conditions is None or expected is None:
        return None  # the rule matches nothing, or there is no value to act with
    check_header(f"rule {rule.rule_id}: the", match.name, expected)

    name = match.name.lower()
    config = extension_matcher_pb2.ExtensionWithMatcherPerRoute()
    entry = config.xds_matcher.matcher_list.matchers.add()
    predicates = [_predicate(condition) for condition in conditions]
    fits = route_pb2.HeaderMatcher(name=name)
    if expected:
        fits.string_match.exact = expected
    else:
        fits.present_match = True
    misses = matcher_pb2.Matcher.MatcherList.Predicate()
    misses.not_matcher.CopyFrom(_predicate(fits))
    predicates.append(misses)
    if match.mismatch == "DELETE":  # of what is there
        predicates.append(_predicate(route_pb2.HeaderMatcher(name=name, present_match=True)))
    if len(predicates) == 1:
        entry.predicate.CopyFrom(predicates[0])
    else:
        entry.predicate.and_matcher.predicate.extend(predicates)

    filters: list[tuple[str, Message]] = []
    mutation = header_mutation_pb2.HeaderMutation()
    change = mutation.mutations.request_mutations.add()
    option = base_pb2.HeaderValueOption
    match match.mismatch:
        case "ADD":
            change.append.header.key = name
            change.append.header.value = expected.replace("%", "%%")
            change.append.append_action = option.APPEND_IF_EXISTS_OR_ADD
        case "REPLACE":
            change.append.header.key = name
            change.append.header.value = expected.replace("%", "%%")
            change.append.append_action = option.OVERWRITE_IF_EXISTS_OR_ADD
        case "DELETE":
            change.remove = name
        case _:  # LOG changes nothing
            pass
    if match.mismatch != "LOG":
        filters.append(("mutate", mutation))
    note = set_metadata_pb2.Config()
    metadata = note.metadata.add(
        metadata_namespace=REJECTED if match.mismatch == "DELETE" else MISSING, allow_overwrite=True
    )
    metadata.value[name] = REDACTED if match.secret is not None else expected
    filters.append(("note", note))
    entry.on_match.action.name = match.mismatch.lower()
    entry.on_match.action.typed_config.CopyFrom(packed(_execute(filters)))
    return config


def _execute(filters: list[tuple[str, Message]]) -> composite_pb2.ExecuteFilterAction:
    action = composite_pb2.ExecuteFilterAction()
    chain = action.filter_chain.typed_config
    for name, config in filters or [("note", set_metadata_pb2.Config())]:
        chain.append(extension_pb2.TypedExtensionConfig(name=name, typed_config=packed(config)))
    return action


def _input(header: str) -> xds_extension_pb2.TypedExtensionConfig:
    return xds_extension_pb2.TypedExtensionConfig(
        name="header",
        typed_config=packed(http_inputs_pb2.HttpRequestHeaderMatchInput(header_name=header)),
    )


def _predicate(condition: route_pb2.HeaderMatcher) -> matcher_pb2.Matcher.MatcherList.Predicate:
    predicate = matcher_pb2.Matcher.MatcherList.Predicate()
    single = predicate.single_predicate
    single.input.CopyFrom(_input(condition.name))
    value = single.value_match
    if condition.present_match:
        value.safe_regex.google_re2.SetInParent()
        value.safe_regex.regex = r"(?s)\C*"
    elif condition.string_match.HasField("safe_regex"):
        value.safe_regex.google_re2.SetInParent()
        value.safe_regex.regex = condition.string_match.safe_regex.regex
    elif condition.string_match.HasField("prefix"):
        value.prefix = condition.string_match.prefix
    else:
        value.exact = condition.string_match.exact
    return predicate
