"""The spans of lower tiers: children of the operation that called the tier, or linked to it."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import StatusCode

from kvcache import telemetry
from kvcache.slab import PAGE
from kvcache.testing import keys_of
from tests.support.failing_parts import FaultyTier
from tests.support.manual_clock import ManualClock
from tests.support.stack_under_test import LONG, StackUnderTest

TIER = {"kvcache.tier.name": "l2", "kvcache.tier.type": "FaultyTier"}


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(100.0)


@pytest.fixture
def under_test(clock: ManualClock) -> Iterator[StackUnderTest]:
    under_test = StackUnderTest(blocks_per_call=2, clock=clock)
    yield under_test
    assert under_test.stack.flush(LONG)
    under_test.stack.close()


class Spans:
    """The spans that have ended; creating it clears the exporter."""

    def __init__(self, exported: InMemorySpanExporter) -> None:
        self.all: Sequence[ReadableSpan] = exported.get_finished_spans()
        exported.clear()

    def one(self, name: str) -> ReadableSpan:
        [span] = [span for span in self.all if span.name == name]
        return span

    def attributes(self, name: str) -> dict[str, Any]:
        """The attributes of the span, without the one that differs in every run."""
        found = dict(self.one(name).attributes or {})
        found.pop("kvcache.queue.duration", None)
        return found

    def names(self) -> list[str]:
        return sorted(span.name for span in self.all)

    def is_child(self, child_name: str, parent_name: str) -> bool:
        child, parent = self.one(child_name), self.one(parent_name)
        assert child.context is not None
        assert parent.context is not None
        return (
            child.parent is not None
            and child.parent.span_id == parent.context.span_id
            and child.context.trace_id == parent.context.trace_id
        )

    def events(self, name: str) -> list[str]:
        return [event.name for event in self.one(name).events]


def test_called_tier_has_a_span_under_the_operation(
    under_test: StackUnderTest, exported: InMemorySpanExporter
) -> None:
    keys = keys_of("a", 6)
    under_test.put(keys[:1])
    assert under_test.stack.flush(LONG)
    under_test.put_in_tier(keys[1:5])
    Spans(exported)
    caller = TracerProvider().get_tracer("caller").start_span("request")
    context = trace.set_span_in_context(caller)
    match = under_test.stack.match(keys, context=context).result(LONG)
    lookup = Spans(exported)
    assert lookup.names() == ["kvcache.lookup", "kvcache.tier.contains"]
    assert lookup.is_child("kvcache.tier.contains", "kvcache.lookup")
    assert lookup.one("kvcache.lookup").parent == caller.get_span_context()
    assert lookup.attributes("kvcache.lookup")["kvcache.block.hit"] == 5
    assert lookup.attributes("kvcache.tier.contains") == TIER | {
        "kvcache.block.requested": 5,
        "kvcache.block.hit": 4,
    }
    assert (lookup.one("kvcache.tier.contains").attributes or {})["kvcache.queue.duration"] >= 0  # type: ignore[operator]
    under_test.stack.fetch(match, context=context).result(LONG).end()
    load = Spans(exported)
    assert load.names() == ["kvcache.load", "kvcache.tier.load"]  # one span for two calls
    assert load.is_child("kvcache.tier.load", "kvcache.load")
    assert load.attributes("kvcache.tier.load") == TIER | {
        "kvcache.block.requested": 4,
        "kvcache.block.hit": 4,
        "kvcache.payload.size": 4 * PAGE,
    }


def test_prefetch_has_its_own_span_with_those_of_the_tier(
    under_test: StackUnderTest, exported: InMemorySpanExporter
) -> None:
    keys = keys_of("a", 3)
    under_test.put_in_tier(keys[:2])
    prefetched = under_test.stack.prefetch(keys)
    assert prefetched is not None
    prefetched.result(LONG)
    spans = Spans(exported)
    assert spans.names() == ["kvcache.prefetch", "kvcache.tier.contains", "kvcache.tier.load"]
    assert spans.is_child("kvcache.tier.contains", "kvcache.prefetch")
    assert spans.is_child("kvcache.tier.load", "kvcache.prefetch")
    assert spans.attributes("kvcache.prefetch")["kvcache.block.hit"] == 2


def test_prefetch_for_a_hint_is_linked_to_its_cause(
    under_test: StackUnderTest, exported: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(under_test.stack.lower, "submit", lambda call: call())
    caller = TracerProvider().get_tracer("caller").start_span("request")
    unsampled = TracerProvider(sampler=ALWAYS_OFF).get_tracer("caller").start_span("request")
    for name, cause in (("a", caller), ("b", unsampled), ("c", None)):
        keys = keys_of(name, 2)
        under_test.put_in_tier(keys)
        context = None if cause is None else trace.set_span_in_context(cause)
        under_test.stack.hint(keys, soon=True, context=context)
        assert all(under_test.front.contains(keys))
        spans = Spans(exported)
        if cause is unsampled:
            assert not spans.all
            continue
        prefetch = spans.one("kvcache.prefetch")
        assert prefetch.parent is None
        assert [link.context for link in prefetch.links] == (
            [] if cause is None else [cause.get_span_context()]
        )
        assert spans.is_child("kvcache.tier.load", "kvcache.prefetch")


def test_write_behind_has_a_trace_linked_to_its_store(
    under_test: StackUnderTest, exported: InMemorySpanExporter
) -> None:
    keys = keys_of("a", 2)
    under_test.put_in_tier(keys[:1])
    under_test.put(keys)
    assert under_test.stack.flush(LONG)
    under_test.stack.close()  # the threads have ended, and with them their spans
    spans = Spans(exported)
    cause, written = spans.one("kvcache.store"), spans.one("kvcache.tier.store")
    assert written.parent is None
    assert [link.context for link in written.links] == [cause.context]
    assert cause.context is not None
    assert written.context is not None
    assert cause.context.trace_id != written.context.trace_id
    assert spans.attributes("kvcache.tier.store") == TIER | {
        "kvcache.block.requested": 2,
        "kvcache.block.stored": 1,
        "kvcache.block.known": 1,
        "kvcache.payload.size": PAGE,
    }


def test_span_of_a_tier_is_a_child_of_its_call(exported: InMemorySpanExporter) -> None:
    class TracedTier(FaultyTier):
        def contains(self, keys: Sequence[bytes]) -> list[bool]:
            telemetry.start_span("theirs", None).end()
            return super().contains(keys)

    under_test = StackUnderTest(tiers=[TracedTier()])
    under_test.stack.match(keys_of("a", 1)).result(LONG)
    under_test.stack.close()
    spans = Spans(exported)
    assert spans.is_child("theirs", "kvcache.tier.contains")


def test_failed_calls_and_breaker_changes_are_span_events(
    under_test: StackUnderTest, clock: ManualClock, exported: InMemorySpanExporter
) -> None:
    keys = keys_of("a", 2)
    under_test.tiers[0].fault = "raise"
    for turn in range(3):
        under_test.stack.match(keys).result(LONG)
        spans = Spans(exported)
        failed = spans.one("kvcache.tier.contains")
        assert failed.status.status_code is StatusCode.ERROR
        assert spans.attributes("kvcache.tier.contains")["error.type"] == "OSError"
        opened = ["kvcache.breaker.opened"] if turn == 2 else []
        assert spans.events("kvcache.tier.contains") == ["kvcache.tier.failed", *opened]
        event = dict(failed.events[0].attributes or {})
        assert event["exception.message"] == "contains fails"
        assert event["error.type"] == "OSError"
    under_test.stack.match(keys).result(LONG)
    assert Spans(exported).attributes("kvcache.lookup")["kvcache.skip.reason"] == "breaker_open"
    under_test.tiers[0].fault = ""
    clock.advance(1.0)  # the pause of the circuit breaker
    under_test.stack.match(keys).result(LONG)
    assert Spans(exported).events("kvcache.tier.contains") == ["kvcache.breaker.closed"]


def test_span_of_a_tier_that_is_not_called_has_the_reason(exported: InMemorySpanExporter) -> None:
    under_test = StackUnderTest(tiers=2)
    for _ in range(3):
        under_test.lower[0].channel.health.breaker.record_failure()
    under_test.stack.match(keys_of("a", 2)).result(LONG)
    attributes = {
        (span.attributes or {})["kvcache.tier.name"]: dict(span.attributes or {})
        for span in Spans(exported).all
        if span.name == "kvcache.tier.contains"
    }
    assert attributes["l2"]["kvcache.skip.reason"] == "breaker_open"
    assert "kvcache.skip.reason" not in attributes["l3"]
    under_test.stack.close()


def test_span_of_a_tier_slower_than_computing_has_the_reason(
    exported: InMemorySpanExporter,
) -> None:
    clock = ManualClock(100.0)

    class SlowLoads(FaultyTier):
        def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
            clock.advance(10.0)
            return super().load(keys, into)

    under_test = StackUnderTest(tiers=[SlowLoads()], clock=clock, kind="FaultyTier")
    measured, keys = keys_of("measured", 1), keys_of("a", 3)
    under_test.put_in_tier(measured + keys)
    assert under_test.fetch_count(measured) == 1
    under_test.stack.observe_compute(1, 0.1)
    assert under_test.lower[0].claim_remeasure()  # so that no remeasurement is due
    Spans(exported)
    assert under_test.stack.match(keys).result(LONG).blocks == 0
    spans = Spans(exported)
    skip = {"kvcache.block.skipped": 3, "kvcache.skip.reason": "slower_than_computing"}
    assert spans.attributes("kvcache.tier.load") == TIER | skip
    assert spans.is_child("kvcache.tier.load", "kvcache.lookup")
    assert skip.items() <= spans.attributes("kvcache.lookup").items()
    under_test.stack.close()


def test_dropped_blocks_are_an_event_of_the_store_span(exported: InMemorySpanExporter) -> None:
    under_test = StackUnderTest(slots=16, queue=PAGE)
    under_test.put(keys_of("a", 3))
    store = Spans(exported).one("kvcache.store")
    [event] = store.events
    assert event.name == "kvcache.blocks.dropped"
    assert dict(event.attributes or {}) == TIER | {"kvcache.block.dropped": 2}
    under_test.stack.close()


@pytest.mark.parametrize("sampled", [True, False])
def test_number_of_spans_does_not_depend_on_the_blocks(
    monkeypatch: pytest.MonkeyPatch, sampled: bool
) -> None:
    counts = []
    for blocks in (2, 8):
        exporter = InMemorySpanExporter()
        provider = TracerProvider() if sampled else TracerProvider(sampler=ALWAYS_OFF)
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        started: list[Any] = []
        tracer = provider.get_tracer("kvcache")
        start = tracer.start_span

        def recording_start(
            *arguments: Any, start: Any = start, started: Any = started, **options: Any
        ) -> Any:
            started.append(arguments)
            return start(*arguments, **options)

        monkeypatch.setattr(tracer, "start_span", recording_start)
        monkeypatch.setattr(telemetry, "tracer", tracer)
        under_test = StackUnderTest(slots=64, blocks_per_call=2)
        keys, new = keys_of("a", blocks), keys_of("b", blocks)
        under_test.put_in_tier(keys)
        assert under_test.fetch_count(keys) == blocks
        under_test.put(new)
        assert under_test.stack.flush(LONG)
        under_test.stack.close()
        names = [span.name for span in exporter.get_finished_spans()]
        assert len(started) == (
            len(names) if sampled else 3
        )  # no child of a span that is not recorded
        counts.append(sorted(set(names)))
        assert names.count("kvcache.tier.load") == sampled
    assert counts[0] == counts[1]
