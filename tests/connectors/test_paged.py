"""PagedCache: which blocks it stores and finds, and which arguments it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("numba")

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcache import block_keys
from kvcache.connectors.layout.axes import LayoutError
from kvcache.connectors.paged import AttachedCache, PagedCache, SaveResult
from kvcache.connectors.transfer.base import PageCopier
from kvcache.connectors.transfer.factory import Order
from kvcache.profiles import open_stack
from kvcache.stack import Stack
from tests.support.paged_caches import (
    KINDS,
    LATENT,
    Geometry,
    as_bytes,
    fill,
    keys_and_values,
    l1_stack,
    overwrite,
    same_blocks,
    tensors,
)

G = Geometry(layers=2, blocks=8, tokens=16, heads=2, dim=16)
BLOCK_NBYTES = 2 * 2 * 16 * 2 * 16 * 2


def chain(blocks: int, first: int = 0) -> list[bytes]:
    return block_keys(range(first, first + 16 * blocks), 16)


class Engine:
    """A registered cache of one kind. ``contents`` are copies of its K and V."""

    def __init__(self, name: str, order: Order = "raw", g: Geometry = G, seed: int = 0) -> None:
        self.kind = (KINDS | LATENT)[name]
        self.layers = self.kind.make(g)
        fill(self.layers, seed)
        self.cache = PagedCache(self.layers, self.kind.layout, order=order, tokens=g.tokens)

    @property
    def contents(self) -> Any:
        return keys_and_values(self.kind, self.layers)

    def attach(self, stack: Stack, threads: int = 1) -> AttachedCache:
        return self.cache.attach(stack, threads=threads)


# Save and load


def test_load_after_save_restores_and_counts_the_blocks() -> None:
    engine = Engine("kv-first")
    before, keys = engine.contents, chain(5)
    with l1_stack(BLOCK_NBYTES) as stack, engine.attach(stack) as attached:
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


def test_save_beyond_capacity_declines_the_tail() -> None:
    engine = Engine("blocks-first")
    with l1_stack(BLOCK_NBYTES, blocks=3) as stack, engine.attach(stack) as attached:
        saved = attached.save([0, 1, 2, 3, 4], chain(5))
        assert saved == SaveResult(stored=3, known=0, declined=2)
        assert saved.held == 3
        assert attached.load(chain(5), [3, 4, 5, 6, 7]) == 3


def test_save_in_a_full_stack_evicts_the_child_before_its_parent() -> None:
    engine, keys = Engine("packed"), chain(2)
    with l1_stack(BLOCK_NBYTES, blocks=2) as stack, engine.attach(stack) as attached:
        attached.save([0], keys[:1])
        attached.save([1], keys[1:], parent=keys[0])
        attached.save([2], chain(1, first=7))  # needs the slot of one of the two
        assert attached.load(keys, [3, 4]) == 1


def test_load_of_a_chain_with_a_gap_ends_at_the_gap() -> None:
    engine, keys = Engine("packed"), chain(4)
    with l1_stack(BLOCK_NBYTES) as stack, engine.attach(stack) as attached:
        attached.save([0, 1], keys[:2])
        attached.save([3], keys[3:], parent=keys[2])
        assert attached.load(keys, [4, 5, 6, 7]) == 2


def test_load_with_start_skips_the_leading_blocks() -> None:
    engine, keys = Engine("packed"), chain(4)
    before = engine.contents
    with l1_stack(BLOCK_NBYTES) as stack, engine.attach(stack) as attached:
        attached.save([0, 1, 2, 3], keys)
        assert attached.load(keys, [6, 7], start=2) == 2
        assert same_blocks(engine.contents, [6, 7], before, [2, 3])
        assert attached.load(keys, [], start=4) == 0
        assert attached.save([], []) == SaveResult(0, 0, 0)
        assert attached.load([], []) == 0


def test_save_with_repeated_blocks_or_keys_stores_one_block_per_key() -> None:
    engine, keys = Engine("packed"), chain(2)
    before = engine.contents
    with l1_stack(BLOCK_NBYTES) as stack, engine.attach(stack) as attached:
        assert attached.save([5, 5], keys) == SaveResult(stored=2, known=0, declined=0)
        assert attached.save([6, 6], [chain(1, 7)[0]] * 2) == SaveResult(
            stored=1, known=1, declined=0
        )
        assert attached.load(keys, [0, 1]) == 2
        assert same_blocks(engine.contents, [0, 1], before, [5, 5])


@given(st.data())
def test_load_of_any_ids_restores_them_and_leaves_others_alone(data: st.DataObject) -> None:
    """Save, overwrite the cache, and load each block into any other."""
    name = data.draw(st.sampled_from([*KINDS]))
    order: Any = data.draw(st.sampled_from(["raw", "canonical"]))
    engine = Engine(name, order)
    sources = data.draw(st.lists(st.integers(0, 7), max_size=8))
    targets = data.draw(st.permutations(range(8)))[: len(sources)]
    start = data.draw(st.integers(0, len(sources)))
    keys, before = chain(len(sources)), engine.contents
    with (
        l1_stack(BLOCK_NBYTES) as stack,
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
    one, other = Engine(source, "canonical"), Engine(target, "canonical", seed=7)
    keys, before = chain(4), other.contents
    with (
        l1_stack(BLOCK_NBYTES) as stack,
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
    one, other = Engine("mla", "canonical", g), Engine("mla-packed", "canonical", g, seed=3)
    with (
        l1_stack(one.cache.block_nbytes) as stack,
        one.attach(stack) as left,
        other.attach(stack) as right,
    ):
        left.save([1, 2], chain(2))
        assert right.load(chain(2), [5, 6]) == 2
    assert same_blocks(other.contents, [5, 6], one.contents, [1, 2])


def test_canonical_block_is_tokens_layers_kv_heads_dim() -> None:
    engine = Engine("paged-attention", "canonical")
    with l1_stack(BLOCK_NBYTES) as stack, engine.attach(stack) as attached:
        attached.save([5], chain(1))
        with stack.fetch(stack.match(attached.stack_keys(chain(1))).result()).result() as lease:
            block = torch.frombuffer(bytearray(lease.views[0]), dtype=torch.bfloat16)
    block = block.view(16, 2, 2, 2, 16)
    for layer, parts in enumerate(engine.contents):
        for kv, part in enumerate(parts):
            assert torch.equal(as_bytes(block[:, layer, kv]), as_bytes(part[5]))


def test_canonical_copies_keep_the_bits_of_nans() -> None:
    """A NaN has many bit patterns, and a cache may contain any of them."""
    engine, other = Engine("kv-first", "canonical"), Engine("pair-hnd", "canonical")
    overwrite(engine.layers, seed=11)
    assert any(tensor.isnan().any() for tensor in tensors(engine.layers))
    with (
        l1_stack(BLOCK_NBYTES) as stack,
        engine.attach(stack) as one,
        other.attach(stack) as two,
    ):
        one.save([0, 1], chain(2))
        assert two.load(chain(2), [3, 4]) == 2
    assert same_blocks(other.contents, [3, 4], engine.contents, [0, 1])


DIFFERENT_MEANINGS: dict[str, Any] = {
    "raw and canonical": (Engine("kv-first"), Engine("kv-first", "canonical")),
    "two raw layouts": (Engine("kv-first"), Engine("packed")),
    "two dtypes": (
        Engine("packed"),
        Engine("packed", g=Geometry(2, 8, 16, 2, 16, torch.float16)),
    ),
    "two block sizes": (
        Engine("packed", "canonical"),
        Engine("packed", "canonical", Geometry(2, 8, 32, 2, 8)),
    ),
    "heads and dim": (
        Engine("packed", "canonical"),
        Engine("packed", "canonical", Geometry(2, 8, 16, 4, 8)),
    ),
}


@pytest.mark.parametrize("name", DIFFERENT_MEANINGS)
def test_load_of_blocks_with_another_meaning_finds_none(name: str) -> None:
    """Both caches use one stack, the same keys, and blocks of the same size."""
    one, other = DIFFERENT_MEANINGS[name]
    before = other.contents
    with (
        l1_stack(BLOCK_NBYTES) as stack,
        one.attach(stack) as left,
        other.attach(stack) as right,
    ):
        left.save([0, 1], chain(2))
        assert right.load(chain(2), [0, 1]) == 0
        assert same_blocks(other.contents, [*range(8)], before, [*range(8)])
        assert right.save([2], chain(1)).stored == 1
        assert left.load(chain(2), [3, 4]) == 2
        assert same_blocks(one.contents, [3, 4], one.contents, [0, 1])


def test_raw_blocks_with_equal_meaning_are_shared() -> None:
    """Both have K, then V, token by token. The distance between K and V does not matter."""
    one, other = Engine("kv-first"), Engine("blocks-first", seed=3)
    with (
        l1_stack(BLOCK_NBYTES) as stack,
        one.attach(stack) as left,
        other.attach(stack) as right,
    ):
        left.save([0, 1], chain(2))
        assert right.load(chain(2), [5, 6]) == 2
    assert same_blocks(other.contents, [5, 6], one.contents, [0, 1])


def test_canonical_blocks_on_disk_are_shared_between_layouts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One engine ends, and another with another attention starts on its directory."""
    monkeypatch.setenv("KVCACHE__L1__CAPACITY", "1MiB")
    monkeypatch.setenv("KVCACHE__DISK__PATH", str(tmp_path))
    monkeypatch.setenv("KVCACHE__DISK__CAPACITY", "16MiB")
    one, other = Engine("kv-first", "canonical"), Engine("paged-attention", "canonical", seed=3)
    raw_engine = Engine("paged-attention")
    with open_stack("l1-disk", block_nbytes=BLOCK_NBYTES) as stack, one.attach(stack) as attached:
        assert attached.save([0, 1, 2], chain(3)).stored == 3
        assert stack.flush(60)
    with open_stack("l1-disk", block_nbytes=BLOCK_NBYTES) as stack:
        with raw_engine.attach(stack) as attached:
            assert attached.load(chain(3), [5, 6, 7]) == 0
        with other.attach(stack) as attached:
            assert attached.load(chain(3), [5, 6, 7]) == 3
    assert same_blocks(other.contents, [5, 6, 7], one.contents, [0, 1, 2])


