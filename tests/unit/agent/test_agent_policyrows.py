"""Rows of policy maps: what a reader may see while one policy turns into another."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from cilia.bpf.constants import POLICY_META_HAS_DENY
from cilia.policy import L7Set, PolicyEntry, PolicyKey, RuleID
from cilia.policy.api import HTTPRule
from cilia.policy.l7 import L7Entry
from cilia.policy.mapstate import Block, L4Key, MapState
from services.agent.policyrows import PolicyRows, difference, may_swap

State = dict[PolicyKey, PolicyEntry]

keys = st.builds(
    PolicyKey,
    identity=st.sampled_from([0, 256, 257]),
    egress=st.booleans(),
    proto=st.sampled_from([6, 17]),
    port=st.sampled_from([80, 443]),
    plen=st.just(24),
) | st.builds(
    PolicyKey,
    identity=st.sampled_from([0, 256]),
    egress=st.booleans(),
    proto=st.just(0),
    port=st.just(0),
    plen=st.just(0),
)
entries = st.builds(PolicyEntry, deny=st.booleans(), rule_id=st.integers(1, 3))
states = st.dictionaries(keys, entries, max_size=12)


def rows(state: State) -> PolicyRows:
    return PolicyRows.from_entries(state.items())


def as_map(policy: PolicyRows) -> dict[int, int]:
    return dict(zip(policy.keys.tolist(), policy.values.tolist(), strict=True))


def allowed(content: dict[int, int], packets: list[tuple[set[int], object]]) -> set[object]:
    """Packets with an allow row and no deny row among those that match them."""
    deny = 1 << 48
    result = set()
    for matching, packet in packets:
        found = [content[key] for key in matching if key in content]
        if found and not any(value & deny for value in found):
            result.add(packet)
    return result


def packets_of(*policies: PolicyRows) -> list[tuple[set[int], object]]:
    """Every combination of (identity, direction, L4), with the keys of rows that match it."""
    found: list[tuple[set[int], object]] = []
    for identity in (256, 257, 999):
        for egress in (False, True):
            for proto, port in ((6, 80), (6, 443), (17, 80), (17, 443), (132, 9)):
                matching = rows(
                    {
                        PolicyKey(who, egress, *l4): PolicyEntry(deny=False, rule_id=RuleID(1))
                        for who in (0, identity)
                        for l4 in ((proto, port, 24), (0, 0, 0))
                    }
                )
                found.append((set(matching.keys.tolist()), (identity, egress, proto, port)))
    return found


@settings(deadline=None)  # the machine may be busy
@given(states, states)
def test_each_step_allows_only_what_one_of_both_policies_allows(old: State, new: State) -> None:
    before, after = rows(old), rows(new)
    delta = difference(before, after)
    packets = packets_of(before, after)
    content = as_map(before)
    either = allowed(content, packets) | allowed(as_map(after), packets)
    both = allowed(content, packets) & allowed(as_map(after), packets)
    for put, drop in (
        (delta.put_denies, None),
        (delta.put_allows, None),
        (None, delta.drop_allows),
        (delta.lift_denies, None),
        (None, delta.drop_denies),
    ):
        if put is not None:
            content.update(as_map(put))
        if drop is not None:
            for key in drop.keys.tolist():
                content.pop(key)
        now = allowed(content, packets)
        assert now <= either, "nobody allowed this"
        assert both <= now, "both allow this"
    assert content == as_map(after)


@given(states)
def test_no_difference_to_itself_and_equal_whatever_the_order(state: State) -> None:
    backwards = dict(reversed(state.items()))
    assert rows(state) == rows(backwards)
    assert len(difference(rows(state), rows(backwards))) == 0


@given(states)
def test_rows_survive_the_map(state: State) -> None:
    policy = rows(state)
    assert PolicyRows.from_arrays(policy.key_array(), policy.value_array()) == policy


@given(states)
def test_masks_name_every_prefix_length(state: State) -> None:
    masks = rows(state).masks()
    denies = any(entry.deny for entry in state.values())
    for key in state:
        pair = masks.id if key.identity else masks.any
        assert pair[key.egress] >> key.plen & 1
    for mask in (*masks.id, *masks.any):
        assert bool(mask & POLICY_META_HAS_DENY) == denies


BEFORE, AFTER, OTHER = (
    L7Set(parser="http", egress=False, rules=(L7Entry(RuleID(1), HTTPRule(path=path)),))
    for path in ("/before", "/after", "/other")
)
DENY, ALLOW = PolicyEntry(deny=True, rule_id=RuleID(1)), PolicyEntry(deny=False, rule_id=RuleID(1))


def through(rules: L7Set) -> PolicyEntry:
    return PolicyEntry(deny=False, rule_id=RuleID(1), l7=rules)


def blocks(*entries: PolicyEntry) -> st.SearchStrategy[dict[int, Block]]:
    rows = st.dictionaries(
        st.sampled_from([L4Key(False, 6, 80, 24), L4Key(False, 6, 81, 24), L4Key(False, 0, 0, 0)]),
        st.sampled_from(entries),
    )
    return st.fixed_dictionaries({0: rows, 256: rows, 257: rows})


def decision(state: MapState, identity: int, port: int) -> str:
    match = state.lookup(identity, False, 6, port)
    if match is None or match.entry.deny:
        return "deny"
    return match.entry.l7.digest if match.entry.l7 is not None else "allow"


@settings(max_examples=500, deadline=None)
@given(
    blocks(DENY, ALLOW, through(BEFORE), through(OTHER)),
    blocks(DENY, ALLOW, through(AFTER), through(OTHER)),
)
def test_other_rules_on_a_port_allow_only_what_one_of_both_policies_allows(
    was: dict[int, Block], will: dict[int, Block]
) -> None:
    """The proxy has the new rules, the kernel the old rows."""
    old, new = MapState(was), MapState(will)
    if not may_swap(old, new, BEFORE.digest, AFTER.digest):
        return
    for identity in (256, 257, 999):
        for port in (80, 81, 82):
            before, after = decision(old, identity, port), decision(new, identity, port)
            now = AFTER.digest if before == BEFORE.digest else before
            assert now in (before, after, "deny") or after == "allow"


def test_rules_change_in_place_where_every_peer_keeps_them() -> None:
    http, https = L4Key(False, 6, 80, 24), L4Key(False, 6, 81, 24)

    def swap(was: dict[int, Block], will: dict[int, Block]) -> bool:
        return may_swap(MapState(was), MapState(will), BEFORE.digest, AFTER.digest)

    old: dict[int, Block] = {256: {http: through(BEFORE)}}
    assert swap(old, {256: {http: through(AFTER)}})
    assert swap(old, {256: {http: through(AFTER)}, 257: {http: through(AFTER), https: ALLOW}})
    # Another peer has the rules now; a peer more has them, and the one before none any more.
    assert not swap(old, {257: {http: through(AFTER)}})
    assert not swap({**old, 257: {http: through(BEFORE)}}, {256: {http: through(AFTER)}})
    # A denial, or rules of its own, for one of those whom the rules were for.
    everyone: dict[int, Block] = {0: {http: through(BEFORE)}}
    assert swap(everyone, {0: {http: through(AFTER)}})
    assert not swap(everyone, {0: {http: through(AFTER)}, 257: {http: DENY}})
    assert not swap(everyone, {0: {http: through(AFTER)}, 257: {http: through(OTHER)}})
