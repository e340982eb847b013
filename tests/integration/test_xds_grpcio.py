"""grpcio as a second, independent peer: its `xds:///` client and its xDS-enabled server."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from cilia.pki.authority import Authority, Request
from tests.integration.test_xds_envoy import ADS, HCM, T, service, write
from tests.integration.xdsservice import ROOT, eventually, free_port


@pytest.fixture
def directory() -> Iterator[Path]:
    path = Path(f"/tmp/cilt-{os.getpid()}-xg")
    shutil.rmtree(path, ignore_errors=True)
    (path / "res").mkdir(parents=True)
    yield path
    shutil.rmtree(path, ignore_errors=True)


class Peer:
    """A line in, a line out."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._in: IO[str] = process.stdin
        self._out: IO[str] = process.stdout

    def hear(self) -> dict[str, Any]:
        line = self._out.readline()
        assert line, "the peer has ended"
        said: dict[str, Any] = json.loads(line)
        return said

    def call(self, how: str = "wait") -> dict[str, Any]:
        self._in.write(f"{how}\n")
        self._in.flush()
        return self.hear()


@contextlib.contextmanager
def peer(role: str, argument: str, bootstrap: dict[str, Any]) -> Iterator[Peer]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.integration.xdspeer", role, argument],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "GRPC_XDS_BOOTSTRAP_CONFIG": json.dumps(bootstrap)},
    )
    try:
        yield Peer(process)
    finally:
        process.kill()
        process.communicate()


def bootstrap(server: str, node: str, credentials: dict[str, Any]) -> dict[str, Any]:
    return {
        "xds_servers": [
            {
                "server_uri": server,
                "channel_creds": [credentials],
                "server_features": ["xds_v3"],
            }
        ],
        "node": {"id": node},
        "server_listener_resource_name_template": "server/%s",
    }


def router() -> dict[str, Any]:
    return {
        "name": "router",
        "typed_config": {"@type": T + "extensions.filters.http.router.v3.Router"},
    }


def api_listener(name: str) -> dict[str, Any]:
    return {
        "@type": T + "config.listener.v3.Listener",
        "name": name,
        "api_listener": {
            "api_listener": {
                "@type": HCM,
                "rds": {"route_config_name": "routes", "config_source": ADS},
                "http_filters": [router()],
            }
        },
    }


def routes(cluster: str) -> dict[str, Any]:
    return {
        "@type": T + "config.route.v3.RouteConfiguration",
        "name": "routes",
        "virtual_hosts": [
            {
                "name": "all",
                "domains": ["*"],
                "routes": [{"match": {"prefix": "/"}, "route": {"cluster": cluster}}],
            }
        ],
    }


def cluster(name: str, port: int) -> list[dict[str, Any]]:
    place = {"socket_address": {"address": "127.0.0.1", "port_value": port}}
    return [
        {
            "@type": T + "config.cluster.v3.Cluster",
            "name": name,
            "type": "EDS",
            "lb_policy": "ROUND_ROBIN",
            "eds_cluster_config": {"eds_config": ADS},
        },
        {
            "@type": T + "config.endpoint.v3.ClusterLoadAssignment",
            "cluster_name": name,
            "endpoints": [
                {
                    "locality": {"region": "here"},
                    "load_balancing_weight": 1,
                    "lb_endpoints": [{"endpoint": {"address": place}}],
                }
            ],
        },
    ]


def server_listener(port: int, method: str) -> dict[str, Any]:
    """A server that lets one method be called."""
    return {
        "@type": T + "config.listener.v3.Listener",
        "name": f"server/127.0.0.1:{port}",
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
        "filter_chains": [
            {
                "name": "all",
                "filters": [
                    {
                        "name": "http",
                        "typed_config": {
                            "@type": HCM,
                            "route_config": {
                                "name": "inbound",
                                "virtual_hosts": [
                                    {
                                        "name": "all",
                                        "domains": ["*"],
                                        "routes": [
                                            {"match": {"prefix": "/"}, "non_forwarding_action": {}}
                                        ],
                                    }
                                ],
                            },
                            "http_filters": [
                                {
                                    "name": "rbac",
                                    "typed_config": {
                                        "@type": T + "extensions.filters.http.rbac.v3.RBAC",
                                        "rules": {
                                            "action": "ALLOW",
                                            "policies": {
                                                "one": {
                                                    "permissions": [
                                                        {"url_path": {"path": {"exact": method}}}
                                                    ],
                                                    "principals": [{"any": True}],
                                                }
                                            },
                                        },
                                    },
                                },
                                router(),
                            ],
                        },
                    }
                ],
            }
        ],
    }


