"""kvcache's tiers below vLLM's own manager: blocks, resets, events, metrics, spans."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from kvcache.connectors.vllm.metrics import labels_of, prometheus_name
from kvcache.metrics import METRICS
from tests.support import played_tiering
from tests.support.played_tiering import (
    BLOCK_TOKENS,
    SharedFaultyTier,
    block_of,
    disk_table,
    eventually,
    found,
    keep,
    key_of,
    keys_of,
    played,
)

pytestmark = pytest.mark.engine


@pytest.fixture(autouse=True)
def known_weights(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The engines of these tests load the same weights, and share no blocks with another test."""
    monkeypatch.setenv("KVCACHE_IDENTITY", "the same weights")
    SharedFaultyTier.shared.clear()
    SharedFaultyTier.opened.clear()
    yield
    for tier in SharedFaultyTier.opened:
        tier.gate.set()


@pytest.fixture
def disk(tmp_path: Path) -> dict[str, object]:
    """Options of a secondary tier with a disk."""
    return {"tiers": [disk_table(tmp_path)]}


@pytest.fixture
def faulty() -> dict[str, object]:
    """Options of a secondary tier that keeps blocks in a dictionary."""
    return {"tiers": [SharedFaultyTier.table()]}


# Blocks


def test_second_manager_finds_blocks_with_their_bytes(disk: dict[str, object]) -> None:
    keys = keys_of("a", 6)
    keep(disk, keys)
    assert found(disk, [*keys, *keys_of("b", 2)]) == [True] * 6 + [False] * 2


def test_second_manager_of_a_profile_finds_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVCACHE__DISK__PATH", str(tmp_path / "disk"))
    monkeypatch.setenv("KVCACHE__DISK__CAPACITY", "8MiB")
    keep({"profile": "l1-disk"}, keys_of("a", 3))
    monkeypatch.setenv("KVCACHE_PROFILE", "l1-disk")
    assert found({}, keys_of("a", 3)) == [True] * 3


def test_keys_of_several_groups_are_different_blocks(disk: dict[str, object]) -> None:
    keys = [*keys_of("a", 3, group=0), *keys_of("a", 3, group=1)]
    keep(disk, keys, groups=2)
    assert block_of(keys[0], 8) != block_of(keys[3], 8)
    assert found(disk, keys, groups=2) == [True] * 6


@pytest.mark.parametrize("shape", [{"tensor": 2}, {"chunk": 4}, {"tensor": 2, "chunk": 2}])
def test_row_of_several_ranks_and_blocks_is_one_block(
    disk: dict[str, object], shape: dict[str, int]
) -> None:
    keep(disk, keys_of("a", 3), **shape)
    assert found(disk, keys_of("a", 3), **shape) == [True] * 3
    assert found(disk, keys_of("a", 3)) == [False] * 3


def test_engines_with_equal_rows_of_another_shape_share_nothing(disk: dict[str, object]) -> None:
    keep(disk, keys_of("a", 3), tensor=2)
    assert found(disk, keys_of("a", 3), chunk=2) == [False] * 3


def test_block_that_vllm_evicted_is_found_below(disk: dict[str, object]) -> None:
    with played(disk, rows=4) as engine:
        for prompt in "abc":
            request = engine.start(prompt)
            engine.store(request, keys_of(prompt, 4))
            engine.settle()
            engine.finish(request)
        request = engine.start("again")
        assert engine.find(request, keys_of("a", 4)) == [True] * 4
        assert engine.read(request, keys_of("a", 4)) == engine.expected(keys_of("a", 4))
        engine.finish(request)


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[bytes], bytes | None]]:
    """The keys and the parent of every store that reaches a tier."""
    stores: list[tuple[list[bytes], bytes | None]] = []
    store = SharedFaultyTier.store

    def record(tier: SharedFaultyTier, keys: Any, blocks: Any, parent: Any = None) -> list[bool]:
        stores.append((list(keys), parent))
        return store(tier, keys, blocks, parent)

    monkeypatch.setattr(SharedFaultyTier, "store", record)
    return stores


def test_stored_chain_has_the_order_of_the_prompt(
    faulty: dict[str, object], stores: list[tuple[list[bytes], bytes | None]]
) -> None:
    """vLLM passes the keys of a job as a set, and a full tier evicts the end of a chain first."""
    with played(faulty, rows=32) as engine:
        request = engine.start("a")
        engine.store(request, keys_of("a", 8))
        engine.settle()
        engine.store(request, keys_of("a", 10))
        engine.settle()
        engine.finish(request)
    (first, begin), (second, parent) = stores
    assert list(SharedFaultyTier.shared) == [*first, *second]
    assert begin is None
    assert parent == first[-1]
    with played(faulty, rows=32) as engine:
        request = engine.start("again")
        for count in range(1, 9):
            assert engine.find(request, keys_of("a", count)) == [True] * count
        assert SharedFaultyTier.last().read == first
        engine.finish(request)


