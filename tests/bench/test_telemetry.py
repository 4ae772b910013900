"""The cost of spans of a lookup and a load: without a provider, not sampled, and recorded.

In processor time of the whole process, which includes the thread that exports.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import INVALID_SPAN, NoOpTracer

from kvcache import Stack, telemetry
from kvcache.lower.tier import LowerTier
from kvcache.sizes import Size
from kvcache.slab import PAGE
from kvcache.testing import keys_of
from kvcache.tiers.dram import DramTier
from tests.support.failing_parts import FaultyTier

pytestmark = pytest.mark.bench

ROUNDS, TURNS = 15, 300


class DiscardingExporter(SpanExporter):
    def export(self, spans: Sequence[Any]) -> SpanExportResult:
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        pass


class NoSpans:
    """A tracer that costs nothing, as if the code had no spans."""

    def start_span(self, *_: object, **__: object) -> Any:
        return INVALID_SPAN


def tracers() -> dict[str, Any]:
    recording, off = TracerProvider(), TracerProvider(sampler=ALWAYS_OFF)
    recording.add_span_processor(BatchSpanProcessor(DiscardingExporter()))
    recorded = recording.get_tracer("kvcache")
    return {
        "no spans": NoSpans(),
        "no provider": NoOpTracer(),
        "not sampled": off.get_tracer("kvcache"),
        "recorded, empty": recorded,
        "recorded": recorded,
    }


def costs(monkeypatch: pytest.MonkeyPatch, once: Callable[[], None]) -> dict[str, float]:
    """Microseconds of ``once`` beyond those without spans, by tracer: medians of rounds in turn."""
    took: dict[str, list[float]] = {}
    by_name = list(tracers().items())
    for turn in range(ROUNDS):
        for name, tracer in by_name if turn % 2 else by_name[::-1]:
            monkeypatch.setattr(telemetry, "tracer", tracer)
            if name == "no spans":  # end_span() would still look at the attributes
                monkeypatch.setattr(telemetry, "end_span", lambda *_, **__: None)
            if name == "recorded, empty":  # the cost of the SDK, without attributes
                monkeypatch.setattr(telemetry, "end_span", lambda span, *_, **__: span.end())
            begun = time.process_time()
            for _ in range(TURNS):
                once()
            took.setdefault(name, []).append((time.process_time() - begun) / TURNS * 1e6)
            monkeypatch.undo()
    base = took.pop("no spans")
    return {
        name: statistics.median(t - b for t, b in zip(times, base, strict=True))
        for name, times in took.items()
    }


def test_operation_in_l1_costs_microseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two operations: match, and fetch with the end of its lease."""
    found = {}
    with Stack(DramTier(block_nbytes=PAGE, capacity=Size(1024 * PAGE)), profile="bench") as stack:
        stack.front.slab.wait_populated()
        for blocks in (1, 512):
            keys = keys_of("a", blocks)
            stack.reserve(keys).end()

            def once(keys: list[bytes] = keys) -> None:
                stack.fetch(stack.match(keys).result()).result().end()

            found[blocks] = {name: cost / 2 for name, cost in costs(monkeypatch, once).items()}
            print(f"{blocks} blocks, us per operation:", found[blocks])
    assert found[1]["no provider"] <= 2
    assert found[1]["not sampled"] <= 5


@pytest.mark.xfail(strict=False, reason="the SDK alone takes 93 us for the four spans")
def test_lookup_and_load_over_two_tiers_cost_100_us_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    front = DramTier(block_nbytes=PAGE, capacity=Size(64 * PAGE))
    lower = LowerTier(FaultyTier(), name="l2", front=front, namespace=b"")
    with Stack(front, [lower], profile="bench") as stack:
        front.slab.wait_populated()
        keys = keys_of("a", 2)
        stack.reserve(keys).end()
        assert stack.flush(10)

        def once() -> None:
            front.remove(keys[1:])
            lease = stack.fetch(stack.match(keys).result()).result()
            assert len(lease) == 2
            lease.end()

        found = costs(monkeypatch, once)
        print("a lookup and a load over two tiers, us:", found)
    assert found["recorded"] <= 100
