"""Tiers that fail, hang, are slow or corrupt blocks, below vLLM's own manager: never a wrong byte.

A hanging tier costs its deadline, and pins no row of vLLM's memory beyond it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.support.failing_parts import FAULTS
from tests.support.played_tiering import (
    PlayedTiering,
    SharedFaultyTier,
    keep,
    key_of,
    keys_of,
    played,
)
from tests.support.waiting import eventually

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("same_weights")]

DEADLINE_S = 0.5
HANGING = {"deadline_s": DEADLINE_S}


def options(**more: object) -> dict[str, object]:
    """Return options of a secondary tier that fails on command."""
    return {"tiers": [SharedFaultyTier.table(**more)]}


def check(engine: PlayedTiering, request: Any, keys: Sequence[Any]) -> list[bool]:
    """Return which keys the engine finds; checks the bytes of all that it finds."""
    held = engine.find(request, keys)
    hits = [key for key, is_held in zip(keys, held, strict=True) if is_held]
    assert engine.read(request, hits) == engine.expected(hits)
    return held


def is_unpinned(engine: PlayedTiering) -> bool:
    """Whether vLLM can use every row for other blocks."""
    request = engine.start("takes all")
    rows = engine.manager.primary_tier.get_kv_memoryview().shape[0]
    prepared = engine.manager.primary_tier.prepare_store(keys_of("other", rows), request)
    if prepared is not None:
        engine.manager.primary_tier.complete_store(prepared.keys_to_store, request, False)
    engine.finish(request)
    return prepared is not None


@pytest.mark.parametrize("fault", FAULTS)
def test_failing_tier_returns_no_wrong_block(fault: str) -> None:
    keys = keys_of("a", 6)
    keep(options(), keys)
    with played(options()) as engine:
        tier = SharedFaultyTier.last()
        tier.fault = fault
        request = engine.start("while it fails")
        check(engine, request, keys)
        engine.store(request, keys_of("b", 3))
        engine.settle()
        engine.finish(request)
        assert is_unpinned(engine)
    if fault != "short":  # a frame that was cut is removed
        with played(options()) as engine:
            request = engine.start("after it failed")
            assert check(engine, request, keys) == [True] * 6
            engine.finish(request)


def test_partial_load_keeps_the_blocks_that_were_loaded() -> None:
    keys = keys_of("a", 6)
    keep(options(), keys)
    with played(options()) as engine:
        SharedFaultyTier.last().fault = "hole"
        request = engine.start("a")
        assert check(engine, request, keys) == [True, False, True, True, False, True]
        engine.finish(request)


@pytest.mark.parametrize("damage", ["flipped bit", "swapped", "cut"])
def test_damaged_block_is_a_miss(damage: str) -> None:
    keys = keys_of("a", 3)
    keep(options(), keys)
    names = list(SharedFaultyTier.shared)
    shared = SharedFaultyTier.shared
    block = bytearray(shared[names[1]])
    block[len(block) // 2] ^= 1
    shared[names[1]] = {
        "flipped bit": bytes(block), "swapped": shared[names[2]], "cut": bytes(block[:-9])
    }[damage]  # fmt: skip
    with played(options()) as engine:
        request = engine.start("a")
        assert check(engine, request, keys) == [True, False, True]
        engine.finish(request)


def test_hanging_lookups_of_one_step_cost_one_deadline_and_then_nothing() -> None:
    with played(options(**HANGING), rows=64) as engine:
        tier = SharedFaultyTier.last()
        tier.gate.clear()
        requests = [engine.start(f"r{number}") for number in range(12)]
        unknown = [(request, key_of(request.req_id, 0)) for request in requests]
        while unknown:
            unknown = [
                (request, key)
                for request, key in unknown
                if engine.manager.lookup(key, request).name == "RETRY"
            ]
            engine.step()
        asked = len(tier.calls)
        assert asked <= 4  # the others waited for a thread until their deadline
        later = engine.start("later")
        assert engine.find(later, keys_of("later", 3)) == [False] * 3
        engine.store(later, keys_of("later", 3))
        engine.settle()
        assert len(tier.calls) == asked  # the circuit breaker is open
        engine.finish(*requests, later)


def test_hanging_load_ends_and_its_late_call_writes_nothing() -> None:
    keys = keys_of("a", 4)
    keep(options(), keys)
    with played(options(**HANGING), rows=8) as engine:
        tier = SharedFaultyTier.last()
        request = engine.start("a")
        for key in keys:
            engine.manager.lookup(key, request)
        engine.step()
        lookups_answered(engine, request, keys)
        tier.gate.clear()
        engine.step()  # submits the load
        tier.waiting.acquire()
        engine.settle()
        assert engine.find(request, keys) == [False] * 4  # misses, so vLLM does not load them again
        assert is_unpinned(engine)
        other = engine.start("other")
        engine.store(other, keys_of("b", 8))  # the rows of the hanging load have other blocks now
        tier.gate.set()
        eventually(lambda: len(tier.read) == 4, "the late load")
        assert engine.read(other, keys_of("b", 8)) == engine.expected(keys_of("b", 8))
        engine.settle()
        engine.finish(request, other)


def lookups_answered(engine: PlayedTiering, request: Any, keys: Sequence[Any]) -> None:
    """Wait until vLLM has reserved rows for blocks, and before it loads them."""
    eventually(
        lambda: all(engine.manager.lookup(key, request).name == "HIT_PENDING" for key in keys),
        "the lookups",
    )


def test_hanging_store_ends_and_stores_no_bytes_of_a_reused_row() -> None:
    """The tier hangs before it reads the rows, and vLLM uses them for other blocks meanwhile."""
    keys, others = keys_of("a", 4), keys_of("b", 8)
    with played(options(**HANGING), rows=8) as engine:
        tier = SharedFaultyTier.last()
        tier.gate.clear()
        request = engine.start("a")
        engine.store(request, keys)
        tier.waiting.acquire()  # asked which blocks it holds
        engine.settle()
        assert is_unpinned(engine)
        other = engine.start("b")
        engine.store(other, others)
        engine.settle()
        tier.gate.set()
        engine.finish(request, other)
    with played(options()) as engine:
        request = engine.start("a")
        check(engine, request, keys)
        engine.finish(request)


def test_store_that_hangs_behind_another_does_not_wait_for_its_own_deadline() -> None:
    with played(options(**HANGING), rows=64) as engine:
        tier = SharedFaultyTier.last()
        tier.gate.clear()
        requests = [engine.start(f"r{number}") for number in range(8)]
        for request in requests:
            engine.store(request, keys_of(request.req_id, 2))
        engine.settle()
        assert len(tier.calls) <= 4  # two jobs at a time, each with two calls
        assert is_unpinned(engine)
        engine.finish(*requests)


LONG: dict[str, Any] = {"chunk": 4096, "rows": 8}
"""Of an engine with rows of 16 MiB, each of which is one call."""


@pytest.fixture
def slow_load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An engine and a request for six blocks; each call takes half of its deadline."""
    keys = keys_of("a", 6)
    keep(options(), keys, **LONG)
    load = SharedFaultyTier.load

    def slow(tier: SharedFaultyTier, names: Any, into: Any) -> list[int]:
        tier.waiting.release()
        time.sleep(0.8)
        return load(tier, names, into)

    monkeypatch.setattr(SharedFaultyTier, "load", slow)
    engine = PlayedTiering(options(calls=1, deadline_s=1.0), **LONG)
    request = engine.start("a")
    yield engine, request, keys
    engine.close()
    SharedFaultyTier.shared.clear()


