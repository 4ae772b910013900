"""CPU copies against a model in plain numpy that checks every byte of both memories."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest

pytest.importorskip("numba")

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.connectors.layout.placement import BlockRun
from kvcache.connectors.transfer import cpu
from kvcache.connectors.transfer.base import CopyGeometry
from kvcache.connectors.transfer.cpu import CpuCopier

GUARD = 64


@pytest.fixture(scope="module", autouse=True)
def share_every_copy() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "MIN_SHARED_NBYTES", 0)
        yield


@dataclass
class Memories:
    """An engine's memory and a slab, both with random bytes, and where the pages lie."""

    layers: Sequence[int]  # bytes of a page in each layer
    blocks: int
    slots: int
    interleaved: bool = False  # whether the layers of a block lie side by side
    offset: int = 0
    tail: int = 0  # bytes in a slot after this rank's shard
    threads: int = 1
    at: list[tuple[int, int]] = field(init=False)  # offset of each layer in `engine`, and stride

    def __post_init__(self) -> None:
        rng = np.random.default_rng(1)
        block = sum(self.layers)
        starts = np.cumsum([0, *self.layers]).tolist()
        if self.interleaved:
            self.at = [(GUARD + start, block) for start in starts[:-1]]
        else:
            self.at = [
                (GUARD * (layer + 1) + start * self.blocks, nbytes)
                for layer, (start, nbytes) in enumerate(zip(starts, self.layers, strict=False))
            ]
        self.shard = list(pairwise(starts))
        self.slot_nbytes = self.offset + block + self.tail
        engine_nbytes = block * self.blocks + GUARD * (len(self.layers) + 1)
        self.engine = rng.integers(0, 256, engine_nbytes, dtype=np.uint8)
        self.slab = rng.integers(0, 256, self.slot_nbytes * self.slots + 2 * GUARD, dtype=np.uint8)

    def copier(self, copy_share: Callable[..., None] | None = None) -> CpuCopier:
        geometry = CopyGeometry(
            [
                BlockRun(self.engine.ctypes.data + start, nbytes, stride, self.blocks)
                for (start, stride), nbytes in zip(self.at, self.layers, strict=True)
            ],
            slab_address=self.slab.ctypes.data + GUARD,
            slots=self.slots,
            slot_nbytes=self.slot_nbytes,
            offset=self.offset,
        )
        return CpuCopier(geometry, threads=self.threads, copy_share=copy_share)

    def ranges(self, block: int, slot: int) -> Iterator[tuple[slice, slice]]:
        """Yield for each layer the bytes of the block in `engine` and of the slot in `slab`."""
        for (start, stride), (begin, end) in zip(self.at, self.shard, strict=True):
            page = start + block * stride
            shard = GUARD + slot * self.slot_nbytes + self.offset
            yield slice(page, page + end - begin), slice(shard + begin, shard + end)

    def check(self, blocks: Sequence[int], slots: Sequence[int]) -> None:
        """Gather, change the slab, and scatter. Compare both memories with the model each time."""
        copier = self.copier()
        engine, slab = self.engine.copy(), self.slab.copy()
        copier.gather(blocks, slots)
        for block, slot in zip(blocks, slots, strict=True):
            for page, shard in self.ranges(block, slot):
                slab[shard] = engine[page]
        np.testing.assert_array_equal(self.slab, slab)
        np.testing.assert_array_equal(self.engine, engine)

        self.slab ^= 0xA5
        slab = self.slab.copy()
        copier.scatter(slots, blocks)
        for block, slot in zip(blocks, slots, strict=True):
            for page, shard in self.ranges(block, slot):
                engine[page] = slab[shard]
        np.testing.assert_array_equal(self.engine, engine)
        np.testing.assert_array_equal(self.slab, slab)
        copier.close()


LAYOUTS = {
    "one layer": Memories([4096], 40, 50),
    "32 layers": Memories([1024] * 32, 40, 50),
    "block outermost": Memories([1024] * 32, 40, 50, interleaved=True),
    "long pages": Memories([20000, 8192, 4160], 40, 50, offset=8),
    "unaligned pages": Memories([1, 4097, 3, 999], 40, 50, tail=5),
    "second of two ranks": Memories([512] * 8, 40, 50, offset=4096),
    "first of two ranks": Memories([512] * 8, 40, 50, tail=4096, interleaved=True),
}


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("blocks", [0, 1, 2, 40])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_change_the_pages_and_nothing_else(layout: str, blocks: int, threads: int) -> None:
    memories = LAYOUTS[layout]
    memories.threads = threads
    rng = np.random.default_rng(blocks)
    memories.check(
        rng.permutation(memories.blocks)[:blocks].tolist(),
        rng.permutation(memories.slots)[:blocks].tolist(),
    )


