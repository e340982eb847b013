"""The verifier as a test: every object under every configuration, with room to spare."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from cilia.bpf import Object, constants, layout, probe
from cilia.bpf import dropreason as texts
from tests.datapath.harness import (
    OBJECTS,
    REPOSITORY,
    ROUTER4,
    ROUTER6,
    ROUTER_LL,
    SMALL,
    TC_REDIRECT,
    Node,
)
from tests.datapath.packets import tcp, udp

PROGRAMS = {
    "bpf_lxc": ("from_endpoint", "to_endpoint"),
    "bpf_host": ("from_netdev", "to_netdev", "assign_socket"),
    "bpf_audit": ("audit_policy", "audit_selftest"),
}
ROUTERS = [
    {},
    {"ROUTER_IP4": layout.to_addr(ROUTER4)},
    {"ROUTER_IP6": layout.to_addr(ROUTER6), "ROUTER_LL6": layout.to_addr(ROUTER_LL)},
]
RANGES = [{}, {"NAT_PORT_MIN": 1024, "NAT_PORT_MAX": 65535}, {"NAT_PORT_MIN": 7, "NAT_PORT_MAX": 7}]


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_every_configuration_verifies(objects: None, name: str) -> None:
    clocks = range(1 + probe.has_helper("bpf_ktime_get_coarse_ns"))
    with Object.open(OBJECTS / f"{name}.o") as bare:
        used = bare.rodata()
    for clock, routers, ports in itertools.product(clocks, ROUTERS, RANGES):
        rodata: dict[str, bytes | int] = {"HAVE_KTIME_COARSE": clock, **routers, **ports}
        with Object.open(
            OBJECTS / f"{name}.o",
            rodata={key: value for key, value in rodata.items() if key in used},
            map_sizes=SMALL,
            layouts=layout.CILIA,
        ) as obj:
            obj.load()
            for program in PROGRAMS[name]:
                # 5.10 gives up at a million; a new compiler or kernel may take more than this one.
                assert obj.program(program).stats().verified_insns < 200_000


def test_without_the_coarse_clock(objects: None) -> None:
    with Node(rodata={"HAVE_KTIME_COARSE": 0}) as node:
        assert node.send(node.a, tcp(False, node.a, node.b, "S")).verdict == TC_REDIRECT


def test_masquerade_of_one_family(objects: None) -> None:
    with Node() as node:
        for flags in (0, constants.RT_F_MASQUERADE4, constants.RT_F_MASQUERADE6):
            node.runtime(flags=flags)
            for v6, bit in (
                (False, constants.RT_F_MASQUERADE4),
                (True, constants.RT_F_MASQUERADE6),
            ):
                remote = "2001:db8:9::9" if v6 else "203.0.113.9"
                out = node.send(node.a, udp(v6, node.a, remote, 6000 + flags))
                assert out.verdict == TC_REDIRECT
                assert (out.packet.payload.src != node.a.ip(v6)) == bool(flags & bit)


def test_no_helper_is_newer_than_the_floor(objects: None) -> None:
    """Kernel 5.10: what came later may only be called behind a switch of the loader."""
    guarded = {"bpf_ktime_get_coarse_ns"}
    floor = {
        "bpf_csum_diff", "bpf_fib_lookup", "bpf_get_listener_sock", "bpf_get_prandom_u32",
        "bpf_get_smp_processor_id",
        "bpf_ktime_get_ns", "bpf_l3_csum_replace", "bpf_l4_csum_replace", "bpf_map_delete_elem",
        "bpf_map_lookup_elem", "bpf_map_update_elem", "bpf_redirect", "bpf_redirect_neigh",
        "bpf_redirect_peer", "bpf_ringbuf_reserve", "bpf_ringbuf_submit", "bpf_sk_assign",
        "bpf_sk_fullsock", "bpf_sk_lookup_udp", "bpf_sk_release",
        "bpf_skb_change_head", "bpf_skb_change_tail", "bpf_skb_load_bytes",
        "bpf_skb_pull_data", "bpf_skb_store_bytes", "bpf_skb_vlan_pop", "bpf_skc_lookup_tcp",
    }  # fmt: skip
    used = set()
    for path in (*(REPOSITORY / "bpf").glob("*.c"), *(REPOSITORY / "bpf/lib").glob("*.h")):
        used |= set(re.findall(r"\b(bpf_[a-z0-9_]+)\(", path.read_text()))
    used -= {name for name in used if name.startswith(("bpf_hton", "bpf_ntoh", "bpf_be64"))}
    assert used - guarded <= floor


def test_every_reason_has_a_text(repository: Path) -> None:
    source = (repository / "bpf/lib/reasons.h").read_text()
    for name, number in re.findall(r"#define ((?:DROP|REASON)_\w+)\s+(\d+)", source):
        assert texts.reason_text(int(number)) != str(number), name


def test_every_reason_is_used(repository: Path) -> None:
    source = (repository / "bpf/lib/reasons.h").read_text()
    rest = "".join(
        path.read_text()
        for path in (*(repository / "bpf").glob("*.c"), *(repository / "bpf/lib").glob("*.h"))
        if path.name != "reasons.h"
    )
    for name in re.findall(r"#define (DROP_\w+)", source):
        assert re.search(rf"\b{name}\b", rest), name
