"""A viewer shows the trace of a request over its processes; the docs contain its picture.

`make viewer` runs it: it installs the viewer from PyPI and writes `docs/images/trace.png`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
from opentelemetry import propagate
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.trace import Tracer

from tests.support.engine import browser
from tests.support.engine.engine import VOCABULARY
from tests.support.engine.trace_viewer import Viewer, listens_at, viewing
from tests.support.engine.traced_server import TracedModel

pytestmark = pytest.mark.viewer

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "images" / "trace.png"
LOOPBACK = {
    "0100007F",
    "0000000000000000FFFF00000100007F",
}  # the second is the same address in IPv6
CALLER = "the user comes back"
PARENTS = {
    CALLER: None,
    "llm_request": CALLER,  # from vLLM's API server
    "kvcache.request": CALLER,  # from here on from the scheduler's process
    "kvcache.prefetch": "kvcache.request",
    "kvcache.tier.contains": "kvcache.prefetch",
    "kvcache.tier.load": "kvcache.prefetch",
    "kvcache.lookup": "kvcache.request",
    "kvcache.load": "kvcache.request",
    "kvcache.copy": "kvcache.load",  # from the worker
}
MAX_NBYTES = 300_000
TREE = "document.querySelector('ul[data-testid=trace-tree]')"
DETAILS = "document.querySelector('[data-testid=span-details]')"
ATTRIBUTES = f"[...{DETAILS}.querySelectorAll('[role=tab]')].find(t => /^Attrib/.test(t.innerText))"
LONG = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TracedModel:
    """Spans take milliseconds, the least that the viewer shows: 512 KiB per block."""
    pytest.importorskip("vllm")
    from kvcache.cli.demo.checkpoint import write

    checkpoint = write(
        tmp_path_factory.mktemp("checkpoint"),
        layers=8, hidden=512, heads=8, kv_heads=8, head_dim=64, intermediate=1024,
        vocabulary=VOCABULARY, positions=8192,
    )  # fmt: skip
    return TracedModel(checkpoint, block_nbytes=512 << 10, blocks=40)


def trace_of(viewer: Viewer, request: str) -> list[Any]:
    """Return the spans of the trace of a request, by its id, once all are there."""
    until = monotonic() + LONG
    spans: list[Any] = []
    while monotonic() < until:
        for found in viewer.spans(name="kvcache.request", attribute=f"gen_ai.request.id:{request}"):
            spans = viewer.spans(trace_id=found["context"]["trace_id"])
        if {span["name"] for span in spans} >= PARENTS.keys():
            return spans
        sleep(0.1)  # the viewer sends no notice of new spans
    raise AssertionError(f"only {[span['name'] for span in spans]} of {request}")


@contextmanager
def caller_span(tracer: Tracer, name: str) -> Iterator[dict[str, str]]:
    """Record a span of the caller; yield the headers that continue its trace."""
    headers: dict[str, str] = {}
    with tracer.start_as_current_span(name):
        propagate.inject(headers)
        yield headers


def take_picture(viewer: Viewer, spans: list[Any], folder: Path) -> None:
    """Write the picture of the tree of spans and of the attributes of the request's span."""
    command = browser.chromium()
    if command is None:
        pytest.skip(f"found, but no picture: install one of {browser.NAMES}")
    [request] = [span for span in spans if span["name"] == "kvcache.request"]
    with browser.browsing(command, folder) as page:
        page.open(viewer.page(request["context"]["trace_id"], request["id"]), 1500, 720)
        for span in spans:
            page.wait(f"{TREE}?.innerText.includes('{span['name']}')")
        page.wait(f"{DETAILS} && {ATTRIBUTES}")
        page.run(f"{ATTRIBUTES}.click()")
        page.wait(f"{DETAILS}.innerText.includes('kvcache.token.hit')")
        drawer = page.run(
            "document.querySelector('[role=dialog]').getBoundingClientRect().toJSON()"
        )
        picture = page.picture({key: drawer[key] for key in ("x", "y", "width", "height")})
    assert len(picture) < MAX_NBYTES
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_bytes(picture)


def test_viewer_shows_the_trace_of_a_request(model: TracedModel, tmp_path: Path) -> None:
    with viewing(tmp_path) as viewer:
        assert listens_at(viewer.pid) <= LOOPBACK
        provider = TracerProvider(resource=Resource.create({"service.name": "chat"}))
        provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(viewer.traces_endpoint)))
        tracer = provider.get_tracer("chat")
        with model.serve(tmp_path, viewer.traces_endpoint, "http/protobuf") as server:
            with caller_span(tracer, "first turn") as headers:
                model.compute_and_evict(server, headers)
            with caller_span(tracer, CALLER) as headers:
                model.load_from_disk(server, headers | {"X-Request-Id": "turn-2"})
            spans = trace_of(viewer, "cmpl-turn-2-0")
        provider.shutdown()
        parents = {span["context"]["span_id"]: span["name"] for span in spans}
        tree = {span["name"]: parents.get(span["parent_id"]) for span in spans}
        assert tree == PARENTS
        assert len(spans) == len(tree)
        [copy] = [span for span in spans if span["name"] == "kvcache.copy"]
        assert copy["attributes"]["kvcache.rank"] == "pp0 tp0"
        take_picture(viewer, spans, tmp_path)
