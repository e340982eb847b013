"""Between the peer service's messages and what is known of nodes."""

from __future__ import annotations

from google.protobuf.message import DecodeError

from protos.hubble.v1 import peer_pb2
from services.flows.relay.info import PeerInfo, with_port


def apply_notification(known: dict[str, PeerInfo], message: bytes) -> None:
    """Change what is known by one ChangeNotification. Raises ValueError when it is none."""
    try:
        change = peer_pb2.ChangeNotification.FromString(message)
    except DecodeError as error:
        raise ValueError(f"a notification that cannot be read: {error}") from error
    if change.type == peer_pb2.PEER_DELETED:
        known.pop(change.name, None)
    elif change.type in (peer_pb2.PEER_ADDED, peer_pb2.PEER_UPDATED) and change.name:
        known[change.name] = PeerInfo(
            change.name, with_port(change.address), change.tls.server_name
        )
