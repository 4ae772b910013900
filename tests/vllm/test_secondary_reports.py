"""What a secondary tier reports: KV events, metrics, spans."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")

from kvcache.connectors.vllm.metrics import labels_of, prometheus_name
from kvcache.metrics import METRICS
from tests.support import played_tiering
from tests.support.played_tiering import SharedFaultyTier, keep, keys_of, played
from tests.support.waiting import eventually

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("same_weights")]


# Events


def events_of(engine: played_tiering.PlayedTiering) -> list[tuple[list[bytes], bool]]:
    """Return keys and direction of the secondary tier's events."""
    return [
        (sorted(event.keys), event.removed)
        for event in engine.tier.take_events()
        if event.medium.value == "STORAGE"
    ]


def test_stored_blocks_are_announced_once_and_retracted_when_gone(
    faulty_options: dict[str, object],
) -> None:
    keys = keys_of("a", 3)
    options = faulty_options | {"enable_kv_events": True, "locality": "LOCAL"}
    with played(options, rows=4, events=True) as engine:
        request = engine.start("a")
        engine.store(request, keys)
        engine.settle()
        events = list(engine.tier.take_events())
        assert [sorted(event.keys) for event in events] == [keys]
        assert [event.locality.value for event in events] == ["LOCAL"]
        engine.finish(request)
        request = engine.start("b")
        engine.store(request, keys_of("b", 4))  # evicts "a" from vLLM's memory
        engine.settle()
        assert events_of(engine) == [(keys_of("b", 4), False)]
        engine.finish(request)
        request = engine.start("c")
        tier = SharedFaultyTier.last()
        tier.fault = "hole"  # every third block is reported to be held, and not returned
        assert engine.find(request, keys) == [True, False, True]
        assert events_of(engine) == [([keys[1]], True)]
        engine.finish(request)


def test_events_after_a_reset_retract_all_blocks(faulty_options: dict[str, object]) -> None:
    keys = keys_of("a", 3)
    with played(faulty_options | {"enable_kv_events": True}, events=True) as engine:
        request = engine.start("a")
        engine.store(request, keys)
        eventually(lambda: len(SharedFaultyTier.shared) == 3, "the store")
        engine.manager.reset_cache()
        assert events_of(engine) == [(keys, False), (keys, True)]
        engine.finish(request)


def test_events_without_vllms_are_off_and_warned_of(
    faulty_options: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    with played(faulty_options | {"enable_kv_events": True}) as engine:
        request = engine.start("a")
        engine.store(request, keys_of("a", 2))
        engine.settle()
        assert list(engine.tier.take_events()) == []
        engine.finish(request)
    assert "vLLM publishes no KV events" in caplog.text


# Metrics and spans


def test_metrics_are_those_of_the_connector(disk_options: dict[str, object]) -> None:
    with played(disk_options) as engine:
        request = engine.start("a")
        engine.store(request, keys_of("a", 3))
        engine.settle()
        stats = engine.manager.get_stats()
        engine.finish(request)
        definitions = type(engine.spec).build_metric_definitions(engine.spec.extra_config)
    reported = {name: values for name, values in stats.data["data"].items() if "kvcache" in name}
    assert reported["vllm:kvcache_tier_stores"] == {("disk", "disk", "stored"): 3}
    for metric in METRICS:
        name = prometheus_name(metric)
        assert list(definitions[name].labelnames) == labels_of(metric)
        assert all(len(labels) == len(labels_of(metric)) for labels in reported.get(name, ()))
    assert set(reported) <= set(definitions)


def test_spans_of_a_request_are_below_the_callers_span(
    disk_options: dict[str, object], exported: Any
) -> None:
    keep(disk_options, keys_of("a", 3))
    exported.clear()
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    params = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
    with played(disk_options) as engine:
        request = engine.start("chat-1", kv_transfer_params=params)
        assert engine.find(request, keys_of("a", 4)) == [True] * 3 + [False]
        engine.finish(request)
    spans = {span.name: span for span in exported.get_finished_spans()}
    names = {"kvcache.request", "kvcache.lookup", "kvcache.load", "kvcache.tier.load"}
    assert names <= set(spans)
    assert {f"{spans[name].context.trace_id:032x}" for name in names} == {trace_id}
    assert spans["kvcache.request"].attributes["kvcache.request.id"] == "chat-1"
    assert spans["kvcache.lookup"].attributes["kvcache.block.hit"] == 3
    assert spans["kvcache.load"].attributes["kvcache.block.hit"] == 3


def test_tables_of_ended_requests_are_empty(disk_options: dict[str, object]) -> None:
    with played(disk_options, rows=64) as engine:
        lookups = engine.tier.open_requests()
        for number in range(5):
            request = engine.start(f"r{number}")
            engine.find(request, keys_of("a", 3))
            engine.step(request)
            engine.store(request, keys_of(f"p{number}", 2))
            engine.settle()
            engine.finish(request)
        assert engine.tier.open_requests() == lookups == 0
