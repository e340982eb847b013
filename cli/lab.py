"""`cilia lab`: a node with workloads on this machine."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from cilia.errors import DomainError
from cli import clients, complete, render
from cli.errors import CliError, Exit
from cli.settings import Group, Settings, examples, pass_settings
from lab import down as lab_down
from lab import enter, show, spec, state
from lab import up as lab_up
from lab.show import LabView
from lab.state import LabState


@click.group(cls=Group)
def lab() -> None:
    """A node with workloads on this machine, made of network namespaces, from a YAML file.

    Needs root. Nothing is created in the machine's own network namespace, so labs live side by
    side, and nothing is left after `lab down`, whatever was killed before.
    """


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except DomainError as error:
        raise CliError(
            error.message, code=clients.EXIT_OF_KIND.get(error.kind, Exit.FAILED), hint=error.cure
        ) from error


def _shape(view: LabView) -> dict[str, Any]:
    lab_ = view.lab
    return {
        "name": lab_.name,
        "source": lab_.source,
        "ready": lab_.ready,
        "healthy": view.healthy,
        "world": {"ipv4": lab_.world_ipv4, "ipv6": lab_.world_ipv6, "netns": lab_.world_netns},
        "nodes": [
            {
                "name": n.name,
                "netns": n.netns,
                "ipv4": n.ipv4,
                "ipv6": n.ipv6,
                "run_dir": n.run_dir,
                "agent_socket": n.agent_socket,
                "identity_socket": n.identity_socket,
                "xds_socket": n.xds_socket if n.xds_argv else None,
                "flows_socket": n.flows_socket if n.flows_argv else None,
                "services": [
                    {"name": s.name, "pid": s.pid or None, "state": s.state, "message": s.message}
                    for s in view.services
                    if s.node == n.name
                ],
            }
            for n in lab_.nodes
        ],
        "workloads": [
            {
                "name": w.workload.name,
                "namespace": w.workload.namespace,
                "node": w.workload.node,
                "labels": list(w.workload.labels),
                "netns": w.workload.netns,
                "process": w.process,
                "pid": w.workload.process.pid if w.workload.process else None,
                "endpoint": w.endpoint.id if w.endpoint else None,
                "state": w.endpoint.state if w.endpoint else None,
                "identity": w.endpoint.identity if w.endpoint else None,
                "ipv4": w.workload.ipv4 or None,
                "ipv6": w.workload.ipv6 or None,
            }
            for w in view.workloads
        ],
    }


def _workload_table(settings: Settings, view: LabView) -> None:
    # Without their agent nobody knows of endpoints; their traffic is as it was.
    silent = {
        s.node for s in view.services if s.name == "agent" and s.state in ("dead", "silent", "none")
    }
    render.table(
        settings,
        ["WORKLOAD", "LABELS", "ENDPOINT", "IDENTITY", "STATE", "IPv4", "IPv6", "PROCESS"],
        [
            [
                w.workload.full_name,
                ",".join(text.removeprefix("k8s:") for text in w.workload.labels),
                w.endpoint.id if w.endpoint else "-",
                w.endpoint.identity if w.endpoint else "-",
                w.endpoint.state
                if w.endpoint
                else "unknown"
                if w.workload.node in silent
                else "missing",
                w.workload.ipv4 or "-",
                w.workload.ipv6 or "-",
                w.process,
            ]
            for w in view.workloads
        ],
    )


def how_to_talk(lab_: LabState) -> list[str]:
    """Commands that work on this lab as it is."""
    node = lab_.nodes[0]
    sockets = f"CILIA_AGENT_SOCK={node.agent_socket} CILIA_IDENTITY_SOCK={node.identity_socket}"
    if node.xds_argv:
        sockets += f" CILIA_XDS_SOCK={node.xds_socket}"
    if node.flows_argv:
        sockets += f" CILIA_FLOWS_SERVER=unix://{node.flows_socket}"
    lines = [] if shutil.which("cilia") else [f". {Path(sys.prefix) / 'bin' / 'activate'}"]
    lines += [
        f"export {sockets}",
        "cilia endpoint list",
        "cilia monitor",
    ]
    clients_ = [w for w in lab_.workloads if w.process is None] or list(lab_.workloads)
    servers = [w for w in lab_.workloads if w.process is not None]
    if clients_:
        target = servers[0] if servers else None
        name = "world" if target is None else target.group
        if target is not None and target.namespace != clients_[0].namespace:
            name = f"{target.group}.{target.namespace}"
        lines.append(
            f"cilia lab exec --lab {lab_.name} {clients_[0].name} -- "
            f"python -m lab.httpc http://{name}/"
        )
    lines.append(f"cilia lab down {lab_.name}")
    return lines


@lab.command(
    "up",
    epilog=examples("""
