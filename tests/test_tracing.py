"""The spans that a collector receives from a program that has only `OTEL_*` variables.

The program (`tests/support/program_without_sdk.py`) imports no SDK and no exporter;
`opentelemetry-instrument` adds them, as it does for its users. The program works on a request of
another process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.otlp_collector import Metric, OtlpCollector, Span
from tests.support.program_without_sdk import BLOCK_NBYTES, BLOCKS

PROGRAM = Path(__file__).parent / "support" / "program_without_sdk.py"
INSTRUMENT = Path(sys.executable).with_name("opentelemetry-instrument")
CALLER_TRACE, CALLER_SPAN = "5f" * 16, "c0" * 8
TRACEPARENT = f"00-{CALLER_TRACE}-{CALLER_SPAN}-01"
NOT_SAMPLED = f"00-{CALLER_TRACE}-{CALLER_SPAN}-00"
DISK = {"kvcache.tier.name": "disk", "kvcache.tier.type": "disk"}
PROFILE = {"kvcache.profile.name": "l1-disk"}
BYTES = BLOCKS * BLOCK_NBYTES
SPAN_COUNT = 9  # of one run of the program


@pytest.fixture
def collector() -> Iterator[OtlpCollector]:
    with OtlpCollector() as collector:
        yield collector


def run(*command: str | Path, folder: Path, **variables: str) -> str:
    """Run a command with these and no other `OTEL_*` variables, and return its output.

    Its stderr must be empty: an exporter that fails logs that, and the command still exits with 0.
    """
    base = {k: v for k, v in os.environ.items() if not k.startswith(("OTEL", "KVCACHE"))}
    base["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        command, cwd=folder, env=base | variables, check=False, text=True, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def run_program(
    *instrument: Path, folder: Path, traceparent: str = TRACEPARENT, **variables: str
) -> dict[str, Any]:
    """Run the program with a disk tier in `folder`, and return what it prints."""
    variables |= {
        "KVCACHE_PROFILE": "l1-disk",
        "KVCACHE__L1__CAPACITY": "1MiB",
        "KVCACHE__DISK__PATH": str(folder / "disk"),
        "KVCACHE__DISK__CAPACITY": "1MiB",
    }
    output = run(
        *instrument, sys.executable, "-P", PROGRAM, traceparent, folder=folder, **variables
    )
    return dict(json.loads(output))


def export_variables(collector: OtlpCollector, protocol: str) -> dict[str, str]:
    return {
        "OTEL_SERVICE_NAME": "program",
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint(protocol),
        "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_LOGS_EXPORTER": "none",
    }


def only_span(spans: list[Span], name: str, parent: Span | None = None) -> Span:
    """The only span of this name, or the only one under `parent`."""
    [found] = [
        span
        for span in spans
        if span.name == name and (parent is None or span.parent_id == parent.span_id)
    ]
    return found


def fixed_attributes(span: Span) -> dict[str, Any]:
    """The attributes of the span, without the one that differs in every run."""
    return {k: v for k, v in span.attributes.items() if k != "kvcache.queue.duration"}


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_instrumented_program_exports_every_span(
    collector: OtlpCollector, protocol: str, tmp_path: Path
) -> None:
    facts = run_program(INSTRUMENT, folder=tmp_path, **export_variables(collector, protocol))
    spans = collector.wait_spans(SPAN_COUNT)
    assert facts["sdk"], "without an SDK this test shows nothing"
    assert sorted(span.name for span in spans) == [
        "kvcache.load",
        "kvcache.lookup",
        "kvcache.prefetch",
        "kvcache.store",
        "kvcache.tier.contains",
        "kvcache.tier.contains",
        "kvcache.tier.load",
        "kvcache.tier.load",
        "kvcache.tier.store",
    ]
    for span in spans:
        assert span.kind == "INTERNAL"
        assert span.scope == "kvcache"
        assert span.resource["service.name"] == "program"
        assert not span.error
        assert span.start_ns <= span.end_ns

    requested = {"kvcache.block.requested": BLOCKS}
    hit, bytes_ = {"kvcache.block.hit": BLOCKS}, {"kvcache.payload.size": BYTES}
    codec = {"kvcache.codec": "none"}
    from_disk = hit | {"kvcache.l1.block.hit": 0}
    stored, known = {"kvcache.block.stored": BLOCKS}, {"kvcache.block.known": 0}
    for name, attributes in {
        "kvcache.lookup": PROFILE | requested | from_disk,
        "kvcache.load": PROFILE | requested | hit | bytes_,
        "kvcache.prefetch": PROFILE | requested | from_disk,
        "kvcache.store": PROFILE | requested | stored | bytes_,
    }.items():
        span = only_span(spans, name)
        assert (span.trace_id, span.parent_id) == (CALLER_TRACE, CALLER_SPAN), name
        assert fixed_attributes(span) == attributes
        assert not span.links

    for parent, children in {
        "kvcache.lookup": ["contains"],
        "kvcache.load": ["load"],
        "kvcache.prefetch": ["contains", "load"],
    }.items():
        parent_span = only_span(spans, parent)
        for child in children:
            span = only_span(spans, f"kvcache.tier.{child}", parent_span)
            assert span.trace_id == CALLER_TRACE
            assert fixed_attributes(span) == DISK | requested | hit | (
                bytes_ | codec if child == "load" else {}
            )
            assert span.attributes["kvcache.queue.duration"] >= 0
            assert parent_span.start_ns <= span.start_ns
            assert not span.links

    cause, written = only_span(spans, "kvcache.store"), only_span(spans, "kvcache.tier.store")
    assert written.parent_id == ""
    assert written.trace_id != CALLER_TRACE
    assert written.links == ((cause.trace_id, cause.span_id),)
    assert fixed_attributes(written) == DISK | requested | stored | known | bytes_ | codec


@pytest.mark.parametrize(
    ("traceparent", "sampler"),
    [(NOT_SAMPLED, "parentbased_always_on"), (TRACEPARENT, "always_off")],
    ids=["the caller", "the variable"],
)
def test_unsampled_spans_are_not_exported(
    collector: OtlpCollector, traceparent: str, sampler: str, tmp_path: Path
) -> None:
    exports = export_variables(collector, "grpc") | {"OTEL_TRACES_SAMPLER": sampler}
    run_program(INSTRUMENT, folder=tmp_path, traceparent=traceparent, **exports)
    assert collector.spans == []  # the program has ended, and exported every span that it had


def test_program_without_instrumentation_has_no_sdk(
    collector: OtlpCollector, tmp_path: Path
) -> None:
    """The variables are set and an SDK is installed, but nothing loads it."""
    facts = run_program(folder=tmp_path, **export_variables(collector, "http/protobuf"))
    assert facts == {"provider": "ProxyTracerProvider", "threads": ["MainThread"], "sdk": False}
    assert collector.spans == []


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
@pytest.mark.parametrize("compressed", [False, True])
def test_collector_keeps_every_field_that_an_sdk_exports(
    collector: OtlpCollector, protocol: str, compressed: bool, tmp_path: Path
) -> None:
    """The collector against the SDK alone: spans and instruments of a process that ends."""
    code = (
        "from opentelemetry import metrics, trace;"
        "from opentelemetry.trace import Link, SpanKind, Status, StatusCode;"
        "tracer, meter = trace.get_tracer('t'), metrics.get_meter('m');"
        "one = tracer.start_span('one', kind=SpanKind.SERVER);"
        "one.add_event('happened', {'often': 2});"
        "two = tracer.start_span('two', links=[Link(one.get_span_context())]);"
        "two.set_status(Status(StatusCode.ERROR));"
        "two.set_attributes({'s': 'x', 'f': 1.5, 'b': True, 'l': [1, 2]});"
        "two.end(); one.end();"
        "meter.create_counter('c', 'By').add(3, {'k': 'v'});"
        "meter.create_histogram('h', 's').record(0.5)"
    )
    exports = export_variables(collector, protocol) | {"OTEL_METRICS_EXPORTER": "otlp"}
    if compressed:
        exports["OTEL_EXPORTER_OTLP_COMPRESSION"] = "gzip"
    run(INSTRUMENT, sys.executable, "-P", "-c", code, folder=tmp_path, **exports)
    two, one = sorted(collector.wait_spans(2), key=lambda span: span.error, reverse=True)
    assert (one.name, one.kind, one.parent_id, one.scope) == ("one", "SERVER", "", "t")
    assert one.events == (("happened", {"often": 2}),)
    assert (two.name, two.error) == ("two", True)
    assert two.links == ((one.trace_id, one.span_id),)
    assert two.attributes == {"s": "x", "f": 1.5, "b": True, "l": [1, 2]}

    def has_both(metrics: list[Metric]) -> bool:
        return {"c", "h"} <= {metric.name for metric in metrics}

    named = {metric.name: metric for metric in collector.wait_metrics(has_both)}
    assert (named["c"].kind, named["c"].unit, named["c"].scope) == ("sum", "By", "m")
    assert named["c"].points == (({"k": "v"}, 3.0),)
    assert (named["h"].kind, named["h"].unit, named["h"].points) == ("histogram", "s", (({}, 0.5),))
    assert named["c"].resource["service.name"] == "program"
