"""The device copier on a real GPU, with each copy backend."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from kvcache.connectors.layout.placement import BlockRun
from kvcache.connectors.transfer.autotune import RUN_COUNTS, RUN_SIZES, CopyBackend, TrialSize
from kvcache.connectors.transfer.base import CopyGeometry
from kvcache.connectors.transfer.copy_batch import DIRECTIONS
from kvcache.connectors.transfer.cuda import CudaDevice, backends
from kvcache.connectors.transfer.device import DeviceCopier
from kvcache.slab import Slab

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

BLOCKS, SLOTS = 64, 48
SMALL_TRIAL = TrialSize(scratch_nbytes=2 << 20, rounds=2)  # a whole one takes seconds
LAYERS = {
    "64 KiB": [64 << 10] * 8,
    "4 KiB": [4 << 10] * 32,
    "several sizes": [16, 4096, 8208, 64 << 10, 656 * 64],
    "unaligned": [8, 1000, 4097],
}


@pytest.fixture(params=LAYERS)
def layers(request: pytest.FixtureRequest) -> list[int]:
    """The bytes of a page in each layer."""
    return LAYERS[request.param]


@pytest.fixture
def slab(layers: list[int]) -> Iterator[Slab]:
    slab = Slab.create(SLOTS, -(-sum(layers) // 4096) * 4096)
    yield slab
    slab.close()


@pytest.fixture(params=["memcpy-batch", "memcpy", "triton", "all, measured"])
def device(request: pytest.FixtureRequest) -> CudaDevice:
    """The GPU with one backend, or with all of them."""
    gpu = torch.device("cuda", 0)
    if request.param == "all, measured":
        return CudaDevice(gpu, trial_size=SMALL_TRIAL)
    backend: CopyBackend | None = backends.CopyPerRun()
    if request.param == "memcpy-batch":
        backend = backends.batched_copies()
    elif request.param == "triton":
        backend = backends.triton_kernel(gpu)
    if backend is None:
        pytest.skip(f"copy backend {request.param} is not available here")
    return CudaDevice(gpu, [backends.CopyPerRun(), backend], trial_size=SMALL_TRIAL)


def use_backend(device: CudaDevice) -> None:
    """Wait for the trial; if the device has two backends, let it choose the second one."""
    device.wait_for_trial()
    enabled = device.selector.enabled
    assert enabled == device.backends, "a backend was wrong, or raised"
    if len(enabled) == 2:
        default, backend = enabled
        seconds = {default: 1.0, backend: 0.1}
        device.selector.choose(dict.fromkeys(product(DIRECTIONS, RUN_COUNTS, RUN_SIZES), seconds))


@pytest.fixture
def pages(layers: list[int]) -> list[Any]:
    return [
        torch.randint(0, 256, (BLOCKS, page), dtype=torch.uint8, device="cuda") for page in layers
    ]


@pytest.fixture
def copier(slab: Slab, device: CudaDevice, pages: list[Any]) -> Iterator[DeviceCopier]:
    geometry = CopyGeometry(
        [BlockRun(layer.data_ptr(), layer.shape[1], layer.shape[1], BLOCKS) for layer in pages],
        slab_address=slab.address,
        slots=SLOTS,
        slot_nbytes=slab.slot_nbytes,
    )
    copier = DeviceCopier(geometry, device=device)
    slab.populate(copier.pin_slots)
    slab.wait_populated()
    use_backend(device)
    yield copier
    copier.close()


def wait(copy: Any) -> None:
    while not copy.done:
        pass


def block(pages: list[Any], number: int) -> bytes:
    """The pages of a block, as they lie in a slot."""
    return b"".join(layer[number].cpu().numpy().tobytes() for layer in pages)


def test_scatter_after_gather_restores_the_pages(
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
    for layer, expected in zip(pages, before, strict=True):
        assert torch.equal(layer[::2], expected[::2])
        assert not layer[1::2].any()


def test_fence_lets_a_store_finish_before_the_overwrite(
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


def test_scatter_is_visible_to_later_work(copier: DeviceCopier, pages: list[Any]) -> None:
    for turn in range(50):
        for layer in pages:
            layer.fill_(turn)
        wait(copier.gather([0], [0]))
        for layer in pages:
            layer.zero_()
        copier.scatter([0] * 32, list(range(1, 33)))
        read = [layer[1:33].clone() for layer in pages]
        assert all(bool((layer == turn).all()) for layer in read)


def test_many_copies_in_flight_keep_their_arguments_alive(
    copier: DeviceCopier, pages: list[Any], slab: Slab, layers: list[int]
) -> None:
    before = [block(pages, number) for number in range(SLOTS)]
    torch.cuda._sleep(100_000_000)
    copies = [copier.gather([number], [number]) for number in range(SLOTS) for _ in range(8)]
    for copy in copies:
        wait(copy)
    for slot, expected in enumerate(before):
        assert bytes(slab.view(slot)[: sum(layers)]) == expected
