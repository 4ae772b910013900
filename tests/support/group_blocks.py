"""Blocks of several KV cache groups: their keys, and the segments that store them."""

from collections.abc import Sequence

from kvcache import Stack
from kvcache.keys import Branch
from kvcache.resume import GroupKeys, Needs
from kvcache.slab import PAGE
from kvcache.testing import block_of

BLOCK_TOKENS = 4


class GroupedRequest:
    """A request of a model with one chain group and several groups with side blocks.

    Args:
        sides: the rules of the groups with side blocks.
        parts: of each block.
        name: distinguishes the keys of requests.
        chain: whether there is a chain group.
        common: how many leading blocks have the same keys in every request.
    """

    def __init__(
        self,
        *sides: Needs,
        parts: int = 1,
        name: str = "a",
        chain: bool = True,
        common: int = 0,
    ) -> None:
        self._parts = parts
        self._name = name
        self._common = common
        rules = [Needs("all"), *sides] if chain else list(sides)
        self.groups = [self._group(number, needs) for number, needs in enumerate(rules)]

    def _group(self, number: int, needs: Needs) -> GroupKeys:
        def keys(first: int, end: int) -> list[bytes]:
            return [
                self.key(number, block, part)
                for block in range(first, end)
                for part in range(self._parts)
            ]

        return GroupKeys(needs, BLOCK_TOKENS, self._parts, keys)

    def key(self, group: int, block: int, part: int = 0) -> bytes:
        """Return the key of one part of a block."""
        name = self._name if block >= self._common else "common"
        return f"{name}/{group}/{block}/{part}".encode()

    def branches(
        self, first: int, end: int, kept: Sequence[int] | None = None
    ) -> tuple[list[Branch], list[Branch]]:
        """Return the segments that store blocks ``first`` to ``end``: of chains, and side blocks.

        Side blocks are stored of the blocks ``kept``; ``None`` is of all.
        """
        chains: list[Branch] = []
        sides: list[Branch] = []
        for group in self.groups:
            if group.is_chain:
                parent = group.keys(first - 1, first)[-1] if first else None
                chains.append((group.keys(first, end), parent))
                continue
            for block in range(first, end) if kept is None else kept:
                parent = self.groups[0].keys(block, block + 1)[-1] if chains else None
                sides.append((group.keys(block, block + 1), parent))
        return chains, sides

    def needed(self, own: int, end: int) -> list[bytes]:
        """Return the keys that a lease of a hit at ``end`` tokens has."""
        needed = [(group, group.needed(own, end)) for group in self.groups]
        return [key for group, blocks in needed for key in group.keys(blocks.start, blocks.stop)]


def put_branches(stack: Stack, chains: Sequence[Branch], sides: Sequence[Branch] = ()) -> int:
    """Store the blocks that L1 lacks; return how many."""
    with stack.reserve_branches(chains, sides) as lease:
        for name, view in zip(lease.keys, lease.views, strict=True):
            view[:] = block_of(name, PAGE)
        return len(lease)


def check_resume(
    stack: Stack, request: GroupedRequest, own: int, top: int, step: int = BLOCK_TOKENS
) -> int:
    """Fetch the resume point of a request, and check its blocks; return its tokens."""
    found = stack.fetch_resume(request.groups, own, top, step)
    with found.lease as lease:
        if found.tokens > own:
            assert list(lease.keys) == request.needed(own, found.tokens)
            assert len(set(lease.slots)) == len(lease)
        else:
            assert (found.tokens, len(lease)) == (own, 0)
        for name, view in zip(lease.keys, lease.views, strict=True):
            assert view == block_of(name, PAGE), "wrong bytes"
    return found.tokens
