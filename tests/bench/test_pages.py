"""Page copies against one contiguous copy of as many bytes with as many threads, in one run."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from statistics import median, quantiles

import pytest

pytest.importorskip("numba")

import numpy as np

from kvcache.connectors.pages import CpuCopier, Pages

LAYERS, PAGE, BLOCKS = 32, 64 << 10, 256  # 2 MiB a block, 512 MiB: far more than a cache holds
NBYTES = LAYERS * PAGE * BLOCKS
TRIALS = 7  # of every reference, to find the fastest
ROUNDS = 31
TARGET = 0.95

Copy = Callable[[], object]


@contextmanager
def contiguous(target: np.ndarray, source: np.ndarray, threads: int) -> Iterator[dict[str, Copy]]:
    """The plain copies to measure against, by name."""
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))

    def with_numpy() -> None:
        futures = [pool.submit(np.copyto, *part) for part in parts[1:]]
        np.copyto(*parts[0])
        for future in futures:
            future.result()

    with ThreadPoolExecutor(threads) as pool:
        copies: dict[str, Copy] = {"numpy": with_numpy}
        try:
            import torch
        except ImportError:
            yield copies
            return
        into, out_of = torch.from_numpy(target), torch.from_numpy(source)
        copies["torch"] = lambda: into.copy_(out_of)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        yield copies
        torch.set_num_threads(before)


def seconds(copy: Copy) -> float:
    begun = time.perf_counter()
    copy()
    return time.perf_counter() - begun


@pytest.mark.bench
@pytest.mark.parametrize("threads", [1, 2])
def test_as_fast_as_a_contiguous_copy(threads: int, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    engine, slab = (np.ones(NBYTES, dtype=np.uint8) for _ in range(2))
    region = BLOCKS * PAGE
    copier = CpuCopier(
        [Pages(engine.ctypes.data + layer * region, PAGE, PAGE, BLOCKS) for layer in range(LAYERS)],
        slab_address=slab.ctypes.data,
        slots=BLOCKS,
        slot_nbytes=LAYERS * PAGE,
        threads=threads,
    )
    blocks, slots = rng.permutation(BLOCKS).tolist(), rng.permutation(BLOCKS).tolist()
    rates = defaultdict[str, list[float]](list)
    copies: dict[str, Copy] = {
        "gather": lambda: copier.gather(blocks, slots),
        "scatter": lambda: copier.scatter(slots, blocks),
    }
    with contiguous(slab, engine, threads) as references:
        trials = {
            name: median(seconds(reference) for _ in range(TRIALS))
            for name, reference in references.items()
        }
        fastest = min(trials, key=lambda name: trials[name])
        ratios: dict[str, list[float]] = {name: [] for name in copies}
        for turn in range(ROUNDS):
            for name, copy in copies.items():
                # Side by side, so that what else the machine does falls on both; first in turns.
                if turn % 2:
                    reference, own = seconds(references[fastest]), seconds(copy)
                else:
                    own, reference = seconds(copy), seconds(references[fastest])
                ratios[name].append(reference / own)
                rates[name].append(NBYTES / 2**30 / own)
                rates[fastest].append(NBYTES / 2**30 / reference)
    copier.close()
    with capsys.disabled():
        print(f"\n{threads} thread(s): contiguous {fastest} {median(rates[fastest]):.2f} GiB/s")
        for name, paired in ratios.items():
            low, middle, high = quantiles(paired, n=4)
            print(
                f"  {name:7} {median(rates[name]):6.2f} GiB/s, {middle:.3f} of it"
                f" (quartiles {low:.3f} to {high:.3f})"
            )
    for name, paired in ratios.items():
        assert median(paired) >= TARGET, f"{name}: {median(paired):.3f} of a contiguous copy"
