"""Where a request can resume: the longest prefix after which every kept group has what it needs.

In this module, *group* means kept group. A *chain group* needs all blocks of the prefix. Every
other group needs the blocks near its end: the last window, the current chunk, or the last state.
These are *side blocks*: each is useful only with the chain up to the same token.

Invariants:

* Each key is asked at most once, and the cost is linear in the number of blocks.
* The blocks of a chain group are asked from the first one on, side blocks from the last one back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from kvcache.tier import FrontTier, Lease

_MAX_LOOKUPS = 3  # of one request, if other threads evict blocks between lookup and pin

Ask = Callable[[Sequence[bytes]], Sequence[object]]
"""Returns for each key a true value if its block is held."""


@dataclass(frozen=True, slots=True)
class Needs:
    """The rule of a group: which tokens' blocks a request needs to resume after ``end`` tokens.

    Attributes:
        kind: ``"all"``: all of them; ``"window"``: the last ones; ``"chunk"``: those of the chunk
            that is not complete; ``"state"``: the last one, because its block has the state.
        tokens: tokens of a window, including the next one to compute, or of a chunk; 0 for the
            other kinds.
    """

    kind: Literal["all", "window", "chunk", "state"]
    tokens: int = 0

    def first_token(self, end: int) -> int:
        """Return the first needed token; ``end`` if none is needed."""
        match self.kind:
            case "all":
                return 0
            case "window":
                return max(0, end - max(self.tokens, 1) + 1)
            case "chunk":
                return end // self.tokens * self.tokens
            case "state":
                return max(0, end - 1)

    @property
    def label(self) -> str:
        """The name that people read, such as `full`, `window 1024`, `chunk 8192` or `state`."""
        if self.kind == "all":
            return "full"
        return f"{self.kind} {self.tokens}" if self.tokens else self.kind


@dataclass(frozen=True, slots=True)
class GroupKeys:
    """One group of a request: its rule, and the keys of its blocks.

    Attributes:
        needs: the group's rule.
        block_tokens: tokens of a block.
        parts: the number of slots, and of keys, of a block.
        keys: returns the keys of blocks ``first`` to ``end``, block after block, part after part;
            fewer if the request has fewer complete blocks.
    """

    needs: Needs
    block_tokens: int
    parts: int
    keys: Callable[[int, int], list[bytes]]

    @property
    def is_chain(self) -> bool:
        """Whether the group needs every block of a prefix."""
        return self.needs.kind == "all"

    def blocks(self, end: int) -> int:
        """Return how many blocks the first ``end`` tokens take, a partial last one included."""
        return -(-end // self.block_tokens)

    def needed(self, own: int, end: int) -> range:
        """Return the blocks to load to resume at ``end`` when the engine has ``own`` tokens."""
        first, stop = self.needs.first_token(end), self.blocks(end)
        return range(max(own, first) // self.block_tokens if first < end else stop, stop)


@dataclass(frozen=True, slots=True)
class Resume:
    """A request can resume after ``tokens`` tokens.

    Attributes:
        tokens: the resume point; without a hit, the tokens that the engine has.
        lease: the needed blocks, pinned in L1: group after group, blocks ascending, parts
            ascending. Empty without a hit; the caller ends it in any case.
        chain_tokens: what the resume point would be if L1 held all side blocks.
    """

    tokens: int
    lease: Lease
    chain_tokens: int


class SideSearch:
    """Finds out which blocks of one group with side blocks are held.

    Args:
        group: the group.
        own: tokens that the engine has.
        ask: returns which keys are held; gets the keys of several blocks at once.
    """

    def __init__(self, group: GroupKeys, own: int, ask: Ask) -> None:
        self.group = group
        self._own = own
        self._ask = ask
        # The asked blocks are consecutive. Both lists begin with the last of them.
        self._stop = 0  # the block after the last asked one; 0 before the first question
        self._held = bytearray()  # 1 for a held block
        self._keys: list[bytes] = []
        self._next_blocks = 0  # the next question is for at least that many blocks

    def last_missing(self, end: int) -> int | None:
        """Return the last block that a request needs at ``end`` and that is not held.

        ``end`` must not rise from call to call.
        """
        needed = self.group.needed(self._own, end)
        if not needed:
            return None
        self._stop = self._stop or needed.stop
        asked_from = self._stop - len(self._held)
        if needed.start < asked_from:
            first = min(needed.start, asked_from - self._next_blocks)
            self._ask_blocks(max(first, self._own // self.group.block_tokens), asked_from)
        at = self._held.find(0, self._stop - needed.stop, self._stop - needed.start)
        return self._stop - 1 - at if at >= 0 else None

    def end_without(self, missing: int, end: int) -> int:
        """Return an upper bound, below ``end``, of the ends that do not need block ``missing``.

        It is the end of the last block before ``missing`` that is held or was not asked yet.
        """
        at = self._held.find(1, self._stop - missing)
        held_end = self._stop - (at if at >= 0 else len(self._held))
        bound = held_end * self.group.block_tokens
        if self.group.needs.kind == "chunk":  # at the beginning of a chunk, no block is needed
            bound = max(bound, self.group.needs.first_token(end))
        return bound

    def needed_keys(self, end: int) -> list[bytes]:
        """Return the keys needed at ``end``, for which ``last_missing`` was called."""
        needed, parts = self.group.needed(self._own, end), self.group.parts
        keys = self._keys[(self._stop - needed.stop) * parts : (self._stop - needed.start) * parts]
        return keys[::-1]

    def _ask_blocks(self, first: int, end: int) -> None:
        parts = self.group.parts
        keys = self.group.keys(first, end)
        held = [bool(each) for each in self._ask(keys)] if keys else []
        absent = (end - first) * parts - len(keys)  # blocks that are not complete
        keys, held = [*keys, *[b""] * absent], [*held, *[False] * absent]
        if parts > 1:
            held = [all(held[at : at + parts]) for at in range(0, len(held), parts)]
        self._held += bytes(reversed(held))
        self._keys += reversed(keys)
        self._next_blocks = 2 * (end - first)


def longest_resume(sides: Iterable[SideSearch], own: int, limit: int, align_tokens: int) -> int:
    """Return the last resume point of all groups with side blocks.

    Args:
        sides: the groups with side blocks.
        own: tokens that the engine has.
        limit: tokens of which the chain groups hold the blocks.
        align_tokens: the result is a multiple of these.

    Returns:
        a number above ``own`` and at most ``limit``; ``own`` if there is none.
    """
    end = limit // align_tokens * align_tokens
    # The group with the fewest needed blocks excludes most ends.
    ordered = sorted(sides, key=lambda side: len(side.group.needed(own, end)))
    while end > own:
        for side in ordered:
            missing = side.last_missing(end)
            if missing is not None:
                end = side.end_without(missing, end) // align_tokens * align_tokens
                break
        else:
            return end
    return own


def chain_resume(group: GroupKeys, held: int, own: int, align_tokens: int) -> tuple[int, int]:
    """Return the last resume point of one chain group, and how many leading keys it needs.

    Args:
        group: the group.
        held: how many leading keys are held.
        own: tokens that the engine has; the result without a hit.
        align_tokens: the resume point is a multiple of these.
    """
    tokens = held // group.parts * group.block_tokens // align_tokens * align_tokens
    return (tokens, group.blocks(tokens) * group.parts) if tokens > own else (own, 0)


class HeldBlocks(Protocol):
    """What a lookup asks L1: the methods of ``FrontTier`` of the same names."""

    def contains(self, keys: Sequence[bytes]) -> Sequence[object]: ...

    def count_prefix(self, chain: Sequence[bytes], start: int = 0) -> int: ...

    def access(self, chain: Sequence[bytes], start: int = 0) -> int: ...


class FrontLookup:
    """What L1 holds of a request, and the longest resume point in it.

    Args:
        front: L1.
        groups: the request's groups.
        own: tokens that the engine has.
        top: the most tokens to resume after.
        align_tokens: the resume point is a multiple of these.

    Attributes:
        tokens: the resume point; ``own`` without a hit.
        chain_tokens: what the resume point would be if no side block were missing.
        needed: of each group, in order, the keys that the resume point needs.
    """

    def __init__(
        self, front: HeldBlocks, groups: Sequence[GroupKeys], own: int, top: int, align_tokens: int
    ) -> None:
        self._front = front
        self._chains: list[tuple[list[bytes], int]] = []  # keys, and how many the engine has
        limit = top // align_tokens * align_tokens
        for group in groups:
            if group.is_chain:
                keys = group.keys(0, group.blocks(limit))
                start = min(own // group.block_tokens * group.parts, len(keys))
                self._chains.append((keys, start))
                held = start + front.count_prefix(keys, start)
                limit = min(limit, held // group.parts * group.block_tokens)
        searches = [
            SideSearch(group, own, front.contains) for group in groups if not group.is_chain
        ]
        self.chain_tokens = max(own, limit // align_tokens * align_tokens)
        self.tokens = longest_resume(searches, own, limit, align_tokens)
        self.needed: list[list[bytes]] = []
        self._sides: list[list[bytes]] = []
        if self.tokens > own:
            chains, sides = iter(self._chains), iter(searches)
            for group in groups:
                if group.is_chain:
                    keys, start = next(chains)
                    self.needed.append(keys[start : group.blocks(self.tokens) * group.parts])
                else:
                    self._sides.append(next(sides).needed_keys(self.tokens))
                    self.needed.append(self._sides[-1])
            if not any(self.needed):  # at the beginning of a chunk: there is nothing to load
                self.tokens = own

    @property
    def asked(self) -> list[bytes]:
        """The keys of the chains that the engine lacks, and those of the needed side blocks."""
        chains = [keys[start:] for keys, start in self._chains]
        return [key for keys in [*chains, *self._sides] for key in keys]

    def record(self) -> None:
        """Record the lookup in L1: the needed side blocks, then the chains."""
        for keys in self._sides:
            if keys:
                self._front.access(keys)
        for keys, start in reversed(self._chains):
            self._front.access(keys, start)


def pin_resume(
    front: FrontTier, groups: Sequence[GroupKeys], own: int, top: int, align_tokens: int
) -> tuple[FrontLookup, Lease]:
    """Find the last resume point in L1, record the lookup, and pin the needed blocks.

    Returns:
        the lookup, and a lease of all needed blocks; empty without a hit.
    """
    for _ in range(_MAX_LOOKUPS):
        found = FrontLookup(front, groups, own, top, align_tokens)
        keys = [key for keys in found.needed for key in keys]
        lease = front.pin(keys)
        if len(lease) == len(keys):
            break
        lease.end()  # another thread has evicted some since
    else:
        found = FrontLookup(front, groups, own, own, align_tokens)
        lease = front.pin(())
    found.record()
    return found, lease
