"""The metrics of a stack, as the application's SDK collects them."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from kvcache import Stack, metrics
from kvcache.keys import namespaced_key
from kvcache.sizes import Size
from kvcache.slab import PAGE
from kvcache.testing import keys_of
from kvcache.tier import TierUsage
from kvcache.tiers.dram import DramTier
from tests.support.stack_under_test import LONG, NAMESPACE, NEVER, StackUnderTest

TIER_ATTRIBUTES = {"kvcache.profile.name", "kvcache.tier.name", "kvcache.tier.type"}


class Reader:
    """Collects all metrics: for each, the points by tier name and the metric's own attribute."""

    def __init__(self) -> None:
        self._reader = InMemoryMetricReader()
        self.provider = MeterProvider([self._reader])

    def points(self) -> dict[str, list[Any]]:
        collected = self._reader.get_metrics_data()
        return {
            metric.name: list(metric.data.data_points)
            for resource in (collected.resource_metrics if collected else ())
            for metric in resource.scope_metrics[0].metrics
        }

    def collect(self) -> dict[str, dict[tuple[str, ...], Any]]:
        return {
            metric: {
                tuple(
                    str(value)
                    for name, value in point.attributes.items()
                    if name not in TIER_ATTRIBUTES or name == "kvcache.tier.name"
                ): point
                for point in points
            }
            for metric, points in self.points().items()
        }

    def values(self) -> dict[str, dict[tuple[str, ...], Any]]:
        return {
            name: {key: point.value for key, point in points.items()}
            for name, points in self.collect().items()
            if name != metrics.DURATION.name
        }


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    reader = Reader()
    meter = reader.provider.get_meter("kvcache")
    metrics.create_instruments(meter)
    duration = meter.create_histogram(
        metrics.DURATION.name, explicit_bucket_boundaries_advisory=metrics.BUCKETS
    )
    monkeypatch.setattr(metrics, "duration_histogram", duration)
    yield reader
    reader.provider.shutdown()


def stack_of(slots: int, profile: str = "ours") -> Stack:
    return Stack(DramTier(block_nbytes=PAGE, capacity=Size(slots * PAGE)), profile=profile)


def test_metrics_of_l1_count_its_operations(reader: Reader) -> None:
    keys = keys_of("a", 6)
    with stack_of(4) as stack:
        stack.front.slab.wait_populated()
        stack.reserve(keys[:3]).end(failed=keys[2:3])
        with stack.fetch_local(keys):
            assert reader.values()["kvcache.tier.pinned"] == {("l1",): 2}
        stack.fetch_local(keys[:1]).end(failed=keys[:1])
        with stack.reserve(keys_of("b", 5)):
            pass
        found = reader.values()
    assert found == {
        "kvcache.tier.lookups": {("l1", "hit"): 3, ("l1", "miss"): 4},
        "kvcache.tier.loads": {("l1", "loaded"): 2},
        "kvcache.tier.stores": {("l1", "stored"): 6, ("l1", "declined"): 1, ("l1", "failed"): 1},
        "kvcache.tier.io": {("l1", "read"): 2 * PAGE, ("l1", "write"): 6 * PAGE},
        "kvcache.tier.evictions": {("l1",): 1},
        "kvcache.tier.invalidations": {("l1",): 1},
        "kvcache.tier.usage": {("l1",): 4 * PAGE},
        "kvcache.tier.limit": {("l1",): 4 * PAGE},
        "kvcache.tier.pinned": {("l1",): 0},
    }


def test_metrics_of_a_lower_tier_count_its_operations(reader: Reader) -> None:
    under_test = StackUnderTest(queue=Size(4 * PAGE), blocks_per_call=8)
    under_test.tiers[0].usage = lambda: TierUsage(5, 7, 3, {"checksum": 2}, {"OOM": 4})  # type: ignore[method-assign]
    keys = keys_of("a", 8)
    with under_test.stack:
        under_test.put(keys[:6])  # the queue takes four
        assert under_test.stack.flush(LONG)
        under_test.front.clear()
        del under_test.tiers[0].held[namespaced_key(NAMESPACE, keys[3])]
        assert under_test.fetch_count(keys) == 3
        under_test.lower[0].channel.workers.close(LONG)  # the worker has counted its calls
        found = reader.values()
    lower = {
        name: {key[1:]: value for key, value in points.items() if key[0] == "l2"}
        for name, points in found.items()
    }
    assert {name: points for name, points in lower.items() if points} == {
        "kvcache.tier.lookups": {("hit",): 3, ("miss",): 5},
        "kvcache.tier.loads": {("loaded",): 3, ("missed",): 0, ("skipped",): 0},
        "kvcache.tier.stores": {("stored",): 4, ("known",): 0, ("declined",): 0, ("dropped",): 2},
        "kvcache.tier.io": {("read",): 3 * PAGE, ("write",): 4 * PAGE},
        "kvcache.tier.evictions": {(): 3},
        "kvcache.tier.rejections": {("checksum",): 2},
        "kvcache.tier.declines": {("OOM",): 4},
        "kvcache.tier.errors": {(): 0},
        "kvcache.tier.usage": {(): 5},
        "kvcache.tier.limit": {(): 7},
        "kvcache.tier.queue.usage": {(): 0},
        "kvcache.tier.withheld": {(): 0},
        "kvcache.tier.breaker.open": {(): 0},
    }


def test_usage_that_fails_is_not_reported(reader: Reader) -> None:
    under_test = StackUnderTest()

    def fail() -> TierUsage:
        raise OSError

    under_test.tiers[0].usage = fail  # type: ignore[method-assign]
    with under_test.stack:
        found = reader.values()
    assert set(found["kvcache.tier.usage"]) == {("l1",)}
    assert set(found["kvcache.tier.errors"]) == {("l2",)}


