"""Copies beside an engine's work: whatever order a device takes, all is as if done in turn."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

pytest.importorskip("numpy")

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.connectors.copier import Copy, Sides
from kvcache.connectors.device import DeviceCopier
from kvcache.connectors.placement import Pages
from tests.connectors.streams import Device

LAYERS, PAGE, BLOCKS, SLOTS = 3, 8, 5, 4


class World:
    """An engine's pages, slots, a device; and what is in both if all is done as it was asked."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.device = Device(Random(seed))
        rng = np.random.default_rng(seed)
        self.pages = rng.integers(0, 256, (LAYERS, BLOCKS, PAGE), dtype=np.uint8)
        self.slab = rng.integers(0, 256, (SLOTS, LAYERS, PAGE), dtype=np.uint8)
        self.right_pages, self.right_slab = self.pages.copy(), self.slab.copy()
        sides = Sides(
            [Pages(layer.ctypes.data, PAGE, PAGE, BLOCKS) for layer in self.pages],
            slab_address=self.slab.ctypes.data,
            slots=SLOTS,
            slot_nbytes=LAYERS * PAGE,
        )
        self.copier = DeviceCopier(sides, self.device)
        self.busy: list[tuple[Copy, list[int]]] = []  # copies and the slots that they touch
        self.wrong: list[str] = []

    def some(self, of: list[int]) -> list[int]:
        return self.random.sample(of, self.random.randrange(len(of) + 1))

    def free(self) -> list[int]:
        """Slots that nobody touches."""
        self.busy = [(copy, slots) for copy, slots in self.busy if not copy.over]
        taken = {slot for _, slots in self.busy for slot in slots}
        return [slot for slot in range(SLOTS) if slot not in taken]

    def gather(self) -> None:
        slots = self.some(self.free())
        blocks = [self.random.randrange(BLOCKS) for _ in slots]
        for block, slot in zip(blocks, slots, strict=True):
            self.right_slab[slot] = self.right_pages[:, block]
        self.busy.append((self.copier.gather(blocks, slots), slots))

    def scatter(self) -> None:
        blocks = self.some(list(range(BLOCKS)))
        free = self.free()
        slots = [self.random.choice(free) for _ in blocks] if free else []
        blocks = blocks[: len(slots)]
        for block, slot in zip(blocks, slots, strict=True):
            self.right_pages[:, block] = self.right_slab[slot]
        self.busy.append((self.copier.scatter(slots, blocks), slots))

    def write(self) -> None:
        """The engine computes blocks anew."""
        blocks = self.some(list(range(BLOCKS)))
        self.copier.fence(blocks)
        for block in blocks:
            value = self.random.randrange(256)
            self.right_pages[:, block] = value
            for layer in range(LAYERS):

                def step(layer: int = layer, block: int = block, value: int = value) -> None:
                    self.pages[layer, block] = value

                self.device.engine().todo.append(step)

    def read(self) -> None:
        """The engine reads all its blocks."""
        right = self.right_pages.copy()

        def step() -> None:
            if not (self.pages == right).all():
                self.wrong.append("the engine has read other pages than it should have")

        self.device.engine().todo.append(step)

    def work(self) -> None:
        self.device.work(self.random.randrange(20))


@settings(max_examples=400, deadline=None)
@given(
    st.integers(0, 2**32),
    st.lists(st.sampled_from(["gather", "scatter", "write", "read", "work"]), max_size=40),
)
def test_all_is_as_if_done_in_turn(seed: int, acts: list[str]) -> None:
    world = World(seed)
    for act in acts:
        getattr(world, act)()
    world.read()
    if world.random.random() < 0.5:
        world.copier.close()
        assert all(copy.over for copy, _ in world.busy)
    world.device.drain()
    assert not world.wrong
    assert (world.pages == world.right_pages).all()
    assert (world.slab == world.right_slab).all()
    assert all(copy.over and copy.seconds >= 0 for copy, _ in world.busy)


def test_a_copy_is_over_when_the_last_page_is_there() -> None:
    world = World(0)
    copy = world.copier.gather([1, 2], [0, 3])
    while not copy.over:
        world.device.work(1)
    assert (world.slab[[0, 3]] == world.pages[:, [1, 2]].transpose(1, 0, 2)).all()
    assert copy.seconds > 0


@pytest.mark.parametrize("copy", ["gather", "scatter"])
def test_a_call_that_raises_leaves_nothing_under_way(copy: str) -> None:
    world = World(0)
    world.device.breaks = LAYERS + 2  # in the second of two blocks
    with pytest.raises(OSError, match="on purpose"):
        getattr(world.copier, copy)([0, 1], [2, 3])
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
    from tests.connectors.paged_caches import opened

    device = Device(Random(1))
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
    world.copier.ready(2)  # too little to be worth a registration
    assert not caplog.records
    world.copier.ready(SLOTS)
    world.copier.ready(SLOTS)
    [said] = caplog.records
    assert "no more can be: out of memory (error 2)" in said.getMessage()
    copy = world.copier.gather([0], [0])
    copy.wait()
    assert (world.slab[0] == world.pages[:, 0]).all()
    world.copier.close()
