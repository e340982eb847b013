"""The datapath on kernels that users run and this machine does not: minutes each, so `slow`."""

from __future__ import annotations

import os

import pytest

from tests.kernels import machine, packages

TIMEOUT_S = 900


def _kernel(series: str) -> packages.Kernel:
    try:
        machine.needs()
        return packages.kernel(series)
    except packages.Unavailable as reason:
        if os.environ.get("REQUIRE_KERNEL") == "1":
            pytest.fail(f"REQUIRE_KERNEL=1, but this machine: {reason}", pytrace=False)
        pytest.skip(str(reason))


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S + 700)  # the first run also fetches the kernel
@pytest.mark.parametrize("series", packages.SERIES)
def test_objects_load_attach_and_carry_packets(series: str) -> None:
    kernel = _kernel(series)
    output = bytearray()
    status = machine.run(kernel, machine.CHECKS, timeout_s=TIMEOUT_S, output=output.extend)
    text = output.decode(errors="replace").replace("\r\n", "\n")
    assert status == 0, f"status {status} ({machine.STATUS.get(status, 'of the checks')}):\n{text}"
    assert f"kernel {kernel.release}: all ok" in text
