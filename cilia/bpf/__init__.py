"""eBPF from Python: libbpf through ctypes, pinned maps, attachments, the event ring, probing.

Everything privileged that Cilia does with eBPF is in this package; it imports nothing else of
ours but cilia.net's reader of netlink.
"""

from cilia.bpf import probe
from cilia.bpf.attach import (
    Attachment,
    Link,
    attach_cgroup,
    attach_tc,
    detach_tc,
    list_attached,
)
from cilia.bpf.errors import BpfError, LayoutError, MigrationRefused, VerifierError
from cilia.bpf.layout import LayoutSet
from cilia.bpf.map import Map, MapDefinition
from cilia.bpf.migrate import MapPolicy, Migration, OnChange
from cilia.bpf.object import Object, load_all
from cilia.bpf.program import Program, SkBuffCtx, TestRun
from cilia.bpf.ring import RingReader

__all__ = [
    "Attachment",
    "BpfError",
    "LayoutError",
    "LayoutSet",
    "Link",
    "Map",
    "MapDefinition",
    "MapPolicy",
    "Migration",
    "MigrationRefused",
    "Object",
    "OnChange",
    "Program",
    "RingReader",
    "SkBuffCtx",
    "TestRun",
    "VerifierError",
    "attach_cgroup",
    "attach_tc",
    "detach_tc",
    "list_attached",
    "load_all",
    "probe",
]
