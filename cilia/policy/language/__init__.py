"""Text to documents: the policy language, a module a concept.

    text ──tree──▶ nodes with places ──schema, over the models here──▶ the types of cilia.policy.api

    selectors    label selectors          networks   CIDRs, and lists of them with exceptions
    requests     L7 rules, TLS contexts   ports      ports, port rules, ICMP types
    elements     one entry of a rule      rules      one spec
    scope        what a namespace adds    kubernetes NetworkPolicy
    visibility   endpoints' annotation    documents  kinds, metadata, many documents, stored ones

`parse_documents` takes text from anywhere and never raises: it gives documents or faults, all or
nothing, every fault at once with its place.
"""

from cilia.policy.language.documents import (
    document_from_json,
    document_from_parts,
    parse_documents,
)
from cilia.policy.language.visibility import (
    VISIBILITY_ANNOTATION,
    parse_visibility,
    visibility_text,
)

__all__ = [
    "VISIBILITY_ANNOTATION",
    "document_from_json",
    "document_from_parts",
    "parse_documents",
    "parse_visibility",
    "visibility_text",
]
