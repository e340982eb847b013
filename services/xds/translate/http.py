"""The seam to the rest of the service: redirects as the agent says them, items as the cache wants
them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Final

from cilia.policy.api import HeaderMatch, HTTPRule, Mismatch, TLSContext
from protos.xds.v1 import xds_pb2 as pb
from services.xds.resources import TypeURL
from services.xds.translate import translate
from services.xds.translate.model import (
    Direction,
    NodeSettings,
    Redirect,
    Rule,
    RuleRefused,
    RuleSet,
    SecretReader,
    no_secrets,
)
from services.xds.translator import Item, Translation, Untranslatable

_DIRECTIONS: Final = {
    pb.INGRESS: Direction.INGRESS,
    pb.EGRESS: Direction.EGRESS,
    pb.BOTH: Direction.BOTH,
}
_MISMATCHES: Final[tuple[Mismatch, ...]] = ("", "LOG", "ADD", "DELETE", "REPLACE")


class HttpTranslator:
    """A Translator (see translator.py)."""

    def __init__(self, settings: NodeSettings, secrets: SecretReader = no_secrets) -> None:
        self._settings = settings
        self._secrets = secrets

    def base(self) -> Collection[Item]:
        return [_item(resource) for resource in translate.base(self._settings)]

    def translate(self, redirect: pb.Redirect) -> Translation:
        """Raises Untranslatable."""
        try:
            wanted = redirect_from_proto(redirect)
            made = translate.translate(wanted, self._settings, self._secrets)
        except RuleRefused as error:
            raise Untranslatable(error.message, cure=error.cure) from error
        return Translation(
            items=tuple(_item(resource) for resource in made),
            rules=(TypeURL(translate.ROUTES), wanted.name),
        )


def with_addresses(settings: NodeSettings, ipv4: str, ipv6: str) -> NodeSettings:
    """The settings of a node whose Envoy reaches local endpoints from these addresses."""
    return replace(settings, ingress_sources=tuple(x for x in (ipv4, ipv6) if x))


def redirect_from_proto(message: pb.Redirect) -> Redirect:
    """Raises RuleRefused."""
    direction = _DIRECTIONS.get(message.direction)
    if direction is None or (direction is Direction.BOTH) != message.HasField("ingress_rules"):
        raise RuleRefused(f"redirect {message.port}: its direction and rule sets do not fit")
    return Redirect(
        port=message.port,
        direction=direction,
        digest=message.digest,
        rules=_rules(message.rules),
        ingress_rules=_rules(message.ingress_rules) if direction is Direction.BOTH else None,
    )


def _rules(message: pb.RuleSet) -> RuleSet:
    return RuleSet(
        parser=message.parser,
        rules=tuple(_rule(rule) for rule in message.rules),
        originating_tls=(
            _tls(message.originating_tls) if message.HasField("originating_tls") else None
        ),
        terminating_tls=(
            _tls(message.terminating_tls) if message.HasField("terminating_tls") else None
        ),
        server_names=tuple(message.server_names),
        digest=message.digest,
    )


def _rule(message: pb.L7Rule) -> Rule:
    kind = message.WhichOneof("rule")
    if kind is None:
        return Rule(message.rule_id, None, message.policy)
    if kind != "http":
        raise RuleRefused(f"rule {message.rule_id}: Envoy enforces no {kind} rules")
    http = message.http
    rule = HTTPRule(
        method=http.method,
        path=http.path,
        host=http.host,
        headers=tuple(http.headers),
        header_matches=tuple(_match(message.rule_id, x) for x in http.header_matches),
    )
    return Rule(message.rule_id, rule, message.policy)


def _match(rule_id: int, message: pb.HeaderMatch) -> HeaderMatch:
    for mismatch in _MISMATCHES:
        if message.mismatch == mismatch:
            secret = message.secret
            return HeaderMatch(
                name=message.name,
                value=message.value,
                mismatch=mismatch,
                secret=(secret.namespace, secret.name) if message.HasField("secret") else None,
            )
    raise RuleRefused(f"rule {rule_id}: mismatch action {message.mismatch[:20]!r} is unknown")


def _tls(context: pb.TLSContext) -> TLSContext:
    return TLSContext(
        secret=(context.secret.namespace, context.secret.name),
        trusted_ca=context.trusted_ca,
        certificate=context.certificate,
        private_key=context.private_key,
    )


def _item(resource: translate.Resource) -> Item:
    return Item(TypeURL(resource.type_url), resource.name, resource.message)
