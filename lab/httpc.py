"""A tiny HTTP client for workloads: `python -m lab.httpc [METHOD] URL`.

Prints the body; exit code 0 for a 2xx answer, 22 for another status, 28 when there was no answer in
time (what a drop looks like), 7 when refused or unreachable, 56 when the connection broke, 6 when
the name does not resolve: curl's numbers.

`--json` prints one object: {local, local_port, remote, remote_port, status, body, bytes, sha256,
error, exit, elapsed_s}. The socket is bound before it connects, so the port is known even if
nothing ever comes back. `--progress` prints {"bytes": N} lines while a long answer arrives.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import socket
import sys
import time
from typing import Any
from urllib.parse import urlsplit

OK, NAME, REFUSED, STATUS, TIMEOUT, BROKEN = 0, 6, 7, 22, 28, 56
METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD")
BODY_SHOWN = 4096  # bytes
PROGRESS_EVERY = 128 * 1024  # bytes


def fetch(
    method: str, url: str, *, family: int, timeout_s: float, stall_s: float, progress: bool
) -> dict[str, Any]:
    """One request. `timeout_s` bounds connecting, `stall_s` each silence of the answer."""
    started = time.monotonic()
    parts = urlsplit(url if "://" in url else f"http://{url}")
    host, port = parts.hostname or "", parts.port or 80
    result: dict[str, Any] = {
        "local": None, "local_port": None, "remote": host, "remote_port": port, "status": None,
        "body": "", "bytes": 0, "sha256": None, "error": None, "exit": OK, "elapsed_s": 0.0,
    }  # fmt: skip

    def failed(code: int, error: str) -> dict[str, Any]:
        result.update(exit=code, error=error, elapsed_s=round(time.monotonic() - started, 3))
        return result

    try:
        found = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)
    except socket.gaierror as error:
        return failed(NAME, f"cannot resolve {host}: {error.strerror}")
    found_family, kind, protocol, _, address = found[0]
    result["remote"] = address[0]
    with socket.socket(found_family, kind, protocol) as sock:
        sock.bind(("", 0))
        result["local_port"] = sock.getsockname()[1]
        sock.settimeout(timeout_s)
        try:
            sock.connect(address)
        except TimeoutError:
            return failed(TIMEOUT, f"no answer from {address[0]} within {timeout_s:g} s")
        except OSError as error:
            return failed(REFUSED, f"cannot connect to {address[0]}: {error.strerror}")
        result["local"] = sock.getsockname()[0]
        sock.settimeout(stall_s)
        connection = http.client.HTTPConnection(host, port)
        connection.sock = sock
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        try:
            connection.request(method, path, headers={"Connection": "close"})
            response = connection.getresponse()
            result["status"] = response.status
            body, total, digest = _read(response, progress)
        except TimeoutError:
            return failed(TIMEOUT, f"the answer stalled for {stall_s:g} s")
        except (OSError, http.client.HTTPException) as error:
            return failed(BROKEN, f"the connection broke: {error!r}")
    result.update(body=body.decode(errors="replace"), bytes=total, sha256=digest)
    result["elapsed_s"] = round(time.monotonic() - started, 3)
    if not 200 <= response.status < 300:
        result["exit"] = STATUS
    return result


def _read(response: http.client.HTTPResponse, progress: bool) -> tuple[bytes, int, str]:
    total, shown, said = 0, b"", 0
    digest = hashlib.sha256()
    while True:
        part = response.read1(65536)
        if not part:
            break
        digest.update(part)
        total += len(part)
        if len(shown) < BODY_SHOWN:
            shown += part[: BODY_SHOWN - len(shown)]
        if progress and total - said >= PROGRESS_EVERY:
            said = total
            sys.stdout.write(json.dumps({"bytes": total}) + "\n")
            sys.stdout.flush()
    if response.length:  # closed before Content-Length was reached
        raise http.client.IncompleteRead(shown)
    return shown, total, digest.hexdigest()


def main() -> int:
    """Make the request the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m lab.httpc", description=__doc__)
    parser.add_argument("words", nargs="+", metavar="[METHOD] URL")
    parser.add_argument("-4", "--ipv4", action="store_true")
    parser.add_argument("-6", "--ipv6", action="store_true")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds to connect")
    parser.add_argument("--stall", type=float, default=30.0, help="seconds of silence allowed")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--progress", action="store_true")
    options = parser.parse_args()
    words = options.words
    if len(words) > 2 or (len(words) == 2 and words[0].upper() not in METHODS):
        parser.error("give [METHOD] URL")
    method = words[0].upper() if len(words) == 2 else "GET"
    family = socket.AF_UNSPEC
    if options.ipv4 != options.ipv6:
        family = socket.AF_INET if options.ipv4 else socket.AF_INET6
    result = fetch(
        method,
        words[-1],
        family=family,
        timeout_s=options.timeout,
        stall_s=options.stall,
        progress=options.progress,
    )
    if options.json:
        sys.stdout.write(json.dumps(result) + "\n")
    elif result["error"]:
        sys.stderr.write(f"{result['error']}\n")
    else:
        sys.stdout.write(result["body"])
        if result["exit"]:
            sys.stderr.write(f"status {result['status']}\n")
    return int(result["exit"])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
