"""PagedCache: which blocks it stores and finds."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("numba")

import torch
from hypothesis import given
from hypothesis import strategies as st
from numba.core import event

from kvcache.connectors.paged import SaveResult
from kvcache.connectors.transfer.factory import Order
from kvcache.profiles import open_stack
from tests.support.engine_caches import SMALL_BLOCK_NBYTES, EngineCache, chain_keys
from tests.support.paged_caches import (
    KINDS,
    Geometry,
    as_bytes,
    l1_stack,
    overwrite,
    same_blocks,
    tensors,
)


def test_load_after_save_restores_and_counts_the_blocks() -> None:
    engine = EngineCache("kv-first")
    before, keys = engine.contents, chain_keys(5)
    with l1_stack(SMALL_BLOCK_NBYTES) as stack, engine.attach(stack) as attached:
        assert attached.load(keys, [0, 1, 2, 3, 4]) == 0
        assert attached.save([4, 2, 7], keys[:3]) == SaveResult(stored=3, known=0, declined=0)
        assert attached.save([4, 2, 7, 0], keys[:4], None) == SaveResult(
            stored=1, known=3, declined=0
        )
        overwrite(engine.layers)
        overwritten = engine.contents
        assert attached.load(keys, [1, 3, 5, 6, 0]) == 4
        assert same_blocks(engine.contents, [1, 3, 5, 6], before, [4, 2, 7, 0])
        assert same_blocks(engine.contents, [0, 2, 4, 7], overwritten, [0, 2, 4, 7])
        stats = stack.stats()
        assert (stats.tiers[0].stored_blocks, stats.loaded_blocks, stats.pinned_slots) == (4, 4, 0)
        operations = [operation for _, operation, error, _ in stack.take_durations() if not error]
        assert [each for each in operations if each != "lookup"] == ["store", "store", "load"]


@pytest.mark.parametrize("order", ["raw", "canonical"])
def test_first_copy_compiles_nothing_in_its_thread(order: Order) -> None:
    compiled_in: list[int] = []

    class Listener(event.Listener):  # type: ignore[misc]
        def on_start(self, event: Any) -> None:
            compiled_in.append(threading.get_ident())

        def on_end(self, event: Any) -> None:
            pass

    listener = Listener()
    event.register("numba:compile", listener)
    try:
        engine = EngineCache("kv-first", order)
        with l1_stack(SMALL_BLOCK_NBYTES) as stack, engine.attach(stack) as attached:
            assert attached.save([4, 2], chain_keys(2)).stored == 2
            assert attached.load(chain_keys(2), [0, 1]) == 2
    finally:
        event.unregister("numba:compile", listener)
    assert threading.get_ident() not in compiled_in


def test_save_beyond_capacity_declines_the_tail() -> None:
    engine = EngineCache("blocks-first")
    with l1_stack(SMALL_BLOCK_NBYTES, blocks=3) as stack, engine.attach(stack) as attached:
        saved = attached.save([0, 1, 2, 3, 4], chain_keys(5))
        assert saved == SaveResult(stored=3, known=0, declined=2)
        assert saved.held == 3
        assert attached.load(chain_keys(5), [3, 4, 5, 6, 7]) == 3


def test_save_in_a_full_stack_evicts_the_child_before_its_parent() -> None:
    engine, keys = EngineCache("packed"), chain_keys(2)
    with l1_stack(SMALL_BLOCK_NBYTES, blocks=2) as stack, engine.attach(stack) as attached:
        attached.save([0], keys[:1])
        attached.save([1], keys[1:], parent=keys[0])
        attached.save([2], chain_keys(1, first=7))  # needs the slot of one of the two
        assert attached.load(keys, [3, 4]) == 1


def test_load_of_a_chain_with_a_gap_ends_at_the_gap() -> None:
    engine, keys = EngineCache("packed"), chain_keys(4)
    with l1_stack(SMALL_BLOCK_NBYTES) as stack, engine.attach(stack) as attached:
        attached.save([0, 1], keys[:2])
        attached.save([3], keys[3:], parent=keys[2])
        assert attached.load(keys, [4, 5, 6, 7]) == 2


def test_load_with_start_skips_the_leading_blocks() -> None:
    engine, keys = EngineCache("packed"), chain_keys(4)
    before = engine.contents
    with l1_stack(SMALL_BLOCK_NBYTES) as stack, engine.attach(stack) as attached:
        attached.save([0, 1, 2, 3], keys)
        assert attached.load(keys, [6, 7], start=2) == 2
        assert same_blocks(engine.contents, [6, 7], before, [2, 3])
        assert attached.load(keys, [], start=4) == 0
        assert attached.save([], []) == SaveResult(0, 0, 0)
        assert attached.load([], []) == 0


def test_save_with_repeated_blocks_or_keys_stores_one_block_per_key() -> None:
    engine, keys = EngineCache("packed"), chain_keys(2)
    before = engine.contents
    with l1_stack(SMALL_BLOCK_NBYTES) as stack, engine.attach(stack) as attached:
        assert attached.save([5, 5], keys) == SaveResult(stored=2, known=0, declined=0)
        assert attached.save([6, 6], [chain_keys(1, 7)[0]] * 2) == SaveResult(
            stored=1, known=1, declined=0
        )
        assert attached.load(keys, [0, 1]) == 2
        assert same_blocks(engine.contents, [0, 1], before, [5, 5])


@given(st.data())
def test_load_of_any_ids_restores_them_and_leaves_others_alone(data: st.DataObject) -> None:
    """Save, overwrite the cache, and load each block into any other."""
    name = data.draw(st.sampled_from([*KINDS]))
    order: Any = data.draw(st.sampled_from(["raw", "canonical"]))
    engine = EngineCache(name, order)
    sources = data.draw(st.lists(st.integers(0, 7), max_size=8))
    targets = data.draw(st.permutations(range(8)))[: len(sources)]
    start = data.draw(st.integers(0, len(sources)))
    keys, before = chain_keys(len(sources)), engine.contents
    with (
        l1_stack(SMALL_BLOCK_NBYTES) as stack,
        engine.attach(stack, data.draw(st.integers(1, 2))) as attached,
    ):
        attached.save(sources, keys)
        overwrite(engine.layers)
        overwritten = engine.contents
        assert attached.load(keys, targets[start:], start=start) == len(sources) - start
        assert same_blocks(engine.contents, targets[start:], before, sources[start:])
        others = sorted({*range(8)} - {*targets[start:]})
        assert same_blocks(engine.contents, others, overwritten, others)


# One order for all layouts


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", ["kv-first", "packed", "paged-attention"])
def test_canonical_blocks_are_shared_between_layouts(source: str, target: str) -> None:
    one, other = EngineCache(source, "canonical"), EngineCache(target, "canonical", seed=7)
    keys, before = chain_keys(4), other.contents
    with (
        l1_stack(SMALL_BLOCK_NBYTES) as stack,
        one.attach(stack) as left,
        other.attach(stack) as right,
    ):
        assert left.save([6, 0, 3, 1], keys).stored == 4
        assert right.save([0, 1, 2, 3], keys).known == 4
        assert right.load(keys, [2, 7, 5, 4]) == 4
    assert same_blocks(other.contents, [2, 7, 5, 4], one.contents, [6, 0, 3, 1])
    assert same_blocks(other.contents, [0, 1, 3, 6], before, [0, 1, 3, 6])


def test_canonical_latents_are_shared_between_layouts() -> None:
    g = Geometry(layers=2, blocks=8, tokens=16, heads=1, dim=32)
    one, other = (
        EngineCache("mla", "canonical", g),
        EngineCache("mla-packed", "canonical", g, seed=3),
    )
    with (
        l1_stack(one.cache.block_nbytes) as stack,
        one.attach(stack) as left,
        other.attach(stack) as right,
    ):
        left.save([1, 2], chain_keys(2))
        assert right.load(chain_keys(2), [5, 6]) == 2
    assert same_blocks(other.contents, [5, 6], one.contents, [1, 2])


def test_canonical_block_is_tokens_layers_kv_heads_dim() -> None:
    engine = EngineCache("paged-attention", "canonical")
    with l1_stack(SMALL_BLOCK_NBYTES) as stack, engine.attach(stack) as attached:
        attached.save([5], chain_keys(1))
        with stack.fetch(
            stack.match(attached.stack_keys(chain_keys(1))).result()
        ).result() as lease:
            block = torch.frombuffer(bytearray(lease.views[0]), dtype=torch.bfloat16)
    block = block.view(16, 2, 2, 2, 16)
    for layer, parts in enumerate(engine.contents):
        for kv, part in enumerate(parts):
            assert torch.equal(as_bytes(block[:, layer, kv]), as_bytes(part[5]))


def test_canonical_copies_keep_the_bits_of_nans() -> None:
    """A NaN has many bit patterns, and a cache may contain any of them."""
    engine, other = EngineCache("kv-first", "canonical"), EngineCache("pair-hnd", "canonical")
    overwrite(engine.layers, seed=11)
    assert any(tensor.isnan().any() for tensor in tensors(engine.layers))
    with (
        l1_stack(SMALL_BLOCK_NBYTES) as stack,
        engine.attach(stack) as one,
        other.attach(stack) as two,
    ):
        one.save([0, 1], chain_keys(2))
        assert two.load(chain_keys(2), [3, 4]) == 2
    assert same_blocks(other.contents, [3, 4], engine.contents, [0, 1])


DIFFERENT_MEANINGS: dict[str, Any] = {
    "raw and canonical": (EngineCache("kv-first"), EngineCache("kv-first", "canonical")),
    "two raw layouts": (EngineCache("kv-first"), EngineCache("packed")),
    "two dtypes": (
        EngineCache("packed"),
        EngineCache("packed", g=Geometry(2, 8, 16, 2, 16, torch.float16)),
    ),
    "two block sizes": (
        EngineCache("packed", "canonical"),
        EngineCache("packed", "canonical", Geometry(2, 8, 32, 2, 8)),
    ),
    "heads and dim": (
        EngineCache("packed", "canonical"),
        EngineCache("packed", "canonical", Geometry(2, 8, 16, 4, 8)),
    ),
}


@pytest.mark.parametrize("name", DIFFERENT_MEANINGS)
def test_load_of_blocks_with_another_meaning_finds_none(name: str) -> None:
    """Both caches use one stack, the same keys, and blocks of the same size."""
    one, other = DIFFERENT_MEANINGS[name]
    before = other.contents
    with (
        l1_stack(SMALL_BLOCK_NBYTES) as stack,
        one.attach(stack) as left,
        other.attach(stack) as right,
    ):
        left.save([0, 1], chain_keys(2))
        assert right.load(chain_keys(2), [0, 1]) == 0
        assert same_blocks(other.contents, [*range(8)], before, [*range(8)])
        assert right.save([2], chain_keys(1)).stored == 1
        assert left.load(chain_keys(2), [3, 4]) == 2
        assert same_blocks(one.contents, [3, 4], one.contents, [0, 1])


def test_raw_blocks_with_equal_meaning_are_shared() -> None:
    """Both have K, then V, token by token. The distance between K and V does not matter."""
    one, other = EngineCache("kv-first"), EngineCache("blocks-first", seed=3)
    with (
        l1_stack(SMALL_BLOCK_NBYTES) as stack,
        one.attach(stack) as left,
        other.attach(stack) as right,
    ):
        left.save([0, 1], chain_keys(2))
        assert right.load(chain_keys(2), [5, 6]) == 2
    assert same_blocks(other.contents, [5, 6], one.contents, [0, 1])


def test_canonical_blocks_on_disk_are_shared_between_layouts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One engine ends, and another with another attention starts on its directory."""
    monkeypatch.setenv("KVCACHE__L1__CAPACITY", "1MiB")
    monkeypatch.setenv("KVCACHE__DISK__PATH", str(tmp_path))
    monkeypatch.setenv("KVCACHE__DISK__CAPACITY", "16MiB")
    one, other = (
        EngineCache("kv-first", "canonical"),
        EngineCache("paged-attention", "canonical", seed=3),
    )
    raw_engine = EngineCache("paged-attention")
    with (
        open_stack("l1-disk", block_nbytes=SMALL_BLOCK_NBYTES) as stack,
        one.attach(stack) as attached,
    ):
        assert attached.save([0, 1, 2], chain_keys(3)).stored == 3
        assert stack.flush(60)
    with open_stack("l1-disk", block_nbytes=SMALL_BLOCK_NBYTES) as stack:
        with raw_engine.attach(stack) as attached:
            assert attached.load(chain_keys(3), [5, 6, 7]) == 0
        with other.attach(stack) as attached:
            assert attached.load(chain_keys(3), [5, 6, 7]) == 3
    assert same_blocks(other.contents, [5, 6, 7], one.contents, [0, 1, 2])
