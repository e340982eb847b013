"""Which of iptables' legacy tables would drop packets of ours, and what lets them pass."""

from __future__ import annotations

import pytest

from services.agent.firewall import from_iptables_save, hurdles, to_node, to_proxy

OURS = "-A INPUT -m mark --mark 0x200/0xf00 -j ACCEPT"
INTERFACES = ("cil*", "eth0")


def dropping(policy: str, *rules: str, table: str = "filter") -> tuple[bool, bool]:
    """Whether packets to the proxy, and of endpoints to the node, may be dropped."""
    lines = [f"*{table}", f":INPUT {policy} [0:0]", ":deeper - [0:0]", *rules, "COMMIT", ""]
    found = from_iptables_save("ip", "# Generated\n" + "\n".join(lines))
    return bool(hurdles(found, to_proxy(INTERFACES))), bool(hurdles(found, to_node()))


@pytest.mark.parametrize(
    ("policy", "rules", "expected"),
    [
        ("ACCEPT", (), (False, False)),
        ("DROP", (), (True, True)),
        ("ACCEPT", ("-A INPUT -j REJECT --reject-with icmp-port-unreachable",), (True, True)),
        ("DROP", (OURS,), (False, True)),
        ("DROP", ("-A INPUT -i cil+ -j ACCEPT",), (True, False)),  # not from outside
        ("DROP", ("-A INPUT ! -i lo -j ACCEPT",), (False, False)),
        ("DROP", ("-A INPUT -i cil00001 -j ACCEPT",), (True, True)),  # one endpoint's
        ("DROP", ("-A INPUT -p udp -j ACCEPT",), (True, True)),
        ("DROP", ("-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT",), (True, True)),
        ("DROP", ("-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",), (True, True)),
        ("DROP", ("-A INPUT -m state --state NEW -j ACCEPT",), (False, False)),
        ("DROP", ("-A INPUT -m connmark --mark 0x200/0xf00 -j ACCEPT",), (True, True)),
        ("DROP", ("-A INPUT -m mark --mark 0x300/0xf00 -j ACCEPT",), (True, True)),
        ("DROP", ("-A INPUT -m mark --mark 0x200 -j ACCEPT",), (True, True)),  # the port is above
        ("DROP", ("-A INPUT -m mark ! --mark 0x0/0xf00 -j ACCEPT",), (False, True)),
        ("DROP", ("-A INPUT -j deeper", "-A deeper " + OURS[9:]), (False, True)),
        ("DROP", ("-A INPUT -j LOG --log-prefix accepted", OURS), (False, True)),
        ("DROP", ("-A INPUT -g deeper", OURS), (True, True)),  # never comes back
        (
            "ACCEPT",
            ("-A INPUT -j deeper", "-A deeper -j RETURN", "-A deeper -j DROP"),
            (False,) * 2,
        ),
        ("DROP", ("-A INPUT -j DROP", OURS), (True, True)),  # too late
        ("ACCEPT", ("-A INPUT -s 192.0.2.0/24 -j DROP",), (False, False)),  # somebody's intent
        ("ACCEPT", ('-A INPUT -m comment --comment "two words" -j DROP',), (True, True)),
        ("ACCEPT", ("-A INPUT -j deeper", "-A deeper -j deeper"), (False, False)),  # no such table
    ],
)
def test_what_is_surely_accepted(
    policy: str, rules: tuple[str, ...], expected: tuple[bool, bool]
) -> None:
    assert dropping(policy, *rules) == expected


def test_the_command_is_for_the_table() -> None:
    text = "*{}\n:INPUT DROP [0:0]\nCOMMIT\n"
    for table, family, command in (
        ("filter", "ip", "iptables-legacy -I INPUT "),
        ("filter", "ip6", "ip6tables-legacy -I INPUT "),
        ("mangle", "ip", "iptables-legacy -t mangle -I INPUT "),
    ):
        (found,) = hurdles(from_iptables_save(family, text.format(table)), to_proxy(INTERFACES))
        assert found.cure.startswith(command)
        assert found.cure.endswith("-m mark --mark 0x200/0xf00 -j ACCEPT")


def test_of_ufw_the_file_is_named() -> None:
    """What is put into ufw's chains by hand is gone at its next reload."""
    text = (
        "*filter\n:INPUT DROP [0:0]\n:ufw6-before-input - [0:0]\n"
        "-A INPUT -j ufw6-before-input\nCOMMIT\n"
    )
    (found,) = hurdles(from_iptables_save("ip6", text), to_proxy(INTERFACES))
    assert str(found) == "ip6 filter INPUT (ufw)"
    assert "-A ufw6-before-input -m mark --mark 0x200/0xf00 -j ACCEPT" in found.cure
    assert found.cure.endswith("/etc/ufw/before6.rules && ufw reload")
