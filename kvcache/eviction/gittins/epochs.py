"""What the learned policy knows about blocks: runs, cohorts of runs, and epochs of cohorts.

::

    Epoch   started at 17.2 s
      Cohort   NEW        run   a0 a1 a2 a3 | a4 a5
                                held          known: evicted, declined, or not stored yet
                          run   b0 b1
      Cohort   REUSED_2   run   c0 c1 c2

A *run* is consecutive blocks of one chain, head first, that were last used at the same time and are
of one class. An *epoch* is a few seconds, or a number of blocks, within which the policy's time
stands still: all blocks used in it have the same age. A *cohort* is the runs of one class and one
epoch. Epochs grow older, not single runs, so ageing costs little.

Invariants: ``run.keys[: run.held]`` are the blocks of the run that the index holds. A run that
holds blocks is either in ``runs`` or in ``parked`` of its cohort; any other run is in neither.
"""

from __future__ import annotations

from collections import OrderedDict

from kvcache.keys import Keys


class Epoch:
    """Cohorts of one age.

    Attributes:
        start_s: when it started, on the index's clock.
        octave: octave of its age, as of the last time it was moved.
        cohorts: all cohorts of it, in the order in which they were opened.
        blocks: known blocks in all cohorts.
        recent: whether LRU would still hold some of its blocks (``LruBudget``).
        missing: while it is recent, its known blocks that are not held.
    """

    __slots__ = ("blocks", "cohorts", "missing", "octave", "recent", "start_s")

    def __init__(self, start_s: float) -> None:
        self.start_s = start_s
        self.octave = 0
        self.cohorts: list[Cohort] = []
        self.blocks = 0
        self.recent = True
        self.missing = 0


class Cohort:
    """Runs of one class and epoch.

    Attributes:
        cls: the class of the blocks.
        epoch: when they were last used.
        blocks: known blocks in all runs.
        runs: runs that hold blocks and may be evicted from, least recently used first.
        parked: runs that hold blocks and had to keep their tail at the last try.
    """

    __slots__ = ("blocks", "cls", "epoch", "parked", "runs")

    def __init__(self, cls: int, epoch: Epoch) -> None:
        self.cls = cls
        self.epoch = epoch
        self.blocks = 0
        self.runs: dict[RankedRun, None] = {}
        self.parked: dict[RankedRun, None] = {}


class RankedRun:
    """Consecutive blocks of one chain that were last used at the same time.

    Attributes:
        run_id: unique in a policy.
        keys: known blocks, head first; the index holds the first ``held``.
        held: number of blocks that the index holds.
        parent: the key that the first block continued, if any.
        cohort: the cohort of the run.
        uses: uses of each block, at least; counted up to a limit.
        storing: True from a lookup until a block is evicted. Storing more blocks then belongs to
            the request of that lookup, and is not another use.
        prefetched: True when the blocks were stored again before a lookup. The lookup that follows
            soon is the reason for the prefetch, and is not another use.
        ends_request: a request ended with this run, or with one block after it.
        side: the blocks are the parts of a side block (``side_runs``).
    """

    __slots__ = (
        "cohort",
        "ends_request",
        "held",
        "keys",
        "parent",
        "prefetched",
        "run_id",
        "side",
        "storing",
        "uses",
    )

    def __init__(
        self, run_id: int, keys: Keys, parent: bytes | None, cohort: Cohort, uses: int
    ) -> None:
        self.run_id = run_id
        self.keys = keys
        self.held = 0
        self.parent = parent
        self.cohort = cohort
        self.uses = uses
        self.storing = True
        self.prefetched = False
        self.ends_request = False
        self.side = False


CohortQueue = OrderedDict[Cohort, None]
"""Cohorts of one class and octave, oldest first."""
