"""Page copies against one contiguous copy of as many bytes with as many threads, in one run."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

pytest.importorskip("numba")

import numpy as np  # noqa: E402

from kvcache.connectors.pages import CpuCopier, Pages  # noqa: E402

LAYERS, PAGE, BLOCKS = 32, 64 << 10, 256  # 2 MiB a block, 512 MiB: far more than a cache holds
NBYTES = LAYERS * PAGE * BLOCKS
ROUNDS = 21
TARGET = 0.95

Copy = Callable[[], object]


@contextmanager
def contiguous(target: np.ndarray, source: np.ndarray, threads: int) -> Iterator[dict[str, Copy]]:
    """The plain copies to measure against, by name."""
    halves = list(
        zip(np.array_split(target, threads), np.array_split(source, threads), strict=True)
    )

    def with_numpy() -> None:
        futures = [pool.submit(np.copyto, *half) for half in halves[1:]]
        np.copyto(*halves[0])
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
    with contiguous(slab, engine, threads) as references:
        copies = references | {
            "gather": lambda: copier.gather(blocks, slots),
            "scatter": lambda: copier.scatter(slots, blocks),
        }
        times: dict[str, list[float]] = {name: [] for name in copies}
        for turn in range(ROUNDS + 2):
            for name in rng.permutation(list(copies)):
                taken = seconds(copies[name])
                if turn >= 2:  # the first rounds wake cores and threads
                    times[name].append(taken)
    copier.close()
    fastest = min(references, key=lambda name: float(np.median(times[name])))
    ratios = {
        name: float(np.median(np.divide(times[fastest], times[name])))
        for name in ("gather", "scatter")
    }
    with capsys.disabled():
        for name, taken in times.items():
            rate = NBYTES / 2**30 / float(np.median(taken))
            ratio = f"  {ratios[name]:.3f} of {fastest}" if name in ratios else ""
            print(f"\n{threads} thread(s)  {name:8} {rate:6.2f} GiB/s{ratio}", end="")
    for name, ratio in ratios.items():
        assert ratio >= TARGET, f"{name} reaches {ratio:.3f} of a contiguous {fastest} copy"
