"""What vLLM was told that it can have, and when it will: with its next step, or later.

Always true here:
* What is promised is pinned, until it is redeemed or withdrawn.
* A load that would hold up the others' step is promised for later: vLLM schedules its request when
  the load is over. Copies that are made in the step are never: they would hold it up as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from kvcache.lower.latency import LatencyModel
from kvcache.tier import Lease

LONG_S: Final = 0.005  # of a load that others may wait for; a large model's step takes some 20 ms


@dataclass(frozen=True, slots=True)
class PendingLoad:
    """Blocks from ``start`` on."""

    start: int
    lease: Lease
    later: bool


class PendingLoads:
    """By request. Its length is how many have a promise that is neither redeemed nor withdrawn."""

    def __init__(self) -> None:
        self.async_copies = False  # whether the workers copy beside the engine's steps
        self.long_s = LONG_S
        self._loading = LatencyModel()
        self._given: dict[str, PendingLoad] = {}
        self._expected: set[str] = set()  # requests that wait for a load

    def __len__(self) -> int:
        return len(self._given)

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def blocks(self, request_id: str, start: int) -> int | None:
        """How many blocks from ``start`` on the request was promised; ``None`` is no promise."""
        given = self._given.get(request_id)
        return len(given.lease) if given is not None and given.start == start else None

    def give(self, request_id: str, start: int, lease: Lease, *, others: bool) -> None:
        """Promise what ``lease`` has pinned; ``others`` would wait if the next step waited."""
        self._given[request_id] = PendingLoad(start, lease, self.later(len(lease), others=others))

    def later(self, blocks: int, *, others: bool) -> bool:
        """Whether so many blocks would be promised for later."""
        return (
            self.async_copies and others and (self._loading.optimistic(blocks) or 0.0) > self.long_s
        )

    def comes_later(self, request_id: str) -> bool:
        """Whether its promise is for later than the next step."""
        given = self._given.get(request_id)
        return given is not None and given.later

    def redeem(self, request_id: str) -> PendingLoad | None:
        """The engine has taken the request: its promise, which is none any more."""
        return self._given.pop(request_id, None)

    def expect(self, request_id: str) -> None:
        """The engine will take the request again when its load is over."""
        self._expected.add(request_id)

    def arrives(self, request_id: str) -> bool:
        """The engine takes the request; whether it waited for a load that is over now."""
        expected = request_id in self._expected
        self._expected.discard(request_id)
        return expected

    def withdraw(self, request_id: str) -> None:
        """It will not be redeemed; nothing is expected either."""
        self._expected.discard(request_id)
        given = self._given.pop(request_id, None)
        if given is not None:
            given.lease.end()

    def loaded(self, blocks: int, seconds: float) -> None:
        """A load took so long."""
        self._loading.observe(blocks, seconds)
