"""The counts of ``Stack.stats()`` in vLLM: on its ``/metrics``, and in its log line.

::

    engine core                                  front end
    Reports.take() -> Stats --- msgpack dict --> Stats.reduce()        "KV Transfer metrics: ..."
                                             --> PromMetrics.observe() vllm:kvcache_...

Invariants:

1. A report has the counts since the previous report: the sum of the reports is the total. A
   gauge has its value at the time of the report.
2. A report is ``{metric's name: {(tier, type, the metric's own attribute): number, or seconds of
   each call}}``, of plain types.
3. Names begin with ``vllm:``, like those of vLLM's own connectors. vLLM unregisters metrics by
   that prefix when a process constructs a second engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final, Protocol

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from kvcache import metrics, telemetry
from kvcache.metrics import Duration, Metric
from kvcache.sizes import format_size
from kvcache.stats import StackStats

REPORT_EVERY_S: Final = 1.0  # reading the counts more often costs time and shows nothing more

LABELS: Final = {
    metrics.RESULT: "result",
    metrics.DIRECTION: "direction",
    metrics.REASON: "reason",
    metrics.DECLINE_REASON: "reason",
    metrics.OPERATION: "operation",
    telemetry.ERROR: "error",
}
_PROBLEMS: Final = (  # in the log line where they are not 0
    ("missed", metrics.LOADS, "missed"),
    ("declined", metrics.STORES, "declined"),
    ("dropped", metrics.STORES, "dropped"),
    ("failed", metrics.STORES, "failed"),
    ("invalid", metrics.INVALIDATIONS, None),
    ("rejected", metrics.REJECTIONS, None),
    ("errors", metrics.ERRORS, None),
    ("breaker open", metrics.BREAKER, None),
)
_BY_NAME = {metric.name: metric for metric in metrics.METRICS}
_SUFFIX = {"By": "_bytes", "s": "_seconds"}


def prometheus_name(metric: Metric) -> str:
    """Return the name of ``metric`` on ``/metrics``; Prometheus adds ``_total`` to a counter's."""
    return f"vllm:{metric.name.replace('.', '_')}{_SUFFIX.get(metric.unit, '')}"


def labels_of(metric: Metric) -> list[str]:
    """Return the labels of a metric, without those that vLLM adds to all metrics."""
    return ["tier", "type", *(LABELS[name] for name in metric.attributes)]


class Stats(KVConnectorStats):
    """The counts of an interval; ``data`` is as in invariant 2."""

    def add(self, metric: Metric, labels: tuple[str, ...], value: Any) -> None:
        """Add ``value``: a number, or a list of seconds for a histogram."""
        numbers = self.data.setdefault(metric.name, {})
        if metric.kind == "gauge" or labels not in numbers:
            numbers[labels] = value
        else:
            numbers[labels] = numbers[labels] + value

    def aggregate(self, other: KVConnectorStats) -> Stats:
        for name, numbers in other.data.items():
            for labels, value in numbers.items():
                self.add(_BY_NAME[name], labels, value)
        return self

    def is_empty(self) -> bool:
        return not self.data

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def reduce(self) -> dict[str, Any]:
        """Return vLLM's log line: lookups and bytes of every tier, and its problems, if any."""
        line: dict[str, Any] = {}
        gauges = (self.data.get(metric.name, {}) for metric in (metrics.USAGE, metrics.BREAKER))
        for tier in dict.fromkeys(labels[0] for gauge in gauges for labels in gauge):
            hits = self._of(metrics.LOOKUPS, tier, "hit")
            line[f"{tier} hits"] = f"{hits}/{hits + self._of(metrics.LOOKUPS, tier, 'miss')}"
            line[f"{tier} read"] = format_size(self._of(metrics.IO, tier, "read"))
            line[f"{tier} written"] = format_size(self._of(metrics.IO, tier, "write"))
            if limit := self._of(metrics.LIMIT, tier):
                used = self._of(metrics.USAGE, tier)
                line[f"{tier} used"] = f"{format_size(used)}/{format_size(limit)}"
            for word, metric, value in _PROBLEMS:
                if number := self._of(metric, tier, value):
                    line[f"{tier} {word}"] = number
        return line

    def _of(self, metric: Metric, tier: str, value: str | None = None) -> int:
        return sum(
            number
            for labels, number in self.data.get(metric.name, {}).items()
            if labels[0] == tier and (value is None or labels[2] == value)
        )


class HasCounts(Protocol):
    """A stack, or the direct tiers of a profile."""

    def stats(self) -> StackStats:
        """Return the counters now."""

    def take_durations(self) -> list[Duration]:
        """Return the durations of calls since the last call of this method."""


class Reports:
    """The reports of a stack, or of direct tiers."""

    def __init__(self, stack: HasCounts, clock: Callable[[], float] = time.monotonic) -> None:
        self._stack = stack
        self._clock = clock
        self._due = clock()
        self._before: dict[tuple[str, tuple[str, ...]], int] = {}

    def take(self, *, now: bool) -> Stats | None:
        """Return a report if one is due, or if it must be made ``now``."""
        if not now and self._clock() < self._due:
            return None
        self._due = self._clock() + REPORT_EVERY_S
        stats = Stats()
        for tier, numbers in metrics.values_by_tier(self._stack.stats()):
            for metric, by_value in numbers.items():
                for value, number in by_value.items():
                    labels = (*tier, value) if metric.attributes else tuple(tier)
                    if metric.kind == "gauge":
                        stats.add(metric, labels, number)
                    elif more := number - self._before.get((metric.name, labels), 0):
                        self._before[metric.name, labels] = number
                        stats.add(metric, labels, more)
        for tier, operation, error, seconds in self._stack.take_durations():
            stats.add(metrics.DURATION, (*tier, operation, error), [seconds])
        return stats


class PromMetrics(KVConnectorPromMetrics):
    """The reports as Prometheus metrics, in the process that serves ``/metrics``."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.families = {metric.name: self._family(metric) for metric in metrics.METRICS}

    def _family(self, metric: Metric) -> Any:
        settings = {
            "name": prometheus_name(metric),
            "documentation": f"KV cache blocks kept by kvcache: {metric.description}",
            "labelnames": [*self._labelnames, *labels_of(metric)],
        }
        match metric.kind:
            case "counter":
                return self._counter_cls(**settings)
            case "gauge":
                return self._gauge_cls(**settings, multiprocess_mode="mostrecent")
            case "histogram":
                return self._histogram_cls(**settings, buckets=metrics.BUCKETS)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        engine = self.per_engine_labelvalues[engine_idx]
        for name, numbers in transfer_stats_data.items():
            for labels, value in numbers.items():
                child = self.families[name].labels(*engine, *labels)
                match _BY_NAME[name].kind:
                    case "counter":
                        child.inc(value)
                    case "gauge":
                        child.set(value)
                    case "histogram":
                        for seconds in value:
                            child.observe(seconds)