@settings(deadline=None)
@given(st.data())
def test_copies_of_any_layout_change_the_pages_and_nothing_else(data: st.DataObject) -> None:
    blocks, slots = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    memories = Memories(
        data.draw(st.lists(st.integers(1, 3000) | st.integers(1, 20000), min_size=1, max_size=6)),
        blocks,
        slots,
        interleaved=data.draw(st.booleans()),
        offset=data.draw(st.integers(0, 100)),
        tail=data.draw(st.integers(0, 100)),
        threads=data.draw(st.integers(1, 4)),
    )
    count = data.draw(st.integers(0, min(blocks, slots)))
    memories.check(
        data.draw(st.permutations(range(blocks)))[:count],
        data.draw(st.permutations(range(slots)))[:count],
    )


def test_copy_is_shared_from_the_threshold_on(monkeypatch: pytest.MonkeyPatch) -> None:
    memories = Memories([4096, 8192], 8, 8, threads=3)
    shares: list[tuple[int, int]] = []
    copier = memories.copier(lambda *arguments: shares.append(arguments[-2:]))
    monkeypatch.setattr(cpu, "MIN_SHARED_NBYTES", 24576)
    copier.gather([0], [0])
    assert shares == [(0, 12288)]
    shares.clear()
    copier.gather([0, 1], [0, 1])  # three shares of equal bytes, though pages differ in size
    assert sorted(shares) == [(0, 8192), (8192, 16384), (16384, 24576)]
    copier.close()


def test_copy_share_copies_only_its_range_of_bytes() -> None:
    copy_share = cpu.compile_copy_share(frozenset())
    source, target = np.arange(1, 25, dtype=np.uint8), np.zeros(24, dtype=np.uint8)
    starts, strides, rows = np.array([0, 4]), np.array([12, 12]), np.array([0, 1])
    runs = [target.ctypes.data + starts, strides, source.ctypes.data + starts, strides]
    nbytes, transposes = np.array([4, 8]), np.empty((0, 7), dtype=np.int64)
    copy_share(rows, rows, *runs, nbytes, transposes, 6, 14)  # it begins and ends inside pages
    np.testing.assert_array_equal(target[6:14], source[6:14])
    assert not target[:6].any()
    assert not target[14:].any()


def pool_threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name.startswith("kvcache-pages")]


def test_share_that_the_pool_has_not_begun_is_copied_by_the_caller() -> None:
    memories = Memories([4096], 4, 4, threads=2)
    compiled = cpu.compile_copy_share(frozenset())
    busy, go_on = threading.Event(), threading.Event()

    def copy_share(*arguments: Any) -> None:
        if threading.current_thread() in pool_threads():
            busy.set()
            go_on.wait()
        else:
            busy.wait()  # or this caller could take the share back before the pool begins it
        compiled(*arguments)

    copier = memories.copier(copy_share)
    with ThreadPoolExecutor(2) as callers:
        blocked = callers.submit(copier.gather, [0], [0])
        try:
            busy.wait()  # the only thread of the pool has the other share
            callers.submit(copier.gather, [1], [2]).result(timeout=60)
            started = pool_threads()
        finally:
            go_on.set()
        blocked.result()
    copier.close()
    assert len(started) == 1
    for block, slot in ((0, 0), (1, 2)):
        (page, shard), *_ = memories.ranges(block, slot)
        np.testing.assert_array_equal(memories.slab[shard], memories.engine[page])


INVALID = {
    "block 4 does not exist: there are 4": (IndexError, [0, 4], [0, 1]),
    "block -1 does not exist": (IndexError, [-1, 0], [0, 1]),
    "slot 5 does not exist: there are 5": (IndexError, [0, 1], [0, 5]),
    "slot -2 does not exist": (IndexError, [0, 1], [-2, 1]),
    r"do not pair up": (ValueError, [0, 1], [0]),
}


@pytest.mark.parametrize("message", INVALID)
def test_copies_with_invalid_arguments_raise_and_change_nothing(message: str) -> None:
    error, blocks, slots = INVALID[message]
    memories = Memories([100, 200], 4, 5)
    engine, slab = memories.engine.copy(), memories.slab.copy()
    copier = memories.copier()
    with pytest.raises(error, match=message):
        copier.gather(blocks, slots)
    with pytest.raises(error, match=message):
        copier.scatter(slots, blocks)
    np.testing.assert_array_equal(memories.engine, engine)
    np.testing.assert_array_equal(memories.slab, slab)
    copier.close()


