"""One run of host memory in equal slots, shared between an owner and those who attach to it.

The memory is an anonymous file (``memfd``): no ``/dev/shm`` to size, nothing left by a crash.
Others reach it through the owner's descriptor, ``/proc/<pid>/fd/<n>``.

Always true here:

* Slots are equal, a whole number of pages, and start on a page.
* No slot below ``populated`` costs a page fault's zeroing at its first use: a thread has the memory
  made in the background, lowest slot first, and ``populated`` only grows.
* A descriptor that names other memory (another host, a pid that was reused) is refused, not mapped.
* The file keeps its size, whatever process of the user has it open: the kernel refuses to truncate
  it, which would end the engine with SIGBUS.
* A forked child has no access to the memory until it attaches.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import mmap
import os
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kvcache.process import bind_to_process

log = logging.getLogger(__name__)

PAGE = mmap.PAGESIZE
HUGE_PAGE = 2 << 20
_FREE_HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_MFD_HUGE_2MB = 21 << 26
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_PIECE = 64 << 20  # populated at a time: some 20 ms, after which close() is heard
_PROGRESS_EVERY_S = 5.0  # so that small slabs, which are there in less, say nothing

_libc = ctypes.CDLL(None, use_errno=True)  # calls through it let other Python threads run
_libc.madvise.argtypes = _libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_PROT_NONE = 0


class SlabError(RuntimeError):
    """The slab's memory cannot be made or reached here."""


@dataclass(frozen=True, slots=True)
class SlabDescriptor:
    """What another process on this host needs to attach: picklable, and holds nothing open."""

    path: str
    name: str
    slots: int
    slot_nbytes: int


