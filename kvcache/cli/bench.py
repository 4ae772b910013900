"""What this machine's memory gives, and how much of it L1 takes.

In one run, in turns: contiguous copies of an engine's memory into a slab's, and blocks stored into
L1 and loaded from it through the same code that an engine's worker and scheduler use (reserve or
fetch, page copies, end of the lease). A block here is 32 layers of 64 KiB, 2 MiB. Rates are GiB of
payload per second, medians.
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
PER_STEP = 32  # blocks stored or loaded at a time: a prefill chunk of 1,024 tokens
PROMPT = 1024  # blocks of the prompt that `match` looks up
SMALL = 4096  # bytes of a block where only the bookkeeping is measured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `kvcache bench` takes."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of every copy")
    parser.add_argument("--blocks", type=int, default=256, help="of 2 MiB, moved in a round")
    parser.add_argument("--rounds", type=int, default=9, help="that medians are taken of")


def run(args: argparse.Namespace) -> int:
    """Measure and print; 2 for arguments that cannot be used."""
    for name, most in _MOST.items():
        if not 1 <= getattr(args, name) <= most:
            print(f"--{name} is {getattr(args, name)}; it must be 1 to {most}", file=sys.stderr)
            return 2
    found = measure(threads=args.threads, blocks=args.blocks, rounds=args.rounds)
    if args.json:
        print(json.dumps(found))
        return 0
    for name, value in found.items():
        print(f"{name:22} {value:10.3f}")
    best = found["memcpy_gib_s"]
    shares = (f"{name} {found[f'{name}_gib_s'] / best:.2f}" for name in _MOVES)
    print(f"\nof one contiguous copy with {args.threads} threads: {', '.join(shares)}")
    return 0


_MOST = {"threads": 1024, "blocks": 1 << 20, "rounds": 10_000}
_MOVES = ("store", "load", "cold_store")


def measure(*, threads: int, blocks: int, rounds: int) -> dict[str, float]:
    """All figures by name: `*_gib_s`, `*_us_per_block`, `import_ms`."""
    return copies(threads, blocks, rounds) | bookkeeping(rounds) | {"import_ms": import_ms(rounds)}


def copies(threads: int, blocks: int, rounds: int) -> dict[str, float]:
    """Contiguous copies, stores, loads and first stores, one after another in every round."""
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

    # As an engine's cache is: on 64 bytes, as torch allocates, and its layers not a power of two
    # apart. Where either is not so, copies into it are up to a fifth, or half, slower.
    region = (blocks + 3) * PAGE
    spare = np.ones(LAYERS * region + 64, dtype=np.uint8)
    engine = spare[-spare.ctypes.data % 64 :]
    layers = [
        BlockRun(engine.ctypes.data + layer * region, PAGE, PAGE, blocks) for layer in range(LAYERS)
    ]
    target = Slab.create(blocks, BLOCK)
    target.populate()
    target.wait_populated()
    memory = (c_uint8 * target.nbytes).from_address(target.address)
    plain = np.frombuffer(memoryview(memory), dtype=np.uint8)
    shares = (np.array_split(side, threads) for side in (plain, engine[: plain.size]))
    parts = list(zip(*shares, strict=True))

    def opened() -> tuple[Stack, CpuCopier]:
        tier = DramTier(block_nbytes=BLOCK, capacity=Size(blocks * BLOCK))
        tier.slab.wait_populated()
        sides = CopyGeometry(
            layers,
            slab_address=tier.slab.address,
            slots=tier.slab.slots,
            slot_nbytes=tier.slab.slot_nbytes,
        )
        return Stack(tier, profile="bench"), CpuCopier(sides, threads=threads)

    def memcpy() -> None:
        futures = [pool.submit(np.copyto, *part) for part in parts[1:]]
        np.copyto(*parts[0])
        for future in futures:
            future.result()

    def store(stack: Stack, copier: CpuCopier, keys: list[bytes]) -> None:
        for at in range(0, blocks, PER_STEP):
            with stack.reserve(keys[at : at + PER_STEP], keys[at - 1] if at else None) as lease:
                copier.gather([at + position for position in lease.positions], lease.slots)

    def load(stack: Stack, copier: CpuCopier, keys: list[bytes]) -> None:
        with stack.fetch(stack.match(keys).result()).result() as lease:
            copier.scatter(lease.slots, range(len(lease)))

    times: dict[str, list[float]] = {name: [] for name in ("memcpy", *_MOVES)}
    warm, warm_copier = opened()
    with ThreadPoolExecutor(threads) as pool:
        for turn in range(rounds + 1):
            keys = chain(blocks)
            warm.clear()
            fresh, fresh_copier = opened()
            taken = {
                "memcpy": seconds(memcpy),
                "cold_store": seconds(lambda: store(fresh, fresh_copier, keys)),  # noqa: B023
                "store": seconds(lambda: store(warm, warm_copier, keys)),  # noqa: B023
                "load": seconds(lambda: load(warm, warm_copier, keys)),  # noqa: B023
            }
            fresh_copier.close()
            fresh.close()
            if turn:  # the first round wakes cores and threads
                for name, value in taken.items():
                    times[name].append(value)
    warm_copier.close()
    warm.close()
    target.close()
    gib = blocks * BLOCK / 2**30
    return {f"{name}_gib_s": gib / statistics.median(values) for name, values in times.items()}


def bookkeeping(rounds: int) -> dict[str, float]:
    """Look-ups of a prompt that is all in L1; reserving and publishing, evicting all the time."""
    found: dict[str, float] = {}
    for blocks in (PROMPT, 4 * PROMPT):
        with small_stack(blocks) as stack:
            keys = chain(blocks)
            stack.reserve(keys).end()
            # Keys anew for each look-up, as a request brings them: their hash is not known yet.
            asked = [[bytes(bytearray(key)) for key in keys] for _ in range(rounds)]
            spent = [seconds(lambda: stack.match(chain)) for chain in asked]  # noqa: B023
            name = "match_us_per_block" if blocks == PROMPT else "match_4x_us_per_block"
            found[name] = statistics.median(spent) / blocks * 1e6
    with small_stack(8 * PROMPT) as stack:
        stack.reserve(chain(8 * PROMPT)).end()
        spent = []
        for _ in range(rounds):
            keys = chain(PROMPT)

            def refill() -> None:
                for at in range(0, PROMPT, PER_STEP):
                    stack.reserve(keys[at : at + PER_STEP], keys[at - 1] if at else None).end()  # noqa: B023

            spent.append(seconds(refill))
        found["reserve_us_per_block"] = statistics.median(spent) / PROMPT * 1e6
    return found


def import_ms(rounds: int) -> float:
    """Median time of `import kvcache` in a fresh interpreter."""
    code = "import time; t = time.perf_counter(); import kvcache; print(time.perf_counter() - t)"
    runs = [
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        for _ in range(rounds)
    ]
    return statistics.median(float(run.stdout) for run in runs) * 1e3


def small_stack(blocks: int) -> Stack:
    """A stack of blocks too small for their bytes to matter."""
    from kvcache.sizes import Size
    from kvcache.stack import Stack
    from kvcache.tiers.dram import DramTier

    tier = DramTier(block_nbytes=SMALL, capacity=Size(blocks * SMALL))
    tier.slab.wait_populated()
    return Stack(tier, profile="bench")


def chain(blocks: int) -> list[bytes]:
    """Keys that nobody has used."""
    return [os.urandom(32) for _ in range(blocks)]


def seconds(work: Callable[[], object]) -> float:
    """How long `work` takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun
