"""PagedCache over tensors on a GPU.

As a rehearsal, each test also runs over tensors on the CPU, copied by the CPU, and by the device
copier on a simulated CUDA device.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from kvcache.connectors import paged
from kvcache.connectors.layout.axes import LayoutError
from kvcache.connectors.paged import PagedCache, SaveResult
from kvcache.connectors.transfer.autotune import TrialSize
from kvcache.connectors.transfer.cuda import CudaDevice
from kvcache.connectors.transfer.cuda.backends import BatchedCopies, CopyPerRun
from kvcache.connectors.transfer.cuda.driver import DriverBatch
from kvcache.connectors.transfer.factory import Order
from tests.support import played_cuda
from tests.support.engine_caches import SMALL, EngineCache, chain_keys
from tests.support.paged_caches import (
    KINDS,
    LATENT,
    Geometry,
    fill,
    keys_and_values,
    l1_stack,
    overwrite,
    same_blocks,
)

GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
    ],
)
SMALL_TRIAL = TrialSize(scratch_nbytes=512 << 10, runs=16, rounds=1)

# As a model has them: blocks of 2 MiB, with pages of 64 KiB.
LARGE = Geometry(layers=32, blocks=64, tokens=16, heads=8, dim=128)


@pytest.fixture(params=["cpu", "simulated", GPU])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device of the tensors."""
    if request.param == "cuda":
        return "cuda"
    if request.param == "cpu":
        pytest.importorskip("numba")
    else:
        played_cuda.install(played_cuda.FakeRuntime(), monkeypatch)
        batched = BatchedCopies(DriverBatch(played_cuda.FakeDriver()))
        cuda = CudaDevice(played_cuda.DEVICE, (batched, CopyPerRun()), trial_size=SMALL_TRIAL)
        monkeypatch.setattr(paged, "device_of", lambda placement: cuda)
    return "cpu"


@pytest.fixture
def small_trial(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a GPU try its copy backends with few bytes: a whole trial takes seconds."""
    if device == "cuda":
        gpu = CudaDevice(torch.device("cuda", 0), trial_size=SMALL_TRIAL)
        monkeypatch.setattr(paged, "device_of", lambda placement: gpu)


@pytest.fixture(params=["raw", "canonical"])
def order(request: pytest.FixtureRequest) -> Any:
    return request.param


def sizes(name: str, device: str) -> Geometry:
    """Return the sizes of a small cache of a kind. A latent has one head."""
    return replace(SMALL, device=device, heads=1 if name in LATENT else SMALL.heads)


@pytest.mark.usefixtures("small_trial")
@pytest.mark.parametrize("name", KINDS | LATENT)
def test_load_after_a_wipe_restores_every_bit(name: str, order: Order, device: str) -> None:
    engine, keys = EngineCache(name, order, sizes(name, device)), chain_keys(5)
    before, stored, loaded = engine.contents, [4, 2, 7, 0, 5], [1, 3, 5, 6, 0]
    others = [2, 4, 7]
    with l1_stack(engine.cache.block_nbytes) as stack, engine.attach(stack) as attached:
        assert attached.save(stored, keys) == SaveResult(stored=5, known=0, declined=0)
        overwrite(engine.layers)
        wiped = engine.contents
        assert attached.load(keys, loaded) == 5
        assert same_blocks(engine.contents, loaded, before, stored)
        assert same_blocks(engine.contents, others, wiped, others)


@pytest.mark.parametrize("name", ["packed", "packed, layers interleaved", "kv-first"])
def test_save_and_load_keep_the_order_of_the_current_stream(
    name: str, order: Order, device: str
) -> None:
    """Only the streams order `save` and `load` with the writes before and the reads after them."""
    g = replace(LARGE if device == "cuda" else SMALL, blocks=64, device=device)
    engine = EngineCache(name, order, g)
    ids, others = list(range(0, 32, 2)), list(range(33, 64, 2))
    with l1_stack(engine.cache.block_nbytes, 64) as stack, engine.attach(stack) as attached:
        for seed in range(3):
            keys = chain_keys(len(ids), first=seed * 10_000)
            fill(engine.layers, seed)
            before = keys_and_values(engine.kind, engine.layers)
            assert attached.save(ids, keys).stored == len(ids)
            overwrite(engine.layers)
            assert attached.load(keys, others) == len(others)
            assert same_blocks(engine.contents, others, before, ids)


def test_order_with_too_many_runs_is_refused_on_a_device(device: str) -> None:
    kind = KINDS["paged-attention"]
    layers = kind.make(replace(LARGE, layers=1, blocks=2, tokens=256, device=device))
    if device == "cpu":
        assert PagedCache(layers, kind.layout, order="canonical").block_nbytes
        return
    with pytest.raises(LayoutError, match="runs of 16 bytes; at most 4096"):
        PagedCache(layers, kind.layout, order="canonical")
