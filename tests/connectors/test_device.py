"""Copies on a device: in whatever order it works, the result is that of all calls done in turn."""

from __future__ import annotations

from collections.abc import Collection
from random import Random
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
FIRST_LAYERS = (0, 2)  # of a block, for each geometry: all layers, or the last two
ACTIONS = ["gather", "scatter", "background_load", "forward", "overwrite", "read", "work"]


class Simulation:
    """An engine's pages, slots and a device, with a model of what both must contain."""

    def __init__(self, seed: int, *, blocks_outermost: bool = False) -> None:
        self.random = Random(seed)
        self.device = ReorderingDevice(Random(seed))
        rng = np.random.default_rng(seed)
        self.pages = rng.integers(0, 256, (LAYERS, BLOCKS, PAGE), dtype=np.uint8)
        if blocks_outermost:
            self.pages = self.pages.transpose(1, 0, 2).copy().transpose(1, 0, 2)
        self.slab = rng.integers(0, 256, (SLOTS, LAYERS, PAGE), dtype=np.uint8)
        self.expected_pages, self.expected_slab = self.pages.copy(), self.slab.copy()
        runs = [
            BlockRun(layer.ctypes.data, PAGE, layer.strides[0], BLOCKS, number)
            for number, layer in enumerate(self.pages)
        ]
        geometries = [
            CopyGeometry(
                runs[first:],
                slab_address=self.slab.ctypes.data,
                slots=SLOTS,
                slot_nbytes=LAYERS * PAGE,
            )
            for first in FIRST_LAYERS
        ]
        self.copier = DeviceCopier(*geometries, device=self.device)
        self.copies: list[tuple[Copy, list[int]]] = []  # with the slots that they use
        self.background_loads: list[tuple[Copy, list[int]]] = []  # with the blocks that they write
        self.unreached: set[int] = set()  # announced layers that the engine has not waited for
        self.second_stream = self.device.new_stream()  # for the other half of a forward pass
        self.errors: list[str] = []

    def sample(self, numbers: list[int]) -> list[int]:
        return self.random.sample(numbers, self.random.randrange(len(numbers) + 1))

    def free_slots(self) -> list[int]:
        """The slots that no copy uses."""
        self.copies = [(copy, slots) for copy, slots in self.copies if not copy.done]
        used = {slot for _, slots in self.copies for slot in slots}
        return [slot for slot in range(SLOTS) if slot not in used]

    def usable_blocks(self) -> list[int]:
        """The blocks that the engine may touch: no load in the background writes them."""
        self.background_loads = [
            (copy, blocks) for copy, blocks in self.background_loads if not copy.done
        ]
        written = {block for _, blocks in self.background_loads for block in blocks}
        return [block for block in range(BLOCKS) if block not in written]

    def random_geometries(self, count: int) -> list[tuple[int, int]]:
        """Return a geometry for each of so many blocks, as the copier takes them."""
        return [(self.random.randrange(len(FIRST_LAYERS)), 1) for _ in range(count)]

    def gather(self) -> None:
        usable = self.usable_blocks()
        slots = self.sample(self.free_slots()) if usable else []
        blocks = [self.random.choice(usable) for _ in slots]
        geometries = self.random_geometries(len(slots))
        for block, slot, (geometry, _) in zip(blocks, slots, geometries, strict=True):
            first = FIRST_LAYERS[geometry]
            self.expected_slab[slot, : LAYERS - first] = self.expected_pages[first:, block]
        self.copies.append((self.copier.gather(blocks, slots, geometries), slots))
        self.unreached.clear()

    def background_load(self) -> None:
        """Start a load that is not awaited."""
        blocks = self.scatter(awaited=False)
        self.background_loads.append((self.copies[-1][0], blocks))

    def scatter(self, announced: Collection[int] = (), *, awaited: bool = True) -> list[int]:
        blocks = self.sample(self.usable_blocks())
        free = self.free_slots()
        slots = [self.random.choice(free) for _ in blocks] if free else []
        blocks = blocks[: len(slots)]
        geometries = self.random_geometries(len(slots))
        for block, slot, (geometry, _) in zip(blocks, slots, geometries, strict=True):
            first = FIRST_LAYERS[geometry]
            self.expected_pages[first:, block] = self.expected_slab[slot, : LAYERS - first]
        copy = self.copier.scatter(slots, blocks, geometries, awaited=awaited, announced=announced)
        self.copies.append((copy, slots))
        self.unreached.update(announced)
        return blocks

    def forward(self) -> None:
        """Start loads and a forward pass, which waits for each announced layer that it computes.

        The pass may skip layers, announced ones too. It overwrites blocks that are not loaded
        before it waits for the layer. It may compute in two halves on two streams; each half waits.
        """
        announced = self.sample(list(range(LAYERS)))
        fresh = set(self.fence())
        for _ in range(self.random.randrange(3)):
            fresh.difference_update(self.scatter(announced))
        streams = self.random.choice(
            [[self.device.current], [self.device.current, self.second_stream]]
        )
        self.device.current = streams[-1]
        streams[-1].wait_for(streams[0].record())
        for layer in self.sample(list(range(LAYERS))):
            for block in fresh:
                self.write_page(layer, block)
            streams[0].wait_for(streams[-1].record())
            for self.device.current in streams:
                if layer in announced:
                    self.copier.wait_for_layer(layer)
                self.read(layer)
            self.unreached.discard(layer)
        self.device.current = streams[0]
        streams[0].wait_for(streams[-1].record())

    def fence(self) -> list[int]:
        blocks = self.sample(self.usable_blocks())
        self.copier.fence(blocks)
        self.unreached.clear()
        return blocks

    def overwrite(self) -> None:
        """The engine computes blocks anew."""
        for block in self.fence():
            for layer in range(LAYERS):
                self.write_page(layer, block)

    def write_page(self, layer: int, block: int) -> None:
        self.expected_pages[layer, block] = value = self.random.randrange(256)

        def step() -> None:
            self.pages[layer, block] = value

        self.device.engine_stream().queue.append(step)

    def read(self, *layers: int) -> None:
        """The engine reads its blocks in these layers, or in all layers that are loaded."""
        if not layers and self.random.random() < 0.5:
            self.copier.wait_for_layer()
            self.unreached.clear()
        loaded = list(layers) or [n for n in range(LAYERS) if n not in self.unreached]
        where = np.ix_(loaded, self.usable_blocks())
        expected = self.expected_pages[where]

        def step() -> None:
            if not (self.pages[where] == expected).all():
                self.errors.append("the engine has read other bytes than expected")

        self.device.engine_stream().queue.append(step)

    def work(self) -> None:
        self.device.work(self.random.randrange(20))


