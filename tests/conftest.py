"""What every test may ask for, and what no test may leave behind.

Capability fixtures (`need_root`, `need_bpf`, ...) try the thing itself. Where it is missing the
test is skipped with the reason; under REQUIRE_KERNEL=1, which CI sets, it fails instead, so a
machine that lost a feature cannot turn the suite green by skipping it.

When the session ends this module compares the machine with what it was at the start: network
namespaces, links, bpffs mounts, cgroups and processes of ours that are new make the run fail. Other
runs may share the machine, so a name that carries a pid (`cilt-<pid>-`) counts only if the pid is
one of this run's, and a process only if it carries this run's mark in its environment.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import shutil
import signal
import socket
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

# A shared machine stalls now and then: how long an example takes says nothing of the code.
settings.register_profile("cilia", deadline=None)
settings.load_profile("cilia")

# A shell without job control starts what runs in the background with SIGINT ignored, which is
# inherited: tests that interrupt a command would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REQUIRE_KERNEL = os.environ.get("REQUIRE_KERNEL") == "1"
MARK = "CILIA_TEST_SESSION"
REPOSITORY = Path(__file__).resolve().parent.parent

Probe = Callable[[], str | None]
"""Returns None when the capability is there, otherwise why it is not, with the cure."""


# ---- capabilities


def _root() -> str | None:
    return None if os.geteuid() == 0 else "needs root: namespaces and eBPF are the kernel's"


def _bpf_syscall(command: int, attributes: bytes) -> int:
    """bpf(2); the file descriptor, or minus errno. x86_64 and aarch64 numbers."""
    number = {"x86_64": 321, "aarch64": 280}.get(os.uname().machine)
    if number is None:
        return -38  # ENOSYS
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(attributes.ljust(128, b"\0"), 128)
    result = libc.syscall(number, command, buffer, 128)
    return result if result >= 0 else -ctypes.get_errno()


def _bpf() -> str | None:
    if reason := _root():
        return reason
    # BPF_MAP_CREATE of an array: type 2, key 4, value 4, one entry.
    fd = _bpf_syscall(0, b"".join(n.to_bytes(4, "little") for n in (2, 4, 4, 1)))
    if fd < 0:
        return f"bpf(2) refused a map: {os.strerror(-fd)}; needs CAP_BPF and CAP_NET_ADMIN"
    os.close(fd)
    try:
        ctypes.CDLL("libbpf.so.1")
    except OSError as error:
        return f"needs libbpf.so.1 ({error}): run make setup"
    return None


def _kernel(major: int, minor: int, what: str) -> str | None:
    match = re.match(r"(\d+)\.(\d+)", os.uname().release)
    assert match is not None
    found = (int(match[1]), int(match[2]))
    if found >= (major, minor):
        return None
    return f"{what} needs Linux {major}.{minor}; this is {os.uname().release}"


def _redirect_peer() -> str | None:
    return _bpf() or _kernel(5, 10, "bpf_redirect_peer")


def _tcx() -> str | None:
    # No cheap attempt exists that touches no device; the hook came whole in 6.6.
    return _bpf() or _kernel(6, 6, "tcx")


def _netns() -> str | None:
    if reason := _root():
        return reason
    libc = ctypes.CDLL(None, use_errno=True)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if libc.unshare(0x40000000) == 0 else ctypes.get_errno())  # CLONE_NEWNET
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return None if code == 0 else f"cannot make a network namespace: {os.strerror(code)}"


def _bpffs() -> str | None:
    if reason := _root():
        return reason
    if "\tbpf\n" not in Path("/proc/filesystems").read_text():
        return "needs the bpf file system (CONFIG_BPF_SYSCALL)"
    return None


def _cgroup2() -> str | None:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if " - cgroup2 " in line and os.access(line.split()[4], os.W_OK):
            return None
    return "needs a writable cgroup2 mount"


def _ipv6() -> str | None:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
        probe.bind(("::1", 0))
        return None
    return "needs IPv6 (sysctl net.ipv6.conf.all.disable_ipv6=0)"


def _program(name: str, package: str) -> Probe:
    def probe() -> str | None:
        if shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"):
            return None
        return f"needs {name}: apt-get install {package}"

    return probe


def _objects() -> str | None:
    if any((REPOSITORY / "build" / "bpf").glob("*.o")):
        return None
    return "needs the compiled eBPF objects: run make bpf"


def _capability(probe: Probe) -> Callable[[], None]:
    def need() -> None:
        if reason := probe():
            if REQUIRE_KERNEL:
                pytest.fail(f"REQUIRE_KERNEL=1, but this machine {reason}", pytrace=False)
            pytest.skip(reason)

    return need


def _fixture(name: str, probe: Probe) -> Callable[[], None]:
    return pytest.fixture(scope="session", name=name)(_capability(probe))


fixture_root = _fixture("need_root", _root)
fixture_bpf = _fixture("need_bpf", _bpf)
fixture_redirect_peer = _fixture("need_redirect_peer", _redirect_peer)
fixture_tcx = _fixture("need_tcx", _tcx)
fixture_netns = _fixture("need_netns", _netns)
fixture_bpffs = _fixture("need_bpffs", _bpffs)
fixture_cgroup2 = _fixture("need_cgroup2", _cgroup2)
fixture_ipv6 = _fixture("need_ipv6", _ipv6)
fixture_objects = _fixture("need_objects", _objects)
fixture_clang = _fixture("need_clang", _program("clang", "clang"))
fixture_nft = _fixture("need_nft", _program("nft", "nftables"))
fixture_iperf3 = _fixture("need_iperf3", _program("iperf3", "iperf3"))
fixture_ping = _fixture("need_ping", _program("ping", "iputils-ping"))
fixture_curl = _fixture("need_curl", _program("curl", "curl"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of this tree."""
    return REPOSITORY


