"""Lookups for vLLM's scheduler, asked in threads: the scheduler never waits for a tier.

Invariants:

* A key that a request asks for is looked up once, together with the other keys of that step. The
  answer is kept until the last request that asked for it has ended.
* A key is a miss once its deadline has passed, whatever its thread does.
* A key that could not be loaded is a miss from then on, so that vLLM does not load it for ever.

All methods run in the scheduler's thread, or under vLLM's lock. A thread of the pool only writes
the answer of a lookup.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Final

from kvcache.worker_pool import LOAD, WorkerPool

THREADS: Final = 4
"""Requests that are looked up at the same time."""


class KeyLookup:
    """The lookup of one key.

    Attributes:
        key: vLLM's key.
        held: the answer; ``None`` until it is there.
        asked_at: when it was handed to a thread; ``None`` before.
        request_ids: the requests that asked and have not ended.
    """

    __slots__ = ("asked_at", "held", "key", "request_ids")

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.held: bool | None = None
        self.asked_at: float | None = None
        self.request_ids: set[str] = set()


class TierLookups:
    """The lookups of the requests that have not ended.

    Args:
        contains: returns for each key, of the request with that id, whether it is held. It blocks.
        deadline_s: from handing a lookup to a thread until its keys are misses.
        clock: seconds.
    """

    def __init__(
        self,
        contains: Callable[[Sequence[bytes], str], Sequence[bool]],
        deadline_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._contains = contains
        self._deadline_s = deadline_s
        self._clock = clock
        self._lookups: dict[bytes, KeyLookup] = {}
        self._keys_of: dict[str, set[bytes]] = {}  # by request
        self._new: dict[str, list[KeyLookup]] = {}  # of this step, by request
        self._pool = WorkerPool("vllm-lookup", THREADS)

    def __len__(self) -> int:
        """Return how many keys are known."""
        return len(self._lookups)

    def ask(self, key: bytes, request_id: str) -> bool | None:
        """Return whether ``key`` is held; ``None`` if that is not known yet."""
        lookup = self._lookups.get(key)
        if lookup is None:
            lookup = self._lookups[key] = KeyLookup(key)
            self._new.setdefault(request_id, []).append(lookup)
        lookup.request_ids.add(request_id)
        self._keys_of.setdefault(request_id, set()).add(key)
        if (
            lookup.held is None
            and lookup.asked_at is not None
            and self._clock() - lookup.asked_at > self._deadline_s
        ):
            lookup.held = False
        return lookup.held

    def flush(self) -> None:
        """Hand the new keys to the threads, one call for each request."""
        batches, self._new = self._new, {}
        now = self._clock()
        for request_id, lookups in batches.items():
            wanted = [each for each in lookups if each.request_ids]
            for lookup in wanted:
                lookup.asked_at = now
            if wanted:
                self._pool.add_job(
                    LOAD,
                    partial(self._look_up, request_id, wanted),
                    partial(_answer, wanted, [False] * len(wanted)),
                )

    def mark(self, keys: Collection[bytes], *, held: bool) -> None:
        """Replace the answers for ``keys``, where there are answers."""
        for key in keys:
            lookup = self._lookups.get(key)
            if lookup is not None and lookup.held is not None:
                lookup.held = held

    def mark_all_missed(self) -> None:
        """Make every key a miss: all blocks were removed."""
        for lookup in self._lookups.values():
            lookup.held = False

    def forget(self, request_id: str) -> None:
        """Forget a request that has ended, and the keys for which no other request asked."""
        for key in self._keys_of.pop(request_id, ()):
            lookup = self._lookups[key]
            lookup.request_ids.discard(request_id)
            if not lookup.request_ids:
                del self._lookups[key]

    def close(self, timeout_s: float) -> None:
        """End the threads; a thread with a call that has not returned by then ends later."""
        self._pool.drop_queued()
        self._pool.close(timeout_s)

    def _look_up(self, request_id: str, lookups: Sequence[KeyLookup]) -> None:
        answers: Sequence[bool] = [False] * len(lookups)
        try:
            # Not all have passed the deadline, or lost the requests that wanted them.
            if any(lookup.held is None and lookup.request_ids for lookup in lookups):
                answers = self._contains([lookup.key for lookup in lookups], request_id)
        finally:
            _answer(lookups, answers)


def _answer(lookups: Sequence[KeyLookup], answers: Sequence[bool]) -> None:
    for lookup, held in zip(lookups, answers, strict=True):
        if lookup.held is None:
            lookup.held = held
