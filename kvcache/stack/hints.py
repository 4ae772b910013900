"""Hints to a stack about the future use of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm

from opentelemetry.context import Context

from kvcache.hints import check_hint
from kvcache.resume import FrontLookup, GroupKeys, SideSearch, longest_resume
from kvcache.stack.prefetch import Prefetcher
from kvcache.tier import FrontTier


class StackHints:
    """Applies hints to L1, and promotes blocks that a caller will use soon.

    Args:
        front: L1.
        prefetcher: promotes blocks.
    """

    def __init__(self, front: FrontTier, prefetcher: Prefetcher) -> None:
        self._front = front
        self._prefetcher = prefetcher

    def hint(
        self, keys: Sequence[bytes], context: Context | None, *, done: bool, keep: float, soon: bool
    ) -> None:
        """Apply a hint on one chain, as ``Stack.hint`` does."""
        check_hint(done=done, keep=keep, soon=soon)
        if done:
            self._front.mark_done(keys)
        if keep:
            self._front.protect(keys, keep)
        if soon:
            self._front.access(keys)
            self._prefetcher.prefetch(keys, context, linked=True)

    def hint_resume(
        self,
        groups: Sequence[GroupKeys],
        tokens: int,
        context: Context | None,
        *,
        done: bool,
        keep: float,
        soon: bool,
    ) -> None:
        """Apply a hint on the blocks of several groups, as ``Stack.hint_resume`` does."""
        if len(groups) == 1 and groups[0].is_chain:
            keys = groups[0].keys(0, tokens // groups[0].block_tokens)
            self.hint(keys, context, done=done, keep=keep, soon=soon)
            return
        check_hint(done=done, keep=keep, soon=soon)
        chains = [group for group in groups if group.is_chain]
        sides = [group for group in groups if not group.is_chain]
        if done:
            for group in [*sides, *chains]:  # a block is evicted after those that need it
                self._front.mark_done(group.keys(0, tokens // group.block_tokens))
        align_tokens = lcm(*(group.block_tokens for group in groups))
        if keep:
            searches = [SideSearch(group, 0, self._held_or_filled) for group in sides]
            end = longest_resume(searches, 0, tokens, align_tokens)
            for search in searches if end else ():
                self._front.protect(search.needed_keys(end), keep)
            for group in chains:
                self._front.protect(group.keys(0, tokens // group.block_tokens), keep)
        if soon:
            FrontLookup(self._front, groups, 0, tokens, align_tokens).record()
            self._prefetcher.prefetch_resume(groups, tokens, align_tokens, context, linked=True)

    def _held_or_filled(self, keys: Sequence[bytes]) -> list[bool]:
        """Return for each key whether its block is held or being filled."""
        with self._front.pin_any(keys) as lease:
            found = set(lease.keys)
        return [key in found for key in keys]
