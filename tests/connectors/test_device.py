"""Copies beside an engine's work: whatever order a device takes, all is as if done in turn."""

from __future__ import annotations

from collections.abc import Collection
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("numpy")

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.connectors.layout.placement import BlockRun
from kvcache.connectors.transfer import device as device_module
from kvcache.connectors.transfer.base import Copy, CopyGeometry
from kvcache.connectors.transfer.device import DeviceCopier
from tests.support.reordering_device import ReorderingDevice

LAYERS, PAGE, BLOCKS, SLOTS = 4, 8, 5, 4
ACTS = ["gather", "scatter", "later", "forward", "write", "read", "work"]


class World:
    """An engine's pages, slots, a device; and what is in both if all is done as it was asked."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.device = ReorderingDevice(Random(seed))
        rng = np.random.default_rng(seed)
        self.pages = rng.integers(0, 256, (LAYERS, BLOCKS, PAGE), dtype=np.uint8)
        self.slab = rng.integers(0, 256, (SLOTS, LAYERS, PAGE), dtype=np.uint8)
        self.right_pages, self.right_slab = self.pages.copy(), self.slab.copy()
        sides = CopyGeometry(
            [
                BlockRun(layer.ctypes.data, PAGE, PAGE, BLOCKS, number)
                for number, layer in enumerate(self.pages)
            ],
            slab_address=self.slab.ctypes.data,
            slots=SLOTS,
            slot_nbytes=LAYERS * PAGE,
        )
        self.copier = DeviceCopier(sides, self.device)
        self.busy: list[tuple[Copy, list[int]]] = []  # copies and the slots that they touch
        self.later_ones: list[tuple[Copy, list[int]]] = []  # loads and the blocks that they touch
        self.unreached: set[int] = set()  # layers of which it is not said that all is there
        self.other = self.device.new_stream()  # on which the engine computes half of a forward pass
        self.wrong: list[str] = []

    def some(self, of: list[int]) -> list[int]:
        return self.random.sample(of, self.random.randrange(len(of) + 1))

    def free(self) -> list[int]:
        """Slots that nobody touches."""
        self.busy = [(copy, slots) for copy, slots in self.busy if not copy.done]
        taken = {slot for _, slots in self.busy for slot in slots}
        return [slot for slot in range(SLOTS) if slot not in taken]

    def blocks(self) -> list[int]:
        """Blocks that the engine may touch."""
        self.later_ones = [(copy, blocks) for copy, blocks in self.later_ones if not copy.done]
        taken = {block for _, blocks in self.later_ones for block in blocks}
        return [block for block in range(BLOCKS) if block not in taken]

    def gather(self) -> None:
        there = self.blocks()
        slots = self.some(self.free()) if there else []
        blocks = [self.random.choice(there) for _ in slots]
        for block, slot in zip(blocks, slots, strict=True):
            self.right_slab[slot] = self.right_pages[:, block]
        self.busy.append((self.copier.gather(blocks, slots), slots))
        self.unreached.clear()

    def later(self) -> None:
        """A load that nobody awaits."""
        blocks = self.scatter(awaited=False)
        self.later_ones.append((self.busy[-1][0], blocks))

    def scatter(self, announced: Collection[int] = (), *, awaited: bool = True) -> list[int]:
        blocks = self.some(self.blocks())
        free = self.free()
        slots = [self.random.choice(free) for _ in blocks] if free else []
        blocks = blocks[: len(slots)]
        for block, slot in zip(blocks, slots, strict=True):
            self.right_pages[:, block] = self.right_slab[slot]
        copy = self.copier.scatter(slots, blocks, awaited=awaited, announced=announced)
        self.busy.append((copy, slots))
        self.unreached.update(announced)
        return blocks

    def forward(self) -> None:
        """Loads, and the engine computes layer by layer: it comes to those it has announced.

        Of a layer it first writes blocks that are not loaded. There may be announced layers that it
        does not come to. Who computes in two halves comes to a layer twice.
        """
        announced = self.some(list(range(LAYERS)))
        fresh = set(self.fence())
        for _ in range(self.random.randrange(3)):
            fresh.difference_update(self.scatter(announced))
        halves = self.random.choice([[self.device.current], [self.device.current, self.other]])
        self.device.current = halves[-1]
        halves[-1].wait_for(halves[0].record())
        for layer in self.some(list(range(LAYERS))):
            for block in fresh:
                self.write_page(layer, block)
            halves[0].wait_for(halves[-1].record())
            for self.device.current in halves:
                if layer in announced:
                    self.copier.wait_for_layer(layer)
                self.read(layer)
            self.unreached.discard(layer)
        self.device.current = halves[0]
        halves[0].wait_for(halves[-1].record())

    def fence(self) -> list[int]:
        blocks = self.some(self.blocks())
        self.copier.fence(blocks)
        self.unreached.clear()
        return blocks

    def write(self) -> None:
        """The engine computes blocks anew."""
        for block in self.fence():
            for layer in range(LAYERS):
                self.write_page(layer, block)

    def write_page(self, layer: int, block: int) -> None:
        self.right_pages[layer, block] = value = self.random.randrange(256)

        def step() -> None:
            self.pages[layer, block] = value

        self.device.engine_stream().todo.append(step)

    def read(self, *layers: int) -> None:
        """The engine reads its blocks of these layers, or of all of which all is there."""
        if not layers and self.random.random() < 0.5:
            self.copier.wait_for_layer()
            self.unreached.clear()
        which = list(layers) or [n for n in range(LAYERS) if n not in self.unreached]
        where = np.ix_(which, self.blocks())
        right = self.right_pages[where]

        def step() -> None:
            if not (self.pages[where] == right).all():
                self.wrong.append("the engine has read other pages than it should have")

        self.device.engine_stream().todo.append(step)

    def work(self) -> None:
        self.device.work(self.random.randrange(20))


@settings(max_examples=600, deadline=None)
@given(
    st.integers(0, 2**32),
    st.lists(st.sampled_from(ACTS), max_size=40),
    st.sampled_from([1, 2 * PAGE, 1 << 20]),
)
def test_all_is_as_if_done_in_turn(seed: int, acts: list[str], least: int) -> None:
    world = World(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_module, "MIN_CALL_NBYTES", least)
        for act in acts:
            getattr(world, act)()
    world.read()
    if world.random.random() < 0.5:
        world.copier.close()
        assert all(copy.done for copy, _ in world.busy)
    world.device.drain()
    assert not world.wrong
    assert (world.pages == world.right_pages).all()
    assert (world.slab == world.right_slab).all()
    assert all(copy.done and copy.seconds >= 0 for copy, _ in world.busy)


@pytest.fixture
def by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer is worth a call of its own."""
    monkeypatch.setattr(device_module, "MIN_CALL_NBYTES", 1)