@settings(max_examples=600, deadline=None)
@given(
    st.integers(0, 2**32),
    st.lists(st.sampled_from(ACTIONS), max_size=40),
    st.sampled_from([1, 2 * PAGE, 1 << 20]),
    st.booleans(),
)
def test_copies_in_any_order_of_work_equal_calls_done_in_turn(
    seed: int, actions: list[str], min_call_nbytes: int, blocks_outermost: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_module, "MIN_CALL_NBYTES", min_call_nbytes)
        patch.setattr(device_module, "MIN_CUT_RUN_NBYTES", min_call_nbytes)
        simulation = Simulation(seed, blocks_outermost=blocks_outermost)
        for action in actions:
            getattr(simulation, action)()
    simulation.read()
    if simulation.random.random() < 0.5:
        simulation.copier.close()
        assert all(copy.done for copy, _ in simulation.copies)
    simulation.device.drain()
    assert not simulation.errors
    assert (simulation.pages == simulation.expected_pages).all()
    assert (simulation.slab == simulation.expected_slab).all()
    assert all(copy.done and copy.seconds >= 0 for copy, _ in simulation.copies)


@pytest.fixture
def one_call_per_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "MIN_CALL_NBYTES", 1)


COPIES: list[tuple[str, dict[str, Any]]] = [
    ("gather", {}),
    ("scatter", {}),
    ("scatter", {"awaited": False}),
    ("scatter", {"announced": range(1, LAYERS)}),
    ("scatter", {"announced": range(LAYERS)}),
]


@pytest.mark.usefixtures("one_call_per_layer")
@pytest.mark.parametrize(("method", "options"), COPIES)
def test_copy_is_done_only_after_its_last_page(method: str, options: dict[str, Any]) -> None:
    simulation = Simulation(0)
    copy = getattr(simulation.copier, method)([1, 2], [0, 3], **options)
    while not copy.done:
        simulation.device.work(1)
    slots, blocks = ([0, 3], [1, 2]) if method == "gather" else ([1, 2], [0, 3])
    assert (simulation.slab[slots] == simulation.pages[:, blocks].transpose(1, 0, 2)).all()
    assert copy.seconds > 0


def test_load_not_awaited_does_not_delay_an_awaited_one() -> None:
    unfinished = 0
    for seed in range(20):
        simulation = Simulation(seed)
        background = simulation.copier.scatter([0, 1, 2], [0, 1, 2], awaited=False)
        simulation.copier.scatter([3], [3]).wait()
        unfinished += not background.done
    assert unfinished > 10


@pytest.mark.usefixtures("one_call_per_layer")
@pytest.mark.parametrize("seed", range(40))
def test_fence_waits_for_layers_that_the_step_skipped(seed: int) -> None:
    simulation = Simulation(seed)
    simulation.copier.scatter([0], [1], announced=range(LAYERS))
    simulation.copier.wait_for_layer(0)
    simulation.copier.fence([1])
    for layer in range(LAYERS):
        simulation.write_page(layer, 1)
    simulation.device.drain()
    assert (simulation.pages[:, 1] == simulation.expected_pages[:, 1]).all()


