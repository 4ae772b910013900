"""Leases: slots of a front tier that are lent to one holder.

Invariants: a lease ends exactly once. Until then its slots belong to its holder alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from opentelemetry.trace import INVALID_SPAN, Span

from kvcache import process


class LeaseError(RuntimeError):
    """A lease was used after its end, or ended with a failed key that it does not hold."""


EndCallback = Callable[["Lease", frozenset[bytes]], None]
"""Called with a lease that has ended, and its failed keys."""


class Lease:
    """Slots of a front tier that are lent until :meth:`end`.

    ``reserve`` returns one with slots to fill: ending it publishes them. ``pin`` returns one with
    slots to read: ending it releases them. As a context manager it ends with the block; an
    exception inside the block fails every key.

    Attributes:
        keys: the blocks' keys.
        slots: slot numbers, one per key.
        positions: the position of each key in the sequence that the caller passed.
        evicted: how many blocks were evicted to make room for these.
        span: a span that lasts as long as the lease, if a stack lent it; a copy made under the
            lease may start child spans of it.
    """

    __slots__ = (
        "_end_callbacks",
        "_generation",
        "_view",
        "evicted",
        "keys",
        "positions",
        "slots",
        "span",
    )

    def __init__(
        self,
        keys: Sequence[bytes],
        slots: Sequence[int],
        positions: Sequence[int],
        view: Callable[[int], memoryview],
        end: EndCallback,
    ) -> None:
        self.keys = keys
        self.slots = slots
        self.positions = positions
        self.evicted = 0
        self.span: Span = INVALID_SPAN
        self._view = view
        # The list of callbacks is popped when the lease ends, so that only one thread can end it.
        self._end_callbacks: list[list[EndCallback]] = [[end]]
        self._generation = process.generation

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def views(self) -> list[memoryview]:
        """The slots' memory, one writable view of a block's bytes per key."""
        return [self._view(slot) for slot in self.slots]

    def add_end_callback(self, callback: EndCallback) -> None:
        """Call ``callback(lease, failed)`` when the lease has ended.

        Raises:
            LeaseError: if the lease has ended already.
        """
        try:
            self._end_callbacks[0].append(callback)
        except IndexError:
            raise LeaseError("this lease has ended already") from None

    def end(self, failed: Iterable[bytes] = ()) -> None:
        """End the lease: filled slots are published, read slots released.

        In a forked child it does nothing, since the lease belongs to the parent process.

        Args:
            failed: keys with bytes that must not be used. A slot being filled is freed; a block
                being read is dropped from the tier.

        Raises:
            LeaseError: at the second call, or for a key that this lease does not hold.
        """
        if self._generation != process.generation:
            return
        failed_keys = frozenset(failed)
        if failed_keys and not failed_keys.issubset(self.keys):
            unknown = len(failed_keys - set(self.keys))
            raise LeaseError(f"{unknown} of the failed keys are not in this lease")
        try:
            callbacks = self._end_callbacks.pop()  # atomic: only one thread gets the list
        except IndexError:
            raise LeaseError("this lease has ended already") from None
        self._run(callbacks, failed_keys)

    def _run(self, callbacks: Sequence[EndCallback], failed: frozenset[bytes]) -> None:
        """Call all callbacks, also after one raises."""
        for done, callback in enumerate(callbacks, 1):
            try:
                callback(self, failed)
            except BaseException:
                self._run(callbacks[done:], failed)
                raise

    @property
    def has_ended(self) -> bool:
        return not self._end_callbacks

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.has_ended:
            self.end(failed=self.keys if kind is not None else ())


def end_all(leases: Sequence[Lease], failed: frozenset[bytes]) -> None:
    """End the leases, the last one first, also after one raises."""
    with ExitStack() as ends:
        for lease in leases:
            ends.callback(lease.end, failed.intersection(lease.keys))
