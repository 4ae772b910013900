"""The counts of a stack in vLLM: reports, the message to the front end, log line, Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import msgspec
import prometheus_client
from prometheus_client import REGISTRY

from kvcache import metrics
from kvcache.connectors.vllm import KVCacheConnector
from kvcache.connectors.vllm.messages import Acks
from kvcache.connectors.vllm.metrics import (
    REPORT_EVERY_S,
    PromMetrics,
    Reports,
    Stats,
    labels_of,
    prometheus_name,
)
from kvcache.slab import PAGE
from kvcache.testing import keys_of
from tests.support.played_engine import BLOCK, PlayedEngine, Request, opened
from tests.support.stack_under_test import LONG, StackUnderTest

pytestmark = pytest.mark.engine


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def below() -> Iterator[StackUnderTest]:
    below = StackUnderTest()
    with below.stack:
        yield below


def received(stats: Stats | None) -> dict[str, Any]:
    """Return the report as vLLM's front end receives it."""
    assert stats is not None
    sent = stats.to_dict() if hasattr(stats, "to_dict") else stats.data  # `data` before vLLM 0.30
    decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=dict[str, Any])
    return KVCacheConnector.build_kv_connector_stats(decoded).data


def test_reports_add_up_to_the_counts(below: StackUnderTest) -> None:
    clock = Clock()
    reports = Reports(below.stack, clock)
    whole = Stats()
    for n in range(3):
        clock.now += REPORT_EVERY_S
        below.put(keys_of(f"chain {n}", 3))
        below.fetch_count(keys_of(f"chain {n}", 4 + n))
        whole.aggregate(
            KVCacheConnector.build_kv_connector_stats(received(reports.take(now=False)))
        )
    assert below.stack.flush(LONG)
    below.lower[0].channel.workers.close(LONG)
    whole.aggregate(KVCacheConnector.build_kv_connector_stats(received(reports.take(now=True))))
    for tier, numbers in metrics.values_by_tier(below.stack.stats()):
        for metric, by_value in numbers.items():
            for value, number in by_value.items():
                labels = (*tier, value) if metric.attributes else tuple(tier)
                assert whole.data.get(metric.name, {}).get(labels, 0) == number, (metric, labels)
    called = Counter(
        {labels[2]: len(each) for labels, each in whole.data[metrics.DURATION.name].items()}
    )
    assert called["lookup"] == 3
    assert called["store"] == 3
    again = reports.take(now=True)
    assert again is not None
    assert {metrics.METRICS[0].name, metrics.DURATION.name}.isdisjoint(again.data)


def test_reports_come_once_a_second_or_now(below: StackUnderTest) -> None:
    clock = Clock()
    reports = Reports(below.stack, clock)
    assert reports.take(now=False) is not None
    assert reports.take(now=False) is None
    assert reports.take(now=True) is not None
    clock.now += REPORT_EVERY_S
    assert reports.take(now=False) is not None


def test_stats_reduce_to_the_log_line(below: StackUnderTest) -> None:
    reports = Reports(below.stack)
    below.put(keys_of("a", 3))
    below.fetch_count(keys_of("a", 4))
    below.tiers[0].fault = "decline"
    below.put(keys_of("b", 1))
    below.lower[0].channel.workers.close(LONG)
    one, two = reports.take(now=True), reports.take(now=True)
    assert one is not None
    assert two is not None
    assert not one.is_empty()
    line = one.aggregate(two).reduce()
    assert line == {
        "l1 hits": "3/4",
        "l1 read": "12KiB",
        "l1 written": "16KiB",
        "l1 used": "16KiB/64KiB",
        "l2 hits": "0/1",
        "l2 read": "0B",
        "l2 written": "12KiB",
        "l2 declined": 1,
    }
    one.reset()
    assert one.is_empty()
    assert one.reduce() == {}


def test_stats_of_two_loggers_are_added_up_apart(below: StackUnderTest) -> None:
    reports = Reports(below.stack)
    below.put(keys_of("a", 3))
    data = received(reports.take(now=True))
    first = KVCacheConnector.build_kv_connector_stats(data)
    first.aggregate(KVCacheConnector.build_kv_connector_stats(data))
    second = KVCacheConnector.build_kv_connector_stats(data)
    stored = ("l1", "DramTier", "stored")
    assert second.data[metrics.STORES.name][stored] == 3
    assert first.data[metrics.STORES.name][stored] == 6


@pytest.fixture
def prometheus() -> Iterator[PromMetrics]:
    kinds = {
        kind: kind
        for kind in (
            prometheus_client.Gauge,
            prometheus_client.Counter,
            prometheus_client.Histogram,
        )
    }
    made = KVCacheConnector.build_prom_metrics(
        SimpleNamespace(kv_transfer_config=None), kinds, ["engine"], {0: ["0"], 1: ["1"]}
    )
    yield made
    for family in made.families.values():
        REGISTRY.unregister(family)


def test_prometheus_has_every_metric_from_the_start(prometheus: PromMetrics) -> None:
    page = prometheus_client.generate_latest().decode()
    for metric in metrics.METRICS:
        total = "_total" if metric.kind == "counter" else ""
        assert f"# TYPE {prometheus_name(metric)}{total} {metric.kind}" in page


def test_prometheus_shows_what_was_counted(below: StackUnderTest, prometheus: PromMetrics) -> None:
    reports = Reports(below.stack)
    for _ in range(2):
        below.put(keys_of("a", 3))
        below.fetch_count(keys_of("a", 4))
        prometheus.observe(received(reports.take(now=True)), 1)
    named = {"engine": "1", "tier": "l1", "type": "DramTier"}

    def value(name: str, **labels: str) -> float | None:
        return REGISTRY.get_sample_value(f"vllm:kvcache_tier_{name}", named | labels)

    assert value("lookups_total", result="hit") == 6
    assert value("lookups_total", result="miss") == 2
    assert value("io_bytes_total", direction="read") == 6 * PAGE
    assert value("usage_bytes") == 3 * PAGE
    assert value("pinned") == 0
    assert value("operation_duration_seconds_count", operation="lookup", error="") == 2
    assert labels_of(metrics.DURATION) == ["tier", "type", "operation", "error"]


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlayedEngine]:
    played = opened(monkeypatch, 32)
    yield played
    played.side.close()


def test_copies_take_as_long_as_the_slowest_rank(played: PlayedEngine) -> None:
    request = Request("a", 2 * BLOCK + 1)
    played.admit(request, [1, 2, 3])
    [store] = played.step((request, request.num_tokens)).stores
    played.side.end_step(Acks({store.job: 1}, seconds={store.job: 0.25}))
    played.side.end_step(Acks({store.job: 1}, seconds={store.job: 0.5}))
    played.side.finish(request)
    again = Request("again", 2 * BLOCK + 1, "a")
    played.admit(again, [4, 5, 6])
    [load] = played.step((again, 1)).loads
    played.side.end_step(Acks({load.job: 2}, {load.job}, seconds={load.job: 0.125}))
    report = played.side.report()
    assert report is not None
    copies = {
        labels[2:]: seconds
        for labels, seconds in report.data[metrics.DURATION.name].items()
        if labels[2] != "lookup"
    }
    assert copies == {("store", ""): [0.5], ("load", "copy_failed"): [0.125]}


def test_report_is_due_when_no_request_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    played = opened(monkeypatch, 32, clock=Clock())
    assert played.side.report() is not None
    request = Request("a", 2 * BLOCK)
    played.admit(request, [1, 2])
    assert played.side.report() is None  # within the same second
    played.side.finish(request)
    assert played.side.report() is not None
    played.side.close()
