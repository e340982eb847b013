"""Attachments: tcx links, clsact filters, cgroup links; and who else is on a device.

tcx (Linux 6.6) is preferred: a link is pinned, outlives us, and takes a new program in one step. On
older kernels the program hangs in a cls_bpf filter of the clsact qdisc, replaced in place by the
same priority and handle. Either way no packet passes without the old or the new program.

A filter is known as ours by its handle and name. While one exists, its program is pinned beside the
link's place, as `<pin>_clsact`. The pin is made before the filter and removed after it, and the
other mode's attachment goes only after the new one is in place: whenever we are killed, the next
`attach_tc` finds what there is, and leaves one.

Device indexes are those of the calling thread's network namespace.
"""

from __future__ import annotations

import ctypes as C
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, assert_never

from cilia.bpf import libbpf, sys, uapi
from cilia.bpf.descriptor import Descriptor
from cilia.bpf.errors import ENOTSUPP, BpfError
from cilia.bpf.map import pin_fd
from cilia.bpf.program import Program
from cilia.bpf.uapi import AttachType
from cilia.net.errors import NetworkError
from cilia.net.filters import (
    Filter,
    delete_clsact,
    delete_filter,
    ensure_clsact,
    filters,
    put_filter,
)
from cilia.net.rtnl import RouteSocket

Direction = Literal["ingress", "egress"]
Mode = Literal["auto", "tcx", "clsact"]

FILTER_HANDLE: Final = 0xC111A
FILTER_NAME: Final = "cilia-"
_MARK: Final = "_clsact"

_TCX: Final = {"ingress": AttachType.TCX_INGRESS, "egress": AttachType.TCX_EGRESS}
_NO_TCX: Final = frozenset({errno.EINVAL, errno.EOPNOTSUPP, ENOTSUPP})


@dataclass(frozen=True, slots=True, kw_only=True)
class Attachment:
    """A program on a device. `ours` is known for filters; for links, by their pin (`link_id`)."""

    ifindex: int
    direction: Direction
    kind: Literal["tcx", "clsact"]
    prog_id: int
    prog_name: str
    link_id: int = 0
    prio: int = 0
    handle: int = 0
    ours: bool = False


class Link(Descriptor):
    """A program in its place. A link without a pin goes with its last descriptor."""

    def __init__(
        self,
        kind: Literal["tcx", "clsact", "cgroup"],
        *,
        fd: int = -1,
        pin: Path | None = None,
        ifindex: int = 0,
        direction: Direction | None = None,
    ) -> None:
        """Use `attach_tc`, `attach_cgroup` or `Link.open_pinned`."""
        self.kind = kind
        self.fd = fd
        self.pin = pin
        self.ifindex = ifindex
        self.direction = direction

    @classmethod
    def open_pinned(cls, path: Path) -> Link:
        """The link pinned at `path`; BpfError(ENOENT) when there is none."""
        fd = libbpf.call(
            "bpf_obj_get", os.fsencode(path), operation="open pinned link", subject=str(path)
        )
        info = _link_info(fd, str(path))
        for direction, attach_type in _TCX.items():
            if info.word1 == attach_type:
                found: Direction = "ingress" if direction == "ingress" else "egress"
                return cls("tcx", fd=fd, pin=path, ifindex=info.word0, direction=found)
        return cls("cgroup", fd=fd, pin=path)

    def __repr__(self) -> str:
        return f"<Link {self.kind} {self.pin or ''} ifindex {self.ifindex} {self.direction or ''}>"

    @property
    def id(self) -> int:
        """The kernel's number of the link; 0 for a filter."""
        return int(_link_info(self.fd, repr(self)).id) if self.fd >= 0 else 0

    @property
    def prog_id(self) -> int:
        """The program that is in place; 0 when there is none any more."""
        if self.kind == "clsact":
            assert self.direction is not None
            found = [a for a in _filters(self.ifindex, self.direction) if a.ours]
            return found[0].prog_id if found else 0
        return int(_link_info(self.fd, repr(self)).prog_id)

    def replace(self, prog: Program) -> None:
        """Put `prog` in place of the present program in one step."""
        if self.kind == "clsact":
            assert self.direction is not None
            _set_filter(self.ifindex, self.direction, prog, self.pin)
            return
        libbpf.call(
            "bpf_link_update",
            self.fd,
            prog.fd,
            None,
            operation="replace program of link",
            subject=str(self.pin or self.kind),
        )

    def detach(self) -> None:
        """Take the program away. A device that is gone has nothing left to take."""
        if self.kind == "clsact":
            assert self.direction is not None
            _drop_filter(self.ifindex, self.direction)
            if self.pin is not None:
                _mark(self.pin).unlink(missing_ok=True)
            return
        if self.fd >= 0:
            # Dropping the last reference detaches some time later; this, at once. A link whose
            # device is gone has nothing left to detach.
            libbpf.function("bpf_link_detach")(self.fd)
        if self.pin is not None:
            self.pin.unlink(missing_ok=True)
        self.close()


