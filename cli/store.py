"""`cilia store`: the cluster state, as the identity service keeps it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from cilia.errors import DomainError, Kind
from cilia.kv import journal as kv
from cli import clients, render, shapes
from cli.errors import CliError, Exit
from cli.settings import DEFAULT_STATE_DIR, Group, Settings, examples, pass_settings
from protos.identity.v1 import identity_pb2

STORE = Path("identity/store.sqlite")  # below the state directory


@click.group(cls=Group)
def store() -> None:
    """The cluster state store: identities, policies, announcements."""


@store.command("status")
@pass_settings
def status(settings: Settings) -> None:
    """Show the store's backend, revision, size and node sessions."""
    reply = clients.identity(
        settings,
        lambda service: service.store.Status(
            identity_pb2.StatusRequest(), timeout=service.timeout_s
        ),
    )
    shape = shapes.store_status(reply)
    if settings.json:
        render.json(shape)
        return
    render.fields(
        settings,
        [
            ("Backend", shape["backend"]),
            ("Store id", shape["store_id"]),
            ("Revision", f"{shape['revision']} (compacted up to {shape['compacted']})"),
            ("Keys", shape["keys"]),
            ("Size", f"{shape['size_bytes'] / 1024:.0f} KiB"),
            ("Identities", f"{shape['identities']}, {shape['quarantined']} in quarantine"),
            *([("Message", shape["message"])] if shape["message"] else []),
        ],
    )
    if shape["sessions"]:
        render.line(settings, "")
        render.table(
            settings,
            ["NODE", "LEASE", "TTL", "LEFT", "CONNECTED"],
            [
                [
                    s["node"],
                    s["lease_id"],
                    f"{s['lease_ttl_s']}s",
                    f"{s['lease_remaining_s']}s",
                    "yes" if s["connected"] else "no",
                ]
                for s in shape["sessions"]
            ],
        )


@store.command(
    "backup",
    epilog=examples("""
cilia store backup /var/backups/cilia-$(date +%F).sqlite
cilia store backup - | gzip > store.gz
"""),
)
@click.argument("file", type=click.Path())
@click.option("-f", "--force", is_flag=True, help="Overwrite FILE.")
@pass_settings
def backup(settings: Settings, file: str, force: bool) -> None:
    """Write the whole store, as of one revision, to FILE (`-`: standard output)."""
    to_stdout = file == "-"
    path = Path(file)
    if not to_stdout and path.exists() and not force:
        raise CliError(f"{path} exists", code=Exit.CONFLICT, hint="Overwrite it with --force.")
    # Beside the target and moved into place: a backup is whole or not there.
    part = path.with_name(f".{path.name}.part-{os.getpid()}")

    async def work(service: clients.Identity) -> int:
        size = 0
        stream = service.store.Backup(identity_pb2.BackupRequest(), timeout=service.timeout_s)
        if to_stdout:
            out = sys.stdout.buffer
            async for chunk in stream:
                size += out.write(chunk.data)
            out.flush()
            return size
        with part.open("wb") as target:
            part.chmod(0o600)
            async for chunk in stream:
                size += target.write(chunk.data)
            target.flush()
            os.fsync(target.fileno())
        return size

    try:
        size = clients.identity(settings, work)
        if not to_stdout:
            kv.verify(part)
            part.replace(path)
    except OSError as error:
        raise CliError(f"cannot write {path}: {error.strerror}") from error
    except DomainError as error:
        raise _explained(error) from error
    finally:
        if not to_stdout:
            part.unlink(missing_ok=True)
    if to_stdout:
        return
    if settings.json:
        render.json({"file": str(path), "size_bytes": size})
    else:
        render.line(settings, f"Store written to {path} ({size} bytes)")


@store.command(
    "restore",
    epilog=examples("""
cilia store restore backup.sqlite
cilia store restore backup.sqlite --state-dir /srv/cilia
"""),
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    default=DEFAULT_STATE_DIR,
    show_default=True,
    help="The identity service's state directory.",
)
@pass_settings
def restore(settings: Settings, file: Path, state_dir: Path) -> None:
    """Put a backup in place of the store. The identity service must be stopped.

    What was there is kept beside it. Agents notice the other store by its id and list it anew.
    """
    try:
        kept = kv.restore(file, state_dir / STORE)
    except FileNotFoundError as error:
        raise CliError(f"no file {error.filename}", code=Exit.NOT_FOUND) from error
    except OSError as error:
        code = Exit.PERMISSION if isinstance(error, PermissionError) else Exit.FAILED
        raise CliError(f"cannot restore: {error}", code=code) from error
    except DomainError as error:
        raise _explained(error) from error
    if settings.json:
        render.json({"file": str(state_dir / STORE), "kept": str(kept) if kept else None})
        return
    render.line(settings, f"Store restored to {state_dir / STORE}")
    if kept:
        render.line(settings, f"What was there is kept as {kept}")
    render.line(settings, "Start the identity service again.")


def _explained(error: DomainError) -> CliError:
    code = Exit.INVALID if error.kind is Kind.DATA_LOSS else clients.EXIT_OF_KIND.get(error.kind)
    return CliError(error.message, code=code or Exit.FAILED, hint=error.cure)
