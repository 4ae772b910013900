"""The Triton kernel: interpreted on this process's memory, and compiled for GPUs."""

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
from kvcache.connectors.transfer.copy_batch import CopyBatch, Direction

SOURCE = Path(kvcache.connectors.__file__).parent / "transfer" / "cuda" / "triton_kernel.py"
KIB = 1024


def load(interpreted: bool) -> ModuleType:
    """Import the module again. TRITON_INTERPRET counts when it is imported."""
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


class RandomRuns:
    """Runs in two random memories, and what the target must contain after the copy."""

    def __init__(self, seed: int, sizes: list[int], unit: int) -> None:
        random, rng = Random(seed), np.random.default_rng(seed)
        room = sum(sizes) + (len(sizes) + 2) * 4 * unit + 64
        self.source = rng.integers(0, 256, room, dtype=np.uint8)
        self.target = rng.integers(0, 256, room, dtype=np.uint8)
        self.expected = self.target.copy()
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
            self.expected[to : to + size] = self.source[at : at + size]
        numbers = range(len(sizes))
        self.batch = CopyBatch(
            np.array([places["target"][run] for run in numbers]) + self.target.ctypes.data,
            np.array([places["source"][run] for run in numbers]) + self.source.ctypes.data,
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
def test_kernel_copies_the_runs_and_nothing_else(
    interpreted: Any, seed: int, sizes: list[int]
) -> None:
    memories = RandomRuns(seed, sizes, unit=16)
    kernel = interpreted.TritonKernel(torch.from_numpy)
    assert kernel.supports(memories.batch)
    kernel.copy(memories.batch)
    assert (memories.target == memories.expected).all()


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2**32),
    st.lists(st.integers(1, 256 * KIB), min_size=1, max_size=8),
    st.booleans(),
)
def test_kernel_supports_only_multiples_of_16_bytes(
    interpreted: Any, seed: int, sizes: list[int], aligned: bool
) -> None:
    sizes = [size + -size % 16 for size in sizes] if aligned else sizes
    batch = RandomRuns(seed, sizes, unit=1).batch
    ends = np.concatenate((batch.targets, batch.sources, batch.nbytes))
    assert interpreted.TritonKernel(torch.from_numpy).supports(batch) == (not (ends % 16).any())


@pytest.mark.parametrize("column", ["targets", "sources", "nbytes"])
def test_kernel_with_one_unaligned_run_refuses_the_batch(interpreted: Any, column: str) -> None:
    batch = RandomRuns(0, [4 * KIB] * 20, unit=16).batch
    kernel = interpreted.TritonKernel(torch.from_numpy)
    assert kernel.supports(batch)
    getattr(batch, column)[7] += 8
    assert not kernel.supports(batch)


@pytest.mark.parametrize("direction", ["load", "store", None])
def test_kernel_supports_only_pinned_memory(interpreted: Any, direction: Direction | None) -> None:
    pinned = RandomRuns(0, [4 * KIB], unit=16).batch
    batch = CopyBatch(pinned.targets, pinned.sources, pinned.nbytes, direction)
    assert interpreted.TritonKernel(torch.from_numpy).supports(batch) == (direction is not None)


def test_compiled_is_false_when_interpreted(interpreted: Any, compiled: Any) -> None:
    assert compiled.compiled()
    assert not interpreted.compiled()


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernel_compiled_for_a_gpu_moves_16_bytes_at_a_time(
    compiled: Any, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton warns without it
    source = triton.compiler.ASTSource(
        fn=compiled.copy_runs,
        signature={"table": "*i64", "runs": "i32", "chunks": "i32", "chunk": "constexpr"},
        constexprs={"chunk": compiled.CHUNK_WORDS},
    )
    compiled_kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assembly = compiled_kernel.asm["ptx"]
    assert "ld.global.v2.b64" in assembly
    assert "st.global.v2.b64" in assembly
    assert "st.global.b64" not in assembly
    assert compiled_kernel.asm["cubin"]


def test_kernel_arguments_that_vary_are_not_specialized(compiled: Any) -> None:
    """A specialized argument would compile another kernel during an engine's step."""
    specialized = {each.name for each in compiled.copy_runs.params if not each.do_not_specialize}
    assert specialized == {"chunk"}
