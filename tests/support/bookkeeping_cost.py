"""What a request's bookkeeping costs, of several who do it, in turns, on the conversation trace.

The mean is of the best of each request, so that what neighbours take is left out; percentiles and
the longest are those of one run, the fastest, with all that was in it. The first half of the trace
only warms up.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tests.support.eviction_traffic import Request, conversation

Serve = Callable[[int], int]  # a request, by its number; how many of its blocks were there


@dataclass(frozen=True)
class Cost:
    """Microseconds per block, and per request; and of the blocks asked for, per cent that hit."""

    each: float
    p50: float
    p99: float
    most: float
    hit_ratio: float


def asked() -> list[Request]:
    """The requests, by number, of full blocks only."""
    return conversation(partial=False)


def in_turns(makers: Mapping[str, Callable[[], Serve]], rounds: int) -> dict[str, Cost]:
    """What each of ``makers`` makes costs, in so many runs."""
    requests = asked()
    half = len(requests) // 2
    blocks = sum(len(request.keys) for request in requests[half:])
    runs: dict[str, list[list[float]]] = {name: [] for name in makers}
    hits: dict[str, int] = {}
    gc.collect()
    gc.freeze()
    for _ in range(rounds):
        for name, make in makers.items():
            serve, took, found = make(), [], 0
            for number in range(half):
                serve(number)
            gc.collect()  # the one before this one, which is no pause of this one's
            for number in range(half, len(requests)):
                start = time.perf_counter()
                held = serve(number)
                took.append(time.perf_counter() - start)
                found += held
            runs[name].append(took)
            hits[name] = found
    gc.unfreeze()
    costs: dict[str, Cost] = {}
    for name, each in runs.items():
        fastest = sorted(min(each, key=sum))
        p50, p99, most = (1e6 * fastest[int(part * (len(fastest) - 1))] for part in (0.5, 0.99, 1))
        mean = 1e6 * sum(map(min, *each)) / blocks
        costs[name] = Cost(mean, p50, p99, most, 100 * hits[name] / blocks)
    return costs
