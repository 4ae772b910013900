"""Requests that wait for a prefetch from a lower tier, and what they then find in L1."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from kvcache import Match, Stack
from kvcache.connectors.vllm.messages import Acks
from kvcache.connectors.vllm.scheduler.side import SchedulerSide
from kvcache.keys import namespaced_key
from kvcache.lower.tier import LowerTier
from kvcache.sizes import Size
from kvcache.slab import PAGE
from kvcache.tiers.dram import DramTier
from tests.support.failing_parts import FaultyTier
from tests.support.played_engine import (
    BLOCK,
    RANKS,
    SHARD,
    PlayedEngine,
    Request,
    cache_config,
    engine_config,
    full_attention,
    opened,
    shards,
)

pytestmark = pytest.mark.engine

LONG = 20.0


def prefetches_of(monkeypatch: pytest.MonkeyPatch, stack: Stack) -> list[Future[Match]]:
    """Return a list to which each prefetch of a stack is added when it starts."""
    started: list[Future[Match]] = []
    prefetch = stack.prefetch_resume

    def add(*arguments: Any, **options: Any) -> Future[Match] | None:
        future = prefetch(*arguments, **options)
        if future is not None:
            started.append(future)
        return future

    monkeypatch.setattr(stack, "prefetch_resume", add)
    return started


class WaitingEngine(PlayedEngine):
    """An engine over L1 and one lower tier, which a test can hold back.

    Attributes:
        now: the time of the scheduler's side, in seconds.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.tier = FaultyTier()
        engine = opened(monkeypatch, 32, clock=lambda: self.now, open_stack=self._open_stack)
        super().__init__(engine.side)
        self.prefetches = prefetches_of(monkeypatch, self.stack)

    def _open_stack(self, *, block_nbytes: int, block_tokens: int, **_: Any) -> Stack:
        front = DramTier(block_nbytes=block_nbytes, capacity=Size(32 * block_nbytes))
        self.lower = LowerTier(
            self.tier, name="l2", front=front, namespace=b"n" * 32, deadline_s=LONG
        )
        return Stack(front, [self.lower], profile="test", block_tokens=block_tokens)

    def keep_below(self, request: Request, blocks: int) -> None:
        """Have the lower tier hold the leading blocks of a request."""
        for key in request.block_hashes[:blocks]:
            self.tier.held[namespaced_key(self.lower.namespace, key)] = bytes(SHARD * len(RANKS))

    def add_request(self, request: Request) -> None:
        """Add a request, and hold back the lower tier's answer to its prefetch."""
        self.tier.gate.clear()
        self.side.add_request(request)
        assert self.tier.waiting.acquire(timeout=LONG)

    def end_prefetch(self) -> None:
        """Let the lower tier answer, and wait until the prefetch is done."""
        self.tier.gate.set()
        self.prefetches[-1].result(LONG)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[WaitingEngine]:
    engine = WaitingEngine(monkeypatch)
    yield engine
    engine.tier.gate.set()
    engine.side.close()


def test_matched_tokens_during_a_prefetch_are_none_and_then_what_it_loaded(
    engine: WaitingEngine,
) -> None:
    request = Request("a", 5 * BLOCK + 3)
    engine.keep_below(request, 4)
    engine.add_request(request)
    assert engine.side.matched_tokens(request, 0) is None
    assert engine.side.matched_tokens(request, 0) is None
    engine.end_prefetch()
    assert engine.side.matched_tokens(request, 0) == 4 * BLOCK
    assert engine.side.matched_tokens(request, 2 * BLOCK) == 2 * BLOCK
    engine.side.finish(request)
    assert engine.stack.stats().pinned_slots == 0
    assert not engine.side.requests


def test_matched_tokens_of_other_requests_do_not_wait_for_a_prefetch(engine: WaitingEngine) -> None:
    held, waits = Request("held", 2 * BLOCK + 1), Request("waits", 2 * BLOCK + 1)
    engine.admit(held, [0, 1, 2])
    [store] = engine.step((held, held.num_tokens)).stores
    engine.ack(store)
    assert engine.stack.flush(LONG)
    engine.keep_below(waits, 2)
    engine.add_request(waits)
    again = Request("again", 2 * BLOCK + 1, name="held")
    engine.side.add_request(again)  # L1 has it all: no lower tier is asked
    assert engine.side.matched_tokens(again, 0) == 2 * BLOCK
    assert engine.side.matched_tokens(waits, 0) is None
    engine.side.finish(again)


def test_request_aborted_during_its_prefetch_leaves_nothing(engine: WaitingEngine) -> None:
    request = Request("a", 3 * BLOCK + 1)
    engine.keep_below(request, 3)
    engine.add_request(request)
    engine.side.finish(request)
    engine.end_prefetch()
    assert not engine.side.requests
    assert engine.stack.stats().pinned_slots == 0


@pytest.mark.parametrize("fault", ["raise", "hole", "short"])
def test_matched_tokens_after_a_failed_prefetch_are_those_of_l1(
    engine: WaitingEngine, fault: str
) -> None:
    request = Request("a", 5 * BLOCK + 3)
    engine.keep_below(request, 4)
    engine.add_request(request)
    engine.tier.fault = fault
    engine.end_prefetch()
    tokens = engine.side.matched_tokens(request, 0)
    assert tokens == (BLOCK if fault == "hole" else 0)


