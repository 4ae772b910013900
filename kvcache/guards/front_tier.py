"""A third-party front tier, checked: what it does wrong costs the answer of that call.

Always true here:

* No method raises, but for what a signal raises. A failure is a miss or a decline, logged once for
  each method.
* A lease names keys that were asked for, in their order, each slot once. Any other lease ends as
  failed.
* What of L1 is ours is called directly: this costs it nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from typing import Any, Final, TypeVar

from kvcache.events import BlockEvents
from kvcache.guards.calls import TierError, answers_per_key, as_count, result_of
from kvcache.lower.worker_pool import WorkerPool
from kvcache.process import bind_to_process
from kvcache.tier import FrontTier, Lease, TierStats

log = logging.getLogger(__name__)

T = TypeVar("T")
Front = TypeVar("Front", bound=FrontTier)

CLOSE_S: Final = 2.0  # for the tier's own ``close``
_own: set[type[FrontTier]] = set()


def exempt_from_guard(cls: type[Front]) -> type[Front]:
    """Decorates a front tier of this package, which needs no checks."""
    _own.add(cls)
    return cls


def guard_front_tier(front: FrontTier) -> FrontTier:
    """``front``, with checks around it where it is not of this package."""
    return (
        front
        if type(front) in _own or isinstance(front, GuardedFrontTier)
        else GuardedFrontTier(front)
    )


class GuardedFrontTier(FrontTier):
    """Checks around ``inner``."""

    def __init__(self, inner: FrontTier) -> None:
        self.inner = inner
        self.block_nbytes = inner.block_nbytes
        self.slab = inner.slab
        self._failed: set[str] = set()  # methods
        nothing = dict.fromkeys(TierStats.__slots__, 0)
        self._stats = TierStats(**nothing | {"block_nbytes": self.block_nbytes})
        bind_to_process(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)  # what only this class of tier has

    def _try(self, name: str, call: Callable[[], T], otherwise: T) -> T:
        try:
            return result_of(call)
        except TierError as error:
            if name not in self._failed:
                self._failed.add(name)
                kind = type(self.inner).__name__
                log.error(
                    "kvcache: front tier %s: %s failed (%s); its answers count as misses",
                    kind, name, error,
                )  # fmt: skip
            return otherwise

    def _lend(
        self, name: str, keys: Sequence[bytes], call: Callable[[], Lease], *, prefix: bool = False
    ) -> Lease:
        """The lease that ``call`` returns; an empty one where it fails or is not right."""

        def lent() -> Lease:
            theirs = call()
            try:
                held, slots = list(theirs.keys), [as_count(slot) for slot in theirs.slots]
                positions = [as_count(at) for at in theirs.positions]
                right = (
                    len(held) == len(slots) == len(set(slots))
                    and held == [keys[at] for at in positions]
                    and positions == sorted(set(positions))
                    and (not prefix or positions == list(range(len(held))))
                    and all(slot < self.slab.slots for slot in slots)
                )
                if not right:
                    raise ValueError("its lease is not of the keys that were asked for")
                lease = Lease(
                    held, slots, positions, self._view_of(theirs),
                    lambda _, failed: self._try("end", lambda: theirs.end(failed), None),
                )  # fmt: skip
                lease.evicted = as_count(theirs.evicted)
            except BaseException:
                theirs.end(theirs.keys)
                raise
            return lease

        nothing = Lease((), (), (), self.slab.view, lambda *_: None)
        return self._try(name, lent, nothing)

    def _view_of(self, theirs: Lease) -> Callable[[int], memoryview]:
        def view(slot: int) -> memoryview:
            return theirs.views[list(theirs.slots).index(slot)]

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
        most = max(0, len(chain) - start)
        return min(most, self._try("access", lambda: as_count(self.inner.access(chain, start)), 0))

    def reserve(self, keys: Sequence[bytes], parent: bytes | None = None) -> Lease:
        return self._lend("reserve", keys, lambda: self.inner.reserve(keys, parent))

    def pin(self, keys: Sequence[bytes]) -> Lease:
        return self._lend("pin", keys, lambda: self.inner.pin(keys), prefix=True)

    def pin_any(self, keys: Sequence[bytes]) -> Lease:
        return self._lend("pin_any", keys, lambda: self.inner.pin_any(keys))

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
            given = self.inner.stats()
            return TierStats(
                **{name: as_count(getattr(given, name)) for name in TierStats.__slots__}
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