def test_copies_may_repeat_a_source_and_not_a_target() -> None:
    memories = Memories([100], 4, 4)
    copier = memories.copier()
    slab = memories.slab.copy()
    with pytest.raises(ValueError, match=r"a slot is the target of two copies: \[3, 3\]"):
        copier.gather([0, 1], [3, 3])
    np.testing.assert_array_equal(memories.slab, slab)
    with pytest.raises(ValueError, match="a block is the target"):
        copier.scatter([0, 1], [2, 2])
    copier.gather([1, 1], [0, 3])
    for slot in (0, 3):
        (page, shard), *_ = memories.ranges(1, slot)
        np.testing.assert_array_equal(memories.slab[shard], memories.engine[page])
    copier.close()


def test_blocks_exist_only_if_every_layer_has_them() -> None:
    memory = np.zeros(64, dtype=np.uint8)
    address = memory.ctypes.data
    pages = [BlockRun(address, 4, 4, 3), BlockRun(address + 12, 4, 4, 2)]
    copier = CpuCopier(CopyGeometry(pages, slab_address=address + 32, slots=4, slot_nbytes=8))
    with pytest.raises(IndexError, match="block 2 does not exist: there are 2"):
        copier.gather([2], [0])
    copier.close()


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        ([], {}, "no pages to copy"),
        ([8], {"threads": 0}, "threads=0"),
        ([8], {"slots": 0}, "slots=0"),
        ([8], {"offset": -1}, "offset -1"),
        ([8, 8], {"offset": 1}, "shard of 16 bytes at offset 1 .* slot of 16 bytes"),
    ],
)
def test_copier_with_invalid_geometry_raises(
    layers: list[int], options: dict[str, int], message: str
) -> None:
    threads = options.get("threads", 1)
    geometry: dict[str, Any] = {"slab_address": 0, "slots": 1, "slot_nbytes": 16} | options
    geometry.pop("threads", None)
    with pytest.raises(ValueError, match=message):
        CpuCopier(CopyGeometry([BlockRun(0, n, n, 1) for n in layers], **geometry), threads=threads)


def test_gather_and_scatter_in_parallel_change_only_their_pages() -> None:
    memories = Memories([999] * 16, 64, 64, interleaved=True, threads=2)
    copier = memories.copier()
    engine, slab = memories.engine.copy(), memories.slab.copy()
    gathered, scattered = range(32), range(32, 64)
    all_started = threading.Barrier(4)

    def move(part: int) -> None:
        all_started.wait()
        own = slice(part % 2, None, 2)
        for i in range(8):
            if part < 2:
                copier.gather(gathered[own][i::8], gathered[own][i::8])
            else:
                copier.scatter(scattered[own][i::8], scattered[own][i::8])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(move, range(4)))
    for block in gathered:
        for page, shard in memories.ranges(block, block):
            slab[shard] = engine[page]
    for block in scattered:
        for page, shard in memories.ranges(block, block):
            engine[page] = slab[shard]
    np.testing.assert_array_equal(memories.engine, engine)
    np.testing.assert_array_equal(memories.slab, slab)
    copier.close()


def test_close_ends_the_threads_and_refuses_copies() -> None:
    before = set(threading.enumerate())
    memories = Memories([4096], 8, 8, threads=3)
    copier = memories.copier()
    copier.gather(range(8), range(8))
    assert set(threading.enumerate()) - before
    copier.close()
    copier.close()
    assert set(threading.enumerate()) == before
    for copy in (copier.gather, copier.scatter):
        with pytest.raises(RuntimeError, match="closed"):
            copy([0], [0])


def test_copier_with_one_thread_starts_none() -> None:
    before = set(threading.enumerate())
    memories = Memories([4096], 8, 8, threads=1)
    copier = memories.copier()
    copier.gather(range(8), range(8))
    assert set(threading.enumerate()) == before
    copier.close()


def test_close_waits_for_every_running_copy() -> None:
    begun, go_on = ([threading.Event() for _ in range(2)] for _ in range(2))
    order = list[str]()

    def copy_share(slots: Sequence[int], *_arguments: object) -> None:
        begun[slots[0]].set()
        go_on[slots[0]].wait()
        order.append(f"copied {slots[0]}")

    copier = Memories([4096], 8, 8).copier(copy_share)

    def close() -> None:
        copier.close()
        order.append("closed")

    with ThreadPoolExecutor(3) as threads:
        copies = [threads.submit(copier.gather, [slot], [slot]) for slot in range(2)]
        for event in begun:
            event.wait()
        go_on[0].set()
        copies[0].result()
        closing = threads.submit(close)
        while not copier.closed:
            pass
        go_on[1].set()
        closing.result()
    assert order == ["copied 0", "copied 1", "closed"]
