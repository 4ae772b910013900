"""Metrics, events and spans of direct tiers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kvcache import metrics
from kvcache.events import BlockEvent
from kvcache.testing import block_of, keys_of
from tests.core.test_metrics import Reader
from tests.lower.test_telemetry import Spans
from tests.support.direct_under_test import DirectUnderTest, size_of
from tests.support.stack_under_test import NAMESPACE

KEYS = keys_of("a", 6)


@pytest.fixture
def under_test() -> Iterator[DirectUnderTest]:
    under_test = DirectUnderTest(tiers=2)
    yield under_test
    under_test.close()


def test_counters_are_metrics_with_the_profile_as_a_label(under_test: DirectUnderTest) -> None:
    reader = Reader()
    metrics.create_instruments(reader.provider.get_meter("test"))
    under_test.put(KEYS)
    under_test.get(KEYS)
    under_test.wait_idle()
    values = reader.values()
    nbytes = sum(map(size_of, KEYS))
    assert values["kvcache.tier.io"]["t1", "read"] == nbytes
    assert values["kvcache.tier.io"]["t1", "write"] == nbytes
    assert values["kvcache.tier.io"]["t2", "read"] == 0
    assert values["kvcache.tier.loads"]["t1", "loaded"] == 6
    assert values["kvcache.tier.stores"]["t2", "stored"] == 6
    assert "kvcache.tier.pinned" not in values or not values["kvcache.tier.pinned"]
    points = reader.points()["kvcache.tier.stores"]
    assert {point.attributes["kvcache.profile.name"] for point in points} >= {"test"}
    operations = {
        (name.name, operation) for name, operation, _, _ in under_test.direct.take_durations()
    }
    assert operations == {(tier, op) for tier in ("t1", "t2") for op in ("store",)} | {
        ("t1", "load")
    }
    assert under_test.direct.take_durations() == []
    assert under_test.direct.stats().pinned_slots == 0


def test_events_report_blocks_that_were_stored_and_missed(under_test: DirectUnderTest) -> None:
    logs = under_test.direct.subscribe_events()
    assert [name.name for name, _ in logs] == ["t1", "t2"]
    under_test.put(KEYS[:2])
    under_test.wait_idle()
    stored_events = [event for _, log in logs for event in log.take() if event.stored]
    assert stored_events == [BlockEvent(stored=True, keys=KEYS[:2])] * 2
    under_test.tiers[0].held.clear()
    under_test.direct.contains(KEYS[:2])
    assert BlockEvent(stored=False, keys=KEYS[:2]) in logs[0][1].take()


def test_called_tiers_have_spans_under_the_parent_and_linked_to_the_cause(
    under_test: DirectUnderTest, exported: InMemorySpanExporter
) -> None:
    caller = TracerProvider().get_tracer("caller").start_span("engine")
    blocks = [block_of(key, size_of(key)) for key in KEYS]
    under_test.direct.store(KEYS, blocks, cause=caller)
    spans = Spans(exported)
    assert spans.names() == ["kvcache.tier.store"] * 2
    for span in spans.all:
        assert [link.context for link in span.links] == [caller.get_span_context()]
        assert dict(span.attributes or {}) | {
            "kvcache.queue.duration": 0,
            "kvcache.tier.name": "",
        } == {
            "kvcache.tier.name": "",
            "kvcache.tier.type": "Framed",
            "kvcache.codec": "none",
            "kvcache.block.requested": 6,
            "kvcache.block.stored": 6,
            "kvcache.block.known": 0,
            "kvcache.payload.size": sum(map(size_of, KEYS)),
            "kvcache.queue.duration": 0,
        }
    under_test.tiers[0].held.pop(NAMESPACE + KEYS[0])
    under_test.direct.contains(KEYS, parent_span=caller)
    under_test.direct.load(KEYS, [bytearray(size_of(key)) for key in KEYS], parent_span=caller)
    spans = Spans(exported)
    assert spans.names() == ["kvcache.tier.contains"] * 2 + ["kvcache.tier.load"] * 2
    assert all(span.parent == caller.get_span_context() for span in spans.all)
    loads = [span.attributes or {} for span in spans.all if span.name == "kvcache.tier.load"]
    assert [(span["kvcache.block.requested"], span["kvcache.block.hit"]) for span in loads] == [
        (6, 5),
        (1, 1),
    ]


def test_calls_without_a_parent_have_no_spans(
    under_test: DirectUnderTest, exported: InMemorySpanExporter
) -> None:
    under_test.put(KEYS)
    under_test.get(KEYS)
    under_test.direct.contains(KEYS)
    assert Spans(exported).names() == []


def test_span_of_a_tier_that_failed_has_the_error(
    under_test: DirectUnderTest, exported: InMemorySpanExporter
) -> None:
    caller = TracerProvider().get_tracer("caller").start_span("engine")
    under_test.tiers[0].fault = "raise"
    blocks = [block_of(key, size_of(key)) for key in KEYS]
    under_test.direct.store(KEYS, blocks, cause=caller)
    [failed] = [span for span in Spans(exported).all if not span.status.is_ok and span.events]
    assert failed.attributes is not None
    assert failed.attributes["error.type"] == "OSError"
    assert failed.attributes["kvcache.block.failed"] == 6
