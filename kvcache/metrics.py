"""Every metric: its name and unit, and the counters of a stack that are its values.

Invariants:

* The values are the plain integers of ``Stack.stats()``; nothing is counted a second time.
  Observable instruments of the OpenTelemetry API read them at each collection.
* The duration histogram is recorded once per call to a lower tier, per lookup in L1 and per copy
  out of L1 or into it, never per block. Without a provider that costs 0.2 microseconds.
* No attribute contains a key, a hash or a request id: the number of series depends only on the
  tiers, on fixed label values, and on the reasons that a tier counts (a shipped one, few).
"""

from __future__ import annotations

import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal, Protocol
from weakref import WeakSet

from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions, Meter, Observation

from kvcache import telemetry
from kvcache.stats import LowerStats, StackStats, TierName
from kvcache.tier import TierStats

RESULT: Final = "kvcache.result"
DIRECTION: Final = "kvcache.io.direction"
REASON: Final = "kvcache.rejection.reason"
DECLINE_REASON: Final = "kvcache.decline.reason"
OPERATION: Final = "kvcache.operation.name"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. A counter only grows; a gauge is the current value."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str  # in UCUM notation
    description: str  # what is counted, and the values of ``attributes``
    attributes: tuple[str, ...] = ()  # in addition to those that identify the tier


LOOKUPS = Metric(
    "kvcache.tier.lookups",
    "counter",
    "{block}",
    "Blocks looked up in the tier, by result: `hit` or `miss`; with `lookup` `load` blocks that a "
    "load asked for",
    (RESULT,),
)
LOADS = Metric(
    "kvcache.tier.loads",
    "counter",
    "{block}",
    "Blocks read from the tier, by result: `loaded`; for lower tiers also `missed` (asked for in a "
    "load, but not returned) and `skipped` (computing was faster)",
    (RESULT,),
)
STORES = Metric(
    "kvcache.tier.stores",
    "counter",
    "{block}",
    "Blocks to store in the tier, by result: `stored` or `declined` (no room, or the call failed); "
    "for L1 also `failed` (the copy into L1 failed, or a lower tier did not return the block); for "
    "lower tiers also `known` (held already) and `dropped` (the write queue was full or the "
    "circuit breaker open)",
    (RESULT,),
)
IO = Metric(
    "kvcache.tier.io",
    "counter",
    "By",
    "Bytes of blocks transferred, by direction: `read` or `write`",
    (DIRECTION,),
)
EVICTIONS = Metric("kvcache.tier.evictions", "counter", "{block}", "Blocks evicted to make room")
INVALIDATIONS = Metric(
    "kvcache.tier.invalidations",
    "counter",
    "{block}",
    "Blocks dropped from L1 because a copy of them failed, or removed by key",
)
REJECTIONS = Metric(
    "kvcache.tier.rejections",
    "counter",
    "{block}",
    "Blocks read from the tier with a frame that failed verification (a miss), by reason: "
    "`magic`, `version`, `header`, `size`, `length`, `padding`, `checksum`, `codec` or "
    "`decompression`",
    (REASON,),
)
DECLINES = Metric(
    "kvcache.tier.declines",
    "counter",
    "{block}",
    "Blocks that the tier declined to store, by its reason, such as `no room` or a server's error "
    "code; blocks of calls that failed are not among them",
    (DECLINE_REASON,),
)
ERRORS = Metric(
    "kvcache.tier.errors",
    "counter",
    "{call}",
    "Calls to the tier that failed or missed their deadline",
)
USAGE = Metric("kvcache.tier.usage", "gauge", "By", "Bytes that blocks take in the tier")
LIMIT = Metric("kvcache.tier.limit", "gauge", "By", "Bytes that blocks can take in the tier")
PINNED = Metric("kvcache.tier.pinned", "gauge", "{slot}", "Slots of L1 under lease; 0 when idle")
QUEUE = Metric(
    "kvcache.tier.queue.usage", "gauge", "By", "Bytes of blocks that wait in the write queue"
)
WITHHELD = Metric(
    "kvcache.tier.withheld",
    "gauge",
    "{block}",
    "Blocks not offered to the tier yet because they were not used a second time (`writes` is "
    "`hot`)",
)
BREAKER = Metric(
    "kvcache.tier.breaker.open",
    "gauge",
    "1",
    "1 while the circuit breaker is open: the stack does not call the tier, because calls failed",
)
DURATION = Metric(
    "kvcache.tier.operation.duration",
    "histogram",
    "s",
    "Duration of one call to a lower tier, by operation: `contains`, `load`, `store` or `forget` "
    "(a reset); for L1 of a lookup (`lookup`), and of an engine's copy out of L1 (`load`) or into "
    "it (`store`)",
    (OPERATION, telemetry.ERROR),
)

