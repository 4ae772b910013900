"""The kernel that copies: interpreted on this processor's memory, and compiled for GPUs."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from itertools import accumulate
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")  # comes with vLLM for CPU, on x86-64

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcache.connectors
from kvcache.connectors.transfer.autotune import CopyBatch, Direction

SOURCE = Path(kvcache.connectors.__file__).parent / "transfer" / "cuda" / "triton_kernel.py"
KIB = 1024


def load(interpreted: bool) -> ModuleType:
    """The kernel's module, once more: how it runs is settled when it is imported."""
    name = "interpreted_kernel" if interpreted else "compiled_kernel"
    spec = spec_from_file_location(name, SOURCE)
    assert spec
    assert spec.loader
    module = sys.modules[name] = module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", str(int(interpreted)))
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def interpreted() -> Any:
    return load(interpreted=True)


@pytest.fixture(scope="module")
def compiled() -> Any:
    return load(interpreted=False)


class Sides:
    """Two runs of memory, and what the target's should be."""

    def __init__(self, seed: int, sizes: list[int], unit: int) -> None:
        random, rng = Random(seed), np.random.default_rng(seed)
        room = sum(sizes) + (len(sizes) + 2) * 4 * unit + 64
        self.source = rng.integers(0, 256, room, dtype=np.uint8)
        self.target = rng.integers(0, 256, room, dtype=np.uint8)
        self.right = self.target.copy()
        places = {}
        for name, side in (("source", self.source), ("target", self.target)):
            order = random.sample(range(len(sizes)), len(sizes))
            gaps = [unit * random.randrange(4) for _ in order]
            ends = accumulate(gap + sizes[run] for gap, run in zip(gaps, order, strict=True))
            first = -side.ctypes.data % 16
            places[name] = {
                run: first + end - sizes[run] for run, end in zip(order, ends, strict=True)
            }
        for run, size in enumerate(sizes):
            to, at = places["target"][run], places["source"][run]
            self.right[to : to + size] = self.source[at : at + size]
        each = range(len(sizes))
        self.runs = CopyBatch(
            np.array([places["target"][run] for run in each]) + self.target.ctypes.data,
            np.array([places["source"][run] for run in each]) + self.source.ctypes.data,
            np.array(sizes, dtype=np.int64),
            random.choice(["load", "store"]),
        )


SIZES = st.one_of(
    st.integers(1, 16).map(lambda words: 16 * words),
    st.integers(1, 4 * KIB).map(lambda words: 16 * words),
    st.sampled_from([4 * KIB, 8 * KIB, 8 * KIB + 16, 16 * KIB - 16, 64 * KIB, 256 * KIB]),
)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.lists(SIZES, min_size=1, max_size=24))
def test_runs_are_copied_and_nothing_else(interpreted: Any, seed: int, sizes: list[int]) -> None:
    sides = Sides(seed, sizes, unit=16)
    kernel = interpreted.TritonKernel(torch.from_numpy)
    assert kernel.supports(sides.runs)
    kernel.copy(sides.runs)
    assert (sides.target == sides.right).all()


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2**32),
    st.lists(st.integers(1, 256 * KIB), min_size=1, max_size=8),
    st.booleans(),
)
def test_what_is_not_of_16_bytes_is_left_to_others(
    interpreted: Any, seed: int, sizes: list[int], aligned: bool
) -> None:
    sizes = [size + -size % 16 for size in sizes] if aligned else sizes
    runs = Sides(seed, sizes, unit=1).runs
    ends = np.concatenate((runs.targets, runs.sources, runs.nbytes))
    assert interpreted.TritonKernel(torch.from_numpy).supports(runs) == (not (ends % 16).any())


@pytest.mark.parametrize("column", ["targets", "sources", "nbytes"])
def test_one_odd_address_or_size_is_seen(interpreted: Any, column: str) -> None:
    runs = Sides(0, [4 * KIB] * 20, unit=16).runs
    kernel = interpreted.TritonKernel(torch.from_numpy)
    assert kernel.supports(runs)
    getattr(runs, column)[7] += 8
    assert not kernel.supports(runs)


@pytest.mark.parametrize("direction", ["load", "store", None])
def test_what_may_not_be_pinned_is_left_to_others(
    interpreted: Any, direction: Direction | None
) -> None:
    of = Sides(0, [4 * KIB], unit=16).runs
    runs = CopyBatch(of.targets, of.sources, of.nbytes, direction)
    assert interpreted.TritonKernel(torch.from_numpy).supports(runs) == (direction is not None)


def test_it_says_whether_it_is_compiled(interpreted: Any, compiled: Any) -> None:
    assert compiled.compiled()
    assert not interpreted.compiled()


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_a_gpu_moves_16_bytes_at_a_time(
    compiled: Any, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # or it warns, of what is not used here
    source = triton.compiler.ASTSource(
        fn=compiled.copy_runs,
        signature={"table": "*i64", "runs": "i32", "chunks": "i32", "chunk": "constexpr"},
        constexprs={"chunk": compiled.CHUNK_WORDS},
    )
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assembly = made.asm["ptx"]
    assert "ld.global.v2.b64" in assembly
    assert "st.global.v2.b64" in assembly
    assert "st.global.b64" not in assembly
    assert made.asm["cubin"]


def test_nothing_is_compiled_anew_for_another_copy(compiled: Any) -> None:
    """A specialized argument makes another kernel of it, in the middle of an engine's step."""
    special = {each.name for each in compiled.copy_runs.params if not each.do_not_specialize}
    assert special == {"chunk"}
