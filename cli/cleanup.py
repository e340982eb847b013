"""`cilia cleanup`: no trace of us left on the host."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from cilia.cleanup import Trace, find
from cilia.cleanup import cleanup as remove_traces
from cilia.errors import DomainError
from cilia.statefile import DirectoryLock, StateDirectoryLocked
from cli import clients, render
from cli.errors import CliError, Exit
from cli.settings import (
    DEFAULT_RUN_DIR,
    DEFAULT_STATE_DIR,
    Command,
    Settings,
    examples,
    pass_settings,
)


@click.command(
    "cleanup",
    cls=Command,
    epilog=examples("""
cilia cleanup
cilia cleanup --force --store
cilia cleanup --dry-run -o json
"""),
)
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Say what would be removed, remove nothing.")
@click.option("--keep-state", is_flag=True, help="Keep the agent's records of its endpoints.")
@click.option("--store", is_flag=True, help="Remove the identity service's store as well.")
@click.option(
    "--run-dir", type=click.Path(path_type=Path), default=DEFAULT_RUN_DIR, show_default=True
)
@click.option(
    "--state-dir", type=click.Path(path_type=Path), default=DEFAULT_STATE_DIR, show_default=True
)
@click.option("--bpffs", type=click.Path(path_type=Path), help="Default: bpf in the run directory.")
@pass_settings
def cleanup(
    settings: Settings,
    force: bool,
    dry_run: bool,
    keep_state: bool,
    store: bool,
    run_dir: Path,
    state_dir: Path,
    bpffs: Path | None,
) -> None:
    """Remove every trace of Cilia from this host; its services must be stopped.

    Programs, maps, links, interfaces, routes, mounts, sockets and records: of the network namespace
    that this runs in. Endpoints lose their connectivity. Exit code 1 when something would not go.
    Labs are removed by `cilia lab down --all`.
    """
    if os.geteuid() != 0:
        raise CliError("cleanup needs root", code=Exit.PERMISSION, hint="Run it with sudo.")
    try:
        known = find(run_dir, state_dir, bpffs=bpffs, state=not keep_state)
        store_dir = state_dir / "identity"
        if store and store_dir.is_dir():
            known.append(Trace("store", str(store_dir)))
        if dry_run:
            _report(settings, known, "would remove")
            return
        if known and not force:
            _ask(known)
        # Both must be stopped before either's things are touched.
        with _stopped(store_dir) if store else contextlib.nullcontext():
            done = remove_traces(run_dir, state_dir, bpffs=bpffs, state=not keep_state)
            if store and store_dir.is_dir():
                shutil.rmtree(store_dir)
                done.append(Trace("store", str(store_dir)))
        if not keep_state and state_dir.is_dir() and not any(state_dir.iterdir()):
            state_dir.rmdir()
    except DomainError as error:
        code = clients.EXIT_OF_KIND.get(error.kind, Exit.FAILED)
        raise CliError(error.message, code=code, hint=error.cure) from error
    except OSError as error:
        raise CliError(f"cleanup stopped: {error}") from error
    _report(settings, done, "removed")
    if any(trace.error for trace in done):
        raise SystemExit(int(Exit.FAILED))


def _ask(known: Sequence[Trace]) -> None:
    render.warn("This removes:")
    for trace in known:
        render.warn(f"  {trace}")
    render.warn("Endpoints on this host lose their connectivity.")
    if not click.confirm("Remove it all?", default=False, err=True):
        raise CliError("nothing was removed", hint="Answer y, or give --force.")


@contextlib.contextmanager
def _stopped(directory: Path) -> Iterator[None]:
    """Hold the store, so that no identity service runs on it. Raises CliError when one does."""
    if not directory.is_dir():
        yield
        return
    lock = DirectoryLock(directory, owner="cilia cleanup")
    try:
        lock.acquire()
    except StateDirectoryLocked as error:
        raise CliError(
            f"the identity service is running: {error.message}",
            code=Exit.CONFLICT,
            hint="Stop it first.",
        ) from error
    try:
        yield
    finally:
        lock.release()


def _report(settings: Settings, traces: Sequence[Trace], verb: str) -> None:
    if settings.json:
        render.json([{"kind": t.kind, "name": t.name, "error": t.error or None} for t in traces])
        return
    for trace in traces:
        if trace.error:
            render.line(settings, ("could not remove ", "bold red"), str(trace))
        else:
            render.line(settings, f"{verb} {trace.kind} {trace.name}")
    if not traces:
        render.line(settings, "Nothing of Cilia is left on this host.")