STATS_METRICS: Final = (
    LOOKUPS, LOADS, STORES, IO, EVICTIONS, INVALIDATIONS, REJECTIONS, DECLINES, ERRORS,
    USAGE, LIMIT, PINNED, QUEUE, WITHHELD, BREAKER,
)  # fmt: skip
METRICS: Final = (*STATS_METRICS, DURATION)
BUCKETS: Final = (
    50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 0.1, 0.25, 0.5, 1.0,
    2.5, 5.0, 10.0,
)  # fmt: skip


# From counters to metric values

# The values of each metric, by the value of its attribute; "" for a metric without attributes.
TierValues = Mapping[Metric, Mapping[str, int]]


def values_by_tier(stats: StackStats) -> Iterator[tuple[TierName, TierValues]]:
    """Return each tier's metric values, L1 first, without the metrics that it does not report."""
    values: list[TierValues] = [_front_values(tier, stats.loaded_blocks) for tier in stats.tiers]
    values += [_lower_values(tier) for tier in stats.lower]
    return zip(stats.names, values, strict=True)


def _front_values(tier: TierStats, loaded_blocks: int) -> TierValues:
    size = tier.block_nbytes
    return {
        LOOKUPS: {"hit": tier.hit_blocks, "miss": tier.lookup_blocks - tier.hit_blocks},
        LOADS: {"loaded": loaded_blocks},
        STORES: {
            "stored": tier.stored_blocks,
            "declined": tier.declined_blocks,
            "failed": tier.failed_blocks,
        },
        IO: {"read": loaded_blocks * size, "write": tier.stored_blocks * size},
        EVICTIONS: {"": tier.evicted_blocks},
        INVALIDATIONS: {"": tier.dropped_blocks},
        USAGE: {"": tier.used_blocks * size},
        LIMIT: {"": tier.capacity_blocks * size},
        PINNED: {"": tier.pinned_slots},
    }


def _lower_values(tier: LowerStats) -> TierValues:
    usage = tier.usage
    reported = {
        EVICTIONS: usage.evicted_blocks,
        USAGE: usage.used_nbytes,
        LIMIT: usage.limit_nbytes,
    }
    return {
        LOOKUPS: {"hit": tier.hit_blocks, "miss": tier.lookup_blocks - tier.hit_blocks},
        LOADS: {
            "loaded": tier.loaded_blocks,
            "missed": tier.missed_blocks,
            "skipped": tier.skipped_blocks,
        },
        STORES: {
            "stored": tier.stored_blocks,
            "known": tier.known_blocks,
            "declined": tier.declined_blocks,
            "dropped": tier.dropped_blocks,
        },
        IO: {"read": tier.loaded_nbytes, "write": tier.stored_nbytes},
        REJECTIONS: usage.rejected_blocks,
        DECLINES: usage.declined_blocks,
        ERRORS: {"": tier.errors},
        QUEUE: {"": tier.queued_nbytes},
        WITHHELD: {"": tier.withheld_blocks},
        BREAKER: {"": int(tier.breaker_open)},
        **{metric: {"": value} for metric, value in reported.items() if value is not None},
    }


# Observable instruments


class HasStats(Protocol):
    """An object with the counters of a stack."""

    def stats(self) -> StackStats:
        """Return the counters now."""


