"""Where packets are seen and how policy rows match, by their numbers in events, in Cilium's words.

The numbers are TRACE_* and MATCH_* of bpf/lib/types.h. They stand here and not in `cilia.bpf`
because the command shows flows without loading what talks to the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

POINTS: Final[Mapping[int, str]] = dict(
    enumerate(
        (
            "to-endpoint", "to-proxy", "to-host", "to-stack", "to-overlay", "from-endpoint",
            "from-proxy", "from-host", "from-stack", "from-overlay", "from-network", "to-network",
        )
    )
)  # fmt: skip
MATCHES: Final[Mapping[int, str]] = dict(
    enumerate(("none", "L3-Only", "L3-L4", "L4-Only", "all", "L3-Proto", "Proto-Only"))
)
