"""The seam: what a tier is, what a lease is.

Always true here:

* A tier keeps opaque blocks of bytes under opaque keys. It is blocking, batched, and answers per
  key and in order. It knows nothing of models or threads, and of prefixes only what is of no use
  without what.
* Absence and refusal are values (0 bytes, ``False``); only breakage is an exception.
* The stack takes any exception, ``BaseException`` too, and any answer that is not as the method
  says for a failure of that call: its blocks are misses or declined, and nothing else is lost.
* A lease ends exactly once. Until then the slots it names belong to its holder and to nobody else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from opentelemetry.trace import INVALID_SPAN, Span

from kvcache import process
from kvcache.events import BlockEvents
from kvcache.slab import Slab


class LeaseError(RuntimeError):
    """A lease was ended a second time, or told of a key that it does not hold."""


@dataclass(frozen=True, slots=True)
class TierUsage:
    """What a tier knows of itself; ``None`` where it cannot say."""

    used_nbytes: int | None = None
    limit_nbytes: int | None = None
    evicted_blocks: int | None = None  # left to make room since it was opened
    rejected_blocks: Mapping[str, int] = field(default_factory=dict)  # did not verify, by reason


class Tier(ABC):
    """Holds bytes under keys. Its constructor's keyword arguments are its options in a profile.

    Attributes:
        call_nbytes: of blocks, with which one call is at its best; more and fewer are as right.
    """

    call_nbytes: int = 16 << 20

    @abstractmethod
    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Say of each key whether its block is held now."""

    @abstractmethod
    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        """Copy each block into its buffer; give the bytes written per key, 0 for a miss."""

    @abstractmethod
    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        """Keep a copy of each block; ``False`` where it declined. A held key stays as it is.

        Args:
            keys: each is of use only to who also has the one before it.
            blocks: of as many bytes as they have.
            after: the key that is before ``keys[0]``; ``None`` if there is none, or it is not
                known. It matters to a tier that chooses what has to go when it is full.
        """

    @abstractmethod
    def remove(self, keys: Sequence[bytes]) -> None:
        """Forget these keys; keys that are not held are no error."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the tier holds of the machine. Closing twice is allowed."""

    def resolve(self, namespace: bytes, about: str) -> bytes:
        """Return what ``namespace``, with which keys begin, is called in this tier.

        A stack asks once, before the first key of a namespace. The default is ``namespace``.
        After :meth:`forget` a later opening must return another name, always the same one, as long
        as ``namespace``, or of 32 bytes where that is empty.

        Args:
            space: a namespace.
            about: a JSON object that says for people what the namespace is, or nothing. A tier that
                can keep it does, under the returned name; failing to do so is no error.
        """
        return namespace

    def forget(self, namespace: bytes) -> None:
        """Have no later opening find what was stored under ``namespace``.

        It holds when this returns, however the process ends, and also for blocks that this opening
        stores late. What this opening finds does not matter: its stack no longer asks for
        ``namespace``.

        Raises:
            NotImplementedError: by default; blocks of before may then be found after a restart.
        """
        raise NotImplementedError

    def usage(self) -> TierUsage:
        """What the tier knows of itself, for metrics; by default, nothing.

        It may be called at any time, also while other calls are under way and after ``close``, and
        must answer at once: the stack goes on with the last answer where it does not.
        """
        return TierUsage()


EndCallback = Callable[["Lease", frozenset[bytes]], None]


