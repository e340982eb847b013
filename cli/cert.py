"""`cilia cert`: certificates for what leaves the node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cilia.errors import DomainError
from cilia.pki.authority import CA_DAYS, DAYS, Authority, Request
from cilia.pki.files import CertificateInfo
from cli import clients, render
from cli.errors import CliError, Exit
from cli.settings import DEFAULT_STATE_DIR, Group, Settings, examples, pass_settings

_DIR = DEFAULT_STATE_DIR / "pki"

directory_option = click.option(
    "--dir",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    default=_DIR,
    show_default=True,
    envvar="CILIA_PKI_DIR",
    help="Where the authority and what it issued are.",
)


@click.group(cls=Group)
def cert() -> None:
    """Certificates of mutual TLS: make an authority, issue, renew. Needs no service."""


@cert.command("init", epilog=examples("cilia cert init\ncilia cert init --dir ./pki --days 365"))
@directory_option
@click.option("--days", type=click.IntRange(1, 36_500), default=CA_DAYS, show_default=True)
@pass_settings
def init(settings: Settings, directory: Path, days: int) -> None:
    """Make an authority. Its key, ca.key, is needed to issue and to renew, and nowhere else."""
    _show(settings, [_try(lambda: Authority(directory).init(days=days))])


@cert.command(
    "issue",
    epilog=examples("""
cilia cert issue --node node1 --service xds --name node1.example.com --name 192.0.2.1
cilia cert issue --node web-7 --service envoy
"""),
)
@directory_option
@click.option("--node", required=True, help="Whose it is: what an xDS server calls the client.")
@click.option("--service", required=True, help="agent, xds, flows, envoy, ...")
@click.option("--name", "names", multiple=True, help="DNS name or address that clients dial.")
@click.option("--days", type=click.IntRange(1, CA_DAYS), default=DAYS, show_default=True)
@pass_settings
def issue(
    settings: Settings,
    directory: Path,
    node: str,
    service: str,
    names: tuple[str, ...],
    days: int,
) -> None:
    """Issue a certificate into DIR/NODE-SERVICE; one that is there is renewed."""
    request = Request(node=node, service=service, names=names, days=days)
    _show(settings, [_try(lambda: Authority(directory).issue(request))])


@cert.command(
    "rotate",
    epilog=examples("""
cilia cert rotate --within 30
cilia cert rotate node1-xds
cilia cert rotate --ca
"""),
)
@directory_option
@click.argument("name", nargs=-1)
@click.option("--within", type=click.FloatRange(min=0), help="Only what ends within these days.")
@click.option(
    "--ca",
    is_flag=True,
    help="Give the authority a new key first; the old one's "
    "certificates stay trusted until they end.",
)
@pass_settings
def rotate(
    settings: Settings, directory: Path, name: tuple[str, ...], within: float | None, ca: bool
) -> None:
    """Renew certificates with the names they have. Services use them without a restart."""
    _show(settings, _try(lambda: Authority(directory).rotate(name, within_days=within, ca=ca)))


@cert.command("list")
@directory_option
@pass_settings
def list_(settings: Settings, directory: Path) -> None:
    """List the authority's certificate and those it issued. Exit code 1 when one has ended."""
    found = _try(lambda: Authority(directory).issued())
    _show(settings, found)
    if any(info.error or info.days_left() <= 0 for info in found):
        raise SystemExit(Exit.FAILED)


def _try(work: Any) -> Any:
    try:
        return work()
    except DomainError as error:
        code = clients.EXIT_OF_KIND.get(error.kind, Exit.FAILED)
        raise CliError(error.message, code=code, hint=error.cure) from error


def _show(settings: Settings, found: list[CertificateInfo]) -> None:
    if settings.json:
        render.json([_shape(info) for info in found])
        return
    render.table(
        settings,
        ["CERTIFICATE", "NAMES", "ENDS", "DAYS LEFT", "STATE"],
        [
            [
                info.path,
                "authority" if info.is_ca else " ".join(info.names),
                f"{info.not_after:%Y-%m-%d %H:%M}" if info.not_after else "",
                f"{info.days_left():.0f}",
                info.error or ("ok" if info.days_left() > 0 else "ended"),
            ]
            for info in found
        ],
    )


def _shape(info: CertificateInfo) -> dict[str, Any]:
    return {
        "file": str(info.path),
        "subject": info.subject,
        "issuer": info.issuer,
        "names": list(info.names),
        "authority": info.is_ca,
        "serial": info.serial,
        "not_before": info.not_before.isoformat() if info.not_before else None,
        "not_after": info.not_after.isoformat() if info.not_after else None,
        "days_left": round(info.days_left(), 2),
        "error": info.error or None,
    }
