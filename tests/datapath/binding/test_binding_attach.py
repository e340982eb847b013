"""Programs in place: tcx, clsact and cgroup; replaced under traffic; others left alone."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, Protocol

import pytest

from cilia.bpf import (
    BpfError,
    Link,
    Map,
    Object,
    Program,
    attach_cgroup,
    attach_tc,
    detach_tc,
    list_attached,
)
from cilia.bpf import sys as bpf_sys
from cilia.bpf.map import pin_fd
from cilia.bpf.probe import cgroup2_root
from cilia.bpf.uapi import AttachType

LO = 1
InNetns = Callable[[Callable[[], None]], None]
RealMode = Literal["tcx", "clsact"]
MODES: list[RealMode] = ["tcx", "clsact"]


class Build(Protocol):
    def __call__(self, name: str, *defines: str) -> Path: ...


@pytest.fixture
def loaded(build: Build) -> Object:
    obj = Object.open(build("plain"))
    obj.load()
    return obj


def ids(direction: str) -> list[tuple[str, int]]:
    return [(a.kind, a.prog_id) for a in list_attached(LO) if a.direction == direction]


def names(bpffs: Path) -> set[str]:
    return {p.name for p in bpffs.iterdir() if "." not in p.name}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("direction", ["ingress", "egress"])
def test_attach_replace_detach(
    loaded: Object,
    bpffs: Path,
    in_netns: InNetns,
    need_tcx: None,
    mode: RealMode,
    direction: Literal["ingress", "egress"],
) -> None:
    def work() -> None:
        one, two = loaded.program("generation"), loaded.program("emit")
        link = attach_tc(LO, direction, one, mode=mode, pin=bpffs / "hook")
        assert ids(direction) == [(mode, one.id)]
        link.replace(two)
        assert link.prog_id == two.id
        before = link.id
        link.close()
        # a later run finds it, and puts its own program in the same place
        again = attach_tc(LO, direction, one, mode=mode, pin=bpffs / "hook")
        assert ids(direction) == [(mode, one.id)]
        assert again.id == before
        again.detach()
        assert list_attached(LO) == []
        assert names(bpffs) == set()
        assert "clsact" not in subprocess.check_output(["tc", "qdisc", "show"], text=True)
        detach_tc(LO, direction, bpffs / "hook")

    in_netns(work)


def test_the_mode_changes_between_runs(
    loaded: Object, bpffs: Path, in_netns: InNetns, need_tcx: None
) -> None:
    def work() -> None:
        prog = loaded.program("generation")
        for mode in ("tcx", "clsact", "auto", "clsact", "tcx"):
            attach_tc(LO, "ingress", prog, mode=mode, pin=bpffs / "hook")
            kind = "tcx" if mode == "auto" else mode
            assert ids("ingress") == [(kind, prog.id)]
            assert names(bpffs) == {"hook" if kind == "tcx" else "hook_clsact"}
        detach_tc(LO, "ingress", bpffs / "hook")
        assert list_attached(LO) == []

    in_netns(work)


def test_a_run_killed_between_the_modes_is_put_right(
    loaded: Object, bpffs: Path, in_netns: InNetns, need_tcx: None
) -> None:
    def work() -> None:
        prog = loaded.program("generation")
        # both modes in place, as after a kill in the middle of a change, either way
        attach_tc(LO, "ingress", prog, mode="clsact", pin=bpffs / "hook")
        fresh = attach_tc(LO, "ingress", loaded.program("emit"), mode="tcx")
        pin_fd(fresh.fd, bpffs / "hook", "link")
        fresh.close()
        assert len(ids("ingress")) == 2
        attach_tc(LO, "ingress", prog, mode="tcx", pin=bpffs / "hook")
        assert ids("ingress") == [("tcx", prog.id)]
        detach_tc(LO, "ingress", bpffs / "hook")

    in_netns(work)


def test_others_stay(loaded: Object, bpffs: Path, in_netns: InNetns, need_tcx: None) -> None:
    def work() -> None:
        theirs, ours = loaded.program("emit"), loaded.program("generation")
        foreign = attach_tc(LO, "ingress", theirs, mode="tcx")
        theirs.pin(bpffs / "theirs")
        for command in (
            "qdisc add dev lo clsact",
            f"filter add dev lo ingress prio 1 handle 7 bpf da object-pinned {bpffs}/theirs",
        ):
            subprocess.run(["tc", *command.split()], check=True)
        there = ids("ingress")
        assert [kind for kind, _ in there] == ["tcx", "clsact"]
        for mode in MODES:
            attach_tc(LO, "ingress", ours, mode=mode, pin=bpffs / "hook")
            assert len(ids("ingress")) == 3
            attach_tc(LO, "ingress", ours, mode=mode, pin=bpffs / "hook").detach()
            assert ids("ingress") == there
        front = attach_tc(LO, "ingress", ours, mode="tcx", first=True)
        assert ids("ingress")[0] == ("tcx", ours.id)
        front.close()
        foreign.close()

    in_netns(work)


@pytest.mark.parametrize("mode", MODES)
def test_replacement_under_traffic_loses_nothing(
    build: Build, bpffs: Path, in_netns: InNetns, need_tcx: None, mode: RealMode
) -> None:
    wanted = 500 if mode == "tcx" else 25

    def work() -> None:
        objects = [Object.open(build(f"g{n}", f"GENERATION={n}"), pin_dir=bpffs) for n in (3, 4)]
        for obj in objects:
            obj.load()
        progs = [obj.program("generation") for obj in objects]
        link = attach_tc(LO, "ingress", progs[0], mode=mode, pin=bpffs / "hook")
        seen = objects[0].map("t_hash")
        seen.update(bytes(4), bytes(8))
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
        receiver.bind(("127.0.0.1", 0))
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        address = receiver.getsockname()
        receiver.settimeout(5)
        stop = threading.Event()
        arrived: list[bytes] = []

        def flood() -> None:
            while not stop.is_set():
                number = len(arrived).to_bytes(4, "little")
                sender.sendto(number, address)
                if receiver.recv(16) != number:
                    return
                arrived.append(number)

        # threads inherit the namespace of the one that starts them; so do its sockets
        thread = threading.Thread(target=flood)
        thread.start()
        n = 0
        while thread.is_alive() and (n < wanted or len(arrived) < 1000):
            link.replace(progs[n % 2])
            n += 1
        alive = thread.is_alive()
        stop.set()
        thread.join()
        assert alive
        assert n >= wanted
        row = seen.lookup(bytes(4))
        assert row is not None
        # every packet met exactly one program
        assert int.from_bytes(row[:4], "little") == len(arrived)
        link.detach()
        receiver.close()
        sender.close()

    in_netns(work)


def test_a_pin_outlives_kill_9(
    build: Build, bpffs: Path, in_netns: InNetns, need_tcx: None
) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from cilia.bpf import Object, attach_tc\n"
        "o = Object.open(sys.argv[1], pin_dir=Path(sys.argv[2])); o.load()\n"
        "attach_tc(1, 'ingress', o.program('generation'), pin=Path(sys.argv[2]) / 'hook')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )

    def work() -> None:
        path = build("plain")
        result = subprocess.run([sys.executable, "-c", script, str(path), str(bpffs)], check=False)
        assert result.returncode == -signal.SIGKILL
        assert len(ids("ingress")) == 1
        link = Link.open_pinned(bpffs / "hook")
        assert (link.kind, link.ifindex, link.direction) == ("tcx", LO, "ingress")
        Map.open_pinned(bpffs / "t_hash")
        link.detach()
        assert ids("ingress") == []

    in_netns(work)


def test_a_link_whose_device_went_is_made_anew(
    loaded: Object, bpffs: Path, in_netns: InNetns, need_tcx: None
) -> None:
    def work() -> None:
        prog = loaded.program("generation")

        def device() -> int:
            subprocess.run(
                ["ip", "link", "add", "dum0", "type", "veth", "peer", "dum1"], check=True
            )
            return socket.if_nametoindex("dum0")

        old = attach_tc(device(), "ingress", prog, pin=bpffs / "hook")
        subprocess.run(["ip", "link", "del", "dum0"], check=True)
        assert Link.open_pinned(bpffs / "hook").ifindex == 0
        index = device()
        new = attach_tc(index, "ingress", prog, pin=bpffs / "hook")
        assert new.ifindex == index
        assert [a.prog_id for a in list_attached(index)] == [prog.id]
        old.close()
        subprocess.run(["ip", "link", "del", "dum0"], check=True)
        new.detach()
        assert names(bpffs) == set()
        clsact = attach_tc(device(), "ingress", prog, mode="clsact", pin=bpffs / "hook")
        subprocess.run(["ip", "link", "del", "dum0"], check=True)
        clsact.detach()
        assert names(bpffs) == set()

    in_netns(work)


def test_no_such_device(loaded: Object, in_netns: InNetns, need_tcx: None) -> None:
    def work() -> None:
        for mode in MODES:
            with pytest.raises(BpfError) as caught:
                attach_tc(4242, "ingress", loaded.program("generation"), mode=mode)
            assert caught.value.errno == errno.ENODEV
            assert caught.value.cure is not None

    in_netns(work)


def test_auto_uses_clsact_where_tcx_is_absent(
    loaded: Object, bpffs: Path, in_netns: InNetns, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's answer before 6.6, played back: this one cannot be made to give it."""

    def before_6_6(ifindex: int, attach_type: int) -> list[tuple[int, int]]:
        raise BpfError(errno.EINVAL, "query tcx")

    def work() -> None:
        monkeypatch.setattr(bpf_sys, "query_tcx", before_6_6)
        link = attach_tc(LO, "egress", loaded.program("generation"), pin=bpffs / "hook")
        assert link.kind == "clsact"
        assert [a.ours for a in list_attached(LO)] == [True]
        link.detach()

    in_netns(work)


