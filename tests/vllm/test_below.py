"""Requests that wait for a lower tier: vLLM asks again, and is promised what came up into L1."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from kvcache.connectors.vllm.messages import Acks
from kvcache.connectors.vllm.scheduler import SchedulerSide
from kvcache.keys import namespaced_key
from kvcache.lower.promotion import LowerTiers
from kvcache.lower.tier import LowerTier
from kvcache.slab import PAGE
from tests.support.failing_parts import Faulty
from tests.support.played_engine import (
    BLOCK,
    RANKS,
    SHARD,
    Played,
    Request,
    cache_config,
    engine_config,
    full_attention,
    shards,
)

pytestmark = pytest.mark.engine

LONG = 20.0


class Waiting(Played):
    """An engine over L1 and one tier that holds its answers back until it is told to go on."""

    def __init__(self, side: SchedulerSide, now: list[float]) -> None:
        super().__init__(side)
        self._now = now
        assert side._stack is not None
        self.stack = side._stack
        self.tier = Faulty()
        space = b"n" * 32
        self.lower = LowerTier(
            self.tier, name="l2", front=self.stack.front, namespace=space, deadline_s=LONG
        )
        self.stack.lower = LowerTiers(self.stack.front, [self.lower])

    @property
    def now(self) -> float:
        """The time of the scheduler's half, in seconds."""
        return self._now[0]

    @now.setter
    def now(self, seconds: float) -> None:
        self._now[0] = seconds

    def keep_below(self, request: Request, blocks: int) -> None:
        for key in request.block_hashes[:blocks]:
            self.tier.held[namespaced_key(self.lower.namespace, key)] = bytes(SHARD * len(RANKS))

    def arrived(self, request: Request) -> None:
        """The request arrives, and what is below is being read for it, held back."""
        self.tier.gate.clear()
        self.side.arrived(request)
        assert self.tier.waiting.acquire(timeout=LONG)

    def go_on(self, request: Request) -> None:
        self.tier.gate.set()
        coming = self.side._coming[request.request_id]
        coming.result(LONG)


def opened_below(monkeypatch: pytest.MonkeyPatch) -> Waiting:
    monkeypatch.setenv("KVCACHE__L1__CAPACITY", str(32 * SHARD * len(RANKS)))
    now = [0.0]
    side = SchedulerSide(engine_config(), cache_config(full_attention()), {}, lambda: now[0])
    side.open(shards())
    assert side._stack is not None
    side._stack.front.slab.wait_populated()
    return Waiting(side, now)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waiting]:
    engine = opened_below(monkeypatch)
    yield engine
    engine.tier.gate.set()
    engine.side.close()


def test_a_request_waits_and_is_promised_what_came(engine: Waiting) -> None:
    request = Request("a", 5 * BLOCK + 3)
    engine.keep_below(request, 4)
    engine.arrived(request)
    assert engine.side.matched_tokens(request, 0) is None
    assert engine.side.matched_tokens(request, 0) is None
    engine.go_on(request)
    assert engine.side.matched_tokens(request, 0) == 4 * BLOCK
    assert engine.side.matched_tokens(request, 2 * BLOCK) == 2 * BLOCK
    engine.side.finished(request)
    assert engine.stack.stats().pinned_slots == 0
    assert engine.side._coming == {}


def test_others_do_not_wait(engine: Waiting) -> None:
    held, waits = Request("held", 2 * BLOCK + 1), Request("waits", 2 * BLOCK + 1)
    engine.admit(held, [0, 1, 2])
    [store] = engine.step((held, held.num_tokens)).stores
    engine.ack(store)
    assert engine.stack.flush(LONG)
    engine.keep_below(waits, 2)
    engine.arrived(waits)
    again = Request("again", 2 * BLOCK + 1, name="held")
    engine.side.arrived(again)  # L1 has it all: nobody below is asked
    assert engine.side.matched_tokens(again, 0) == 2 * BLOCK
    assert engine.side.matched_tokens(waits, 0) is None
    engine.side.finished(again)


def test_aborted_while_it_waits_nothing_is_left(engine: Waiting) -> None:
    request = Request("a", 3 * BLOCK + 1)
    engine.keep_below(request, 3)
    engine.arrived(request)
    coming = engine.side._coming["a"]
    engine.side.finished(request)
    engine.tier.gate.set()
    coming.result(LONG)
    assert not engine.side._coming
    assert not engine.side._promised
    assert engine.stack.stats().pinned_slots == 0


@pytest.mark.parametrize("fault", ["raise", "hole", "short"])
def test_what_does_not_come_is_not_promised(engine: Waiting, fault: str) -> None:
    request = Request("a", 5 * BLOCK + 3)
    engine.keep_below(request, 4)
    engine.arrived(request)
    engine.tier.fault = fault
    engine.go_on(request)
    tokens = engine.side.matched_tokens(request, 0)
    assert tokens == (BLOCK if fault == "hole" else 0)