class Lease:
    """Slots of a front tier, lent until :meth:`end`.

    Given by ``reserve`` (slots to fill: ending publishes them) and by ``pin`` (slots to read:
    ending releases them). As a context manager, an exception inside the block fails every key.

    Attributes:
        keys: the blocks' keys.
        slots: slot numbers, one per key.
        positions: the place of each key in the sequence that was asked for.
        evicted: blocks that left to make room for these.
        span: lasts as long as the lease, where a stack lent it; who copies under the lease may put
            spans of its own below.
    """

    __slots__ = ("_born", "_ends", "_view", "evicted", "keys", "positions", "slots", "span")

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
        self._ends: list[list[EndCallback]] = [[end]]
        self._born = process.generation

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def views(self) -> list[memoryview]:
        """The slots' memory, one writable view of a block's bytes per key."""
        return [self._view(slot) for slot in self.slots]

    def add_end_callback(self, ended: EndCallback) -> None:
        """Have ``ended(lease, failed)`` called after the lease has ended."""
        try:
            self._ends[0].append(ended)
        except IndexError:
            raise LeaseError("this lease has ended already") from None

    def end(self, failed: Iterable[bytes] = ()) -> None:
        """End the lease: filled slots are published, read slots released.

        In a forked child it does nothing: the lease is the parent's to end.

        Args:
            failed: keys whose bytes are not to be trusted. A slot being filled is given up; a block
                being read is dropped from the tier.

        Raises:
            LeaseError: at the second call, or for a key that this lease does not hold.
        """
        if self._born != process.generation:
            return
        bad = frozenset(failed)
        if bad and not bad.issubset(self.keys):
            raise LeaseError(
                f"{len(bad - set(self.keys))} of the failed keys are not in this lease"
            )
        try:
            ends = self._ends.pop()  # atomic: of two threads one gets it
        except IndexError:
            raise LeaseError("this lease has ended already") from None
        self._call(ends, bad)

    def _call(self, ends: Sequence[EndCallback], bad: frozenset[bytes]) -> None:
        """Call all of ``ends``, also where one raises."""
        for at, ended in enumerate(ends, 1):
            try:
                ended(self, bad)
            except BaseException:
                self._call(ends[at:], bad)
                raise

    @property
    def has_ended(self) -> bool:
        return not self._ends

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


@dataclass(frozen=True, slots=True)
class TierStats:
    """What a tier holds and what it did since it was opened. Counts are in blocks."""

    capacity_blocks: int  # slots
    populated_blocks: int  # slots whose memory is there; grows to capacity after start
    used_blocks: int  # held, readable or being filled
    pinned_slots: int  # slots lent by leases that have not ended
    block_nbytes: int
    lookup_blocks: int  # asked for
    hit_blocks: int  # of these held in the asked prefix
    stored_blocks: int  # published
    declined_blocks: int  # not reserved: no slot was free or could be freed
    failed_blocks: int  # given up by a lease that failed while filling
    evicted_blocks: int  # left to make room
    dropped_blocks: int  # left because their bytes were not to be trusted, or removed by name
    unkept_blocks: int = 0  # asked to be kept, and refused: too many were


class FrontTier(Tier):
    """The tier that lends its memory (L1): blocks are filled and read in place, under leases."""

    block_nbytes: int
    slab: Slab

    @abstractmethod
    def access(self, chain: Sequence[bytes], start: int = 0) -> int:
        """Tell the tier that a request asks for ``chain[start:]``.

        ``chain`` is the request's whole chain from its first block: the eviction policy learns of
        all of it, whatever part the engine still has in its own cache.

        Returns:
            how many leading blocks of ``chain[start:]`` are held.
        """

    @abstractmethod
    def reserve(self, keys: Sequence[bytes], parent: bytes | None = None) -> Lease:
        """Lend slots for those of ``keys`` that are neither held nor being filled.

        Args:
            keys: a stretch of one chain, in order.
            after: the key of the block that ``keys[0]`` continues; ``None`` for a chain's first.

        Returns:
            a lease, empty when there is nothing to fill. When there is no room for all, the leading
            blocks get it.
        """

    @abstractmethod
    def pin(self, keys: Sequence[bytes]) -> Lease:
        """Lend the leading blocks of ``keys`` that are held, for reading, up to the first hole."""

    @abstractmethod
    def pin_any(self, keys: Sequence[bytes]) -> Lease:
        """Pin those of ``keys`` that are held or being filled, wherever among ``keys`` they are.

        What is being filled may be read when the lease that fills it has ended well.
        """

    def disable_admission(self) -> None:
        """Tell the tier that others below it get what it takes, and nothing else.

        From then on it declines no block that it can make room for, whatever it is worth here.
        """

    @abstractmethod
    def mark_done(self, keys: Sequence[bytes]) -> None:
        """``keys``, a stretch of a chain, will not be used again: have them go first.

        What others use, or continue, stays. It orders evictions and promises nothing, as does
        :meth:`protect`.
        """

    @abstractmethod
    def protect(self, keys: Sequence[bytes], seconds: float) -> None:
        """Have others go before ``keys``, for so long; of as many as the tier allows."""

    @abstractmethod
    def clear(self) -> None:
        """Forget every block. Slots under lease come back when their lease ends."""

    @abstractmethod
    def subscribe(self, events: BlockEvents) -> None:
        """Tell ``changes`` from now on which blocks come to be held, and which no longer are."""

    @abstractmethod
    def stats(self) -> TierStats:
        """Counts at this moment."""
