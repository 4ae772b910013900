"""Blocks in a directory of a local disk: slots of one preallocated file, and a record for each.

::

    lock      held while the directory is open; has the pid of who holds it
    records   one page of geometry, then 128 bytes per slot: whose block is in it, or zeros
    blocks    slots of whole pages, allocated at once

Always true here:

* Disk space is taken when the tier is opened and never exceeds ``capacity``; when it is full,
  blocks leave by the eviction order, of one call's chain the tail first, after a restart too.
  Nothing is known of what one call's keys continue in another's.
* A record names a block only while the block is whole: it is cleared before its slot is written,
  and written after. So a process may be killed at any moment. Nothing is synced: after a power cut
  a record may stand without its block, which is what the frames around this tier are for.
* An index is rebuilt from the records. Records that do not verify, or whose slot lies beyond the
  end of the file of blocks, and files of another geometry, count as empty.
* No lock is held while bytes move. A slot is given back only when no read or write of it is under
  way, and a file is closed only when no call is. What the disk will not do is a decline or a miss,
  of which one a minute is logged of each kind.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import mmap
import os
import stat
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Literal, TypeVar

from kvcache.eviction import POLICIES
from kvcache.index import Index
from kvcache.sizes import DiskSize, format_size
from kvcache.tier import Tier

log = logging.getLogger(__name__)

T = TypeVar("T")

PAGE = 4096
_RECORD_NBYTES = 128
_MAGIC = b"kvcdisk1"
_GEOMETRY = struct.Struct("<8sQQ")  # magic, bytes of a slot, slots
_RECORD = struct.Struct("<IQHQ64s")  # slot, generation, bytes of the key, of the block, the key
_CRC = struct.Struct("<I")
_WHOLE = struct.Struct(f"<{_RECORD.size}sI{_RECORD_NBYTES - _RECORD.size - _CRC.size}x")
_EMPTY = bytes(_RECORD_NBYTES)
_BESIDE = 3 * PAGE  # the lock, the geometry, and the records' last page, which they may not fill
_READ_NBYTES = 1 << 20  # of records at a time
_TELL_EVERY_S = 60.0  # of one kind of failure


class DiskTier(Tier):
    """A tier on a local disk.

    Args:
        block_nbytes: bytes of the largest value; larger ones are declined.
        path: a directory of this tier's own, made if it is not there.
        capacity: bytes of disk to take. With another one, or another ``block_nbytes``, than before
            a restart the tier starts empty.
        eviction: which blocks go when it is full.
        threads: reads or writes under way at once in one call.
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
        eviction: Literal["lru", "fifo", "s3fifo"] = "lru",
        threads: int = 4,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if block_nbytes < 1:
            raise ValueError(f"block_nbytes is {block_nbytes}; a block has at least one byte")
        if eviction not in POLICIES:
            raise ValueError(f"eviction is {eviction!r}; there are {', '.join(POLICIES)}")
        self._slot_nbytes = -(-block_nbytes // PAGE) * PAGE
        each = self._slot_nbytes + _RECORD_NBYTES
        slots = (capacity - _BESIDE) // each
        if slots < 1:
            raise ValueError(f"capacity is {capacity} bytes; one block takes {each + _BESIDE}")
        if threads < 1:
            raise ValueError(f"threads is {threads}; it must be at least 1")
        self._block_nbytes = block_nbytes
        self._root = Path(path)
        self._open_files: list[int] = []
        self._lock = threading.Lock()
        self._quiet = threading.Condition(self._lock)
        self._calls = 0  # under way
        self._closed = False
        self._told: dict[tuple[str, int | None], float] = {}
        self._clock = clock
        self._bounces: SimpleQueue[mmap.mmap] = SimpleQueue()
        try:
            self._lock_file = self._locked()
            self._records = self._file("records")
            self._blocks = self._file("blocks")
            self._check_room(slots)
            self._index = Index(POLICIES[eviction](slots), clock)
            self._index.open_slots(slots)
            self._nbytes = [0] * slots  # of the value in each slot
            # Before the file of blocks grows: no record may come to name what was not written.
            self._generation = self._recover(slots)
            self._blocks = self._allocated(slots)
            for _ in range(threads):
                self._bounces.put(mmap.mmap(-1, self._slot_nbytes))
            self._pool = _started(threads)
        except (OSError, RuntimeError) as error:
            self._close_files()
            raise ValueError(f"path is {path!r}, which cannot be used: {error}") from error
        except BaseException:
            self._close_files()
            raise

    # Files

    def _locked(self) -> int:
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except FileExistsError:
            raise ValueError(f"path is {str(self._root)!r}, which is not a directory") from None
        fd = self._file("lock")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "?"
            raise ValueError(
                f"path is {str(self._root)!r}, which process {holder} has open; every tier needs a "
                "directory of its own"
            ) from None
        os.pwrite(fd, str(os.getpid()).ljust(32).encode(), 0)
        return fd

    def _file(self, name: str, flags: int = 0) -> int:
        fd = os.open(self._root / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | flags, 0o600)
        self._open_files.append(fd)
        if stat.S_IMODE(os.fstat(fd).st_mode) & 0o077:  # it was there, for others to read
            os.fchmod(fd, 0o600)
        return fd

    def _check_room(self, slots: int) -> None:
        need = slots * self._slot_nbytes + PAGE + slots * _RECORD_NBYTES
        have = sum(os.fstat(fd).st_blocks * 512 for fd in (self._records, self._blocks))
        space = os.statvfs(self._root)
        free = space.f_bavail * space.f_frsize
        if need > have + free:
            raise ValueError(
                f"capacity asks for {format_size(need)} at {str(self._root)!r}, where "
                f"{format_size(have + free)} are free"
            )

    def _allocated(self, slots: int) -> int:
        """The file of blocks, with its space taken; direct where the file system takes that."""
        plain, need = self._blocks, slots * self._slot_nbytes
        os.ftruncate(plain, need)
        os.posix_fallocate(plain, 0, need)
        try:
            direct = self._file("blocks", os.O_DIRECT)
            os.preadv(direct, [memoryview(mmap.mmap(-1, PAGE))], 0)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            return plain
        return direct

    def _recover(self, slots: int) -> int:
        """Fill the index from the records, the oldest first; give the next generation."""
        geometry = _GEOMETRY.pack(_MAGIC, self._slot_nbytes, slots)
        known = os.pread(self._records, len(geometry), 0) == geometry
        whole = min(slots, os.fstat(self._blocks).st_size // self._slot_nbytes) if known else 0
        os.ftruncate(self._records, PAGE + whole * _RECORD_NBYTES)
        os.posix_fallocate(self._records, 0, PAGE + slots * _RECORD_NBYTES)
        os.pwrite(self._records, geometry, 0)
        found = sorted(_read(self._records, slots))
        newest: dict[bytes, int] = {}
        for _, slot, nbytes, key in found:
            newest.pop(key, None)
            newest[key] = slot
            self._nbytes[slot] = min(nbytes, self._slot_nbytes)
        self._index.restore([(slot, key) for key, slot in newest.items()])
        return found[-1][0] + 1 if found else 1

    def _close_files(self) -> None:
        while self._open_files:
            os.close(self._open_files.pop())

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
            found = [at for at, slots in enumerate(pinned) if slots]
            reads: list[Future[int]] = []
            try:
                self._together(
                    reads, [partial(self._read, pinned[at][0], into[at]) for at in found]
                )
            finally:
                with self._lock:
                    self._index.unpin([pinned[at][0] for at in found])
            written = dict(zip(found, (read.result() for read in reads), strict=False))
            return [written.get(at, 0) for at in range(len(keys))]

    def store(self, keys: Sequence[bytes], blocks: Sequence[memoryview]) -> list[bool]:
        fit = [
            at
            for at, (key, block) in enumerate(zip(keys, blocks, strict=True))
            if 0 < len(block) <= self._block_nbytes and 0 < len(key) <= 64
        ]
        with self._call() as may:
            if not may:
                return [False] * len(keys)
            with self._lock:
                positions, slots = self._index.reserve([keys[at] for at in fit], None)
                self._generation += len(slots)
                head = self._generation - 1  # the newest after a restart, and the last to go
            where = [fit[position] for position in positions]
            writes: list[Future[bool]] = []
            try:
                self._together(
                    writes,
                    [
                        partial(self._write, slot, head - n, keys[at], blocks[at])
                        for n, (slot, at) in enumerate(zip(slots, where, strict=True))
                    ],
                )
            finally:
                good = {
                    keys[at]
                    for at, write in zip(where, writes, strict=False)
                    if write.done() and write.exception() is None and write.result()
                }
                with self._lock:
                    self._index.publish(slots, {keys[at] for at in where} - good)
            for write in writes:
                write.result()  # what is not the disk's fault is the caller's
            return self.contains(keys)

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
                        self._record(slot, _EMPTY)
            finally:
                with self._lock:
                    self._index.unpin(pinned)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            # A number of a file that was closed may be another file's by the time it is written to.
            self._quiet.wait_for(lambda: not self._calls)
        self._pool.shutdown()
        fcntl.flock(self._lock_file, fcntl.LOCK_UN)  # a forked process may have the file as well
        self._close_files()

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
        """Have ``calls`` made by the pool, as many as it takes; none is under way at the end."""
        try:
            with self._declined("start"):
                for call in calls:
                    futures.append(self._pool.submit(call))  # noqa: PERF401 - those before an error
            wait(futures)
        finally:
            wait(futures)  # who was interrupted leaves none behind either

    # One block, in a thread of the pool

    def _read(self, slot: int, buffer: memoryview) -> int:
        nbytes = self._nbytes[slot]
        if nbytes > len(buffer):
            return 0
        with self._declined("load"), self._pages(buffer[:nbytes]) as pages:
            if os.preadv(self._blocks, [pages], slot * self._slot_nbytes) >= nbytes:
                if pages.obj is not buffer.obj:
                    buffer[:nbytes] = pages[:nbytes]
                return nbytes
        return 0

    def _write(self, slot: int, generation: int, key: bytes, block: memoryview) -> bool:
        with self._declined("store"):
            self._record(slot, _EMPTY)
            with self._pages(block) as pages:
                if pages.obj is not block.obj:
                    pages[: len(block)] = block
                if os.pwritev(self._blocks, [pages], slot * self._slot_nbytes) < len(pages):
                    return False
            fields = _RECORD.pack(slot, generation, len(key), len(block), key)
            self._record(slot, fields + _CRC.pack(zlib.crc32(fields)))
            self._nbytes[slot] = len(block)
            return True
        return False

    def _record(self, slot: int, record: bytes) -> None:
        os.pwrite(self._records, record, PAGE + slot * _RECORD_NBYTES)

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
        except (OSError, RuntimeError) as error:  # RuntimeError: the pool takes nothing any more
            now, kind = self._clock(), (verb, getattr(error, "errno", None))
            if now >= self._told.get(kind, now):
                self._told[kind] = now + _TELL_EVERY_S
                log.warning("kvcache: disk tier at %s: %s fails: %s", self._root, verb, error)


def _started(threads: int) -> ThreadPoolExecutor:
    """A pool with all its threads: a submit that fails to start one leaves its call queued."""
    pool, gate = ThreadPoolExecutor(threads, "kvcache-disk"), threading.Event()
    try:
        for _ in range(threads):
            pool.submit(gate.wait)
    finally:
        gate.set()
    return pool


def _read(records: int, slots: int) -> Iterator[tuple[int, int, int, bytes]]:
    """Generation, slot, bytes and key of every record that verifies."""
    end, at = PAGE + slots * _RECORD_NBYTES, 0
    for begin in range(PAGE, end, _READ_NBYTES):
        piece = os.pread(records, min(_READ_NBYTES, end - begin), begin)
        for fields, crc in _WHOLE.iter_unpack(piece):
            if crc == zlib.crc32(fields):
                slot, generation, key_nbytes, nbytes, key = _RECORD.unpack(fields)
                if slot == at and key_nbytes <= len(key):
                    yield generation, slot, nbytes, key[:key_nbytes]
            at += 1


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view)) if len(view) else 0
