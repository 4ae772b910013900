"""The state of every slot of a tier, and all its transitions. No bytes, locks or threads.

::

    absent --reserve--> FILLING --publish--> READY --evict, drop, clear--> absent
                           |                   ^|
                           +--fail--> absent   pin, pin_any / unpin (a count)

    A block that is removed while its slot is under lease leaves an orphan: a slot without a key,
    which returns to the free list when the last lease on it ends.

Invariants:

* A slot is free, or has a key, or is an orphan. The three together are the open slots.
* A slot under lease is FILLING or pinned, and is never given to another key.
* A READY block is evicted only when it is not pinned and no block that continues it is in the
  index: a chain loses its tail before its head, under every policy.
* Cost is linear in the number of blocks of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial

from kvcache.events import BlockEvents
from kvcache.eviction import Policy
from kvcache.eviction.fallback import Fallback
from kvcache.eviction_pass import EvictionPass
from kvcache.guarded_policy import GuardedPolicy
from kvcache.hints import Hints
from kvcache.keys import Branch, Keys
from kvcache.segments import SegmentTable


class Index:
    """Which key is in which slot.

    Args:
        policy: chooses which blocks to evict when there is no free slot.
        clock: returns seconds for the policy; never goes back.
        fallback: makes the policy that replaces a failed one; without it, exceptions are raised.

    Attributes:
        events: is notified when blocks become READY and when READY blocks are removed.
        segments: all blocks; to read only, as are the pins.
        pins: pin counts by slot.
        admission: whether the policy may decline blocks that are not worth a slot.
        slots: how many slots are open.
        lookup_blocks, hit_blocks, ...: counts, as in ``kvcache.TierStats``.
    """

    def __init__(
        self, policy: Policy, clock: Callable[[], float], fallback: Fallback | None = None
    ) -> None:
        self.events = BlockEvents()
        self._clock = clock
        self.segments = SegmentTable()  # FILLING and READY blocks
        self._policy = GuardedPolicy(policy, clock, fallback, self.segments)
        self.slots = 0
        self._free: list[int] = []
        self.pins: dict[int, int] = {}  # no entry without pins
        self._orphans: set[int] = set()
        self.hints = Hints()
        self._may_have_hints = False  # spares the calls to ``hints`` while there are none
        self.admission = True
        self.lookup_blocks = self.hit_blocks = 0
        self.stored_blocks = 0
        self.declined_blocks = 0
        self.failed_blocks = 0
        self.evicted_blocks = 0
        self.dropped_blocks = 0

    @property
    def policy(self) -> Policy:
        """The policy in use."""
        return self._policy.policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self._policy.policy = policy

    def open_slots(self, count: int) -> None:
        """Make the slots from 0 to ``count - 1`` usable, the lowest ones first."""
        self._free[:0] = range(count - 1, self.slots - 1, -1)
        self.slots = self._policy.slots = max(count, self.slots)

    def restore(self, branches: Sequence[Branch], held: Sequence[int], slots: int) -> bool:
        """Open the slots of a new index after a restart, some with READY blocks.

        Args:
            branches: the blocks as segments of chains, oldest first.
            held: the slot of each block, in the same order.
            slots: how many slots to open.

        Returns:
            whether it was done: not if a key is there twice, or if a chain continues itself.
        """
        if not self.segments.restore(branches, tuple(held)):
            return False
        self.slots = self._policy.slots = slots
        if len(held) < slots:
            taken = set(held)
            self._free = [slot for slot in range(slots - 1, -1, -1) if slot not in taken]
        self._policy.report_added(branches)
        return True

    def __len__(self) -> int:
        return len(self.segments.first_slots)

    def __contains__(self, key: bytes) -> bool:
        segment = self.segments.find(key)
        return segment is not None and segment.ready

    def ready(self) -> dict[bytes, int]:
        """The slots of all READY blocks, in time linear in their number."""
        return self.segments.slots(ready=True)

    def filling(self) -> dict[bytes, int]:
        """The slots of all FILLING blocks."""
        return self.segments.slots(ready=False)

    @property
    def pinned_slots(self) -> int:
        return len(self.pins.keys() | self.filling().values())

    @property
    def free_slots(self) -> int:
        """How many blocks can be reserved without an eviction."""
        return len(self._free)

    def count_prefix(self, chain: Sequence[bytes], start: int = 0) -> int:
        """How many leading blocks of ``chain[start:]`` are READY."""
        return self.segments.count_ready(tuple(chain), start)

    def access(self, chain: Sequence[bytes], start: int) -> int:
        """Record a request for ``chain[start:]``; return how many leading blocks are READY."""
        chain = tuple(chain)
        end = start + self.segments.count_ready(chain, start)
        if self._may_have_hints:
            self.hints.clear_done(chain)
        self.lookup_blocks += max(0, len(chain) - start)
        self.hit_blocks += end - start
        self._policy.access(chain, end)
        return end - start

    def pin(self, keys: Sequence[bytes]) -> list[int]:
        """Pin the leading READY blocks of ``keys`` and return their slots."""
        find = self.segments.find
        keys = tuple(keys)
        slots: list[int] = []
        while len(slots) < len(keys):
            segment = find(keys[len(slots)])
            if segment is None or not segment.ready:
                break
            slots += segment.slots_for(keys, len(slots))
        self._pin(slots)
        return slots

    def pin_any(self, keys: Sequence[bytes]) -> tuple[list[int], list[int]]:
        """Pin all blocks of ``keys`` that are READY or FILLING.

        A FILLING block becomes READY and pinned when published, and an orphan when it fails.

        Returns:
            their positions in ``keys``, and their slots.
        """
        positions, slots = self.segments.locate(tuple(keys))
        self._pin(slots)
        return positions, slots

    def _pin(self, slots: Iterable[int]) -> None:
        pins = self.pins
        for slot in slots:
            pins[slot] = pins.get(slot, 0) + 1

    def unpin(self, slots: Sequence[int]) -> None:
        """Remove one pin of each slot."""
        pins, orphans = self.pins, self._orphans
        for slot in slots:
            if remaining := pins[slot] - 1:
                pins[slot] = remaining
                continue
            del pins[slot]
            if slot in orphans:
                orphans.remove(slot)
                self._free.append(slot)

    def reserve(self, keys: Sequence[bytes], parent: bytes | None) -> tuple[list[int], list[int]]:
        """Make the absent ones of ``keys`` FILLING; return their positions and their slots.

        If there is no room for all, these are the leading ones.
        """
        first_slots = self.segments.first_slots
        keys = tuple(keys)
        absent: Sequence[int] = range(len(keys))
        if len(set(keys)) < len(keys) or not first_slots.keys().isdisjoint(keys):
            absent = self.segments.find_absent(keys)
        if len(self._free) < len(absent):
            before = keys[absent[0] - 1] if absent[0] else parent
            new = keys if len(absent) == len(keys) else tuple(keys[at] for at in absent)
            # Spare the parent, which gets a child, and the blocks of this request.
            spared = [] if before is None else [before]
            spared += [key for key in keys if key in first_slots] if len(new) < len(keys) else []
            # Without its parent a block cannot be found, so no block is evicted for it.
            useful = before is None or before in first_slots
            room = self._make_room(new, before, spared, can_evict=useful)
            absent = absent[:room]
        return list(absent), self._fill(keys, parent, absent)

    def reserve_branches(
        self, chains: Sequence[Branch], sides: Sequence[Branch] = ()
    ) -> tuple[list[int], list[int]]:
        """Reserve the absent blocks of several segments, as :meth:`reserve` does for one.

        A segment of ``sides`` gets no slot if its parent is neither in the index nor reserved here.
        If there is no room for all, the last ones of ``sides`` get slots: a request needs those.
        """
        if len(chains) == 1 and not sides:
            return self.reserve(*chains[0])
        self._policy.announce(sides)
        branches = list(enumerate([*chains, *sides]))
        by_priority = [*branches[: len(chains)], *reversed(branches[len(chains) :])]
        first_slots, spared = self.segments.first_slots, set[bytes]()
        absent_of: list[Sequence[int]] = [()] * len(branches)
        new: dict[bytes, None] = {}
        loose: set[bytes] = set()  # new keys for which no block is evicted
        for number, (keys, parent) in by_priority:
            absent = self.segments.absent(tuple(keys))
            if absent and not (new.keys().isdisjoint(keys) and loose.isdisjoint(keys)):
                absent = [at for at in absent if keys[at] not in new and keys[at] not in loose]
            if absent:
                before = keys[absent[0] - 1] if absent[0] else parent
                added = [keys[at] for at in absent]
                if before is None or before in first_slots or before in new:
                    new.update(dict.fromkeys(added))
                    spared.update(() if before is None else (before,))
                elif number < len(chains) or before in loose:
                    loose.update(added)
                else:
                    self.declined_blocks += len(absent)
                    absent = ()
            absent_of[number] = absent
        room = len(new)
        if len(self._free) < room:
            spared.update(key for _, (keys, _) in branches for key in keys if key in first_slots)
            room = self._make_room(tuple(new), branches[0][1][1], spared, can_evict=True)
        loose_room = min(len(loose), len(self._free) - room)
        self.declined_blocks += len(loose) - loose_room
        for number, (keys, _) in by_priority:
            absent = absent_of[number]
            if absent and keys[absent[0]] in loose:
                absent_of[number] = absent = absent[:loose_room]
                loose_room -= len(absent)
            else:
                absent_of[number], room = absent[:room], max(0, room - len(absent))
        positions, slots, offset = list[int](), list[int](), 0
        for (_, (keys, parent)), filled in zip(branches, absent_of, strict=True):
            positions += [offset + at for at in filled]
            slots += self._fill(tuple(keys), parent, filled)
            offset += len(keys)
        return positions, slots

    def _fill(self, keys: Keys, parent: bytes | None, absent: Sequence[int]) -> list[int]:
        """Make the blocks at ``absent`` positions FILLING in free slots, and return these."""
        if not (count := len(absent)):
            return []
        slots = tuple(self._free[: -count - 1 : -1])
        del self._free[-count:]
        if count == len(keys):
            self.segments.add(keys, slots, parent)
        else:
            self.segments.add_at(keys, absent, slots, parent)
        return list(slots)

    def _make_room(
        self, new: Keys, parent: bytes | None, spared: Collection[bytes], *, can_evict: bool
    ) -> int:
        """Evict blocks, but none of ``spared``; return how many leading ``new`` blocks fit."""
        admitted = self._policy.admit(new, parent) if self.admission else len(new)
        need = admitted - len(self._free)
        if need > 0 and can_evict:
            for key in spared:
                self.segments.add_child(key)
            try:
                self._evict(need)
            finally:
                for key in spared:
                    self.segments.remove_child(key)
        room = min(admitted, len(self._free))
        self.declined_blocks += len(new) - room
        return room

    def _evict(self, need: int) -> None:
        """Evict ``need`` blocks, or as many as can be."""
        eviction = EvictionPass(self.segments, self.pins, need)
        hints, take = self.hints, eviction.take
        try:
            if self._may_have_hints:
                now = self._clock()
                for key in hints.victims(lambda key: key not in self or not take([key])):
                    self._policy.report_removed([key])
                    if not eviction.need:
                        return
                if hints.any_protected:
                    eviction.is_protected = partial(hints.is_protected, now=now)
                    self._policy.evict(eviction)
                    eviction.is_protected = None
            if eviction.need:
                self._policy.evict(eviction)
        finally:
            eviction.need = 0  # a policy that stored ``take`` cannot evict with it later
            evicted = eviction.keys
            self._free += eviction.slots
            if self._may_have_hints:
                hints.discard(evicted)
                self._may_have_hints = bool(hints)
            self.evicted_blocks += len(evicted)
            self.events.removed(evicted)

    def mark_done(self, keys: Sequence[bytes]) -> None:
        """Mark the held blocks of ``keys`` as done: they are evicted before all others."""
        self._may_have_hints = True
        self.hints.mark_done([key for key in keys if key in self.segments.first_slots])

    def protect(self, keys: Sequence[bytes], seconds: float) -> None:
        """Protect the held blocks of ``keys`` for ``seconds``: all others are evicted first."""
        held = [key for key in keys if key in self.segments.first_slots]
        now = self._clock()
        self._may_have_hints = True
        self.hints.protect(held, now + seconds, now, self.slots)

    def publish(self, slots: Sequence[int], failed: Collection[bytes] = ()) -> None:
        """Make FILLING slots READY, in the order they were reserved, except those of ``failed``."""
        filled, orphans = tuple(slots), self._orphans
        if failed:
            remaining = set(filled)
            # After a clear, another lease may fill the same key in another slot.
            found = ((key, self.segments.find(key)) for key in failed)
            bad = [key for key, at in found if at and at.slots_for((key,), 0)[0] in remaining]
            remaining.difference_update(self._remove_blocks(bad))
            filled = tuple(slot for slot in filled if slot in remaining)
            self.failed_blocks += len(bad)
        if orphans and not orphans.isdisjoint(filled):  # ``clear`` was called meanwhile
            cleared = orphans.intersection(filled)
            self.unpin([slot for slot in filled if slot in cleared])
            filled = tuple(slot for slot in filled if slot not in cleared)
        chains = self.segments.publish(filled)
        for keys, _ in chains:
            self.stored_blocks += len(keys)
            self.events.stored(keys)
        self._policy.report_added(chains)

    def drop(self, keys: Collection[bytes]) -> None:
        """Remove READY blocks; a pinned slot becomes an orphan."""
        present = [key for key in dict.fromkeys(keys) if key in self]
        self._remove_blocks(present)
        self.dropped_blocks += len(present)
        self.events.removed(present)
        self._policy.report_removed(present)

    def clear(self) -> None:
        """Remove every block, READY and FILLING."""
        ready, filling = self.ready(), self.filling()
        self.hints.discard(ready)
        self.hints.discard(filling)
        self._pin(filling.values())  # the lease that fills them unpins them at its end
        for slot in (*ready.values(), *filling.values()):
            self._release_slot(slot)
        self.segments.clear()
        self.events.cleared()
        self._policy.report_removed(list(ready))

    def _remove_blocks(self, keys: Sequence[bytes]) -> list[int]:
        """Remove the blocks of ``keys`` and return their slots."""
        slots = []
        for key in reversed(keys):  # from the tail of a chain, so that no segment is cut in two
            slots.append(self.segments.remove(key))
            self._release_slot(slots[-1])
        self.hints.discard(keys)
        return slots

    def _release_slot(self, slot: int) -> None:
        """Free a slot that lost its block; a slot under lease becomes an orphan."""
        if slot in self.pins:
            self._orphans.add(slot)
        else:
            self._free.append(slot)

    def check(self) -> None:
        """Raise ``AssertionError`` if an invariant is broken. For tests: time linear in slots."""
        self.segments.check()
        free, pins = set(self._free), self.pins
        held = {*self.ready().values(), *self.filling().values()}
        assert len(free) == len(self._free), "a slot is free twice"
        assert free.isdisjoint(held | pins.keys()), "a free slot is in use"
        assert len(held) == len(self), "a slot has two blocks"
        assert self._orphans == pins.keys() - held, "orphans are miscounted"
        assert all(count > 0 for count in pins.values()), "pins are miscounted"
        assert len(free) + len(held) + len(self._orphans) == self.slots, "a slot is lost"
