"""Page copies against a model in plain numpy: every byte of both memories, touched or not."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise

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
def every_copy_is_shared() -> Iterator[None]:
    """Small copies would all be made by the calling thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "MIN_SHARED_NBYTES", 0)
        yield


@dataclass
class World:
    """An engine's memory and a slab, both of random bytes, and where the pages are in them."""

    layers: Sequence[int]  # bytes of each layer's page
    blocks: int
    slots: int
    interleaved: bool = False  # all layers of a block side by side, as in a block-outermost layout
    offset: int = 0
    tail: int = 0  # bytes in a slot after this rank's shard
    threads: int = 1
    at: list[tuple[int, int]] = field(init=False)  # where each layer begins in `engine`; its stride

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

    def copier(self) -> CpuCopier:
        sides = CopyGeometry(
            [
                BlockRun(self.engine.ctypes.data + start, nbytes, stride, self.blocks)
                for (start, stride), nbytes in zip(self.at, self.layers, strict=True)
            ],
            slab_address=self.slab.ctypes.data + GUARD,
            slots=self.slots,
            slot_nbytes=self.slot_nbytes,
            offset=self.offset,
        )
        return CpuCopier(sides, threads=self.threads)

    def ranges(self, block: int, slot: int) -> Iterator[tuple[slice, slice]]:
        """Layer after layer: the bytes of the block in `engine`, those of the slot in `slab`."""
        for (start, stride), (begin, end) in zip(self.at, self.shard, strict=True):
            page = start + block * stride
            shard = GUARD + slot * self.slot_nbytes + self.offset
            yield slice(page, page + end - begin), slice(shard + begin, shard + end)

    def check(self, blocks: Sequence[int], slots: Sequence[int]) -> None:
        """Gather, change everything, scatter: both memories are the model's after each."""
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
    "one layer": World([4096], 40, 50),
    "32 layers": World([1024] * 32, 40, 50),
    "block outermost": World([1024] * 32, 40, 50, interleaved=True),
    "long pages": World([20000, 8192, 4160], 40, 50, offset=8),
    "odd pages": World([1, 4097, 3, 999], 40, 50, tail=5),
    "second of two ranks": World([512] * 8, 40, 50, offset=4096),
    "first of two ranks": World([512] * 8, 40, 50, tail=4096, interleaved=True),
}


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("blocks", [0, 1, 2, 40])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_the_pages_and_nothing_else(layout: str, blocks: int, threads: int) -> None:
    world = LAYOUTS[layout]
    world.threads = threads
    rng = np.random.default_rng(blocks)
    world.check(
        rng.permutation(world.blocks)[:blocks].tolist(),
        rng.permutation(world.slots)[:blocks].tolist(),
    )


@settings(deadline=None)
@given(st.data())
def test_copies_any_layout(data: st.DataObject) -> None:
    blocks, slots = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    world = World(
        data.draw(st.lists(st.integers(1, 3000) | st.integers(1, 20000), min_size=1, max_size=6)),
        blocks,
        slots,
        interleaved=data.draw(st.booleans()),
        offset=data.draw(st.integers(0, 100)),
        tail=data.draw(st.integers(0, 100)),
        threads=data.draw(st.integers(1, 4)),
    )
    some = data.draw(st.integers(0, min(blocks, slots)))
    world.check(
        data.draw(st.permutations(range(blocks)))[:some],
        data.draw(st.permutations(range(slots)))[:some],
    )


def test_a_copy_larger_than_the_threshold_is_shared_and_a_smaller_one_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World([4096, 8192], 8, 8, threads=3)
    copier = world.copier()
    shares: list[tuple[int, int]] = []
    monkeypatch.setattr(copier, "_copy_share", lambda *what: shares.append(what[-2:]))
    monkeypatch.setattr(cpu, "MIN_SHARED_NBYTES", 24576)
    copier.gather([0], [0])
    assert shares == [(0, 12288)]
    shares.clear()
    copier.gather([0, 1], [0, 1])  # as many bytes each, though pages are not of one size
    assert sorted(shares) == [(0, 8192), (8192, 16384), (16384, 24576)]
    copier.close()


def test_a_share_is_its_bytes_and_no_others() -> None:
    copy_share = cpu.compile_copy_share(frozenset())
    source, target = np.arange(1, 25, dtype=np.uint8), np.zeros(24, dtype=np.uint8)
    starts, strides, rows = np.array([0, 4]), np.array([12, 12]), np.array([0, 1])
    sides = [target.ctypes.data + starts, strides, source.ctypes.data + starts, strides]
    nbytes, turns = np.array([4, 8]), np.empty((0, 7), dtype=np.int64)
    copy_share(rows, rows, *sides, nbytes, turns, 6, 14)  # from within a page to within another
    np.testing.assert_array_equal(target[6:14], source[6:14])
    assert not target[:6].any()
    assert not target[14:].any()


