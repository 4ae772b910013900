"""The state of every slot of a front tier, and every change of it. No bytes, locks or threads.

::

    absent --reserve--> FILLING --publish--> READY --evict, drop, clear--> absent
                           |                   ^|
                           +--fail--> absent   pin, hold / unpin (a count)

    A block that leaves the index while its slot is under lease leaves an orphan: a slot without a
    key, back on the free list when the last lease that has it ends.

Always true here:

* A slot is free, or has a key, or is an orphan; the three together are the open slots.
* A slot under lease has ``pins > 0`` and is never given to another key.
* A READY block goes to eviction only when it is not pinned and no block that continues it is in the
  index: a chain loses its tail before its head, whatever the policy answers.
* Cost is linear in the blocks asked about.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice

from kvcache.changes import Changes
from kvcache.eviction import Keep, Policy
from kvcache.hints import Hints


class Index:
    """Which key is in which slot.

    Args:
        policy: the order in which blocks leave when there is no free slot.
        clock: seconds, for the policy; never goes back.
    """

    def __init__(self, policy: Policy, clock: Callable[[], float]) -> None:
        self.changes = Changes()  # told of READY blocks
        self._policy = policy
        self._clock = clock
        self._ready: dict[bytes, int] = {}
        self._filling: dict[bytes, int] = {}
        self._free: list[int] = []
        self._key: list[bytes | None] = []  # by slot
        self._after: list[bytes | None] = []  # by slot: the key its block continues
        self._pins: list[int] = []  # by slot
        self.hints = Hints()
        self._children: list[int] = []  # by slot: blocks in the index that continue its block
        self._fatherless: dict[bytes, int] = {}  # the same of keys that are not in the index
        self.declines = True  # blocks that the policy finds not worth a slot
        self.lookup_blocks = 0
        self.hit_blocks = 0
        self.stored_blocks = 0
        self.declined_blocks = 0
        self.failed_blocks = 0
        self.evicted_blocks = 0
        self.dropped_blocks = 0

    def open_slots(self, upto: int) -> None:
        """Let slots below ``upto`` be used, from now on."""
        first, more = len(self._key), upto - len(self._key)
        self._key += [None] * more
        self._after += [None] * more
        self._pins += [0] * more
        self._children += [0] * more
        # The last entry is taken first, so that slots are used from the lowest up.
        self._free[:0] = range(upto - 1, first - 1, -1)

    def restore(self, held: Sequence[tuple[int, bytes, bytes | None]]) -> None:
        """Make free slots READY as they were before a restart, the oldest first.

        ``held`` has their slots and keys, and the keys that their blocks continue.
        """
        taken = {slot for slot, _, _ in held}
        self._free = [slot for slot in self._free if slot not in taken]
        now = self._clock()
        for slot, key, parent in held:
            self._ready[key] = slot
            self._key[slot] = key
            self._after[slot] = parent
            self._children[slot] = self._fatherless.pop(key, 0)
            if parent is not None:
                self._count(parent, 1)
            self._policy.add([key], parent, now)

    def __len__(self) -> int:
        return len(self._ready) + len(self._filling)

    def __contains__(self, key: bytes) -> bool:
        return key in self._ready

    @property
    def slots(self) -> int:
        return len(self._key)

    @property
    def pinned_slots(self) -> int:
        return len(self._pins) - self._pins.count(0)

    def access(self, chain: Sequence[bytes], start: int) -> int:
        """A request asks for ``chain[start:]``; give how many of its leading blocks are READY."""
        ready = self._ready
        end = start
        for key in islice(chain, start, None):
            if key not in ready:
                break
            end += 1
        self._policy.access(chain, end, self._clock())
        self.hints.used(chain)
        self.lookup_blocks += max(0, len(chain) - start)
        self.hit_blocks += end - start
        return end - start

    def pin(self, keys: Sequence[bytes]) -> list[int]:
        """Pin the leading READY blocks of ``keys`` and give their slots."""
        ready, pins = self._ready, self._pins
        slots: list[int] = []
        for key in keys:
            slot = ready.get(key)
            if slot is None:
                break
            pins[slot] += 1
            slots.append(slot)
        return slots

    def hold(self, keys: Sequence[bytes]) -> tuple[list[int], list[int]]:
        """Pin those of ``keys`` that are READY or FILLING.

        A FILLING block is READY and pinned when it is published; one that fails leaves an orphan.

        Returns:
            their positions in ``keys``, and their slots.
        """
        ready, filling, pins = self._ready, self._filling, self._pins
        positions: list[int] = []
        slots: list[int] = []
        for at, key in enumerate(keys):
            slot = ready.get(key)
            if slot is None:
                slot = filling.get(key)
            if slot is not None:
                pins[slot] += 1
                positions.append(at)
                slots.append(slot)
        return positions, slots

    def unpin(self, slots: Sequence[int]) -> None:
        """Take back one pin of each slot."""
        pins, names, free = self._pins, self._key, self._free
        for slot in slots:
            pins[slot] -= 1
            if not pins[slot] and names[slot] is None:
                free.append(slot)

    def reserve(self, keys: Sequence[bytes], after: bytes | None) -> tuple[list[int], list[int]]:
        """Make absent ``keys`` FILLING, the leading ones when there is no room for all.

        Returns:
            the positions in ``keys`` that got a slot, and their slots.
        """
        ready, filling = self._ready, self._filling
        if ready.keys().isdisjoint(keys) and not (filling and not filling.keys().isdisjoint(keys)):
            absent = list(range(len(keys)))
        else:
            absent = [at for at, key in enumerate(keys) if key not in ready and key not in filling]
        if not absent:
            return [], []
        asked: set[bytes | None] = set(keys)
        if len(asked) < len(keys):
            firsts = {key: at for at, key in reversed(list(enumerate(keys)))}
            absent = [at for at in absent if firsts[keys[at]] == at]
        free = self._free
        if len(free) < len(absent):
            absent = self._make_room(keys, asked, after, absent)
            if not absent:
                return [], []
        names, afters, pins, children = self._key, self._after, self._pins, self._children
        fatherless = self._fatherless
        last, before = -2, -1  # where in `keys`, and in which slot
        slots = free[: -len(absent) - 1 : -1]
        del free[-len(absent) :]
        for at, slot in zip(absent, slots, strict=True):
            key = names[slot] = keys[at]
            filling[key] = slot
            pins[slot] = 1
            if fatherless:
                children[slot] = fatherless.pop(key, 0)
            if at == last + 1:
                children[before] += 1
                afters[slot] = keys[last]
            else:
                parent = afters[slot] = keys[at - 1] if at else after
                if parent is not None:
                    self._count(parent, 1)
            last, before = at, slot
        return absent, slots

    def _make_room(
        self,
        keys: Sequence[bytes],
        asked: set[bytes | None],
        after: bytes | None,
        absent: list[int],
    ) -> list[int]:
        """Evict for ``absent`` ones of ``keys``, which as a set are ``asked``; give those of them
        that can have a slot."""
        first = absent[0]
        parent = keys[first - 1] if first else after
        admitted = len(absent)
        if self.declines:
            admitted = self._policy.admit([keys[at] for at in absent], parent, self._clock())
        need = min(admitted, len(absent)) - len(self._free)
        # A block whose parent is not here could not be found: nothing that can be goes for it.
        if need > 0 and (parent is None or parent in self._ready or parent in self._filling):
            asked.add(parent)  # what the new blocks continue stays
            self._evict(need, asked)
        room = min(admitted, len(self._free))
        self.declined_blocks += len(absent) - min(room, len(absent))
        return absent[:room]

    def _evict(self, count: int, held: Collection[bytes | None]) -> None:
        """Have so many blocks go, if so many can, and none that is ``held``."""
        ready, pins, children, afters = self._ready, self._pins, self._children, self._after

        def keep(key: bytes) -> bool:
            slot = ready[key]
            return True if children[slot] or pins[slot] else key in held

        gone: list[bytes] = []
        slots: list[int] = []
        try:
            for key in islice(self._victims(keep), count):
                slot = ready.pop(key)
                gone.append(key)
                slots.append(slot)
                parent = afters[slot]
                if parent is not None:
                    if (at := ready.get(parent)) is not None:  # which may go next
                        children[at] -= 1
                    else:
                        self._count(parent, -1)
        finally:  # somebody's policy may raise
            names = self._key
            for slot in slots:
                names[slot] = afters[slot] = None
            self._free += slots
            self.hints.left(gone)
            self.evicted_blocks += len(gone)
            self.changes.left(gone)

    def _victims(self, keep: Keep) -> Iterator[bytes]:
        """Whom to evict, first to go first: what callers are done with, then as the policy says."""
        victims = self._policy.victims
        hints, ready, now = self.hints, self._ready, self._clock()
        if not hints:
            return victims(keep)

        def hinted() -> Iterator[bytes]:
            for key in hints.victims(lambda key: key not in ready or keep(key)):
                self._policy.remove([key])
                yield key
            if hints.any_kept:
                yield from victims(lambda key: keep(key) or hints.is_kept(key, now))
            yield from victims(keep)

        return hinted()

    def done(self, keys: Sequence[bytes]) -> None:
        """Have those of ``keys`` that are held go before all others."""
        self.hints.done([key for key in keys if key in self._ready or key in self._filling])

    def keep(self, keys: Sequence[bytes], seconds: float) -> None:
        """Have others go before those of ``keys`` that are held, for so long."""
        held = [key for key in keys if key in self._ready or key in self._filling]
        now = self._clock()
        self.hints.keep(held, now + seconds, now, self.slots)

    def publish(self, slots: Sequence[int], failed: Collection[bytes] = ()) -> None:
        """Make FILLING slots READY, in the order of their reserve, but for those of ``failed``."""
        names, afters, pins = self._key, self._after, self._pins
        ready, filling = self._ready, self._filling
        stretches: list[tuple[list[bytes], bytes | None]] = []
        last: bytes | None = None
        for slot in slots:
            pins[slot] -= 1
            key = names[slot]
            if key is None:  # cleared meanwhile
                if not pins[slot]:
                    self._free.append(slot)
                continue
            del filling[key]
            if key in failed:
                self._forget(key, slot)
                self.failed_blocks += 1
                continue
            ready[key] = slot
            if last is None or afters[slot] != last:
                stretches.append((stretch := [], afters[slot]))
            stretch.append(key)
            last = key
        now = self._clock()
        for stretch, after in stretches:
            self.stored_blocks += len(stretch)
            self._policy.add(stretch, after, now)
            self.changes.came(stretch)

    def drop(self, keys: Collection[bytes]) -> None:
        """Forget READY blocks; a pinned slot becomes an orphan."""
        present = [key for key in dict.fromkeys(keys) if key in self._ready]
        self._policy.remove(present)
        for key in present:
            self._forget(key, self._ready.pop(key))
        self.dropped_blocks += len(present)
        self.changes.left(present)

    def clear(self) -> None:
        """Forget every block, READY and FILLING."""
        self._policy.remove(list(self._ready))
        for held in (self._ready, self._filling):
            self.hints.left(held)
            for slot in held.values():
                self._vacate(slot)
            held.clear()
        self._children = [0] * self.slots
        self._fatherless.clear()
        self.changes.cleared()

    def _forget(self, key: bytes, slot: int) -> None:
        """Take the key off its slot, which is free unless a lease still holds it."""
        self.hints.left((key,))
        parent = self._after[slot]
        if parent is not None:
            self._count(parent, -1)
        if self._children[slot]:
            self._fatherless[key] = self._children[slot]
            self._children[slot] = 0
        self._vacate(slot)

    def _vacate(self, slot: int) -> None:
        self._key[slot] = self._after[slot] = None
        if not self._pins[slot]:
            self._free.append(slot)

    def _count(self, parent: bytes, more: int) -> None:
        """So many more blocks in the index continue ``parent``."""
        slot = self._ready.get(parent)
        if slot is None:
            slot = self._filling.get(parent)
        if slot is not None:
            self._children[slot] += more
        elif left := self._fatherless.get(parent, 0) + more:
            self._fatherless[parent] = left
        else:
            del self._fatherless[parent]

    def check(self) -> None:
        """Raise ``AssertionError`` where what is always true is not; for tests, linear in slots."""
        held = self._ready | self._filling
        assert len(held) == len(self._ready) + len(self._filling), "a key is READY and FILLING"
        assert all(self._key[slot] == key for key, slot in held.items()), "key and slot disagree"
        orphans = [s for s, key in enumerate(self._key) if key is None and self._pins[s] > 0]
        assert len(set(self._free)) == len(self._free), "a slot is free twice"
        assert not any(self._pins[s] or self._key[s] for s in self._free), "a free slot is in use"
        assert len(self._free) + len(held) + len(orphans) == self.slots, "a slot is lost"
        assert all(self._pins[s] > 0 for s in self._filling.values()), (
            "a FILLING slot has no holder"
        )
        children: dict[bytes, int] = {}
        for slot in held.values():
            if (parent := self._after[slot]) is not None:
                children[parent] = children.get(parent, 0) + 1
        counted = {key: self._children[slot] for key, slot in held.items() if self._children[slot]}
        assert children == counted | self._fatherless, "children are miscounted"
        assert not any(self._children[slot] for slot in self._free), "a free slot has children"
        assert held.keys().isdisjoint(self._fatherless), "a key in the index is fatherless"
