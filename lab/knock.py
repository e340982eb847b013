"""Does anybody let this in? `python -m lab.knock [--timeout S] tcp|udp|icmp ADDRESS NUMBER`.

Tries one connection and prints one object, {outcome, detail, status}, outcome being

    open         somebody answered (of HTTP, `status` says what)
    refused      nobody listens there, and the refusal came back: the network let both pass
    silent       nothing came back in time, as when packets are dropped
    unreachable  the network said no by itself
    unknown      this cannot be tried here

The number is a port; of ICMP, the type of an echo request (8 or 128). UDP sends one datagram: who
listens and never answers is silent too. With --method, --path, --host and --header a request is
made over TCP. Needs root for ICMP.
"""

from __future__ import annotations

import argparse
import errno
import http.client
import json
import os
import socket
import struct
import sys
from typing import Any

ECHO = {4: (8, 0), 6: (128, 129)}  # request, reply
_UNREACHABLE = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES, errno.EPERM)


def outcome(what: str, detail: str = "", status: int | None = None) -> dict[str, Any]:
    """The object that is printed."""
    return {"outcome": what, "detail": detail, "status": status}


def _failed(error: OSError) -> dict[str, Any]:
    if isinstance(error, TimeoutError):
        return outcome("silent", "no answer in time")
    if isinstance(error, ConnectionRefusedError):
        return outcome("refused", error.strerror or "refused")
    if error.errno in _UNREACHABLE:
        return outcome("unreachable", error.strerror or "unreachable")
    if isinstance(error, ConnectionResetError):
        return outcome("refused", error.strerror or "reset")
    return outcome("unknown", error.strerror or str(error))


def knock(
    proto: str, address: str, number: int, timeout_s: float, source: str = ""
) -> dict[str, Any]:
    """Try once; from an address of one's own, if one is given."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        match proto:
            case "tcp":
                with socket.socket(family, socket.SOCK_STREAM) as sock:
                    sock.settimeout(timeout_s)
                    sock.bind((source, 0))
                    sock.connect((address, number))
                return outcome("open", "connected")
            case "udp":
                with socket.socket(family, socket.SOCK_DGRAM) as sock:
                    sock.settimeout(timeout_s)
                    sock.bind((source, 0))
                    sock.connect((address, number))
                    sock.send(b"knock")
                    sock.recv(1)
                return outcome("open", "answered")
            case _:
                return _echo(family, address, number, timeout_s, source)
    except OSError as error:
        return _failed(error)


def _echo(family: int, address: str, number: int, timeout_s: float, source: str) -> dict[str, Any]:
    request, reply = ECHO[6 if family == socket.AF_INET6 else 4]
    if number != request:
        return outcome("unknown", f"only echo requests (type {request}) can be tried")
    protocol = socket.IPPROTO_ICMPV6 if family == socket.AF_INET6 else socket.IPPROTO_ICMP
    with socket.socket(family, socket.SOCK_RAW, protocol) as sock:
        sock.settimeout(timeout_s)
        sock.bind((source, 0))
        ident = os.getpid() & 0xFFFF
        packet = struct.pack("!BBHHH", request, 0, 0, ident, 1)
        if family == socket.AF_INET:  # of ICMPv6 the kernel fills it in
            packet = struct.pack("!BBHHH", request, 0, _checksum(packet), ident, 1)
        sock.connect((address, 0))
        sock.send(packet)
        while True:
            data = sock.recv(2048)
            if family == socket.AF_INET:
                data = data[(data[0] & 15) * 4 :]
            kind, _, _, answered, _ = struct.unpack("!BBHHH", data[:8])
            if kind == reply and answered == ident:
                return outcome("open", "answered")


def _checksum(data: bytes) -> int:
    """RFC 1071, of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def ask(
    method: str,
    path: str,
    host: str,
    headers: list[str],
    address: str,
    port: int,
    timeout_s: float,
    source: str = "",
) -> dict[str, Any]:
    """One HTTP request."""
    connection = http.client.HTTPConnection(
        address, port, timeout=timeout_s, source_address=(source, 0)
    )
    try:
        connection.putrequest(method, path, skip_host=True)
        shown = f"[{address}]" if ":" in address else address
        connection.putheader("Host", host or shown)
        for text in headers:
            name, _, value = text.partition(":")
            connection.putheader(name.strip(), value.strip())
        connection.endheaders()
        status = connection.getresponse().status
        return outcome("open", f"status {status}", status)
    except OSError as error:
        return _failed(error)
    except http.client.HTTPException as error:
        return outcome("unknown", f"{type(error).__name__}: {error}")
    finally:
        connection.close()


def main() -> int:
    """Print the outcome. Exit code 0 whatever it is."""
    parser = argparse.ArgumentParser(prog="python -m lab.knock", description=__doc__)
    parser.add_argument("proto", choices=("tcp", "udp", "icmp"))
    parser.add_argument("address")
    parser.add_argument("number", type=int)
    parser.add_argument("--timeout", type=float, default=1.5)
    parser.add_argument("--source", default="")
    parser.add_argument("--method")
    parser.add_argument("--path", default="/")
    parser.add_argument("--host", default="")
    parser.add_argument("--header", action="append", default=[])
    a = parser.parse_args()
    if a.method:
        found = ask(a.method, a.path, a.host, a.header, a.address, a.number, a.timeout, a.source)
    else:
        found = knock(a.proto, a.address, a.number, a.timeout, a.source)
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
