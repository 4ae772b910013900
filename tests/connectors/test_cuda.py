"""The copier on a real GPU: what the worst of devices has shown of the order, once more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from kvcache.connectors.copier import Sides
from kvcache.connectors.device import DeviceCopier
from kvcache.connectors.placement import Pages
from kvcache.slab import Slab

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

LAYERS, BLOCKS, PAGE, SLOTS = 8, 64, 64 << 10, 48


@pytest.fixture
def slab() -> Iterator[Slab]:
    with_slots = Slab.create(SLOTS, LAYERS * PAGE)
    yield with_slots
    with_slots.close()


@pytest.fixture(params=["vllm", "by page"])
def device(request: pytest.FixtureRequest) -> Any:
    from kvcache.connectors import cuda

    found = cuda.Cuda(torch.device("cuda", 0))
    if request.param == "by page":
        found._copy = cuda._by_page
    elif cuda._batched() is None:
        pytest.skip("no vLLM for CUDA here")
    return found


@pytest.fixture
def pages() -> Any:
    return torch.randint(0, 256, (LAYERS, BLOCKS, PAGE), dtype=torch.uint8, device="cuda")


@pytest.fixture
def copier(slab: Slab, device: Any, pages: Any) -> Iterator[DeviceCopier]:
    sides = Sides(
        [Pages(layer.data_ptr(), PAGE, PAGE, BLOCKS) for layer in pages],
        slab_address=slab.address,
        slots=SLOTS,
        slot_nbytes=slab.slot_nbytes,
    )
    made = DeviceCopier(sides, device)
    slab.populate(made.ready)
    slab.wait_populated()
    yield made
    made.close()


def wait(copy: Any) -> None:
    while not copy.over:
        pass


def test_pages_come_back_as_they_were(copier: DeviceCopier, pages: Any, slab: Slab) -> None:
    before = pages.clone()
    blocks, slots = list(range(0, BLOCKS, 2)), list(range(BLOCKS // 2))
    stored = copier.gather(blocks, slots)
    wait(stored)
    assert stored.seconds > 0
    for block, slot in zip(blocks, slots, strict=True):
        assert bytes(slab.view(slot)) == before[:, block].cpu().numpy().tobytes()
    copier.fence(blocks)
    pages.zero_()
    wait(copier.scatter(slots, blocks))
    torch.cuda.synchronize()
    assert torch.equal(pages[:, ::2], before[:, ::2])
    assert not pages[:, 1::2].any()


def test_what_is_written_anew_is_stored_as_it_was(
    copier: DeviceCopier, pages: Any, slab: Slab
) -> None:
    for turn in range(50):
        pages.fill_(turn)
        stored = copier.gather(list(range(SLOTS)), list(range(SLOTS)))
        copier.fence(range(BLOCKS))
        pages.fill_(255)
        wait(stored)
        assert all(
            not memoryview(slab.view(slot)).tobytes().strip(bytes([turn])) for slot in range(SLOTS)
        )


def test_what_is_loaded_is_there_for_what_comes_after(copier: DeviceCopier, pages: Any) -> None:
    for turn in range(50):
        pages.fill_(turn)
        wait(copier.gather([0], [0]))
        pages.zero_()
        copier.scatter([0] * 32, list(range(1, 33)))
        seen = pages[:, 1:33].clone()
        assert bool((seen == turn).all())
