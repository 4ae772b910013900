"""The trace of a request, under its caller's, over both sides of the connector."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

pytest.importorskip("vllm")

from kvcache import telemetry
from kvcache.connectors.vllm.groups import KeptGroup
from kvcache.connectors.vllm.messages import Acks, Step
from kvcache.connectors.vllm.scheduler.tracing import RequestSpans
from kvcache.connectors.vllm.worker.side import WorkerSide
from kvcache.resume import Needs
from tests.support.played_engine import BLOCK, SHARD, PlayedEngine, Request, opened
from tests.support.recording_worker import RecordingCopier
from tests.support.recording_worker import side as worker_side
from tests.vllm.test_prefetch import WaitingEngine

pytestmark = pytest.mark.engine

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE}-{CALLER}-01", "tracestate": "vendor=1"}


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlayedEngine]:
    engine = opened(monkeypatch, 32)
    yield engine
    engine.side.close()


@pytest.fixture
def below(monkeypatch: pytest.MonkeyPatch) -> Iterator[WaitingEngine]:
    """An engine over L1 and a slow tier; the test sets its clock."""
    engine = WaitingEngine(monkeypatch)
    yield engine
    engine.tier.gate.set()
    engine.side.close()


def worker(*failing: int) -> WorkerSide:
    return worker_side(RecordingCopier(*failing), rank=(0, 1), page_shape=(SHARD // 8,))


def run_request(
    played: PlayedEngine, request: Request, blocks: list[int], worker: WorkerSide
) -> Step:
    """Run a request in one step, with one worker that copies for both ranks."""
    played.side.add_request(request)
    played.admit(request, blocks)
    step = played.step((request, request.num_tokens - request.num_computed_tokens))
    worker.load(step)
    worker.store(step)
    worker.take_received()
    worker.take_acks()
    played.ack(*step.loads, *step.stores)
    played.side.finish(request)
    return step


class Trace:
    def __init__(self, exported: InMemorySpanExporter) -> None:
        self.spans = exported.get_finished_spans()
        exported.clear()

    def tree(self, span: ReadableSpan | None = None) -> dict[str, Any]:
        """Return the names of the spans below one, each with its own tree."""
        above = span and span.context
        below = [
            s for s in self.spans if (s.parent.span_id if s.parent else None)
            == (above.span_id if above else None)
        ]  # fmt: skip
        return {s.name: self.tree(s) for s in below}

    def span_named(self, name: str) -> ReadableSpan:
        [span] = [span for span in self.spans if span.name == name]
        return span

    def attributes(self, name: str) -> dict[str, Any]:
        return dict(self.span_named(name).attributes or {})


COPIED: dict[str, Any] = {"kvcache.copy": {}}


def test_request_without_a_caller_is_a_trace_of_its_own(
    played: PlayedEngine, exported: InMemorySpanExporter
) -> None:
    run_request(played, Request("chat-1-0123abcd", 3 * BLOCK, "same"), [1, 2, 3], worker())
    first = Trace(exported)
    assert first.tree() == {"kvcache.request": {"kvcache.lookup": {}, "kvcache.store": COPIED}}
    again = Request("chat-2-0123abcd", 4 * BLOCK, "same", num_prompt_tokens=4 * BLOCK)
    run_request(played, again, [4, 5, 6, 7], worker())
    second = Trace(exported)
    assert second.tree() == {
        "kvcache.request": {"kvcache.lookup": {}, "kvcache.load": COPIED, "kvcache.store": COPIED}
    }
    assert second.attributes("kvcache.request") == {
        "kvcache.request.id": "chat-2-0123abcd",
        "gen_ai.request.id": "chat-2",
        "gen_ai.request.model": "model",
        "kvcache.token.prompt": 4 * BLOCK,
        "kvcache.token.engine_hit": 0,
        "kvcache.token.hit": 3 * BLOCK,
        "kvcache.token.tier.l1": 3 * BLOCK,
        "kvcache.wait.duration": 0.0,
    }
    assert second.attributes("kvcache.lookup")["kvcache.token.hit"] == 3 * BLOCK
    traces = {span.context.trace_id for span in (*first.spans, *second.spans) if span.context}
    assert len(traces) == 2
    admitted = [event.name for event in second.span_named("kvcache.load").events]
    assert admitted == ["kvcache.request.admitted"]


def test_request_span_has_the_tokens_of_groups_that_need_fewer_than_the_hit(
    exported: InMemorySpanExporter,
) -> None:
    needs = (Needs("all"), Needs("window", 2 * BLOCK), Needs("state"), Needs("window", 1 << 20))
    groups = [KeptGroup(at, (at,), rule, BLOCK, 1, BLOCK) for at, rule in enumerate(needs)]
    spans, request = RequestSpans("model"), Request("a", 9 * BLOCK)
    spans.start(request)
    spans.admit(request, 6 * BLOCK, 2 * BLOCK, groups)
    spans.finish(request)
    found = Trace(exported).attributes("kvcache.request")
    named = {name: of for name, of in found.items() if "token.group" in name}
    assert named == {"kvcache.token.group.window": 2 * BLOCK - 1, "kvcache.token.group.state": 1}


@pytest.mark.parametrize("how", ["trace_headers", "kv_transfer_params"])
def test_callers_trace_has_the_spans_of_the_workers(
    played: PlayedEngine, exported: InMemorySpanExporter, how: str
) -> None:
    request = Request("a", 2 * BLOCK, **{how: HEADERS})  # type: ignore[arg-type]
    step = run_request(played, request, [1, 2], worker())
    trace = Trace(exported)
    for span in trace.spans:
        assert span.context is not None
        assert f"{span.context.trace_id:032x}" == TRACE
    root = trace.span_named("kvcache.request")
    assert root.parent is not None
    assert f"{root.parent.span_id:016x}" == CALLER
    [store] = step.stores
    assert store.trace["tracestate"] == "vendor=1"
    copy, above = trace.span_named("kvcache.copy"), trace.span_named("kvcache.store")
    assert copy.parent is not None
    assert copy.parent.is_remote
    assert above.context is not None
    assert copy.parent.span_id == above.context.span_id
    assert trace.attributes("kvcache.copy") == {
        "kvcache.copy.direction": "store",
        "kvcache.rank": "pp0 tp1",
        "kvcache.block.requested": 2,
        "kvcache.payload.size": 2 * SHARD,
    }


@pytest.mark.parametrize(
    "params",
    [{"traceparent": "rubbish"}, {"traceparent": 7}, {"do_remote_decode": True}, {}, None],
)
def test_request_with_an_invalid_trace_has_its_own(
    played: PlayedEngine, exported: InMemorySpanExporter, params: dict[str, Any] | None
) -> None:
    run_request(played, Request("a", 2 * BLOCK, kv_transfer_params=params), [1, 2], worker())
    assert Trace(exported).span_named("kvcache.request").parent is None


def test_caller_that_does_not_record_gets_no_spans(
    played: PlayedEngine, exported: InMemorySpanExporter
) -> None:
    headers = {"traceparent": f"00-{TRACE}-{CALLER}-00"}
    step = run_request(played, Request("a", 2 * BLOCK, trace_headers=headers), [1, 2], worker())
    assert Trace(exported).spans == ()
    assert step.stores[0].trace == {}


@pytest.mark.parametrize("params", [None, {"traceparent": HEADERS["traceparent"]}])
def test_request_without_headers_passes_its_trace_to_vllm(
    played: PlayedEngine, exported: InMemorySpanExporter, params: dict[str, Any] | None
) -> None:
    request = Request("a", 2 * BLOCK, kv_transfer_params=params)
    run_request(played, request, [1, 2], worker())
    root = Trace(exported).span_named("kvcache.request").context
    assert root is not None
    theirs = trace.get_current_span(
        telemetry.context_from_headers(request.trace_headers)
    ).get_span_context()
    assert (theirs.trace_id, theirs.span_id) == (root.trace_id, root.span_id)


def test_request_that_is_not_recorded_keeps_its_headers(
    played: PlayedEngine, exported: InMemorySpanExporter
) -> None:
    headers = {"traceparent": f"00-{TRACE}-{CALLER}-00"}
    request = Request("a", 2 * BLOCK, trace_headers=headers)
    run_request(played, request, [1, 2], worker())
    assert request.trace_headers is headers


def test_copy_span_lasts_as_long_as_the_copy(
    played: PlayedEngine, exported: InMemorySpanExporter
) -> None:
    run_request(played, Request("a", 3 * BLOCK, "same"), [1, 2, 3], worker())
    run_request(played, Request("b", 4 * BLOCK, "same"), [4, 5, 6, 7], worker())
    copies = [span for span in Trace(exported).spans if span.name == "kvcache.copy"]
    assert len(copies) == 3
    for span in copies:
        assert span.end_time is not None
        assert span.start_time is not None
        assert span.end_time - span.start_time == 1_000_000_000  # the copier's seconds


def test_request_span_has_tokens_by_tier_and_the_wait(
    below: WaitingEngine, exported: InMemorySpanExporter
) -> None:
    below.keep(Request("kept", 2 * BLOCK, "same"), [21, 22])
    Trace(exported)
    request = Request("a", 5 * BLOCK, "same")
    below.keep_below(request, 4)
    below.add_request(request)
    for at in (5.0, 6.0, 7.0):
        below.now = at
        assert below.side.matched_tokens(request, BLOCK) is None
    below.end_prefetch()
    below.now = 8.0
    assert below.admit(request, [1, 2, 3, 4, 5], own=BLOCK) == 3 * BLOCK
    step = below.step((request, BLOCK))
    [load] = step.loads
    below.side.end_step(Acks({load.job: 2}, step=1, seconds={load.job: 0.25}))
    below.ack(*step.stores)
    below.side.finish(request)
    span = Trace(exported).attributes("kvcache.request")
    assert span["kvcache.token.engine_hit"] == BLOCK
    assert span["kvcache.token.hit"] == 3 * BLOCK
    assert span["kvcache.token.tier.l1"] == BLOCK
    assert span["kvcache.token.tier.l2"] == 2 * BLOCK
    assert span["kvcache.wait.duration"] == 3.25


def test_request_span_has_the_wait_for_an_async_load(
    below: WaitingEngine, exported: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    below.keep(Request("kept", 2 * BLOCK, "same"), [21, 22])
    Trace(exported)
    monkeypatch.setattr(below.side.pending_loads, "prefers_async", lambda blocks, others: True)
    request = Request("a", 2 * BLOCK + 1, "same")
    below.side.add_request(request)
    below.now = 10.0
    assert below.admit(request, [1, 2, 3], scheduled=False) == 2 * BLOCK
    [load] = below.step().loads
    below.side.end_step(Acks({load.job: 2}, seconds={load.job: 0.25}))
    below.now = 12.0
    below.side.admit(request, (request.blocks,), 0)
    below.side.finish(request)
    assert Trace(exported).attributes("kvcache.request")["kvcache.wait.duration"] == 2.0


def test_copy_that_fails_has_an_error_span(
    played: PlayedEngine, exported: InMemorySpanExporter
) -> None:
    run_request(played, Request("a", 2 * BLOCK), [1, 2], worker(0))
    trace = Trace(exported)
    assert trace.attributes("kvcache.copy")["error.type"] == "OSError"


def test_request_span_has_the_blocks_of_a_failed_load(
    played: PlayedEngine, exported: InMemorySpanExporter
) -> None:
    played.keep(Request("kept", 2 * BLOCK + 1, "same"), [1, 2, 3])
    Trace(exported)
    request = Request("a", 2 * BLOCK + 1, "same")
    played.side.add_request(request)
    played.admit(request, [4, 5, 6])
    [load] = played.step((request, 1)).loads
    played.side.end_step(Acks({load.job: 2}, {load.job}, seconds={load.job: 0.5}))
    played.side.finish(request)
    assert Trace(exported).attributes("kvcache.request")["kvcache.block.failed"] == 2


def test_close_ends_every_span(played: PlayedEngine, exported: InMemorySpanExporter) -> None:
    for name in ("waits", "runs"):
        played.side.add_request(Request(name, 2 * BLOCK))
    played.side.finish(Request("waits", 2 * BLOCK))
    assert [span.name for span in Trace(exported).spans] == ["kvcache.request"]
    played.side.close()
    assert [span.name for span in Trace(exported).spans] == ["kvcache.request"]
    assert played.side.table_sizes()["spans"] == 0
