"""Measure this machine's memory, and how fast L1 stores, loads and looks up blocks on it.

Each round makes a contiguous copy of an engine's memory into a slab, then stores blocks into L1 and
loads them with the code that an engine's worker and scheduler use (reserve or fetch, page copies,
end of the lease). A block has 32 layers of 64 KiB, 2 MiB. Rates are medians, in GiB of payload per
second.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvcache.stack import Stack

LAYERS, PAGE = 32, 64 << 10
BLOCK = LAYERS * PAGE
PER_STEP = 32  # blocks stored at a time: a prefill chunk of 1,024 tokens
PROMPT = 1024  # blocks of the prompt that `match` looks up
SMALL = 4096  # bytes of a block that is not copied


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `kvcache bench`."""
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON object")
    add("--threads", type=int, default=os.cpu_count() or 1, help="threads of a copy (all cores)")
    add("--blocks", type=int, default=256, help="blocks of 2 MiB in each round (256)")
    add("--rounds", type=int, default=9, help="rounds to measure (9)")


def run(args: argparse.Namespace) -> int:
    """Measure and print; return 2 for invalid arguments."""
    for name, largest in _LARGEST.items():
        if not 1 <= getattr(args, name) <= largest:
            print(f"--{name} is {getattr(args, name)}; it must be 1 to {largest}", file=sys.stderr)
            return 2
    figures = measure(threads=args.threads, blocks=args.blocks, rounds=args.rounds)
    if args.json:
        print(json.dumps(figures))
        return 0
    for name, value in figures.items():
        print(f"{name:22} {value:10.3f}")
    copy_rate = figures["memcpy_gib_s"]
    ratios = (f"{name} {figures[f'{name}_gib_s'] / copy_rate:.2f}" for name in _OPERATIONS)
    print(f"\nrelative to a contiguous copy with {args.threads} threads: {', '.join(ratios)}")
    return 0


_LARGEST = {"threads": 1024, "blocks": 1 << 20, "rounds": 10_000}
_OPERATIONS = ("store", "load", "cold_store")


def measure(*, threads: int, blocks: int, rounds: int) -> dict[str, float]:
    """Return all figures by name: `*_gib_s`, `*_us_per_block`, `import_ms`."""
    return copies(threads, blocks, rounds) | bookkeeping(rounds) | {"import_ms": import_ms(rounds)}


def copies(threads: int, blocks: int, rounds: int) -> dict[str, float]:
    """Measure contiguous copies, stores, loads, and stores into a new L1, in GiB per second."""
    from concurrent.futures import ThreadPoolExecutor
    from ctypes import c_uint8

    import numpy as np

    from kvcache.connectors.layout.placement import BlockRun
    from kvcache.connectors.transfer.base import CopyGeometry
    from kvcache.connectors.transfer.cpu import CpuCopier
    from kvcache.sizes import Size
    from kvcache.slab import Slab
    from kvcache.stack import Stack
    from kvcache.tiers.dram import DramTier

    # Like an engine's cache, the memory is aligned to 64 bytes, as torch allocates it, and the
    # distance between layers is not a power of two. Otherwise copies into it are slower: without
    # the alignment up to a fifth, without the distance up to half.
    layer_nbytes = (blocks + 3) * PAGE
    unaligned = np.ones(LAYERS * layer_nbytes + 64, dtype=np.uint8)
    engine = unaligned[-unaligned.ctypes.data % 64 :]
    layers = [
        BlockRun(engine.ctypes.data + layer * layer_nbytes, PAGE, PAGE, blocks)
        for layer in range(LAYERS)
    ]
    target = Slab.create(blocks, BLOCK)
    target.populate()
    target.wait_populated()
    memory = (c_uint8 * target.nbytes).from_address(target.address)
    contiguous = np.frombuffer(memoryview(memory), dtype=np.uint8)
    areas = (contiguous, engine[: contiguous.size])
    parts = list(zip(*(np.array_split(area, threads) for area in areas), strict=True))

    def open_l1() -> tuple[Stack, CpuCopier]:
        tier = DramTier(block_nbytes=BLOCK, capacity=Size(blocks * BLOCK))
        tier.slab.wait_populated()
        geometry = CopyGeometry(
            layers,
            slab_address=tier.slab.address,
            slots=tier.slab.slots,
            slot_nbytes=tier.slab.slot_nbytes,
        )
        return Stack(tier, profile="bench"), CpuCopier(geometry, threads=threads)

    def memcpy() -> None:
        futures = [pool.submit(np.copyto, *part) for part in parts[1:]]
        np.copyto(*parts[0])
        for future in futures:
            future.result()

    def store(stack: Stack, copier: CpuCopier, keys: list[bytes]) -> None:
        for first in range(0, blocks, PER_STEP):
            parent = keys[first - 1] if first else None
            with stack.reserve(keys[first : first + PER_STEP], parent) as lease:
                copier.gather([first + position for position in lease.positions], lease.slots)

    def load(stack: Stack, copier: CpuCopier, keys: list[bytes]) -> None:
        with stack.fetch(stack.match(keys).result()).result() as lease:
            copier.scatter(lease.slots, range(len(lease)))

    times: dict[str, list[float]] = {name: [] for name in ("memcpy", *_OPERATIONS)}
    warm, warm_copier = open_l1()
    with ThreadPoolExecutor(threads) as pool:
        for number in range(rounds + 1):
            keys = new_chain(blocks)
            warm.clear()
            fresh, fresh_copier = open_l1()
            round_times = {
                "memcpy": seconds(memcpy),
                "cold_store": seconds(lambda: store(fresh, fresh_copier, keys)),  # noqa: B023
                "store": seconds(lambda: store(warm, warm_copier, keys)),  # noqa: B023
                "load": seconds(lambda: load(warm, warm_copier, keys)),  # noqa: B023
            }
            fresh_copier.close()
            fresh.close()
            if number:  # the first round starts threads and wakes cores
                for name, value in round_times.items():
                    times[name].append(value)
    warm_copier.close()
    warm.close()
    target.close()
    gib = blocks * BLOCK / 2**30
    return {f"{name}_gib_s": gib / statistics.median(values) for name, values in times.items()}


