"""Pending loads: hits that the connector reported to vLLM and that vLLM has not used yet.

Invariants:

1. The blocks of a pending load are pinned in L1 until vLLM admits its request, or the load is
   cancelled.
2. A load that would delay the step of other requests is async: vLLM schedules its request when the
   load has ended. Copies that are made within the step are not async, since they would delay a
   later step as much, unless vLLM needs it (`groups.may_load_within_step`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final

from kvcache.lower.latency import LatencyModel
from kvcache.tier import Lease

LONG_LOAD_S: Final = 0.005  # a step of a large model takes about 20 ms


@dataclass(frozen=True, slots=True)
class PendingLoad:
    """The blocks of ``lease``, with which a request with ``own`` tokens resumes at ``end``."""

    own: int
    end: int
    lease: Lease
    is_async: bool


class PendingLoads:
    """The pending loads, by request id, and the requests that wait for an async load.

    Args:
        async_copies: whether the workers copy in parallel to the engine's steps.
        within_step: whether a load may end within the step that needs it; if not, all are async.
        long_load_s: a load that is expected to take longer is async, if other requests run.
    """

    def __init__(
        self,
        *,
        async_copies: bool = False,
        within_step: bool = True,
        long_load_s: float = LONG_LOAD_S,
    ) -> None:
        self._async_copies = async_copies
        self._within_step = within_step
        self._long_load_s = long_load_s
        self._latency = LatencyModel()
        self._loads: dict[str, PendingLoad] = {}
        self._waiting: set[str] = set()

    def __len__(self) -> int:
        return len(self._loads)

    def __iter__(self) -> Iterator[str]:
        return iter(self._loads)

    @property
    def waiting(self) -> Collection[str]:
        """Ids of the requests that vLLM admitted and that wait for their async load."""
        return self._waiting

    def tokens(self, request_id: str, own: int) -> int | None:
        """Return the tokens of the pending load after ``own`` ones; ``None`` if there is none."""
        load = self._loads.get(request_id)
        return load.end - own if load is not None and load.own == own else None

    def add(self, request_id: str, own: int, end: int, lease: Lease, *, others: bool) -> None:
        """Add the blocks that ``lease`` pinned; ``others`` is whether other requests run."""
        is_async = self.prefers_async(len(lease), others=others)
        self._loads[request_id] = PendingLoad(own, end, lease, is_async)

    def prefers_async(self, blocks: int, *, others: bool) -> bool:
        """Whether a load of this many blocks would be async."""
        if not self._within_step:
            return True
        if not self._async_copies or not others:
            return False
        return (self._latency.optimistic(blocks) or 0.0) > self._long_load_s

    def is_async(self, request_id: str) -> bool:
        """Whether the request has a pending load that is async."""
        load = self._loads.get(request_id)
        return load is not None and load.is_async

    def take(self, request_id: str) -> PendingLoad | None:
        """Remove and return the pending load of a request that vLLM admits."""
        return self._loads.pop(request_id, None)

    def start_wait(self, request_id: str) -> None:
        """Note that vLLM admits the request again when its async load has ended."""
        self._waiting.add(request_id)

    def end_wait(self, request_id: str) -> bool:
        """End the wait of a request that vLLM admits, and return whether it waited."""
        waited = request_id in self._waiting
        self._waiting.discard(request_id)
        return waited

    def cancel(self, request_id: str) -> None:
        """End the lease of a pending load that vLLM does not use, and any wait."""
        self._waiting.discard(request_id)
        load = self._loads.pop(request_id, None)
        if load is not None:
            load.lease.end()

    def observe(self, blocks: int, seconds: float) -> None:
        """Observe the duration of a load, to predict that of later ones."""
        self._latency.observe(blocks, seconds)
