"""Hints that are true: what a client could say who knows that a session is over.

Always true: nothing is said of a block that the trace asks for again; the same trace, share and
seed give the same hints.
"""

from __future__ import annotations

from array import array
from dataclasses import replace
from random import Random

from kvcache.replay.belady import next_uses
from kvcache.replay.trace import Trace


def with_hints(trace: Trace, share: float, seed: int = 0) -> Trace:
    """``trace``, with hints that a share of its sessions are over, and those that it has.

    Where a request has last blocks that no later one asks for, it is the end of a session, or of a
    branch of it.

    Args:
        trace: who asks for what.
        share: of the requests that have such blocks, how many say so; 0 to 1.
        seed: which of them.
    """
    following, never = next_uses(trace), len(trace)
    draw = Random(seed)
    done = array("q")
    for request, said in enumerate(trace.done):
        start, at = trace.ends[request], trace.ends[request + 1]
        end = at
        while at > start and following[at - 1] == never:
            at -= 1
        if at < end and draw.random() < share:
            done.append(min(said, at - start))
        else:
            done.append(said)
    return replace(trace, done=done)
