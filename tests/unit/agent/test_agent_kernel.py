"""A kernel that lacks what the agent needs."""

from __future__ import annotations

import pytest

from cilia.bpf import probe
from services.agent import app


def feature(name: str, *, present: bool, required: bool) -> probe.Feature:
    return probe.Feature(
        name=name,
        present=present,
        required=required,
        detail="EINVAL",
        effect="nothing works",
        cure="run Linux 5.10",
    )


async def test_what_is_required_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        feature("tcx", present=False, required=False),
        feature("ringbuf", present=False, required=True),
    ]
    monkeypatch.setattr(probe, "features", lambda: found)
    with pytest.raises(app.KernelTooOld, match=r"lacks ringbuf \(EINVAL\): nothing") as caught:
        await app._refuse_old_kernel()
    assert caught.value.cure == "run Linux 5.10"


async def test_without_rights_it_is_not_the_kernel_that_is_blamed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = [
        feature("ringbuf", present=False, required=True),
        feature("CAP_BPF", present=False, required=True),
    ]
    monkeypatch.setattr(probe, "features", lambda: found)
    with pytest.raises(app.NotPrivileged, match="has no CAP_BPF here, so nothing works") as caught:
        await app._refuse_old_kernel()
    assert caught.value.cure == "Start it as root."


async def test_what_is_not_required_may_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [feature("tcx", present=False, required=False)]
    monkeypatch.setattr(probe, "features", lambda: found)
    await app._refuse_old_kernel()
