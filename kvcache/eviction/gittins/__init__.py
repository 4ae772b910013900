"""The learned policy: it evicts the block with the slot that is least likely to have a hit soon.

The question. An LRU cache assumes that the block used last is used next. Real traffic differs: a
chat comes back after a minute, an agent within seconds, and most documents never. Which block
should leave can be learned from how soon blocks like it were reused.

What is learned. Blocks are divided into a few *classes*: new chains, extensions of known chains,
blocks used 2-3, 4-15 or more times, last blocks of requests, and side blocks (windows and states).
The *age* of a block, the time since its last use, is divided into *octaves*. For each class and
octave the policy counts how many blocks reached that age and how many of them were reused there.
The quotient is the *hazard*. Evicted and declined blocks stay known for a while (a
ghost list), so that the counts cover blocks that were not kept, too. Without them, a policy would
only ever see that its decisions were right.

What a slot is worth. Keeping a block until it reaches some age has a chance of a hit, and takes the
slot for some time. The *Gittins index* is the maximum of chance / expected time over all ages at
which to give up. It is the best rule for which job of unknown length to serve next (Aalto, Ayesta,
Righter, "On the Gittins index in the M/G/1 queue", Queueing Systems 2009), and likewise for which
block with an unknown next use to keep. The index can rise with age: if no chat comes back within
ten seconds, a new block is worth less than one that is half a minute old. A new block that is worth
less than the next victim is *declined*: it is not stored, and not copied.

What keeps it cheap. Blocks of one request and class are one *run*, and are moved and evicted
together. Time stands still within an *epoch* of a few seconds. The runs of one class and epoch are
a *cohort* and have one worth, so the policy compares cohorts, not blocks.

What keeps it safe. The hazards can be wrong, for example when the traffic changes. LRU would hold
the blocks used last, so the policy knows which blocks it lacks that LRU would have. The *LRU
budget* limits their number to a small stake, and to more for each hit that the policy has won
against LRU. When the budget is used up, the policy evicts only what LRU would not hold.

Modules: ``hazards`` learns and computes the index; ``epochs`` has the data structures;
``lru_budget`` is the budget; ``ranking`` finds the next victim; ``known_runs`` keeps the history
and advances time; ``side_runs`` ranks side blocks; ``policy`` has the calls of the index.
``docs/eviction.md`` has measurements, and ``docs/decisions/0008-eviction-is-learned.md`` the
alternatives that were tried.
"""

from .policy import Gittins

__all__ = ["Gittins"]
