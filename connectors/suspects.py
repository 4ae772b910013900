"""Suspect blocks: after a failed load or a reset, their bytes may not match their keys.

An engine needs this module besides its jobs if it has its own prefix cache, or builds a step before
the previous one is reported. It learns of a failed load only from the report of that step. By then
it may have run the next step on the blocks that the load did not write, and other requests may have
found them in its prefix cache.

Invariants:

1. A block is suspect if a load did not write it, if it was computed before a reset, or if a request
   computed it after a suspect block. It is sound again once it is loaded, or computed in full after
   sound blocks alone.
2. A request stores no block from its first suspect block on.
3. A request that has ended counts until the report of the last step that may have computed it.
4. Without a failed load or a reset, a step costs the check of an empty set.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from kvcache.connectors.jobs import AdmittedRequest


class SuspectBlocks:
    """The suspect blocks of an engine.

    Args:
        block_tokens: tokens of a block, for each of the engine's KV cache groups.
        recomputes: whether the engine correctly recomputes the blocks that a load did not write,
            and those after them. If not, a request that has a suspect block stores nothing more.
        no_block: the number in a table where the request has no block; ``None`` if it has all.
    """

    def __init__(
        self, block_tokens: Sequence[int], *, recomputes: bool, no_block: int | None = None
    ) -> None:
        self._block_tokens = block_tokens
        self._recomputes = recomputes
        self._no_block = no_block
        self._blocks: set[int] = set()
        self._untaken: set[int] = set()
        self._ended: deque[tuple[int, AdmittedRequest[Any]]] = deque()

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def unreported(self) -> int:
        """Requests that have ended before their last step was reported."""
        return len(self._ended)

    def request_ended(self, request: AdmittedRequest[Any], step: int) -> None:
        """Note that a request ended or lost its blocks; ``step`` is the last one that was built."""
        self._ended.append((step, request))

    def step_reported(self, step: int) -> None:
        """Note that all steps up to ``step`` were reported, and the failed loads of each."""
        while self._ended and self._ended[0][0] <= step:
            self._ended.popleft()

    def take(self) -> set[int]:
        """Return the blocks that became suspect since the last call: no request may find them."""
        taken, self._untaken = self._untaken, set()
        return taken

    def load_failed(
        self, blocks: Collection[int], requests: Iterable[AdmittedRequest[Any]]
    ) -> None:
        """Make ``blocks``, which a load did not write, and their dependents suspect."""
        dependent = set(blocks)
        affected = [*requests, *(ended for _, ended in self._ended)]
        grew = True
        while grew:  # a request may share blocks with one that computed them from failed ones
            grew = False
            for request in affected:
                first = self._first_of(request, dependent, request.first_suspect)
                if first is not None:
                    request.first_suspect = first
                    dependent.update(self._blocks_from(request, first))
                    grew = True
        self._add(dependent)

    def reset(self, request: AdmittedRequest[Any]) -> None:
        """Make all blocks of a request suspect: they were computed before a reset."""
        request.first_suspect, request.examined = 0, True
        self._add(self._blocks_from(request, 0))

    def load_started(self, blocks: Collection[int]) -> None:
        """Note that a load writes ``blocks``."""
        self._blocks.difference_update(blocks)

    def compute(self, request: AdmittedRequest[Any], computed: int, scheduled: int) -> None:
        """Note that the step being built computes ``scheduled`` tokens after ``computed`` ones."""
        starts, request.examined = not request.examined, True
        if request.first_suspect is None and not self._blocks:
            return
        if starts:
            request.first_suspect = self._first_of(request, self._blocks, computed)
        elif self._recomputes and computed <= (request.first_suspect or 0):
            request.first_suspect = None  # the engine recomputes from the first suspect block on
        if request.first_suspect is None:
            for table, size in zip(request.tables, self._block_tokens, strict=True):
                completed = table[computed // size : (computed + scheduled) // size]
                self._blocks.difference_update(completed)
        else:
            self._add(self._blocks_from(request, request.first_suspect))

    def _first_of(
        self, request: AdmittedRequest[Any], blocks: Collection[int], end: int | None
    ) -> int | None:
        """Return the first token of the request's first block that is in ``blocks``.

        ``end`` is the number of tokens to look at; ``None`` is all. A block of which a part is
        among them counts: a request that waited may keep a block of which it computed a part.
        """
        firsts = []
        for table, size in zip(request.tables, self._block_tokens, strict=True):
            found = table if end is None else table[: -(-end // size)]
            at = next((at for at, block in enumerate(found) if block in blocks), None)
            if at is not None:
                firsts.append(at * size)
        return min(firsts, default=None)

    def _blocks_from(self, request: AdmittedRequest[Any], token: int) -> set[int]:
        """Return the request's blocks from ``token`` on."""
        found = set[int]()
        for table, size in zip(request.tables, self._block_tokens, strict=True):
            found.update(table[token // size :])
        return found - {self._no_block}

    def _add(self, blocks: Collection[int]) -> None:
        self._blocks.update(blocks)
        self._untaken.update(blocks)