class StatsCollector:
    """The metric values of all registered stacks, read once per collection.

    A collection observes each metric once. The second observation of a metric therefore begins a
    new collection, and the stacks are read again. Stacks with equal attributes are summed.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget every stack: in a forked child, the stacks are the parent's."""
        self.lock = threading.Lock()
        self._stacks: WeakSet[HasStats] = WeakSet()
        self._returned: set[Metric] = set()  # in the current collection
        self._sums: dict[Metric, Counter[tuple[tuple[str, str], ...]]] = {}

    def register(self, stack: HasStats) -> None:
        with self.lock:
            self._stacks.add(stack)

    def unregister(self, stack: HasStats) -> None:
        with self.lock:
            self._stacks.discard(stack)

    def observe(self, metric: Metric, _: CallbackOptions) -> Iterable[Observation]:
        """Return the values of ``metric``: the callback of its instrument."""
        with self.lock:
            if not self._returned or metric in self._returned:
                self._returned.clear()
                self._read_stats()
            self._returned.add(metric)
            return [
                Observation(value, dict(attributes))
                for attributes, value in self._sums[metric].items()
            ]

    def _read_stats(self) -> None:
        self._sums = {metric: Counter() for metric in STATS_METRICS}
        for stats in [stack.stats() for stack in self._stacks]:
            for tier, values in values_by_tier(stats):
                tier_attributes = (
                    (telemetry.PROFILE, stats.profile),
                    (telemetry.TIER, tier.name),
                    (telemetry.KIND, tier.kind),
                )
                for metric, by_label in values.items():
                    for label, value in by_label.items():
                        own_attributes = tuple((name, label) for name in metric.attributes)
                        self._sums[metric][*tier_attributes, *own_attributes] += value


collector = StatsCollector()
os.register_at_fork(after_in_child=collector.reset)
register_stack = collector.register
unregister_stack = collector.unregister


def create_instruments(meter: Meter) -> None:
    """Create the instruments of ``meter`` that read the counters of every open stack."""
    creators: dict[str, Callable[..., object]] = {
        "counter": meter.create_observable_counter,
        "gauge": meter.create_observable_up_down_counter,
    }
    for metric in STATS_METRICS:
        creators[metric.kind](
            metric.name,
            [partial(collector.observe, metric)],
            unit=metric.unit,
            description=metric.description,
        )


_meter = metrics.get_meter("kvcache")  # a proxy: it also finds a provider installed later
create_instruments(_meter)
duration_histogram = _meter.create_histogram(
    DURATION.name,
    unit=DURATION.unit,
    description=DURATION.description,
    explicit_bucket_boundaries_advisory=BUCKETS,
)


# Durations, recorded as they happen

Duration = tuple[TierName, str, str, float]
"""One call: its tier, operation, error ("" if none) and seconds."""

MAX_UNTAKEN: Final = 1024
"""Durations that a ``Timer`` keeps for :meth:`Timer.take`; beyond that it forgets the oldest."""


class Timer:
    """Records how long the calls to one tier take, in OpenTelemetry and for :meth:`take`."""

    def __init__(self, tier: TierName) -> None:
        self._tier = tier
        self._untaken: deque[Duration] = deque(maxlen=MAX_UNTAKEN)
        self._attributes: dict[tuple[str, str], dict[str, str]] = {}  # by operation and error

    def record(self, operation: str, seconds: float, error: str = "") -> None:
        """Record one call; ``error`` is the kind of failure in one word, or ""."""
        attributes = self._attributes.get((operation, error))
        if attributes is None:
            attributes = {telemetry.TIER: self._tier.name, telemetry.KIND: self._tier.kind}
            attributes[OPERATION] = operation
            if error:
                attributes[telemetry.ERROR] = error
            self._attributes[operation, error] = attributes
        duration_histogram.record(seconds, attributes)
        self._untaken.append((self._tier, operation, error, seconds))

    def take(self) -> list[Duration]:
        """Return the durations recorded since the last call of this method."""
        taken = []
        while self._untaken:
            taken.append(self._untaken.popleft())
        return taken