COPIES: list[tuple[str, dict[str, Any]]] = [
    ("gather", {}),
    ("scatter", {}),
    ("scatter", {"awaited": False}),
    ("scatter", {"announced": range(1, LAYERS)}),
    ("scatter", {"announced": range(LAYERS)}),
]


@pytest.mark.usefixtures("by_layer")
@pytest.mark.parametrize(("which", "how"), COPIES)
def test_a_copy_is_over_when_the_last_page_is_there(which: str, how: dict[str, Any]) -> None:
    world = World(0)
    copy = getattr(world.copier, which)([1, 2], [0, 3], **how)
    while not copy.done:
        world.device.work(1)
    slots, blocks = ([0, 3], [1, 2]) if which == "gather" else ([1, 2], [0, 3])
    assert (world.slab[slots] == world.pages[:, blocks].transpose(1, 0, 2)).all()
    assert copy.seconds > 0


def test_a_load_that_nobody_awaits_holds_up_none_that_somebody_does() -> None:
    before = 0
    for seed in range(20):
        world = World(seed)
        nobody = world.copier.scatter([0, 1, 2], [0, 1, 2], awaited=False)
        world.copier.scatter([3], [3]).wait()
        before += not nobody.done
    assert before > 10


@pytest.mark.usefixtures("by_layer")
@pytest.mark.parametrize("seed", range(40))
def test_what_a_step_never_came_to_is_there_before_the_next_one_writes(seed: int) -> None:
    world = World(seed)
    world.copier.scatter([0], [1], announced=range(LAYERS))
    world.copier.wait_for_layer(0)
    world.copier.fence([1])
    for layer in range(LAYERS):
        world.write_page(layer, 1)
    world.device.drain()
    assert (world.pages[:, 1] == world.right_pages[:, 1]).all()


