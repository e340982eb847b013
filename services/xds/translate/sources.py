"""Where Envoy hears of a resource that another one names: over the one stream."""

from __future__ import annotations

from envoy.config.core.v3 import config_source_pb2


def ads() -> config_source_pb2.ConfigSource:
    source = config_source_pb2.ConfigSource(resource_api_version=config_source_pb2.V3)
    source.ads.SetInParent()
    return source
