"""Host memory in equal slots, shared between the process that owns it and those that attach to it.

The memory is an anonymous file (``memfd``): there is no ``/dev/shm`` to size, and a crash leaves
nothing behind. Other processes open it by the owner's descriptor, ``/proc/<pid>/fd/<n>``.

Always true here:

* Slots have one size, a whole number of pages, and start on a page.
* The first use of a slot below ``populated`` costs no zeroing of pages: a background thread
  allocates the memory from the lowest slot up, and ``populated`` only grows.
* A descriptor that leads to other memory (another host, a reused pid) is refused, not mapped.
* The file keeps its size: the kernel lets no process truncate it, which would end the engine with
  SIGBUS.
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
FREE_HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
MADV_POPULATE_WRITE = 23  # Linux 5.14
_MFD_HUGE_2MB = 21 << 26
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
PIECE_NBYTES = 64 << 20  # allocated at a time, in about 20 ms; ``close`` waits for one piece
_PROGRESS_EVERY_S = 5.0  # small slabs are allocated faster, and log nothing

_libc = ctypes.CDLL(None, use_errno=True)  # its calls release the GIL
_libc.madvise.argtypes = _libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_PROT_NONE = 0


class SlabError(RuntimeError):
    """The memory of a slab cannot be allocated or mapped by this process."""


@dataclass(frozen=True, slots=True)
class SlabDescriptor:
    """The data with which another process on this host attaches. Picklable; keeps no file open."""

    path: str
    name: str
    slots: int
    slot_nbytes: int


def slot_nbytes_for(block_nbytes: int) -> int:
    """The size of a block, rounded up to whole pages."""
    return -(-block_nbytes // PAGE) * PAGE


class Slab:
    """``slots`` slots of ``slot_nbytes`` bytes. Made by :meth:`create` or :meth:`attach`.

    Attributes:
        address: the address of slot 0 in this process.
        descriptor: for :meth:`attach` in another process; valid while the owner's slab is open.
        populated: how many slots have their memory allocated, from slot 0.
    """

    def __init__(self, fd: int, descriptor: SlabDescriptor, *, owner: bool) -> None:
        self._fd = fd if owner else None
        self._owner = owner
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
        _libc.madvise(
            self.address, mapped, mmap.MADV_HUGEPAGE
        )  # a request; the kernel may ignore it
        self.populated = 0
        self._allocated_nbytes = 0
        self._mapped_nbytes = mapped  # 0 after unmapping
        self._on_ready: Callable[[int], None] = lambda _: None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        bind_to_process(self)

    def _release_in_child(self) -> None:
        """Make the memory inaccessible in a forked child, and close the child's descriptor."""
        _libc.mprotect(self.address, self._mapped_nbytes, _PROT_NONE)
        self._close_fd()

    @classmethod
    def create(cls, slots: int, slot_nbytes: int) -> Slab:
        """Create a slab. Its memory is allocated by :meth:`populate`.

        Raises:
            ValueError: if a size is not positive, or slots are not whole pages.
            SlabError: if the kernel refuses the memory.
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
            SlabError: if the descriptor leads to no memory, or to other memory.
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
        """A writable view of the slot's bytes."""
        if not 0 <= slot < self.slots:
            raise IndexError(f"slot {slot} of a slab that has {self.slots}")
        at = slot * self.slot_nbytes
        return self._view[at : at + self.slot_nbytes]

    def populate(self, on_ready: Callable[[int], None] = lambda _: None) -> None:
        """Allocate the memory: a first piece now, the rest in the background.

        ``on_ready(slots)`` is called after each piece, with the number of allocated slots.
        """
        self._on_ready = on_ready
        if not self._stop.is_set() and self._allocate_piece():
            self._thread = threading.Thread(
                target=self._allocate_rest, name="kvcache-populate", daemon=True
            )
            self._thread.start()

    def stop_populating(self) -> None:
        """Allocate no further piece. The one in progress is completed."""
        self._stop.set()

    def wait_populated(self) -> int:
        """Wait until the background thread ends; return how many slots are allocated."""
        if self._thread is not None:
            self._thread.join()
        return self.populated

    def _allocate_rest(self) -> None:
        begun = logged = time.monotonic()
        while self._allocate_piece() and not self._stop.is_set():
            now = time.monotonic()
            if self._owner and now - logged > _PROGRESS_EVERY_S:
                logged = now
                gib = self._allocated_nbytes / 2**30
                log.info(
                    "kvcache: slab: %.1f of %.1f GiB of L1 allocated (%.1f GiB/s)",
                    gib, self.nbytes / 2**30, gib / (now - begun),
                )  # fmt: skip
        if logged > begun and self._allocated_nbytes == self.nbytes:
            log.info("kvcache: slab: all %.1f GiB of L1 allocated", self.nbytes / 2**30)

    def _allocate_piece(self) -> bool:
        """Allocate the next piece; return whether there is more to allocate."""
        begin = self._allocated_nbytes
        nbytes = min(max(PIECE_NBYTES, self.slot_nbytes), self.nbytes - begin)
        if code := self.allocate(begin, nbytes):
            log.error(
                "kvcache: slab: allocation stopped at %.1f of %.1f GiB (%s); L1 stays at that size",
                begin / 2**30, self.nbytes / 2**30, os.strerror(code),
            )  # fmt: skip
            return False
        self._allocated_nbytes += nbytes
        self.populated = self._allocated_nbytes // self.slot_nbytes
        self._on_ready(self.populated)
        return self._allocated_nbytes < self.nbytes

    def allocate(self, begin: int, nbytes: int) -> int:
        """Allocate the pages of these bytes and map them here. Returns 0 or an errno."""
        while _libc.madvise(self.address + begin, nbytes, MADV_POPULATE_WRITE):
            code = ctypes.get_errno()
            if code == errno.EINVAL and self._fd is not None:
                # The kernel is older than MADV_POPULATE_WRITE. Allocating the file's pages leaves
                # only the mapping, not the zeroing, to the first access.
                try:
                    os.posix_fallocate(self._fd, begin, nbytes)
                except OSError as error:
                    return error.errno or errno.ENOMEM
                return 0
            if code not in (errno.EINTR, errno.EAGAIN):
                return 0 if code == errno.EINVAL else code
        return 0

    def close(self) -> None:
        """Unmap the memory and close the owner's descriptor. Views in use keep the memory alive."""
        self.stop_populating()
        self.wait_populated()
        self._close_fd()
        mapped, self._mapped_nbytes = self._mapped_nbytes, 0
        try:
            self._view.release()
            self._map.close()
        except BufferError:
            self._mapped_nbytes = mapped
            log.debug(
                "kvcache: slab: closed while views are in use; the last view frees the memory"
            )

    def _close_fd(self) -> None:
        fd, self._fd = (
            self._fd,
            None,
        )  # cleared first: a fork in between must not close a reused number
        if fd is not None:
            os.close(fd)


def _memfd(name: str, nbytes: int) -> int:
    """Create an anonymous file of ``nbytes``, of huge pages if enough are reserved and free."""
    pages = -(-nbytes // HUGE_PAGE)
    if FREE_HUGE_PAGES.exists() and int(FREE_HUGE_PAGES.read_text()) >= pages:
        # Fails if another process takes the pages first, and on kernels before 4.16, which cannot
        # seal files of huge pages.
        with suppress(OSError):
            return _sealed(name, pages * HUGE_PAGE, os.MFD_HUGETLB | _MFD_HUGE_2MB)
    return _sealed(name, nbytes)


def _sealed(name: str, nbytes: int, flags: int = 0) -> int:
    """Create an anonymous file that cannot be resized."""
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