# Invalid arguments


INVALID: dict[str, tuple[type[Exception], list[int], int, str]] = {
    "fewer ids": (ValueError, [0], 2, "1 block ids do not pair up with 2 keys"),
    "more ids": (ValueError, [0, 1, 2], 2, "3 block ids do not pair up with 2 keys"),
    "no such block": (IndexError, [0, 8], 2, "block 8 does not exist: there are 8, from 0"),
    "from the end": (IndexError, [-1, 0], 2, "block -1 does not exist"),
    "no number": (TypeError, [0, "1"], 2, "integer"),  # type: ignore[list-item]
}


@pytest.mark.parametrize("name", INVALID)
def test_save_and_load_with_invalid_arguments_raise_and_change_nothing(name: str) -> None:
    error, ids, count, message = INVALID[name]
    engine = Engine("kv-first")
    before = engine.contents
    with l1_stack(BLOCK_NBYTES) as stack, engine.attach(stack) as attached:
        with pytest.raises(error, match=message):
            attached.save(ids, chain(count))
        assert stack.stats().tiers[0].used_blocks == 0
        attached.save([0, 1], chain(2))
        with pytest.raises(error, match=message):
            attached.load(chain(count), ids)
        assert stack.stats().tiers[0].used_blocks == 2  # only a failed copy drops blocks
        assert stack.stats().pinned_slots == 0
    assert same_blocks(engine.contents, [*range(8)], before, [*range(8)])


