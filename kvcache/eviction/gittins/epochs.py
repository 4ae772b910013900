"""What the learned policy keeps of blocks: runs of them, cohorts of runs, and epochs of cohorts.

::

    Epoch   from 17.2 s on
      Cohort   NEW     run   a0 a1 a2 a3 | a4 a5
                             held          known: evicted, declined, or not there yet
                       run   b0 b1
      Cohort   AGAIN   run   c0 c1 c2

A *run* is blocks of one chain, head first, that were used last at one time and are of one class. An
*epoch* is some seconds, or some blocks, in which no time passes: all that is used in it is of one
age. A *cohort* is the runs of one class and epoch. It is the epoch that grows older, not each run.

Always true: ``run.keys[: run.held]`` are the blocks of the run that the index holds; a run that
holds blocks is in ``runs`` of its cohort or in ``parked``, and no other is.
"""

from __future__ import annotations

from collections import OrderedDict

from kvcache.keys import Keys


class Epoch:
    """Cohorts of one age.

    Attributes:
        time: when it began.
        octave: of its age, as last seen.
        cohorts: those that have begun in it.
        blocks: known ones, in all cohorts.
        recent: LRU would hold these blocks, or some of them.
        missing: of a recent one, blocks that are not held.
    """

    __slots__ = ("blocks", "cohorts", "missing", "octave", "recent", "time")

    def __init__(self, time: float) -> None:
        self.time = time
        self.octave = 0
        self.cohorts: list[Cohort] = []
        self.blocks = 0
        self.recent = True
        self.missing = 0


class Cohort:
    """Runs of one class and epoch.

    Attributes:
        kind: the class.
        epoch: the one it is of.
        blocks: known ones, in all runs.
        runs: those that hold blocks, in the order of their use.
        parked: those of which the tail was kept.
    """

    __slots__ = ("blocks", "epoch", "kind", "parked", "runs")

    def __init__(self, kind: int, epoch: Epoch) -> None:
        self.kind = kind
        self.epoch = epoch
        self.blocks = 0
        self.runs: dict[RankedRun, None] = {}
        self.parked: dict[RankedRun, None] = {}


class RankedRun:
    """Blocks of one chain that were last used at one time.

    Attributes:
        number: no other's.
        keys: those that are known, in order; the first ``held`` are in the index.
        after: the key that the first of them continued.
        cohort: the one it is of.
        uses: how often, at least.
        awaited: asked for, and none has left: who has more of it stored does not use it again.
        told: it came back before the request asked: that does not use it again either.
        ends: a request ended with it, or with one block more.
    """

    __slots__ = ("awaited", "cohort", "ends", "held", "keys", "number", "parent", "told", "uses")

    def __init__(
        self, number: int, keys: Keys, parent: bytes | None, cohort: Cohort, uses: int
    ) -> None:
        self.number = number
        self.keys = keys
        self.held = 0
        self.parent = parent
        self.cohort = cohort
        self.uses = uses
        self.awaited = True
        self.told = False
        self.ends = False


Line = OrderedDict[Cohort, None]
