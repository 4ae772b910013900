"""The spans of lower tiers: under the operation that touched them, or linked to their cause."""

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
from tests.support.failing_parts import Faulty
from tests.support.stack_under_test import LONG, StackUnderTest

WHOSE = {"kvcache.tier.name": "l2", "kvcache.tier.type": "Faulty"}


@pytest.fixture
def below() -> Iterator[StackUnderTest]:
    below = StackUnderTest(blocks_per_call=2)
    yield below
    assert below.stack.flush(LONG)
    below.stack.close()


class Spans:
    def __init__(self, exported: InMemorySpanExporter) -> None:
        self.all: Sequence[ReadableSpan] = exported.get_finished_spans()
        exported.clear()

    def one(self, name: str) -> ReadableSpan:
        [span] = [span for span in self.all if span.name == name]
        return span

    def of(self, name: str) -> dict[str, Any]:
        found = dict(self.one(name).attributes or {})
        found.pop("kvcache.queue.duration", None)
        return found

    def names(self) -> list[str]:
        return sorted(span.name for span in self.all)

    def is_below(self, child: str, parent: str) -> bool:
        under, over = self.one(child), self.one(parent)
        assert under.context is not None
        assert over.context is not None
        return (
            under.parent is not None
            and under.parent.span_id == over.context.span_id
            and under.context.trace_id == over.context.trace_id
        )

    def events(self, name: str) -> list[str]:
        return [event.name for event in self.one(name).events]


def test_a_tier_that_is_touched_has_a_span_under_the_operation(
    below: StackUnderTest, exported: InMemorySpanExporter
) -> None:
    keys = keys_of("a", 6)
    below.put(keys[:1])
    assert below.stack.flush(LONG)
    below.put_in_tier(keys[1:5])
    Spans(exported)
    caller = TracerProvider().get_tracer("caller").start_span("request")
    context = trace.set_span_in_context(caller)
    match = below.stack.match(keys, context=context).result(LONG)
    looked = Spans(exported)
    assert looked.names() == ["kvcache.lookup", "kvcache.tier.contains"]
    assert looked.is_below("kvcache.tier.contains", "kvcache.lookup")
    assert looked.one("kvcache.lookup").parent == caller.get_span_context()
    assert looked.of("kvcache.lookup")["kvcache.block.hit"] == 5
    assert looked.of("kvcache.tier.contains") == WHOSE | {
        "kvcache.block.requested": 5,
        "kvcache.block.hit": 4,
    }
    assert (looked.one("kvcache.tier.contains").attributes or {})["kvcache.queue.duration"] >= 0  # type: ignore[operator]
    below.stack.fetch(match, context=context).result(LONG).end()
    loaded = Spans(exported)
    assert loaded.names() == ["kvcache.load", "kvcache.tier.load"]  # of two calls
    assert loaded.is_below("kvcache.tier.load", "kvcache.load")
    assert loaded.of("kvcache.tier.load") == WHOSE | {
        "kvcache.block.requested": 4,
        "kvcache.block.hit": 4,
        "kvcache.payload.size": 4 * PAGE,
    }


def test_a_prefetch_is_an_operation_of_its_own(
    below: StackUnderTest, exported: InMemorySpanExporter
) -> None:
    keys = keys_of("a", 3)
    below.put_in_tier(keys[:2])
    coming = below.stack.prefetch(keys)
    assert coming is not None
    coming.result(LONG)
    spans = Spans(exported)
    assert spans.names() == ["kvcache.prefetch", "kvcache.tier.contains", "kvcache.tier.load"]
    assert spans.is_below("kvcache.tier.contains", "kvcache.prefetch")
    assert spans.is_below("kvcache.tier.load", "kvcache.prefetch")
    assert spans.of("kvcache.prefetch")["kvcache.block.hit"] == 2


