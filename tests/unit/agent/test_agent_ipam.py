"""Pools: the router is kept, addresses go round, quarantine holds, refusals name who and what."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.agent.ipam import AddressInUse, AddressOutOfPool, Ipam, Pool, PoolExhausted

SMALL = IPv4Network("10.0.0.0/29")  # router .1, endpoints .2 to .6


def test_first_usable_address_is_the_router_and_is_never_given() -> None:
    pool = Pool(SMALL)
    given_out = [str(pool.allocate(f"e{n}")) for n in range(pool.capacity)]
    assert str(pool.router) == "10.0.0.1"
    assert given_out == [f"10.0.0.{n}" for n in range(2, 7)]
    with pytest.raises(PoolExhausted, match=r"10\.0\.0\.0/29: 5 in use, 0 waiting"):
        pool.allocate("one too many")


def test_a_freed_address_is_not_the_next_one_given() -> None:
    pool = Pool(SMALL)
    first = pool.allocate("a")
    pool.free(first)
    assert pool.allocate("b") != first


def test_quarantine_keeps_an_address_from_everyone_until_freed() -> None:
    pool = Pool(SMALL)
    held = [pool.allocate(f"e{n}") for n in range(pool.capacity)]
    pool.quarantine(held[2])
    with pytest.raises(PoolExhausted, match="4 in use, 1 waiting"):
        pool.allocate("x")
    with pytest.raises(AddressInUse, match="being purged"):
        pool.claim(held[2], "x")
    pool.free(held[2])
    assert pool.allocate("x") == held[2]


@pytest.mark.parametrize(
    ("address", "error", "text"),
    [
        ("10.0.0.1", AddressInUse, "router"),
        ("10.0.0.0", AddressOutOfPool, "10.0.0.0/29"),
        ("10.0.0.7", AddressOutOfPool, "10.0.0.0/29"),
        ("10.9.0.1", AddressOutOfPool, "10.0.0.0/29"),
        ("10.0.0.3", AddressInUse, "in use by other"),
    ],
)
def test_what_cannot_be_claimed(address: str, error: type[Exception], text: str) -> None:
    pool = Pool(SMALL)
    pool.claim(IPv4Address("10.0.0.3"), "other")
    with pytest.raises(error, match=text):
        pool.claim(IPv4Address(address), "me")


def test_both_families_or_none() -> None:
    ipam = Ipam(SMALL, IPv6Network("fd00::/64"))
    taken = IPv6Address("fd00::5")
    ipam.allocate("first", ipv6=taken)
    with pytest.raises(AddressInUse):
        ipam.allocate("second", ipv4=IPv4Address("10.0.0.6"), ipv6=taken)
    assert ipam.v4.owner(IPv4Address("10.0.0.6")) is None


@given(st.lists(st.tuples(st.sampled_from("agfq"), st.integers(0, 7)), max_size=60))
def test_no_address_is_ever_given_twice(steps: list[tuple[str, int]]) -> None:
    pool = Pool(SMALL)
    held: set[object] = set()
    resting: set[object] = set()
    for step, number in steps:
        address = IPv4Address("10.0.0.0") + number
        match step:
            case "a":
                try:
                    found = pool.allocate("x")
                except PoolExhausted:
                    assert len(held) + len(resting) == pool.capacity
                    continue
                assert found not in held | resting
                assert found != pool.router
                held.add(found)
            case "q" if address in held:
                pool.quarantine(address)
                held.discard(address)
                resting.add(address)
            case "f":
                pool.free(address)
                held.discard(address)
                resting.discard(address)
        status = pool.status()
        assert (status.allocated, status.quarantined) == (len(held), len(resting))
