"""Learns how soon blocks of each class are reused, and computes the Gittins index from that.

The age of a block is the time since its last use. Ages are counted in octaves, buckets that double
in width::

    octave   0            1                   2                  ...   31
             [0, 1/1024)  [1/1024, 1/512)     [1/512, 1/256)           12 days and more   seconds

Ages below the mean time between two lookups cannot be distinguished: the octaves up to there are
learned as one.

For each class and octave, the policy counts the blocks that reached the octave (were *at risk*) and
those that were reused in it. Their quotient is the *hazard* of the octave. Where few blocks were
seen, the hazard is shrunk towards that of similar classes, then towards that of all classes, then
towards a constant.

``worth`` of a class at an age is the Gittins index of keeping a block: the maximum, over all times
at which to give up, of P(reused by then) / E[time that the slot is taken until then]. With the same
hazard in every octave it falls with age, so a policy that has learned nothing is LRU.

Invariants: the counts of a class are halved before they exceed the tier's capacity by far, so old
observations fade; the cost of learning does not depend on the counts.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from math import frexp
from operator import add

OCTAVE_COUNT = 32
FIRST_OCTAVE_S = 1 / 1024  # width of octave 0
OCTAVE_STARTS_S = [0.0, *(FIRST_OCTAVE_S * 2**octave for octave in range(OCTAVE_COUNT))]
"""The age at which each octave starts, and the age at which the last one ends."""
_WIDTHS_S = [end - start for start, end in pairwise(OCTAVE_STARTS_S)]

# Hazard of an octave before anything is observed. It is the same for all octaves, which is LRU; any
# value from 0.05 to 0.25 had the same hit ratios.
_PRIOR_HAZARD = 0.12
# Weight of the prior and of the hazard of all classes, as a number of blocks at risk. A small
# weight lets observations prevail soon; 10 to 300 had the same hit ratios.
_PRIOR_BLOCKS = 30.0
# Weight of the hazard of similar classes, as a number of blocks at risk; the same range holds.
_SIMILAR_BLOCKS = 100.0
# Longest time per epoch that counts for the mean time between lookups. A night without traffic says
# nothing about the rate of lookups by day.
_MAX_EPOCH_S = 60.0
# Blocks looked up between two times of learning. The interval grows from the first to the last: a
# new policy learns from little, and a later one has its cost spread over more blocks.
_FIRST_LEARN_BLOCKS, _LAST_LEARN_BLOCKS = 2000, 8000

CLASS_COUNT = 8
SIDE, SIDE_USED, LAST, EXTENSION, NEW, REUSED_2, REUSED_4, REUSED_16 = range(CLASS_COUNT)
"""Classes of blocks.

``SIDE``: side blocks that were not used since they were stored. ``SIDE_USED``: other side blocks.
``LAST``: the last block of a request. ``EXTENSION``: blocks used once that continue a known chain.
``NEW``: blocks used once of a new chain. ``REUSED_n``: blocks used at least n times.

