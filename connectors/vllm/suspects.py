"""Blocks of the engine that do not hold what their keys say: a load failed, or a reset came.

The scheduler hears of a failed load with the report of the step that made it. By then vLLM may have
built and run the next step on those blocks, and other requests may have found them in vLLM's prefix
cache.

Always true here:

* A block is doubtful if a load did not write it, if it was computed before a reset, or if a request
  computed it after a doubtful block. It stops being doubtful when it is loaded, or computed in full
  after sound blocks alone.
* A request publishes no block from its first doubtful block on.
* A request that has ended counts until the report of the last step that may have computed for it.
* Without a failed load or a reset, a step costs the look at an empty set.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request


def recomputes(vllm_config: VllmConfig) -> bool:
    """Whether this vLLM computes correctly again what could not be loaded.

    With async scheduling it keeps the placeholders of tokens that were computed from those blocks,
    and its second model runner goes on at the old position (vLLM 0.25 to 0.33 at least).
    """
    scheduling = getattr(vllm_config, "scheduler_config", None)
    second_runner = getattr(vllm_config, "use_v2_model_runner", False)
    return not (getattr(scheduling, "async_scheduling", False) or second_runner)


@dataclass(slots=True, eq=False)
class Running:
    """An admitted request.

    Attributes:
        blocks: of the engine, that the request has.
        offered: how many of them have been offered to the stack.
        doubtful: the first of them that is doubtful; ``None`` if all are sound.
        checked: whether those were looked at that the request did not compute.
    """

    request: Request
    blocks: list[int] = field(default_factory=list)
    offered: int = 0
    doubtful: int | None = None
    checked: bool = False


class SuspectBlocks:
    """The doubtful blocks. ``recomputes``: see the function of that name."""

    def __init__(self, block_tokens: int, *, recomputes: bool) -> None:
        self._block_tokens = block_tokens
        self._recomputes = recomputes
        self._blocks: set[int] = set()
        self._spread: set[int] = set()
        self._ended: deque[tuple[int, Running]] = deque()

    def ended(self, running: Running, step: int) -> None:
        """A request ended, or gave its blocks back; ``step`` is the last that was built."""
        self._ended.append((step, running))

    def reported(self, step: int) -> None:
        """Steps up to this one have been reported, and with them the loads that failed."""
        while self._ended and self._ended[0][0] <= step:
            self._ended.popleft()

    def take(self) -> set[int]:
        """The blocks that doubt has spread to since the last call: no request may find them."""
        spread, self._spread = self._spread, set()
        return spread

    def failed(self, bad: Collection[int], running: Iterable[Running]) -> None:
        """A load did not write ``bad``."""
        resting = set(bad)
        requests = [*running, *(ended for _, ended in self._ended)]
        spreads = True
        while spreads:  # a request may share blocks with one that was computed from bad ones
            spreads = False
            for each in requests:
                before = each.blocks[: each.doubtful]
                first = next((at for at, block in enumerate(before) if block in resting), None)
                if first is not None:
                    each.doubtful = first
                    resting.update(each.blocks[first:])
                    spreads = True
        self._suspect(resting)

    def outdated(self, running: Running) -> None:
        """All that a request has was computed before a reset; so is what it computes from that."""
        running.doubtful, running.checked = 0, True
        self._suspect(running.blocks)

    def loads(self, blocks: Collection[int]) -> None:
        """A load was begun that writes ``blocks``."""
        self._blocks.difference_update(blocks)

    def computes(self, running: Running, scheduled: int) -> None:
        """The step being built computes so many tokens of a request."""
        begins, running.checked = not running.checked, True
        if running.doubtful is None and not self._blocks:
            return
        computed, size = running.request.num_computed_tokens, self._block_tokens
        if begins:
            # The last of them in part: a request that waited keeps a block it computed half of.
            found = enumerate(running.blocks[: -(-computed // size)])
            running.doubtful = next((at for at, block in found if block in self._blocks), None)
        elif self._recomputes and computed <= (running.doubtful or 0) * size:
            running.doubtful = None  # vLLM set it back, and computes it again from there
        if running.doubtful is None:
            sound = running.blocks[computed // size : (computed + scheduled) // size]
            self._blocks.difference_update(sound)
        else:
            self._suspect(running.blocks[running.doubtful :])

    def _suspect(self, blocks: Collection[int]) -> None:
        """Doubt ``blocks``, and have vLLM's prefix cache forget them."""
        self._blocks.update(blocks)
        self._spread.update(blocks)
