"""A tiny gRPC service and its client, for workloads: `python -m lab.superlaser serve | call`.

    python -m lab.superlaser serve [--port 50051]
    python -m lab.superlaser call ADDRESS Aim|Fire [--port 50051] [--timeout S]

deathstar.v1.Superlaser has two methods of bytes to bytes: Aim and Fire. `call` prints one JSON
object: the status code's name, the answer, the message.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc

SERVICE = "deathstar.v1.Superlaser"
METHODS = ("Aim", "Fire")
PORT = 50051


def serve(port: int) -> None:
    """Until killed; says `ready` once it listens."""

    def handler(method: str) -> grpc.RpcMethodHandler[bytes, bytes]:
        return grpc.unary_unary_rpc_method_handler(
            lambda request, _: f"{method}: {request.decode()}".encode()
        )

    server = grpc.server(ThreadPoolExecutor(4))
    handlers = {method: handler(method) for method in METHODS}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    server.add_insecure_port(f"[::]:{port}")
    server.start()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    server.wait_for_termination()


def call(address: str, method: str, port: int, timeout_s: float) -> dict[str, str]:
    """One call, on a connection of its own."""
    target = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        invoke = channel.unary_unary(
            f"/{SERVICE}/{method}",
            request_serializer=bytes,
            response_deserializer=bytes,
        )
        try:
            answer: bytes = invoke(b"Alderaan", timeout=timeout_s)
        except grpc.RpcError as error:
            return {"code": error.code().name, "answer": "", "message": error.details() or ""}
    return {"code": "OK", "answer": answer.decode(), "message": ""}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.superlaser", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    server = commands.add_parser("serve")
    server.add_argument("--port", type=int, default=PORT)
    client = commands.add_parser("call")
    client.add_argument("address")
    client.add_argument("method", choices=METHODS)
    client.add_argument("--port", type=int, default=PORT)
    client.add_argument("--timeout", type=float, default=3.0)
    options = parser.parse_args()
    if options.command == "serve":
        serve(options.port)
    else:
        found = call(options.address, options.method, options.port, options.timeout)
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