def test_stored_chain_continues_the_blocks_that_vllm_had(
    faulty: dict[str, object], stores: list[tuple[list[bytes], bytes | None]]
) -> None:
    with played(faulty, rows=32) as engine:
        for name, blocks in (("first turn", 4), ("second turn", 6)):
            request = engine.start(name)
            engine.store(request, keys_of("a", blocks))  # of the second turn, two are new
            engine.settle()
            engine.finish(request)
    (first, begin), (second, parent) = stores
    assert (len(first), begin) == (4, None)
    assert (len(second), parent) == (2, first[-1])


def test_stored_chain_has_the_groups_of_a_position_together(
    faulty: dict[str, object], stores: list[tuple[list[bytes], bytes | None]]
) -> None:
    with played(faulty, rows=32, groups=2) as engine:
        request = engine.start("a")
        for group in range(2):
            for position, key in enumerate(keys_of("a", 3, group), 1):
                request.set_offload_key_position(key, position * BLOCK_TOKENS)
        engine.store_placed(request, [*keys_of("a", 3, 0), *keys_of("a", 3, 1)])
        engine.settle()
        engine.finish(request)
    [(order, _)] = stores
    with played(faulty, rows=32, groups=2) as engine:
        request = engine.start("again")
        for chunk in range(3):
            keys = [key_of("a", chunk, group) for group in range(2)]
            assert engine.find(request, keys) == [True, True]
        assert [sorted(SharedFaultyTier.last().read[at : at + 2]) for at in (0, 2, 4)] == [
            sorted(order[at : at + 2]) for at in (0, 2, 4)
        ]
        engine.finish(request)


def test_store_jobs_pin_at_most_a_quarter_of_the_rows(faulty: dict[str, object]) -> None:
    with played(faulty, rows=16) as engine:
        tier = SharedFaultyTier.last()
        tier.gate.clear()
        requests = [engine.start(prompt) for prompt in "abcd"]
        for request in requests:
            engine.store(request, keys_of(request.req_id, 3))
            engine.step()
        tier.gate.set()
        engine.settle()
        assert len(tier.held) == 3  # a second job would pin 6 of 16 rows
        engine.finish(*requests)


# Reset


def test_blocks_before_a_reset_are_not_found(disk: dict[str, object]) -> None:
    keys = keys_of("a", 3)
    keep(disk, keys)
    with played(disk) as engine:
        request = engine.start("a")
        engine.store(request, keys_of("b", 2))
        engine.manager.reset_cache()
        if hasattr(engine.manager, "on_reset_flushed"):
            engine.manager.on_reset_flushed()
        assert engine.find(request, [*keys, *keys_of("b", 2)]) == [False] * 5
        engine.store(request, keys_of("c", 2))
        engine.settle()
        engine.finish(request)
    assert found(disk, [*keys, *keys_of("b", 2)]) == [False] * 5


def test_reset_ends_while_a_tier_hangs() -> None:
    with played({"tiers": [SharedFaultyTier.table(deadline_s=0.2)]}) as engine:
        tier = SharedFaultyTier.last()
        tier.gate.clear()
        request = engine.start("a")
        engine.store(request, keys_of("a", 2))
        engine.manager.reset_cache()
        assert not engine.manager.has_pending_work()
        tier.gate.set()
        engine.finish(request)


# Events


def events_of(engine: played_tiering.PlayedTiering) -> list[tuple[list[bytes], bool]]:
    """Return keys and direction of the secondary tier's events."""
    return [
        (sorted(event.keys), event.removed)
        for event in engine.tier.take_events()
        if event.medium.value == "STORAGE"
    ]


