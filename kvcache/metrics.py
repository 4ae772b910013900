"""Every metric: its name, its unit, and where in the counts of a stack its numbers are.

Always true here:

* The numbers are the plain integers of ``Stack.stats()``; nothing is counted a second time.
  Observable instruments of the OpenTelemetry API read them when somebody collects.
* An instrument is called once per call to a lower tier, look-up in L1, and copy out of it or into
  it, with its duration, and never per block. Without a provider that costs 0.2 microseconds.
* No attribute has a key, a hash or a request in it: there are as many series as tiers and words.
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
OPERATION: Final = "kvcache.operation.name"


@dataclass(frozen=True, slots=True)
class Metric:
    """A row of the table: a counter only grows, a gauge is as of now."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str  # of UCUM
    meaning: str
    attributes: tuple[str, ...] = ()  # beside those that say which tier


LOOKUPS = Metric(
    "kvcache.tier.lookups", "counter", "{block}", "asked for: `hit` or `miss`", (RESULT,)
)
LOADS = Metric(
    "kvcache.tier.loads",
    "counter",
    "{block}",
    "`loaded`, of L1: lent to be read; below it also `missed`, though said to be held, and "
    "`skipped`, since computing is faster",
    (RESULT,),
)
STORES = Metric(
    "kvcache.tier.stores",
    "counter",
    "{block}",
    "`stored`; `declined`, for want of room; in L1 `failed`; below it `known`, since held already, "
    "and `dropped`, since the queue was full or the breaker open",
    (RESULT,),
)
IO = Metric("kvcache.tier.io", "counter", "By", "bytes of blocks: `read` or `write`", (DIRECTION,))
EVICTIONS = Metric("kvcache.tier.evictions", "counter", "{block}", "left to make room")
INVALIDATIONS = Metric(
    "kvcache.tier.invalidations", "counter", "{block}", "left L1 since a copy of them failed"
)
REJECTIONS = Metric(
    "kvcache.tier.rejections",
    "counter",
    "{block}",
    "came from below and did not verify: a miss, and why",
    (REASON,),
)
ERRORS = Metric("kvcache.tier.errors", "counter", "{call}", "calls that failed or came late")
USAGE = Metric("kvcache.tier.usage", "gauge", "By", "taken by blocks")
LIMIT = Metric("kvcache.tier.limit", "gauge", "By", "that blocks can take")
PINNED = Metric("kvcache.tier.pinned", "gauge", "{slot}", "of L1 under lease; 0 when idle")
QUEUE = Metric("kvcache.tier.queue.usage", "gauge", "By", "wait to be written")
WITHHELD = Metric(
    "kvcache.tier.withheld", "gauge", "{block}", "not offered: nobody used them a second time"
)
BREAKER = Metric(
    "kvcache.tier.breaker.open", "gauge", "1", "1 while the tier is not asked, since calls failed"
)
DURATION = Metric(
    "kvcache.tier.operation.duration",
    "histogram",
    "s",
    "of one call: `contains`, `load`, `store`, `forget` (a reset); in L1 of a `lookup`, and of an "
    "engine's copy out of it (`load`) and into it (`store`)",
    (OPERATION, telemetry.ERROR),
)

COUNTED: Final = (
    LOOKUPS, LOADS, STORES, IO, EVICTIONS, INVALIDATIONS, REJECTIONS, ERRORS,
    USAGE, LIMIT, PINNED, QUEUE, WITHHELD, BREAKER,
)  # fmt: skip
METRICS: Final = (*COUNTED, DURATION)
BUCKETS: Final = (
    50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 0.1, 0.25, 0.5, 1.0,
    2.5, 5.0, 10.0,
)  # fmt: skip


# From counts to numbers

# By the value of the metric's attribute; by "" where it has none.
Numbers = Mapping[Metric, Mapping[str, int]]


def numbers(stats: StackStats) -> Iterator[tuple[TierName, Numbers]]:
    """The numbers of every tier, L1 first. What a tier cannot say is left out."""
    counted: list[Numbers] = [_front(tier, stats.loaded_blocks) for tier in stats.tiers]
    counted += [_lower(tier) for tier in stats.lower]
    return zip(stats.names, counted, strict=True)


def _front(tier: TierStats, loaded: int) -> Numbers:
    size = tier.block_nbytes
    return {
        LOOKUPS: {"hit": tier.hit_blocks, "miss": tier.lookup_blocks - tier.hit_blocks},
        LOADS: {"loaded": loaded},
        STORES: {
            "stored": tier.stored_blocks,
            "declined": tier.declined_blocks,
            "failed": tier.failed_blocks,
        },
        IO: {"read": loaded * size, "write": tier.stored_blocks * size},
        EVICTIONS: {"": tier.evicted_blocks},
        INVALIDATIONS: {"": tier.dropped_blocks},
        USAGE: {"": tier.used_blocks * size},
        LIMIT: {"": tier.capacity_blocks * size},
        PINNED: {"": tier.pinned_slots},
    }


