"""MooncakeTier: client spans below the span of the call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

pytest.importorskip("kvcache.tiers.mooncake")

from kvcache import telemetry
from kvcache.testing import block_of, keys_of
from kvcache.tiers.mooncake import MooncakeTier
from tests.support.played_mooncake import PlayedMaster, PlayedPool, play_library, tiers_on


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> PlayedPool:
    return play_library(monkeypatch)


@pytest.fixture
def master() -> Iterator[PlayedMaster]:
    with PlayedMaster() as master:
        yield master


@pytest.fixture
def tier(played: PlayedPool, master: PlayedMaster) -> Iterator[MooncakeTier]:
    with tiers_on(played, master) as opened:
        yield opened()


def spans_of(exported: InMemorySpanExporter, call: Any) -> list[ReadableSpan]:
    """Return the spans of a call, which are client spans below the current one."""
    exported.clear()
    parent = telemetry.start_span("kvcache.tier.load", None)
    with telemetry.use_span(parent):
        call()
    parent.end()
    *children, ended = exported.get_finished_spans()
    for span in children:
        assert span.parent is not None
        assert ended.context is not None
        assert span.parent.span_id == ended.context.span_id
        assert span.kind is SpanKind.CLIENT
    return list(children)


def test_each_call_of_the_library_makes_a_client_span(
    tier: MooncakeTier, master: PlayedMaster, exported: InMemorySpanExporter
) -> None:
    keys = keys_of("spans", 3)
    views = [memoryview(bytearray(block_of(key, 64))) for key in keys]
    for method, call in (
        ("batch_put_from", lambda: tier.store(keys, views)),
        ("batch_is_exist", lambda: tier.contains(keys)),
        ("batch_get_into", lambda: tier.load(keys, views)),
        ("batch_remove", lambda: tier.remove(keys)),
    ):
        [span] = spans_of(exported, call)
        assert span.name == method
        assert dict(span.attributes or {}) == {
            "db.system.name": "mooncake",
            "db.operation.name": method,
            "db.operation.batch.size": 3,
            "server.address": "127.0.0.1",
            "server.port": master.port,
        }
        assert span.status.status_code is StatusCode.UNSET


def test_failed_call_ends_its_span_with_the_code(
    tier: MooncakeTier, played: PlayedPool, exported: InMemorySpanExporter
) -> None:
    played.replies["batch_is_exist"] = lambda names: [1, -200]
    [span] = spans_of(exported, lambda: tier.contains(keys_of("spans", 2)))
    assert span.status.status_code is StatusCode.ERROR
    assert (span.attributes or {})["error.type"] == "-200"
    assert (span.attributes or {})["db.response.status_code"] == "-200"


def test_miss_is_no_error_of_the_span(tier: MooncakeTier, exported: InMemorySpanExporter) -> None:
    view = memoryview(bytearray(64))
    [span] = spans_of(exported, lambda: tier.load(keys_of("absent", 1), [view]))
    assert span.status.status_code is StatusCode.UNSET
    assert "db.operation.batch.size" not in (span.attributes or {})


def test_call_without_a_recorded_span_makes_none(
    tier: MooncakeTier, exported: InMemorySpanExporter
) -> None:
    exported.clear()
    tier.contains(keys_of("spans", 1))
    assert exported.get_finished_spans() == ()
