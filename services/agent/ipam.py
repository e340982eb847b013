"""Addresses of one node's endpoints: a v4 and a v6 pool.

The first usable address of a pool is the router (the endpoints' gateway). Nothing is stored
here: the endpoint records are the memory, and `claim` fills the pools from them at start.

An address that was given back rests in quarantine until its conntrack entries are purged:
whoever gets it next must not inherit another's connections.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network

from cilia.errors import (
    ConflictError,
    DomainError,
    ExhaustedError,
    InvalidError,
    PreconditionError,
)

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


class PoolExhausted(ExhaustedError):
    default_cure = "Delete endpoints, or start the agent with a larger pool"

    def __init__(self, pool: Network, allocated: int, quarantined: int) -> None:
        super().__init__(
            f"no address is left in pool {pool}: {allocated} in use, {quarantined} waiting for "
            "their connections to be purged"
        )


class AddressInUse(ConflictError):
    default_cure = "Ask for another, or for none: the pool gives a free one"

    def __init__(self, address: Address, owner: str) -> None:
        super().__init__(f"address {address} is in use by {owner}")


class AddressOutOfPool(InvalidError):
    default_cure = "Ask for one of the pool, or for none"

    def __init__(self, address: Address, pool: Network) -> None:
        super().__init__(f"address {address} is not one that pool {pool} can give")


class PoolOverlap(PreconditionError):
    def __init__(self, pool: Network, what: str) -> None:
        option = "--ipv4-pool" if pool.version == 4 else "--ipv6-pool"
        super().__init__(
            f"pool {pool} overlaps {what} of this host",
            cure=f"Choose another pool with {option}, or remove that route",
        )


@lru_cache(maxsize=16384)
def host_network(address: Address) -> Network:
    """The /32 or /128 of an address. Remembered: every flush asks for all of them."""
    return ip_network(address)


@lru_cache(maxsize=16384)
def host_prefix(address: Address) -> str:
    """The same as text, `10.217.0.2/32`."""
    return str(host_network(address))


@dataclass(frozen=True, slots=True)
class PoolStatus:
    pool: Network
    router: Address
    allocated: int
    capacity: int
    quarantined: int


class Pool:
    """One network's addresses. Not thread-safe: the event loop owns it."""

    def __init__(self, network: Network) -> None:
        self.network = network
        first = int(network.network_address)
        last = int(network.broadcast_address)
        # v4 has a broadcast address; in v6 the last 128 are reserved anycast (RFC 2526) of
        # a /64, which a pool never reaches in practice: one is left out as in v4.
        self._router = first + 1
        self._low = first + 2
        self._high = last - 1
        self._next = self._low
        self._owners: dict[int, str] = {}
        self._quarantine: set[int] = set()

    def _address(self, number: int) -> Address:
        return IPv4Address(number) if self.network.version == 4 else IPv6Address(number)

    @property
    def router(self) -> Address:
        return self._address(self._router)

    @property
    def capacity(self) -> int:
        return self._high - self._low + 1

    def status(self) -> PoolStatus:
        return PoolStatus(
            self.network, self.router, len(self._owners), self.capacity, len(self._quarantine)
        )

    def owner(self, address: Address) -> str | None:
        return self._owners.get(int(address)) if address.version == self.network.version else None

    def allocate(self, owner: str) -> Address:
        """The next free address, going round. Raises PoolExhausted."""
        if len(self._owners) + len(self._quarantine) >= self.capacity:
            raise PoolExhausted(self.network, len(self._owners), len(self._quarantine))
        number = self._next
        while number in self._owners or number in self._quarantine:
            number = number + 1 if number < self._high else self._low
        self._next = number + 1 if number < self._high else self._low
        self._owners[number] = owner
        return self._address(number)

    def claim(self, address: Address, owner: str) -> None:
        """Take this very address. Raises AddressOutOfPool, AddressInUse."""
        number = int(address)
        if address.version != self.network.version or not self._low <= number <= self._high:
            if address.version == self.network.version and number == self._router:
                raise AddressInUse(address, "the node's router")
            raise AddressOutOfPool(address, self.network)
        if (holder := self._owners.get(number)) is not None:
            raise AddressInUse(address, holder)
        if number in self._quarantine:
            raise AddressInUse(address, "a deleted endpoint whose connections are being purged")
        self._owners[number] = owner

    def quarantine(self, address: Address) -> None:
        """Take it from its owner and give it to no one yet. Idempotent."""
        if self._owners.pop(int(address), None) is not None:
            self._quarantine.add(int(address))

    def free(self, address: Address) -> None:
        """Give it back for good. Idempotent."""
        self._owners.pop(int(address), None)
        self._quarantine.discard(int(address))

    def quarantined(self) -> list[Address]:
        return [self._address(number) for number in sorted(self._quarantine)]


class Ipam:
    """Both pools of a node."""

    def __init__(self, pool4: IPv4Network, pool6: IPv6Network) -> None:
        self.v4 = Pool(pool4)
        self.v6 = Pool(pool6)

    @property
    def pools(self) -> tuple[Pool, Pool]:
        return (self.v4, self.v6)

    def pool_of(self, address: Address) -> Pool:
        return self.v4 if address.version == 4 else self.v6

    def allocate(
        self, owner: str, *, ipv4: IPv4Address | None = None, ipv6: IPv6Address | None = None
    ) -> tuple[IPv4Address, IPv6Address]:
        """Both addresses or none. Raises PoolExhausted, AddressInUse, AddressOutOfPool."""
        if ipv4 is not None:
            self.v4.claim(ipv4, owner)
            got4: Address = ipv4
        else:
            got4 = self.v4.allocate(owner)
        try:
            if ipv6 is not None:
                self.v6.claim(ipv6, owner)
                got6: Address = ipv6
            else:
                got6 = self.v6.allocate(owner)
        except DomainError:
            self.v4.free(got4)
            raise
        assert isinstance(got4, IPv4Address)
        assert isinstance(got6, IPv6Address)
        return got4, got6

    def quarantine(self, addresses: Iterable[Address]) -> None:
        for address in addresses:
            self.pool_of(address).quarantine(address)

    def free(self, addresses: Iterable[Address]) -> None:
        for address in addresses:
            self.pool_of(address).free(address)


@dataclass(frozen=True, slots=True)
class HostRoute:
    """A route of the host that is not ours: where it leads, and how to name it."""

    network: Network
    device: str
    gateway: str = ""

    def __str__(self) -> str:
        via = f" via {self.gateway}" if self.gateway else ""
        return f"route {self.network}{via} dev {self.device}"


def refuse_overlap(pools: Iterable[Network], routes: Iterable[HostRoute]) -> None:
    """Raises PoolOverlap naming the first route that shares addresses with a pool.

    Default routes lead everywhere and overlap nothing in particular.
    """
    routes = list(routes)
    for pool in pools:
        for route in routes:
            if route.network.version != pool.version or route.network.prefixlen == 0:
                continue
            if route.network.overlaps(pool):
                raise PoolOverlap(pool, str(route))
