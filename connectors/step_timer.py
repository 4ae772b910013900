"""Measures how long an engine computes blocks of prompts, for `Stack.observe_compute`.

A step begins when it is built, or when the step before it ends if that is later, and lasts until it
has ended. An engine may build a step before the previous one has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple


class StepTime(NamedTuple):
    """Arguments of `Stack.observe_compute`: computed blocks, seconds, mean depth in blocks."""

    blocks: float
    seconds: float
    depth: float


class StepTimer:
    """Times the steps of an engine with blocks of ``block_tokens`` tokens."""

    def __init__(self, block_tokens: int, clock: Callable[[], float]) -> None:
        self._block_tokens = block_tokens
        self._clock = clock
        self._built: dict[int, tuple[float, float, float]] = {}  # time, blocks, depth
        self._last_end = 0.0

    def __len__(self) -> int:
        """Return how many steps were built and have not ended."""
        return len(self._built)

    def built(self, step: int, prefills: Sequence[tuple[int, int]]) -> None:
        """Note that a step was built.

        Args:
            step: its number; numbers rise.
            prefills: of each prompt that it computes, the tokens before and the tokens computed.
                Empty if the step also waits for other work, such as a load.
        """
        tokens = sum(count for _, count in prefills)
        context = sum(count * (before + count / 2) for before, count in prefills)
        depth = context / max(1, tokens * self._block_tokens)
        self._built[step] = self._clock(), tokens / self._block_tokens, depth

    def ended(self, step: int) -> StepTime | None:
        """Note that a step has ended, and return its time; ``None`` if it was not built."""
        for earlier in [number for number in self._built if number < step]:
            del self._built[earlier]
        if step not in self._built:
            return None
        built, blocks, depth = self._built.pop(step)
        started, self._last_end = max(built, self._last_end), self._clock()
        return StepTime(blocks, self._last_end - started, depth)
