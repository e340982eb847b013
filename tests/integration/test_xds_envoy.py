"""Stock Envoy as a client of the service: both protocols, files that change, refusals, restarts,
mutual TLS."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cilia.pki.authority import Authority, Request
from services.xds.envoy.admin import AdminClient
from tests.integration.xdsservice import (
    XdsService,
    ads_bootstrap,
    endpoint,
    envoy,
    eventually,
    free_port,
    get,
)

T = "type.googleapis.com/envoy."
HCM = T + "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
ADS = {"resource_api_version": "V3", "ads": {}}


@pytest.fixture
def directory() -> Iterator[Path]:
    # Short: a socket's path has 107 bytes.
    path = Path(f"/tmp/cilt-{os.getpid()}-xe")
    shutil.rmtree(path, ignore_errors=True)
    (path / "res").mkdir(parents=True)
    yield path
    shutil.rmtree(path, ignore_errors=True)


def listener(name: str, port: int, routes: str) -> dict[str, Any]:
    return {
        "@type": T + "config.listener.v3.Listener",
        "name": name,
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
        "filter_chains": [
            {
                "filters": [
                    {
                        "name": "http",
                        "typed_config": {
                            "@type": HCM,
                            "stat_prefix": name,
                            "rds": {"route_config_name": routes, "config_source": ADS},
                            "http_filters": [
                                {
                                    "name": "router",
                                    "typed_config": {
                                        "@type": T + "extensions.filters.http.router.v3.Router"
                                    },
                                }
                            ],
                        },
                    }
                ]
            }
        ],
    }


def says(name: str, text: str) -> dict[str, Any]:
    """Routes that answer by themselves."""
    return {
        "@type": T + "config.route.v3.RouteConfiguration",
        "name": name,
        "virtual_hosts": [
            {
                "name": "all",
                "domains": ["*"],
                "routes": [
                    {
                        "match": {"prefix": "/"},
                        "direct_response": {"status": 200, "body": {"inline_string": text}},
                    }
                ],
            }
        ],
    }


def write(directory: Path, name: str, *resources: dict[str, Any], **more: Any) -> None:
    path = directory / "res" / name
    beside = path.with_name("." + name)
    beside.write_text(json.dumps({"resources": resources, **more}))
    beside.replace(path)


@contextlib.contextmanager
def service(directory: Path, *more: str) -> Iterator[XdsService]:
    arguments = ("--no-redirects", "--resources", str(directory / "res"), "--reload", "0.05")
    with XdsService(directory, *arguments, *more) as running:
        yield running


def local(directory: Path) -> dict[str, Any]:
    return endpoint({"pipe": {"path": str(directory / "xds.sock")}})


def requests_of(found: XdsService) -> list[tuple[str, int]]:
    streams = found.ask("xds", "status")["streams"]
    return [(s["protocol"], s["responses"]) for s in streams]


@pytest.mark.parametrize("delta", [True, False], ids=["delta", "sotw"])
def test_files_are_served_and_followed(directory: Path, delta: bool) -> None:
    one, two = free_port(), free_port()
    write(directory, "a.json", listener("one", one, "routes"), says("routes", "first"))
    bootstrap = ads_bootstrap("web-1", delta=delta, cluster=local(directory))
    with service(directory) as xds, envoy(directory, bootstrap):
        eventually(lambda: get(f"http://127.0.0.1:{one}/") == (200, "first"))

        # A change of routes, and another listener.
        write(directory, "a.json", listener("one", one, "routes"), says("routes", "second"))
        write(directory, "b.json", listener("two", two, "routes"))
        eventually(lambda: get(f"http://127.0.0.1:{one}/") == (200, "second"))
        eventually(lambda: get(f"http://127.0.0.1:{two}/") == (200, "second"))

        # A file that cannot be read changes nothing, and is shown.
        (directory / "res" / "b.json").write_text('{"resources": [{"@type": ')
        fault = eventually(lambda: [f for f in xds.ask("xds", "status")["files"] if f["error"]])
        assert "b.json" in fault[0]["path"]
        assert "line 1" in fault[0]["error"]
        assert get(f"http://127.0.0.1:{two}/") == (200, "second")

        # A resource that Envoy refuses stops no other one, and the reason is shown.
        bad = listener("bad", free_port(), "routes")
        bad["filter_chains"][0]["filters"][0]["name"] = "x" * 3
        bad["filter_chains"][0]["filters"][0]["typed_config"]["codec_type"] = "HTTP3"
        write(directory, "b.json", bad, listener("two", two, "other"), says("other", "third"))
        eventually(lambda: get(f"http://127.0.0.1:{two}/") == (200, "third"))
        [refused] = eventually(lambda: xds.ask("xds", "status")["rejections"])
        assert (refused["type"], refused["name"], refused["node"]) == ("LDS", "bad", "web-1")
        assert refused["reason"]
        states = {
            r["name"]: r["states"][0]["state"] for r in xds.ask("xds", "resources", "--type", "LDS")
        }
        assert states == {"one": "acked", "two": "acked", "bad": "nacked"}

        # Fixed.
        write(directory, "b.json", listener("two", two, "other"), says("other", "fourth"))
        eventually(lambda: get(f"http://127.0.0.1:{two}/") == (200, "fourth"))
        eventually(lambda: not xds.ask("xds", "status")["rejections"])

        # Deleted, the last one too.
        (directory / "res" / "b.json").unlink()
        eventually(lambda: get(f"http://127.0.0.1:{two}/")[0] == 0)
        write(directory, "a.json")
        eventually(lambda: get(f"http://127.0.0.1:{one}/")[0] == 0)


@pytest.mark.parametrize("delta", [True, False], ids=["delta", "sotw"])
def test_a_restart_of_the_service_pushes_nothing_and_breaks_nothing(
    directory: Path, delta: bool
) -> None:
    port = free_port()
    write(directory, "a.json", listener("one", port, "routes"), says("routes", "first"))
    bootstrap = ads_bootstrap("web-1", delta=delta, cluster=local(directory))
    with service(directory) as xds, envoy(directory, bootstrap):
        eventually(lambda: get(f"http://127.0.0.1:{port}/") == (200, "first"))
        with socket.create_connection(("127.0.0.1", port)) as live:
            request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
            live.sendall(request)
            assert b"first" in live.recv(4096)
            xds.kill()
            live.sendall(request)
            assert b"first" in live.recv(4096)
            xds.start()

            def resumed() -> bool:
                found = xds.ask("xds", "resources")
                return bool(found) and all(
                    r["states"] and r["states"][0]["state"] == "acked" for r in found
                )

            eventually(resumed)
            # It was sent nothing that it had: only clusters are answered, of which there are none.
            [(_, responses)] = requests_of(xds)
            assert responses <= 1
            live.sendall(request)
            assert b"first" in live.recv(4096)
            # And it hears of what is new.
            write(directory, "a.json", listener("one", port, "routes"), says("routes", "second"))
            eventually(lambda: get(f"http://127.0.0.1:{port}/") == (200, "second"))
            live.sendall(request)
            assert b"second" in live.recv(4096)


def test_endpoints_come_with_a_cluster_that_changes(directory: Path) -> None:
    """A changed cluster warms anew: without its endpoints it would wait 15 s, and here for ever."""
    front, back = free_port(), free_port()
    write(directory, "back.json", listener("back", back, "routes"), says("routes", "from behind"))
    to_back = says("front", "")
    to_back["virtual_hosts"][0]["routes"][0] = {
        "match": {"prefix": "/"},
        "route": {"cluster": "behind"},
    }

    def cluster(timeout: str) -> dict[str, Any]:
        return {
            "@type": T + "config.cluster.v3.Cluster",
            "name": "behind",
            "type": "EDS",
            "connect_timeout": timeout,
            "eds_cluster_config": {
                "eds_config": {**ADS, "initial_fetch_timeout": "0s"},
                "service_name": "service",
            },
        }

    place = {"socket_address": {"address": "127.0.0.1", "port_value": back}}
    endpoints = {
        "@type": T + "config.endpoint.v3.ClusterLoadAssignment",
        "cluster_name": "service",
        "endpoints": [{"lb_endpoints": [{"endpoint": {"address": place}}]}],
    }
    write(directory, "eds.json", endpoints)
    write(directory, "front.json", listener("front", front, "front"), to_back)
    write(directory, "cds.json", cluster("1s"))
    for delta in (True, False):
        bootstrap = ads_bootstrap("web-1", delta=delta, cluster=local(directory))
        with service(directory) as xds, envoy(directory, bootstrap) as admin:
            eventually(lambda: get(f"http://127.0.0.1:{front}/") == (200, "from behind"))
            write(directory, "cds.json", cluster("2s" if delta else "3s"))
            eventually(
                lambda: (
                    [
                        r["states"][0]["state"] == "acked"
                        for r in xds.ask("xds", "resources", "--type", "CDS")
                    ]
                    == [True]
                )
            )
            assert get(f"http://127.0.0.1:{front}/") == (200, "from behind")
            eventually(functools.partial(_warm, admin))


def _warm(admin: Path) -> bool:
    """Whether no cluster waits for anything."""
    stats = asyncio.run(AdminClient(admin).stats("^cluster_manager.warming_clusters$"))
    return stats == {"cluster_manager.warming_clusters": 0}


def test_over_tcp_a_node_is_whom_its_certificate_names(directory: Path) -> None:
    authority = Authority(directory / "pki")
    authority.init()
    authority.issue(Request(node="n1", service="xds", names=("127.0.0.1",)))
    authority.issue(Request(node="web-7", service="envoy"))
    mine, others, address = free_port(), free_port(), free_port()
    write(directory, "7.json", listener("mine", mine, "r"), says("r", "seven"), nodes=["web-7"])
    write(directory, "8.json", listener("theirs", others, "r"), says("r", "8"), nodes=["web-8"])
    pki = directory / "pki"
    tls = {
        "name": "tls",
        "typed_config": {
            "@type": T + "extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            "common_tls_context": {
                "tls_certificates": [
                    {
                        "certificate_chain": {"filename": str(pki / "web-7-envoy/tls.crt")},
                        "private_key": {"filename": str(pki / "web-7-envoy/tls.key")},
                    }
                ],
                "validation_context": {
                    "trusted_ca": {"filename": str(pki / "web-7-envoy/ca.crt")},
                    "match_typed_subject_alt_names": [
                        {"san_type": "IP_ADDRESS", "matcher": {"exact": "127.0.0.1"}}
                    ],
                },
            },
        },
    }
    cluster = endpoint({"socket_address": {"address": "127.0.0.1", "port_value": address}})
    # It says that it is another.
    bootstrap = ads_bootstrap("web-8", delta=True, cluster={**cluster, "transport_socket": tls})
    arguments = ("--tls-address", f"127.0.0.1:{address}", "--tls-dir", str(pki / "n1-xds"))
    with service(directory, *arguments) as xds, envoy(directory, bootstrap):
        eventually(lambda: get(f"http://127.0.0.1:{mine}/") == (200, "seven"))
        assert get(f"http://127.0.0.1:{others}/")[0] == 0
        status = xds.ask("xds", "status")
        [stream] = status["streams"]
        assert (stream["node"], stream["claimed_node"]) == ("web-7", "web-8")
        assert stream["transport"] == "tcp"
        [certificate] = status["certificates"]
        assert certificate["error"] is None
        assert "spiffe://cilia/node/n1/xds" in certificate["names"]
