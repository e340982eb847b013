"""What firewalls of this network namespace hold, read only: nftables, and iptables' legacy tables.

Other people's rules may be many, so what is read is bounded in size and time.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any, Final

from cilia.errors import DomainError, Kind

_TIMEOUT_S: Final = 10.0
_LIMIT_BYTES: Final = 8 << 20


class FirewallUnread(DomainError):
    """The rules cannot be known; the message says why."""

    default_kind = Kind.PRECONDITION


def nftables_on(hook: str) -> list[dict[str, Any]]:
    """Chains and rules (libnftables-json(5)) of the tables that have a base chain on a hook.

    Not those of other tables, nor elements of sets: a host may have a chain for each service, and
    sets of a million addresses. Raises FirewallUnread.
    """
    listed = _nft("list", "chains")
    chains = [item["chain"] for item in listed if "chain" in item]
    tables = {(chain["family"], chain["table"]) for chain in chains if chain.get("hook") == hook}
    found = []
    for family, table in sorted(tables):
        found += [x for x in _nft("-t", "list", "table", family, table) if "metainfo" not in x]
    return found


def _nft(*words: str) -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = json.loads(_output("nft", "-j", *words))["nftables"]
    except ValueError as error:
        raise FirewallUnread(f"nft -j {' '.join(words)}: not JSON: {error}") from None
    return found


def legacy_tables(family: str) -> str:
    """iptables-save's text for the tables that iptables-legacy made ("ip" or "ip6"); "" for none.

    Asks for nothing where the kernel names no table: asking makes one. Raises FirewallUnread.
    """
    names = Path(f"/proc/thread-self/net/{family}_tables_names")
    try:
        if not names.read_text().split():
            return ""
    except OSError:
        return ""  # a kernel without them
    return _output(f"{family}tables-legacy-save")


def _output(*words: str) -> str:
    if shutil.which(words[0]) is None:
        raise FirewallUnread(f"the program {words[0]} is not installed")
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        timer = threading.Timer(_TIMEOUT_S, process.kill)
        timer.start()
        try:
            output = process.stdout.read(_LIMIT_BYTES + 1)
            if len(output) > _LIMIT_BYTES:
                process.kill()
                raise FirewallUnread(f"{' '.join(words)}: more than {_LIMIT_BYTES >> 20} MiB")
            code = process.wait()
        finally:
            timer.cancel()
    if code < 0:
        raise FirewallUnread(f"{' '.join(words)} did not end within {_TIMEOUT_S:g} s")
    if code:
        raise FirewallUnread(f"{' '.join(words)}: exit code {code}")
    return output.decode(errors="replace")
