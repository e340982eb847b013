"""A gRPC server and client with no code of ours, each a process to run in a namespace.

python grpcpeer.py server               serves /demo.Echo/Say and /demo.Echo/Erase on port 80
python grpcpeer.py client ADDRESS       calls both, and streams; prints one JSON object
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc


def serve() -> None:
    def say(request: bytes, _context: Any) -> bytes:
        return request.upper()

    def chat(requests: Iterator[bytes], _context: Any) -> Iterator[bytes]:
        for request in requests:
            yield request[::-1]

    server = grpc.server(ThreadPoolExecutor(8))
    handlers = {
        "Say": grpc.unary_unary_rpc_method_handler(say),
        "Erase": grpc.unary_unary_rpc_method_handler(say),
        "Chat": grpc.stream_stream_rpc_method_handler(chat),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("demo.Echo", handlers),))
    server.add_insecure_port("0.0.0.0:80")
    server.start()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    server.wait_for_termination()


def call(address: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with grpc.insecure_channel(f"{address}:80") as channel:
        for method in ("Say", "Erase"):
            try:
                answer = channel.unary_unary(f"/demo.Echo/{method}", None, None)(
                    b"hello", timeout=20
                )
                found[method] = answer.decode()
            except grpc.RpcError as error:
                found[method] = [error.code().value[0], error.details()]
        try:
            chat = channel.stream_stream("/demo.Echo/Chat", None, None)
            found["Chat"] = [x.decode() for x in chat(iter([b"ab", b"cd"]), timeout=20)]
        except grpc.RpcError as error:
            found["Chat"] = [error.code().value[0], error.details()]
    return found


if __name__ == "__main__":
    if sys.argv[1] == "server":
        serve()
    else:
        sys.stdout.write(json.dumps(call(sys.argv[2])) + "\n")