def bookkeeping(rounds: int) -> dict[str, float]:
    """Measure lookups of a prompt that L1 has, and reserving slots that need evictions."""
    figures: dict[str, float] = {}
    for blocks in (PROMPT, 4 * PROMPT):
        with small_stack(blocks) as stack:
            keys = new_chain(blocks)
            stack.reserve(keys).end()
            # A request brings new key objects, which have no cached hash; copy the keys.
            prompts = [[bytes(bytearray(key)) for key in keys] for _ in range(rounds)]
            spent = [seconds(lambda: stack.match(prompt)) for prompt in prompts]  # noqa: B023
            name = "match_us_per_block" if blocks == PROMPT else "match_4x_us_per_block"
            figures[name] = statistics.median(spent) / blocks * 1e6
    with small_stack(8 * PROMPT) as stack:
        stack.reserve(new_chain(8 * PROMPT)).end()
        spent = []
        for _ in range(rounds):
            keys = new_chain(PROMPT)

            def refill() -> None:
                for first in range(0, PROMPT, PER_STEP):
                    parent = keys[first - 1] if first else None  # noqa: B023
                    stack.reserve(keys[first : first + PER_STEP], parent).end()  # noqa: B023

            spent.append(seconds(refill))
        figures["reserve_us_per_block"] = statistics.median(spent) / PROMPT * 1e6
    return figures


def import_ms(rounds: int) -> float:
    """Measure `import kvcache` in a new interpreter; return the median in milliseconds."""
    code = "import time; t = time.perf_counter(); import kvcache; print(time.perf_counter() - t)"
    runs = [
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        for _ in range(rounds)
    ]
    return statistics.median(float(run.stdout) for run in runs) * 1e3


def small_stack(blocks: int) -> Stack:
    """Return a stack of `blocks` small blocks, to measure bookkeeping without copies."""
    from kvcache.sizes import Size
    from kvcache.stack import Stack
    from kvcache.tiers.dram import DramTier

    tier = DramTier(block_nbytes=SMALL, capacity=Size(blocks * SMALL))
    tier.slab.wait_populated()
    return Stack(tier, profile="bench")


def new_chain(blocks: int) -> list[bytes]:
    """Return new random keys."""
    return [os.urandom(32) for _ in range(blocks)]


def seconds(work: Callable[[], object]) -> float:
    """Return the seconds that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
