"""What a collector gets of a bare program that has nothing but `OTEL_*` variables.

The program (`bare.py`) knows no SDK and no collector; `opentelemetry-instrument` brings them, as it
does for its users. It works on a request that another process began.
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

from tests.support.otlp_collector import Metric, Receiver, Span
from tests.support.program_without_sdk import BLOCK_NBYTES, BLOCKS

PROGRAM = Path(__file__).parent / "support" / "program_without_sdk.py"
INSTRUMENT = Path(sys.executable).with_name("opentelemetry-instrument")
CALLER_TRACE, CALLER_SPAN = "5f" * 16, "c0" * 8
TRACEPARENT = f"00-{CALLER_TRACE}-{CALLER_SPAN}-01"
NOT_SAMPLED = f"00-{CALLER_TRACE}-{CALLER_SPAN}-00"
DISK = {"kvcache.tier.name": "disk", "kvcache.tier.type": "disk"}
PROFILE = {"kvcache.profile.name": "l1-disk"}
BYTES = BLOCKS * BLOCK_NBYTES
SPANS = 9  # of a run of the program


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


def run(*command: str | Path, folder: Path, **variables: str) -> str:
    """Run a command to its end, with these variables and no other of OpenTelemetry's; its output.

    It must complain of nothing: an exporter that fails says so and ends well.
    """
    base = {k: v for k, v in os.environ.items() if not k.startswith(("OTEL", "KVCACHE"))}
    base["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        command, cwd=folder, env=base | variables, check=False, text=True, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def run_bare(
    *instrument: Path, folder: Path, traceparent: str = TRACEPARENT, **variables: str
) -> dict[str, Any]:
    """Run the program over a directory; what it says of itself."""
    variables |= {
        "KVCACHE_PROFILE": "l1-disk",
        "KVCACHE__L1__CAPACITY": "1MiB",
        "KVCACHE__DISK__PATH": str(folder / "disk"),
        "KVCACHE__DISK__CAPACITY": "1MiB",
    }
    said = run(*instrument, sys.executable, "-P", PROGRAM, traceparent, folder=folder, **variables)
    return dict(json.loads(said))


def exporting(receiver: Receiver, protocol: str) -> dict[str, str]:
    return {
        "OTEL_SERVICE_NAME": "bare",
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint(protocol),
        "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_LOGS_EXPORTER": "none",
    }


def the(spans: list[Span], name: str, under: Span | None = None) -> Span:
    """The one span of this name, under that one."""
    [found] = [
        span
        for span in spans
        if span.name == name and (under is None or span.parent_id == under.span_id)
    ]
    return found


def said(span: Span) -> dict[str, Any]:
    """Its attributes, less the one that no two runs have the same of."""
    return {k: v for k, v in span.attributes.items() if k != "kvcache.queue.duration"}


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_every_span_arrives_as_it_is(receiver: Receiver, protocol: str, tmp_path: Path) -> None:
    facts = run_bare(INSTRUMENT, folder=tmp_path, **exporting(receiver, protocol))
    spans = receiver.wait_spans(SPANS)
    assert facts["sdk"], "without an SDK this shows nothing"
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
        assert span.resource["service.name"] == "bare"
        assert not span.error
        assert span.start_ns <= span.end_ns

    asked = {"kvcache.block.requested": BLOCKS}
    hit, bytes_ = {"kvcache.block.hit": BLOCKS}, {"kvcache.payload.size": BYTES}
    codec = {"kvcache.codec": "none"}
    from_below = hit | {"kvcache.l1.block.hit": 0}
    stored, known = {"kvcache.block.stored": BLOCKS}, {"kvcache.block.known": 0}
    for name, attributes in {
        "kvcache.lookup": PROFILE | asked | from_below,
        "kvcache.load": PROFILE | asked | hit | bytes_,
        "kvcache.prefetch": PROFILE | asked | from_below,
        "kvcache.store": PROFILE | asked | stored | bytes_,
    }.items():
        span = the(spans, name)
        assert (span.trace_id, span.parent_id) == (CALLER_TRACE, CALLER_SPAN), name
        assert said(span) == attributes
        assert not span.links

    for parent, children in {
        "kvcache.lookup": ["contains"],
        "kvcache.load": ["load"],
        "kvcache.prefetch": ["contains", "load"],
    }.items():
        above = the(spans, parent)
        for child in children:
            span = the(spans, f"kvcache.tier.{child}", above)
            assert span.trace_id == CALLER_TRACE
            assert said(span) == DISK | asked | hit | (bytes_ | codec if child == "load" else {})
            assert span.attributes["kvcache.queue.duration"] >= 0
            assert above.start_ns <= span.start_ns
            assert not span.links

    cause, written = the(spans, "kvcache.store"), the(spans, "kvcache.tier.store")
    assert written.parent_id == ""
    assert written.trace_id != CALLER_TRACE
    assert written.links == ((cause.trace_id, cause.span_id),)
    assert said(written) == DISK | asked | stored | known | bytes_ | codec


@pytest.mark.parametrize(
    ("traceparent", "sampler"),
    [(NOT_SAMPLED, "parentbased_always_on"), (TRACEPARENT, "always_off")],
    ids=["the caller", "the variable"],
)
def test_what_is_not_sampled_is_not_sent(
    receiver: Receiver, traceparent: str, sampler: str, tmp_path: Path
) -> None:
    exports = exporting(receiver, "grpc") | {"OTEL_TRACES_SAMPLER": sampler}
    run_bare(INSTRUMENT, folder=tmp_path, traceparent=traceparent, **exports)
    assert receiver.spans == []  # the program has ended, and flushed what it had


def test_the_library_brings_no_sdk_of_its_own(receiver: Receiver, tmp_path: Path) -> None:
    """The same variables and an SDK that is installed, but nobody who asked for it."""
    facts = run_bare(folder=tmp_path, **exporting(receiver, "http/protobuf"))
    assert facts == {"provider": "ProxyTracerProvider", "threads": ["MainThread"], "sdk": False}
    assert receiver.spans == []


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
@pytest.mark.parametrize("compressed", [False, True])
def test_the_receiver_keeps_what_an_sdk_sends(
    receiver: Receiver, protocol: str, compressed: bool, tmp_path: Path
) -> None:
    """The receiver against the SDK alone: a span and the instruments, from a process that ends."""
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
    exports = exporting(receiver, protocol) | {"OTEL_METRICS_EXPORTER": "otlp"}
    if compressed:
        exports["OTEL_EXPORTER_OTLP_COMPRESSION"] = "gzip"
    run(INSTRUMENT, sys.executable, "-P", "-c", code, folder=tmp_path, **exports)
    two, one = sorted(receiver.wait_spans(2), key=lambda span: span.error, reverse=True)
    assert (one.name, one.kind, one.parent_id, one.scope) == ("one", "SERVER", "", "t")
    assert one.events == (("happened", {"often": 2}),)
    assert (two.name, two.error) == ("two", True)
    assert two.links == ((one.trace_id, one.span_id),)
    assert two.attributes == {"s": "x", "f": 1.5, "b": True, "l": [1, 2]}

    def both(metrics: list[Metric]) -> bool:
        return {"c", "h"} <= {metric.name for metric in metrics}

    named = {metric.name: metric for metric in receiver.wait_metrics(both)}
    assert (named["c"].kind, named["c"].unit, named["c"].scope) == ("sum", "By", "m")
    assert named["c"].points == (({"k": "v"}, 3.0),)
    assert (named["h"].kind, named["h"].unit, named["h"].points) == ("histogram", "s", (({}, 0.5),))
    assert named["c"].resource["service.name"] == "bare"
