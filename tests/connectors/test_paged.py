"""The connector for anybody with paged tensors: what it keeps, what it finds, what it refuses."""

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
from kvcache.connectors.transfer.factory import Order
from kvcache.profiles import open_stack
from kvcache.stack import Stack
from tests.support.paged_caches import (
    KINDS,
    LATENT,
    Geometry,
    compute,
    meaning,
    opened,
    raw,
    same,
    tensors,
    wipe,
)

G = Geometry(layers=2, blocks=8, tokens=16, heads=2, dim=16)
BLOCK_NBYTES = 2 * 2 * 16 * 2 * 16 * 2


def chain(blocks: int, first: int = 0) -> list[bytes]:
    return block_keys(range(first, first + 16 * blocks), 16)


class Engine:
    """A cache of one kind, registered; ``found`` is what it means now."""

    def __init__(self, name: str, order: Order = "raw", g: Geometry = G, seed: int = 0) -> None:
        self.kind = (KINDS | LATENT)[name]
        self.layers = self.kind.make(g)
        compute(self.layers, seed)
        self.cache = PagedCache(self.layers, self.kind.layout, order=order, tokens=g.tokens)

    @property
    def found(self) -> Any:
        return meaning(self.kind, self.layers)

    def attach(self, stack: Stack, threads: int = 1) -> AttachedCache:
        return self.cache.attach(stack, threads=threads)


# What it keeps and finds


def test_what_was_saved_is_loaded_and_counted() -> None:
    engine = Engine("kv-first")
    before, keys = engine.found, chain(5)
    with opened(BLOCK_NBYTES) as stack, engine.attach(stack) as kept:
        assert kept.load(keys, [0, 1, 2, 3, 4]) == 0
        assert kept.save([4, 2, 7], keys[:3]) == SaveResult(stored=3, known=0, declined=0)
        assert kept.save([4, 2, 7, 0], keys[:4], None) == SaveResult(stored=1, known=3, declined=0)
        wipe(engine.layers)
        wiped = engine.found
        assert kept.load(keys, [1, 3, 5, 6, 0]) == 4
        assert same(engine.found, [1, 3, 5, 6], before, [4, 2, 7, 0])
        assert same(engine.found, [0, 2, 4, 7], wiped, [0, 2, 4, 7])
        stats = stack.stats()
        assert (stats.tiers[0].stored_blocks, stats.loaded_blocks, stats.pinned_slots) == (4, 4, 0)
        took = [what for _, what, error, _ in stack.take_durations() if not error]
        assert [what for what in took if what != "lookup"] == ["store", "store", "load"]


def test_what_there_is_no_room_for_is_declined_from_the_tail() -> None:
    engine = Engine("blocks-first")
    with opened(BLOCK_NBYTES, blocks=3) as stack, engine.attach(stack) as kept:
        saved = kept.save([0, 1, 2, 3, 4], chain(5))
        assert saved == SaveResult(stored=3, known=0, declined=2)
        assert saved.held == 3
        assert kept.load(chain(5), [3, 4, 5, 6, 7]) == 3


def test_what_continues_a_block_goes_before_it() -> None:
    engine, keys = Engine("packed"), chain(2)
    with opened(BLOCK_NBYTES, blocks=2) as stack, engine.attach(stack) as kept:
        kept.save([0], keys[:1])
        kept.save([1], keys[1:], parent=keys[0])
        kept.save([2], chain(1, first=7))  # there is room for one of the two
        assert kept.load(keys, [3, 4]) == 1


def test_a_hole_ends_what_is_loaded() -> None:
    engine, keys = Engine("packed"), chain(4)
    with opened(BLOCK_NBYTES) as stack, engine.attach(stack) as kept:
        kept.save([0, 1], keys[:2])
        kept.save([3], keys[3:], parent=keys[2])
        assert kept.load(keys, [4, 5, 6, 7]) == 2


