"""The counts of a secondary tier on vLLM's ``/metrics``, under the names of the connector's."""

from __future__ import annotations

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import (
    OffloadingCounterMetadata,
    OffloadingGaugeMetadata,
    OffloadingHistogramMetadata,
    OffloadingMetricMetadata,
)

from kvcache import metrics
from kvcache.connectors.vllm.metrics import Stats, labels_of, prometheus_name
from kvcache.metrics import Metric

_BY_NAME = {metric.name: metric for metric in metrics.METRICS}


def metric_definitions() -> dict[str, OffloadingMetricMetadata]:
    """Return vLLM's description of each metric, by its name on ``/metrics``."""
    return {prometheus_name(metric): _definition(metric) for metric in metrics.METRICS}


def _definition(metric: Metric) -> OffloadingMetricMetadata:
    documentation = f"KV cache blocks kept by kvcache: {metric.description}"
    labels = tuple(labels_of(metric))
    match metric.kind:
        case "counter":
            return OffloadingCounterMetadata(documentation, labels)
        case "gauge":
            return OffloadingGaugeMetadata(documentation, labels)
        case "histogram":
            return OffloadingHistogramMetadata(documentation, labels, buckets=metrics.BUCKETS)


def offloading_stats(stats: Stats) -> OffloadingConnectorStats:
    """Return a report in the form in which a secondary tier passes it to vLLM."""
    converted = OffloadingConnectorStats()
    for name, numbers in stats.data.items():
        metric = _BY_NAME[name]
        shown = prometheus_name(metric)
        for labels, value in numbers.items():
            match metric.kind:
                case "counter":
                    converted.increase_counter(shown, value, labels)
                case "gauge":
                    converted.set_gauge(shown, value, labels)
                case "histogram":
                    for seconds in value:
                        converted.observe_histogram(shown, seconds, labels)
    return converted