def test_what_comes_up_for_a_hint_is_linked_to_its_cause(
    below: StackUnderTest, exported: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(below.stack.lower, "submit", lambda call: call())
    caller = TracerProvider().get_tracer("caller").start_span("request")
    silent = TracerProvider(sampler=ALWAYS_OFF).get_tracer("caller").start_span("request")
    for name, cause in (("a", caller), ("b", silent), ("c", None)):
        keys = keys_of(name, 2)
        below.put_in_tier(keys)
        context = None if cause is None else trace.set_span_in_context(cause)
        below.stack.hint(keys, soon=True, context=context)
        assert all(below.front.contains(keys))
        spans = Spans(exported)
        if cause is silent:
            assert not spans.all
            continue
        coming = spans.one("kvcache.prefetch")
        assert coming.parent is None
        assert [link.context for link in coming.links] == (
            [] if cause is None else [cause.get_span_context()]
        )
        assert spans.is_below("kvcache.tier.load", "kvcache.prefetch")


def test_what_is_written_later_is_linked_to_its_cause(
    below: StackUnderTest, exported: InMemorySpanExporter
) -> None:
    keys = keys_of("a", 2)
    below.put_in_tier(keys[:1])
    below.put(keys)
    assert below.stack.flush(LONG)
    below.stack.close()  # the threads have ended, and their spans
    spans = Spans(exported)
    cause, written = spans.one("kvcache.store"), spans.one("kvcache.tier.store")
    assert written.parent is None
    assert [link.context for link in written.links] == [cause.context]
    assert cause.context is not None
    assert written.context is not None
    assert cause.context.trace_id != written.context.trace_id
    assert spans.of("kvcache.tier.store") == WHOSE | {
        "kvcache.block.requested": 2,
        "kvcache.block.stored": 1,
        "kvcache.block.known": 1,
        "kvcache.payload.size": PAGE,
    }


def test_a_tier_may_add_spans_of_its_own(
    below: StackUnderTest, exported: InMemorySpanExporter
) -> None:
    inner = Faulty()

    class Traced(Faulty):
        def contains(self, keys: Sequence[bytes]) -> list[bool]:
            telemetry.start_span("theirs", None).end()
            return inner.contains(keys)

    below.lower[0].channel.tier = Traced()
    below.stack.match(keys_of("a", 1)).result(LONG)
    spans = Spans(exported)
    assert spans.is_below("theirs", "kvcache.tier.contains")


def test_failures_and_the_breaker_are_events(
    below: StackUnderTest, exported: InMemorySpanExporter
) -> None:
    keys = keys_of("a", 2)
    below.tiers[0].fault = "raise"
    for turn in range(3):
        below.stack.match(keys).result(LONG)
        spans = Spans(exported)
        failed = spans.one("kvcache.tier.contains")
        assert failed.status.status_code is StatusCode.ERROR
        assert spans.of("kvcache.tier.contains")["error.type"] == "OSError"
        opened = ["kvcache.breaker.opened"] if turn == 2 else []
        assert spans.events("kvcache.tier.contains") == ["kvcache.tier.failed", *opened]
        event = dict(failed.events[0].attributes or {})
        assert event["exception.message"] == "contains fails"
        assert event["error.type"] == "OSError"
    below.stack.match(keys).result(LONG)
    assert Spans(exported).of("kvcache.lookup")["kvcache.skip.reason"] == "breaker_open"
    below.tiers[0].fault = ""
    below.lower[0].channel.health.breaker._retry_at = 0.0
    below.stack.match(keys).result(LONG)
    assert Spans(exported).events("kvcache.tier.contains") == ["kvcache.breaker.closed"]


def test_of_two_tiers_the_one_not_asked_says_why(exported: InMemorySpanExporter) -> None:
    below = StackUnderTest(tiers=2)
    breaker = below.lower[0].channel.health.breaker
    for _ in range(3):
        breaker.record_failure()
    below.stack.match(keys_of("a", 2)).result(LONG)
    asked = {
        (span.attributes or {})["kvcache.tier.name"]: dict(span.attributes or {})
        for span in Spans(exported).all
        if span.name == "kvcache.tier.contains"
    }
    assert asked["l2"]["kvcache.skip.reason"] == "breaker_open"
    assert "kvcache.skip.reason" not in asked["l3"]
    below.stack.close()


def test_what_is_computed_rather_says_so(
    below: StackUnderTest, exported: InMemorySpanExporter
) -> None:
    keys = keys_of("a", 3)
    below.put_in_tier(keys)
    below.stack.observe_compute(1, 0.1)
    below.lower[0]._load_latency.observe(1, 10.0)
    below.lower[0]._remeasured_at = 1e12
    assert below.stack.match(keys).result(LONG).blocks == 0
    spans = Spans(exported)
    why = {"kvcache.block.skipped": 3, "kvcache.skip.reason": "slower_than_computing"}
    assert spans.of("kvcache.tier.load") == WHOSE | why
    assert spans.is_below("kvcache.tier.load", "kvcache.lookup")
    assert why.items() <= spans.of("kvcache.lookup").items()


def test_what_is_dropped_is_an_event_on_the_store(exported: InMemorySpanExporter) -> None:
    below = StackUnderTest(slots=16, queue=PAGE)
    below.put(keys_of("a", 3))
    store = Spans(exported).one("kvcache.store")
    [event] = store.events
    assert event.name == "kvcache.blocks.dropped"
    assert dict(event.attributes or {}) == WHOSE | {"kvcache.block.dropped": 2}
    below.stack.close()


@pytest.mark.parametrize("sampled", [True, False])
def test_spans_do_not_grow_in_number_with_the_blocks(
    monkeypatch: pytest.MonkeyPatch, sampled: bool
) -> None:
    counts = []
    for blocks in (2, 8):
        exporter = InMemorySpanExporter()
        provider = TracerProvider() if sampled else TracerProvider(sampler=ALWAYS_OFF)
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        asked: list[Any] = []
        tracer = provider.get_tracer("kvcache")
        start = tracer.start_span

        def counted(*what: Any, start: Any = start, asked: Any = asked, **more: Any) -> Any:
            asked.append(what)
            return start(*what, **more)

        monkeypatch.setattr(tracer, "start_span", counted)
        monkeypatch.setattr(telemetry, "_tracer", tracer)
        below = StackUnderTest(slots=64, blocks_per_call=2)
        keys, new = keys_of("a", blocks), keys_of("b", blocks)
        below.put_in_tier(keys)
        assert below.fetch_count(keys) == blocks
        below.put(new)
        assert below.stack.flush(LONG)
        below.stack.close()
        names = [span.name for span in exporter.get_finished_spans()]
        assert len(asked) == (len(names) if sampled else 3)  # children follow their parent
        counts.append(sorted(set(names)))
        assert names.count("kvcache.tier.load") == sampled
    assert counts[0] == counts[1]
