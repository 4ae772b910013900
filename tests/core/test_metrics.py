"""The metrics of a stack, as an application's own SDK collects them."""

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

WHOSE = {"kvcache.profile.name", "kvcache.tier.name", "kvcache.tier.type"}


class Reader:
    """What is collected, as plain values: of every metric, by tier and the attribute of its own."""

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
                    if name not in WHOSE or name == "kvcache.tier.name"
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


def test_what_l1_did(reader: Reader) -> None:
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


def test_what_a_lower_tier_did(reader: Reader) -> None:
    below = StackUnderTest(queue=Size(4 * PAGE), blocks_per_call=8)
    below.tiers[0].usage = lambda: TierUsage(5, 7, 3, {"checksum": 2})  # type: ignore[method-assign]
    keys = keys_of("a", 8)
    with below.stack:
        below.put(keys[:6])  # four fit the queue
        assert below.stack.flush(LONG)
        below.front.clear()
        del below.tiers[0].held[namespaced_key(NAMESPACE, keys[3])]
        assert below.fetch_count(keys) == 3
        below.lower[0].channel.workers.close(
            LONG
        )  # what was done is counted when its thread has ended
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
        "kvcache.tier.errors": {(): 0},
        "kvcache.tier.usage": {(): 5},
        "kvcache.tier.limit": {(): 7},
        "kvcache.tier.queue.usage": {(): 0},
        "kvcache.tier.withheld": {(): 0},
        "kvcache.tier.breaker.open": {(): 0},
    }


def test_a_tier_that_fails_to_say_is_left_out(reader: Reader) -> None:
    below = StackUnderTest()

    def fails() -> TierUsage:
        raise OSError

    below.tiers[0].usage = fails  # type: ignore[method-assign]
    with below.stack:
        found = reader.values()
    assert set(found["kvcache.tier.usage"]) == {("l1",)}
    assert set(found["kvcache.tier.errors"]) == {("l2",)}


def test_every_metric_is_made_and_none_but_those_of_the_table(reader: Reader) -> None:
    below = StackUnderTest()
    below.tiers[0].usage = lambda: TierUsage(0, 0, 0, {"magic": 1})  # type: ignore[method-assign]
    with below.stack:
        below.put(keys_of("a", 1))
        below.lower[0].channel.workers.close(LONG)
        found = reader.collect()
    assert set(found) == {metric.name for metric in metrics.METRICS}
    for metric in metrics.METRICS:
        for point in found[metric.name].values():
            named = set(point.attributes or {})
            assert named - WHOSE <= set(metric.attributes), metric.name
            assert metric is metrics.DURATION or named >= WHOSE


def test_closed_stacks_are_gone_and_equal_ones_add_up(reader: Reader) -> None:
    assert reader.values() == {}
    with stack_of(4) as one, stack_of(2), stack_of(1, "other"):
        limits = reader.points()["kvcache.tier.limit"]
    assert {point.attributes["kvcache.profile.name"]: point.value for point in limits} == {
        "ours": 6 * PAGE,
        "other": PAGE,
    }
    assert one.profile == "ours"  # it is still there, and closed
    assert reader.values() == {}
    forgotten = stack_of(1)
    forgotten.front.close()
    del forgotten
    assert reader.values() == {}


class Instrument:
    """Counts its calls."""

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
def test_an_instrument_is_called_per_operation_and_never_per_block(
    instrument: Instrument, blocks: int
) -> None:
    below = StackUnderTest(slots=64, blocks_per_call=64)
    keys = keys_of("a", blocks)
    with below.stack:
        below.put(keys)
        assert below.stack.flush(LONG)
        below.front.clear()
        assert below.fetch_count(keys) == blocks
    called = [
        (each["kvcache.tier.name"], each["kvcache.operation.name"]) for each in instrument.calls
    ]
    assert sorted(called) == [
        ("l1", "lookup"), ("l2", "contains"), ("l2", "load"), ("l2", "store"),
    ]  # fmt: skip


def test_durations_say_what_went_wrong(instrument: Instrument) -> None:
    below = StackUnderTest()
    keys = keys_of("a", 2)
    with below.stack:
        below.tiers[0].fault = "raise"
        assert below.fetch_count(keys) == 0
        below.put(keys)
    taken = below.stack.take_durations()
    assert below.stack.take_durations() == []
    said = {(tier.name, operation): error for tier, operation, error, _ in taken}
    assert said == {
        ("l1", "lookup"): "", ("l2", "contains"): "OSError", ("l2", "store"): "OSError",
    }  # fmt: skip
    assert [each.get("error.type", "") for each in instrument.calls] == [e for _, _, e, _ in taken]


def test_a_late_call_is_a_timeout_of_the_time_it_took(instrument: Instrument) -> None:
    below = StackUnderTest(breaker_failures=NEVER)
    keys = keys_of("a", 1)
    below.put_in_tier(keys)
    with below.stack:
        below.hang_load(below.stack.match(keys).result(LONG))
        below.tiers[0].gate.set()
        below.put(keys_of("b", 1))  # writes go last: the late load has ended
    late = [
        each
        for each in instrument.calls
        if each["kvcache.operation.name"] == "load" and "error.type" in each
    ]
    assert {each["error.type"] for each in late} == {"timeout"}


def test_what_nobody_takes_is_bounded() -> None:
    with stack_of(1) as stack:
        for _ in range(1100):
            stack.fetch_local(keys_of("a", 1)).end()
        assert len(stack.take_durations()) == 1024


def test_buckets_are_those_advised(reader: Reader) -> None:
    with stack_of(1) as stack:
        stack.fetch_local(keys_of("a", 1)).end()
    [point] = reader.collect()[metrics.DURATION.name].values()
    assert point.explicit_bounds == metrics.BUCKETS
    assert point.count == 1


def test_a_provider_that_comes_later_finds_all() -> None:
    """In a process of its own: a provider can be set only once."""
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
    said = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert said[0] == "kvcache"
    assert {"kvcache.tier.lookups", "kvcache.tier.operation.duration"} < set(said)
