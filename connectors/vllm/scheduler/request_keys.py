"""The keys of a request's blocks: vLLM's block hashes, with the adapter, the group and the part.

The key of the first part of a block of the first kept group is vLLM's hash. Every other key has two
more bytes: the number of the kept group, and the number of the part.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from kvcache.connectors.vllm.groups import KeptGroup
from kvcache.connectors.vllm.identity.adapters import Adapters
from kvcache.resume import GroupKeys

if TYPE_CHECKING:
    from vllm.v1.request import Request


class RequestKeys:
    """Derives the keys of the blocks of requests.

    Args:
        groups: the kept groups.
        parts: the number of parts of a block, for each kept group.
        adapters: the LoRA adapters, which are a part of the keys.
    """

    def __init__(
        self, groups: Sequence[KeptGroup], parts: Sequence[int], adapters: Adapters
    ) -> None:
        self.groups = groups
        self.parts = parts
        self._adapters = adapters
        self._suffixes = [
            [bytes((group.index, part)) if group.index or part else b"" for part in range(count)]
            for group, count in zip(groups, parts, strict=True)
        ]
        self._chain = next((group for group in groups if group.is_chain), None)

    def keeps(self, request: Request) -> bool:
        """Whether blocks of a request may be found and kept, which its adapter decides."""
        return self._adapters.keeps(request)

    def blocks(self, request: Request, group: KeptGroup, first: int, end: int) -> list[bytes]:
        """Return one key for each of the blocks ``first`` to ``end``: that of its first part."""
        return self._with_suffixes(request, group, first, end, self._suffixes[group.index][:1])

    def parts_of(self, request: Request, group: KeptGroup, first: int, end: int) -> list[bytes]:
        """Return the keys of all parts of the blocks ``first`` to ``end``, in order."""
        return self._with_suffixes(request, group, first, end, self._suffixes[group.index])

    def _with_suffixes(
        self,
        request: Request,
        group: KeptGroup,
        first: int,
        end: int,
        suffixes: Sequence[bytes],
    ) -> list[bytes]:
        hashes = group.hashes(request.block_hashes, first, end)
        keys = self._adapters.keys(request, hashes)
        if suffixes == [b""]:
            return keys
        return [key + suffix for key in keys for suffix in suffixes]

    def of(self, request: Request) -> list[GroupKeys]:
        """Return the keys of a request in all kept groups."""
        return [
            GroupKeys(
                group.needs, group.block_tokens, count, partial(self.parts_of, request, group)
            )
            for group, count in zip(self.groups, self.parts, strict=True)
        ]

    def parents(
        self, request: Request, group: KeptGroup, blocks: Sequence[int]
    ) -> list[bytes | None]:
        """Return the key that each of ``blocks`` continues; they are in order.

        In a chain group it is the last part of the block before. A side block continues the last
        part of a block of the first chain group: of the last one that ends at or before its end.
        """
        parent = group if group.is_chain else self._chain
        if parent is None or not blocks:
            return [None] * len(blocks)
        if group.is_chain:
            counts: Sequence[int] = blocks
        else:
            counts = [(at + 1) * group.block_tokens // parent.block_tokens for at in blocks]
        first = max(0, counts[0] - 1)
        suffix = self._suffixes[parent.index][-1:]
        keys = self._with_suffixes(request, parent, first, counts[-1], suffix)
        return [keys[count - 1 - first] if count else None for count in counts]
