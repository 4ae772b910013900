"""How soon blocks of a class are used again, learned, and what that makes a slot worth to them.

Ages are seconds since a block was last used, in octaves::

    octave   0            1                   2                  ...   31
             [0, 1/1024)  [1/1024, 1/512)     [1/512, 1/256)           12 days and more

Ages below the time that usually lies between two look-ups are not told apart: they are learned as
one octave.

Of each class it is counted how many blocks came to an octave (were *at risk* there) and how many
were used again in it; the quotient is the octave's hazard. Where little was seen it is drawn to
that of the classes like it, then of all, then to one that is the same in every octave.

``worth`` of a class at an age is the Gittins index of keeping a block: the best quotient, over all
times to give up at, of the chance that it is used by then and the expected time its slot is taken.
One hazard for all octaves makes it fall with age: nothing learned is LRU.

Always true: the counts of a class are halved before they outgrow what the tier holds by far, so
what was learned long ago is forgotten; to learn costs the same whatever was counted.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from math import frexp
from operator import add

OCTAVES = 32
FIRST_S = 1 / 1024
STARTS = [0.0, *(FIRST_S * 2**octave for octave in range(OCTAVES))]  # and where the last one ends
WIDTHS = [end - start for start, end in pairwise(STARTS)]

_PRIOR = 0.12  # of the blocks that come to an octave, how many are used in it
_PRIOR_BLOCKS = 30.0  # the prior and the pool weigh as much as this many blocks at risk
_SILENCE_S = 60.0  # a longer time without look-ups says nothing of how often there are some
_FIRST_LEARN, _LAST_LEARN = 2000, 8000  # blocks asked for between two times of learning
_POOL_BLOCKS = 100.0  # and the classes like it as this many

LAST, MORE, NEW, AGAIN, OFTEN, ALWAYS = range(6)
"""Classes: the last block that a request asked for, blocks that continue a known chain, blocks of a
new one, and blocks used 2-3, 4-15 and more times; only these three are alike. Of equals the first
class goes first, which is how a chain has them from its end."""

CLASSES = 6
_USED = (AGAIN, OFTEN, ALWAYS)
_ALIKE = [_USED if kind in _USED else (kind,) for kind in range(CLASSES)]

_Seen = list[tuple[list[float], list[float]]]  # by class: blocks used and at risk, by octave


def octave_of(age: float) -> int:
    """The octave that ``age`` lies in."""
    if age < FIRST_S:
        return 0
    return min(frexp(age / FIRST_S)[1], OCTAVES - 1)


class Hazards:
    """What was seen of each class, and the worth that was learned from it.

    Args:
        capacity: blocks that the tier can hold.
    """

    def __init__(self, capacity: int) -> None:
        self._enough = 3.0 * capacity + 5000
        self.used = [[0.0] * OCTAVES for _ in range(CLASSES)]  # blocks, in octaves they came to
        self._risk = [[0.0] * OCTAVES for _ in range(CLASSES)]
        # What came to octaves since then, as differences from each octave to the next.
        self.came = [[0.0] * (OCTAVES + 1) for _ in range(CLASSES)]
        self.begun = [0] * CLASSES  # blocks that came to the first octave, since then
        self._seconds = 0.0  # in which there were so many look-ups, since something was learned
        self._lookups = 0
        self._asked = 0  # blocks, by these
        self._next_learn = _FIRST_LEARN
        self._first = 0  # octave that is told apart from those before it
        self.tables = [_worth([_PRIOR] * OCTAVES, 0)] * CLASSES

    def at_risk(self, kind: int, first: int, last: int, blocks: int) -> None:
        """``blocks`` of a class came to the octaves ``first`` to ``last``."""
        came = self.came[kind]
        came[first] += blocks
        came[last + 1] -= blocks

    def worth(self, kind: int, age: float) -> float:
        """What a slot is worth to a block of a class at an age, in uses per second."""
        table = self.tables[kind]
        if age < FIRST_S:
            return table[0] + (table[1] - table[0]) * max(0.0, age / FIRST_S)
        half, octave = frexp(age / FIRST_S)
        if octave >= OCTAVES:
            return table[OCTAVES]
        return table[octave] + (table[octave + 1] - table[octave]) * (2 * half - 1)

    def passed(self, seconds: float, lookups: int, asked: int) -> bool:
        """So many look-ups asked for so many blocks within some time: learn, if it is time to.

        Returns:
            whether worths are other ones now.
        """
        self._seconds += min(seconds, _SILENCE_S)
        self._lookups += lookups
        self._asked += asked
        if self._asked < self._next_learn:
            return False
        self._next_learn = min(self._next_learn * 5 // 4, _LAST_LEARN)
        self.learn()
        return True

    def learn(self) -> None:
        """Have ``worth`` say what was seen."""
        self._first = octave_of(self._seconds / max(1, self._lookups))
        self._seconds, self._lookups, self._asked = 0.0, 0, 0
        self._count()
        # The octaves up to the first that is told apart are one, which all come to.
        first = self._first + 1
        seen = [
            ([sum(used[:first]), *used[first:]], [risk[0], *risk[first:]])
            for used, risk in zip(self.used, self._risk, strict=True)
        ]
        every = _drawn(seen, [_PRIOR] * OCTAVES, _PRIOR_BLOCKS)
        families = {
            kinds: _drawn([seen[kind] for kind in kinds], every, _PRIOR_BLOCKS)
            for kinds in set(_ALIKE)
        }
        self.tables = [
            _worth(_drawn([seen[kind]], families[_ALIKE[kind]], _POOL_BLOCKS), self._first)
            for kind in range(CLASSES)
        ]

    def _count(self) -> None:
        """Take in what came to octaves."""
        for kind, (used, risk, came) in enumerate(
            zip(self.used, self._risk, self.came, strict=True)
        ):
            came[0] += self.begun[kind]
            came[1] -= self.begun[kind]
            risk[:] = map(add, risk, accumulate(came))
            came[:] = [0.0] * len(came)
            self.begun[kind] = 0
            if risk[0] > self._enough:
                used[:] = [blocks / 2 for blocks in used]
                risk[:] = [blocks / 2 for blocks in risk]


def _drawn(seen: _Seen, to: list[float], blocks: float) -> list[float]:
    """The hazards of classes together, drawn ``to`` others that weigh as so many blocks."""
    used, risk = (map(sum, zip(*rows, strict=True)) for rows in zip(*seen, strict=True))
    return [
        min(1.0, (uses + other * blocks) / (came + blocks))
        for uses, came, other in zip(used, risk, to, strict=False)
    ]


_Kept = tuple[float, float, float, float]  # worth, uses, seconds, and the share that is left then


def _worth(hazards: list[float], apart: int) -> list[float]:
    """The index at the start of each octave, and at the end of the last.

    Whatever comes after the last octave is not counted: a block that old would never leave.

    From the last octave to the first: who keeps a block through an octave keeps it on through all
    that is worth more than what came until then.

    Args:
        hazards: of the octaves up to ``apart`` together, and of each one after it.
        apart: octave.
    """
    table: list[float] = []
    later: list[_Kept] = []  # each worth less than the one before
    steps = list(zip(hazards, [STARTS[apart + 1], *WIDTHS[apart + 1 :]], strict=True))
    for hazard, width in reversed(steps):
        uses, seconds, left = hazard, width * (1 - hazard / 2), 1 - hazard
        worth = uses / seconds
        while later and later[-1][0] > worth:
            _, more, longer, rest = later.pop()
            uses, seconds, left = uses + left * more, seconds + left * longer, left * rest
            worth = uses / seconds
        later.append((worth, uses, seconds, left))
        table.append(worth)
    table.reverse()
    return [*[table[0]] * apart, *table, table[-1] / 2]
