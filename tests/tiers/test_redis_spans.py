"""RedisTier: client spans by OpenTelemetry's conventions, below the span of the call."""

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

SECRET = "a-secret-password"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with redis_servers.server(tmp_path_factory.mktemp("redis")) as server:
        yield server


def store(tier: RedisTier, keys: list[bytes]) -> None:
    assert tier.store(keys, [memoryview(block_of(key, 64)) for key in keys]) == [True] * len(keys)


def spans_of(exported: InMemorySpanExporter, call: Any) -> tuple[ReadableSpan, list[ReadableSpan]]:
    """Return a span around a call, and the spans of the call."""
    exported.clear()
    parent = telemetry.start_span("kvcache.tier.load", None)
    with telemetry.use_span(parent):
        call()
    parent.end()
    *children, ended = exported.get_finished_spans()
    assert ended.name == "kvcache.tier.load"
    assert ended.context is not None
    for span in children:
        assert span.parent is not None
        assert span.parent.span_id == ended.context.span_id
        assert span.kind is SpanKind.CLIENT
    return ended, list(children)


@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_call_makes_a_client_span(
    server: Server, exported: InMemorySpanExporter, transport: str
) -> None:
    url = f"{server.url}/3" if transport == "tcp" else f"unix://{server.socket}?db=3"
    keys = keys_of(transport, 3)
    where: dict[str, Any] = {"server.address": str(server.socket)}
    if transport == "tcp":
        where = {"server.address": "127.0.0.1", "server.port": server.port}
    with closing(RedisTier(url=url, timeout_s=30)) as tier:
        assert exported.get_finished_spans() == ()  # opening the tier makes no span
        _, [several] = spans_of(exported, lambda: store(tier, keys))
        assert several.name == "PIPELINE SET"
        assert dict(several.attributes or {}) == where | {
            "db.system.name": "redis",
            "db.operation.name": "PIPELINE SET",
            "db.operation.batch.size": 3,
            "db.namespace": "3",
        }
        buffer = memoryview(bytearray(64))
        _, [one] = spans_of(exported, lambda: tier.load(keys[:1], [buffer]))
        assert one.name == "GET"
        assert "db.operation.batch.size" not in (one.attributes or {})


def test_call_to_unreachable_server_ends_its_span_with_an_error(
    tmp_path: Path, exported: InMemorySpanExporter
) -> None:
    with redis_servers.server(tmp_path) as server:
        tier = RedisTier(url=server.url, timeout_s=5)

    def ask() -> None:
        with pytest.raises(ConnectionError):
            tier.contains(keys_of("a", 2))

    with closing(tier):
        _, [span] = spans_of(exported, ask)
    assert span.name == "PIPELINE EXISTS"
    assert span.status.status_code is StatusCode.ERROR
    assert (span.attributes or {})["error.type"] == "NOANSWER"


def test_call_to_a_cluster_makes_a_span_for_each_node(
    tmp_path: Path, exported: InMemorySpanExporter
) -> None:
    with redis_servers.cluster(tmp_path) as nodes:
        with closing(RedisTier(url=nodes[0].url, cluster=True, timeout_s=30)) as tier:
            _, spans = spans_of(exported, lambda: tier.contains(keys_of("a", 60)))
        ports = {(span.attributes or {})["server.port"] for span in spans}
        assert ports == {node.port for node in nodes}
