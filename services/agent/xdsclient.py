"""The xds service as the agent sees it: redirects out, their states back, and what requests there
were.

    Redirects --snapshot, then changes--> RedirectService.Sync --states--> Redirects
    AccessLogService.Records --batches--> L7 records, as messages: they are handed on as they are
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from pathlib import Path
from typing import Final, Literal

from cilia.errors import Kind, UnavailableError
from cilia.policy import L7Set
from cilia.policy.api import DNSRule, GenericRule, HTTPRule, KafkaRule, L7Rule, TLSContext
from cilia.rpc.channel import connect
from cilia.rpc.errors import RpcError
from protos.xds.v1 import xds_pb2, xds_pb2_grpc
from services.agent.redirects import Listener, ListenerState, Redirects

_STATES: Final[dict[int, Literal["pending", "acked", "failed", "removed"]]] = {
    xds_pb2.RedirectState.PENDING: "pending",
    xds_pb2.RedirectState.ACKED: "acked",
    xds_pb2.RedirectState.FAILED: "failed",
    xds_pb2.RedirectState.REMOVED: "removed",
}
_DIRECTIONS: Final = {
    "ingress": xds_pb2.INGRESS,
    "egress": xds_pb2.EGRESS,
    "both": xds_pb2.BOTH,
}
_CONNECT_S: Final = 5.0


class XdsUnavailable(UnavailableError):
    default_cure = "Start the xds service; the agent tries again by itself"

    def __init__(self, why: str) -> None:
        super().__init__(f"the xds service is not available: {why}")


class XdsClient:
    """One channel; one stream of redirects at a time."""

    def __init__(self, socket: Path, *, node: str, addresses: Collection[str]) -> None:
        self._socket = socket
        self._node = node
        self._addresses = tuple(addresses)
        self._channel = connect(socket, service="xds", deadline_s=_CONNECT_S)
        self._redirects = xds_pb2_grpc.RedirectServiceStub(self._channel)
        self._records = xds_pb2_grpc.AccessLogServiceStub(self._channel)

    async def close(self) -> None:
        await self._channel.close(grace=0.2)

    async def sync(
        self,
        redirects: Redirects,
        *,
        changed: asyncio.Event,
        policy_text: Callable[[int], str],
        on_states: Callable[[list[ListenerState]], None],
        on_sent: Callable[[], None],
    ) -> None:
        """Keeps the service told until it goes away. Raises XdsUnavailable."""
        sequence = 0

        def message(listeners: Iterable[Listener], removed: Iterable[int]) -> xds_pb2.SyncRequest:
            nonlocal sequence
            sequence += 1
            request = xds_pb2.SyncRequest(sequence=sequence, removed=removed)
            for listener in listeners:
                listener.sent = sequence
                request.upserts.append(_redirect(listener, policy_text))
            return request

        async def requests() -> AsyncIterator[xds_pb2.SyncRequest]:
            changed.clear()
            first = message(*redirects.snapshot())
            first.node.CopyFrom(
                xds_pb2.Node(
                    name=self._node,
                    ipv4=next((a for a in self._addresses if ":" not in a), ""),
                    ipv6=next((a for a in self._addresses if ":" in a), ""),
                )
            )
            first.synced = True
            on_sent()
            yield first
            while True:
                await changed.wait()
                changed.clear()
                listeners, removed = redirects.take_changes()
                if listeners or removed:
                    yield message(listeners, removed)

        call = self._redirects.Sync(requests())
        try:
            async for reply in call:
                on_states([_state(state) for state in reply.states])
        except RpcError as error:
            raise _translated(error) from error
        finally:
            call.cancel()
        raise XdsUnavailable("it ended the stream")

    async def records(self) -> AsyncIterator[xds_pb2.L7Batch]:
        """What the proxy logs from now on. Ends by raising XdsUnavailable."""
        call = self._records.Records(xds_pb2.RecordsRequest())
        try:
            async for batch in call:
                yield batch
        except RpcError as error:
            raise _translated(error) from error
        finally:
            call.cancel()
        raise XdsUnavailable("it ended the access log")


def _translated(error: RpcError) -> Exception:
    if error.kind in (Kind.UNAVAILABLE, Kind.DEADLINE):
        return XdsUnavailable(error.message)
    return error


# ---- to and from messages


def _state(state: xds_pb2.RedirectState) -> ListenerState:
    return ListenerState(
        port=state.port,
        digest=state.digest,
        state=_STATES.get(state.state, "pending"),
        message=state.message,
        version=state.version,
        sequence=state.sequence,
    )


def _redirect(listener: Listener, policy_text: Callable[[int], str]) -> xds_pb2.Redirect:
    redirect = xds_pb2.Redirect(
        port=listener.port,
        digest=listener.digest,
        direction=_DIRECTIONS[listener.direction],
    )
    first = listener.egress if listener.egress is not None else listener.ingress
    assert first is not None
    redirect.rules.CopyFrom(_rules(first, policy_text))
    if listener.direction == "both" and listener.ingress is not None:
        redirect.ingress_rules.CopyFrom(_rules(listener.ingress, policy_text))
    return redirect


def _rules(rules: L7Set, policy_text: Callable[[int], str]) -> xds_pb2.RuleSet:
    return xds_pb2.RuleSet(
        parser=rules.parser,
        digest=rules.digest,
        rules=[_rule(entry.rule_id, entry.rule, policy_text) for entry in rules.rules],
        originating_tls=_tls(rules.originating_tls),
        terminating_tls=_tls(rules.terminating_tls),
        server_names=rules.server_names,
    )


def _tls(context: TLSContext | None) -> xds_pb2.TLSContext | None:
    if context is None:
        return None
    namespace, name = context.secret
    return xds_pb2.TLSContext(
        secret=xds_pb2.SecretRef(namespace=namespace, name=name),
        trusted_ca=context.trusted_ca,
        certificate=context.certificate,
        private_key=context.private_key,
    )


def _rule(rule_id: int, rule: L7Rule | None, policy_text: Callable[[int], str]) -> xds_pb2.L7Rule:
    message = xds_pb2.L7Rule(rule_id=rule_id, policy=policy_text(rule_id))
    match rule:
        case HTTPRule():
            message.http.CopyFrom(
                xds_pb2.HTTPRule(
                    method=rule.method,
                    path=rule.path,
                    host=rule.host,
                    headers=rule.headers,
                    header_matches=[
                        xds_pb2.HeaderMatch(
                            name=match.name,
                            value=match.value,
                            mismatch=match.mismatch,
                            secret=None
                            if match.secret is None
                            else xds_pb2.SecretRef(namespace=match.secret[0], name=match.secret[1]),
                        )
                        for match in rule.header_matches
                    ],
                )
            )
        case KafkaRule():
            message.kafka.CopyFrom(
                xds_pb2.KafkaRule(
                    role=rule.role,
                    api_key=rule.api_key,
                    api_version=rule.api_version,
                    client_id=rule.client_id,
                    topic=rule.topic,
                )
            )
        case DNSRule():
            message.dns.CopyFrom(
                xds_pb2.DNSRule(match_name=rule.match_name, match_pattern=rule.match_pattern)
            )
        case GenericRule():
            message.generic.fields.update(dict(rule.fields))
            message.generic.SetInParent()
        case None:
            pass
    return message
