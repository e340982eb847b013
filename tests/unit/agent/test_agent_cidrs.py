"""Numbers of prefixes on disk: what is added, what a crash leaves, and what a log belongs to."""

from __future__ import annotations

from ipaddress import IPv4Network
from pathlib import Path

import pytest

from cilia import statefile
from services.agent.identityalloc import CidrIdentities


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def numbers(path: Path, clock: Clock | None = None) -> CidrIdentities:
    found = CidrIdentities(path, release_delay_s=10, clock=clock or Clock())
    found.load()
    return found


def net(number: int) -> IPv4Network:
    return IPv4Network(((10 << 24) + (number << 8), 24))


def test_a_few_more_are_lines_of_a_log(tmp_path: Path) -> None:
    path, log = tmp_path / "cidrs.json", tmp_path / "cidrs.log"
    clock = Clock()
    cidrs = numbers(path, clock)
    cidrs.require(map(net, range(1000)))
    cidrs.save()
    whole = path.read_bytes()
    for n in range(1000, 1010):
        cidrs.change([net(n)], [])
        cidrs.save()
    assert path.read_bytes() == whole
    assert len(log.read_text().splitlines()) == 11
    cidrs.change([], [net(3), net(1003)])
    clock.now = 20
    assert len(cidrs.release_due()) == 2
    cidrs.save()
    again = numbers(path)
    assert dict(again.numbers) == dict(cidrs.numbers)
    assert net(3) not in again.numbers
    # A number that was given is not given again soon.
    (last,) = again.change([net(5000)], [])
    assert again.numbers[last] == max(cidrs.numbers.values()) + 1
    again.save()
    assert not log.exists(), "after a start the whole file is written first"
    assert dict(numbers(path).numbers) == dict(again.numbers)


def test_a_log_that_grew_long_becomes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "cidrs.json"
    cidrs = numbers(path)
    cidrs.require([net(0)])
    cidrs.save()
    whole = path.read_bytes()
    for n in range(1, 300):
        cidrs.change([net(n)], [])
        cidrs.save()
    assert path.read_bytes() != whole
    assert dict(numbers(path).numbers) == dict(cidrs.numbers)


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_a_torn_line_is_no_line(tmp_path: Path, cut: int) -> None:
    path, log = tmp_path / "cidrs.json", tmp_path / "cidrs.log"
    cidrs = numbers(path)
    cidrs.require(map(net, range(10)))
    cidrs.save()
    before = dict(cidrs.numbers)
    cidrs.change([net(10), net(11)], [])
    cidrs.save()
    written = log.read_bytes()
    log.write_bytes(written[: len(written) - cut])
    found = dict(numbers(path).numbers)
    assert before.items() <= found.items() <= dict(cidrs.numbers).items()
    assert (found == cidrs.numbers) == (cut == 0)


def test_the_log_of_another_file_is_not_read(tmp_path: Path) -> None:
    path, log = tmp_path / "cidrs.json", tmp_path / "cidrs.log"
    cidrs = numbers(path)
    cidrs.require([net(0)])
    cidrs.save()
    cidrs.change([net(1)], [])
    cidrs.save()
    old = log.read_bytes()
    again = numbers(path)
    again.change([net(2)], [])
    again.save()  # the whole file; then a crash, before the log was removed
    log.write_bytes(old.replace(b"10.0.1.0/24", b"10.0.9.0/24"))
    assert dict(numbers(path).numbers) == dict(again.numbers)


def test_a_log_that_is_damaged_is_named(tmp_path: Path) -> None:
    path, log = tmp_path / "cidrs.json", tmp_path / "cidrs.log"
    cidrs = numbers(path)
    cidrs.require([net(0)])
    cidrs.save()
    cidrs.change([net(1)], [])
    cidrs.save()
    log.write_bytes(log.read_bytes() + b"what is this\n")
    with pytest.raises(statefile.StateFileDamaged):
        numbers(path)


def test_what_changed_is_told_once(tmp_path: Path) -> None:
    clock = Clock()
    cidrs = numbers(tmp_path / "cidrs.json", clock)
    cidrs.require([net(0), net(1)])
    assert cidrs.take_changed() == {net(0), net(1)}
    cidrs.change([net(2)], [net(0)])
    assert cidrs.take_changed() == {net(2)}
    clock.now = 20
    cidrs.release_due()
    assert cidrs.take_changed() == {net(0)}
    assert cidrs.take_changed() == set()
