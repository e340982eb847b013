"""A virtual machine that runs one command under another kernel, and ends with it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from tests.datapath.harness import build_objects
from tests.kernels import initramfs
from tests.kernels.packages import REPOSITORY, Kernel, Unavailable

QEMU: Final = "qemu-system-x86_64"
MEMORY_MIB: Final = 3072
PYTHON: Final = str(REPOSITORY / ".venv" / "bin" / "python")
CHECKS: Final = (PYTHON, "-m", "tests.kernels.inside")
STATUS: Final = {124: "it ran out of time", 125: "it ended without a status: a panic, most likely"}


def _program(name: str, package: str) -> Path:
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:/bin")
    if found is None:
        raise Unavailable(f"needs {name}: apt-get install {package}")
    return Path(found)


def _busybox() -> Path:
    path = _program("busybox", "busybox-static")
    head = path.read_bytes()
    if b"/ld-linux" in head or b"/ld-musl" in head:
        raise Unavailable(f"{path} is linked dynamically: apt-get install busybox-static")
    return path


def needs() -> None:
    """Unavailable, unless the programs are there."""
    _program(QEMU, "qemu-system-x86")
    _busybox()
    _program("depmod", "kmod")
    # the guest's kernel loads veth, cls_bpf and sch_ingress by it when they are first used
    _program("modprobe", "kmod")


def _guest_command(command: Sequence[str], environment: dict[str, str]) -> str:
    variables = {
        "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/tmp",
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        **environment,
    }
    exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
    # The second serial port carries the status and nothing else; sysrq ends the machine at once.
    return (
        f"cd {shlex.quote(str(REPOSITORY))} && env -i {exports} {shlex.join(command)}"
        " >/dev/console 2>&1; echo $? >/dev/ttyS1; sync; echo o >/proc/sysrq-trigger; sleep 60"
    )


def run(
    kernel: Kernel,
    command: Sequence[str],
    *,
    environment: dict[str, str] | None = None,
    accelerator: str = "tcg",
    timeout_s: float = 1800,
    output: Callable[[bytes], object] | None = None,
) -> int:
    """Boot `kernel`, run `command` in this tree, hand its output on as it comes, and return its
    status; 125 when the guest ended without one (a panic), 124 after `timeout_s`.
    """
    needs()
    build_objects()
    write = output or _to_stdout
    with tempfile.TemporaryDirectory(prefix="cilt-kernel-") as scratch:
        initrd = Path(scratch) / "initrd"
        status = Path(scratch) / "status"
        guest = _guest_command(command, environment or {})
        initrd.write_bytes(initramfs.build(kernel, _busybox(), guest))
        arguments = [
            # a runner that is killed takes its guest along
            *("setpriv", "--pdeathsig", "KILL"),
            *(QEMU, "-M", "q35", "-m", str(MEMORY_MIB), "-smp", "2"),
            *("-accel", "tcg,thread=multi" if accelerator == "tcg" else accelerator),
            *("-cpu", "max" if accelerator == "tcg" else "host"),
            *("-display", "none", "-monitor", "none", "-nic", "none", "-no-reboot"),
            *("-serial", "stdio", "-serial", f"file:{status}"),
            *("-device", "virtio-rng-pci"),
            "-virtfs",
            "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap",
            *("-kernel", str(kernel.image), "-initrd", str(initrd)),
            "-append",
            "console=ttyS0 loglevel=4 panic=-1 oops=panic random.trust_cpu=on mitigations=off"
            # emulated timers are late on a busy machine: the check for broken ones would stop here
            " no_timer_check tsc=unstable",
        ]
        machine = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
        )
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            machine.kill()

        timer = threading.Timer(timeout_s, expire)
        timer.start()
        try:
            assert machine.stdout is not None  # asked for
            with machine.stdout as console:
                while chunk := console.read(4096):
                    write(chunk)
            machine.wait()
        finally:
            timer.cancel()
            if machine.poll() is None:
                machine.kill()
            machine.wait()
        if expired.is_set():
            return 124
        told = status.read_text().strip() if status.exists() else ""
        return int(told) if told.isdigit() else 125


def _to_stdout(chunk: bytes) -> None:
    sys.stdout.buffer.write(chunk.replace(b"\r\n", b"\n"))
    sys.stdout.buffer.flush()
