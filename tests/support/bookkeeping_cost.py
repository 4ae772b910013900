"""The time of a request's bookkeeping: several contenders take turns on the conversation trace.

The mean is that of each request's fastest run, which leaves out what other processes took. The
percentiles and the maximum are those of one run, the fastest, with every pause in it. The first
half of the trace only warms up.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tests.support.traces import conversation

Serve = Callable[[int], int]
"""Serves the request of a number; returns how many of its blocks were found."""


@dataclass(frozen=True)
class Cost:
    """Cost of one contender, in microseconds per block and per request.

    Attributes:
        us_per_block: mean.
        p50_us, p99_us, max_us: per request.
        hit_ratio: in percent of the blocks looked up.
    """

    us_per_block: float
    p50_us: float
    p99_us: float
    max_us: float
    hit_ratio: float


def requests() -> list[tuple[float, list[bytes]]]:
    """Return time and keys of each request; full blocks only."""
    trace = conversation()
    return list(zip(trace.times_s, trace.keys(), strict=True))


def in_turns(contenders: Mapping[str, Callable[[], Serve]], rounds: int) -> dict[str, Cost]:
    """Measure each contender in some rounds; each round makes it anew."""
    chains = [keys for _, keys in requests()]
    half = len(chains) // 2
    blocks = sum(map(len, chains[half:]))
    runs_s: dict[str, list[list[float]]] = {name: [] for name in contenders}
    hits: dict[str, int] = {}
    gc.collect()
    gc.freeze()
    for _ in range(rounds):
        for name, make in contenders.items():
            serve, times_s, found = make(), [], 0
            for number in range(half):
                serve(number)
            gc.collect()  # so that no garbage of the contender before counts for this one
            for number in range(half, len(chains)):
                start_s = time.perf_counter()
                held = serve(number)
                times_s.append(time.perf_counter() - start_s)
                found += held
            runs_s[name].append(times_s)
            hits[name] = found
    gc.unfreeze()
    costs: dict[str, Cost] = {}
    for name, runs in runs_s.items():
        fastest = sorted(min(runs, key=sum))
        p50, p99, longest = (1e6 * fastest[int(q * (len(fastest) - 1))] for q in (0.5, 0.99, 1))
        mean = 1e6 * sum(map(min, *runs)) / blocks
        costs[name] = Cost(mean, p50, p99, longest, 100 * hits[name] / blocks)
    return costs
