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


async def test_what_is_not_required_may_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [feature("tcx", present=False, required=False)]
    monkeypatch.setattr(probe, "features", lambda: found)
    await app._refuse_old_kernel()