def test_instruments_are_those_of_the_table(reader: Reader) -> None:
    under_test = StackUnderTest()
    under_test.tiers[0].usage = lambda: TierUsage(0, 0, 0, {"magic": 1}, {"OOM": 1})  # type: ignore[method-assign]
    with under_test.stack:
        under_test.put(keys_of("a", 1))
        under_test.lower[0].channel.workers.close(LONG)
        found = reader.collect()
    assert set(found) == {metric.name for metric in metrics.METRICS}
    for metric in metrics.METRICS:
        for point in found[metric.name].values():
            names = set(point.attributes or {})
            assert names - TIER_ATTRIBUTES <= set(metric.attributes), metric.name
            assert metric is metrics.DURATION or names >= TIER_ATTRIBUTES


def test_closed_stacks_are_not_reported_and_stacks_of_one_profile_are_summed(
    reader: Reader,
) -> None:
    assert reader.values() == {}
    with stack_of(4) as one, stack_of(2), stack_of(1, "other"):
        limits = reader.points()["kvcache.tier.limit"]
    assert {point.attributes["kvcache.profile.name"]: point.value for point in limits} == {
        "ours": 6 * PAGE,
        "other": PAGE,
    }
    assert one.profile == "ours"  # the object still exists, and is closed
    assert reader.values() == {}
    collected = stack_of(1)
    collected.front.close()
    del collected
    assert reader.values() == {}


class Instrument:
    """A histogram that keeps the attributes of each call."""

    def __init__(self) -> None:
        self.calls: list[dict[str, str]] = []

    def record(self, seconds: float, attributes: dict[str, str]) -> None:
        assert seconds >= 0
        self.calls.append(attributes)


@pytest.fixture
def instrument(monkeypatch: pytest.MonkeyPatch) -> Instrument:
    instrument = Instrument()
    monkeypatch.setattr(metrics, "duration_histogram", instrument)
    return instrument


@pytest.mark.parametrize("blocks", [1, 12])
def test_duration_is_recorded_per_operation_and_never_per_block(
    instrument: Instrument, blocks: int
) -> None:
    under_test = StackUnderTest(slots=64, blocks_per_call=64)
    keys = keys_of("a", blocks)
    with under_test.stack:
        under_test.put(keys)
        assert under_test.stack.flush(LONG)
        under_test.front.clear()
        assert under_test.fetch_count(keys) == blocks
    called = [
        (each["kvcache.tier.name"], each["kvcache.operation.name"]) for each in instrument.calls
    ]
    assert sorted(called) == [
        ("l1", "lookup"), ("l2", "contains"), ("l2", "load"), ("l2", "store"),
    ]  # fmt: skip


def test_duration_of_a_failed_call_has_the_error(instrument: Instrument) -> None:
    under_test = StackUnderTest()
    keys = keys_of("a", 2)
    with under_test.stack:
        under_test.tiers[0].fault = "raise"
        assert under_test.fetch_count(keys) == 0
        under_test.put(keys)
    taken = under_test.stack.take_durations()
    assert under_test.stack.take_durations() == []
    errors = {(tier.name, operation): error for tier, operation, error, _ in taken}
    assert errors == {
        ("l1", "lookup"): "", ("l2", "contains"): "OSError", ("l2", "store"): "OSError",
    }  # fmt: skip
    assert [each.get("error.type", "") for each in instrument.calls] == [e for _, _, e, _ in taken]


def test_duration_of_a_late_call_has_the_error_timeout(instrument: Instrument) -> None:
    under_test = StackUnderTest(breaker_failures=NEVER)
    keys = keys_of("a", 1)
    under_test.put_in_tier(keys)
    with under_test.stack:
        under_test.hang_load(under_test.stack.match(keys).result(LONG))
        under_test.tiers[0].gate.set()
        under_test.put(keys_of("b", 1))  # stores run after loads, so the late load has ended
    late = [
        each
        for each in instrument.calls
        if each["kvcache.operation.name"] == "load" and "error.type" in each
    ]
    assert {each["error.type"] for each in late} == {"timeout"}


def test_durations_that_are_not_taken_are_bounded() -> None:
    with stack_of(1) as stack:
        for _ in range(1100):
            stack.fetch_local(keys_of("a", 1)).end()
        assert len(stack.take_durations()) == 1024


def test_duration_has_the_advised_buckets(reader: Reader) -> None:
    with stack_of(1) as stack:
        stack.fetch_local(keys_of("a", 1)).end()
    [point] = reader.collect()[metrics.DURATION.name].values()
    assert point.explicit_bounds == metrics.BUCKETS
    assert point.count == 1


def test_provider_installed_later_finds_every_metric() -> None:
    """Runs in another process, because a provider can be set only once."""
    code = """
        from kvcache import Stack
        from kvcache.sizes import Size
        from kvcache.tiers.dram import DramTier
        stack = Stack(DramTier(block_nbytes=4096, capacity=Size(4096)), profile="p")
        from opentelemetry import metrics
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader
        reader = InMemoryMetricReader()
        metrics.set_meter_provider(MeterProvider([reader]))
        stack.fetch_local([b"k"]).end()
        found = reader.get_metrics_data().resource_metrics[0].scope_metrics[0]
        print(found.scope.name, *sorted(metric.name for metric in found.metrics))
        stack.close()
    """
    output = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert output[0] == "kvcache"
    assert {"kvcache.tier.lookups", "kvcache.tier.operation.duration"} < set(output)