def test_a_share_that_no_thread_has_begun_is_copied_by_the_caller() -> None:
    before = set(threading.enumerate())
    world = World([4096], 4, 4, threads=2)
    copier = world.copier()
    busy, go_on = threading.Event(), threading.Event()

    def occupy() -> None:
        busy.set()
        go_on.wait()

    for _ in range(2):
        copier._pool.submit(occupy)
    busy.wait()
    started = set(threading.enumerate()) - before
    with ThreadPoolExecutor(1) as caller:
        gathering = caller.submit(copier.gather, [1], [2])
        try:
            gathering.result(timeout=60)
        finally:
            go_on.set()
    copier.close()
    assert len(started) == 1
    (page, shard), *_ = world.ranges(1, 2)
    np.testing.assert_array_equal(world.slab[shard], world.engine[page])


BAD = {
    "block 4 does not exist: there are 4": (IndexError, [0, 4], [0, 1]),
    "block -1 does not exist": (IndexError, [-1, 0], [0, 1]),
    "slot 5 does not exist: there are 5": (IndexError, [0, 1], [0, 5]),
    "slot -2 does not exist": (IndexError, [0, 1], [-2, 1]),
    r"do not pair up": (ValueError, [0, 1], [0]),
}


@pytest.mark.parametrize("message", BAD)
def test_refuses_before_any_byte_moves(message: str) -> None:
    error, blocks, slots = BAD[message]
    world = World([100, 200], 4, 5)
    engine, slab = world.engine.copy(), world.slab.copy()
    copier = world.copier()
    with pytest.raises(error, match=message):
        copier.gather(blocks, slots)
    with pytest.raises(error, match=message):
        copier.scatter(slots, blocks)
    np.testing.assert_array_equal(world.engine, engine)
    np.testing.assert_array_equal(world.slab, slab)
    copier.close()


def test_refuses_two_copies_to_one_place_and_allows_two_from_one() -> None:
    world = World([100], 4, 4)
    copier = world.copier()
    slab = world.slab.copy()
    with pytest.raises(ValueError, match=r"a slot is the target of two copies: \[3, 3\]"):
        copier.gather([0, 1], [3, 3])
    np.testing.assert_array_equal(world.slab, slab)
    with pytest.raises(ValueError, match="a block is the target"):
        copier.scatter([0, 1], [2, 2])
    copier.gather([1, 1], [0, 3])
    for slot in (0, 3):
        (page, shard), *_ = world.ranges(1, slot)
        np.testing.assert_array_equal(world.slab[shard], world.engine[page])
    copier.close()


def test_blocks_exist_that_every_layer_has() -> None:
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
def test_refuses_a_shape_that_cannot_be(
    layers: list[int], options: dict[str, int], message: str
) -> None:
    threads = options.get("threads", 1)
    shape = {"slab_address": 0, "slots": 1, "slot_nbytes": 16} | options
    shape.pop("threads", None)
    with pytest.raises(ValueError, match=message):
        CpuCopier(CopyGeometry([BlockRun(0, n, n, 1) for n in layers], **shape), threads=threads)


def test_gather_and_scatter_at_the_same_time() -> None:
    world = World([999] * 16, 64, 64, interleaved=True, threads=2)
    copier = world.copier()
    engine, slab = world.engine.copy(), world.slab.copy()
    out, back = range(32), range(32, 64)
    together = threading.Barrier(4)

    def move(part: int) -> None:
        together.wait()
        mine = slice(part % 2, None, 2)
        for i in range(8):
            if part < 2:
                copier.gather(out[mine][i::8], out[mine][i::8])
            else:
                copier.scatter(back[mine][i::8], back[mine][i::8])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(move, range(4)))
    for block in out:
        for page, shard in world.ranges(block, block):
            slab[shard] = engine[page]
    for block in back:
        for page, shard in world.ranges(block, block):
            engine[page] = slab[shard]
    np.testing.assert_array_equal(world.engine, engine)
    np.testing.assert_array_equal(world.slab, slab)
    copier.close()


def test_close_ends_its_threads_and_refuses_what_comes_after() -> None:
    before = set(threading.enumerate())
    world = World([4096], 8, 8, threads=3)
    copier = world.copier()
    copier.gather(range(8), range(8))
    assert set(threading.enumerate()) - before
    copier.close()
    copier.close()
    assert set(threading.enumerate()) == before
    for move in (copier.gather, copier.scatter):
        with pytest.raises(RuntimeError, match="closed"):
            move([0], [0])


def test_one_thread_is_the_callers() -> None:
    before = set(threading.enumerate())
    world = World([4096], 8, 8, threads=1)
    copier = world.copier()
    copier.gather(range(8), range(8))
    assert set(threading.enumerate()) == before
    copier.close()


def test_close_waits_for_every_copy_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    copier = World([4096], 8, 8).copier()
    begun, go_on = ([threading.Event() for _ in range(2)] for _ in range(2))
    order = list[str]()

    def copy_share(slots: Sequence[int], *_what: object) -> None:
        begun[slots[0]].set()
        go_on[slots[0]].wait()
        order.append(f"copied {slots[0]}")

    def close() -> None:
        copier.close()
        order.append("closed")

    monkeypatch.setattr(copier, "_copy_share", copy_share)
    with ThreadPoolExecutor(3) as threads:
        copying = [threads.submit(copier.gather, [slot], [slot]) for slot in range(2)]
        for event in begun:
            event.wait()
        go_on[0].set()
        copying[0].result()
        closing = threads.submit(close)
        while not copier._closed:
            pass
        go_on[1].set()
        closing.result()
    assert order == ["copied 0", "copied 1", "closed"]
