"""Loads of announced layers on a real GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("torch")

import torch

from kvcache.connectors.layout.placement import BlockRun
from kvcache.connectors.transfer import device as device_module
from kvcache.connectors.transfer.base import CopyGeometry
from kvcache.connectors.transfer.device import DeviceCopier
from kvcache.slab import Slab

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

LAYERS, BLOCKS, PAGE = 16, 33, 256 << 10
LOADED = list(range(1, BLOCKS))


@pytest.fixture(params=[1, 8 << 20], ids=["one call per layer", "few calls"])
def copier(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, pages: torch.Tensor
) -> Iterator[DeviceCopier]:
    from kvcache.connectors.transfer.cuda import CudaDevice

    monkeypatch.setattr(device_module, "MIN_CALL_NBYTES", request.param)
    slab = Slab.create(1, LAYERS * PAGE)
    geometry = CopyGeometry(
        [BlockRun(layer.data_ptr(), PAGE, PAGE, BLOCKS, at) for at, layer in enumerate(pages)],
        slab_address=slab.address,
        slots=1,
        slot_nbytes=slab.slot_nbytes,
    )
    copier = DeviceCopier(geometry, device=CudaDevice(torch.device("cuda", 0)))
    slab.populate(copier.pin_slots)
    slab.wait_populated()
    yield copier
    copier.close()
    slab.close()


@pytest.fixture
def pages() -> torch.Tensor:
    return torch.zeros((LAYERS, BLOCKS, PAGE), dtype=torch.uint8, device="cuda")


def test_wait_for_layer_makes_its_pages_visible(copier: DeviceCopier, pages: torch.Tensor) -> None:
    other = torch.cuda.Stream()
    for turn in range(20):
        pages.fill_(turn)
        copier.gather([0], [0]).wait()
        pages.zero_()
        copier.scatter(len(LOADED) * [0], LOADED, announced=range(LAYERS))
        other.wait_stream(torch.cuda.current_stream())
        read = []
        for layer in range(LAYERS):
            for stream in (torch.cuda.current_stream(), other):
                with torch.cuda.stream(stream):
                    copier.wait_for_layer(layer)
                    read.append(pages[layer, 1:].clone())
        torch.cuda.synchronize()
        assert all(bool((page == turn).all()) for page in read)
        copier.fence(LOADED)


def test_fence_waits_for_layers_that_the_step_skipped(
    copier: DeviceCopier, pages: torch.Tensor
) -> None:
    for turn in range(20):
        pages.fill_(turn)
        copier.gather([0], [0]).wait()
        copier.scatter(len(LOADED) * [0], LOADED, announced=range(LAYERS))
        copier.wait_for_layer(0)
        copier.fence(LOADED)
        pages[:, 1:].fill_(255)
        torch.cuda.synchronize()
        assert bool((pages[:, 1:] == 255).all())