cilia lab up examples/lab/star-wars.yaml
cilia lab up examples/lab/star-wars.yaml --name mine
"""),
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--name", help="Another name than the file's: the same lab twice, side by side.")
@click.option("--keep-failed", is_flag=True, help="Leave what there is when it does not come up.")
@pass_settings
def up(settings: Settings, file: Path, name: str | None, keep_failed: bool) -> None:
    """Make the lab of FILE; returns when all of it answers."""
    with _explained():
        wanted = spec.load(file, name=name)
        said = render.warn if not settings.json else (lambda _: None)
        made = lab_up.up(wanted, say=said, keep_failed=keep_failed)
        view = show.view(made)
    if settings.json:
        render.json(_shape(view))
        return
    render.line(settings, (f"Lab {made.name} is up.", "bold green"))
    _workload_table(settings, view)
    render.line(settings, "")
    render.line(settings, "Talk to it:")
    for text in how_to_talk(made):
        render.line(settings, f"  {text}")


@lab.command("down", epilog=examples("cilia lab down star-wars\ncilia lab down --all"))
@click.argument("name", required=False, shell_complete=complete.labs)
@click.option("--all", "everything", is_flag=True, help="Every lab, and the remains of any.")
@pass_settings
def down(settings: Settings, name: str | None, everything: bool) -> None:
    """Remove a lab: processes, namespaces, mounts, cgroups, files. Works on any remains.

    Without NAME the one that is up, if it is the only one.
    """
    with _explained():
        if everything:
            if name is not None:
                raise click.UsageError("either NAME or --all")
            names = lab_down.labs()
        else:
            names = [name if name is not None else state.only_lab()]
            if name is not None and name not in lab_down.labs():
                raise CliError(
                    f"no lab {name!r}",
                    code=Exit.NOT_FOUND,
                    hint=f"There are: {', '.join(lab_down.labs()) or 'none'}.",
                )
        removed = [lab_down.down(item) for item in names]
    if settings.json:
        render.json(
            [
                {
                    "lab": r.lab,
                    "processes": r.processes,
                    "namespaces": r.namespaces,
                    "mounts": r.mounts,
                    "cgroups": r.cgroups,
                }
                for r in removed
            ]
        )
        return
    for r in removed:
        render.line(
            settings,
            f"Lab {r.lab} removed: {r.processes} processes, {r.namespaces} namespaces, "
            f"{r.mounts} mounts, {r.cgroups} cgroups",
        )
    if not removed:
        render.line(settings, "No lab is up, and nothing is left of any.")


@lab.command("status")
@click.argument("name", required=False, shell_complete=complete.labs)
@pass_settings
def status(settings: Settings, name: str | None) -> None:
    """Show labs as they are now. Exit code 1 when one is not healthy."""
    with _explained():
        names = [name] if name is not None else lab_down.labs()
        views = [show.view(state.require(item)) for item in names if name or state.read(item)]
        remains = [item for item in names if not name and state.read(item) is None]
    if settings.json:
        render.json([_shape(view) for view in views])
    elif not views:
        render.line(settings, "No lab is up. Start one: cilia lab up FILE")
    for index, view in enumerate([] if settings.json else views):
        if index:
            render.line(settings, "")
        word = ("healthy", "green") if view.healthy else ("not healthy", "bold red")
        render.line(settings, (f"Lab {view.lab.name}", "bold"), f" ({view.lab.source}): ", word)
        render.table(
            settings,
            ["NODE", "SERVICE", "PID", "STATE", "MESSAGE"],
            [[s.node, s.name, s.pid or "-", s.state, s.message] for s in view.services],
        )
        if view.workloads:
            _workload_table(settings, view)
    for item in remains:
        render.warn(f"Remains of lab {item}: remove them with `cilia lab down {item}`")
    if remains or not all(view.healthy for view in views):
        raise SystemExit(int(Exit.FAILED))


@lab.command(
    "exec",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog=examples("""
cilia lab exec xwing -- python -m lab.httpc POST http://deathstar/v1/request-landing
cilia lab exec --lab star-wars world -- ping -c1 192.0.2.10
cilia lab exec node1 -- ip route
"""),
)
@click.option(
    "--lab",
    "lab_name",
    shell_complete=complete.labs,
    help="The lab, when more than one is up and CILIA_AGENT_SOCK is none of theirs.",
)
@click.argument("workload", shell_complete=complete.workloads)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@pass_settings
def exec_(
    settings: Settings, lab_name: str | None, workload: str, command: tuple[str, ...]
) -> None:
    """Run COMMAND inside a workload, a node, or `world`; its exit code is ours.

    Names resolve as they do for the workload's own processes.
    """
    if command[0] == "--":
        command = command[1:]
    if not command:
        raise click.UsageError("name a command after `--`")
    with _explained():
        current = enter.current(lab_name, agent_socket=settings.agent_socket)
        try:
            enter.execute(current, workload, command)
        except OSError as error:
            raise CliError(f"cannot run {shlex.join(command)}: {error.strerror}") from error
