"""ObjectTier: one client span for the requests of a call, below the span of the call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

pytest.importorskip("obstore")

from kvcache import telemetry
from kvcache.testing import block_of, keys_of
from kvcache.tiers.object import ObjectTier
from tests.support.scripted_object_store import ScriptedObjectStore, rejecting

KEYS = keys_of("span", 3)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedObjectStore]:
    monkeypatch.setenv("KV_SCRIPTED_ACCESS_KEY", "key")
    monkeypatch.setenv("KV_SCRIPTED_SECRET_KEY", "correct-horse-battery-77")
    with ScriptedObjectStore() as store:
        yield store


def spans_of(exported: InMemorySpanExporter, call: Callable[[], object]) -> list[ReadableSpan]:
    """Return the spans of a call, which are children of the span around it."""
    exported.clear()
    parent = telemetry.start_span("kvcache.tier.load", None)
    with telemetry.use_span(parent):
        call()
    parent.end()
    *children, ended = exported.get_finished_spans()
    assert ended.context is not None
    for span in children:
        assert span.parent is not None
        assert span.parent.span_id == ended.context.span_id
        assert span.kind is SpanKind.CLIENT
    return list(children)


def test_call_makes_one_client_span(
    store: ScriptedObjectStore, exported: InMemorySpanExporter
) -> None:
    blocks = [memoryview(block_of(key, 64)) for key in KEYS]
    into = [memoryview(bytearray(64)) for _ in KEYS]
    with closing(ObjectTier(**store.options(timeout_s=30))) as tier:
        assert exported.get_finished_spans() == ()  # opening the tier makes no span
        calls: dict[str, Callable[[], object]] = {
            "PUT": lambda: tier.store(KEYS, blocks),
            "HEAD": lambda: tier.contains(KEYS),
            "GET": lambda: tier.load(KEYS, into),
            "DELETE": lambda: tier.remove(KEYS),
        }
        for name, call in calls.items():
            [span] = spans_of(exported, call)
            assert span.name == name
            assert span.status.status_code is StatusCode.UNSET
            assert dict(span.attributes or {}) == {
                "http.request.method": name,
                "server.address": "127.0.0.1",
                "server.port": store.port,
                "kvcache.object.requests": 3,
            }
        [missing] = spans_of(exported, lambda: tier.contains(KEYS))
        assert missing.status.status_code is StatusCode.UNSET


def test_call_with_failed_requests_ends_its_span_with_an_error(
    store: ScriptedObjectStore, exported: InMemorySpanExporter
) -> None:
    with closing(ObjectTier(**store.options(timeout_s=30))) as tier:
        store.fault = rejecting(500, "InternalError")

        def ask() -> None:
            with pytest.raises(ConnectionError):
                tier.contains(KEYS)
            tier.store(KEYS, [memoryview(b"a block")] * 3)

        for span in spans_of(exported, ask):
            assert span.status.status_code is StatusCode.ERROR
            assert (span.attributes or {})["http.response.status_code"] == 500
            assert (span.attributes or {})["error.type"] == (
                "500" if span.name == "HEAD" else "InternalError"
            )


def test_folder_makes_no_span(tmp_path: Path, exported: InMemorySpanExporter) -> None:
    with closing(ObjectTier(url=str(tmp_path))) as tier:
        assert spans_of(exported, lambda: tier.contains(KEYS)) == []