@pytest.fixture
def unique(request: pytest.FixtureRequest) -> Iterator[Callable[[str], str]]:
    """Names for namespaces and directories that no other run uses: cilt-<pid>-<counter><suffix>.

    At most 15 characters are left to a link's name by the kernel; these are for namespaces.
    """
    counter = 0

    def name(suffix: str = "") -> str:
        nonlocal counter
        counter += 1
        return f"cilt-{os.getpid()}-{_sequence(request.node.nodeid)}{counter}{suffix}"

    return (yield name)


def _sequence(nodeid: str) -> str:
    return f"{sum(nodeid.encode()) % 1000:03d}"


# ---- workers


class _Scheduling(LoadFileScheduling):  # type: ignore[misc]  # xdist ships no types
    """A file is one worker's; so are all end-to-end tests, each of which may look at the machine
    as its user does: which labs are there, and what a lab left outside of its namespaces."""

    def _split_scope(self, nodeid: str) -> str:
        return "tests/e2e" if nodeid.startswith("tests/e2e/") else super()._split_scope(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    return _Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


# ---- leaks


def _namespaces() -> set[str]:
    return {
        f"namespace {entry.name}"
        for entry in _entries(Path("/run/netns"))
        if entry.name.startswith(("cil-", "cilt-", "cilia-"))
    }


def _links() -> set[str]:
    return {
        f"link {entry.name}"
        for entry in _entries(Path("/sys/class/net"))
        if re.match(r"cil\d{5}$|cilia_|cilt|cil-", entry.name)
    }


def _mounts() -> set[str]:
    found = set()
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point, kind = line.split()[4], line.split(" - ")[1].split()[0]
        if kind == "bpf" and re.search(r"/cil(ia|t|-)", point):
            found.add(f"mount {point}")
    return found


def _cgroups() -> set[str]:
    found = set()
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if " - cgroup2 " in line:
            for entry in _entries(Path(line.split()[4])):
                if entry.is_dir() and re.match(r"cil(ia|t)?-?", entry.name):
                    # The parent of all labs is of whichever came first; each has its own below.
                    own = [entry] if entry.name != "cilia-lab" else _entries(entry)
                    found |= {f"cgroup {path}" for path in own if path.is_dir()}
    return found


def _entries(directory: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return list(directory.iterdir())
    return []


def _processes(mark: str) -> dict[int, str]:
    """Processes of this session besides this one: they inherited its mark."""
    wanted = f"{MARK}={mark}".encode()
    found = {}
    for entry in _entries(Path("/proc")):
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                if command:  # else a zombie: it is over
                    found[int(entry.name)] = command.decode(errors="replace").strip()
    return found


def _snapshot() -> set[str]:
    return _namespaces() | _links() | _mounts() | _cgroups()


def _of_another_run(leak: str) -> bool:
    match = re.search(r"(?:cil[t-]-?|\be2e)(\d+)\b", leak)
    return match is not None and int(match[1]) not in _pids


_before: set[str] = set()
_mark = ""
_pids = {os.getpid(), os.getppid()}


def pytest_sessionstart(session: pytest.Session) -> None:
    global _mark
    if hasattr(session.config, "workerinput"):  # a worker of pytest-xdist: the controller checks
        return
    _mark = uuid.uuid4().hex
    os.environ[MARK] = _mark
    _before.update(_snapshot())
    # Ring buffers and large maps: before Linux 5.11 they count against the locked-memory limit.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY,) * 2)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """A worker has ended, and said whose names are its own."""
    with contextlib.suppress(AttributeError, KeyError):  # one that crashed said nothing
        _pids.add(node.workeroutput["pid"])


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if not _mark:
        if output := getattr(session.config, "workeroutput", None):
            output["pid"] = os.getpid()
        return
    leaks = sorted(leak for leak in _snapshot() - _before if not _of_another_run(leak))
    leaks += [f"process {pid}: {command}" for pid, command in _processes(_mark).items()]
    if leaks:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.write_sep("=", "left behind by this run", red=True, bold=True)
            for leak in leaks:
                reporter.write_line(f"LEAK {leak}", red=True)
