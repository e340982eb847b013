"""grpcio as an xDS client and as an xDS-enabled server, in a process of its own: it reads its
bootstrap from the environment when it is first used. Prints one JSON object a line.

    client TARGET     calls s.Echo/Allowed and s.Echo/Denied, again for each line of its input,
                      waiting for a way there if the line is `wait`
    server ADDRESS    serves both; what may be called its Listener says
"""

from __future__ import annotations

import json
import sys
from concurrent import futures
from typing import Any

import grpc


def client(target: str) -> None:
    channel = grpc.insecure_channel(target)
    for line in sys.stdin:
        said: dict[str, Any] = {}
        for method in ("Allowed", "Denied"):
            try:
                call = channel.unary_unary(f"/s.Echo/{method}", None, None)
                said[method] = call(b"x", timeout=10, wait_for_ready="wait" in line).decode()
            except grpc.RpcError as error:
                said[method] = error.code().name
                said[f"{method}-details"] = error.details()
        tell(said)


def server(address: str) -> None:
    serving = grpc.server(futures.ThreadPoolExecutor(4), xds=True)
    handler = grpc.unary_unary_rpc_method_handler(lambda request, _: b"from " + address.encode())
    serving.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("s.Echo", {"Allowed": handler, "Denied": handler}),)
    )
    credentials = grpc.xds_server_credentials(grpc.insecure_server_credentials())
    serving.add_secure_port(address, credentials)
    serving.start()
    tell({"started": True})
    sys.stdin.read()


def tell(said: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    {"client": client, "server": server}[sys.argv[1]](sys.argv[2])
