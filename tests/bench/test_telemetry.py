"""What spans cost: a look-up and a load, with nobody listening, sampled out, and recorded.

In processor time of the whole process, the thread that exports included.
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


class Nowhere(SpanExporter):
    def export(self, spans: Sequence[Any]) -> SpanExportResult:
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        pass


class Without:
    """As if there were no spans in the code."""

    def start_span(self, *_: object, **__: object) -> Any:
        return INVALID_SPAN


def tracers() -> dict[str, Any]:
    recording, off = TracerProvider(), TracerProvider(sampler=ALWAYS_OFF)
    recording.add_span_processor(BatchSpanProcessor(Nowhere()))
    heard = recording.get_tracer("kvcache")
    return {
        "without": Without(),
        "no provider": NoOpTracer(),
        "sampled out": off.get_tracer("kvcache"),
        "recording, nothing in it": heard,
        "recording": heard,
    }


def costs(monkeypatch: pytest.MonkeyPatch, once: Callable[[], None]) -> dict[str, float]:
    """Microseconds of ``once`` more than without, by who listens: medians of rounds in turn."""
    took: dict[str, list[float]] = {}
    everybody = list(tracers().items())
    for turn in range(ROUNDS):
        for name, tracer in everybody if turn % 2 else everybody[::-1]:
            monkeypatch.setattr(telemetry, "tracer", tracer)
            if name == "without":  # then its attributes are not put together either
                monkeypatch.setattr(telemetry, "end", lambda *_, **__: None)
            if name == "recording, nothing in it":  # what the SDK takes for the spans alone
                monkeypatch.setattr(telemetry, "end", lambda span, *_, **__: span.end())
            begun = time.process_time()
            for _ in range(TURNS):
                once()
            took.setdefault(name, []).append((time.process_time() - begun) / TURNS * 1e6)
            monkeypatch.undo()
    base = took.pop("without")
    return {
        name: statistics.median(t - b for t, b in zip(times, base, strict=True))
        for name, times in took.items()
    }


def test_an_operation_in_l1(monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert found[1]["sampled out"] <= 5


@pytest.mark.xfail(strict=False, reason="missed: the SDK takes 93 us for the four spans alone")
def test_a_lookup_and_a_load_over_two_tiers(monkeypatch: pytest.MonkeyPatch) -> None:
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
        print("a look-up and a load over two tiers, us:", found)
    assert found["recording"] <= 100
