"""The contracts of tiers: ``Tier`` and ``FrontTier``.

Invariants:

* A tier keeps opaque blocks of bytes under opaque keys. Its methods block, take batches, and return
  one result per key in order. It knows nothing of models or threads; of prefixes it only learns the
  parent of each block.
* A tier takes keys of 1 to ``kvcache.keys.MAX_KEY_NBYTES`` (80) bytes, of any value. It may decline
  a longer key; it never cuts one.
* A key may be several times in one call, and each position gets its result. ``load`` fills the
  buffer of each position; ``store`` and ``store_branches`` keep the first block of the key, and
  answer the same for all its positions; ``remove`` removes it once.
* A tier counts each block that it declines once, by reason, in ``usage``, and logs a reason once.
* Absence and refusal are values (0 bytes, ``False``); an exception means that a call failed.
* To the stack, any exception (``BaseException`` too) and any result that breaks the contract is a
  failure of that call: its blocks are misses or declined, and nothing else is lost.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvcache.events import BlockEvents
from kvcache.keys import Branch
from kvcache.lease import Lease, LeaseError, end_all
from kvcache.slab import Slab

__all__ = ["FrontTier", "Lease", "LeaseError", "Tier", "TierStats", "TierUsage"]


@dataclass(frozen=True, slots=True)
class TierUsage:
    """A tier's report of its usage; ``None`` for a number that the tier does not know."""

    used_nbytes: int | None = None
    limit_nbytes: int | None = None
    evicted_blocks: int | None = None  # evicted to make room since opening
    rejected_blocks: Mapping[str, int] = field(default_factory=dict)  # corrupt blocks, by reason
    declined_blocks: Mapping[str, int] = field(default_factory=dict)  # by reason since opening