def test_a_client_and_a_server_of_grpcio(directory: Path) -> None:
    one, two = free_port(), free_port()
    write(directory, "echo.json", api_listener("echo.svc"), routes("one"))
    write(directory, "one.json", *cluster("one", one), server_listener(one, "/s.Echo/Allowed"))
    insecure = {"type": "insecure"}
    boot = bootstrap(f"unix:{directory}/xds.sock", "grpc-1", insecure)
    with (
        service(directory) as xds,
        peer("server", f"127.0.0.1:{one}", boot) as first,
        peer("client", "xds:///echo.svc", boot) as client,
    ):
        assert first.hear() == {"started": True}
        said = client.call()
        assert said["Allowed"] == f"from 127.0.0.1:{one}", said
        assert said["Denied"] == "PERMISSION_DENIED", said

        # The rule changes at the server, on its live connection.
        write(directory, "one.json", *cluster("one", one), server_listener(one, "/s.Echo/Denied"))
        eventually(lambda: client.call()["Allowed"] == "PERMISSION_DENIED")
        assert client.call()["Denied"] == f"from 127.0.0.1:{one}"

        # Another cluster: made before the routes point to it, and the old one is gone afterwards.
        with peer("server", f"127.0.0.1:{two}", boot) as second:
            write(
                directory, "two.json", *cluster("two", two), server_listener(two, "/s.Echo/Allowed")
            )
            assert second.hear() == {"started": True}
            write(directory, "echo.json", api_listener("echo.svc"), routes("two"))
            eventually(lambda: client.call()["Allowed"] == f"from 127.0.0.1:{two}")

            # Routes that it refuses: why is shown, and what it has stays in force.
            bad = routes("two")
            bad["virtual_hosts"][0]["routes"][0]["route"] = {"weighted_clusters": {"clusters": []}}
            write(directory, "echo.json", api_listener("echo.svc"), bad)
            rejections = eventually(lambda: xds.ask("xds", "status")["rejections"])
            assert {(r["type"], r["name"]) for r in rejections} == {("RDS", "routes")}
            assert client.call()["Allowed"] == f"from 127.0.0.1:{two}"
            write(directory, "echo.json", api_listener("echo.svc"), routes("two"))
            eventually(lambda: not xds.ask("xds", "status")["rejections"])

            # The service is restarted: nothing of theirs is sent again, calls go on meanwhile.
            xds.kill()
            assert client.call()["Allowed"] == f"from 127.0.0.1:{two}"
            xds.start()
            eventually(lambda: len(xds.ask("xds", "status")["streams"]) == 3)
            eventually(
                lambda: all(
                    s["acked_version"]
                    for st in xds.ask("xds", "status")["streams"]
                    for s in st["subscriptions"]
                )
            )
            sent = sorted(s["responses"] for s in xds.ask("xds", "status")["streams"])
            # The client has let go of cluster `one` since the last version it was told, which so
            # is not that of what it asks for now: clusters and endpoints are said again.
            assert sent[:2] == [0, 0]
            assert sent[2] <= 2
            assert client.call()["Allowed"] == f"from 127.0.0.1:{two}"

        # The service it calls is taken away: it says so at once, and not after 15 s of waiting,
        # which no call has: it would end by its deadline.
        (directory / "res" / "echo.json").unlink()
        said = eventually(
            lambda: (
                said if not (said := client.call("at once"))["Allowed"].startswith("from ") else 0
            )
        )
        assert said["Allowed"] == "UNAVAILABLE", said


def test_a_client_over_mutual_tls_gets_what_its_node_may_see(directory: Path) -> None:
    authority = Authority(directory / "pki")
    authority.init()
    authority.issue(Request(node="n1", service="xds", names=("localhost",)))
    authority.issue(Request(node="grpc-7", service="client"))
    pki, port, address = directory / "pki", free_port(), free_port()
    write(directory, "echo.json", api_listener("echo.svc"), routes("one"), nodes=["grpc-7"])
    write(directory, "one.json", *cluster("one", port), server_listener(port, "/s.Echo/Allowed"))
    tls = {
        "type": "tls",
        "config": {
            "certificate_file": str(pki / "grpc-7-client/tls.crt"),
            "private_key_file": str(pki / "grpc-7-client/tls.key"),
            "ca_certificate_file": str(pki / "grpc-7-client/ca.crt"),
        },
    }
    arguments = ("--tls-address", f"127.0.0.1:{address}", "--tls-dir", str(pki / "n1-xds"))
    plain = bootstrap(f"unix:{directory}/xds.sock", "server-1", {"type": "insecure"})
    secure = bootstrap(f"localhost:{address}", "whoever", tls)
    with (
        service(directory, *arguments) as xds,
        peer("server", f"127.0.0.1:{port}", plain) as first,
        peer("client", "xds:///echo.svc", secure) as client,
    ):
        assert first.hear() == {"started": True}
        assert client.call()["Allowed"] == f"from 127.0.0.1:{port}"
        nodes = {s["node"]: s["claimed_node"] for s in xds.ask("xds", "status")["streams"]}
        assert nodes == {"server-1": None, "grpc-7": "whoever"}
        # Another authority, another key for the service: new connections are made with them.
        authority.rotate(ca=True)
        with peer("client", "xds:///echo.svc", secure) as another:
            assert another.call()["Allowed"] == f"from 127.0.0.1:{port}"
