"""The policy engine: documents in, map states and explained verdicts out. Pure: no I/O, no asyncio,
no gRPC.

tree, schema, language   text -> documents or faults, all or nothing
selectors, requests      whom rules are about, and what proxies must enforce, as frozen types
api                      what documents say, as frozen types; it knows nothing of text
repository               documents by name, rules by subject, rule numbers
selectorcache            which identities a selector selects, incrementally
mapstate                 rows of a policy map and the kernel's lookup in them
l7                       what proxies must enforce for a row
program, live            what rules say of a subject; that, kept current with the identities
compiled                 yes or no to very many questions
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
    FQDNSelector,
    Kind,
    L7Rules,
    NamedPort,
    Origin,
    ParseResult,
    PortRule,
    Rule,
    RuleID,
    RuleRef,
    ServiceSelector,
)
from cilia.policy.engine import (
    Direction,
    Mode,
    PolicyEngine,
    ResolvedPolicy,
    RuleInfo,
    Service,
    Subject,
    Trace,
    Verdict,
    describe,
    is_node,
    is_subject,
)
from cilia.policy.l7 import ALL_PARSERS, L7Entry, L7Set
from cilia.policy.language import (
    VISIBILITY_ANNOTATION,
    document_from_json,
    document_from_parts,
    parse_documents,
    parse_visibility,
    visibility_text,
)
from cilia.policy.mapstate import Delta, MapState, Match, PolicyEntry, PolicyKey
from cilia.policy.program import Unenforced, Unseen
from cilia.policy.repository import Repository
from cilia.policy.selectorcache import SelectorCache

__all__ = [
    "ALL_PARSERS",
    "PROTO_BY_NAME",
    "PROTO_NAMES",
    "VISIBILITY_ANNOTATION",
    "Delta",
    "Direction",
    "Document",
    "DocumentError",
    "DocumentKey",
    "Element",
    "EndpointSelector",
    "FQDNSelector",
    "Fault",
    "Kind",
    "L7Entry",
    "L7Rules",
    "L7Set",
    "MapState",
    "Match",
    "Mode",
    "NamedPort",
    "Origin",
    "ParseResult",
    "PolicyEngine",
    "PolicyEntry",
    "PolicyKey",
    "PortRule",
    "Repository",
    "ResolvedPolicy",
    "Rule",
    "RuleID",
    "RuleInfo",
    "RuleRef",
    "SelectorCache",
    "Service",
    "ServiceSelector",
    "Subject",
    "Trace",
    "Unenforced",
    "Unseen",
    "Verdict",
    "describe",
    "document_from_json",
    "document_from_parts",
    "is_node",
    "is_subject",
    "parse_documents",
    "parse_visibility",
    "visibility_text",
]
