"""The optimum: what a cache that knows the future would have found.

Blocks are of one size and may be declined: to let go what is used again last finds the most of them
(Belady's MIN). They are prefix hits too, and so the most of those. For a parent is used again no
later than its child: where one request is the next for both, the child may go first, and then what
is kept is closed under prefixes. How many are found does not depend on who goes first of the two.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from heapq import heappop, heappush

from kvcache.replay.trace import Trace


@dataclass(frozen=True, slots=True)
class Optimum:
    """What was found of ``block_accesses`` and ``prompt_tokens``."""

    capacity_blocks: int
    hit_blocks: int
    hit_tokens: int


def optimum(trace: Trace, capacity: int) -> Optimum:
    """Replay ``trace`` with ``capacity`` blocks and knowledge of what comes."""
    never = len(trace)
    following = next_uses(trace)
    held: set[int] = set()
    # (-next use, block), the last use first. A block used since has a later entry: it goes with
    # that, and this one finds it gone.
    latest: list[tuple[int, int]] = []
    at = hit_blocks = hit_tokens = 0
    for tokens, chain in zip(trace.tokens, trace.chains(), strict=True):
        found = 0
        for block in chain:
            found += block in held
            if (use := following[at]) == never:
                held.discard(block)
            else:
                held.add(block)
                heappush(latest, (-use, block))
            at += 1
        while len(held) > capacity:
            held.discard(heappop(latest)[1])
        hit_blocks += found
        hit_tokens += min(found * trace.block_tokens, tokens)
    return Optimum(capacity, hit_blocks, hit_tokens)


def next_uses(trace: Trace) -> array[int]:
    """For each access, the number of the request that asks for its block next."""
    never = len(trace)
    following = array("q", bytes(8 * len(trace.blocks)))
    seen = [never] * trace.distinct
    for request in range(len(trace) - 1, -1, -1):
        for at in range(trace.ends[request], trace.ends[request + 1]):
            block = trace.blocks[at]
            following[at] = seen[block]
            seen[block] = request
    return following
