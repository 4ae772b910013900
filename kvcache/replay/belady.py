"""The optimum: the hits of a cache that knows the future.

All blocks have one size, and a block may be declined, so Belady's MIN is optimal: evict the block
with the latest next use. Block hits are also prefix hits here. A parent is used whenever its child
is, so its next use is never later; if both have the same next use, the child can be evicted first,
and the cache always holds whole prefixes. Which of the two is evicted does not change the number of
hits.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from heapq import heappop, heappush

from kvcache.replay.trace import Trace


@dataclass(frozen=True, slots=True)
class Optimum:
    """The optimal hits of a cache of ``capacity_blocks`` over a trace.

    Attributes:
        capacity_blocks: blocks that the cache can hold.
        hit_blocks: blocks found, of all blocks looked up.
        hit_tokens: tokens of these blocks, of all prompt tokens.
    """

    capacity_blocks: int
    hit_blocks: int
    hit_tokens: int


def optimum(trace: Trace, capacity: int, first: int = 0) -> Optimum:
    """Return the optimum for ``trace`` with ``capacity`` blocks.

    Args:
        trace: the requests.
        capacity: blocks of the cache.
        first: the request from which hits count; the ones before it warm the cache up.
    """
    never = len(trace)
    following = next_uses(trace)
    held: set[int] = set()
    # (-next use, block): the latest next use is popped first. A block that was used again has a
    # second entry with a later use, is evicted by that one, and is no longer held at this one.
    latest: list[tuple[int, int]] = []
    at = hit_blocks = hit_tokens = 0
    for request, (tokens, chain) in enumerate(zip(trace.tokens, trace.chains(), strict=True)):
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
        if request >= first:
            hit_blocks += found
            hit_tokens += min(found * trace.block_tokens, tokens)
    return Optimum(capacity, hit_blocks, hit_tokens)


def next_uses(trace: Trace) -> array[int]:
    """Return, for each block in ``trace.blocks``, the number of the next request that uses it.

    ``len(trace)`` means that no later request does.
    """
    never = len(trace)
    following = array("q", bytes(8 * len(trace.blocks)))
    next_use = [never] * trace.distinct
    for request in range(len(trace) - 1, -1, -1):
        for at in range(trace.ends[request], trace.ends[request + 1]):
            block = trace.blocks[at]
            following[at] = next_use[block]
            next_use[block] = request
    return following
