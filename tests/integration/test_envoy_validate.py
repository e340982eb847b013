"""Everything that is generated passes `envoy --mode validate`, and what must not pass does not."""

from __future__ import annotations

import itertools
import random
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
from envoy.config.bootstrap.v3 import bootstrap_pb2
from envoy.config.core.v3 import base_pb2
from envoy.config.listener.v3 import listener_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import (
    http_connection_manager_pb2 as hcm_pb2,
)
from envoy.extensions.transport_sockets.tls.v3 import tls_pb2
from google.protobuf import json_format

from cilia.policy.api import HeaderMatch, HTTPRule, TLSContext
from services.xds.envoy import bootstrap
from services.xds.envoy.bootstrap import BootstrapSettings
from services.xds.envoy.process import binary
from services.xds.translate.model import (
    MAX_PROGRAM_SIZE,
    Direction,
    NodeSettings,
    Redirect,
    Rule,
    RuleSet,
)
from services.xds.translate.translate import LISTENER, ROUTES, SECRET, base, translate
from tests.integration.certificates import issue

TLS = TLSContext(secret=("default", "deathstar"))


def corpus() -> list[Redirect]:
    """Rule sets of every shape, and many by chance."""
    dice = random.Random(7)
    methods = ["", "GET", "GET|POST", "(?i)get", ".*", "P(OST|UT)"]
    paths = ["", "/", "/v1/.*", "/public/[a-z0-9_-]{1,30}", r"/a\.b", "/x|/y/.*", ".*", "/\\Q.*\\E"]
    hosts = ["", r"api\.example\.com", r".*\.example(:\d+)?", "[a-z]+"]
    headers = [(), ("X-Up",), ("Team: red", "X-A-B c%d"), ("X-My:true",)]
    actions = ["", "LOG", "ADD", "DELETE", "REPLACE"]
    matches = [
        (),
        *((HeaderMatch("X-Token", '100% "v" é', how),) for how in actions),  # type: ignore[arg-type]
        *((HeaderMatch("x-there", "", how),) for how in actions),  # type: ignore[arg-type]
        (HeaderMatch("Authorization", mismatch="REPLACE", secret=("default", "token")),),
    ]
    rules = [
        HTTPRule(dice.choice(methods), dice.choice(paths), dice.choice(hosts), *rest)
        for rest in itertools.product(headers, matches)
        for _ in range(3)
    ]
    sets = [RuleSet(), RuleSet(rules=(Rule(1),)), RuleSet(rules=(Rule(1, HTTPRule()),))]
    sets += [
        RuleSet(rules=tuple(Rule(n % 5 + 1, rule) for n, rule in enumerate(chosen)))
        for chosen in (dice.sample(rules, dice.randint(1, 6)) for _ in range(60))
    ]
    sets.append(RuleSet(rules=tuple(Rule(n, HTTPRule("GET", f"/{n}/[a-f]+")) for n in range(1000))))
    sets.append(RuleSet(rules=(Rule(1, HTTPRule(path="/" + "a?" * (MAX_PROGRAM_SIZE // 3))),)))
    for one, other, names in itertools.product((None, TLS), (None, TLS), ((), ("a.b", "*.c"))):
        sets.append(
            RuleSet(
                rules=(Rule(1),), terminating_tls=one, originating_tls=other, server_names=names
            )
        )
    found = []
    for number, rule_set in enumerate(sets):
        direction = list(Direction)[number % 3]
        found.append(
            Redirect(
                port=10_000 + number,
                direction=direction,
                rules=rule_set,
                ingress_rules=sets[-1 - number] if direction is Direction.BOTH else None,
            )
        )
    return found


def validate(
    directory: Path, redirects: Iterable[Redirect], settings: NodeSettings, **secret: bytes
) -> subprocess.CompletedProcess[str]:
    """All of it as one static configuration, routes in their listeners."""
    made = bootstrap.build(
        BootstrapSettings(node_id="n", ads_socket=directory / "ads.sock", admin_directory=directory)
    )
    message = json_format.Parse(made.text, bootstrap_pb2.Bootstrap())
    static = message.static_resources
    static.clusters.extend(resource.message for resource in base(settings))
    secrets = set()
    for redirect in redirects:
        read = translate(
            redirect,
            settings,
            lambda name: secret if name == TLS.secret else {"token": b"100% s3cret"},
        )
        routes = next(x.message for x in read if x.type_url == ROUTES)
        for resource in read:
            if resource.type_url == LISTENER:
                static.listeners.append(_with_routes(resource.message, routes))
            elif resource.type_url == SECRET:
                if resource.name not in secrets:
                    static.secrets.append(resource.message)
                secrets.add(resource.name)
            elif resource.type_url != ROUTES:
                static.clusters.append(resource.message)
    for socket in (
        *(cluster.transport_socket for cluster in static.clusters),
        *(chain.transport_socket for x in static.listeners for chain in x.filter_chains),
    ):
        _without_sds(socket)
    config = directory / "all.json"
    config.write_text(json_format.MessageToJson(message))
    return subprocess.run(
        [binary(), "--mode", "validate", "-c", config, "-l", "warning", "--disable-hot-restart"],
        capture_output=True,
        text=True,
        check=False,
    )


def _without_sds(socket: base_pb2.TransportSocket) -> None:
    """Names a static secret instead of one of ADS: with that Envoy 1.40 crashes when validating."""
    for kind in (tls_pb2.DownstreamTlsContext, tls_pb2.UpstreamTlsContext):
        context = kind()
        if socket.typed_config.Unpack(context):
            common = context.common_tls_context
            for secret in common.tls_certificate_sds_secret_configs:
                secret.ClearField("sds_config")
            if common.HasField("validation_context_sds_secret_config"):
                common.validation_context_sds_secret_config.ClearField("sds_config")
            socket.typed_config.Pack(context)


def _with_routes(listener: listener_pb2.Listener, routes: object) -> listener_pb2.Listener:
    for chain in (*listener.filter_chains, listener.default_filter_chain):
        for packed in (f.typed_config for f in chain.filters):
            manager = hcm_pb2.HttpConnectionManager()
            assert packed.Unpack(manager)
            manager.route_config.CopyFrom(routes)
            packed.Pack(manager)
    return listener


@pytest.mark.parametrize(
    "settings",
    [
        NodeSettings(),
        NodeSettings(
            listen=("127.0.0.1",),
            access_log=False,
            denied_body="100% no <b>ünwanted</b>",
            ingress_sources=("10.0.0.1", "fd00::1"),
            egress_sources=("fd00::1",),
            retries=0,
            request_timeout_s=0,
            escaped_slashes="keep",
            upgrades=(),
        ),
    ],
    ids=["as usual", "otherwise"],
)
def test_every_generated_resource_is_valid(tmp_path: Path, settings: NodeSettings) -> None:
    certificate = issue("deathstar.example")
    done = validate(
        tmp_path,
        corpus(),
        settings,
        **{
            "tls.crt": certificate.certificate,
            "tls.key": certificate.key,
            "ca.crt": certificate.certificate,
        },
    )
    assert done.returncode == 0, done.stderr[-4000:]
    # Nothing that Envoy would like to be told of, such as a field that is about to go.
    warnings = [line for line in done.stderr.splitlines() if "[warning]" in line]
    assert not [line for line in warnings if "deprecated" in line.lower()], warnings


def test_validation_finds_what_is_wrong(tmp_path: Path) -> None:
    # The test above could not fail if this one did not.
    settings = NodeSettings(upgrades=("websocket", "WebSocket"))
    done = validate(tmp_path, corpus()[:1], settings)
    assert done.returncode != 0
    assert "upgrade" in done.stderr.lower()


def test_the_limit_of_expressions_is_envoys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.xds.translate import expressions

    monkeypatch.setattr(expressions, "check", lambda _: "")
    rule = Rule(1, HTTPRule(path="/" + "a?" * MAX_PROGRAM_SIZE))
    redirect = Redirect(port=10_000, direction=Direction.INGRESS, rules=RuleSet(rules=(rule,)))
    done = validate(tmp_path, [redirect], NodeSettings())
    assert done.returncode != 0
    assert f"limit of {MAX_PROGRAM_SIZE}" in done.stderr or "program size" in done.stderr
