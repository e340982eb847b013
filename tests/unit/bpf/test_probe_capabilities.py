"""What is asked of a process is what this kernel needs of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

ASK = """
import json
from cilia.bpf import probe
print(json.dumps({f.name: [f.present, f.detail] for f in probe.features()}))
"""


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv (util-linux)")
@pytest.mark.usefixtures("need_bpf")
def test_the_limit_on_locked_memory_matters_to_old_kernels_only() -> None:
    words = ["setpriv", "--bounding-set=-sys_resource", "--inh-caps=-sys_resource"]
    done = subprocess.run(
        [*words, sys.executable, "-c", ASK], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    newer, _ = found["bpf_ktime_get_coarse_ns"]  # of 5.11, as the accounting by cgroup is
    present, detail = found["CAP_SYS_RESOURCE"]
    assert present is newer
    assert "effective" not in detail
