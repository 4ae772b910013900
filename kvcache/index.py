"""The state of every slot of a front tier, and every change of it. No bytes, locks or threads.

::

    absent --reserve--> FILLING --publish--> READY --evict, drop, clear--> absent
                           |                   ^|
                           +--fail--> absent   pin, hold / unpin (a count)

    A block that leaves the index while its slot is under lease leaves an orphan: a slot without a
    key, back on the free list when the last lease that has it ends.

Always true here:

* A slot is free, or has a key, or is an orphan; the three together are the open slots.
* A slot under lease is FILLING or pinned, and is never given to another key.
* A READY block goes to eviction only when it is not pinned and no block that continues it is in the
  index: a chain loses its tail before its head, whatever the policy answers.
* Cost is linear in the blocks asked about.
* A policy may be any class: what it raises or returns costs no slot. ``fallback`` makes another one
  of what is READY where it fails.
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
from kvcache.segments import EvictionPass, Segments


class Index:
    """Which key is in which slot.

    Args:
        policy: the order in which blocks leave when there is no free slot.
        clock: seconds, for the policy; never goes back.
        fallback: makes the policy that replaces one that fails; ``None``: its exceptions go on to
            the caller.
    """

    def __init__(
        self,
        policy: Policy,
        clock: Callable[[], float],
        fallback: Fallback | None = None,
    ) -> None:
        self.events = BlockEvents()  # told of READY blocks
        self._policy = policy
        self._fallback = fallback
        self._clock = clock
        self._stretches = Segments()  # of blocks that are FILLING or READY
        self.slots = 0  # open ones
        self._free: list[int] = []
        self._pins: dict[int, int] = {}  # of slots that have any
        self._orphans: set[int] = set()  # pinned slots
        self.hints = Hints()
        self._hinted = False  # there may be some
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
        # The last entry is taken first, so that slots are used from the lowest up.
        self._free[:0] = range(upto - 1, self.slots - 1, -1)
        self.slots = max(upto, self.slots)

    def restore(self, held: Sequence[tuple[int, bytes, bytes | None]]) -> None:
        """Make free slots READY as they were before a restart, the oldest first.

        ``held`` has their slots and keys, and the keys that their blocks continue.
        """
        taken = {slot for slot, _, _ in held}
        self._free = [slot for slot in self._free if slot not in taken]
        now = self._clock()
        for slot, key, parent in held:
            self._stretches.put((key,), (slot,), parent)
            self._add(self._stretches.publish((slot,)), now)

    def __len__(self) -> int:
        return len(self._stretches.of)

    def __contains__(self, key: bytes) -> bool:
        stretch = self._stretches.find(key)
        return stretch is not None and stretch.ready

    def ready(self) -> dict[bytes, int]:
        """The slots of all READY blocks; takes as long as there are many."""
        return self._stretches.slots(ready=True)

    def filling(self) -> dict[bytes, int]:
        """The slots of all FILLING blocks."""
        return self._stretches.slots(ready=False)

    @property
    def pinned_slots(self) -> int:
        return len(self._pins.keys() | self.filling().values())

    @property
    def free_slots(self) -> int:
        """Slots that a new block can have without that another one leaves."""
        return len(self._free)

    def access(self, chain: Sequence[bytes], start: int) -> int:
        """A request asks for ``chain[start:]``; give how many of its leading blocks are READY."""
        find = self._stretches.find
        chain = tuple(chain)
        end = start
        while end < len(chain):
            stretch = find(chain[end])
            if stretch is None or not stretch.ready:
                break
            end += len(stretch.part(chain, end))
        if self._hinted:
            self.hints.used(chain)
        self.lookup_blocks += max(0, len(chain) - start)
        self.hit_blocks += end - start
        try:
            self._policy.access(chain, end, self._clock())
        except BaseException as error:  # noqa: BLE001
            self._replace_policy(error)
        return end - start

    def pin(self, keys: Sequence[bytes]) -> list[int]:
        """Pin the leading READY blocks of ``keys`` and give their slots."""
        find = self._stretches.find
        keys = tuple(keys)
        slots: list[int] = []
        while len(slots) < len(keys):
            stretch = find(keys[len(slots)])
            if stretch is None or not stretch.ready:
                break
            slots += stretch.part(keys, len(slots))
        self._pin(slots)
        return slots

    def pin_any(self, keys: Sequence[bytes]) -> tuple[list[int], list[int]]:
        """Pin those of ``keys`` that are READY or FILLING.

        A FILLING block is READY and pinned when it is published; one that fails leaves an orphan.

        Returns:
            their positions in ``keys``, and their slots.
        """
        find = self._stretches.find
        keys = tuple(keys)
        positions: list[int] = []
        slots: list[int] = []
        at = 0
        while at < len(keys):
            if (stretch := find(keys[at])) is None:
                at += 1
                continue
            found = stretch.part(keys, at)
            positions += range(at, at + len(found))
            slots += found
            at += len(found)
        self._pin(slots)
        return positions, slots

    def _pin(self, slots: Iterable[int]) -> None:
        pins = self._pins
        for slot in slots:
            pins[slot] = pins.get(slot, 0) + 1

    def unpin(self, slots: Sequence[int]) -> None:
        """Take back one pin of each slot."""
        pins, orphans = self._pins, self._orphans
        for slot in slots:
            if left := pins[slot] - 1:
                pins[slot] = left
                continue
            del pins[slot]
            if slot in orphans:
                orphans.remove(slot)
                self._free.append(slot)

    def reserve(self, keys: Sequence[bytes], parent: bytes | None) -> tuple[list[int], list[int]]:
        """Make absent ``keys`` FILLING, the leading ones when there is no room for all.

        Returns:
            the positions in ``keys`` that got a slot, and their slots.
        """
        of, free = self._stretches.of, self._free
        keys = tuple(keys)
        absent: Sequence[int] = range(len(keys))
        if len(set(keys)) < len(keys) or not of.keys().isdisjoint(keys):
            firsts = {key: at for at, key in reversed(list(enumerate(keys)))}
            absent = sorted(at for key, at in firsts.items() if key not in of)
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
            if absent[-1] - first >= end - done:  # some of those between are not absent
                end = next(at for at in range(done, end) if absent[at] - first > at - done)
            before = keys[first - 1] if first else parent
            self._stretches.put(keys[first : first + end - done], slots[done:end], before)
            done = end
        return list(absent), list(slots)

    def _make_room(self, keys: Keys, parent: bytes | None, absent: Sequence[int]) -> Sequence[int]:
        """Evict for ``absent`` ones of ``keys``; give those of them that can have a slot."""
        stretches, of, asked = self._stretches, self._stretches.of, len(absent)
        first = absent[0]
        parent = keys[first - 1] if first else parent
        admitted = asked
        if self.declines:
            new = keys if asked == len(keys) else tuple(keys[at] for at in absent)
            admitted = self._admit(new, parent)
        need = admitted - len(self._free)
        # A block whose parent is not here could not be found: nothing that can be goes for it.
        if need > 0 and (parent is None or parent in of):
            # They will be continued, or are asked for as well.
            stay = [] if parent is None else [parent]
            if asked < len(keys):
                stay += [key for key in keys if key in of]
            for key in stay:
                stretches.begin(key)
            try:
                self._evict(need)
            finally:
                for key in stay:
                    stretches.end(key)
        room = min(admitted, len(self._free))
        self.declined_blocks += asked - room
        return absent[:room]

    def _admit(self, new: Keys, parent: bytes | None) -> int:
        """How many of the leading ``new`` blocks the policy finds worth a slot."""
        policy: Any = self._policy  # of which the answer may have any type
        try:
            return max(0, min(len(new), as_integer(policy.admit(new, parent, self._clock()))))
        except BaseException as error:  # noqa: BLE001
            self._replace_policy(error)
            return len(new)

    def _offer(self, leaving: EvictionPass) -> None:
        """Have the policy offer blocks until as many have left as are to, or no more can."""
        try:
            self._policy.evict(leaving.need, leaving.take)
        except BaseException as error:  # noqa: BLE001
            self._replace_policy(error)
            self._policy.evict(leaving.need, leaving.take)

    def _add(self, chains: Iterable[tuple[Keys, bytes | None]], now: float) -> None:
        """Tell the policy of blocks that are READY."""
        try:
            for keys, parent in chains:
                self._policy.add(keys, parent, now)
        except BaseException as error:  # noqa: BLE001
            self._replace_policy(error)

    def _remove(self, keys: Sequence[bytes]) -> None:
        """Tell the policy of blocks that have left for another reason than eviction."""
        try:
            self._policy.remove(keys)
        except BaseException as error:  # noqa: BLE001
            self._replace_policy(error)

    def _replace_policy(self, error: BaseException) -> None:
        """Go on with another policy, since nothing that this one knows can be relied on any more.

        Raises ``error`` where a signal raised it, or there is no other policy.
        """
        if self._fallback is None:
            raise error
        held = [(each.keys, each.parent) for each in self._stretches.at.values() if each.ready]
        self._policy = self._fallback(self._policy, error, self.slots, held, self._clock())
        if raised_by_signal(error):
            raise error

    def _evict(self, need: int) -> None:
        """Have so many blocks go, if so many can."""
        leaving = EvictionPass(self._stretches, self._pins, need)
        hints, take = self.hints, leaving.take
        try:
            if self._hinted:
                now = self._clock()
                for key in hints.victims(lambda key: key not in self or not take([key])):
                    self._remove([key])
                    if not leaving.need:
                        return
                if hints.any_kept:
                    leaving.kept = partial(hints.is_kept, now=now)
                    self._offer(leaving)
                    leaving.kept = None
            if leaving.need:
                self._offer(leaving)
        finally:
            leaving.need = 0  # a policy that kept ``take`` can take no more with it
            gone = leaving.keys
            self._free += leaving.slots
            if self._hinted:
                hints.left(gone)
                self._hinted = bool(hints)
            self.evicted_blocks += len(gone)
            self.events.removed(gone)

    def mark_done(self, keys: Sequence[bytes]) -> None:
        """Have those of ``keys`` that are held go before all others."""
        self._hinted = True
        self.hints.mark_done([key for key in keys if key in self._stretches.of])

    def protect(self, keys: Sequence[bytes], seconds: float) -> None:
        """Have others go before those of ``keys`` that are held, for so long."""
        held = [key for key in keys if key in self._stretches.of]
        now = self._clock()
        self._hinted = True
        self.hints.protect(held, now + seconds, now, self.slots)

    def publish(self, slots: Sequence[int], failed: Collection[bytes] = ()) -> None:
        """Make FILLING slots READY, in the order of their reserve, but for those of ``failed``."""
        lent, orphans = tuple(slots), self._orphans
        if failed:
            ours = set(lent)  # after a clear, it may be another lease's key
            held = ((key, self._stretches.find(key)) for key in failed)
            bad = [key for key, at in held if at is not None and at.part((key,), 0)[0] in ours]
            ours.difference_update(self._forget(bad))
            lent = tuple(slot for slot in lent if slot in ours)
            self.failed_blocks += len(bad)
        if orphans and not orphans.isdisjoint(lent):  # they were cleared meanwhile
            cleared = orphans.intersection(lent)
            self.unpin([slot for slot in lent if slot in cleared])
            lent = tuple(slot for slot in lent if slot not in cleared)
        chains = self._stretches.publish(lent)
        for keys, _ in chains:
            self.stored_blocks += len(keys)
            self.events.stored(keys)
        self._add(chains, self._clock())

    def drop(self, keys: Collection[bytes]) -> None:
        """Forget READY blocks; a pinned slot becomes an orphan."""
        present = [key for key in dict.fromkeys(keys) if key in self]
        self._forget(present)
        self.dropped_blocks += len(present)
        self.events.removed(present)
        self._remove(present)

    def clear(self) -> None:
        """Forget every block, READY and FILLING."""
        ready, filling = self.ready(), self.filling()
        self.hints.left(ready)
        self.hints.left(filling)
        self._pin(filling.values())  # by who fills them, until they are published
        for slot in (*ready.values(), *filling.values()):
            self._vacate(slot)
        self._stretches.clear()
        self.events.cleared()
        self._remove(list(ready))

    def _forget(self, keys: Sequence[bytes]) -> list[int]:
        """Take ``keys`` off their slots, and give these."""
        slots = []
        for key in reversed(keys):  # a chain from its tail: then nothing is cut in two
            slots.append(self._stretches.remove(key))
            self._vacate(slots[-1])
        self.hints.left(keys)
        return slots

    def _vacate(self, slot: int) -> None:
        """A slot has no block any more, and is free unless a lease still holds it."""
        if slot in self._pins:
            self._orphans.add(slot)
        else:
            self._free.append(slot)

    def check(self) -> None:
        """Raise ``AssertionError`` where what is always true is not; for tests, linear in slots."""
        self._stretches.check()
        free, pins = set(self._free), self._pins
        held = {*self.ready().values(), *self.filling().values()}
        assert len(free) == len(self._free), "a slot is free twice"
        assert free.isdisjoint(held | pins.keys()), "a free slot is in use"
        assert len(held) == len(self), "a slot has two blocks"
        assert self._orphans == pins.keys() - held, "orphans are miscounted"
        assert all(count > 0 for count in pins.values()), "pins are miscounted"
        assert len(free) + len(held) + len(self._orphans) == self.slots, "a slot is lost"
