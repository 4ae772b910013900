"""The disk tier: which block is in which slot, and its reads and writes.

Invariants:

* Disk space is allocated when the tier is opened, and never exceeds ``capacity``. A full tier
  evicts by its policy, the tail of a chain before its head, after a restart too.
* A record names a block only while the block is whole: the tier clears the record before it writes
  the slot, and writes the record afterwards. So the process may be killed at any moment. Nothing is
  synced to the disk: after a power cut a record may exist without its block, which the frames
  around this tier detect.
* No lock is held while bytes are read or written. A slot is freed only after its reads and writes
  have ended, and the files are closed only after all calls have ended.
* No block is evicted while writes fail: a disk that becomes read-only keeps its blocks.
* An error of the disk is a decline or a miss. One error of each kind is logged per minute. A block
  that cannot be read is removed, so that it can be stored again.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TypeVar

from kvcache.eviction import LOWER_TIER_DEFAULT, Eviction, Policy, fallback, policy_option
from kvcache.index import Index
from kvcache.keys import Branch, branches_of, parents_of
from kvcache.process import bind_to_process
from kvcache.replica import ALONE, Replica
from kvcache.sizes import DiskSize, format_size
from kvcache.tier import Tier, TierUsage
from kvcache.tiers.disk import lock_file, namespace_file
from kvcache.tiers.disk.adjacent_writes import AdjacentBlocks, group_adjacent
from kvcache.tiers.disk.bounce_buffers import BounceBuffers
from kvcache.tiers.disk.directory import TierDirectory
from kvcache.tiers.disk.error_log import DiskErrorLog
from kvcache.tiers.disk.record_file import (
    KEY_NBYTES,
    PAGE,
    RECORD_NBYTES,
    Geometry,
    Record,
    RecordFile,
    file_nbytes,
)
from kvcache.tiers.disk.replicas import FileSizes
from kvcache.tiers.disk.restore import restore_index
from kvcache.tiers.disk.safe_open import expand_path
from kvcache.worker_pool import WorkerPool

log = logging.getLogger(__name__)

T = TypeVar("T")

# Bytes besides slots and records: the lock file, the page of geometry, and the unused part of the
# last page of records.
_FIXED_NBYTES = 3 * PAGE
_NO_SLOT_WRITABLE = (errno.EROFS, errno.ENOSPC, errno.EDQUOT)  # errors that do not depend on a slot


class DiskTier(Tier):
    """A tier on a local disk.

    Args:
        block_nbytes: bytes of the largest value; larger ones are declined.
        path: a directory for this tier alone, created if it does not exist. ``~`` and ``$NAME`` in
            it are expanded.
        capacity: bytes of disk to allocate. After a restart with a smaller capacity the tier keeps
            the blocks that fit; with another ``block_nbytes`` it starts empty.
        eviction: the eviction policy: a shipped one by name, or a class path.
        threads: the most reads and writes at the same time, of all calls together.
        replica: the replica on this host that uses the tier. Each replica has its own directory
            below ``path``, and an equal share of ``capacity``.
        clock: the current time in seconds, for the eviction policy and the rate of log messages.

    Attributes:
        close_timeout_s: how long ``close`` waits for calls in progress.
        directory: the open files; this and the next ones are for tests and tools.
        index, records, pool: the state of the slots, the records, and the threads.
        bounce_buffers: buffers for memory that direct I/O cannot use.

    Raises:
        ValueError: ``path`` cannot be used or is in use, the file system has no room, or
            ``capacity`` holds no block.
    """

    close_timeout_s: float = 10.0

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
        nbytes_per_block = self._slot_nbytes + RECORD_NBYTES
        share = capacity // replica.count
        slots = (share - _FIXED_NBYTES) // nbytes_per_block
        if slots < 1:
            least = nbytes_per_block + _FIXED_NBYTES
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
        self._no_calls = threading.Condition(self._lock)
        self._calls = 0  # in progress
        self._closed = False
        self._writes_fail = False  # whether the last write failed, whatever its slot
        self._clock = clock
        try:
            with ExitStack() as undo:
                sizes = FileSizes(file_nbytes(slots), slots * self._slot_nbytes)
                self.directory = TierDirectory(expand_path(path), replica, sizes)
                undo.callback(self.directory.close)
                self._errors = DiskErrorLog(self.directory.path, block_nbytes, clock)
                self._open(slots, policy)
                self.bounce_buffers = BounceBuffers(threads, self._slot_nbytes)
                self.pool = WorkerPool("disk", threads)
                undo.pop_all()
        except (OSError, RuntimeError) as error:
            raise ValueError(f"path is {path!r}, which cannot be used: {error}") from error
        bind_to_process(self)
        if replica.count > 1:
            log.info(
                "kvcache: disk tier at %s: replica %d of %d, with %s of a capacity of %s",
                self.directory.path,
                replica.index,
                replica.count,
                format_size(share),
                format_size(capacity),
            )

    def _open(self, slots: int, policy: Callable[[int], Policy]) -> None:
        """Allocate the space, and restore the index from the records."""
        directory, nbytes = self.directory, slots * self._slot_nbytes
        directory.check_room(nbytes + file_nbytes(slots))
        self.index = Index(policy(slots), self._clock, fallback.lru)
        # The records are read before `blocks` grows: a record beyond its end must be ignored.
        blocks_nbytes = os.fstat(directory.blocks_fd).st_size
        self.records = RecordFile(
            directory.records_fd, self._slot_nbytes, slots, directory.blocks_fd
        )
        if blocks_nbytes and self.records.was_blank:
            log.warning(
                "kvcache: disk tier at %s: records are gone (deleted or emptied); it starts empty",
                directory.path,
            )
        elif blocks_nbytes and not self.records.kept:
            log.info(
                "kvcache: disk tier at %s: blocks of another format or block size deleted",
                directory.path,
            )
        found = restore_index(self.index, directory.records_fd, Geometry(self._slot_nbytes, slots))
        for slot in found.repeated:
            self.records.clear(slot)  # else a restart finds it after the newer one is evicted
        self._generation = found.newest + 1  # of the next block
        self._nbytes = found.nbytes  # of the value in each slot
        directory.allocate_blocks(nbytes)

    # The contract

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        with self._lock:
            return [not self._closed and key in self.index for key in keys]

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        if len(keys) != len(into):
            raise ValueError(f"{len(keys)} keys and {len(into)} buffers")
        with self._call() as is_open:
            if not is_open:
                return [0] * len(keys)
            with self._lock:
                for key in reversed(keys):  # one by one: they need not be a chain in order
                    self.index.access([key], 0)
                pinned = [self.index.pin([key]) for key in keys]
            readable = [
                at
                for at, slots in enumerate(pinned)
                if slots and self._nbytes[slots[0]] <= len(into[at])
            ]
            reads: list[Future[int]] = []
            try:
                self._run_all(
                    reads, [partial(self._read, pinned[at][0], into[at]) for at in readable]
                )
            finally:
                with self._lock:
                    self.index.unpin([slot for slots in pinned for slot in slots])
            pairs = zip(readable, reads, strict=False)
            written = {at: read.result() for at, read in pairs if not read.cancelled()}
            if unreadable := [keys[at] for at, nbytes in written.items() if not nbytes]:
                self.remove(unreadable)
            return [written.get(at, 0) for at in range(len(keys))]

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        return self.store_branches([(keys, parent)], blocks)

    def store_branches(
        self, branches: Sequence[Branch], blocks: Sequence[memoryview]
    ) -> list[bool]:
        keys = [key for branch, _ in branches for key in branch]
        parents = parents_of(branches)
        storable = [
            at
            for at, (key, block) in enumerate(zip(keys, blocks, strict=True))
            if 0 < len(block) <= self._block_nbytes and 0 < len(key) <= KEY_NBYTES
        ]
        with self._call() as is_open:
            if not is_open:
                return [False] * len(keys)
            can_evict = self._can_write(len(storable))
            with self._lock:
                if not can_evict:
                    storable = storable[: self.index.free_slots]
                to_store = branches_of(
                    [keys[at] for at in storable], [parents[at] for at in storable]
                )
                for branch, _ in to_store:
                    self.index.access(branch, 0)  # the engine has just used them
                positions, slots = self.index.reserve_branches(to_store)
                first_generation = self._generation
                self._generation += len(slots)
            reserved = [storable[position] for position in positions]
            records = [
                Record(first_generation + n, slot, len(blocks[at]), keys[at], parents[at] or b"")
                for n, (slot, at) in enumerate(zip(slots, reserved, strict=True))
            ]
            groups = group_adjacent(records, [blocks[at] for at in reserved], self._slot_nbytes)
            writes: list[Future[bool]] = []
            try:
                self._run_all(writes, [partial(self._write, group) for group in groups])
            finally:
                written = {
                    record.key
                    for group, write in zip(groups, writes, strict=False)
                    if _succeeded(write) and write.result()
                    for record in group.records
                }
                failed = {keys[at] for at in reserved} - written
                with self._lock:
                    self.index.publish(slots, failed)
            for write in writes:
                if not write.cancelled():
                    write.result()  # raises an error of the caller, such as a bad buffer
            stored = self.contains(keys)
            self._errors.count_declined(keys, blocks, stored, failed if can_evict else keys)
            return stored

    def _can_write(self, blocks: int) -> bool:
        """Whether the tier may evict to store ``blocks`` new blocks: not while writes fail.

        A small write shows whether the file system accepts writes, before any block is evicted. If
        a later write fails, the slot stays free, and is tried again until a write succeeds.
        """
        with self._lock:
            if self.index.free_slots >= blocks:
                return True
        with self._errors.suppress("store"):
            lock_file.write_pid(self.directory.lock_fd)
            return not self._writes_fail
        return False

    def remove(self, keys: Sequence[bytes]) -> None:
        with self._call() as is_open:
            if not is_open:
                return
            with self._lock:
                pinned = [slot for key in keys for slot in self.index.pin([key])]
                self.index.drop(keys)
            try:
                for slot in pinned:
                    with self._errors.suppress("remove"):
                        self.records.clear(slot)
            finally:
                with self._lock:
                    self.index.unpin(pinned)

    def resolve(self, namespace: bytes, about: str) -> bytes:
        with self._call() as is_open:
            if not is_open:
                raise ValueError("the tier is closed")
            return namespace_file.resolve(
                self.directory.folder_fd, self.directory.path, namespace, about
            )

    def forget(self, namespace: bytes) -> None:
        with self._call() as is_open:
            if not is_open:
                raise ValueError("the tier is closed")
            namespace_file.reset(self.directory.folder_fd, self.directory.path, namespace)

    def usage(self) -> TierUsage:
        with self._lock:
            index, size = self.index, self._slot_nbytes
            used, limit, evicted = len(index) * size, index.slots * size, index.evicted_blocks
        return TierUsage(used, limit, evicted, declined_blocks=self._errors.declined.counts())

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            # Files stay open while a call uses them: their descriptors could be reused.
            if not self._no_calls.wait_for(lambda: not self._calls, self.close_timeout_s):
                log.warning(
                    "kvcache: disk tier at %s: close: a read or write hangs; its files stay open",
                    self.directory.path,
                )
                return
        self.pool.close(self.close_timeout_s)
        self.directory.close()

    @contextmanager
    def _call(self) -> Iterator[bool]:
        """Yield whether the tier is open; if it is, it stays open until the end of the block."""
        with self._lock:
            is_open = not self._closed
            self._calls += is_open
        try:
            yield is_open
        finally:
            with self._lock:
                self._calls -= is_open
                self._no_calls.notify_all()

    def _run_all(self, futures: list[Future[T]], calls: Sequence[Callable[[], T]]) -> None:
        """Run ``calls`` in the pool and wait until all have ended, even if interrupted.

        Appends a future for each call; a pool that is closed cancels it.
        """
        try:
            for call in calls:
                futures.append(self.pool.submit(call))  # noqa: PERF401 - kept if a later one fails
            wait(futures)
        finally:
            wait(futures)  # also after KeyboardInterrupt: the calls use the caller's memory

    # Reads and writes, in a thread of the pool

    def _read(self, slot: int, buffer: memoryview) -> int:
        nbytes = self._nbytes[slot]
        with (
            self._errors.suppress("load"),
            self.bounce_buffers.aligned(buffer[:nbytes]) as pages,
        ):
            if os.preadv(self.directory.blocks_fd, [pages], slot * self._slot_nbytes) >= nbytes:
                if pages.obj is not buffer.obj:
                    buffer[:nbytes] = pages[:nbytes]
                return nbytes
        return 0

    def _write(self, group: AdjacentBlocks) -> bool:
        first, slot_nbytes = group.first_slot, self._slot_nbytes
        with ExitStack() as lent, self._errors.suppress("store"):
            memory = []
            for block in group.blocks:
                pages = lent.enter_context(self.bounce_buffers.aligned(block))
                if pages.obj is not block.obj:
                    pages[: len(block)] = block
                memory.append(pages)
            try:
                self.records.clear(first, len(memory))
                written = os.pwritev(self.directory.blocks_fd, memory, first * slot_nbytes)
                if written < sum(map(len, memory)):
                    return False
                self.records.write(*group.records)
            except OSError as error:
                self._writes_fail = error.errno in _NO_SLOT_WRITABLE
                raise
            self._writes_fail = False
            for record in group.records:
                self._nbytes[record.slot] = record.nbytes
            return True
        return False


def _succeeded(future: Future[T]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None
