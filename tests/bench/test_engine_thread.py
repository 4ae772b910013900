"""What copies on a device cost the engine's thread, apart from the device's own calls.

Both sides of each ratio are measured in turns, on a device that does nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("vllm")

import torch

from kvcache.connectors.layout.placement import BlockRun
from kvcache.connectors.transfer.base import CopyGeometry, Integers
from kvcache.connectors.transfer.device import DeviceCopier
from kvcache.connectors.vllm.messages import SlabShards, Step, Transfer
from kvcache.connectors.vllm.worker.side import WorkerSide
from kvcache.slab import Slab
from tests.support.played_engine import cache_config, full_attention
from tests.support.recording_worker import one_piece

pytestmark = [pytest.mark.bench, pytest.mark.engine]

LAYERS, BLOCKS, PAGE = 32, 512, 4096
ROUNDS = 40


class IdleStream:
    """A stream and an event on which everything is done at once, without any work."""

    def record(self) -> IdleStream:
        return self

    def wait_for(self, event: IdleStream) -> None: ...

    def copy(self, targets: Integers, sources: Integers, nbytes: Integers) -> None: ...

    def done(self) -> bool:
        return True

    def wait(self) -> None: ...

    def seconds_since(self, earlier: IdleStream) -> float:
        return 0.001


class IdleDevice:
    pci_address = ""

    def engine_stream(self) -> IdleStream:
        return IdleStream()

    def new_stream(self, *, background: bool = False) -> IdleStream:
        return IdleStream()

    def pin(self, address: int, nbytes: int) -> str:
        return ""

    def unpin(self, address: int) -> None: ...


def least_us(*contenders: Callable[[], object]) -> list[float]:
    """Return the least CPU time that each contender takes of this thread, measured in turns."""
    times: list[list[float]] = [[] for _ in contenders]
    for _ in range(ROUNDS):
        for contender, of in zip(contenders, times, strict=True):
            begin = time.thread_time()
            contender()
            of.append(time.thread_time() - begin)
    return [1e6 * min(of) for of in times]


class Worker:
    """A worker with steps that store one block for each of some requests."""

    def __init__(self) -> None:
        names = [f"layer.{number}" for number in range(LAYERS)]
        config = cache_config(full_attention(), layers=names)
        config.num_blocks = BLOCKS
        self.side = WorkerSide(config, (0, 0), 1, device=IdleDevice())
        pages = torch.zeros(LAYERS, BLOCKS, PAGE, dtype=torch.uint8)
        self.side.register(dict(zip(names, pages, strict=True)))
        self.slab = Slab.create(BLOCKS, LAYERS * PAGE)
        self.memory: SlabShards = one_piece(self.slab.descriptor, LAYERS * PAGE)
        self.number = 0

    def step(self, stores: int) -> None:
        self.number += 1
        transfers = [Transfer(at, [at], [at]) for at in range(stores)]
        step = Step(self.memory, stores=transfers, number=self.number, fresh=list(range(16)))
        self.side.fence(step)
        self.side.load(step, "PIECEWISE")
        self.side.store(step)
        self.side.take_received()
        self.side.take_failed_blocks()
        self.side.take_acks()


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    worker.step(1)  # attaches the slab
    yield worker
    worker.side.close()
    worker.slab.close()


@pytest.mark.parametrize("stores", [16, 256])
def test_stores_of_a_step_cost_a_fifth_of_as_many_single_ones(worker: Worker, stores: int) -> None:
    """256 running requests complete 16 blocks of 16 tokens a step on average, 256 at most."""

    def one_by_one() -> None:
        for _ in range(stores):
            worker.step(1)

    together, single = least_us(lambda: worker.step(stores), one_by_one)
    print(f"{stores} stores: {together:.0f} us in one step, {single:.0f} us in {stores} steps")
    assert together < single / 5


@pytest.mark.parametrize("announced", [(), range(80)], ids=["store", "layer-wise load"])
def test_addresses_with_blocks_outermost_cost_three_quarters_of_others(announced: range) -> None:
    """A prefill of 8,192 tokens: 512 blocks, 80 layers of 8 KiB."""
    layers, page, blocks = 80, 8192, 512
    copiers = []
    for outermost in (True, False):
        step, stride = (page, layers * page) if outermost else (blocks * page, page)
        runs = [BlockRun(1 + at * step, page, stride, blocks, at) for at in range(layers)]
        geometry = CopyGeometry(runs, slab_address=0, slots=blocks, slot_nbytes=layers * page)
        copiers.append(DeviceCopier(geometry, device=IdleDevice()))
    numbers = list(range(blocks))

    def copy_with(copier: DeviceCopier) -> Callable[[], object]:
        if announced:
            return lambda: copier.scatter(numbers, numbers, announced=announced)
        return lambda: copier.gather(numbers, numbers)

    merged, separate = least_us(*map(copy_with, copiers))
    print(f"{merged:.0f} us with blocks outermost, {separate:.0f} us with layers outermost")
    assert merged < 0.75 * separate
