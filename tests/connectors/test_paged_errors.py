"""PagedCache: the arguments that it refuses, and copies that raise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("numba")

import torch

from kvcache.connectors.layout.axes import LayoutError
from kvcache.connectors.paged import PagedCache
from kvcache.connectors.transfer.base import PageCopier
from tests.support.engine_caches import SMALL, SMALL_BLOCK_NBYTES, EngineCache, chain_keys
from tests.support.paged_caches import (
    KINDS,
    l1_stack,
    same_blocks,
)

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
    engine = EngineCache("kv-first")
    before = engine.contents
    with l1_stack(SMALL_BLOCK_NBYTES) as stack, engine.attach(stack) as attached:
        with pytest.raises(error, match=message):
            attached.save(ids, chain_keys(count))
        assert stack.stats().tiers[0].used_blocks == 0
        attached.save([0, 1], chain_keys(2))
        with pytest.raises(error, match=message):
            attached.load(chain_keys(count), ids)
        assert stack.stats().tiers[0].used_blocks == 2  # only a failed copy drops blocks
        assert stack.stats().pinned_slots == 0
    assert same_blocks(engine.contents, [*range(8)], before, [*range(8)])


def test_load_with_a_repeated_block_or_invalid_start_raises() -> None:
    engine = EngineCache("kv-first")
    with l1_stack(SMALL_BLOCK_NBYTES) as stack, engine.attach(stack) as attached:
        attached.save([0, 1], chain_keys(2))
        with pytest.raises(ValueError, match=r"target of two keys: \[3, 3\]"):
            attached.load(chain_keys(2), [3, 3])
        with pytest.raises(ValueError, match="start is 3, but there are 2 keys"):
            attached.load(chain_keys(2), [], start=3)
        assert stack.stats().tiers[0].used_blocks == 2


def test_attach_to_a_stack_with_other_block_size_raises() -> None:
    engine = EngineCache("kv-first")
    with (
        l1_stack(8192) as stack,
        pytest.raises(ValueError, match=r"4096 bytes, .* 8192; open the stack"),
    ):
        engine.attach(stack)
    assert engine.cache.block_nbytes == SMALL_BLOCK_NBYTES == 4096


def test_close_refuses_copies_and_keeps_the_blocks() -> None:
    engine = EngineCache("kv-first")
    with l1_stack(SMALL_BLOCK_NBYTES) as stack:
        with engine.attach(stack) as attached:
            attached.save([0, 1], chain_keys(2))
        attached.close()
        for call in (
            lambda: attached.save([0], chain_keys(1, 5)),
            lambda: attached.load(chain_keys(2), [4, 5]),
        ):
            with pytest.raises(RuntimeError, match="not attached any more"):
                call()
        with engine.attach(stack) as attached:
            assert attached.load(chain_keys(2), [4, 5]) == 2


@pytest.mark.parametrize("order", ["raw", "canonical"])
def test_copies_after_the_stack_closed_still_work(order: Any) -> None:
    engine = EngineCache("kv-first", order)
    stack = l1_stack(SMALL_BLOCK_NBYTES)
    attached = engine.attach(stack)
    stack.close()
    assert attached.save([0, 1], chain_keys(2)).stored == 2  # into memory that it keeps mapped
    assert attached.load(chain_keys(2), [4, 5]) == 2
    attached.close()


def test_canonical_order_of_opaque_or_different_layers_raises() -> None:
    layers = KINDS["packed"].make(SMALL)
    assert PagedCache(layers, "opaque").block_nbytes == SMALL_BLOCK_NBYTES
    with pytest.raises(
        LayoutError, match=r"opaque \[blocks, ...\] has no canonical order.* 1, 2, 3"
    ):
        PagedCache(layers, "opaque", order="canonical")
    layers[1] = torch.zeros(8, 2, 16, 64, dtype=torch.bfloat16)
    with pytest.raises(LayoutError, match=r"layers that differ .*: layer 1 has"):
        PagedCache(layers, "packed", order="canonical")
    assert PagedCache(layers, "packed").block_nbytes == SMALL_BLOCK_NBYTES * 3 // 2


def test_unknown_order_and_unsupported_device_raise() -> None:
    layers = KINDS["packed"].make(SMALL)
    with pytest.raises(ValueError, match="order is 'nhd'; it must be 'raw' or 'canonical'"):
        PagedCache(layers, "packed", order="nhd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"is on meta; .* CPUs and CUDA"):
        PagedCache([torch.zeros(8, 2, 16, 32, device="meta")], "packed")


@pytest.mark.parametrize("order", ["raw", "canonical"])
def test_copy_that_raises_stores_and_loads_nothing(
    order: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = EngineCache("kv-first", order)

    def fails(self: PageCopier, *ids: Sequence[int]) -> None:
        raise OSError("the device is gone")

    with l1_stack(SMALL_BLOCK_NBYTES) as stack, engine.attach(stack) as attached:
        with monkeypatch.context() as patch:
            patch.setattr(PageCopier, "gather", fails)
            with pytest.raises(OSError, match="gone"):
                attached.save([0, 1], chain_keys(2))
        assert stack.stats().tiers[0].used_blocks == 0
        assert attached.save([0, 1], chain_keys(2)).stored == 2
        with monkeypatch.context() as patch:
            patch.setattr(PageCopier, "scatter", fails)
            with pytest.raises(OSError, match="gone"):
                attached.load(chain_keys(2), [4, 5])
        assert stack.stats().tiers[0].used_blocks == 0
        assert stack.stats().loaded_blocks == 0
        assert stack.stats().pinned_slots == 0
