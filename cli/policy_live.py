"""Questions about policy, answered by connections in a lab that is up."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Final

from cilia.policy.api import PROTO_ICMP, PROTO_ICMPV6, PROTO_TCP, PROTO_UDP
from cilia.policy.questions.judge import End, Question
from cilia.policy.questions.requests import HTTPRequest
from cli.errors import CliError, Exit
from lab import process
from lab.enter import current, place_named
from lab.errors import LabError
from lab.state import LabState, WorkloadState
from lab.up import FAR4, FAR6, environment

TIMEOUT_S: Final = 1.5  # a dropped packet is answered by nothing; one SYN is sent again after 1 s
PARALLEL: Final = 4
FORBIDDEN: Final = 403  # what a proxy says to a request that no rule lets pass
_WORLD: Final = (ip_address(FAR4), ip_address(FAR6))
_WORDS: Final = {PROTO_TCP: "tcp", PROTO_UDP: "udp", PROTO_ICMP: "icmp", PROTO_ICMPV6: "icmp"}


@dataclass(frozen=True, slots=True)
class Seen:
    """What came of one connection; allowed None: it could not be tried."""

    allowed: bool | None
    detail: str


class LiveConnections:
    """Makes connections between the workloads of a lab."""

    def __init__(self, name: str | None, agent_socket: str) -> None:
        try:
            self._lab: Final[LabState] = current(name, agent_socket=agent_socket)
        except LabError as error:
            raise CliError(
                str(error), code=Exit.NOT_FOUND, hint=error.cure or "Start one: cilia lab up FILE"
            ) from error

    def try_all(self, questions: list[Question]) -> list[Seen]:
        """Each question's connection, over every family that both ends have."""
        with ThreadPoolExecutor(PARALLEL) as pool:
            return list(pool.map(self._try, questions))

    def _try(self, question: Question) -> Seen:
        source = self._workload(question.src)
        if source is None and question.src.party.kind != "prefix":
            return Seen(None, f"{question.src.name} is no workload of lab {self._lab.name}")
        place = "world" if source is None else source.full_name
        outside = question.src.address if source is None else None
        addresses = self._addresses(question.dst, question.proto, outside)
        if not addresses:
            return Seen(None, f"{question.dst.name} has no address in lab {self._lab.name}")
        if question.proto not in _WORDS:
            return Seen(None, "this protocol cannot be tried")
        found = [self._knock(place, address, question) for address in addresses]
        for seen in found:
            if seen.allowed is None:
                return seen
        if len({x.allowed for x in found}) > 1:
            texts = "; ".join(f"{a}: {x.detail}" for a, x in zip(addresses, found, strict=True))
            return Seen(None, f"the families differ: {texts}")
        return found[0]

    def _workload(self, end: End) -> WorkloadState | None:
        names = {x.ref for x in end.party.members} | {end.name}
        by_name = {x.full_name: x for x in self._lab.workloads}
        if end.name in by_name:
            return by_name[end.name]
        return next((by_name[x] for x in sorted(names) if x in by_name), None)

    def _addresses(self, end: End, proto: int, source: object) -> list[str]:
        """Where an end is reached; from an address outside, by its own family only."""
        workload = self._workload(end)
        if workload is not None:
            both = [workload.ipv4, workload.ipv6]
        elif end.address is not None:
            both = [str(end.address)]
        elif end.party.kind == "prefix" and end.party.prefix is not None:
            inside = [x for x in _WORLD if x in end.party.prefix]
            both = [str(x) for x in inside[:1]]
        else:
            both = []
        wanted = [x for x in both if x]
        if source is not None:
            wanted = [x for x in wanted if (":" in x) == (":" in str(source))]
        if proto == PROTO_ICMP:
            return [x for x in wanted if ":" not in x]
        return [x for x in wanted if ":" in x] if proto == PROTO_ICMPV6 else wanted

    def _knock(self, place_name: str, address: str, question: Question) -> Seen:
        argv = [sys.executable, "-m", "lab.knock", "--timeout", str(TIMEOUT_S)]
        source = question.src.address
        if place_name == "world" and source is not None:
            if (":" in str(source)) != (":" in address):
                return Seen(None, f"{source} and {address} are of two families")
            argv += ["--source", str(source)]
        request = question.request
        if isinstance(request, HTTPRequest):
            argv += ["--method", request.method, "--path", request.path, "--host", request.host]
            for name, value in request.headers:
                argv += ["--header", f"{name}: {value}"]
        argv += [_WORDS[question.proto], address, str(question.port)]
        try:
            place = place_named(self._lab, place_name)
        except LabError as error:
            return Seen(None, str(error))
        done = subprocess.run(
            process.command_line(argv, place),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            env=process.launch_environment(environment(), place),
            cwd="/",
            check=False,
        )
        if done.returncode or not done.stdout.strip():
            return Seen(None, done.stderr.strip().rpartition("\n")[2] or "the client failed")
        return judged(json.loads(done.stdout), request is not None)


def judged(answer: dict[str, Any], requested: bool) -> Seen:
    """What the client's outcome says about policy."""
    detail = f"{answer['outcome']}: {answer['detail']}"
    match answer["outcome"]:
        case "open":
            return Seen(answer["status"] != FORBIDDEN, detail)
        case "refused":
            # Somebody refused, so the network let it pass; of a request nothing is known.
            return Seen(None if requested else True, detail)
        case "silent":
            return Seen(False, detail)
        case _:
            return Seen(None, detail)
