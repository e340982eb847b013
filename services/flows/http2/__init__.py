"""gRPC over HTTP/2 with DATA frames of our own making.

A gRPC runtime hands over one message at a time, which in Python costs more than making it. Here a
call sends bytes that hold any number of length-prefixed messages already, in as few writes as flow
control allows. What makes HTTP/2 hard (settings, HPACK, stream states, windows) is h2's work.

connection   one connection, without input and output: bytes in, events out
server       listeners, calls as coroutines, limits in time
"""

from services.flows.http2.connection import Limits, RpcFailure, Status, frame_message
from services.flows.http2.server import Call, GrpcServer, Handler

__all__ = [
    "Call",
    "GrpcServer",
    "Handler",
    "Limits",
    "RpcFailure",
    "Status",
    "frame_message",
]
