"""Measures how long vLLM computes blocks, from what it reports to a secondary tier.

vLLM reports when it has scheduled a request for the first time, and when blocks of the request have
arrived in its host memory. The time in between has the computation of these blocks, their copy and
up to two steps of waiting, so the estimate is too high rather than too low: blocks are computed
instead of loaded only where loading is clearly slower.
"""

from __future__ import annotations

from collections.abc import Callable, Collection


class ComputeTimes:
    """The requests that were scheduled and have stored nothing yet.

    Args:
        observe: gets the number of computed blocks and the seconds.
        clock: seconds.
    """

    def __init__(self, observe: Callable[[int, float], object], clock: Callable[[], float]) -> None:
        self._observe = observe
        self._clock = clock
        self._scheduled_at: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._scheduled_at)

    def scheduled(self, request_ids: Collection[str]) -> None:
        """Note that the requests were scheduled for the first time."""
        now = self._clock()
        for request_id in request_ids:
            self._scheduled_at[request_id] = now

    def stored(self, request_id: str, blocks: int) -> None:
        """Note that ``blocks`` of a request are in vLLM's memory; only the first time counts."""
        scheduled_at = self._scheduled_at.pop(request_id, None)
        if scheduled_at is not None and blocks:
            self._observe(blocks, self._clock() - scheduled_at)

    def forget(self, request_id: str) -> None:
        """Forget a request that has ended."""
        self._scheduled_at.pop(request_id, None)
