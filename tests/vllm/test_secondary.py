"""kvcache's tiers below vLLM's own manager: which blocks are found, stored and forgotten."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.support.played_tiering import (
    BLOCK_TOKENS,
    SharedFaultyTier,
    block_of,
    found,
    keep,
    key_of,
    keys_of,
    played,
)

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("same_weights")]


# Blocks


def test_second_manager_finds_blocks_with_their_bytes(disk_options: dict[str, object]) -> None:
    keys = keys_of("a", 6)
    keep(disk_options, keys)
    assert found(disk_options, [*keys, *keys_of("b", 2)]) == [True] * 6 + [False] * 2


def test_second_manager_of_a_profile_finds_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVCACHE__DISK__PATH", str(tmp_path / "disk"))
    monkeypatch.setenv("KVCACHE__DISK__CAPACITY", "8MiB")
    keep({"profile": "l1-disk"}, keys_of("a", 3))
    monkeypatch.setenv("KVCACHE_PROFILE", "l1-disk")
    assert found({}, keys_of("a", 3)) == [True] * 3


def test_keys_of_several_groups_are_different_blocks(disk_options: dict[str, object]) -> None:
    keys = [*keys_of("a", 3, group=0), *keys_of("a", 3, group=1)]
    keep(disk_options, keys, groups=2)
    assert block_of(keys[0], 8) != block_of(keys[3], 8)
    assert found(disk_options, keys, groups=2) == [True] * 6


@pytest.mark.parametrize("shape", [{"tensor": 2}, {"chunk": 4}, {"tensor": 2, "chunk": 2}])
def test_row_of_several_ranks_and_blocks_is_one_block(
    disk_options: dict[str, object], shape: dict[str, int]
) -> None:
    keep(disk_options, keys_of("a", 3), **shape)
    assert found(disk_options, keys_of("a", 3), **shape) == [True] * 3
    assert found(disk_options, keys_of("a", 3)) == [False] * 3


def test_engines_with_equal_rows_of_another_shape_share_nothing(
    disk_options: dict[str, object],
) -> None:
    keep(disk_options, keys_of("a", 3), tensor=2)
    assert found(disk_options, keys_of("a", 3), chunk=2) == [False] * 3


def test_block_that_vllm_evicted_is_found_below(disk_options: dict[str, object]) -> None:
    with played(disk_options, rows=4) as engine:
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
    faulty_options: dict[str, object], stores: list[tuple[list[bytes], bytes | None]]
) -> None:
    """vLLM passes the keys of a job as a set, and a full tier evicts the end of a chain first."""
    with played(faulty_options, rows=32) as engine:
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
    with played(faulty_options, rows=32) as engine:
        request = engine.start("again")
        for count in range(1, 9):
            assert engine.find(request, keys_of("a", count)) == [True] * count
        assert SharedFaultyTier.last().read == first
        engine.finish(request)


def test_stored_chain_continues_the_blocks_that_vllm_had(
    faulty_options: dict[str, object], stores: list[tuple[list[bytes], bytes | None]]
) -> None:
    with played(faulty_options, rows=32) as engine:
        for name, blocks in (("first turn", 4), ("second turn", 6)):
            request = engine.start(name)
            engine.store(request, keys_of("a", blocks))  # of the second turn, two are new
            engine.settle()
            engine.finish(request)
    (first, begin), (second, parent) = stores
    assert (len(first), begin) == (4, None)
    assert (len(second), parent) == (2, first[-1])


def test_stored_chain_has_the_groups_of_a_position_together(
    faulty_options: dict[str, object], stores: list[tuple[list[bytes], bytes | None]]
) -> None:
    with played(faulty_options, rows=32, groups=2) as engine:
        request = engine.start("a")
        for group in range(2):
            for position, key in enumerate(keys_of("a", 3, group), 1):
                request.set_offload_key_position(key, position * BLOCK_TOKENS)
        engine.store_placed(request, [*keys_of("a", 3, 1), *keys_of("a", 3, 0)])
        engine.settle()
        engine.finish(request)
    [(order, _)] = stores
    with played(faulty_options, rows=32, groups=2) as engine:
        request = engine.start("again")
        for chunk in range(3):
            keys = [key_of("a", chunk, group) for group in range(2)]
            assert engine.find(request, keys) == [True, True]
        assert SharedFaultyTier.last().read == order
        engine.finish(request)


def test_block_that_was_missing_is_found_after_it_was_stored(
    faulty_options: dict[str, object],
) -> None:
    """The request that missed it still runs, so its answers are kept."""
    keys = keys_of("a", 2)
    with played(faulty_options, rows=4) as engine:
        request = engine.start("a")
        assert engine.find(request, keys) == [False] * 2
        engine.store(request, keys)
        engine.settle()
        other = engine.start("b")
        engine.store(other, keys_of("b", 4))  # evicts "a" from vLLM's memory
        engine.settle()
        assert engine.find(other, keys) == [True] * 2
        engine.finish(request, other)


def test_hits_of_a_disk_alone_count_as_those_of_a_disk(
    disk_options: dict[str, object], faulty_options: dict[str, object]
) -> None:
    keys = keys_of("a", 1)
    for options, source in ((disk_options, "disk"), (faulty_options, "external_unspecified")):
        keep(options, keys)
        with played(options) as engine:
            request = engine.start("a")
            assert engine.find(request, keys) == [True]
            assert engine.manager.get_load_source(keys[0], request).value == source
            engine.finish(request)


def test_store_jobs_pin_at_most_a_quarter_of_the_rows(faulty_options: dict[str, object]) -> None:
    with played(faulty_options, rows=16) as engine:
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


def test_blocks_before_a_reset_are_not_found(disk_options: dict[str, object]) -> None:
    keys = keys_of("a", 3)
    keep(disk_options, keys)
    with played(disk_options) as engine:
        request = engine.start("a")
        engine.store(request, keys_of("b", 2))
        engine.manager.reset_cache()
        if hasattr(engine.manager, "on_reset_flushed"):
            engine.manager.on_reset_flushed()
        assert engine.find(request, [*keys, *keys_of("b", 2)]) == [False] * 5
        engine.store(request, keys_of("c", 2))
        engine.settle()
        engine.finish(request)
    assert found(disk_options, [*keys, *keys_of("b", 2)]) == [False] * 5


def test_block_that_was_found_before_a_reset_is_not_loaded_again(
    faulty_options: dict[str, object],
) -> None:
    keep(faulty_options, keys_of("a", 3))
    with played(faulty_options) as engine:
        request = engine.start("a")
        assert engine.find(request, keys_of("a", 3)) == [True] * 3
        engine.manager.reset_cache()
        if hasattr(engine.manager, "on_reset_flushed"):
            engine.manager.on_reset_flushed()
        assert engine.find(request, keys_of("a", 3)) == [False] * 3
        assert len(SharedFaultyTier.last().read) == 3
        engine.finish(request)


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


# Computing or loading


def test_blocks_that_load_slower_than_vllm_computes_are_misses(
    faulty_options: dict[str, object],
) -> None:
    keys = keys_of("a", 4)
    keep(faulty_options, keys)
    with played(faulty_options) as engine:
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
