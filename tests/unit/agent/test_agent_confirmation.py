"""Policies on trial: confirmed in time, or what was there before comes back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cilia import statefile
from services.agent.clusterwatch import ClusterView, PolicyEntry, PolicyName
from services.agent.confirmation import CONFIRM_S, Confirmation, NothingToConfirm

OLD, NEW = PolicyName("Rules", "", "old"), PolicyName("Rules", "", "new")


def entry(name: PolicyName, text: bytes) -> PolicyEntry:
    return PolicyEntry(name, text, ("p.yaml", 1, 1), (("rules[0]", ("p.yaml", 2, 1)),))


class Store:
    """What the identity service would hold; the view follows at once."""

    def __init__(self, *entries: PolicyEntry) -> None:
        self.entries = {x.name: x for x in entries}
        self.view = ClusterView()
        self.follow()

    def follow(self) -> None:
        self.view.load(
            policies=list(self.entries.values()), policy_revision=1, identities=[], store_id=1
        )
        self.view.live = True

    async def apply_policies(self, entries: Sequence[PolicyEntry], *, dry_run: bool) -> Any:
        self.entries.update({x.name: x for x in entries})
        self.follow()

    async def delete_policies(self, names: Sequence[PolicyName], *, everything: bool) -> Any:
        assert not everything
        for name in names:
            del self.entries[name]
        self.follow()


class Trial:
    def __init__(self, path: Path) -> None:
        self.store = Store(entry(OLD, b"1"))
        self.now = 1000.0
        self.path = path / "trial.json"
        self.confirmation = self.again()

    def again(self) -> Confirmation:
        """As after a restart."""
        found = Confirmation(
            self.path,
            client=self.store,  # type: ignore[arg-type]  # what it calls of it
            view=self.store.view,
            clock=lambda: self.now,
        )
        found.load()
        return found

    async def apply(self, *entries: PolicyEntry) -> None:
        self.confirmation.begin(entries)
        await self.store.apply_policies(entries, dry_run=False)


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    return Trial(tmp_path)


async def test_what_is_not_confirmed_goes_back_also_after_a_restart(trial: Trial) -> None:
    await trial.apply(entry(OLD, b"2"), entry(NEW, b"3"))
    trial.now += CONFIRM_S - 1
    await trial.confirmation.check()
    assert set(trial.store.entries) == {OLD, NEW}
    again = trial.again()
    assert again.left_s == 1
    trial.now += 1
    await again.check()
    assert trial.store.entries == {OLD: entry(OLD, b"1")}
    assert again.left_s is None
    assert not trial.path.exists()
    await again.check()


async def test_what_is_confirmed_stays(trial: Trial) -> None:
    with pytest.raises(NothingToConfirm):
        trial.confirmation.confirm()
    await trial.apply(entry(NEW, b"3"))
    assert trial.confirmation.confirm() == (NEW,)
    trial.now += 2 * CONFIRM_S
    await trial.confirmation.check()
    assert set(trial.store.entries) == {OLD, NEW}
    assert trial.again().waiting is None


async def test_what_somebody_changed_meanwhile_is_left_alone(trial: Trial) -> None:
    await trial.apply(entry(OLD, b"2"), entry(NEW, b"3"))
    await trial.store.apply_policies([entry(OLD, b"4")], dry_run=False)
    trial.now += CONFIRM_S
    await trial.confirmation.check()
    assert trial.store.entries == {OLD: entry(OLD, b"4")}


async def test_a_second_trial_goes_back_to_before_the_first(trial: Trial) -> None:
    await trial.apply(entry(OLD, b"2"))
    trial.now += CONFIRM_S / 2
    await trial.apply(entry(OLD, b"3"))
    trial.now += CONFIRM_S
    await trial.confirmation.check()
    assert trial.store.entries == {OLD: entry(OLD, b"1")}


async def test_what_was_not_stored_is_not_waited_for(trial: Trial) -> None:
    trial.confirmation.begin([entry(NEW, b"3")])
    trial.confirmation.cancel(None)
    assert trial.again().waiting is None
    trial.path.write_text('{"deadline_s": "soon"}')
    with pytest.raises(statefile.StateFileDamaged):
        trial.again()


async def test_a_clock_that_is_set_back_gives_no_more_time(trial: Trial) -> None:
    """Who is locked out cannot wait for a day."""
    await trial.apply(entry(NEW, b"3"))
    trial.now -= 86_400
    assert trial.confirmation.left_s == 0
    await trial.confirmation.check()
    assert set(trial.store.entries) == {OLD}


async def test_what_is_being_rolled_back_is_not_confirmed(trial: Trial) -> None:
    """Whoever is told that it is confirmed must find it in force."""
    await trial.apply(entry(OLD, b"2"), entry(NEW, b"3"))
    trial.now += CONFIRM_S
    delete = trial.store.delete_policies

    async def fails(names: Sequence[PolicyName], *, everything: bool) -> Any:
        with pytest.raises(NothingToConfirm):
            trial.confirmation.confirm()
        raise ConnectionError

    trial.store.delete_policies = fails  # type: ignore[method-assign]
    with pytest.raises(ConnectionError):
        await trial.confirmation.check()
    with pytest.raises(NothingToConfirm):
        trial.confirmation.confirm()
    trial.store.delete_policies = delete  # type: ignore[method-assign]
    await trial.confirmation.check()
    assert trial.store.entries == {OLD: entry(OLD, b"1")}