def test_load_with_a_repeated_block_or_invalid_start_raises() -> None:
    engine = Engine("kv-first")
    with l1_stack(BLOCK_NBYTES) as stack, engine.attach(stack) as attached:
        attached.save([0, 1], chain(2))
        with pytest.raises(ValueError, match=r"target of two keys: \[3, 3\]"):
            attached.load(chain(2), [3, 3])
        with pytest.raises(ValueError, match="start is 3, but there are 2 keys"):
            attached.load(chain(2), [], start=3)
        assert stack.stats().tiers[0].used_blocks == 2


def test_attach_to_a_stack_with_other_block_size_raises() -> None:
    engine = Engine("kv-first")
    with (
        l1_stack(8192) as stack,
        pytest.raises(ValueError, match=r"4096 bytes, .* 8192; open the stack"),
    ):
        engine.attach(stack)
    assert engine.cache.block_nbytes == BLOCK_NBYTES == 4096


def test_close_refuses_copies_and_keeps_the_blocks() -> None:
    engine = Engine("kv-first")
    with l1_stack(BLOCK_NBYTES) as stack:
        with engine.attach(stack) as attached:
            attached.save([0, 1], chain(2))
        attached.close()
        for call in (
            lambda: attached.save([0], chain(1, 5)),
            lambda: attached.load(chain(2), [4, 5]),
        ):
            with pytest.raises(RuntimeError, match="not attached any more"):
                call()
        with engine.attach(stack) as attached:
            assert attached.load(chain(2), [4, 5]) == 2


