"""How the learned policy ranks side blocks: those of windows, chunks and states.

The parent of a side block is the block of the chain that ends at the same token; no block
continues a side block. The index reports a side block before its chain. So this module recognizes
it: it is new, and its parent is not held yet. An index without side blocks never announces any
(``expect_sides``), and no block is then taken for one.

Requests need only the last side blocks before the point at which they resume. A side block is
*live* while the last use of its parent was also its own, and while its parent is in the last blocks
of its run, as many as the requests were seen to need (``window``). The loss of a live block costs
what the loss of its chain costs, so it is ranked with the chain. All other side blocks are in two
classes of their own, with hazards of their own.

Invariants:

* A side run has the parts of one block. It is in ``side_ids`` of its parent as long as it exists.
* Whether a side block is live is decided when it is about to be evicted, once for each use.
"""

from __future__ import annotations

from collections.abc import Collection

from kvcache.eviction.gittins.epochs import Cohort, RankedRun
from kvcache.eviction.gittins.hazards import SIDE, SIDE_USED, Hazards
from kvcache.eviction.gittins.known_runs import KnownRuns
from kvcache.eviction.gittins.lru_budget import LruBudget
from kvcache.eviction.policy import Take
from kvcache.keys import Keys, common_prefix_len


class SideRuns(KnownRuns):
    """Runs of side blocks.

    Args:
        capacity, hazards, budget, known_limit: as in ``KnownRuns``.

    Attributes:
        expects_sides: whether the index stores side blocks; if not, no block is taken for one.
        side_ids: for a key of a chain, the ids of the side runs below it.
        window: keys at the end of a chain that have the side blocks that a request needs; 0 before
            the first lookup of side blocks.
    """

    def __init__(
        self, capacity: int, hazards: Hazards, budget: LruBudget, known_limit: int | None
    ) -> None:
        super().__init__(capacity, hazards, budget, known_limit)
        self.side_ids: dict[bytes, list[int]] = {}
        self.expects_sides = False
        self.window = 0
        self._window_seen = False  # a request needed fewer side blocks than its chain has blocks
        # Lookups of side blocks since the last lookup of a chain: each has the first and the last
        # parent, and the number of blocks.
        self._needed: list[tuple[bytes, bytes, int]] = []
        # The run of a chain that lost a live side block, and its cohort then: it is evicted next.
        self._dead: tuple[RankedRun, Cohort] | None = None

    def expect_sides(self) -> None:
        self.expects_sides = True

    def _is_side(self, key: bytes, parent: bytes) -> bool:
        """Return whether an unknown block that continues ``parent`` is a side block."""
        if key in self.side_ids:
            return False
        run = self._run_with(parent)
        if run is None or run.side or run.held < len(run.keys):
            return True
        # The chain continues the parent already. Without side blocks this is another branch.
        return len(self.side_ids) > 0 and run.keys[-1] != parent

    def _are_sides(self, keys: Keys) -> bool:
        """Return whether looked-up blocks are side blocks."""
        if not self.side_ids or not keys:
            return False
        first, last = self._run_with(keys[0]), self._run_with(keys[-1])
        return (first is not None and first.side) or (last is not None and last.side)

    def _add_side(self, keys: Keys, parent: bytes, now: float) -> None:
        """Record a stored side block that is not known."""
        self.advance(now)
        self._new_side(keys, len(keys), parent, SIDE, 1)
        self._epoch_room -= len(keys)
        self.budget.add_current(self.current_epoch, len(keys), 0)
        if len(self.run_ids) > self.known_limit:
            self._forget_evicted()

    def _new_side(self, keys: Keys, held: int, parent: bytes | None, cls: int, uses: int) -> None:
        if self.first_class != SIDE:  # the first side block
            self.first_class = SIDE
            self.sort_queues()
        run = self._append(None, keys, held, parent, cls, uses)
        run.side, run.storing = True, False
        if parent is not None:
            self.side_ids.setdefault(parent, []).append(run.run_id)

    def _add_known_side(self, run: RankedRun, keys: Keys, at: int, now: float) -> int:
        """Record that ``keys[at:]`` begins with parts of a known side block that are held again.

        An engine stores a side block again because it computed the chain again: this is no use.

        Returns:
            the number of these keys.
        """
        self.advance(now)
        if run.held == len(run.keys) or run.keys[run.held] != keys[at]:
            taken, _, uses = self._cut(run, keys, at)
            self._new_side(taken, len(taken), run.parent, SIDE_USED, uses)
            self.budget.add_current(self.current_epoch, len(taken), 0)
            return len(taken)
        known, held = len(run.keys), run.held
        count = common_prefix_len(run.keys, held, keys, at)
        self.budget.add_blocks(run.cohort, -known, held - known)
        self._renew(run, SIDE if run.uses < 2 else SIDE_USED)
        self._add_held(run, count)
        self._epoch_room -= known
        self.budget.add_current(self.current_epoch, known, known - held - count)
        return count

    def _use_sides(self, keys: Keys) -> None:
        """Record a lookup of side blocks."""
        runs, run_ids = self.runs, self.run_ids
        at = blocks = known = hits = 0
        parents: list[bytes] = []
        while at < len(keys):
            run = runs.get(run_ids.get(keys[at], 0))
            if run is None:
                at += 1
                continue
            if run.parent is not None:
                parents.append(run.parent)
            if run.keys == keys[at : at + len(run.keys)]:
                count = len(run.keys)
                hits += run.held
                run.uses = self._count_use(run, count, run.held)
                self._forget_order[run] = None
                self._forget_order.move_to_end(run)
                self._renew(run, SIDE_USED)
            else:
                parent = run.parent
                taken, held, uses = self._cut(run, keys, at)
                self._new_side(taken, held, parent, SIDE_USED, uses)
                count = len(taken)
                hits += held
            at += count
            known += count
            blocks += 1
        if parents:
            self._needed.append((parents[0], parents[-1], blocks))
        self._looked_up += len(keys)
        self._epoch_room -= known
        self.budget.add_current(self.current_epoch, known, known - hits)

    def _learn_window(self, chain: Keys) -> int:
        """Learn from a lookup of ``chain`` how many of its last blocks need their side blocks.

        Returns:
            how many leading blocks of ``chain`` were a hit, with their side blocks.
        """
        used = 0
        for first, last, blocks in self._needed:
            if first not in chain or last not in chain:
                continue
            start, end = chain.index(first), chain.index(last)
            span = end - start + 1
            used = max(used, end + 1)
            if blocks > 1 and start >= (end - start) // (blocks - 1):
                self.window = max(span, self.window if self._window_seen else 0)
                self._window_seen = True
            elif not self._window_seen:  # from the first block on: a window may be longer
                self.window = max(self.window, 2 * span)
        self._needed.clear()
        return used

    def _chain_of(self, run: RankedRun) -> RankedRun | None:
        """Return the run of the chain below which a side run is live; ``None`` if it is not."""
        parent = run.parent
        above = self._run_with(parent)
        while above is not None and above.side:  # parts of one block in several runs
            parent = above.parent
            above = self._run_with(parent)
        if (
            above is not None
            and parent in above.keys[-self.window :]
            and above.cohort.epoch.start_s <= run.cohort.epoch.start_s
        ):
            return above
        return None

    def _rank_with(self, above: RankedRun, run: RankedRun) -> None:
        """Move a live side run to the class of its chain."""
        old, cls = run.cohort, above.cohort.cls
        epoch, new = old.epoch, None
        for cohort in epoch.cohorts:
            if cohort.cls == cls:
                new = cohort
        if new is None:
            if epoch is self.current_epoch:
                new = self._open_cohort(cls)
            else:
                new = Cohort(cls, epoch)
                epoch.cohorts.append(new)
        self._dequeue(run)
        old.blocks -= len(run.keys)
        new.blocks += len(run.keys)
        run.cohort = new
        self._enqueue(run)
        if not old.blocks and epoch is not self.current_epoch:
            epoch.cohorts.remove(old)

    def _evict_from(self, run: RankedRun, count: int, take: Take) -> int:
        """Evict up to ``count`` blocks of ``run``, or of a side run below its tail.

        A live side run is not evicted: it moves to the class of its chain. If nothing can be
        evicted, the run is parked.

        Returns:
            how many blocks were evicted.
        """
        cohort = run.cohort
        if cohort.cls <= SIDE_USED and (above := self._chain_of(run)) is not None:
            if above.cohort.cls > SIDE_USED:
                self._rank_with(above, run)
            else:
                self._park(run)  # each call must move a run, or the caller never ends
            return 0
        offered = min(run.held, count)
        taken = self._offer(run, offered, take)
        was_live = run.side and cohort.cls > SIDE_USED
        if taken and was_live and (above := self._run_with(run.parent)) is not None:
            self._dead = above, above.cohort
        if taken < offered:
            below = 0
            if (side := self._held_side(run.keys[run.held - 1])) is not None:
                below = self._offer(side, min(side.held, count - taken), take)
            if below:
                taken += below
                self._dead = run, cohort
            else:
                self._park(run)
        return taken

    def _evict_dead(self, count: int, take: Take) -> int:
        """Evict up to ``count`` blocks of a chain that lost its last side block.

        No request can resume at its end, so it is evicted before all others, up to the next side
        block or branch.

        Returns:
            how many blocks were evicted.
        """
        evicted = 0
        while evicted < count and self._dead is not None:
            run, cohort = self._dead
            self._dead = None
            if not run.held or run.cohort is not cohort:
                break
            offered = min(run.held, count - evicted)
            taken = self._offer(run, offered, take)
            evicted += taken
            if taken < offered:
                break
            if run.held:
                self._dead = run, cohort
                continue
            above = self._run_with(run.parent)
            if above is not None and above.held and above.keys[above.held - 1] == run.parent:
                self._dead = above, above.cohort  # the part of the chain before
        return evicted

    def _offer(self, run: RankedRun, count: int, take: Take) -> int:
        """Offer the last ``count`` held blocks of ``run``; returns how many were evicted."""
        held = run.held
        taken = take(run.keys[held - count : held])
        if taken:
            self._record_evicted(run, taken)
        return taken

    def _record_evicted(self, run: RankedRun, count: int) -> None:
        """Note that the last ``count`` held blocks of ``run`` were evicted."""
        run.storing = False
        self._forget_order[run] = None
        run.held -= count
        self.budget.add_missing(run.cohort.epoch, count)
        if not run.held:
            self._dequeue_empty(run)

    def _held_side(self, key: bytes) -> RankedRun | None:
        """Return a side run below ``key`` that holds blocks, if there is one."""
        for run_id in self.side_ids.get(key, ()):
            run = self.runs[run_id]
            if run.held:
                return run
        return None

    def _delete(self, run: RankedRun) -> None:
        super()._delete(run)
        if run.side and run.parent is not None:
            ids = self.side_ids[run.parent]
            ids.remove(run.run_id)
            if not ids:
                del self.side_ids[run.parent]

    def check(self, held: Collection[bytes]) -> None:
        super().check(held)
        below: dict[bytes, set[int]] = {}
        for run in self.runs.values():
            if run.side and run.parent is not None:
                below.setdefault(run.parent, set()).add(run.run_id)
        assert {key: set(ids) for key, ids in self.side_ids.items()} == below
