"""Chains of keys, and how far two of them go together.

Always true here: keys are in tuples. One that is a part of another is cut out by slices, whole ones
are compared at once, and what is only kept is soon nothing to Python's garbage collector.
"""

from __future__ import annotations

from itertools import compress, count
from operator import ne

Keys = tuple[bytes, ...]


def alike(ours: Keys, first: int, theirs: Keys, at: int) -> int:
    """How many keys ``ours`` from ``first`` and ``theirs`` from ``at`` begin with alike."""
    most = min(len(ours) - first, len(theirs) - at)
    ours, theirs = ours[first : first + most], theirs[at : at + most]
    return most if ours == theirs else next(compress(count(), map(ne, ours, theirs)))
