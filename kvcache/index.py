"""The state of every slot of a tier, and all its transitions. No bytes, locks or threads.

::

    absent --reserve--> FILLING --publish--> READY --evict, drop, clear--> absent
                           |                   ^|
                           +--fail--> absent   pin, pin_any / unpin (a count)

    A block that is removed while its slot is under lease leaves an orphan: a slot without a key,
    which returns to the free list when the last lease on it ends.

Always true here:

* A slot is free, or has a key, or is an orphan. The three together are the open slots.
* A slot under lease is FILLING or pinned, and is never given to another key.
* A READY block is evicted only when it is not pinned and no block that continues it is in the
  index: a chain loses its tail before its head, under every policy.
* Cost is linear in the number of blocks of a call.
* A policy may be any class. If it raises or returns a wrong result, no slot is lost, and
  ``fallback`` makes a replacement from the READY blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from operator import index as as_integer
from typing import Any

from kvcache.events import BlockEvents
from kvcache.eviction import Policy
from kvcache.eviction.fallback import Fallback
from kvcache.guards.calls import raised_by_signal
from kvcache.hints import Hints
from kvcache.keys import Keys
from kvcache.segments import EvictionPass, SegmentTable


class Index:
    """Which key is in which slot.

    Args:
        policy: chooses which blocks to evict when there is no free slot.
        clock: returns seconds for the policy; never goes back.
        fallback: makes the policy that replaces a failed one; without it, exceptions are raised.

    Attributes:
        events: is notified when blocks become READY and when READY blocks are removed.
        segments: all blocks; to read only, as are the next two.
        pins: pin counts by slot.
        policy: the policy in use.
        admission: whether the policy may decline blocks that are not worth a slot.
        slots: how many slots are open.
        lookup_blocks, hit_blocks, ...: counts, as in ``kvcache.TierStats``.
    """

    def __init__(
        self, policy: Policy, clock: Callable[[], float], fallback: Fallback | None = None
    ) -> None:
        self.events = BlockEvents()
        self.policy = policy
        self._fallback = fallback
        self._clock = clock
        self.segments = SegmentTable()  # FILLING and READY blocks
        self.slots = 0
        self._free: list[int] = []
        self.pins: dict[int, int] = {}  # no entry without pins
        self._orphans: set[int] = set()
        self.hints = Hints()
        self._may_have_hints = False  # spares the calls to ``hints`` while there are none
        self.admission = True
        self.lookup_blocks = 0
        self.hit_blocks = 0
        self.stored_blocks = 0
        self.declined_blocks = 0
        self.failed_blocks = 0
        self.evicted_blocks = 0
        self.dropped_blocks = 0

    def open_slots(self, count: int) -> None:
        """Make the slots from 0 to ``count - 1`` usable."""
        # Slots are taken from the end of the list, so that the lowest ones are used first.
        self._free[:0] = range(count - 1, self.slots - 1, -1)
        self.slots = max(count, self.slots)

    def restore(self, held: Sequence[tuple[int, bytes, bytes | None]]) -> None:
        """Make free slots READY after a restart: slot, key and parent of each, oldest first."""
        taken = {slot for slot, _, _ in held}
        self._free = [slot for slot in self._free if slot not in taken]
        now = self._clock()
        for slot, key, parent in held:
            self.segments.add((key,), (slot,), parent)
            self._report_added(self.segments.publish((slot,)), now)

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

    def access(self, chain: Sequence[bytes], start: int) -> int:
        """Record a request for ``chain[start:]``; return how many leading blocks are READY."""
        find = self.segments.find
        chain = tuple(chain)
        end = start
        while end < len(chain):
            segment = find(chain[end])
            if segment is None or not segment.ready:
                break
            end += len(segment.slots_for(chain, end))
        if self._may_have_hints:
            self.hints.clear_done(chain)
        self.lookup_blocks += max(0, len(chain) - start)
        self.hit_blocks += end - start
        try:
            self.policy.access(chain, end, self._clock())
        except BaseException as error:  # noqa: BLE001
            self._replace_policy(error)
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
        find = self.segments.find
        keys = tuple(keys)
        positions: list[int] = []
        slots: list[int] = []
        at = 0
        while at < len(keys):
            if (segment := find(keys[at])) is None:
                at += 1
                continue
            found = segment.slots_for(keys, at)
            positions += range(at, at + len(found))
            slots += found
            at += len(found)
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
        """Make the absent ones of ``keys`` FILLING; the leading ones if there is no room for all.

        Returns:
            the positions in ``keys`` that got a slot, and their slots.
        """
        first_slots, free = self.segments.first_slots, self._free
        keys = tuple(keys)
        absent: Sequence[int] = range(len(keys))
        if len(set(keys)) < len(keys) or not first_slots.keys().isdisjoint(keys):
            firsts = {key: at for at, key in reversed(list(enumerate(keys)))}
            absent = sorted(at for key, at in firsts.items() if key not in first_slots)
        if len(free) < len(absent):
            absent = self._make_room(keys, parent, absent)
        if not absent:
            return [], []
        count = len(absent)
        slots = tuple(free[: -count - 1 : -1])
        del free[-count:]
        done = 0
        while done < count:
            first, end = absent[done], count
            if absent[-1] - first >= end - done:  # a key in between is not absent
                end = next(at for at in range(done, end) if absent[at] - first > at - done)
            before = keys[first - 1] if first else parent
            self.segments.add(keys[first : first + end - done], slots[done:end], before)
            done = end
        return list(absent), list(slots)

    def _make_room(self, keys: Keys, parent: bytes | None, absent: Sequence[int]) -> Sequence[int]:
        """Evict blocks for the keys at ``absent`` positions; return the positions that got room."""
        segments, first_slots, wanted = self.segments, self.segments.first_slots, len(absent)
        first = absent[0]
        parent = keys[first - 1] if first else parent
        admitted = wanted
        if self.admission:
            new = keys if wanted == len(keys) else tuple(keys[at] for at in absent)
            admitted = self._admit(new, parent)
        need = admitted - len(self._free)
        # Without its parent a block cannot be found, so no block is evicted for it.
        if need > 0 and (parent is None or parent in first_slots):
            # Spare the parent, which gets a child, and the blocks of this request.
            spared = [] if parent is None else [parent]
            if wanted < len(keys):
                spared += [key for key in keys if key in first_slots]
            for key in spared:
                segments.add_child(key)
            try:
                self._evict(need)
            finally:
                for key in spared:
                    segments.remove_child(key)
        room = min(admitted, len(self._free))
        self.declined_blocks += wanted - room
        return absent[:room]

    def _admit(self, new: Keys, parent: bytes | None) -> int:
        """How many of the leading ``new`` blocks the policy admits."""
        policy: Any = self.policy  # may return any type
        try:
            return max(0, min(len(new), as_integer(policy.admit(new, parent, self._clock()))))
        except BaseException as error:  # noqa: BLE001
            self._replace_policy(error)
            return len(new)

    def _run_policy(self, eviction: EvictionPass) -> None:
        """Let the policy offer blocks until enough are evicted or no more can be."""
        try:
            self.policy.evict(eviction.need, eviction.take)
        except BaseException as error:  # noqa: BLE001
            self._replace_policy(error)
            self.policy.evict(eviction.need, eviction.take)

    def _report_added(self, chains: Iterable[tuple[Keys, bytes | None]], now: float) -> None:
        """Report blocks that became READY to the policy."""
        try:
            for keys, parent in chains:
                self.policy.add(keys, parent, now)
        except BaseException as error:  # noqa: BLE001
            self._replace_policy(error)

    def _report_removed(self, keys: Sequence[bytes]) -> None:
        """Report blocks that were removed, but not evicted, to the policy."""
        try:
            self.policy.remove(keys)
        except BaseException as error:  # noqa: BLE001
            self._replace_policy(error)

    def _replace_policy(self, error: BaseException) -> None:
        """Replace the policy after it raised ``error``: its state is unreliable.

        Raises ``error`` if a signal caused it, or if there is no fallback.
        """
        if self._fallback is None:
            raise error
        segments = self.segments.by_first_slot.values()
        held = [(each.keys, each.parent) for each in segments if each.ready]
        self.policy = self._fallback(self.policy, error, self.slots, held, self._clock())
        if raised_by_signal(error):
            raise error

    def _evict(self, need: int) -> None:
        """Evict ``need`` blocks, or as many as can be."""
        eviction = EvictionPass(self.segments, self.pins, need)
        hints, take = self.hints, eviction.take
        try:
            if self._may_have_hints:
                now = self._clock()
                for key in hints.victims(lambda key: key not in self or not take([key])):
                    self._report_removed([key])
                    if not eviction.need:
                        return
                if hints.any_protected:
                    eviction.is_protected = partial(hints.is_protected, now=now)
                    self._run_policy(eviction)
                    eviction.is_protected = None
            if eviction.need:
                self._run_policy(eviction)
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
        self._report_added(chains, self._clock())

    def drop(self, keys: Collection[bytes]) -> None:
        """Remove READY blocks; a pinned slot becomes an orphan."""
        present = [key for key in dict.fromkeys(keys) if key in self]
        self._remove_blocks(present)
        self.dropped_blocks += len(present)
        self.events.removed(present)
        self._report_removed(present)

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
        self._report_removed(list(ready))

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
