"""The metrics page and the dashboard name exactly the metrics of the source."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from kvcache import metrics
from kvcache.connectors.vllm.metrics import labels_of, prometheus_name
from kvcache.metrics import Metric

pytestmark = pytest.mark.engine

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "metrics.md").read_text(encoding="utf-8")
DASHBOARD = (DOCS / "deploy" / "grafana-kvcache.json").read_text(encoding="utf-8")
VLLM_LABELS = {"model_name", "engine", "le"}


def row(metric: Metric) -> str:
    attributes = ", ".join(f"`{name}`" for name in metric.attributes)
    cells = (f"`{metric.name}`", metric.kind, metric.unit, attributes, metric.description)
    return f"| {' | '.join(cells)} |"


def series(metric: Metric) -> list[str]:
    """Return the names of a metric's samples in Prometheus."""
    suffixes = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
    return [prometheus_name(metric) + suffix for suffix in suffixes[metric.kind]]


SERIES = {name: metric for metric in metrics.METRICS for name in series(metric)}


def test_page_table_lists_every_metric() -> None:
    listed = re.findall(r"^\| `kvcache\..*\|$", PAGE, re.MULTILINE)
    assert listed == [row(metric) for metric in metrics.METRICS]


def test_page_names_existing_prometheus_metrics() -> None:
    named = re.findall(r"vllm:kvcache_\w+", PAGE)
    assert named
    assert set(named) <= set(SERIES)
    labels = {label for metric in metrics.METRICS for label in labels_of(metric)}
    assert labels <= set(re.findall(r"`(\w+)`", PAGE))


def expressions(panel: object) -> Iterator[str]:
    """Yield every PromQL expression of a part of the dashboard."""
    if isinstance(panel, dict):
        for name, value in panel.items():
            if name in {"expr", "definition"}:
                yield value
            yield from expressions(value)
    elif isinstance(panel, list):
        for each in panel:
            yield from expressions(each)


def test_dashboard_queries_existing_metrics_and_labels() -> None:
    queried: set[str] = set()
    for expression in expressions(json.loads(DASHBOARD)):
        names = re.findall(r"[a-z_]+:\w+", expression)
        assert names, expression
        queried |= set(names)
        known = {label for name in names for label in labels_of(SERIES[name])} | VLLM_LABELS
        grouped = [
            label
            for group in re.findall(r"by \((.*?)\)", expression)
            for label in re.split(", ", group)
        ]
        matched = re.findall(r"(\w+)=", re.sub(r'".*?"', "", expression))
        assert set(grouped + re.findall(r"(\w+)(?==~?\")", expression)) <= known, expression
        assert set(matched) <= known, expression
    assert {SERIES[name] for name in queried} == set(metrics.METRICS)


def test_dashboard_panels_have_places_of_their_own() -> None:
    panels = json.loads(DASHBOARD)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels}) == len(panels)
    for panel in panels:
        legends = " ".join(target["legendFormat"] for target in panel["targets"])
        shown = set(re.findall(r"\{\{(\w+)\}\}", legends))
        kept = re.findall(r"by \((.*?)\)", " ".join(t["expr"] for t in panel["targets"]))
        assert shown <= set(", ".join(kept).split(", ")), panel["title"]