def _link_info(fd: int, subject: str) -> libbpf.LinkInfo:
    info = libbpf.LinkInfo()
    libbpf.info(fd, info, subject)
    return info


def has_tcx() -> bool:
    """Whether the kernel knows tcx: asked of the loopback device, which every namespace has."""
    try:
        sys.query_tcx(1, AttachType.TCX_INGRESS)
    except BpfError:
        return False
    return True


def attach_tc(
    ifindex: int,
    direction: Direction,
    prog: Program,
    *,
    mode: Mode = "auto",
    pin: Path | None = None,
    first: bool = False,
) -> Link:
    """Put `prog` on a device, or in place of the one that an earlier run left under `pin`.

    auto: tcx where the kernel has it, else clsact. When the mode changed since, the other mode's
    attachment of ours goes after the new one is in place; those of others stay. `first` puts a new
    tcx link before those of others; else it runs after them, and only if they pass packets on
    (TC_ACT_UNSPEC).
    """
    match mode:
        case "auto":
            chosen: Mode = "tcx" if has_tcx() else "clsact"
        case "tcx" | "clsact":
            chosen = mode
        case _:
            assert_never(mode)
    if chosen == "clsact":
        return _attach_clsact(ifindex, direction, prog, pin)
    return _attach_tcx(ifindex, direction, prog, pin, first)


def _attach_tcx(
    ifindex: int, direction: Direction, prog: Program, pin: Path | None, first: bool
) -> Link:
    link = _live_link(pin, ifindex, direction)
    if link is not None:
        link.replace(prog)
    else:
        opts = libbpf.LinkCreateOpts(
            sz=C.sizeof(libbpf.LinkCreateOpts), flags=uapi.F_BEFORE if first else 0
        )
        try:
            fd = libbpf.call(
                "bpf_link_create",
                prog.fd,
                ifindex,
                _TCX[direction],
                C.byref(opts),
                operation="attach by tcx",
                subject=f"{prog.name} to device {ifindex} {direction}",
            )
        except BpfError as error:
            if error.errno in _NO_TCX and not has_tcx():
                error.cure = "this kernel has no tcx (Linux 6.6): use --attach=clsact or auto"
            elif error.errno == errno.EEXIST:
                error.cure = "this very program is there already, by another link: detach that"
            raise
        link = Link("tcx", fd=fd, pin=pin, ifindex=ifindex, direction=direction)
        if pin is not None:
            pin_fd(fd, pin, f"link of {prog.name}")
    if pin is not None and _mark(pin).exists():
        _drop_filter(ifindex, direction)
        _mark(pin).unlink(missing_ok=True)
    return link


def filter_is_marked(pin: Path) -> bool:
    """Whether what `attach_tc` put under this pin last is a filter."""
    return _mark(pin).exists() and not pin.exists()


def _live_link(pin: Path | None, ifindex: int, direction: Direction) -> Link | None:
    """The pinned link, if it is still on this device: one whose device went reports index 0."""
    if pin is None or not pin.exists():
        return None
    link = Link.open_pinned(pin)
    if (link.kind, link.ifindex, link.direction) == ("tcx", ifindex, direction):
        return link
    link.close()
    return None


def _attach_clsact(ifindex: int, direction: Direction, prog: Program, pin: Path | None) -> Link:
    _set_filter(ifindex, direction, prog, pin)
    if pin is not None and pin.exists():
        Link.open_pinned(pin).detach()  # the tcx link of an earlier run
    return Link("clsact", pin=pin, ifindex=ifindex, direction=direction)


def detach_tc(ifindex: int, direction: Direction, pin: Path) -> None:
    """Remove what `attach_tc` put there, in whichever mode; nothing there is success."""
    if _mark(pin).exists():
        _drop_filter(ifindex, direction)
        _mark(pin).unlink(missing_ok=True)
    if pin.exists():
        Link.open_pinned(pin).detach()