@pytest.mark.parametrize("order", ["raw", "canonical"])
def test_copies_after_the_stack_closed_still_work(order: Any) -> None:
    engine = Engine("kv-first", order)
    stack = l1_stack(BLOCK_NBYTES)
    attached = engine.attach(stack)
    stack.close()
    assert attached.save([0, 1], chain(2)).stored == 2  # into memory that it keeps mapped
    assert attached.load(chain(2), [4, 5]) == 2
    attached.close()


def test_canonical_order_of_opaque_or_different_layers_raises() -> None:
    layers = KINDS["packed"].make(G)
    assert PagedCache(layers, "opaque").block_nbytes == BLOCK_NBYTES
    with pytest.raises(
        LayoutError, match=r"opaque \[blocks, ...\] has no canonical order.* 1, 2, 3"
    ):
        PagedCache(layers, "opaque", order="canonical")
    layers[1] = torch.zeros(8, 2, 16, 64, dtype=torch.bfloat16)
    with pytest.raises(LayoutError, match=r"layers that differ .*: layer 1 has"):
        PagedCache(layers, "packed", order="canonical")
    assert PagedCache(layers, "packed").block_nbytes == BLOCK_NBYTES * 3 // 2


def test_unknown_order_and_unsupported_device_raise() -> None:
    layers = KINDS["packed"].make(G)
    with pytest.raises(ValueError, match="order is 'nhd'; it must be 'raw' or 'canonical'"):
        PagedCache(layers, "packed", order="nhd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"is on meta; .* CPUs and CUDA"):
        PagedCache([torch.zeros(8, 2, 16, 32, device="meta")], "packed")


# Copies that fail


@pytest.mark.parametrize("order", ["raw", "canonical"])
def test_copy_that_raises_stores_and_loads_nothing(
    order: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine("kv-first", order)

    def fails(self: PageCopier, *ids: Sequence[int]) -> None:
        raise OSError("the device is gone")

    with l1_stack(BLOCK_NBYTES) as stack, engine.attach(stack) as attached:
        with monkeypatch.context() as patch:
            patch.setattr(PageCopier, "gather", fails)
            with pytest.raises(OSError, match="gone"):
                attached.save([0, 1], chain(2))
        assert stack.stats().tiers[0].used_blocks == 0
        assert attached.save([0, 1], chain(2)).stored == 2
        with monkeypatch.context() as patch:
            patch.setattr(PageCopier, "scatter", fails)
            with pytest.raises(OSError, match="gone"):
                attached.load(chain(2), [4, 5])
        assert stack.stats().tiers[0].used_blocks == 0
        assert stack.stats().loaded_blocks == 0
        assert stack.stats().pinned_slots == 0
