"""Promotion of what a request needs at one resume point, and of nothing else.

1. The tiers are asked for the chains first, then for side blocks from the last resume point back.
2. A resume point is promoted only if loading its blocks, side blocks included, is faster than
   computing the tokens between L1's last resume point and it. Candidates are the last resume point
   of all, and the last one before each block at which a chain continues in another tier. The one
   that saves the most time is promoted.
3. The chains are read first, so that each side block is read after the block that it needs.
4. Where it is only assumed that a tier holds the blocks (``lookup = "load"``), a load finds out how
   far the chains reach, and the next try is for the last resume point that may still be held.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import inf
from typing import Final

from opentelemetry.trace import INVALID_SPAN, Span

from kvcache import telemetry
from kvcache.lower.block_reads import WantedBlocks
from kvcache.lower.promotion import LowerTiers, Match, leading_sources
from kvcache.lower.search import runs_by_source
from kvcache.resume import GroupKeys, SideSearch, longest_resume

_MAX_TRIES: Final = 8  # of one request, where it is only assumed that a tier holds the blocks


def promote_resume(
    lower: LowerTiers,
    groups: Sequence[GroupKeys],
    own: int,
    top: int,
    align_tokens: int,
    clock: Callable[[], float],
    span: Span,
) -> tuple[Match, int]:
    """Promote what a request needs at its best resume point, as :class:`ResumePromotion` does.

    While an assumed block is missed, try the last resume point that may still be held.

    Returns:
        the results of :meth:`ResumePromotion.promote`.
    """
    until = inf
    promoted: dict[bytes, int] = {}  # the tier of each block that a try has copied to L1
    for _ in range(_MAX_TRIES):
        promotion = ResumePromotion(lower, groups, own, top, align_tokens, clock, span, until)
        match, tokens = promotion.promote()
        until = promotion.until
        if not promotion.missed_assumed or clock() >= until:
            break
        # If L1 has evicted a block of its own since, the match has fewer sources than blocks.
        pairs = zip(match.held, match.sources, strict=False)
        promoted.update((key, source) for key, source in pairs if source)
    if promoted:
        pairs = zip(match.held, match.sources, strict=False)
        sources = tuple(promoted.get(key, source) for key, source in pairs)
        match = replace(match, sources=sources)
    return match, tokens


class ResumePromotion:
    """Finds a request's best resume point in all tiers, and promotes what it needs.

    Args:
        lower: the lower tiers.
        groups: the request's groups.
        own: the last resume point in L1; 0 if there is none.
        top: the most tokens to resume after.
        align_tokens: the resume point is a multiple of these.
        clock: the current time in seconds.
        span: the parent of the tiers' spans.
        until: when to stop waiting, by the clock.

    Attributes:
        until: when :meth:`promote` stopped, or would have stopped, to wait.
        missed_assumed: whether :meth:`promote` missed a block that a tier was assumed to hold.
    """

    def __init__(
        self,
        lower: LowerTiers,
        groups: Sequence[GroupKeys],
        own: int,
        top: int,
        align_tokens: int,
        clock: Callable[[], float],
        span: Span,
        until: float = inf,
    ) -> None:
        self.until = until
        self.missed_assumed = False
        self._lower = lower
        self._own = own
        self._align_tokens = align_tokens
        self._clock = clock
        self._span = span
        self._block_tokens = groups[0].block_tokens  # the compute model's blocks
        self._limit = top // align_tokens * align_tokens
        self._side_sources: dict[bytes, int] = {}
        self._chains: list[tuple[GroupKeys, list[bytes], list[int]]] = []  # keys and sources
        for group in groups:
            if group.is_chain:
                self._locate_chain(group)
        self._sides = [
            SideSearch(group, 0, self._ask_sides) for group in groups if not group.is_chain
        ]

    def promote(self) -> tuple[Match, int]:
        """Promote what the best resume point needs.

        Returns:
            what L1 then holds of the first chain group (without one, of the needed side blocks),
            and the resume point.
        """
        ends = list(self._ends())
        end = self._choose(ends)
        wanted = self._wanted(end) if end > self._own else WantedBlocks.of_chain((), ())
        if ends and end < ends[0]:
            self._skip(self._wanted(ends[0]), wanted)
        promoted = 0
        if wanted.keys:
            self.until = min(self.until, self._clock() + self._timeout_s(end, wanted))
            with self._lower.reads.read(wanted, self.until, self._span) as lease:
                promoted = len(lease)
            self.missed_assumed = self._lower.has_missed(wanted)
        reached = end if promoted == len(wanted.keys) else self._own
        if not self._chains:
            return Match(wanted.keys, 0, promoted, tuple(wanted.sources[:promoted])), reached
        group, keys, sources = self._chains[0]
        held = min(promoted, group.blocks(end) * group.parts)
        held = max(held, group.blocks(self._own) * group.parts)
        return Match(keys, 0, held, tuple(sources[:held])), reached

    def _choose(self, ends: Sequence[int]) -> int:
        """Return the one of the resume points that saves the most time; L1's own if none does."""
        chosen, most_saved_s = self._own, 0.0
        for end in reversed(ends):
            saved_s = self._saved_s(end)
            if saved_s >= most_saved_s or not self._lower.compute_model.known:
                chosen, most_saved_s = end, saved_s
        return chosen

    # Lookup

    def _locate_chain(self, group: GroupKeys) -> None:
        """Find the tier of each block of a chain group, and lower the limit to the held ones."""
        keys = group.keys(0, group.blocks(self._limit))
        tokens_per_key = group.block_tokens / group.parts
        # L1 is asked first: only what it lacks is asked of lower tiers.
        held = self._lower.count_front_prefix(keys)

        def compute_s(missing: int) -> float | None:
            tokens = missing * tokens_per_key
            return self._compute_s(held * tokens_per_key, held * tokens_per_key + tokens)

        rest = leading_sources(self._lower.locate(keys[held:], compute_s, self._span))
        sources = [0] * held + rest
        self._chains.append((group, keys, sources))
        self._limit = min(self._limit, len(sources) // group.parts * group.block_tokens)

    def _ask_sides(self, keys: Sequence[bytes]) -> list[bool]:
        """Return which side blocks any tier holds, and note the tier of each."""
        saved_s = self._compute_s(self._own, self._limit)
        sources = self._lower.locate(keys, lambda _: saved_s, self._span, sides=True)
        for key, source in zip(keys, sources, strict=True):
            if source is not None:
                self._side_sources[key] = source
        return [source is not None for source in sources]

    def _ends(self) -> Iterator[int]:
        """Yield the candidates of :meth:`promote`, the last one first."""
        limits = {self._limit}
        for group, _, sources in self._chains:
            starts = (at for _, at, _ in runs_by_source(sources))
            limits.update(at // group.parts * group.block_tokens for at in starts)
        end = self._limit + 1
        for limit in sorted(limits, reverse=True):
            if self._own < limit < end:
                end = longest_resume(self._sides, self._own, limit, self._align_tokens)
                if end == self._own:
                    return
                yield end
                if not self._lower.compute_model.known:
                    return

    def _wanted(self, end: int) -> WantedBlocks:
        """Return what a request needs to resume at ``end``, for which the sides were asked."""
        keys: list[bytes] = []
        parents: list[bytes | None] = []
        sources: list[int] = []
        for group, chain, chain_sources in self._chains:
            count = group.blocks(end) * group.parts
            keys += chain[:count]
            parents += [None, *chain[: count - 1]][:count]
            sources += chain_sources[:count]
        chain_keys = len(keys)
        for side in self._sides:
            group, needed = side.group, side.needed_keys(end)
            first = group.needed(0, end).start
            for at, key in enumerate(needed):
                block, part = divmod(at, group.parts)
                parents.append(
                    needed[at - 1]
                    if part
                    else self._chain_key_at((first + block + 1) * group.block_tokens, end)
                )
                keys.append(key)
                sources.append(self._side_sources[key])
        return WantedBlocks(keys, parents, sources, chain_keys)

    def _chain_key_at(self, tokens: int, end: int) -> bytes | None:
        """Return the last key of the first chain group's last complete block within ``tokens``."""
        if not self._chains:
            return None
        group, keys, _ = self._chains[0]
        count = min(tokens, end) // group.block_tokens * group.parts
        return keys[count - 1] if count else None

    # Time to load and to compute

    def _compute_s(self, begin: float, end: float) -> float | None:
        """Predict how long the engine computes the tokens ``begin`` to ``end``."""
        per_block = self._block_tokens
        blocks, depth = max(0.0, end - begin) / per_block, begin / per_block
        return self._lower.compute_model.pessimistic(blocks, depth)

    def _saved_s(self, end: int) -> float:
        """Predict how much time the promotion for ``end`` saves."""
        loads = Counter(source for source in self._wanted(end).sources if source)
        load_s = sum(
            self._lower.tiers[source - 1].load_seconds(count) for source, count in loads.items()
        )
        return (self._compute_s(self._own, end) or 0.0) - load_s

    def _timeout_s(self, end: int, wanted: WantedBlocks) -> float:
        """Return how long to wait: as long as computing would take; infinity if unknown."""
        compute_s = self._compute_s(self._own, end)
        tiers = {self._lower.tiers[source - 1] for source in wanted.sources if source}
        if compute_s is None or any(tier.loads_even_if_slower for tier in tiers):
            return inf
        return compute_s

    def _skip(self, found: WantedBlocks, chosen: WantedBlocks) -> None:
        """Record the blocks that are not promoted because computing them is faster."""
        skipped = Counter(found.sources)
        skipped.subtract(chosen.sources)
        for number, tier in enumerate(self._lower.tiers, 1):
            if skipped[number] > 0:
                measured = found.of_source(number, tier.channel.blocks_per_call)
                read = partial(self._measure, measured)
                self._lower.skip(tier, telemetry.TIER_LOAD, skipped[number], self._span, read)

    def _measure(self, wanted: WantedBlocks) -> None:
        self._lower.reads.read(wanted, inf, INVALID_SPAN).end()
