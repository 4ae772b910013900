"""The copier on a real GPU: what the worst of devices has shown of the order, once more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from kvcache.connectors.layout.placement import BlockRun
from kvcache.connectors.transfer.autotune import DIRECTIONS, RUN_SIZES, CopyBackend
from kvcache.connectors.transfer.base import CopyGeometry
from kvcache.connectors.transfer.cuda import CudaDevice, backends
from kvcache.connectors.transfer.device import DeviceCopier
from kvcache.slab import Slab

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

BLOCKS, SLOTS = 64, 48
LAYERS = {
    "pages of 64 KiB": [64 << 10] * 8,
    "of 4 KiB": [4 << 10] * 32,
    "of several sizes": [16, 4096, 8208, 64 << 10, 656 * 64],
    "of odd ones": [8, 1000, 4097],
}


@pytest.fixture(params=LAYERS)
def layers(request: pytest.FixtureRequest) -> list[int]:
    """Bytes of a page of every layer."""
    return LAYERS[request.param]


@pytest.fixture
def slab(layers: list[int]) -> Iterator[Slab]:
    with_slots = Slab.create(SLOTS, -(-sum(layers) // 4096) * 4096)
    yield with_slots
    with_slots.close()


@pytest.fixture(params=["batched", "by page", "kernel", "all, tried"])
def device(request: pytest.FixtureRequest) -> CudaDevice:
    """The GPU with one mechanism, or with all of them."""
    gpu = torch.device("cuda", 0)
    if request.param == "all, tried":
        return CudaDevice(gpu)
    only: CopyBackend | None = backends.CopyPerRun()
    if request.param != "by page":
        only = (
            backends.batched_copies() if request.param == "batched" else backends.triton_kernel(gpu)
        )
    if only is None:
        pytest.skip(f"copies {request.param} cannot be had here")
    return CudaDevice(gpu, [backends.CopyPerRun(), only])


def used(device: CudaDevice) -> None:
    """Wait for the trial; where one mechanism is to be looked at, have it be the best."""
    device.wait_for_trial()
    left = device.selector.enabled
    assert left == device.backends, "one was wrong, or raised"
    if len(left) == 2:
        first, only = left
        device.selector.choose(
            {
                (direction, size): {first: 1.0, only: 0.1}
                for direction in DIRECTIONS
                for size in RUN_SIZES
            }
        )


@pytest.fixture
def pages(layers: list[int]) -> list[Any]:
    return [
        torch.randint(0, 256, (BLOCKS, page), dtype=torch.uint8, device="cuda") for page in layers
    ]


@pytest.fixture
def copier(slab: Slab, device: CudaDevice, pages: list[Any]) -> Iterator[DeviceCopier]:
    sides = CopyGeometry(
        [BlockRun(layer.data_ptr(), layer.shape[1], layer.shape[1], BLOCKS) for layer in pages],
        slab_address=slab.address,
        slots=SLOTS,
        slot_nbytes=slab.slot_nbytes,
    )
    made = DeviceCopier(sides, device)
    slab.populate(made.pin_slots)
    slab.wait_populated()
    used(device)
    yield made
    made.close()


def wait(copy: Any) -> None:
    while not copy.done:
        pass


def block(pages: list[Any], number: int) -> bytes:
    """The pages of a block, as they lie in a slot."""
    return b"".join(layer[number].cpu().numpy().tobytes() for layer in pages)


def test_pages_come_back_as_they_were(
    copier: DeviceCopier, pages: list[Any], slab: Slab, layers: list[int]
) -> None:
    before = [layer.clone() for layer in pages]
    blocks, slots = list(range(0, BLOCKS, 2)), list(range(BLOCKS // 2))
    stored = copier.gather(blocks, slots)
    wait(stored)
    assert stored.seconds > 0
    for number, slot in zip(blocks, slots, strict=True):
        assert bytes(slab.view(slot)[: sum(layers)]) == block(before, number)
    copier.fence(blocks)
    for layer in pages:
        layer.zero_()
    wait(copier.scatter(slots, blocks))
    torch.cuda.synchronize()
    for layer, right in zip(pages, before, strict=True):
        assert torch.equal(layer[::2], right[::2])
        assert not layer[1::2].any()


def test_what_is_written_anew_is_stored_as_it_was(
    copier: DeviceCopier, pages: list[Any], slab: Slab, layers: list[int]
) -> None:
    for turn in range(50):
        for layer in pages:
            layer.fill_(turn)
        stored = copier.gather(list(range(SLOTS)), list(range(SLOTS)))
        copier.fence(range(BLOCKS))
        for layer in pages:
            layer.fill_(255)
        wait(stored)
        assert all(
            not slab.view(slot)[: sum(layers)].tobytes().strip(bytes([turn]))
            for slot in range(SLOTS)
        )


def test_what_is_loaded_is_there_for_what_comes_after(
    copier: DeviceCopier, pages: list[Any]
) -> None:
    for turn in range(50):
        for layer in pages:
            layer.fill_(turn)
        wait(copier.gather([0], [0]))
        for layer in pages:
            layer.zero_()
        copier.scatter([0] * 32, list(range(1, 33)))
        seen = [layer[1:33].clone() for layer in pages]
        assert all(bool((layer == turn).all()) for layer in seen)


def test_many_copies_are_begun_before_the_first_is_over(
    copier: DeviceCopier, pages: list[Any], slab: Slab, layers: list[int]
) -> None:
    """What a copy is told by is kept until it has been read."""
    before = [block(pages, number) for number in range(SLOTS)]
    torch.cuda._sleep(100_000_000)
    copies = [copier.gather([number], [number]) for number in range(SLOTS) for _ in range(8)]
    for copy in copies:
        wait(copy)
    for slot, right in enumerate(before):
        assert bytes(slab.view(slot)[: sum(layers)]) == right