def test_stored_blocks_are_announced_once_and_retracted_when_gone(
    faulty: dict[str, object],
) -> None:
    keys = keys_of("a", 3)
    options = faulty | {"enable_kv_events": True, "locality": "LOCAL"}
    with played(options, rows=4, events=True) as engine:
        request = engine.start("a")
        engine.store(request, keys)
        engine.settle()
        events = list(engine.tier.take_events())
        assert [sorted(event.keys) for event in events] == [keys]
        assert [event.locality.value for event in events] == ["LOCAL"]
        engine.finish(request)
        request = engine.start("b")
        engine.store(request, keys_of("b", 4))  # evicts "a" from vLLM's memory
        engine.settle()
        assert events_of(engine) == [(keys_of("b", 4), False)]
        engine.finish(request)
        request = engine.start("c")
        tier = SharedFaultyTier.last()
        tier.fault = "hole"  # every third block is reported to be held, and not returned
        assert engine.find(request, keys) == [True, False, True]
        assert events_of(engine) == [([keys[1]], True)]
        engine.finish(request)


def test_events_after_a_reset_retract_all_blocks(faulty: dict[str, object]) -> None:
    keys = keys_of("a", 3)
    with played(faulty | {"enable_kv_events": True}, events=True) as engine:
        request = engine.start("a")
        engine.store(request, keys)
        eventually(lambda: len(SharedFaultyTier.shared) == 3, "the store")
        engine.manager.reset_cache()
        assert events_of(engine) == [(keys, False), (keys, True)]
        engine.finish(request)


def test_events_without_vllms_are_off_and_warned_of(
    faulty: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    with played(faulty | {"enable_kv_events": True}) as engine:
        request = engine.start("a")
        engine.store(request, keys_of("a", 2))
        engine.settle()
        assert list(engine.tier.take_events()) == []
        engine.finish(request)
    assert "vLLM publishes no KV events" in caplog.text


# Metrics and spans


def test_metrics_are_those_of_the_connector(disk: dict[str, object]) -> None:
    with played(disk) as engine:
        request = engine.start("a")
        engine.store(request, keys_of("a", 3))
        engine.settle()
        stats = engine.manager.get_stats()
        engine.finish(request)
        definitions = type(engine.spec).build_metric_definitions(engine.spec.extra_config)
    reported = {name: values for name, values in stats.data["data"].items() if "kvcache" in name}
    assert reported["vllm:kvcache_tier_stores"] == {("disk", "disk", "stored"): 3}
    for metric in METRICS:
        name = prometheus_name(metric)
        assert list(definitions[name].labelnames) == labels_of(metric)
        assert all(len(labels) == len(labels_of(metric)) for labels in reported.get(name, ()))
    assert set(reported) <= set(definitions)


def test_spans_of_a_request_are_below_the_callers_span(
    disk: dict[str, object], exported: Any
) -> None:
    keep(disk, keys_of("a", 3))
    exported.clear()
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    params = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
    with played(disk) as engine:
        request = engine.start("chat-1", kv_transfer_params=params)
        assert engine.find(request, keys_of("a", 4)) == [True] * 3 + [False]
        engine.finish(request)
    spans = {span.name: span for span in exported.get_finished_spans()}
    names = {"kvcache.request", "kvcache.lookup", "kvcache.load", "kvcache.tier.load"}
    assert names <= set(spans)
    assert {f"{spans[name].context.trace_id:032x}" for name in names} == {trace_id}
    assert spans["kvcache.request"].attributes["kvcache.request.id"] == "chat-1"
    assert spans["kvcache.lookup"].attributes["kvcache.block.hit"] == 3
    assert spans["kvcache.load"].attributes["kvcache.block.hit"] == 3


def test_tables_of_ended_requests_are_empty(disk: dict[str, object]) -> None:
    with played(disk, rows=64) as engine:
        lookups = engine.tier.open_requests()
        for number in range(5):
            request = engine.start(f"r{number}")
            engine.find(request, keys_of("a", 3))
            engine.step(request)
            engine.store(request, keys_of(f"p{number}", 2))
            engine.settle()
            engine.finish(request)
        assert engine.tier.open_requests() == lookups == 0


# Computing or loading


def test_blocks_that_load_slower_than_vllm_computes_are_misses(faulty: dict[str, object]) -> None:
    keys = keys_of("a", 4)
    keep(faulty, keys)
    with played(faulty) as engine:
        tier = SharedFaultyTier.last()
        load = tier.load

        def slow(keys: Any, into: Any) -> list[int]:
            time.sleep(0.2 * len(keys))
            return load(keys, into)

        tier.load = slow  # type: ignore[method-assign]
        request = engine.start("measures")
        engine.step(request)
        engine.store(request, keys_of("b", 4))  # computed in a few milliseconds
        engine.settle()
        first = engine.start("first")
        assert engine.find(first, keys[:2]) == [True] * 2  # no load was measured yet
        second = engine.start("second")
        assert engine.find(second, keys[2:]) == [False] * 2
        engine.finish(request, first, second)
