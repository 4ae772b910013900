"""Calls to a server are spans as OpenTelemetry has them for Redis, under whoever caused them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from kvcache import telemetry
from kvcache.testing import block_of, keys_of
from tests.support import redis_servers
from tests.support.redis_servers import Server

pytest.importorskip("redis")

from kvcache.tiers.redis import RedisTier

SECRET = "a-password-nobody-may-see"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with redis_servers.server(tmp_path_factory.mktemp("redis")) as server:
        yield server


def store(tier: RedisTier, keys: list[bytes]) -> None:
    assert tier.store(keys, [memoryview(block_of(key, 64)) for key in keys]) == [True] * len(keys)


def seen(exported: InMemorySpanExporter, call: Any) -> tuple[ReadableSpan, list[ReadableSpan]]:
    """The span around a call, and those of it."""
    exported.clear()
    above = telemetry.start_span("kvcache.tier.load", None)
    with telemetry.use_span(above):
        call()
    above.end()
    *below, around = exported.get_finished_spans()
    assert around.name == "kvcache.tier.load"
    assert around.context is not None
    for span in below:
        assert span.parent is not None
        assert span.parent.span_id == around.context.span_id
        assert span.kind is SpanKind.CLIENT
    return around, list(below)


@pytest.mark.parametrize("way", ["tcp", "unix"])
def test_an_exchange_is_a_client_span(
    server: Server, exported: InMemorySpanExporter, way: str
) -> None:
    url = f"{server.url}/3" if way == "tcp" else f"unix://{server.socket}?db=3"
    keys = keys_of(way, 3)
    where: dict[str, Any] = {"server.address": str(server.socket)}
    if way == "tcp":
        where = {"server.address": "127.0.0.1", "server.port": server.port}
    with closing(RedisTier(url=url, timeout_s=30)) as tier:
        assert exported.get_finished_spans() == ()  # nobody asked for it
        _, [several] = seen(exported, lambda: store(tier, keys))
        assert several.name == "PIPELINE SET"
        assert dict(several.attributes or {}) == where | {
            "db.system.name": "redis",
            "db.operation.name": "PIPELINE SET",
            "db.operation.batch.size": 3,
            "db.namespace": "3",
        }
        buffer = memoryview(bytearray(64))
        _, [one] = seen(exported, lambda: tier.load(keys[:1], [buffer]))
        assert one.name == "GET"
        assert "db.operation.batch.size" not in (one.attributes or {})


def test_a_server_that_is_gone_is_an_error(tmp_path: Path, exported: InMemorySpanExporter) -> None:
    with redis_servers.server(tmp_path) as server:
        tier = RedisTier(url=server.url, timeout_s=5)

    def ask() -> None:
        with pytest.raises(ConnectionError):
            tier.contains(keys_of("a", 2))

    with closing(tier):
        _, [span] = seen(exported, ask)
    assert span.name == "PIPELINE EXISTS"
    assert span.status.status_code is StatusCode.ERROR
    assert (span.attributes or {})["error.type"] == "NOANSWER"


def test_a_clusters_nodes_are_siblings_in_whatever_thread(
    tmp_path: Path, exported: InMemorySpanExporter
) -> None:
    with redis_servers.cluster(tmp_path) as nodes:
        with closing(RedisTier(url=nodes[0].url, cluster=True, timeout_s=30)) as tier:
            _, spans = seen(exported, lambda: tier.contains(keys_of("a", 60)))
        ports = {(span.attributes or {})["server.port"] for span in spans}
        assert ports == {node.port for node in nodes}
