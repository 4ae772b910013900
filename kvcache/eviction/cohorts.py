"""What the learned policy keeps of blocks: runs of them, and cohorts of runs.

::

    Cohort   NEW, from 17.2 s on    run   a0 a1 a2 a3 | a4 a5
                                          held          known: evicted, declined, or not there yet
                                    run   b0 b1

A *run* is blocks of one chain, head first, that were used last at one time and are of one class. A
*cohort* is the runs of one class that were used within a few seconds. Its runs are of one age, so
that it is the cohort that grows older, and not each of them.

Always true: ``run.keys[: run.held]`` are the blocks of the run that the index holds; a run that
holds blocks is in ``runs`` of its cohort or in ``parked``, and no other is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class Cohort:
    """Runs of one class and age.

    Attributes:
        kind: the class.
        time: when it was begun.
        octave: of its age, as last seen.
        blocks: known ones, in all runs.
        runs: those that hold blocks, in the order of their use.
        parked: those of which the tail was kept.
        recent: LRU would hold these blocks, or some of them.
        missing: of a recent one, blocks that are not held.
    """

    __slots__ = ("blocks", "kind", "missing", "octave", "parked", "recent", "runs", "time")

    def __init__(self, kind: int, time: float) -> None:
        self.kind = kind
        self.time = time
        self.octave = 0
        self.blocks = 0
        self.runs: OrderedDict[Run, None] = OrderedDict()
        self.parked: dict[Run, None] = {}
        self.recent = True
        self.missing = 0


class Run:
    """Blocks of one chain that were last used at one time.

    Attributes:
        keys: those that are known, in order; the first ``held`` are in the index.
        after: the key that the first of them continued.
        cohort: the one it is of.
        uses: how often, at least.
        awaited: asked for, and none has left: who has more of it stored does not use it again.
        told: it came back before the request asked: that does not use it again either.
        ends: a request ended with it, or with one block more.
    """

    __slots__ = ("after", "awaited", "cohort", "ends", "held", "keys", "told", "uses")

    def __init__(self, after: bytes | None, cohort: Cohort, uses: int) -> None:
        self.keys: list[bytes] = []
        self.held = 0
        self.after = after
        self.cohort = cohort
        self.uses = uses
        self.awaited = True
        self.told = False
        self.ends = False


Line = OrderedDict[Cohort, None]


def alike(ours: list[bytes], first: int, keys: Sequence[bytes], at: int) -> int:
    """How many keys ``ours`` from ``first`` and ``keys`` from ``at`` begin with alike."""
    count = min(len(ours) - first, len(keys) - at)
    if ours[first : first + count] == keys[at : at + count]:
        return count
    return next(i for i in range(count) if ours[first + i] != keys[at + i])