def test_blocks_the_engine_has_itself_are_not_loaded() -> None:
    engine, keys = Engine("packed"), chain(4)
    before = engine.found
    with opened(BLOCK_NBYTES) as stack, engine.attach(stack) as kept:
        kept.save([0, 1, 2, 3], keys)
        assert kept.load(keys, [6, 7], start=2) == 2
        assert same(engine.found, [6, 7], before, [2, 3])
        assert kept.load(keys, [], start=4) == 0
        assert kept.save([], []) == SaveResult(0, 0, 0)
        assert kept.load([], []) == 0


def test_one_block_may_be_kept_under_two_keys_and_a_key_twice_is_one_block() -> None:
    engine, keys = Engine("packed"), chain(2)
    before = engine.found
    with opened(BLOCK_NBYTES) as stack, engine.attach(stack) as kept:
        assert kept.save([5, 5], keys) == SaveResult(stored=2, known=0, declined=0)
        assert kept.save([6, 6], [chain(1, 7)[0]] * 2) == SaveResult(stored=1, known=1, declined=0)
        assert kept.load(keys, [0, 1]) == 2
        assert same(engine.found, [0, 1], before, [5, 5])


@given(st.data())
def test_any_ids_in_any_order(data: st.DataObject) -> None:
    """SaveResult from one cache, wiped, loaded into another block each; the rest is left alone."""
    name = data.draw(st.sampled_from([*KINDS]))
    order: Any = data.draw(st.sampled_from(["raw", "canonical"]))
    engine = Engine(name, order)
    sources = data.draw(st.lists(st.integers(0, 7), max_size=8))
    targets = data.draw(st.permutations(range(8)))[: len(sources)]
    start = data.draw(st.integers(0, len(sources)))
    keys, before = chain(len(sources)), engine.found
    with opened(BLOCK_NBYTES) as stack, engine.attach(stack, data.draw(st.integers(1, 2))) as kept:
        kept.save(sources, keys)
        wipe(engine.layers)
        wiped = engine.found
        assert kept.load(keys, targets[start:], start=start) == len(sources) - start
        assert same(engine.found, targets[start:], before, sources[start:])
        others = sorted({*range(8)} - {*targets[start:]})
        assert same(engine.found, others, wiped, others)


# One order for all layouts


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", ["kv-first", "packed", "paged-attention"])
def test_engines_of_different_layouts_share_canonical_blocks(source: str, target: str) -> None:
    one, other = Engine(source, "canonical"), Engine(target, "canonical", seed=7)
    keys, before = chain(4), other.found
    with opened(BLOCK_NBYTES) as stack, one.attach(stack) as left, other.attach(stack) as right:
        assert left.save([6, 0, 3, 1], keys).stored == 4
        assert right.save([0, 1, 2, 3], keys).known == 4
        assert right.load(keys, [2, 7, 5, 4]) == 4
    assert same(other.found, [2, 7, 5, 4], one.found, [6, 0, 3, 1])
    assert same(other.found, [0, 1, 3, 6], before, [0, 1, 3, 6])


def test_latents_are_shared_too() -> None:
    g = Geometry(layers=2, blocks=8, tokens=16, heads=1, dim=32)
    one, other = Engine("mla", "canonical", g), Engine("mla-packed", "canonical", g, seed=3)
    with (
        opened(one.cache.block_nbytes) as stack,
        one.attach(stack) as left,
        other.attach(stack) as right,
    ):
        left.save([1, 2], chain(2))
        assert right.load(chain(2), [5, 6]) == 2
    assert same(other.found, [5, 6], one.found, [1, 2])


def test_a_canonical_block_is_tokens_layers_kv_heads_dim() -> None:
    engine = Engine("paged-attention", "canonical")
    with opened(BLOCK_NBYTES) as stack, engine.attach(stack) as kept:
        kept.save([5], chain(1))
        with stack.fetch(stack.match(kept.stack_keys(chain(1))).result()).result() as lease:
            block = torch.frombuffer(bytearray(lease.views[0]), dtype=torch.bfloat16)
    block = block.view(16, 2, 2, 2, 16)
    for layer, seen in enumerate(engine.found):
        for kv, part in enumerate(seen):
            assert torch.equal(raw(block[:, layer, kv]), raw(part[5]))


