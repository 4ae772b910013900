"""The spans of a stack, as the application's SDK receives them."""

import random
from collections.abc import Iterator

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from kvcache import Stack, telemetry
from kvcache.sizes import Size
from kvcache.slab import PAGE
from kvcache.testing import keys_of
from kvcache.tiers.dram import DramTier


@pytest.fixture
def stack() -> Iterator[Stack]:
    with Stack(DramTier(block_nbytes=PAGE, capacity=Size(8 * PAGE)), profile="ours") as stack:
        yield stack


def take(exported: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    """The spans by name since the last call; no two may have one name."""
    spans = exported.get_finished_spans()
    exported.clear()
    assert len({span.name for span in spans}) == len(spans)
    return {span.name: span for span in spans}


def test_operation_has_one_span_for_all_its_blocks(
    stack: Stack, exported: InMemorySpanExporter
) -> None:
    keys = keys_of("a", 6)
    lease = stack.reserve(keys[:5])
    assert take(exported) == {}  # the span lasts as long as the lease
    lease.end(failed=keys[4:5])
    store = take(exported)["kvcache.store"]
    assert dict(store.attributes or {}) == {
        "kvcache.profile.name": "ours",
        "kvcache.block.requested": 5,
        "kvcache.block.stored": 4,
        "kvcache.block.failed": 1,
        "kvcache.payload.size": 4 * PAGE,
        "error.type": "copy_failed",
    }
    assert store.status.status_code is StatusCode.ERROR

    lease = stack.fetch(stack.match(keys, 1).result()).result()
    lookup = take(exported)["kvcache.lookup"]
    assert dict(lookup.attributes or {}) == {
        "kvcache.profile.name": "ours",
        "kvcache.block.requested": 5,
        "kvcache.block.hit": 3,
        "kvcache.l1.block.hit": 3,
    }
    lease.end()
    load = take(exported)["kvcache.load"]
    assert dict(load.attributes or {}) == {
        "kvcache.profile.name": "ours",
        "kvcache.block.requested": 3,
        "kvcache.block.hit": 3,
        "kvcache.payload.size": 3 * PAGE,
    }
    assert load.status.status_code is StatusCode.UNSET


def test_span_of_an_operation_is_a_child_of_the_callers(
    stack: Stack, exported: InMemorySpanExporter
) -> None:
    caller = TracerProvider().get_tracer("caller").start_span("request")
    context = trace.set_span_in_context(caller)
    keys = keys_of("a", 2)
    stack.reserve(keys, context=context).end()
    stack.fetch(stack.match(keys, context=context).result(), context=context).result().end()
    spans = take(exported)
    assert set(spans) == {"kvcache.store", "kvcache.lookup", "kvcache.load"}
    for span in spans.values():
        assert span.parent is not None
        assert span.parent.span_id == caller.get_span_context().span_id
        assert span.context is not None
        assert span.context.trace_id == caller.get_span_context().trace_id


def test_reserve_of_held_blocks_has_no_span(stack: Stack, exported: InMemorySpanExporter) -> None:
    keys = keys_of("a", 2)
    stack.reserve(keys).end()
    take(exported)
    stack.reserve(keys).end()  # L1 holds both
    assert take(exported) == {}


def test_span_without_an_sdk_records_nothing(stack: Stack) -> None:
    span = telemetry.start_span(telemetry.LOOKUP, None)
    assert not span.is_recording()
    telemetry.end_span(span, {}, error="none")
    stack.reserve(keys_of("a", 1)).end()


def test_store_span_has_the_number_of_evicted_blocks(
    stack: Stack, exported: InMemorySpanExporter
) -> None:
    stack.reserve(keys_of("a", 8)).end()
    take(exported)
    stack.reserve(keys_of("b", 3)).end()
    assert (take(exported)["kvcache.store"].attributes or {})["kvcache.block.evicted"] == 3


def test_span_ids_differ_in_processes_with_the_same_random_seed(
    exported: InMemorySpanExporter,
) -> None:
    headers = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    ids: set[tuple[int, int]] = set()
    drawn: set[float] = set()
    for _ in range(3):
        random.seed(0)
        spans = [
            telemetry.start_request(None),
            telemetry.start_remote_child(headers, telemetry.COPY),
        ]
        ids.update((s.get_span_context().trace_id, s.get_span_context().span_id) for s in spans)
        drawn.add(random.random())
    assert len(ids) == 6
    assert len(drawn) == 1  # the engine draws the same numbers as without kvcache
