"""The canonical order against plain torch: every byte of slots and cache is checked.

Later versions must find blocks that were stored in this order. So the tests define it by its
meaning: ``[tokens, layers, kv, heads, dim]``, or ``[tokens, layers, latent]``, dense.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any, cast

import pytest

pytest.importorskip("torch")
pytest.importorskip("numba")

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.connectors.layout.axes import Layout, LayoutError
from kvcache.connectors.layout.canonical import canonical_runs, canonical_sizes
from kvcache.connectors.layout.placement import MAX_RUNS, Placement, place
from kvcache.connectors.transfer import cpu
from kvcache.connectors.transfer.factory import format_id, open_copier
from kvcache.slab import Slab
from tests.support.paged_caches import KINDS, LATENT, Geometry, keys_and_values, overwrite
from tests.support.reordering_device import ReorderingDevice

ALL = KINDS | LATENT
GUARD = 64


@pytest.fixture(scope="module", autouse=True)
def share_every_copy() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "MIN_SHARED_NBYTES", 0)
        yield


def canonical(placement: Placement, block: int) -> bytes:
    """Make a block in canonical order with torch, from nothing but the names of axes."""
    whole = torch.empty(
        [*canonical_sizes(placement).values()], dtype=placement.tensors[0].tensor.dtype
    )
    names = [*canonical_sizes(placement)]
    for part in placement.tensors:
        tensor: Any = part.tensor
        step = tensor.element_size()
        inside = tensor.as_strided(
            [axis.size for axis in part.axes],
            [axis.stride // step for axis in part.axes],
            tensor.storage_offset() + block * (part.block_axis.stride // step),
        )
        # Axes of one name become adjacent, in their order; names get the order of a block.
        known = [at for at, axis in enumerate(part.axes) if axis.name in names]
        order = sorted(known, key=lambda at: names.index(part.axes[at].name))
        target = whole.select(names.index("layers"), part.layer)
        inside = inside.permute([*order, *(at for at in range(len(part.axes)) if at not in known)])
        if "kv" in names and not any(axis.name == "kv" for axis in part.axes):
            target = target.select(names.index("kv") - 1, part.number)
        target.copy_(inside.reshape(target.shape))
    return bytes(whole.contiguous().view(torch.uint8).numpy())


class GuardedSlab:
    """Slots with other memory before and after them. It has the attributes that copiers use."""

    def __init__(self, slots: int, slot_nbytes: int) -> None:
        self.slots, self.slot_nbytes = slots, slot_nbytes
        self.memory = np.random.default_rng(1).integers(
            0, 256, slots * slot_nbytes + 3 * GUARD, dtype=np.uint8
        )
        begin = -self.memory.ctypes.data % GUARD + GUARD
        self.address = self.memory.ctypes.data + begin
        self.rows = self.memory[begin : begin + slots * slot_nbytes].reshape(slots, slot_nbytes)


def cache_bytes(placement: Placement) -> tuple[list[Any], list[Any]]:
    """Return the memory of the tensors, and a mask of its bytes that belong to no block."""
    found: dict[int, tuple[Any, Any]] = {}
    for part in placement.tensors:
        tensor: Any = part.tensor
        memory = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        _, outside = found.setdefault(
            memory.data_ptr(), (memory.clone(), torch.ones(len(memory), dtype=torch.bool))
        )
        numbers = outside.view(-1, tensor.element_size())
        at = torch.arange(len(numbers))
        numbers[at.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())] = False
    return [memory for memory, _ in found.values()], [outside for _, outside in found.values()]


def check(
    placement: Placement,
    layers: Any,
    *,
    offset: int = 0,
    tail: int = 0,
    threads: int = 1,
    device: ReorderingDevice | None = None,
) -> None:
    """Gather, change the slots, and scatter to other blocks. Check both memories each time."""
    shard = slice(offset, offset + placement.block_nbytes)
    guarded = GuardedSlab(placement.blocks + 1, offset + placement.block_nbytes + tail)
    slab = cast("Slab", guarded)
    copier = open_copier(
        placement, slab, device=device, order="canonical", offset=offset, threads=threads
    )
    random, count = Random(3), placement.blocks - (placement.blocks > 1)
    blocks = random.sample(range(placement.blocks), count)
    slots = random.sample(range(guarded.slots), count)
    overwrite(layers, seed=5)

    memory, (before, outside) = guarded.memory.copy(), cache_bytes(placement)
    copier.gather(blocks, slots).wait()
    gathered, guarded.memory[:] = guarded.memory.copy(), memory
    for block, slot in zip(blocks, slots, strict=True):
        guarded.rows[slot, shard] = np.frombuffer(canonical(placement, block), dtype=np.uint8)
    np.testing.assert_array_equal(gathered, guarded.memory)
    assert all(map(torch.equal, cache_bytes(placement)[0], before))

    expected = [canonical(placement, block) for block in range(placement.blocks)]
    targets = random.sample(range(placement.blocks), count)
    guarded.memory ^= 0xA5
    memory = guarded.memory.copy()
    copier.scatter(slots, targets).wait()
    for slot, target in zip(slots, targets, strict=True):
        expected[target] = guarded.rows[slot, shard].tobytes()
    assert [canonical(placement, block) for block in range(placement.blocks)] == expected
    np.testing.assert_array_equal(guarded.memory, memory)
    for now, then, unused in zip(cache_bytes(placement)[0], before, outside, strict=True):
        assert torch.equal(now[unused], then[unused])
    copier.close()


SHAPES = {  # tokens, heads, dim
    "16 tokens": (16, 2, 64),
    "128 tokens": (128, 3, 32),
    "dim 80": (16, 2, 80),
    "dim 576": (16, 1, 576),
    "few tokens": (4, 5, 48),
    "odd": (3, 7, 16),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ALL)
def test_canonical_copies_order_the_bytes_by_meaning(
    name: str, shape: str, dtype: torch.dtype
) -> None:
    tokens, heads, dim = SHAPES[shape]
    g = Geometry(2, 5, tokens, 1 if name in LATENT else heads, dim, dtype)
    layers = ALL[name].make(g)
    placement = place(layers, ALL[name].layout)
    check(placement, layers, threads=1 + tokens % 2)
    if name in KINDS:  # check `canonical` itself against views that know no names of axes
        parts = [part for pair in keys_and_values(ALL[name], layers) for part in pair]
        block = torch.stack([part[3] for part in parts], dim=1)  # [tokens, layers and kv, ...]
        assert canonical(placement, 3) == block.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", ALL)
def test_canonical_copies_of_an_unaligned_shard_change_nothing_else(
    name: str, threads: int
) -> None:
    """No run begins on a cache line, and the shares of threads end anywhere."""
    g = Geometry(layers=3, blocks=5, tokens=16, heads=1 if name in LATENT else 2, dim=48)
    layers = ALL[name].make(g)
    check(place(layers, ALL[name].layout), layers, offset=4098, tail=6, threads=threads)


@pytest.mark.parametrize("name", [name for name in ALL if name != "paged-attention"])
def test_canonical_copies_on_a_device_use_the_same_order(name: str) -> None:
    """A device copies the same runs and transposes none."""
    g = Geometry(layers=2, blocks=4, tokens=16, heads=1 if name in LATENT else 2, dim=48)
    layers = ALL[name].make(g)
    device = ReorderingDevice(Random(1))
    check(place(layers, ALL[name].layout), layers, offset=96, tail=32, device=device)


def test_canonical_order_with_too_many_runs_for_a_device_raises() -> None:
    tensor = torch.zeros(4, 2, 8, 128, 16, dtype=torch.bfloat16, device="meta")
    placement = place([tensor], Layout("custom", ("blocks kv heads dim tokens",)))
    with pytest.raises(LayoutError, match="on meta: a block of it has 32768 runs of 2 bytes"):
        format_id(placement, "canonical")


def test_canonical_runs_on_a_cpu_are_transposed_if_there_are_too_many() -> None:
    g = Geometry(layers=1, blocks=2, tokens=1024, heads=8, dim=32)
    layers = KINDS["pair-hnd"].make(g)
    placement = place(layers, "pair-hnd")
    assert g.tokens * g.heads > MAX_RUNS
    assert len(canonical_runs(placement, can_transpose=True).runs) < MAX_RUNS
    check(placement, layers)


AXES = ("blocks", "tokens", "heads", "dim", "kv", "tokens", "dim", "one")


@st.composite
def placements(draw: st.DrawFn) -> tuple[Placement, Any]:
    """Draw tensors with any axes in any order, with gaps, and with memory beside the blocks."""
    names = draw(st.permutations(AXES))[: draw(st.integers(1, len(AXES)))]
    names = ["blocks", *(name for name in names if name != "blocks")]
    names = draw(st.permutations(names))
    pair = draw(st.booleans()) and "kv" not in names
    sizes = [
        {"kv": 2, "one": 1}.get(name) or draw(st.sampled_from([1, 2, 3, 8, 17, 32]))
        for name in names
    ]
    while np.prod(sizes) > 4096:
        widest = max(range(len(sizes)), key=lambda at: sizes[at])
        sizes[widest] = 1
    dtype = draw(st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.float64]))

    def tensor() -> Any:
        strides, step = [0] * len(names), 1
        for axis in draw(st.permutations(range(len(names)))):
            strides[axis] = step
            step *= sizes[axis] + draw(st.sampled_from([0, 0, 0, 1, 2]))
        begin = draw(st.integers(0, 3))
        return torch.zeros(step + 3, dtype=dtype).as_strided(sizes, strides, begin)

    count = draw(st.integers(1, 3))
    layers = [(tensor(), tensor()) if pair else tensor() for _ in range(count)]
    layout = Layout("any", (" ".join(names),) * (1 + pair))
    return place(layers, layout), layers


@settings(deadline=None, max_examples=150)
@given(placements(), st.integers(0, 70), st.integers(0, 70), st.integers(1, 3))
def test_canonical_copies_of_any_axes_in_any_order(
    drawn: Any, offset: int, tail: int, threads: int
) -> None:
    placement, layers = drawn
    nbytes = placement.element_nbytes
    begin, end = offset // nbytes * nbytes, tail // nbytes * nbytes
    check(placement, layers, offset=begin, tail=end, threads=threads)