def test_numbers_that_are_not_stay_as_they_are() -> None:
    """A NaN has many bit patterns, and a cache may hold any."""
    engine, other = Engine("kv-first", "canonical"), Engine("pair-hnd", "canonical")
    wipe(engine.layers, seed=11)
    assert any(tensor.isnan().any() for tensor in tensors(engine.layers))
    with opened(BLOCK_NBYTES) as stack, engine.attach(stack) as one, other.attach(stack) as two:
        one.save([0, 1], chain(2))
        assert two.load(chain(2), [3, 4]) == 2
    assert same(other.found, [3, 4], engine.found, [0, 1])


STRANGERS: dict[str, Any] = {
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


@pytest.mark.parametrize("name", STRANGERS)
def test_blocks_that_mean_something_else_are_not_found(name: str) -> None:
    """In one stack, and under the same keys; the bytes of a block are as many."""
    one, other = STRANGERS[name]
    before = other.found
    with opened(BLOCK_NBYTES) as stack, one.attach(stack) as left, other.attach(stack) as right:
        left.save([0, 1], chain(2))
        assert right.load(chain(2), [0, 1]) == 0
        assert same(other.found, [*range(8)], before, [*range(8)])
        assert right.save([2], chain(1)).stored == 1
        assert left.load(chain(2), [3, 4]) == 2
        assert same(one.found, [3, 4], one.found, [0, 1])


def test_raw_blocks_of_equal_meaning_are_shared() -> None:
    """K, then V, tokens by tokens: whether K and V lie apart in the engine is no matter."""
    one, other = Engine("kv-first"), Engine("blocks-first", seed=3)
    with opened(BLOCK_NBYTES) as stack, one.attach(stack) as left, other.attach(stack) as right:
        left.save([0, 1], chain(2))
        assert right.load(chain(2), [5, 6]) == 2
    assert same(other.found, [5, 6], one.found, [0, 1])


def test_below_l1_engines_of_different_layouts_share_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One engine ends, and another, with another attention, starts on its directory."""
    monkeypatch.setenv("KVCACHE__L1__CAPACITY", "1MiB")
    monkeypatch.setenv("KVCACHE__DISK__PATH", str(tmp_path))
    monkeypatch.setenv("KVCACHE__DISK__CAPACITY", "16MiB")
    one, other = Engine("kv-first", "canonical"), Engine("paged-attention", "canonical", seed=3)
    stranger = Engine("paged-attention")
    with open_stack("l1-disk", block_nbytes=BLOCK_NBYTES) as stack, one.attach(stack) as kept:
        assert kept.save([0, 1, 2], chain(3)).stored == 3
        assert stack.flush(60)
    with open_stack("l1-disk", block_nbytes=BLOCK_NBYTES) as stack:
        with stranger.attach(stack) as kept:
            assert kept.load(chain(3), [5, 6, 7]) == 0
        with other.attach(stack) as kept:
            assert kept.load(chain(3), [5, 6, 7]) == 3
    assert same(other.found, [5, 6, 7], one.found, [0, 1, 2])


# What it refuses


BAD: dict[str, tuple[type[Exception], list[int], int, str]] = {
    "fewer ids": (ValueError, [0], 2, "1 block ids do not pair up with 2 keys"),
    "more ids": (ValueError, [0, 1, 2], 2, "3 block ids do not pair up with 2 keys"),
    "no such block": (IndexError, [0, 8], 2, "block 8 does not exist: there are 8, from 0"),
    "from the end": (IndexError, [-1, 0], 2, "block -1 does not exist"),
    "no number": (TypeError, [0, "1"], 2, "integer"),  # type: ignore[list-item]
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_meant_is_refused_and_nothing_is_touched(name: str) -> None:
    error, ids, count, message = BAD[name]
    engine = Engine("kv-first")
    before = engine.found
    with opened(BLOCK_NBYTES) as stack, engine.attach(stack) as kept:
        with pytest.raises(error, match=message):
            kept.save(ids, chain(count))
        assert stack.stats().tiers[0].used_blocks == 0
        kept.save([0, 1], chain(2))
        with pytest.raises(error, match=message):
            kept.load(chain(count), ids)
        assert stack.stats().tiers[0].used_blocks == 2  # refused is not failed: none is dropped
        assert stack.stats().pinned_slots == 0
    assert same(engine.found, [*range(8)], before, [*range(8)])


def test_two_keys_for_one_block_are_refused() -> None:
    engine = Engine("kv-first")
    with opened(BLOCK_NBYTES) as stack, engine.attach(stack) as kept:
        kept.save([0, 1], chain(2))
        with pytest.raises(ValueError, match=r"target of two keys: \[3, 3\]"):
            kept.load(chain(2), [3, 3])
        with pytest.raises(ValueError, match="start is 3, but there are 2 keys"):
            kept.load(chain(2), [], start=3)
        assert stack.stats().tiers[0].used_blocks == 2


def test_a_stack_of_other_blocks_is_refused() -> None:
    engine = Engine("kv-first")
    with (
        opened(8192) as stack,
        pytest.raises(ValueError, match=r"4096 bytes, .* 8192; open the stack"),
    ):
        engine.attach(stack)
    assert engine.cache.block_nbytes == BLOCK_NBYTES == 4096


def test_after_close_nothing_is_copied_and_nothing_is_lost() -> None:
    engine = Engine("kv-first")
    with opened(BLOCK_NBYTES) as stack:
        with engine.attach(stack) as kept:
            kept.save([0, 1], chain(2))
        kept.close()
        for call in (lambda: kept.save([0], chain(1, 5)), lambda: kept.load(chain(2), [4, 5])):
            with pytest.raises(RuntimeError, match="not attached any more"):
                call()
        with engine.attach(stack) as kept:
            assert kept.load(chain(2), [4, 5]) == 2


@pytest.mark.parametrize("order", ["raw", "canonical"])
def test_a_stack_closed_too_early_is_no_crash(order: Any) -> None:
    engine = Engine("kv-first", order)
    stack = opened(BLOCK_NBYTES)
    kept = engine.attach(stack)
    stack.close()
    assert kept.save([0, 1], chain(2)).stored == 2  # into memory that nobody else has any more
    assert kept.load(chain(2), [4, 5]) == 2
    kept.close()


def test_a_layout_without_meaning_has_no_canonical_order() -> None:
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


def test_another_order_and_another_device_are_refused() -> None:
    layers = KINDS["packed"].make(G)
    with pytest.raises(ValueError, match="order is 'nhd'; it must be 'raw' or 'canonical'"):
        PagedCache(layers, "packed", order="nhd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"is on meta; .* CPUs and CUDA"):
        PagedCache([torch.zeros(8, 2, 16, 32, device="meta")], "packed")


# Copies that fail


@pytest.mark.parametrize("order", ["raw", "canonical"])
def test_a_copy_that_fails_is_not_reported_as_done(
    order: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine("kv-first", order)

    def fails(*ids: Sequence[int]) -> None:
        raise OSError("a device is gone")

    with opened(BLOCK_NBYTES) as stack, engine.attach(stack) as kept:
        with monkeypatch.context() as patch:
            patch.setattr(kept._copier, "_gather", fails)
            with pytest.raises(OSError, match="gone"):
                kept.save([0, 1], chain(2))
        assert stack.stats().tiers[0].used_blocks == 0
        assert kept.save([0, 1], chain(2)).stored == 2
        with monkeypatch.context() as patch:
            patch.setattr(kept._copier, "_scatter", fails)
            with pytest.raises(OSError, match="gone"):
                kept.load(chain(2), [4, 5])
        assert stack.stats().tiers[0].used_blocks == 0
        assert stack.stats().loaded_blocks == 0
        assert stack.stats().pinned_slots == 0
