"""A real server exports the traces of requests, from three processes, to a collector."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine.engine import BLOCK
from tests.support.engine.traced_server import MODEL, SERVICE, TracedModel
from tests.support.otlp_collector import OtlpCollector, Span

pytestmark = pytest.mark.engine

BLOCKS = 5  # of the prompt
FIRST, AGAIN, CALLER = "a1" * 16, "a2" * 16, "ca" * 8
Tree = dict[str, Any]
# The spans of three requests, one without a caller and one that only loads.
ALL = Counter({"kvcache.request": 3, "kvcache.lookup": 3, "kvcache.prefetch": 3, "kvcache.copy": 3})
ALL |= Counter({"kvcache.load": 1, "kvcache.store": 2, "kvcache.tier.store": 2, "llm_request": 3})


class Traces:
    """All spans that the collector received."""

    def __init__(self, spans: list[Span], model: TracedModel) -> None:
        self.spans, self.model = spans, model

    def tree(self, trace_id: str, parent_id: str) -> Tree:
        """Return the names of the children of a span, each with its own children."""
        return {
            span.name: self.tree(trace_id, span.span_id)
            for span in self.spans
            if (span.trace_id, span.parent_id) == (trace_id, parent_id)
        }

    def one(self, trace_id: str, name: str) -> Span:
        [found] = [s for s in self.spans if (s.trace_id, s.name) == (trace_id, name)]
        return found

    def attributes_of(self, trace_id: str, name: str) -> dict[str, Any]:
        """Return the attributes of one span without those that differ between runs."""
        varying = {
            *("kvcache.queue.duration", "kvcache.wait.duration"),
            *("kvcache.request.id", "gen_ai.request.id"),
        }
        attributes = self.one(trace_id, name).attributes
        return {key: value for key, value in attributes.items() if key not in varying}


@pytest.fixture(scope="module", params=["grpc", "http/protobuf"])
def traces(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Traces]:
    folder, protocol = tmp_path_factory.mktemp("traced"), request.param
    model = TracedModel(checkpoint)

    def has_all(spans: list[Span]) -> bool:
        return Counter(span.name for span in spans) >= ALL

    with OtlpCollector() as receiver:
        endpoint = receiver.endpoint(protocol) + ("" if protocol == "grpc" else "/v1/traces")
        with model.serve(folder, endpoint, protocol) as server:
            model.compute_and_evict(server, {"traceparent": f"00-{FIRST}-{CALLER}-01"})
            model.load_from_disk(server, {"traceparent": f"00-{AGAIN}-{CALLER}-01"})
            # vLLM kills its processes at the end, and loses the spans that they hold.
            receiver.wait(has_all)
        yield Traces(receiver.spans, model)


def test_request_span_has_its_caller_as_parent(traces: Traces) -> None:
    copied: Tree = {"kvcache.copy": {}}
    looked: Tree = {"kvcache.tier.contains": {}}
    assert traces.tree(FIRST, CALLER) == {
        "llm_request": {},
        "kvcache.request": {
            "kvcache.prefetch": looked,
            "kvcache.lookup": {},
            "kvcache.store": copied,
        },
    }
    assert traces.tree(AGAIN, CALLER) == {
        "llm_request": {},
        "kvcache.request": {
            "kvcache.prefetch": looked | {"kvcache.tier.load": {}},
            "kvcache.lookup": {},
            "kvcache.load": copied,
        },
    }


def test_request_without_a_caller_starts_a_trace(traces: Traces) -> None:
    [root] = [s for s in traces.spans if (s.name, s.parent_id) == ("kvcache.request", "")]
    assert root.attributes["kvcache.token.prompt"] > traces.model.l1_blocks * BLOCK
    assert set(traces.tree(root.trace_id, root.span_id)) == {
        "kvcache.prefetch",
        "kvcache.lookup",
        "kvcache.store",
        "llm_request",
    }
    assert traces.attributes_of(root.trace_id, "kvcache.store")["kvcache.block.evicted"] == BLOCKS


def test_write_behind_span_has_a_link_to_its_store(traces: Traces) -> None:
    cause = traces.one(FIRST, "kvcache.store")
    [written] = [s for s in traces.spans if s.links == ((FIRST, cause.span_id),)]
    assert (written.name, written.parent_id) == ("kvcache.tier.store", "")
    assert written.attributes["kvcache.block.stored"] == BLOCKS


def test_every_span_has_the_resource_of_its_process(traces: Traces) -> None:
    kvcache_spans = [span for span in traces.spans if span.name.startswith("kvcache.")]
    processes: dict[str, set[str]] = {}
    for span in kvcache_spans:
        assert (span.scope, span.kind, span.error) == ("kvcache", "INTERNAL", False)
        assert span.resource["service.name"] == SERVICE
        kind = span.resource["vllm.process_kind"]
        assert kind == ("worker" if span.name == "kvcache.copy" else "engine_core")
        processes.setdefault(kind, set()).add(span.resource["vllm.process_id"])
    assert {kind: len(ids) for kind, ids in processes.items()} == {"worker": 1, "engine_core": 1}
    assert processes["worker"] != processes["engine_core"]
    assert len({(span.trace_id, span.span_id) for span in kvcache_spans}) == len(kvcache_spans)


def test_spans_of_a_load_have_their_attributes(traces: Traces) -> None:
    profile = {"kvcache.profile.name": "l1-disk"}
    disk = {"kvcache.tier.name": "disk", "kvcache.tier.type": "disk"}
    blocks = {"kvcache.block.requested": BLOCKS, "kvcache.block.hit": BLOCKS}
    tokens = {"kvcache.token.hit": BLOCKS * BLOCK}
    nbytes = {"kvcache.payload.size": BLOCKS * traces.model.block_nbytes}
    looked = profile | blocks | tokens
    prompt = {"kvcache.token.prompt": len(traces.model.prompt), "kvcache.token.engine_hit": 0}
    came = {"kvcache.token.tier.l1": 0, "kvcache.token.tier.disk": BLOCKS * BLOCK}
    copy = {"kvcache.copy.direction": "load", "kvcache.rank": "pp0 tp0"}
    for name, attributes in {
        "kvcache.request": prompt | tokens | came | {"gen_ai.request.model": MODEL},
        "kvcache.prefetch": looked | {"kvcache.l1.block.hit": 0},
        "kvcache.tier.contains": disk | blocks,
        "kvcache.tier.load": disk | blocks | nbytes | {"kvcache.codec": "none"},
        "kvcache.lookup": looked | {"kvcache.l1.block.hit": BLOCKS},
        "kvcache.load": profile | blocks | nbytes,
        "kvcache.copy": nbytes | copy | {"kvcache.block.requested": BLOCKS},
    }.items():
        assert traces.attributes_of(AGAIN, name) == attributes, name
    request, vllm_request = (traces.one(AGAIN, name) for name in ("kvcache.request", "llm_request"))
    assert request.attributes["gen_ai.request.id"] == vllm_request.attributes["gen_ai.request.id"]
    assert [name for name, _ in request.events] == ["kvcache.request.admitted"]
    assert request.attributes["kvcache.wait.duration"] > 0
    first = traces.one(FIRST, "kvcache.request")
    assert first.attributes["kvcache.token.tier.disk"] == 0


def test_copies_of_two_ranks_have_spans_of_their_own(checkpoint: Path, tmp_path: Path) -> None:
    model = TracedModel(checkpoint, ranks=2)

    def copies(spans: list[Span]) -> list[Span]:
        return [span for span in spans if (span.trace_id, span.name) == (FIRST, "kvcache.copy")]

    with OtlpCollector() as receiver:
        with model.serve(tmp_path, receiver.grpc_endpoint, "grpc") as server:
            server.complete(model.prompt, {"traceparent": f"00-{FIRST}-{CALLER}-01"})
            both = copies(receiver.wait(lambda spans: len(copies(spans)) == 2))
        assert {span.attributes["kvcache.rank"] for span in both} == {"pp0 tp0", "pp0 tp1"}
        assert len({span.resource["vllm.process_id"] for span in both}) == 2
        assert len({span.parent_id for span in both}) == 1
        assert len({span.span_id for span in both}) == 2