Of classes with the same worth, the first is evicted first. This is the order from the tail of a
chain to its head.
"""
_REUSED = (REUSED_2, REUSED_4, REUSED_16)
_SIMILAR = [_REUSED if cls in _REUSED else (cls,) for cls in range(CLASS_COUNT)]  # by class

_Counts = list[tuple[list[float], list[float]]]
"""For each of some classes: blocks reused and blocks at risk, by octave."""


def octave_of(age_s: float) -> int:
    """Return the octave of an age; a negative age is in the first one."""
    if age_s < FIRST_OCTAVE_S:
        return 0
    return min(frexp(age_s / FIRST_OCTAVE_S)[1], OCTAVE_COUNT - 1)


class Hazards:
    """Observed reuse of each class, and the worth learned from it.

    Args:
        capacity: blocks that the tier can hold.

    Attributes:
        reused: blocks reused, by class and octave; the policy adds to it.
        at_risk: blocks that reached an octave, by class and octave, as of the last learning.
        arrivals: blocks that reached an octave since the last learning, by class, as differences
            from each octave to the next; the policy adds to it.
        begun: blocks that were used since the last learning, and so reached octave 0, by class.
            Separate from ``arrivals`` because it is incremented most often.
        tables: worth at the start of each octave and at the end of the last one, by class.
    """

    def __init__(self, capacity: int) -> None:
        self.reused = [[0.0] * OCTAVE_COUNT for _ in range(CLASS_COUNT)]
        self.at_risk = [[0.0] * OCTAVE_COUNT for _ in range(CLASS_COUNT)]
        self.arrivals = [[0.0] * (OCTAVE_COUNT + 1) for _ in range(CLASS_COUNT)]
        self.begun = [0] * CLASS_COUNT
        self.tables = [_gittins_index([_PRIOR_HAZARD] * OCTAVE_COUNT, 0)] * CLASS_COUNT
        # The counts of a class are halved when this many of its blocks were at risk in octave 0:
        # some fillings of the tier, and enough for a hazard where the tier is small.
        self._halve_blocks = 3.0 * capacity + 5000
        # Since the last learning:
        self._seconds = 0.0  # time
        self._lookups = 0  # lookups
        self._blocks = 0  # blocks looked up
        self._learn_blocks = _FIRST_LEARN_BLOCKS  # learn when `_blocks` reaches this
        self._merged = 0  # octaves 0 to this one are learned as one

    def add_at_risk(self, cls: int, first: int, last: int, blocks: int) -> None:
        """Count ``blocks`` of a class that reached the octaves ``first`` to ``last``."""
        arrivals = self.arrivals[cls]
        arrivals[first] += blocks
        arrivals[last + 1] -= blocks

    def worth(self, cls: int, age_s: float) -> float:
        """Return the worth of a slot to a block of a class at an age, in reuses per second."""
        table = self.tables[cls]
        if age_s < FIRST_OCTAVE_S:
            return table[0] + (table[1] - table[0]) * max(0.0, age_s / FIRST_OCTAVE_S)
        half, octave = frexp(age_s / FIRST_OCTAVE_S)
        if octave >= OCTAVE_COUNT:
            return table[OCTAVE_COUNT]
        return table[octave] + (table[octave + 1] - table[octave]) * (2 * half - 1)

    def end_epoch(self, seconds: float, lookups: int, blocks: int) -> bool:
        """Count an epoch, and learn if enough blocks were looked up since the last learning.

        Args:
            seconds: how long the epoch lasted.
            lookups: lookups in it.
            blocks: blocks looked up in it.

        Returns:
            whether ``tables`` changed.
        """
        self._seconds += min(seconds, _MAX_EPOCH_S)
        self._lookups += lookups
        self._blocks += blocks
        if self._blocks < self._learn_blocks:
            return False
        self._learn_blocks = min(self._learn_blocks * 5 // 4, _LAST_LEARN_BLOCKS)
        self.learn()
        return True

    def learn(self) -> None:
        """Compute ``tables`` from what was observed."""
        self._merged = octave_of(self._seconds / max(1, self._lookups))
        self._seconds, self._lookups, self._blocks = 0.0, 0, 0
        self._add_arrivals()
        # All blocks reach octave 0, so the merged octaves have its blocks at risk.
        first = self._merged + 1
        counts = [
            ([sum(reused[:first]), *reused[first:]], [at_risk[0], *at_risk[first:]])
            for reused, at_risk in zip(self.reused, self.at_risk, strict=True)
        ]
        of_all = _shrunk_hazards(counts[LAST:], [_PRIOR_HAZARD] * OCTAVE_COUNT, _PRIOR_BLOCKS)
        of_similar = {
            classes: _shrunk_hazards([counts[cls] for cls in classes], of_all, _PRIOR_BLOCKS)
            for classes in set(_SIMILAR)
        }
        self.tables = [
            _gittins_index(
                _shrunk_hazards([counts[cls]], of_similar[_SIMILAR[cls]], _SIMILAR_BLOCKS),
                self._merged,
            )
            for cls in range(CLASS_COUNT)
        ]

    def _add_arrivals(self) -> None:
        """Move ``arrivals`` and ``begun`` to ``at_risk``; halve the counts that are large."""
        for cls, (reused, at_risk, arrivals) in enumerate(
            zip(self.reused, self.at_risk, self.arrivals, strict=True)
        ):
            arrivals[0] += self.begun[cls]
            arrivals[1] -= self.begun[cls]
            at_risk[:] = map(add, at_risk, accumulate(arrivals))
            arrivals[:] = [0.0] * len(arrivals)
            self.begun[cls] = 0
            if at_risk[0] > self._halve_blocks:
                reused[:] = [blocks / 2 for blocks in reused]
                at_risk[:] = [blocks / 2 for blocks in at_risk]


def _shrunk_hazards(counts: _Counts, towards: list[float], weight: float) -> list[float]:
    """Return the hazards of some classes together, shrunk towards others.

    Args:
        counts: of the classes.
        towards: hazards by octave.
        weight: of ``towards``, as a number of blocks at risk.
    """
    reused, at_risk = (map(sum, zip(*rows, strict=True)) for rows in zip(*counts, strict=True))
    return [
        min(1.0, (reuses + hazard * weight) / (blocks + weight))
        for reuses, blocks, hazard in zip(reused, at_risk, towards, strict=False)
    ]


_Span = tuple[float, float, float, float]
"""Keeping a block through some octaves: worth, expected reuses, expected seconds, P(not reused)."""


def _gittins_index(hazards: list[float], merged: int) -> list[float]:
    """Return the index at the start of each octave, and at the end of the last.

    Nothing counts beyond the last octave; the index at its end is half of that at its start.
    Otherwise a class with a high hazard in the last octave would never be evicted.

    The loop goes from the last octave to the first. A block that is kept through an octave is
    best kept through every later span that is worth more than what comes before that span,
    so such spans are merged with the octave. This is exact, and linear in the number of octaves.

    Args:
        hazards: of the octaves 0 to ``merged`` as one, then of each later octave.
        merged: octave.
    """
    table: list[float] = []
    later: list[_Span] = []  # the nearest span is the last entry; worth falls with age
    widths = [OCTAVE_STARTS_S[merged + 1], *_WIDTHS_S[merged + 1 :]]
    for hazard, width in reversed(list(zip(hazards, widths, strict=True))):
        # A reused block is reused in the middle of the octave, on average.
        reuses, seconds, survival = hazard, width * (1 - hazard / 2), 1 - hazard
        worth = reuses / seconds
        while later and later[-1][0] > worth:
            _, more_reuses, more_seconds, later_survival = later.pop()
            reuses += survival * more_reuses
            seconds += survival * more_seconds
            survival *= later_survival
            worth = reuses / seconds
        later.append((worth, reuses, seconds, survival))
        table.append(worth)
    table.reverse()
    return [*[table[0]] * merged, *table, table[-1] / 2]