def _lower(tier: LowerStats) -> Numbers:
    usage = tier.usage
    own = {EVICTIONS: usage.evicted_blocks, USAGE: usage.used_nbytes, LIMIT: usage.limit_nbytes}
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
        IO: {
            "read": tier.loaded_blocks * tier.block_nbytes,
            "write": tier.stored_blocks * tier.block_nbytes,
        },
        REJECTIONS: usage.rejected_blocks,
        ERRORS: {"": tier.errors},
        QUEUE: {"": tier.queued_nbytes},
        WITHHELD: {"": tier.withheld_blocks},
        BREAKER: {"": int(tier.breaker_open)},
        **{metric: {"": number} for metric, number in own.items() if number is not None},
    }


# Through OpenTelemetry


class Counted(Protocol):
    """What has counts: a stack."""

    def stats(self) -> StackStats:
        """Counts at this moment."""


class _Collected:
    """The numbers of all that is watched, as of one moment for all metrics of a collection.

    A collection asks for each metric once: one that is asked for again begins the next. Stacks that
    bear the same names add up.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Watch nothing: in a forked child, where the parent counts what it has opened."""
        self._lock = threading.Lock()
        self._watched: WeakSet[Counted] = WeakSet()
        self._given: set[Metric] = set()
        self._sums: dict[Metric, Counter[tuple[tuple[str, str], ...]]] = {}

    def watch(self, stack: Counted) -> None:
        with self._lock:
            self._watched.add(stack)

    def leave(self, stack: Counted) -> None:
        with self._lock:
            self._watched.discard(stack)

    def of(self, metric: Metric, _: CallbackOptions) -> Iterable[Observation]:
        with self._lock:
            if not self._given or metric in self._given:
                self._given.clear()
                self._collect()
            self._given.add(metric)
            return [
                Observation(number, dict(attributes))
                for attributes, number in self._sums[metric].items()
            ]

    def _collect(self) -> None:
        self._sums = {metric: Counter() for metric in COUNTED}
        for stats in [stack.stats() for stack in self._watched]:
            for tier, counted in numbers(stats):
                whose = (
                    (telemetry.PROFILE, stats.profile),
                    (telemetry.TIER, tier.name),
                    (telemetry.KIND, tier.kind),
                )
                for metric, by_value in counted.items():
                    for value, number in by_value.items():
                        what = tuple((name, value) for name in metric.attributes)
                        self._sums[metric][*whose, *what] += number


_collected = _Collected()
os.register_at_fork(after_in_child=_collected.begin)
watch = _collected.watch
leave = _collected.leave


def observe(meter: Meter) -> None:
    """Make the instruments of ``meter`` that read the counts of every open stack."""
    makers: dict[str, Callable[..., object]] = {
        "counter": meter.create_observable_counter,
        "gauge": meter.create_observable_up_down_counter,
    }
    for metric in COUNTED:
        makers[metric.kind](
            metric.name,
            [partial(_collected.of, metric)],
            unit=metric.unit,
            description=metric.meaning,
        )


_meter = metrics.get_meter("kvcache")  # a proxy: it finds a provider that is installed later
observe(_meter)
_duration = _meter.create_histogram(
    DURATION.name,
    unit=DURATION.unit,
    description=DURATION.meaning,
    explicit_bucket_boundaries_advisory=BUCKETS,
)


# Durations, which are told as they happen

Duration = tuple[TierName, str, str, float]  # whose, operation, error or "", seconds

KEPT: Final = 1024  # durations that nobody has taken yet


class Timer:
    """How long the calls to one tier took: told to OpenTelemetry, and to who takes them from here.

    The last thousand that nobody has taken are kept.
    """

    def __init__(self, tier: TierName) -> None:
        self._tier = tier
        self._untaken: deque[Duration] = deque(maxlen=KEPT)
        self._attributes: dict[tuple[str, str], dict[str, str]] = {}

    def took(self, operation: str, seconds: float, error: str = "") -> None:
        """A call took so long; ``error`` in a word if it went wrong."""
        attributes = self._attributes.get((operation, error))
        if attributes is None:
            attributes = {telemetry.TIER: self._tier.name, telemetry.KIND: self._tier.kind}
            attributes[OPERATION] = operation
            if error:
                attributes[telemetry.ERROR] = error
            self._attributes[operation, error] = attributes
        _duration.record(seconds, attributes)
        self._untaken.append((self._tier, operation, error, seconds))

    def take(self) -> list[Duration]:
        """Those that were told since this was called last."""
        taken = []
        while self._untaken:
            taken.append(self._untaken.popleft())
        return taken