def test_request_that_skips_reading_starts_no_prefetch(engine: WaitingEngine) -> None:
    request = Request("a", 3 * BLOCK + 1, skip_reading_prefix_cache=True)
    engine.keep_below(request, 3)
    engine.side.add_request(request)
    assert engine.tier.calls == []
    assert engine.side.matched_tokens(request, 0) == 0


def test_engine_finds_blocks_of_an_earlier_engine_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two engines of one identity, one after the other, then one of another identity."""
    monkeypatch.setenv("KVCACHE_PROFILE", "l1-disk")
    monkeypatch.setenv("KVCACHE__L1__CAPACITY", str(8 * SHARD * len(RANKS)))
    monkeypatch.setenv("KVCACHE__DISK__PATH", str(tmp_path / "kv"))
    monkeypatch.setenv("KVCACHE__DISK__CAPACITY", str(16 * (SHARD * len(RANKS) + 2 * PAGE)))
    monkeypatch.setenv("KVCACHE__DISK__DEADLINE_S", str(LONG))
    request = Request("a", 2 * BLOCK + 1)

    def run_engine(identity: dict[str, Any]) -> int | None:
        side = SchedulerSide(engine_config(), cache_config(full_attention()), identity)
        side.open(shards())
        engine = PlayedEngine(side)
        prefetches = prefetches_of(monkeypatch, engine.stack)
        side.add_request(request)
        for prefetched in prefetches:
            prefetched.result(LONG)
        tokens = side.matched_tokens(request, 0)
        side.finish(request)
        engine.admit(request, [0, 1, 2])
        for store in engine.step((request, request.num_tokens)).stores:
            engine.ack(store)
        assert engine.stack.flush(LONG)
        side.close()
        request.num_computed_tokens = 0
        return tokens

    assert run_engine({"model": "m"}) == 0
    assert run_engine({"model": "m"}) == 2 * BLOCK
    assert run_engine({"model": "another"}) == 0


def test_stack_without_lower_tiers_starts_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCACHE__L1__CAPACITY", str(8 * SHARD * len(RANKS)))
    side = SchedulerSide(engine_config(), cache_config(full_attention()), {})
    side.open(shards())
    request = Request("a", 2 * BLOCK + 1)
    side.add_request(request)
    assert not side.requests
    assert side.matched_tokens(request, 0) == 0
    assert not [t for t in threading.enumerate() if t.name.startswith("kvcache-stack")]
    side.close()


def test_observe_compute_gets_steps_that_compute_prompts_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also if a step is built before the one before it has ended."""
    monkeypatch.setenv("KVCACHE__L1__CAPACITY", str(32 * SHARD * len(RANKS)))
    now = 0.0
    side = SchedulerSide(engine_config(), cache_config(full_attention()), {}, clock=lambda: now)
    side.open(shards())
    engine = PlayedEngine(side)
    observed: list[tuple[float, ...]] = []
    monkeypatch.setattr(engine.stack, "observe_compute", lambda *sample: observed.append(sample))
    request = Request("a", 8 * BLOCK, num_prompt_tokens=6 * BLOCK)
    engine.admit(request, list(range(8)))

    def end(step: Any) -> None:
        side.end_step(Acks({store.job: 2 for store in step.stores}, step=step.number))

    first = engine.step((request, 2 * BLOCK))
    now = 1.0
    end(first)
    now = 5.0  # the engine idles
    second = engine.step((request, 3 * BLOCK))
    now = 5.5
    third = engine.step((request, BLOCK // 2))  # before the second has ended
    now = 6.5
    end(second)
    now = 7.0
    end(third)
    request.num_computed_tokens = 6 * BLOCK
    decoded = engine.step((request, 1))
    now = 9.0
    end(decoded)
    # Blocks, seconds, and the mean depth: half of the step's own blocks, and all before the step.
    assert observed == [(2, 1.0, 0 + 1), (3, 1.5, 2 + 1.5), (0.5, 0.5, 5 + 0.25), (0, 2.0, 0)]
    assert side.table_sizes()["steps"] == 0


def test_observe_compute_depth_is_the_mean_over_the_blocks_of_the_prompts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KVCACHE__L1__CAPACITY", str(32 * SHARD * len(RANKS)))
    side = SchedulerSide(engine_config(), cache_config(full_attention()), {})
    side.open(shards())
    engine = PlayedEngine(side)
    observed: list[tuple[float, ...]] = []
    monkeypatch.setattr(engine.stack, "observe_compute", lambda *sample: observed.append(sample))
    long, short = Request("a", 12 * BLOCK), Request("b", 2 * BLOCK)
    engine.admit(long, list(range(12)))
    engine.step((long, 8 * BLOCK))
    engine.admit(short, [20, 21])
    step = engine.step((long, 4 * BLOCK), (short, 2 * BLOCK))
    side.end_step(Acks(step=step.number))
    [(blocks, _, depth)] = observed
    assert blocks == 6
    assert depth == pytest.approx((4 * (8 + 2) + 2 * 1) / 6)
    side.close()
    side.close()
