"""Perfect hints: those of a client that knows the end of each session.

Invariants: a hint never covers a block that a later request uses; the same trace, share and seed
have the same hints.
"""

from __future__ import annotations

from array import array
from dataclasses import replace
from random import Random

from kvcache.replay.belady import next_uses
from kvcache.replay.trace import Trace


def with_hints(trace: Trace, share: float, seed: int = 0) -> Trace:
    """Return ``trace`` with hints at a share of the session ends, besides those that it has.

    A request ends a session, or a branch of one, if no later request uses its last blocks.

    Args:
        trace: the requests.
        share: the share of session ends that get a hint, 0 to 1.
        seed: selects these session ends.
    """
    following, never = next_uses(trace), len(trace)
    random = Random(seed)
    done = array("q")
    for request, hinted in enumerate(trace.done):
        start, end = trace.ends[request], trace.ends[request + 1]
        at = end  # the first of the last blocks that are never used again
        while at > start and following[at - 1] == never:
            at -= 1
        if at < end and random.random() < share:
            done.append(min(hinted, at - start))
        else:
            done.append(hinted)
    return replace(trace, done=done)