def slot_nbytes_for(block_nbytes: int) -> int:
    """A block's bytes rounded up to whole pages."""
    return -(-block_nbytes // PAGE) * PAGE


class Slab:
    """``slots`` slots of ``slot_nbytes`` bytes. Use :meth:`create` or :meth:`attach`.

    Attributes:
        address: where slot 0 begins in this process.
        descriptor: for :meth:`attach` in another process; good while the owner's slab is open.
        populated: slots whose memory is there.
    """

    def __init__(self, fd: int, descriptor: SlabDescriptor, *, owner: bool) -> None:
        self._fd = fd if owner else None
        self.descriptor = descriptor
        self.slots = descriptor.slots
        self.slot_nbytes = descriptor.slot_nbytes
        self.nbytes = self.slots * self.slot_nbytes
        mapped = -(-self.nbytes // HUGE_PAGE) * HUGE_PAGE if _is_huge(fd) else self.nbytes
        try:
            self._map = mmap.mmap(fd, mapped)
        except (OSError, ValueError):
            os.close(fd)
            raise
        if not owner:
            os.close(fd)
        self._view = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        _libc.madvise(self.address, mapped, mmap.MADV_HUGEPAGE)  # where the kernel gives them
        self.populated = 0
        self._made = 0  # bytes
        self._mapped = mapped  # bytes of the mapping; 0 when there is none
        self._ready: Callable[[int], None] = lambda _: None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        bind_to_process(self)

    def _release_in_child(self) -> None:
        """Give up what a forked child has of the memory, and the memory's end to the parent."""
        _libc.mprotect(self.address, self._mapped, _PROT_NONE)
        self._close_fd()

    @classmethod
    def create(cls, slots: int, slot_nbytes: int) -> Slab:
        """Make a slab; its memory is not there yet, see :meth:`populate`.

        Raises:
            ValueError: when the sizes are not positive, or slots are not whole pages.
            SlabError: when the kernel refuses the memory.
        """
        if slots < 1 or slot_nbytes < 1 or slot_nbytes % PAGE:
            raise ValueError(
                f"a slab of {slots} slots of {slot_nbytes} bytes: there must be at least one slot, "
                f"of a multiple of {PAGE} bytes"
            )
        name = f"kvcache-{uuid.uuid4().hex}"
        nbytes = slots * slot_nbytes
        try:
            fd = _memfd(name, nbytes)
            path = f"/proc/{os.getpid()}/fd/{fd}"
            return cls(fd, SlabDescriptor(path, name, slots, slot_nbytes), owner=True)
        except OSError as error:
            raise SlabError(f"cannot make a slab of {nbytes} bytes: {error}") from error

    @classmethod
    def attach(cls, descriptor: SlabDescriptor) -> Slab:
        """Map the slab that another process on this host owns.

        Raises:
            SlabError: when the descriptor leads to nothing, or to other memory.
        """
        where = f"the slab {descriptor.name} at {descriptor.path}"
        try:
            fd = os.open(descriptor.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise SlabError(
                f"cannot attach {where}: {error.strerror}. Its owner must be running on this host, "
                "under the same user and in the same pid namespace"
            ) from error
        found = str(Path(f"/proc/self/fd/{fd}").readlink())
        if descriptor.name not in found:
            os.close(fd)
            raise SlabError(
                f"cannot attach {where}: it is {found}. Its owner has ended, or is on another host"
            )
        return cls(fd, descriptor, owner=False)

    def view(self, slot: int) -> memoryview:
        """The slot's bytes, writable."""
        if not 0 <= slot < self.slots:
            raise IndexError(f"slot {slot} of a slab that has {self.slots}")
        at = slot * self.slot_nbytes
        return self._view[at : at + self.slot_nbytes]

    def populate(self, ready: Callable[[int], None] = lambda _: None) -> None:
        """Have the memory made: a first piece now, the rest in the background.

        ``ready(slots)`` is called whenever more slots are there, with how many are.
        """
        self._ready = ready
        if self._make_piece():
            self._thread = threading.Thread(
                target=self._make_rest, name="kvcache-populate", daemon=True
            )
            self._thread.start()

    def wait_populated(self) -> int:
        """Wait for the background work to end; give the slots whose memory is there."""
        if self._thread is not None:
            self._thread.join()
        return self.populated

    def _make_rest(self) -> None:
        begun = told = time.monotonic()
        while self._make_piece() and not self._stop.is_set():
            now = time.monotonic()
            if now - told > _PROGRESS_EVERY_S:
                told = now
                log.info(
                    "kvcache: %.1f of %.1f GiB of L1 are there (%.1f GiB/s)",
                    self._made / 2**30, self.nbytes / 2**30, self._made / 2**30 / (now - begun),
                )  # fmt: skip
        if told > begun and self._made == self.nbytes:
            log.info("kvcache: all %.1f GiB of L1 are there", self.nbytes / 2**30)

    def _make_piece(self) -> bool:
        """Make the next piece's memory; say whether there is more to make."""
        piece = min(max(_PIECE, self.slot_nbytes), self.nbytes - self._made)
        if code := self._make(self._made, piece):
            log.error(
                "kvcache: no more memory for L1 than %.1f of %.1f GiB (%s); going on with that",
                self._made / 2**30, self.nbytes / 2**30, os.strerror(code),
            )  # fmt: skip
            return False
        self._made += piece
        self.populated = self._made // self.slot_nbytes
        self._ready(self.populated)
        return self._made < self.nbytes

    def _make(self, at: int, nbytes: int) -> int:
        """Have these bytes' pages made and mapped here; give 0 or an errno."""
        while _libc.madvise(self.address + at, nbytes, _MADV_POPULATE_WRITE):
            code = ctypes.get_errno()
            if code == errno.EINVAL and self._fd is not None:
                # A kernel older than MADV_POPULATE_WRITE: have the file's pages made, so that a
                # first touch maps a page and need not zero it.
                try:
                    os.posix_fallocate(self._fd, at, nbytes)
                except OSError as error:
                    return error.errno or errno.ENOMEM
                return 0
            if code not in (errno.EINTR, errno.EAGAIN):
                return 0 if code == errno.EINVAL else code
        return 0

    def close(self) -> None:
        """Unmap, and end the owner's descriptor. Views still held keep the memory alive."""
        self._stop.set()
        self.wait_populated()
        self._close_fd()
        mapped, self._mapped = self._mapped, 0
        try:
            self._view.release()
            self._map.close()
        except BufferError:
            self._mapped = mapped
            log.debug("kvcache: views of the slab outlive it; its memory goes with them")

    def _close_fd(self) -> None:
        fd, self._fd = self._fd, None  # a fork in between must not close another file's number
        if fd is not None:
            os.close(fd)


def _memfd(name: str, nbytes: int) -> int:
    """An anonymous file of ``nbytes``: of huge pages when enough of them are reserved and free."""
    pages = -(-nbytes // HUGE_PAGE)
    if _FREE_HUGE_PAGES.exists() and int(_FREE_HUGE_PAGES.read_text()) >= pages:
        # Another process may take the pages first; kernels before 4.16 do not seal huge pages.
        with suppress(OSError):
            return _sealed(name, pages * HUGE_PAGE, os.MFD_HUGETLB | _MFD_HUGE_2MB)
    return _sealed(name, nbytes)


def _sealed(name: str, nbytes: int, flags: int = 0) -> int:
    """An anonymous file that keeps its size."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    try:
        os.ftruncate(fd, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd


def _is_huge(fd: int) -> bool:
    return os.fstat(fd).st_blksize == HUGE_PAGE