def attach_cgroup(
    path: Path, attach_type: AttachType, prog: Program, *, pin: Path | None = None
) -> Link:
    """Put `prog` on a cgroup (version 2), or in place of the one pinned by an earlier run."""
    if pin is not None and pin.exists():
        link = Link.open_pinned(pin)
        link.replace(prog)
        return link
    cgroup = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd = libbpf.call(
            "bpf_link_create",
            prog.fd,
            cgroup,
            int(attach_type),
            None,
            operation="attach to cgroup",
            subject=f"{prog.name} to {path}",
        )
    finally:
        os.close(cgroup)
    link = Link("cgroup", fd=fd, pin=pin)
    if pin is not None:
        pin_fd(fd, pin, f"link of {prog.name}")
    return link


def list_attached(ifindex: int) -> list[Attachment]:
    """Every program on a device, in the order they run: tcx before clsact."""
    result = []
    directions: tuple[Direction, Direction] = ("ingress", "egress")
    for direction in directions:
        try:
            links = sys.query_tcx(ifindex, _TCX[direction])
        except BpfError as error:
            if error.errno not in _NO_TCX:
                raise
            links = []
        for prog_id, link_id in links:
            result.append(
                Attachment(
                    ifindex=ifindex,
                    direction=direction,
                    kind="tcx",
                    prog_id=prog_id,
                    prog_name=_prog_name(prog_id),
                    link_id=link_id,
                )
            )
        result.extend(_filters(ifindex, direction))
    return result


def _prog_name(prog_id: int) -> str:
    try:
        return Program.from_id(prog_id).name
    except BpfError:
        return ""


# ---- clsact


def _mark(pin: Path) -> Path:
    return pin.with_name(pin.name + _MARK)


@contextmanager
def _netlink(operation: str, subject: str) -> Iterator[RouteSocket]:
    try:
        with RouteSocket() as socket:
            yield socket
    except NetworkError as error:
        raise BpfError(error.errno, operation, subject) from error


def _filters(ifindex: int, direction: Direction) -> list[Attachment]:
    with _netlink("list filters of", f"device {ifindex}") as socket:
        found = filters(socket, ifindex, direction)
    return [
        Attachment(
            ifindex=ifindex,
            direction=direction,
            kind="clsact",
            prog_id=x.prog_id,
            prog_name=x.name,
            prio=x.prio,
            handle=x.handle,
            ours=_is_ours(x),
        )
        for x in found
    ]


def _is_ours(found: Filter) -> bool:
    return found.handle == FILTER_HANDLE and found.name.startswith(FILTER_NAME)


def filter_is_there(
    socket: RouteSocket, ifindex: int, direction: Direction, prog: Program, pin: Path
) -> bool:
    """Whether `attach_tc` by clsact would change nothing. Costs one dump; raises NetworkError."""
    return filter_is_marked(pin) and any(
        _is_ours(x) and x.prog_id == prog.id for x in filters(socket, ifindex, direction)
    )


def _set_filter(ifindex: int, direction: Direction, prog: Program, pin: Path | None) -> None:
    subject = f"{prog.name} to device {ifindex} {direction}"
    if pin is not None:
        pin_fd(prog.fd, _mark(pin), f"program {prog.name}")
    with _netlink("attach by clsact", subject) as socket:
        ensure_clsact(socket, ifindex)
        there = filters(socket, ifindex, direction)
        ours = [x.prio for x in there if _is_ours(x)]
        taken = {x.prio for x in there}
        put_filter(
            socket,
            ifindex,
            direction,
            handle=FILTER_HANDLE,
            prio=ours[0] if ours else next(n for n in range(1, 65536) if n not in taken),
            program_fd=prog.fd,
            name=FILTER_NAME + prog.name,
        )


def _drop_filter(ifindex: int, direction: Direction) -> None:
    """Remove our filter, and the qdisc when nobody has a filter left in it."""
    try:
        with _netlink("detach from", f"device {ifindex} {direction}") as socket:
            for found in filters(socket, ifindex, direction):
                if _is_ours(found):
                    delete_filter(socket, ifindex, direction, handle=found.handle, prio=found.prio)
            if not (filters(socket, ifindex, "ingress") or filters(socket, ifindex, "egress")):
                delete_clsact(socket, ifindex)
    except BpfError as error:
        if error.errno not in (errno.ENODEV, errno.ENOENT):
            raise
