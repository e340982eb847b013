"""Questions to the policy that is in force, answered by the code that judges packets.

The programs of bpf_audit.o are attached to nothing: no packet reaches them, and a question leaves
no trace (BPF_PROG_TEST_RUN, no conntrack entry, event, counter or hit). Questions and answers are
rows of `layout.AUDIT_CELL`; bpf/lib/types.h says what their fields mean.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from cilia.bpf.constants import AUDIT_CELLS
from cilia.bpf.layout import AUDIT_CELL
from cilia.bpf.program import Program

Cells = npt.NDArray[Any]  # of AUDIT_CELL

_FRAME = bytes(12) + b"\x88\xb5"  # an Ethernet header; IEEE 802 local experimental EtherType


class Auditor:
    """Runs both programs, one run at a time: they share a scratch map."""

    def __init__(self, policy: Program, selftest: Program) -> None:
        self._policy = policy
        self._selftest = selftest
        self._lock = threading.Lock()

    def ask(self, cells: Cells) -> Cells:
        """The cells with their answers. Raises BpfError; ValueError for a cell without a slot."""
        if not cells["policy_slot"].all():
            raise ValueError("a question without a policy slot ends the list")
        answers = np.empty(len(cells), AUDIT_CELL)
        for start in range(0, len(cells), AUDIT_CELLS):
            some = cells[start : start + AUDIT_CELLS]
            answers[start : start + len(some)] = self._run(self._policy, some)
        return answers

    def try_aloud(self, cell: Cells) -> Cells:
        """Judge one cell as of a packet; if it is denied and only audited, an event says so."""
        return self._run(self._selftest, cell)

    def _run(self, program: Program, cells: Cells) -> Cells:
        frame = (_FRAME + cells.tobytes()).ljust(64, b"\0")
        with self._lock:
            out = program.test_run(frame, room=0).data_out
        answers = np.frombuffer(out, AUDIT_CELL, len(cells), len(_FRAME))
        if not answers["answered"].all():
            raise RuntimeError(f"{program.name} left questions unanswered")
        return answers
