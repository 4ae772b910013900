"""Guards a third-party front tier: a failure of it costs the result of that call.

Invariants:

* No method raises, except for an exception that a signal raised. A failure counts as a miss or a
  decline, and is logged once per method.
* A lease has only keys that the caller passed, in the same order, each key in its own slot. Only a
  lease to read has a key twice. Any other lease is ended as failed.
* A front tier of this package is called directly, without a guard.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from typing import Any, Final, TypeVar

from kvcache.events import BlockEvents
from kvcache.guards.calls import TierError, answers_per_key, as_count, result_of
from kvcache.keys import Branch
from kvcache.process import bind_to_process
from kvcache.tier import FrontTier, Lease, TierStats
from kvcache.worker_pool import WorkerPool

log = logging.getLogger(__name__)

T = TypeVar("T")
Front = TypeVar("Front", bound=FrontTier)

CLOSE_S: Final = 2.0  # the longest wait for the tier's ``close``
_exempt: set[type[FrontTier]] = set()


def exempt_from_guard(cls: type[Front]) -> type[Front]:
    """Class decorator for a front tier of this package, which needs no guard."""
    _exempt.add(cls)
    return cls


def guard_front_tier(front: FrontTier) -> FrontTier:
    """Return ``front``, inside a guard unless its class is exempt."""
    return (
        front
        if type(front) in _exempt or isinstance(front, GuardedFrontTier)
        else GuardedFrontTier(front)
    )


class GuardedFrontTier(FrontTier):
    """A front tier that calls ``inner`` and checks its results."""

    def __init__(self, inner: FrontTier) -> None:
        self.inner = inner
        self.block_nbytes = inner.block_nbytes
        self.slab = inner.slab
        self.wait_pinned = inner.wait_pinned
        self._failed_methods: set[str] = set()  # so that each is logged once
        zeros = dict.fromkeys(TierStats.__slots__, 0)
        self._stats = TierStats(**zeros | {"block_nbytes": self.block_nbytes})
        bind_to_process(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)  # attributes that only the third-party class has

    def _try(self, name: str, call: Callable[[], T], otherwise: T) -> T:
        try:
            return result_of(call)
        except TierError as error:
            if name not in self._failed_methods:
                self._failed_methods.add(name)
                kind = type(self.inner).__name__
                log.error(
                    "kvcache: front tier %s: %s failed (%s); its answers count as misses",
                    kind, name, error,
                )  # fmt: skip
            return otherwise

    def _lend(
        self,
        name: str,
        keys: Sequence[bytes],
        call: Callable[[], Lease],
        *,
        to_read: bool = False,
        prefix: bool = False,
    ) -> Lease:
        """Return a copy of the lease that ``call`` returns; an empty one if it fails or is wrong.

        With ``to_read``, the lease may have a key at several positions. With ``prefix``, it must be
        of the leading keys.
        """

        def checked_lease() -> Lease:
            inner = call()
            try:
                held, slots = list(inner.keys), [as_count(slot) for slot in inner.slots]
                positions = [as_count(at) for at in inner.positions]
                key_slots = set(zip(held, slots, strict=True))
                is_valid = (
                    len(key_slots) == len(set(held)) == len(set(slots))
                    and (to_read or len(key_slots) == len(held))
                    and held == [keys[at] for at in positions]
                    and positions == sorted(set(positions))
                    and (not prefix or positions == list(range(len(held))))
                    and all(slot < self.slab.slots for slot in slots)
                )
                if not is_valid:
                    raise ValueError("the lease is not for the requested keys")
                lease = Lease(
                    held, slots, positions, self._view_of(inner),
                    lambda _, failed: self._try("end", lambda: inner.end(failed), None),
                )  # fmt: skip
                lease.evicted = as_count(inner.evicted)
            except BaseException:
                inner.end(inner.keys)
                raise
            return lease

        empty = Lease((), (), (), self.slab.view, lambda *_: None)
        return self._try(name, checked_lease, empty)

    def _view_of(self, inner: Lease) -> Callable[[int], memoryview]:
        def view(slot: int) -> memoryview:
            return inner.views[list(inner.slots).index(slot)]

        return view

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        def call() -> list[bool]:
            return answers_per_key(lambda: self.inner.contains(keys), len(keys), bool)

        return self._try("contains", call, [False] * len(keys))

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        return self._try("load", lambda: self.inner.load(keys, into), [0] * len(keys))

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        return self._try(
            "store", lambda: self.inner.store(keys, blocks, parent), [False] * len(keys)
        )

    def remove(self, keys: Sequence[bytes]) -> None:
        self._try("remove", lambda: self.inner.remove(keys), None)

    def access(self, chain: Sequence[bytes], start: int = 0) -> int:
        limit = max(0, len(chain) - start)
        return min(limit, self._try("access", lambda: as_count(self.inner.access(chain, start)), 0))

    def reserve(self, keys: Sequence[bytes], parent: bytes | None = None) -> Lease:
        return self._lend("reserve", keys, lambda: self.inner.reserve(keys, parent))

    def count_prefix(self, chain: Sequence[bytes], start: int = 0) -> int:
        def call() -> int:
            limit = max(0, len(chain) - start)
            return min(limit, as_count(self.inner.count_prefix(chain, start)))

        return self._try("count_prefix", call, 0)

    def reserve_branches(self, chains: Sequence[Branch], sides: Sequence[Branch] = ()) -> Lease:
        keys = [key for branch_keys, _ in [*chains, *sides] for key in branch_keys]
        return self._lend(
            "reserve_branches", keys, lambda: self.inner.reserve_branches(chains, sides)
        )

    def pin(self, keys: Sequence[bytes]) -> Lease:
        return self._lend("pin", keys, lambda: self.inner.pin(keys), to_read=True, prefix=True)

    def pin_any(self, keys: Sequence[bytes]) -> Lease:
        return self._lend("pin_any", keys, lambda: self.inner.pin_any(keys), to_read=True)

    def disable_admission(self) -> None:
        self._try("disable_admission", self.inner.disable_admission, None)

    def mark_done(self, keys: Sequence[bytes]) -> None:
        self._try("mark_done", lambda: self.inner.mark_done(keys), None)

    def protect(self, keys: Sequence[bytes], seconds: float) -> None:
        self._try("protect", lambda: self.inner.protect(keys, seconds), None)

    def clear(self) -> None:
        self._try("clear", self.inner.clear, None)

    def subscribe(self, events: BlockEvents) -> None:
        self._try("subscribe", lambda: self.inner.subscribe(events), None)

    def stats(self) -> TierStats:
        def call() -> TierStats:
            stats = self.inner.stats()
            return TierStats(
                **{name: as_count(getattr(stats, name)) for name in TierStats.__slots__}
            )

        self._stats = self._try("stats", call, self._stats)
        return self._stats

    def close(self) -> None:
        try:
            closer = WorkerPool("close-l1", 1)
        except RuntimeError:  # the interpreter is exiting
            self._try("close", self.inner.close, None)
            return
        closing = closer.submit(self.inner.close)
        closer.close(0.0)
        if not wait([closing], CLOSE_S).done:
            kind = type(self.inner).__name__
            log.warning("kvcache: front tier %s: close hangs; it is left open", kind)
        elif not closing.cancelled():
            self._try("close", closing.result, None)
