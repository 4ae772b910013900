"""What a collector gets of a real server: the traces of requests, over three processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine.engine import BLOCK
from tests.support.engine.traced_server import MODEL, SERVICE, Traced
from tests.support.otlp_collector import OtlpCollector, Span

pytestmark = pytest.mark.engine

BLOCKS = 5  # of the prompt
FIRST, AGAIN, CALLER = "a1" * 16, "a2" * 16, "ca" * 8
Tree = dict[str, Any]
# Of the three requests: one has no caller, and one loads and stores nothing new.
ALL = Counter({"kvcache.request": 3, "kvcache.lookup": 3, "kvcache.prefetch": 3, "kvcache.copy": 3})
ALL |= Counter({"kvcache.load": 1, "kvcache.store": 2, "kvcache.tier.store": 2, "llm_request": 3})


class Traces:
    """All that came."""

    def __init__(self, spans: list[Span], model: Traced) -> None:
        self.spans, self.model = spans, model

    def tree(self, trace_id: str, above: str) -> Tree:
        """Names, each with what is below it."""
        return {
            span.name: self.tree(trace_id, span.span_id)
            for span in self.spans
            if (span.trace_id, span.parent_id) == (trace_id, above)
        }

    def one(self, trace_id: str, name: str) -> Span:
        [found] = [s for s in self.spans if (s.trace_id, s.name) == (trace_id, name)]
        return found

    def said(self, trace_id: str, name: str) -> dict[str, Any]:
        """The attributes of one span, less those that no two runs have the same of."""
        varying = {
            *("kvcache.queue.duration", "kvcache.wait.duration"),
            *("kvcache.request.id", "gen_ai.request.id"),
        }
        said = self.one(trace_id, name).attributes
        return {key: value for key, value in said.items() if key not in varying}


@pytest.fixture(scope="module", params=["grpc", "http/protobuf"])
def traces(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Traces]:
    folder, protocol, model = tmp_path_factory.mktemp("traced"), request.param, Traced(checkpoint)

    def all_there(spans: list[Span]) -> bool:
        return Counter(span.name for span in spans) >= ALL

    with OtlpCollector() as receiver:
        endpoint = receiver.endpoint(protocol) + ("" if protocol == "grpc" else "/v1/traces")
        with model.serving(folder, endpoint, protocol) as server:
            model.keep(server, {"traceparent": f"00-{FIRST}-{CALLER}-01"})
            model.come_back(server, {"traceparent": f"00-{AGAIN}-{CALLER}-01"})
            receiver.wait(all_there)  # vLLM kills its processes at the end, whatever they hold
        yield Traces(receiver.spans, model)


def test_a_request_is_under_its_caller(traces: Traces) -> None:
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


def test_without_a_caller_a_request_is_a_trace_of_its_own(traces: Traces) -> None:
    [root] = [s for s in traces.spans if (s.name, s.parent_id) == ("kvcache.request", "")]
    assert root.attributes["kvcache.token.prompt"] > traces.model.l1_blocks * BLOCK
    assert set(traces.tree(root.trace_id, root.span_id)) == {
        "kvcache.prefetch",
        "kvcache.lookup",
        "kvcache.store",
        "llm_request",
    }
    assert traces.said(root.trace_id, "kvcache.store")["kvcache.block.evicted"] == BLOCKS


def test_what_is_written_behind_is_linked(traces: Traces) -> None:
    cause = traces.one(FIRST, "kvcache.store")
    [written] = [s for s in traces.spans if s.links == ((FIRST, cause.span_id),)]
    assert (written.name, written.parent_id) == ("kvcache.tier.store", "")
    assert written.attributes["kvcache.block.stored"] == BLOCKS


def test_every_span_says_of_which_process_it_is(traces: Traces) -> None:
    ours = [span for span in traces.spans if span.name.startswith("kvcache.")]
    processes: dict[str, set[str]] = {}
    for span in ours:
        assert (span.scope, span.kind, span.error) == ("kvcache", "INTERNAL", False)
        assert span.resource["service.name"] == SERVICE
        kind = span.resource["vllm.process_kind"]
        assert kind == ("worker" if span.name == "kvcache.copy" else "engine_core")
        processes.setdefault(kind, set()).add(span.resource["vllm.process_id"])
    assert {kind: len(ids) for kind, ids in processes.items()} == {"worker": 1, "engine_core": 1}
    assert processes["worker"] != processes["engine_core"]
    assert len({(span.trace_id, span.span_id) for span in ours}) == len(ours)


def test_what_the_spans_say(traces: Traces) -> None:
    profile = {"kvcache.profile.name": "l1-disk"}
    disk = {"kvcache.tier.name": "disk", "kvcache.tier.type": "disk"}
    blocks = {"kvcache.block.requested": BLOCKS, "kvcache.block.hit": BLOCKS}
    tokens = {"kvcache.token.hit": BLOCKS * BLOCK}
    nbytes = {"kvcache.payload.size": BLOCKS * traces.model.block_nbytes}
    looked = profile | blocks | tokens
    prompt = {"kvcache.token.prompt": len(traces.model.asked), "kvcache.token.engine_hit": 0}
    came = {"kvcache.token.tier.l1": 0, "kvcache.token.tier.disk": BLOCKS * BLOCK}
    copy = {"kvcache.copy.direction": "load", "kvcache.rank": "pp0 tp0"}
    for name, said in {
        "kvcache.request": prompt | tokens | came | {"gen_ai.request.model": MODEL},
        "kvcache.prefetch": looked | {"kvcache.l1.block.hit": 0},
        "kvcache.tier.contains": disk | blocks,
        "kvcache.tier.load": disk | blocks | nbytes | {"kvcache.codec": "none"},
        "kvcache.lookup": looked | {"kvcache.l1.block.hit": BLOCKS},
        "kvcache.load": profile | blocks | nbytes,
        "kvcache.copy": nbytes | copy | {"kvcache.block.requested": BLOCKS},
    }.items():
        assert traces.said(AGAIN, name) == said, name
    ours, theirs = traces.one(AGAIN, "kvcache.request"), traces.one(AGAIN, "llm_request")
    assert ours.attributes["gen_ai.request.id"] == theirs.attributes["gen_ai.request.id"]
    assert [name for name, _ in ours.events] == ["kvcache.request.admitted"]
    assert ours.attributes["kvcache.wait.duration"] > 0
    first = traces.one(FIRST, "kvcache.request")
    assert first.attributes["kvcache.token.tier.disk"] == 0


def test_the_copies_of_two_ranks_are_told_apart(checkpoint: Path, tmp_path: Path) -> None:
    model = Traced(checkpoint, ranks=2)

    def copies(spans: list[Span]) -> list[Span]:
        return [span for span in spans if (span.trace_id, span.name) == (FIRST, "kvcache.copy")]

    with OtlpCollector() as receiver:
        with model.serving(tmp_path, receiver.grpc_endpoint, "grpc") as server:
            server.complete(model.asked, {"traceparent": f"00-{FIRST}-{CALLER}-01"})
            both = copies(receiver.wait(lambda spans: len(copies(spans)) == 2))
        assert {span.attributes["kvcache.rank"] for span in both} == {"pp0 tp0", "pp0 tp1"}
        assert len({span.resource["vllm.process_id"] for span in both}) == 2
        assert len({span.parent_id for span in both}) == 1
        assert len({span.span_id for span in both}) == 2
