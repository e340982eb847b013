"""A firewall of the host that drops what L7 rules send to the proxy: it is named, with the cure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cilia.net import firewall
from services.agent.firewall import from_nft, hurdles, to_node, to_proxy
from tests.datapath.harness import Thread
from tests.integration.agentnode import AgentNode, eventually, run
from tests.integration.test_agent_proxy import EMPIRE, FIGHTER, POLICY, Web, once

OURS = "meta mark and 0xf00 == 0x200 accept"
CHAIN = """
table inet filter {
  set hosts { type ipv4_addr; elements = { 192.0.2.1 } }
  chain deeper {
    %s
  }
  chain input {
    type filter hook input priority 0; policy %s;
    ct state established,related accept
    %s
  }
}
"""


@pytest.fixture(scope="module")
def space(need_netns: None, need_nft: None) -> Iterator[Thread]:
    thread = Thread()
    try:
        yield thread
    finally:
        thread.close()


@pytest.mark.parametrize(
    ("policy", "rules", "deeper", "expected"),
    [
        ("accept", "", "", (False, False)),
        ("drop", "", "", (True, True)),
        ("accept", "counter reject with icmpx admin-prohibited", "", (True, True)),
        ("drop", OURS, "", (False, True)),
        ("drop", f"counter log prefix x {OURS}", "", (False, True)),
        ("drop", "meta mark & 0xff == 0x00 accept", "", (False, False)),
        ("drop", "mark 0x200 accept", "", (True, True)),
        ("drop", f"limit rate 5/second {OURS}", "", (True, True)),
        ("drop", 'iifname "cil*" accept', "", (True, False)),
        ("drop", 'iifname { "cil*", "eth0" } accept', "", (False, False)),
        ("drop", 'iifname != "lo" accept', "", (False, False)),
        ("drop", "ct state new accept", "", (False, False)),
        ("drop", "ct state vmap { established : accept, new : jump deeper }", OURS, (False, True)),
        ("drop", "tcp dport { 22, 80 } accept", "", (True, True)),
        ("drop", "meta l4proto { tcp, udp } accept", "", (False, False)),
        ("drop", "iif lo accept", "", (True, True)),
        (
            "drop",
            "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept",
            "",
            (True, True),
        ),
        ("drop", "meta nfproto ipv4 accept", "", (True, True)),  # IPv6 is left
        ("drop", "jump deeper", OURS, (False, True)),
        ("drop", "goto deeper", "return", (True, True)),
        ("accept", "jump deeper", "return; drop", (False, False)),
        ("accept", "ip saddr @hosts drop", "", (False, False)),
        ("drop", "ip saddr @hosts jump deeper", "accept", (True, True)),
        ("accept", "meta l4proto udp drop", "", (False, False)),
    ],
)
def test_what_nft_shows(
    space: Thread,
    tmp_path: Path,
    policy: str,
    rules: str,
    deeper: str,
    expected: tuple[bool, bool],
) -> None:
    text = tmp_path / "rules.nft"
    text.write_text(CHAIN % (deeper.replace("; ", "\n"), policy, rules))
    space.sh("nft flush ruleset", f"nft -f {text}")
    found = from_nft(space.call(lambda: firewall.nftables_on("input")), iptables=False)
    seen = hurdles(found, to_proxy(("cil*", "eth0"))), hurdles(found, to_node())
    assert (bool(seen[0]), bool(seen[1])) == expected


def test_every_base_chain_has_its_say(space: Thread) -> None:
    """One that accepts all does not help against another one; odd names are quoted."""
    hook = "{ type filter hook %s priority 5; policy %s; }"
    space.sh(
        "nft flush ruleset",
        f"nft 'add table inet a; add chain inet a b {hook % ('input', 'accept')}'",
        f"nft 'add table ip6 f; add chain ip6 f INPUT {hook % ('input', 'drop')}'",
        f"nft 'add table ip o; add chain ip o output {hook % ('output', 'drop')}'",
    )
    items = space.call(lambda: firewall.nftables_on("input"))
    (found,) = hurdles(from_nft(items, iptables=False), to_proxy(("cil*",)))
    assert str(found) == "ip6 f INPUT"
    assert found.cure == f"nft insert rule ip6 f INPUT {OURS}"
    (found,) = hurdles(from_nft(items, iptables=True), to_proxy(("cil*",)))
    assert found.cure == "ip6tables-nft -t f -I INPUT -m mark --mark 0x200/0xf00 -j ACCEPT"


def test_the_printed_command_makes_l7_work(
    need_objects: None, need_netns: None, need_nft: None, need_redirect_peer: None, tmp_path: Path
) -> None:
    text = tmp_path / "rules.nft"
    text.write_text(CHAIN % ("", "drop", ""))
    with AgentNode("fire") as node:
        run(*node.inside("node", "nft", "-f", str(text)))
        node.start("identity")
        node.start("xds", wait=True)
        node.start("agent")
        eventually(
            lambda: "L7 rules will need: nft insert" in node.component("firewall").message,
            within_s=20,
            what=f"the firewall is known: {node.component('firewall')}",
        )
        assert node.component("firewall").state == "Ok"  # nothing is sent to the proxy yet
        target = node.workload("deathstar", *EMPIRE)
        node.workload("tiefighter", *FIGHTER)
        web = Web(node, "deathstar")
        try:
            node.apply(POLICY % "/v1/request-landing")
            with pytest.raises(TimeoutError):
                once(node, "tiefighter", target.ipv4, "POST", "/v1/request-landing")
            warning = node.component("firewall")
            assert warning.state == "Warning"
            assert "inet filter input may drop" in warning.message
            assert node.status().state == "Warning"

            _, _, command = warning.message.partition("Run: ")
            run(*node.inside("node", "sh", "-c", command))
            for address in (target.ipv4, target.ipv6):
                answer = once(node, "tiefighter", address, "POST", "/v1/request-landing")
                assert answer == (200, "ok")
                assert once(node, "tiefighter", address, "PUT", "/v1")[0] == 403
            eventually(
                lambda: node.component("firewall").state == "Ok",
                within_s=20,
                what="the warning goes",
            )
            assert "inet filter input decides" in node.component("firewall").message
        finally:
            web.close()