def test_who_does_not_read_caches_is_not_waited_for(engine: Waiting) -> None:
    request = Request("a", 3 * BLOCK + 1, skip_reading_prefix_cache=True)
    engine.keep_below(request, 3)
    engine.side.arrived(request)
    assert engine.tier.calls == []
    assert engine.side.matched_tokens(request, 0) == 0


def test_a_profile_with_a_disk_makes_such_an_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two engines of one identity, one after another, and one of another identity."""
    monkeypatch.setenv("KVCACHE_PROFILE", "l1-disk")
    monkeypatch.setenv("KVCACHE__L1__CAPACITY", str(8 * SHARD * len(RANKS)))
    monkeypatch.setenv("KVCACHE__DISK__PATH", str(tmp_path / "kv"))
    monkeypatch.setenv("KVCACHE__DISK__CAPACITY", str(16 * (SHARD * len(RANKS) + 2 * PAGE)))
    request = Request("a", 2 * BLOCK + 1)

    def life(identity: dict[str, Any]) -> int | None:
        side = SchedulerSide(engine_config(), cache_config(full_attention()), identity)
        side.open(shards())
        engine = Played(side)
        side.arrived(request)
        if (coming := side._coming.get("a")) is not None:
            coming.result(LONG)
        tokens = side.matched_tokens(request, 0)
        side.finished(request)
        engine.admit(request, [0, 1, 2])
        for store in engine.step((request, request.num_tokens)).stores:
            engine.ack(store)
        side.close()
        request.num_computed_tokens = 0
        return tokens

    assert life({"model": "m"}) == 0
    assert life({"model": "m"}) == 2 * BLOCK
    assert life({"model": "another"}) == 0


def test_no_thread_is_started_for_l1_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCACHE__L1__CAPACITY", str(8 * SHARD * len(RANKS)))
    side = SchedulerSide(engine_config(), cache_config(full_attention()), {})
    side.open(shards())
    request = Request("a", 2 * BLOCK + 1)
    side.arrived(request)
    assert side._coming == {}
    assert side.matched_tokens(request, 0) == 0
    assert not [t for t in threading.enumerate() if t.name.startswith("kvcache-stack")]
    side.close()


def test_how_fast_the_engine_computes_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over steps of prompts alone, whether the next is built before the last has ended or not."""
    monkeypatch.setenv("KVCACHE__L1__CAPACITY", str(32 * SHARD * len(RANKS)))
    now = 0.0
    side = SchedulerSide(engine_config(), cache_config(full_attention()), {}, clock=lambda: now)
    side.open(shards())
    assert side._stack is not None
    told: list[tuple[float, ...]] = []
    monkeypatch.setattr(side._stack, "observe_compute", lambda *what: told.append(what))
    engine = Played(side)
    request = Request("a", 8 * BLOCK, num_prompt_tokens=6 * BLOCK)
    engine.admit(request, list(range(8)))

    def ends(step: Any) -> None:
        side.acked(Acks({store.job: 2 for store in step.stores}, step=step.number))

    first = engine.step((request, 2 * BLOCK))
    now = 1.0
    ends(first)
    now = 5.0  # nothing to do for a while
    second = engine.step((request, 3 * BLOCK))
    now = 5.5
    third = engine.step((request, BLOCK // 2))  # before the second has ended
    now = 6.5
    ends(second)
    now = 7.0
    ends(third)
    request.num_computed_tokens = 6 * BLOCK
    decoded = engine.step((request, 1))
    now = 9.0
    ends(decoded)
    # Blocks, seconds, and the blocks before a computed one: half of its own step are, in the mean.
    assert told == [(2, 1.0, 0 + 1), (3, 1.5, 2 + 1.5), (0.5, 0.5, 5 + 0.25), (0, 2.0, 0)]
    assert side._steps == {}


def test_depth_of_a_step_is_the_mean_over_the_blocks_of_its_prompts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KVCACHE__L1__CAPACITY", str(32 * SHARD * len(RANKS)))
    side = SchedulerSide(engine_config(), cache_config(full_attention()), {})
    side.open(shards())
    assert side._stack is not None
    told: list[tuple[float, ...]] = []
    monkeypatch.setattr(side._stack, "observe_compute", lambda *what: told.append(what))
    engine = Played(side)
    long, short = Request("a", 12 * BLOCK), Request("b", 2 * BLOCK)
    engine.admit(long, list(range(12)))
    engine.step((long, 8 * BLOCK))
    engine.admit(short, [20, 21])
    step = engine.step((long, 4 * BLOCK), (short, 2 * BLOCK))
    side.acked(Acks(step=step.number))
    [(blocks, _, depth)] = told
    assert blocks == 6
    assert depth == pytest.approx((4 * (8 + 2) + 2 * 1) / 6)
    side.close()
    side.close()
