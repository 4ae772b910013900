"""The disk tier: which block goes to which slot, and its way there and back.

Always true here:

* Disk space is taken when the tier is opened and never exceeds ``capacity``; when it is full,
  blocks leave by the eviction order, a chain's tail before its head, after a restart too.
* A record names a block only while the block is whole: it is cleared before its slot is written,
  and written after. So a process may be killed at any moment. Nothing is synced: after a power cut
  a record may stand without its block, which is what the frames around this tier are for.
* No lock is held while bytes move. A slot is given back only when no read or write of it is under
  way, and a file is closed only when no call is.
* No block leaves for one that cannot be written: a disk that is read-only keeps what it has.
* What the disk will not do is a decline or a miss, of which one a minute is logged of each kind.
  A block that cannot be read is forgotten, so that it can be stored again.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

from kvcache.eviction import LOWER_TIER_DEFAULT, Eviction, Policy, fallback, policy_option
from kvcache.index import Index
from kvcache.lower.worker_pool import WorkerPool
from kvcache.process import bind_to_process
from kvcache.replica import ALONE, Replica
from kvcache.sizes import DiskSize, format_size
from kvcache.tier import Tier, TierUsage
from kvcache.tiers.disk import lock_file, namespace_file
from kvcache.tiers.disk.directory import Directory
from kvcache.tiers.disk.record_file import (
    KEY_NBYTES,
    PAGE,
    RECORD_NBYTES,
    Record,
    Records,
    file_nbytes,
)
from kvcache.tiers.disk.replicas import Share
from kvcache.tiers.disk.safe_open import expand_path

log = logging.getLogger(__name__)

T = TypeVar("T")

_BESIDE = 3 * PAGE  # the lock, the geometry, and the records' last page, which they may not fill
_TAKES_NOTHING = (errno.EROFS, errno.ENOSPC, errno.EDQUOT)  # whichever the slot
_TELL_EVERY_S = 60.0  # of one kind of failure
_CLOSE_S = 10.0  # to wait for calls that are under way


class DiskTier(Tier):
    """A tier on a local disk.

    Args:
        block_nbytes: bytes of the largest value; larger ones are declined.
        path: a directory of this tier's own, made if it is not there. ``~`` and ``$NAME`` in it
            are expanded.
        capacity: bytes of disk to take. With less than before a restart the tier keeps what fits;
            with another ``block_nbytes`` it starts empty.
        eviction: which blocks go when it is full: a shipped policy, or a class path.
        threads: reads and writes under way at once, of all calls together.
        replica: which replica on this host this is of. Each has its own directory below ``path``
            and an equal share of ``capacity``.
        clock: seconds, for the eviction policy and for what is logged how often.

    Raises:
        ValueError: when ``path`` cannot be used or is in use, the file system has no room, or
            ``capacity`` holds no block.
    """

    def __init__(
        self,
        *,
        block_nbytes: int,
        path: str,
        capacity: DiskSize,
        eviction: Eviction = LOWER_TIER_DEFAULT,
        threads: int = 4,
        replica: Replica = ALONE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if block_nbytes < 1:
            raise ValueError(f"block_nbytes is {block_nbytes}; a block has at least one byte")
        policy = policy_option(eviction)
        self._slot_nbytes = -(-block_nbytes // PAGE) * PAGE
        each = self._slot_nbytes + RECORD_NBYTES
        share = capacity // replica.count
        slots = (share - _BESIDE) // each
        if slots < 1:
            least = each + _BESIDE
            if replica.count > 1:
                raise ValueError(
                    f"capacity is {capacity} bytes for {replica.count} replicas; one block takes "
                    f"{least} of each"
                )
            raise ValueError(f"capacity is {capacity} bytes; one block takes {least}")
        if not 1 <= threads <= 1024:
            raise ValueError(f"threads is {threads}; it must be 1 to 1024")
        self._block_nbytes = block_nbytes
        self._lock = threading.Lock()
        self._quiet = threading.Condition(self._lock)
        self._calls = 0  # under way
        self._closed = False
        self._takes_nothing = False  # the file system, when it was last written to
        self._told: dict[tuple[str, int | None], float] = {}
        self._clock = clock
        try:
            with ExitStack() as undo:
                self._files = Directory(
                    expand_path(path), replica, Share(file_nbytes(slots), slots * self._slot_nbytes)
                )
                undo.callback(self._files.close)
                self._open(slots, policy)
                self._bounces: SimpleQueue[mmap.mmap] = SimpleQueue()
                for _ in range(threads):
                    self._bounces.put(mmap.mmap(-1, self._slot_nbytes))
                self._pool = WorkerPool("disk", threads)
                undo.pop_all()
        except (OSError, RuntimeError) as error:
            raise ValueError(f"path is {path!r}, which cannot be used: {error}") from error
        bind_to_process(self)
        if replica.count > 1:
            log.info(
                "kvcache: disk tier at %s: replica %d of %d, with %s of a capacity of %s",
                self._files.path,
                replica.index,
                replica.count,
                format_size(share),
                format_size(capacity),
            )

    def _open(self, slots: int, policy: Callable[[int], Policy]) -> None:
        """Take the space, and find what is there."""
        files, nbytes = self._files, slots * self._slot_nbytes
        files.check_room(nbytes + file_nbytes(slots))
        self._index = Index(policy(slots), self._clock, fallback.lru)
        self._index.open_slots(slots)
        self._nbytes = [0] * slots  # of the value in each slot
        # Before the file of blocks grows: no record may come to name what was not written.
        written = os.fstat(files.blocks).st_size
        self._records = Records(files.records, self._slot_nbytes, slots, files.blocks)
        if written and not self._records.kept:
            log.info(
                "kvcache: disk tier at %s: blocks of another format or block size deleted",
                files.path,
            )
        newest: dict[bytes, Record] = {}
        self._generation = 1  # of the next block
        for record in sorted(self._records):  # the oldest first
            if older := newest.pop(record.key, None):
                self._records.clear(older.slot)  # else it would be back when the newer one is not
            newest[record.key] = record
            self._nbytes[record.slot] = record.nbytes
            self._generation = record.generation + 1
        self._index.restore([(r.slot, r.key, r.parent or None) for r in newest.values()])
        files.take_blocks(nbytes)

    # The contract

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        with self._lock:
            return [not self._closed and key in self._index for key in keys]

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        if len(keys) != len(into):
            raise ValueError(f"{len(keys)} keys and {len(into)} buffers")
        with self._call() as may:
            if not may:
                return [0] * len(keys)
            with self._lock:
                for key in reversed(keys):  # one by one: they need not be a chain's, in its order
                    self._index.access([key], 0)
                pinned = [self._index.pin([key]) for key in keys]
            fits = [
                at
                for at, slots in enumerate(pinned)
                if slots and self._nbytes[slots[0]] <= len(into[at])
            ]
            reads: list[Future[int]] = []
            try:
                self._together(reads, [partial(self._read, pinned[at][0], into[at]) for at in fits])
            finally:
                with self._lock:
                    self._index.unpin([slot for slots in pinned for slot in slots])
            pairs = zip(fits, reads, strict=False)
            written = {at: read.result() for at, read in pairs if not read.cancelled()}
            if lost := [keys[at] for at, nbytes in written.items() if not nbytes]:
                self.remove(lost)
            return [written.get(at, 0) for at in range(len(keys))]

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        fit = [
            at
            for at, (key, block) in enumerate(zip(keys, blocks, strict=True))
            if 0 < len(block) <= self._block_nbytes and 0 < len(key) <= KEY_NBYTES
        ]
        with self._call() as may:
            if not may:
                return [False] * len(keys)
            can_write = self._can_write(len(fit))
            with self._lock:
                if not can_write:
                    fit = fit[: self._index.free_slots]
                stored = [keys[at] for at in fit]
                self._index.access(stored, 0)  # whoever stores them has just used them
                positions, slots = self._index.reserve(stored, parent)
                first = self._generation
                self._generation += len(slots)
            where = [fit[position] for position in positions]
            before = [parent or b"", *keys]
            records = [
                Record(first + n, slot, len(blocks[at]), keys[at], before[at])
                for n, (slot, at) in enumerate(zip(slots, where, strict=True))
            ]
            writes: list[Future[bool]] = []
            try:
                self._together(
                    writes,
                    [
                        partial(self._write, record, blocks[at])
                        for record, at in zip(records, where, strict=True)
                    ],
                )
            finally:
                good = {
                    keys[at]
                    for at, write in zip(where, writes, strict=False)
                    if _ended_well(write) and write.result()
                }
                with self._lock:
                    self._index.publish(slots, {keys[at] for at in where} - good)
            for write in writes:
                if not write.cancelled():
                    write.result()  # what is not the disk's fault is the caller's
            return self.contains(keys)

    def _can_write(self, blocks: int) -> bool:
        """Whether blocks may leave so that so many can come: not while nothing can be written.

        A file system that takes nothing is found out by a small write before a block leaves. One
        that fails afterwards has left a free slot, which is tried until a write succeeds.
        """
        with self._lock:
            if self._index.free_slots >= blocks:
                return True
        with self._declined("store"):
            lock_file.sign(self._files.lock)
            return not self._takes_nothing
        return False

    def remove(self, keys: Sequence[bytes]) -> None:
        with self._call() as may:
            if not may:
                return
            with self._lock:
                pinned = [slot for key in keys for slot in self._index.pin([key])]
                self._index.drop(keys)
            try:
                for slot in pinned:
                    with self._declined("remove"):
                        self._records.clear(slot)
            finally:
                with self._lock:
                    self._index.unpin(pinned)

    def resolve(self, namespace: bytes, about: str) -> bytes:
        with self._call() as may:
            if not may:
                raise ValueError("the tier is closed")
            return namespace_file.resolve(self._files.folder, self._files.path, namespace, about)

    def forget(self, namespace: bytes) -> None:
        with self._call() as may:
            if not may:
                raise ValueError("the tier is closed")
            namespace_file.forget(self._files.folder, self._files.path, namespace)

    def usage(self) -> TierUsage:
        with self._lock:
            index, size = self._index, self._slot_nbytes
            return TierUsage(len(index) * size, index.slots * size, index.evicted_blocks)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            # A number of a file that was closed may be another file's by the time it is written to.
            if not self._quiet.wait_for(lambda: not self._calls, _CLOSE_S):
                log.warning("kvcache: disk tier at %s: closed while it hangs", self._files.path)
                return  # and leaves its files open
        self._pool.close(_CLOSE_S)
        self._files.close()

    @contextmanager
    def _call(self) -> Iterator[bool]:
        """Whether the tier is open; if so it stays open until the end of this."""
        with self._lock:
            may = not self._closed
            self._calls += may
        try:
            yield may
        finally:
            with self._lock:
                self._calls -= may
                self._quiet.notify_all()

    def _together(self, futures: list[Future[T]], calls: Sequence[Callable[[], T]]) -> None:
        """Have ``calls`` made by the pool; none is under way at the end.

        A pool that takes no more calls cancels theirs.
        """
        try:
            for call in calls:
                futures.append(self._pool.submit(call))  # noqa: PERF401 - those before an error
            wait(futures)
        finally:
            wait(futures)  # who was interrupted leaves none behind either

    # One block, in a thread of the pool

    def _read(self, slot: int, buffer: memoryview) -> int:
        nbytes = self._nbytes[slot]
        with self._declined("load"), self._pages(buffer[:nbytes]) as pages:
            if os.preadv(self._files.blocks, [pages], slot * self._slot_nbytes) >= nbytes:
                if pages.obj is not buffer.obj:
                    buffer[:nbytes] = pages[:nbytes]
                return nbytes
        return 0

    def _write(self, record: Record, block: memoryview) -> bool:
        slot, nbytes = record.slot, record.nbytes
        with self._declined("store"), self._pages(block) as pages:
            if pages.obj is not block.obj:
                pages[:nbytes] = block
            try:
                self._records.clear(slot)
                written = os.pwritev(self._files.blocks, [pages], slot * self._slot_nbytes)
                if written < len(pages):
                    return False
                self._records.write(record)
            except OSError as error:
                self._takes_nothing = error.errno in _TAKES_NOTHING
                raise
            self._takes_nothing = False
            self._nbytes[slot] = nbytes
            return True
        return False

    @contextmanager
    def _pages(self, view: memoryview) -> Iterator[memoryview]:
        """``view`` itself where it is whole aligned pages, else a bounce buffer as large."""
        if not view.readonly and not len(view) % PAGE and not _address(view) % PAGE:
            yield view
            return
        bounce = self._bounces.get()
        try:
            yield memoryview(bounce)[: -(-len(view) // PAGE) * PAGE]
        finally:
            self._bounces.put(bounce)

    @contextmanager
    def _declined(self, verb: str) -> Iterator[None]:
        """What the disk will not do is said, once a minute, and is nobody's exception."""
        try:
            yield
        except OSError as error:
            now, kind = self._clock(), (verb, error.errno)
            if now >= self._told.get(kind, now):
                self._told[kind] = now + _TELL_EVERY_S
                log.warning("kvcache: disk tier at %s: %s fails: %s", self._files.path, verb, error)


def _ended_well(future: Future[T]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view)) if len(view) else 0
