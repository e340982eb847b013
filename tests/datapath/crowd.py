"""Very many short connections, as processes of their own: `python -m tests.datapath.crowd`.

    serve ADDRESS PORT...              answers one request a connection and closes first
    ask ADDRESS COUNT PORT...          COUNT connections, the ports in turn; prints what went wrong

Whoever closes first keeps the pair of ports in TIME_WAIT, so it is the server: the client uses its
ports again at once.
"""

from __future__ import annotations

import collections
import json
import selectors
import socket
import sys
import threading

ANSWER = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok"
THREADS = 16


def serve(address: str, ports: list[int]) -> None:
    waiting = selectors.DefaultSelector()
    for port in ports:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(1024)
        waiting.register(listener, selectors.EVENT_READ, True)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        for key, _ in waiting.select():
            ready: socket.socket = key.fileobj  # type: ignore[assignment]
            if key.data:
                waiting.register(ready.accept()[0], selectors.EVENT_READ, False)
                continue
            try:
                if ready.recv(4096):
                    ready.sendall(ANSWER)
            except OSError:
                pass
            waiting.unregister(ready)
            ready.close()


def one(address: str, port: int) -> str:
    """What went wrong with one connection; nothing, if it is well."""
    try:
        with socket.create_connection((address, port), timeout=10) as client:
            client.sendall(b"GET /in HTTP/1.1\r\nhost: b\r\nconnection: close\r\n\r\n")
            got = b""
            while part := client.recv(4096):
                got += part
    except OSError as error:
        return type(error).__name__ + f" {error}"
    # The proxy may have a connection to another server of before.
    return "" if got.startswith(b"HTTP/1.1 200") else repr(got[:40])


def ask(address: str, count: int, ports: list[int]) -> None:
    left = iter(range(count))
    guard = threading.Lock()
    wrong: collections.Counter[str] = collections.Counter()

    def work() -> None:
        while True:
            with guard:
                number = next(left, None)
            if number is None:
                return
            if why := one(address, ports[number % len(ports)]):
                wrong[f"port {ports[number % len(ports)]}: {why}"] += 1

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.stdout.write(json.dumps(wrong) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2], [int(port) for port in sys.argv[3:]])
    else:
        ask(sys.argv[2], int(sys.argv[3]), [int(port) for port in sys.argv[4:]])