@pytest.mark.usefixtures("one_call_per_layer")
@pytest.mark.parametrize(("method", "options"), COPIES)
def test_copy_that_raises_leaves_nothing_in_flight(method: str, options: dict[str, Any]) -> None:
    simulation = Simulation(0)
    simulation.device.copies_until_error = LAYERS + 2  # in the second block
    with pytest.raises(OSError, match="on purpose"):
        getattr(simulation.copier, method)([0, 1], [2, 3], **options)
    pages, slab = simulation.pages.copy(), simulation.slab.copy()
    simulation.device.drain()
    assert (simulation.pages == pages).all()
    assert (simulation.slab == slab).all()


@pytest.mark.parametrize(
    ("blocks", "slots", "error"),
    [
        ([0], [0, 1], (ValueError, "1 blocks do not pair up with 2 slots")),
        ([0, 1], [2, 2], (ValueError, "a slot is the target of two copies")),
        ([BLOCKS], [0], (IndexError, f"block {BLOCKS} does not exist: there are {BLOCKS}")),
        ([0], [-1], (IndexError, "slot -1 does not exist")),
    ],
)
def test_gather_with_invalid_arguments_raises(
    blocks: list[int], slots: list[int], error: tuple[Any, str]
) -> None:
    with pytest.raises(error[0], match=error[1]):
        Simulation(0).copier.gather(blocks, slots)


@pytest.mark.parametrize(
    ("geometries", "error"),
    [
        ([(0, 1)], (ValueError, "geometries are named for 1 of 2 blocks")),
        ([(0, 1), (2, 1)], (IndexError, "geometry 2 does not exist: there are 2")),
        ([(-1, 2)], (IndexError, "geometry -1 does not exist")),
    ],
)
def test_gather_with_invalid_geometries_raises(
    geometries: list[tuple[int, int]], error: tuple[Any, str]
) -> None:
    with pytest.raises(error[0], match=error[1]):
        Simulation(0).copier.gather([0, 1], [2, 3], geometries)


def test_target_may_occur_once_with_each_geometry() -> None:
    simulation = Simulation(0)
    simulation.copier.gather([0, 1], [2, 2], [(0, 1), (1, 1)])
    simulation.copier.scatter([0, 1], [2, 2], [(0, 1), (1, 1)])
    with pytest.raises(ValueError, match="a slot is the target of two copies"):
        simulation.copier.gather([0, 1, 3], [2, 2, 2], [(1, 1), (0, 1), (1, 1)])
    with pytest.raises(ValueError, match="a block is the target of two copies"):
        simulation.copier.scatter([0, 1], [2, 2], [(1, 2)])
    simulation.copier.close()


def test_scatter_after_close_raises() -> None:
    simulation = Simulation(0)
    simulation.copier.gather([0], [0])
    simulation.copier.close()
    simulation.copier.close()
    with pytest.raises(RuntimeError, match="closed"):
        simulation.copier.scatter([0], [0])


def test_paged_cache_on_a_device_returns_after_the_copies() -> None:
    torch = pytest.importorskip("torch")
    from kvcache import block_keys
    from kvcache.connectors.paged import PagedCache
    from tests.support.paged_caches import l1_stack

    device = ReorderingDevice(Random(1))
    layers = [torch.randint(0, 100, (2, 8, 16, 2, 16), dtype=torch.int16) for _ in range(2)]
    before = [layer.clone() for layer in layers]
    cache = PagedCache(layers, "kv-first")
    cache.device = device
    keys = block_keys(range(48), 16)
    with l1_stack(cache.block_nbytes) as stack, cache.attach(stack) as attached:
        assert sum(device.pinned.values()) == stack.front.slab.nbytes
        assert attached.save([4, 2, 7], keys).stored == 3
        for layer in layers:
            layer.zero_()
        assert attached.load(keys, [0, 1, 2]) == 3
        for layer, expected in zip(layers, before, strict=True):
            assert torch.equal(layer[:, [0, 1, 2]], expected[:, [4, 2, 7]])
            assert not layer[:, 3:].any()
    assert not device.pinned


def test_pin_slots_that_fails_is_logged_once_and_copies_work(
    caplog: pytest.LogCaptureFixture,
) -> None:
    simulation = Simulation(0)
    simulation.device.pin_error = "out of memory (error 2)"
    simulation.copier.pin_slots(2)  # less than the least extent
    assert not caplog.records
    simulation.copier.pin_slots(SLOTS)
    simulation.copier.pin_slots(SLOTS)
    [record] = caplog.records
    assert "GiB of L1 pinned (out of memory (error 2))" in record.getMessage()
    copy = simulation.copier.gather([0], [0])
    copy.wait()
    assert (simulation.slab[0] == simulation.pages[:, 0]).all()
    simulation.copier.close()
