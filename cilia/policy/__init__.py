"""The policy engine: documents in, map states and explained verdicts out. Pure: no I/O, no asyncio,
no gRPC.

tree, schema, language   text -> documents or faults, all or nothing
api                      what documents say, as frozen types
repository               documents by name, rules by subject, rule numbers
selectorcache            which identities a selector selects, incrementally
mapstate                 rows of a policy map and the kernel's lookup in them
engine                   puts the above together and answers questions
"""

from cilia.policy.api import (
    PROTO_BY_NAME,
    PROTO_NAMES,
    Document,
    DocumentError,
    DocumentKey,
    Element,
    EndpointSelector,
    Fault,
    Kind,
    Origin,
    ParseResult,
    Rule,
    RuleID,
    RuleRef,
)
from cilia.policy.engine import (
    Direction,
    Mode,
    PolicyEngine,
    ResolvedPolicy,
    RuleInfo,
    Trace,
    Unenforced,
    Verdict,
    describe,
    is_subject,
)
from cilia.policy.language import parse_documents
from cilia.policy.mapstate import Delta, MapState, Match, PolicyEntry, PolicyKey
from cilia.policy.repository import Repository
from cilia.policy.selectorcache import SelectorCache

__all__ = [
    "PROTO_BY_NAME",
    "PROTO_NAMES",
    "Delta",
    "Direction",
    "Document",
    "DocumentError",
    "DocumentKey",
    "Element",
    "EndpointSelector",
    "Fault",
    "Kind",
    "MapState",
    "Match",
    "Mode",
    "Origin",
    "ParseResult",
    "PolicyEngine",
    "PolicyEntry",
    "PolicyKey",
    "Repository",
    "ResolvedPolicy",
    "Rule",
    "RuleID",
    "RuleInfo",
    "RuleRef",
    "SelectorCache",
    "Trace",
    "Unenforced",
    "Verdict",
    "describe",
    "is_subject",
    "parse_documents",
]
