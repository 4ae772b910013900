"""Blocks of every layout move as fast as memory: gather and scatter, of one contiguous copy.

In one run, in turns whose order alternates: all blocks gathered in random order, and as many bytes
copied by one `numpy.copyto` from memory like the engine's to a slab; then the other way. What is
compared is the median of the ratios of the turns, since the machine's speed changes between them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import c_uint8
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("numba")

import numpy as np
import torch

from kvcache.connectors.layout.placement import place
from kvcache.connectors.transfer.factory import Order, open_copier
from kvcache.slab import Slab, slot_nbytes_for
from tests.support.paged_caches import KINDS, LATENT, Geometry

pytestmark = pytest.mark.bench

# Of 32 layers; a block is 2 MiB of bf16 for 16 tokens, pages of K and V 32 KiB each. The blocks are
# no power of two, as in engines: all pages of a block would meet in the same lines of the caches.
G = Geometry(layers=32, blocks=67, tokens=16, heads=8, dim=128, dtype=torch.bfloat16)
ALL = KINDS | LATENT
BAR = 0.9
BAR_TURNED = 0.7
TURNS = 15


def seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


@contextmanager
def copies(name: str, order: Order, g: Geometry) -> Iterator[dict[str, Callable[[], object]]]:
    """A contiguous copy, a gather and a scatter of as many bytes."""
    kind = ALL[name]
    layers: list[Any] = kind.make(g)
    placement = place(layers, kind.layout)
    slab = Slab.create(g.blocks, slot_nbytes_for(placement.block_nbytes))
    slab.populate()
    slab.wait_populated()
    nbytes = placement.block_nbytes * g.blocks
    plain = torch.ones(nbytes, dtype=torch.uint8).numpy()  # numpy's own would be in huge pages
    other = Slab.create(g.blocks, placement.block_nbytes)
    other.populate()
    other.wait_populated()
    memory = (c_uint8 * nbytes).from_address(other.address)
    slotted = np.frombuffer(memoryview(memory), dtype=np.uint8)
    copier = open_copier(placement, slab, order=order)
    blocks = np.random.default_rng(1).permutation(g.blocks).tolist()
    slots = np.random.default_rng(2).permutation(g.blocks).tolist()
    try:
        yield {
            "copy out": lambda: np.copyto(slotted, plain),
            "gather": lambda: copier.gather(blocks, slots),
            "scatter": lambda: copier.scatter(slots, blocks),
            "copy in": lambda: np.copyto(plain, slotted),
        }
    finally:
        copier.close()
        slab.close()
        other.close()


def ratios(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Speeds, as shares of the contiguous copy's."""
    taken: dict[str, list[float]] = {"gather": [], "scatter": []}
    for turn in range(TURNS + 1):
        order = list(works.items())[:: 1 if turn % 2 else -1]
        spent = {name: seconds(work) for name, work in order}
        if turn:  # the first wakes cores, and touches memory for the first time
            taken["gather"].append(spent["copy out"] / spent["gather"])
            taken["scatter"].append(spent["copy in"] / spent["scatter"])
    return {name: statistics.median(found) for name, found in taken.items()}


@pytest.mark.parametrize("name", ALL)
def test_raw_pages_move_as_fast_as_memory(name: str) -> None:
    g = Geometry(**vars(G) | ({"heads": 1, "dim": 576, "blocks": 259} if name in LATENT else {}))
    with copies(name, "raw", g) as works:
        found = ratios(works)
    print({name: found})
    assert min(found.values()) >= BAR


@pytest.mark.parametrize("name", ALL)
def test_canonical_order_too(name: str) -> None:
    """Where K and V lie number by number, tokens first, they are turned in the caches."""
    g = Geometry(**vars(G) | ({"heads": 1, "dim": 576, "blocks": 259} if name in LATENT else {}))
    with copies(name, "canonical", g) as works:
        found = ratios(works)
    print({f"{name}, canonical": found})
    assert min(found.values()) >= (BAR_TURNED if name == "paged-attention" else BAR)