@pytest.mark.parametrize(
    ("layers_mib", "blocks", "announced", "calls"),
    [
        ([4] * 8, 1, range(8), [8, 8, 8, 8]),
        ([4] * 8, 1, (), [32]),
        ([4] * 7, 1, range(8), [8, 8, 8, 4]),
        ([4] * 8, 1, range(1, 8), [8, 8, 8, 8]),
        ([4] * 8, 1, range(4, 8), [16, 8, 8]),
        ([3] * 8, 1, range(8), [9, 9, 6]),
        ([4, 20, 1, 1, 1, 1], 1, range(6), [24, 4]),
        ([1] * 32, 32, range(32), [128] * 8),
        ([1] * 60, 32, range(60), [256] * 7 + [128]),
        ([0.0625] * 32, 2, range(32), [4]),
    ],
    ids=str,
)
def test_layers_are_copied_in_few_calls_that_are_worth_it(
    layers_mib: list[float], blocks: int, announced: range, calls: list[float]
) -> None:
    class Counting(ReorderingDevice):
        def new_stream(self) -> Any:
            event = ReorderingDevice(Random(0)).new_stream().record
            return SimpleNamespace(record=event, wait_for=lambda event: None, copy=copied)

    def copied(targets: Any, sources: Any, nbytes: Any) -> None:
        seen.append(nbytes.sum() / 2**20)

    for how in ({"announced": announced}, {"announced": announced, "awaited": False}, {}):
        seen: list[float] = []
        sides = CopyGeometry(
            [
                BlockRun(number, int(mib * 2**20) // 2, 2**30, blocks, number)
                for number, mib in enumerate(layers_mib)
                for _ in range(2)
            ],
            slab_address=0,
            slots=blocks,
            slot_nbytes=2**40,
        )
        copier = DeviceCopier(sides, Counting(Random(0)))
        copier.scatter(range(blocks), range(blocks), **how)
        assert seen == (calls if len(how) == 1 else [sum(layers_mib) * blocks])


@pytest.mark.usefixtures("by_layer")
@pytest.mark.parametrize(("which", "how"), COPIES)
def test_a_call_that_raises_leaves_nothing_under_way(which: str, how: dict[str, Any]) -> None:
    world = World(0)
    world.device.breaks = LAYERS + 2  # of two blocks
    with pytest.raises(OSError, match="on purpose"):
        getattr(world.copier, which)([0, 1], [2, 3], **how)
    pages, slab = world.pages.copy(), world.slab.copy()
    world.device.drain()
    assert (world.pages == pages).all()
    assert (world.slab == slab).all()


@pytest.mark.parametrize(
    ("blocks", "slots", "error"),
    [
        ([0], [0, 1], (ValueError, "1 blocks do not pair up with 2 slots")),
        ([0, 1], [2, 2], (ValueError, "a slot is the target of two copies")),
        ([BLOCKS], [0], (IndexError, f"block {BLOCKS} does not exist: there are {BLOCKS}")),
        ([0], [-1], (IndexError, "slot -1 does not exist")),
    ],
)
def test_what_does_not_fit_is_refused(
    blocks: list[int], slots: list[int], error: tuple[Any, str]
) -> None:
    with pytest.raises(error[0], match=error[1]):
        World(0).copier.gather(blocks, slots)


def test_after_close_nothing_begins() -> None:
    world = World(0)
    world.copier.gather([0], [0])
    world.copier.close()
    world.copier.close()
    with pytest.raises(RuntimeError, match="closed"):
        world.copier.scatter([0], [0])


def test_anybodys_tensors_on_a_device_are_there_when_a_call_returns() -> None:
    torch = pytest.importorskip("torch")
    from kvcache import block_keys
    from kvcache.connectors.paged import PagedCache
    from tests.support.paged_caches import opened

    device = ReorderingDevice(Random(1))
    layers = [torch.randint(0, 100, (2, 8, 16, 2, 16), dtype=torch.int16) for _ in range(2)]
    before = [layer.clone() for layer in layers]
    cache = PagedCache(layers, "kv-first")
    cache.device = device
    keys = block_keys(range(48), 16)
    with opened(cache.block_nbytes) as stack, cache.attach(stack) as kept:
        assert sum(device.pinned.values()) == stack.front.slab.nbytes
        assert kept.save([4, 2, 7], keys).stored == 3
        for layer in layers:
            layer.zero_()
        assert kept.load(keys, [0, 1, 2]) == 3
        for layer, right in zip(layers, before, strict=True):
            assert torch.equal(layer[:, [0, 1, 2]], right[:, [4, 2, 7]])
            assert not layer[:, 3:].any()
    assert not device.pinned


def test_what_cannot_be_pinned_is_said_once_and_copied_nonetheless(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World(0)
    world.device.no_more = "out of memory (error 2)"
    world.copier.pin_slots(2)  # too little to be worth a registration
    assert not caplog.records
    world.copier.pin_slots(SLOTS)
    world.copier.pin_slots(SLOTS)
    [said] = caplog.records
    assert "GiB of L1 pinned (out of memory (error 2))" in said.getMessage()
    copy = world.copier.gather([0], [0])
    copy.wait()
    assert (world.slab[0] == world.pages[:, 0]).all()
    world.copier.close()