class Tier(ABC):
    """Holds blocks under keys. The keyword arguments of its constructor are its profile options.

    Attributes:
        call_nbytes: preferred bytes of blocks per call; a hint, every size must work.
    """

    call_nbytes: int = 16 << 20

    @abstractmethod
    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Return for each key whether its block is held now."""

    @abstractmethod
    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        """Copy each block into its buffer; return the bytes written per key, 0 for a miss."""

    @abstractmethod
    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        """Keep a copy of each block. A block that is already held stays unchanged.

        Args:
            keys: consecutive blocks of a chain; each is useful only with the one before it.
            blocks: the bytes of each block.
            parent: the key that ``keys[0]`` continues; ``None`` if there is none or it is unknown.
                A tier can use it to choose what to evict when it is full.

        Returns:
            for each key, ``True`` if the block is held now, ``False`` if the tier declined it.
        """

    def store_branches(
        self, branches: Sequence[Branch], blocks: Sequence[memoryview]
    ) -> list[bool]:
        """Keep a copy of each block of several segments, as :meth:`store` does for one.

        By default this method calls :meth:`store` for each segment. A tier that stores many small
        segments faster in one call implements it: side blocks of models with several KV cache
        groups are segments of one block.

        Args:
            branches: the keys of each segment and its parent, as for :meth:`store`.
            blocks: the bytes of each block, in the order of the concatenated keys.

        Returns:
            for each key, ``True`` if the block is held now, ``False`` if the tier declined it.
        """
        stored: list[bool] = []
        for keys, parent in branches:
            begin = len(stored)
            stored += self.store(keys, blocks[begin : begin + len(keys)], parent)
        return stored

    @abstractmethod
    def remove(self, keys: Sequence[bytes]) -> None:
        """Remove these blocks. A key that is not held is no error."""

    @abstractmethod
    def close(self) -> None:
        """Release the memory, files and connections of the tier. Closing twice is allowed."""

    def resolve(self, namespace: bytes, about: str) -> bytes:
        """Return the bytes with which the keys of ``namespace`` begin in this tier.

        The stack calls this once, before the first key of a namespace. By default the result is
        ``namespace``. After :meth:`forget`, every later opening of the tier must return the same
        new name. It is as long as ``namespace``, or has 32 bytes if ``namespace`` is empty.

        Args:
            namespace: a namespace, as the stack was opened with it.
            about: a JSON object that describes the namespace for people, or ``""``. A tier may
                store it under the returned name; failing to do so is no error.
        """
        return namespace

    def forget(self, namespace: bytes) -> None:
        """Ensure that no later opening of the tier finds blocks stored under ``namespace``.

        This holds once the method has returned, however the process ends, and also for blocks that
        this opening stores afterwards. This opening may still find them: its stack no longer asks
        for ``namespace``.

        Raises:
            NotImplementedError: by default; a restarted process may then find the old blocks.
        """
        raise NotImplementedError

    def allocate(self, nbytes: int) -> memoryview | None:
        """Return memory that this tier reads and writes without a copy of its own.

        ``Framed`` keeps the frames of one call in it, and maps memory if there is none. It asks a
        few times, in the first calls that need memory, and again after an exception.

        Args:
            nbytes: the bytes that the caller needs.

        Returns:
            Memory that is writable, contiguous and begins on a page, such as registered or shared
            memory. It is the tier's, and stays valid until ``close``. By default ``None``, as the
            tier has none.
        """
        return None

    def usage(self) -> TierUsage:
        """Return the usage of the tier, for metrics; by default, nothing.

        It may be called at any time, also during other calls and after ``close``, and must return
        at once. If it does not, the stack reports the previous values.
        """
        return TierUsage()


@dataclass(frozen=True, slots=True)
class TierStats:
    """What a front tier holds, and what it did since it was opened. Counts are in blocks."""

    capacity_blocks: int  # slots
    populated_blocks: int  # slots with allocated memory; grows to capacity after start
    used_blocks: int  # held, readable or being filled
    pinned_slots: int  # slots lent by leases that have not ended
    block_nbytes: int
    lookup_blocks: int  # looked up by requests
    hit_blocks: int  # looked up and in the prefix that was held
    stored_blocks: int  # published
    declined_blocks: int  # not reserved: not admitted, or no slot could be freed
    failed_blocks: int  # freed by a lease that failed while filling
    evicted_blocks: int  # removed to make room
    dropped_blocks: int  # removed because a read failed, or by ``remove``
    unkept_blocks: int = 0  # refused protection: too many blocks were protected


class FrontTier(Tier):
    """A tier that lends its memory (L1): blocks are filled and read in place, under leases.

    What a front tier may assume, and what not:

    * Several threads call it at the same time. Each lease ends once, in any order and thread.
    * ``keys`` are consecutive blocks of one chain, except those of ``pin_any``, ``contains``,
      ``load``, ``protect`` and ``remove``, which have any order.
    * Blocks may be reserved before their parent. A parent may be unknown (neither held nor being
      filled): its children get free slots, but the tier need not evict a block for them.
    * A key may be held or being filled: ``reserve`` lends no slot for it.
    * A key may be several times in one call. ``reserve`` and ``reserve_branches`` lend it one slot,
      for its first position. ``access`` and ``count_prefix`` count each position. ``pin`` and
      ``pin_any`` lend the same slot at each position, until the lease ends. ``mark_done``,
      ``protect`` and ``remove`` have the effect of one.

    Attributes:
        block_nbytes: bytes of a block.
        slab: the memory of the slots.
        wait_pinned: whether an engine's start waits until all of the slab is allocated, and pinned
            where its device copies faster from pinned memory.
    """

    block_nbytes: int
    slab: Slab
    wait_pinned: bool = False

    @abstractmethod
    def access(self, chain: Sequence[bytes], start: int = 0) -> int:
        """Record that a request looks up ``chain[start:]``.

        Args:
            chain: the request's whole chain from its first block, for the eviction policy.
            start: how many leading blocks the engine has in its own cache.

        Returns:
            how many leading blocks of ``chain[start:]`` are held.
        """

    def count_prefix(self, chain: Sequence[bytes], start: int = 0) -> int:
        """Return how many leading blocks of ``chain[start:]`` are held, without recording it.

        By default this method calls :meth:`Tier.contains`.
        """
        held = self.contains(chain[start:])
        return held.index(False) if False in held else len(held)

    @abstractmethod
    def reserve(self, keys: Sequence[bytes], parent: bytes | None = None) -> Lease:
        """Lend slots for those of ``keys`` that are neither held nor being filled.

        Args:
            keys: a segment of one chain, in order.
            parent: the key that ``keys[0]`` continues; ``None`` for the first block of a chain.

        Returns:
            a lease, empty if there is nothing to fill. If not all blocks fit, only the leading
            ones get slots.
        """

    def reserve_branches(self, chains: Sequence[Branch], sides: Sequence[Branch] = ()) -> Lease:
        """Lend slots for several segments, of which later ones may continue earlier ones.

        By default this method calls :meth:`reserve` for each segment.

        Args:
            chains: the keys of each segment and its parent, as for :meth:`reserve`.
            sides: segments that get no slot unless their parent is held, being filled, or reserved
                by this call: without it their blocks cannot be used.

        Returns:
            one lease; its positions are those in the concatenated keys of all segments. At its end
            the later segments are published first.
        """
        leases: list[Lease] = []
        positions: list[int] = []
        reserved: set[bytes] = set()
        offset = 0
        try:
            for number, (keys, parent) in enumerate([*chains, *sides]):
                if (
                    number < len(chains)
                    or parent is None
                    or parent in reserved
                    or self._holds_or_fills(parent)
                ):
                    leases.append(self.reserve(keys, parent))
                    positions += [offset + at for at in leases[-1].positions]
                    reserved.update(leases[-1].keys)
                offset += len(keys)
        except BaseException:
            end_all(leases, frozenset(reserved))
            raise
        owners = {slot: lease for lease in leases for slot in lease.slots}
        lease = Lease(
            [key for lease in leases for key in lease.keys],
            [slot for lease in leases for slot in lease.slots],
            positions,
            lambda slot: owners[slot].views[owners[slot].slots.index(slot)],
            lambda _, failed: end_all(leases, failed),
        )
        lease.evicted = sum(lease.evicted for lease in leases)
        return lease

    def _holds_or_fills(self, key: bytes) -> bool:
        with self.pin_any([key]) as lease:
            return bool(lease.keys)

    @abstractmethod
    def pin(self, keys: Sequence[bytes]) -> Lease:
        """Lend the leading blocks of ``keys``, up to the first that is not held, for reading."""

    @abstractmethod
    def pin_any(self, keys: Sequence[bytes]) -> Lease:
        """Pin all blocks of ``keys`` that are held or being filled, wherever they are in ``keys``.

        A block that is being filled may be read after the lease that fills it has published it.
        """

    def disable_admission(self) -> None:
        """From now on, accept every block that fits, even one that the eviction policy declines.

        The stack calls this when there are lower tiers: they receive only what this tier accepts.
        """

    @abstractmethod
    def mark_done(self, keys: Sequence[bytes]) -> None:
        """Evict ``keys``, a segment of a chain, before other blocks: its caller is done with them.

        Blocks that are used again or get a child stay. This is a hint, as is :meth:`protect`: it
        changes the order of evictions and promises nothing.
        """

    @abstractmethod
    def protect(self, keys: Sequence[bytes], seconds: float) -> None:
        """Evict other blocks before ``keys`` for ``seconds``; a tier may limit how many."""

    @abstractmethod
    def clear(self) -> None:
        """Remove every block. A slot under lease is freed when its lease ends."""

    @abstractmethod
    def subscribe(self, events: BlockEvents) -> None:
        """Notify ``events`` from now on of blocks that are stored and removed."""

    @abstractmethod
    def stats(self) -> TierStats:
        """The counts at this moment."""
