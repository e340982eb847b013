"""`cilia policy audit-kernel`: does the kernel do what policy says?"""

from __future__ import annotations

import click

from cli import clients, render, shapes
from cli.errors import Exit
from cli.settings import Command, Settings, examples, pass_settings
from protos.agent.v1 import agent_pb2


@click.command(
    "audit-kernel",
    cls=Command,
    epilog=examples("""
cilia policy audit-kernel
cilia policy audit-kernel -o json
"""),
)
@pass_settings
def audit_kernel(settings: Settings) -> None:
    """Compare the kernel with what it should hold and answer.

    Every row of policies, ipcache and endpoints is compared with what was written; then one packet
    for each edge of each row, and one just outside, is judged by the kernel, without a trace, and
    by the engine. What differs is shown and repaired, and the command ends with 1. The agent does
    the same by itself, slowly, all the time: `cilia status`.
    """
    request = agent_pb2.AuditKernelRequest()
    reply = clients.agent(
        settings, lambda agent: agent.policy.AuditKernel(request, timeout=agent.timeout_s)
    )
    shape = shapes.kernel_audit(reply)
    if settings.json:
        render.json(shape)
    else:
        for drift in shape["drifts"]:
            whose = f" of {', '.join(drift['endpoints'])}" if drift["endpoints"] else ""
            render.line(settings, (f"{drift['map']}{whose}", "bold red"), f": {drift['row']}")
            render.line(settings, f"  found:     {drift['found']}")
            render.line(settings, f"  should be: {drift['expected']}")
            if drift["rule"]:
                render.line(settings, f"  rule:      {shapes.rule_text(drift['rule'])}")
        for policy in shape["skipped"]:
            render.line(settings, f"not asked: {policy}")
        how = f"{shape['drifted']} differ" if shape["drifted"] else "all as they should be"
        mended = ", repaired" if shape["drifted"] and shape["repaired"] else ""
        render.line(
            settings,
            f"{shape['rows']} rows of {shape['policies']} policies, ipcache and endpoints, "
            f"{shape['cells']} verdicts: ",
            (f"{how}{mended}", "bold red" if shape["drifted"] else "green"),
            f" ({shape['seconds']:.2f} s)",
        )
        render.line(settings, f"audit mode: {shape['selftest']}")
    if shape["drifted"]:
        raise SystemExit(int(Exit.FAILED))