@pytest.fixture
def cgroup(need_cgroup2: None) -> Iterator[Path]:
    root = cgroup2_root()
    assert root is not None
    path = Path(tempfile.mkdtemp(prefix=f"cilt-{os.getpid()}-", dir=root))
    try:
        yield path
    finally:
        path.rmdir()


def test_cgroup_hooks(build: Build, bpffs: Path, cgroup: Path) -> None:
    """Port 4711 is refused to a member, and to it only, until the hook is taken away."""
    script = (
        "import os, socket, sys\n"
        "open(sys.argv[1] + '/cgroup.procs', 'w').write(str(os.getpid()))\n"
        "try: socket.create_connection(('127.0.0.1', 4711), 2)\n"
        "except OSError as error: sys.exit(error.errno)\n"
    )

    def member() -> int:
        return subprocess.run([sys.executable, "-c", script, str(cgroup)], check=False).returncode

    def load(port: int) -> Program:
        obj = Object.open(build("plain"), rodata={"NUMBER": port})
        obj.load()
        return obj.program("refuse_connect4")

    hook = AttachType.CGROUP_INET4_CONNECT
    attach_cgroup(cgroup, hook, load(4711), pin=bpffs / "connect4").close()
    assert member() == errno.EPERM
    link = attach_cgroup(cgroup, hook, load(4712), pin=bpffs / "connect4")
    assert link.kind == "cgroup"
    assert member() == errno.ECONNREFUSED
    link.replace(load(4711))
    assert member() == errno.EPERM
    link.detach()
    assert member() == errno.ECONNREFUSED
    assert names(bpffs) == set()
