"""The agent's command line: what its help says."""

from __future__ import annotations

from services.agent.options import parser


def test_every_flag_says_what_it_is_for_and_its_default_once() -> None:
    for action in parser()._actions:
        assert action.help, action.option_strings
    said = " ".join(parser().format_help().split())
    assert "(default: None)" not in said
    assert "(default: )" not in said
    assert "root of the bpffs (default: RUN_DIR/bpf)" in said
    assert said.count("(default: RUN_DIR/bpf)") == 1
    assert "IPv4 addresses (default: 10.217.0.0/16)" in said