def start_load(engine: PlayedTiering, request: Any, keys: Sequence[Any]) -> None:
    """Have vLLM load blocks, and wait until the tier reads the first one."""
    for key in keys:
        engine.manager.lookup(key, request)
    engine.step()
    lookups_answered(engine, request, keys)
    engine.step()
    SharedFaultyTier.last().waiting.acquire()


def test_slow_tier_loads_all_blocks_of_a_long_job(slow_load: Any) -> None:
    """Each call is within its deadline, and the job takes several."""
    engine, request, keys = slow_load
    assert check(engine, request, keys) == [True] * 6
    engine.finish(request)


def test_reset_waits_for_a_long_job_of_a_slow_tier(slow_load: Any) -> None:
    engine, request, keys = slow_load
    start_load(engine, request, keys)
    engine.manager.reset_cache()
    assert len(SharedFaultyTier.last().read) == 6
    assert not engine.manager.has_pending_work()
    engine.finish(request)


def test_reset_drops_the_jobs_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    store = SharedFaultyTier.store

    def slow(*arguments: Any) -> list[bool]:
        time.sleep(0.5)
        return store(*arguments)

    monkeypatch.setattr(SharedFaultyTier, "store", slow)
    with played(options(), rows=64) as engine:
        requests = [engine.start(f"r{number}") for number in range(6)]
        for request in requests:
            engine.store(request, keys_of(request.req_id, 2))
        engine.manager.reset_cache()
        assert SharedFaultyTier.last().calls.count("store") < 6  # two at a time
        assert not engine.manager.has_pending_work()
        engine.finish(*requests)


def test_shutdown_ends_a_long_job_of_a_slow_tier(slow_load: Any) -> None:
    engine, request, keys = slow_load
    start_load(engine, request, keys)
    engine.close()
    assert len(SharedFaultyTier.last().read) < 6
    assert not engine.is_mapped()


def test_random_walk_finds_only_right_blocks() -> None:
    """Requests store, look up, load and end at random over a tier that fails at random."""
    random_ = random.Random(7)
    faults = [*FAULTS, *[""] * len(FAULTS)]
    with played(options(), rows=12, groups=2, chunk=2, events=True) as engine:
        tier = SharedFaultyTier.last()
        open_requests: list[Any] = []
        for number in range(400):
            action = random_.choice(["start", "store", "find", "finish", "fault", "reset", "step"])
            prompt, length = random_.choice("abcdef"), random_.randint(1, 4)
            keys = [key_of(prompt, chunk, group) for chunk in range(length) for group in range(2)]
            if action == "start" and len(open_requests) < 4:
                open_requests.append(engine.start(f"r{number}"))
            elif action == "fault":
                tier.fault = random_.choice(faults)
            elif action == "step":
                engine.step()
            elif action == "reset" and random_.random() < 0.2:
                engine.settle()
                engine.finish(*open_requests)
                open_requests.clear()
                engine.manager.reset_cache()
                if hasattr(engine.manager, "on_reset_flushed"):
                    engine.manager.on_reset_flushed()
            elif open_requests:
                request = random_.choice(open_requests)
                if action == "store":
                    engine.settle()
                    engine.store(request, keys)
                elif action == "find":
                    check(engine, request, keys)
                elif action == "finish":
                    engine.settle()
                    open_requests.remove(request)
                    engine.finish(request)
        tier.fault = ""
        engine.settle()
        engine.finish(*open_requests)
        assert is_unpinned(engine)
        assert engine.tier.open_requests() == 0
