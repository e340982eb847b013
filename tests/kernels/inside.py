"""What is checked in the guest: features, every object through the verifier, real packets.

Runs on any kernel: `python -m tests.kernels.inside` checks this one. Prints a line a check and
exits with 1 if one failed. A refused program's verifier log is cut to its end and shown.
"""

from __future__ import annotations

import platform
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from cilia.bpf import Object, layout, probe
from cilia.bpf.errors import VerifierError
from tests.kernels import traffic

OBJECTS: Final = Path(__file__).resolve().parents[2] / "build" / "bpf"
LOG_LINES: Final = 60

Rodata = dict[str, bytes | int]


def configurations() -> Iterator[tuple[str, Rodata]]:
    """Named values of the objects' constants: the verifier sees other programs under each."""
    routers: Rodata = {
        "ROUTER_IP4": layout.to_addr("10.217.0.1"),
        "ROUTER_IP6": layout.to_addr("fd00:c111::1"),
        "ROUTER_LL6": layout.to_addr("fe80::c111"),
    }
    yield "defaults", {}
    yield "routers", routers
    yield "narrow ports", routers | {"NAT_PORT_MIN": 40000, "NAT_PORT_MAX": 40007}
    if probe.has_helper("bpf_ktime_get_coarse_ns"):
        yield "coarse clock", routers | {"HAVE_KTIME_COARSE": 1}


def _features() -> None:
    found = probe.features()
    for feature in found:
        mark = "yes" if feature.present else ("MISSING" if feature.required else "no")
        print(f"  {feature.name:<26} {mark:<8} {feature.detail}")
    absent = [feature.name for feature in probe.missing(found)]
    assert not absent, f"required, and missing: {', '.join(absent)}"


def _load(name: str, rodata: Rodata) -> None:
    path = OBJECTS / f"{name}.o"
    with Object.open(path) as bare:
        rodata = {key: value for key, value in rodata.items() if key in bare.rodata()}
    with Object.open(path, rodata=rodata, pin_dir=None, layouts=layout.CILIA, log_level=4) as obj:
        try:
            obj.load()
        except VerifierError as error:
            print("\n".join(f"  | {line}" for line in error.log.splitlines()[-LOG_LINES:]))
            raise
        for line in obj.verifier_log().splitlines():
            # "processed 4711 insns (limit 1000000) ..." of the last program (log level 4: sums)
            if line.startswith("processed"):
                print(f"  {line}")
        print(f"  accepted: {', '.join(obj.program_names())}")


@contextmanager
def _check(name: str, failed: list[str]) -> Iterator[None]:
    print(f"== {name}", flush=True)
    began = time.monotonic()
    try:
        yield
    except Exception:  # the next check may still say something
        failed.append(name)
        print(f"FAILED {name}: {traceback.format_exc()}", flush=True)
    else:
        print(f"ok {name} {time.monotonic() - began:.1f} s", flush=True)


def main() -> int:
    print(f"kernel {platform.release()}")
    failed: list[str] = []
    with _check("features", failed):
        _features()
    for label, rodata in configurations():
        for name in ("bpf_lxc", "bpf_host", "bpf_audit"):
            with _check(f"load {name} ({label})", failed):
                _load(name, rodata)
    for mode in traffic.modes():
        with _check(f"attach ({mode})", failed), traffic.Site(mode) as site:
            for name, check in traffic.CHECKS:
                with _check(f"traffic {name} ({mode})", failed):
                    check(site)
    print(f"kernel {platform.release()}: {'FAILED: ' + ', '.join(failed) if failed else 'all ok'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
