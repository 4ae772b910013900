"""Host memory in equal slots, shared between the process that owns it and those that attach to it.

The memory is an anonymous file (``memfd``), or two: the first one of huge pages, as many as are
free, the second one of ordinary pages. There is no ``/dev/shm`` to size, and a crash leaves nothing
behind. Other processes open a file by the owner's descriptor, ``/proc/<pid>/fd/<n>``.

Invariants:

* Slots have one size, a whole number of pages, and start on a page.
* The first use of a slot below ``populated`` costs no zeroing of pages: a background thread
  allocates the memory from the lowest slot up, and ``populated`` only grows.
* A descriptor that leads to other memory (another host, a reused pid) is refused, not mapped.
* A forked child has no access to the memory until it attaches.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kvcache import huge_pages, numa
from kvcache.huge_pages import HUGE_PAGE
from kvcache.memory_files import PAGE, MappedFiles, create_file
from kvcache.process import bind_to_process
from kvcache.thread_cpus import process_cpus, use_cpus

__all__ = ["PAGE", "Slab", "SlabDescriptor", "SlabError", "slot_nbytes_for"]

log = logging.getLogger(__name__)

MADV_POPULATE_WRITE = 23  # Linux 5.14
EXTENT_NBYTES = 64 << 20  # allocated at a time, in about 20 ms; ``close`` waits for one extent
_PROGRESS_EVERY_S = 5.0  # small slabs are allocated faster, and log nothing


class SlabError(RuntimeError):
    """The memory of a slab cannot be allocated or mapped by this process."""


@dataclass(frozen=True, slots=True)
class SlabDescriptor:
    """The data with which another process on this host attaches. Picklable; keeps no file open.

    Attributes:
        path: of the file; of the second one, if there are two.
        name: a part of the names of the files.
        slots: how many there are.
        slot_nbytes: bytes of a slot.
        huge_path: of the file of huge pages; "" if there is none.
        huge_nbytes: bytes of that file. Its last page may end after the last slot.
        nodes: NUMA nodes from which the memory comes; empty for no preference.
    """

    path: str
    name: str
    slots: int
    slot_nbytes: int
    huge_path: str = ""
    huge_nbytes: int = 0
    nodes: tuple[int, ...] = ()

    @property
    def files(self) -> list[tuple[str, int]]:
        """The path of each file, and how many of its bytes to map."""
        rest = self.slots * self.slot_nbytes - self.huge_nbytes
        huge = [(self.huge_path, self.huge_nbytes)] if self.huge_nbytes else []
        return [*huge, *([(self.path, rest)] if rest > 0 else [])]


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

    def __init__(self, fds: Sequence[int], descriptor: SlabDescriptor, *, owner: bool) -> None:
        self.descriptor = descriptor
        self.slots = descriptor.slots
        self.slot_nbytes = descriptor.slot_nbytes
        self.nbytes = self.slots * self.slot_nbytes
        self._owner = owner
        self._fds = list(fds)
        try:
            sizes = (nbytes for _, nbytes in descriptor.files)
            self._memory = MappedFiles([*zip(fds, sizes, strict=True)])
        except (OSError, ValueError):
            self._close_fds()
            raise
        if not owner:
            self._close_fds()
        self.address, self._view = self._memory.address, self._memory.view
        self._place()
        self.populated = 0
        self._allocated_nbytes = 0
        self._on_ready: Callable[[int], None] = lambda _: None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        bind_to_process(self)

    def _place(self) -> None:
        """Place the memory on the descriptor's nodes, before any of it is allocated."""
        if not (nodes := self.descriptor.nodes):
            return
        cause = numa.place(self.address, self._memory.nbytes, nodes)
        if not self._owner:
            return
        numbers = ", ".join(map(str, nodes))
        if cause:
            log.warning(
                "kvcache: slab: L1 not placed on NUMA node %s (%s); copies may cross nodes",
                numbers, cause,
            )  # fmt: skip
        else:
            log.info("kvcache: slab: L1 is placed on NUMA node %s", numbers)

    def _release_in_child(self) -> None:
        """Make the memory inaccessible in a forked child, and close the child's descriptors."""
        self._memory.forbid_access()
        self._close_fds()

    @classmethod
    def create(
        cls,
        slots: int,
        slot_nbytes: int,
        *,
        nodes: Sequence[int] = (),
        use_huge_pages: bool = True,
    ) -> Slab:
        """Create a slab. Its memory is allocated by :meth:`populate`.

        Args:
            slots: how many.
            slot_nbytes: bytes of a slot, a whole number of pages.
            nodes: NUMA nodes from which the memory comes while they have some; empty for no
                preference.
            use_huge_pages: whether to take free huge pages, as many as there are or the slab needs.

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
        pages = min(huge_pages.free(), -(-nbytes // HUGE_PAGE)) if use_huge_pages else 0
        while True:
            try:
                fds, descriptor = _create_files(name, slots, slot_nbytes, pages, tuple(nodes))
                return cls(fds, descriptor, owner=True)
            except OSError as error:
                if not pages:
                    raise SlabError(f"cannot make a slab of {nbytes} bytes: {error}") from error
                # Another process has taken some since, or the kernel is older than 4.16, which
                # cannot seal files of huge pages.
                pages = min(huge_pages.free(), pages // 2)

    @classmethod
    def attach(cls, descriptor: SlabDescriptor) -> Slab:
        """Map the slab that another process on this host owns.

        Raises:
            SlabError: if the descriptor leads to no memory, to other memory, or to less of it.
        """
        fds: list[int] = []
        try:
            _check_sizes(descriptor)
            for path, nbytes in descriptor.files:
                fds.append(_open_file(path, descriptor.name, nbytes))
        except SlabError:
            for fd in fds:
                os.close(fd)
            raise
        try:
            return cls(fds, descriptor, owner=False)
        except OSError as error:
            raise SlabError(f"cannot map the slab {descriptor.name}: {error}") from error

    def view(self, slot: int) -> memoryview:
        """A writable view of the slot's bytes."""
        if not 0 <= slot < self.slots:
            raise IndexError(f"slot {slot} of a slab that has {self.slots}")
        at = slot * self.slot_nbytes
        return self._view[at : at + self.slot_nbytes]

    def populate(self, on_ready: Callable[[int], None] = lambda _: None) -> None:
        """Allocate the memory: a first extent now, the rest in the background.

        ``on_ready(slots)`` is called after each extent, with the number of allocated slots.
        """
        self._on_ready = on_ready
        if not self._stop.is_set() and self._allocate_extent():
            self._thread = threading.Thread(
                target=self._allocate_rest, name="kvcache-populate", daemon=True
            )
            self._thread.start()

    def stop_populating(self) -> None:
        """Allocate no further extent. The one in progress is completed."""
        self._stop.set()

    def wait_populated(self) -> int:
        """Wait until the background thread ends; return how many slots are allocated."""
        if self._thread is not None:
            self._thread.join()
        return self.populated

    def _allocate_rest(self) -> None:
        use_cpus(process_cpus())  # not only that of the engine's thread, which may have made this
        begun = logged = time.monotonic()
        while self._allocate_extent() and not self._stop.is_set():
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

    def _allocate_extent(self) -> bool:
        """Allocate the next extent; return whether there is more to allocate."""
        begin = self._allocated_nbytes
        nbytes = min(max(EXTENT_NBYTES, self.slot_nbytes), self.nbytes - begin)
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
        while code := self._memory.advise(begin, nbytes, MADV_POPULATE_WRITE):
            if code == errno.EINVAL:  # the kernel is older than MADV_POPULATE_WRITE
                return self._allocate_in_files(begin, begin + nbytes)
            if code not in (errno.EINTR, errno.EAGAIN):
                return code
        return 0

    def _allocate_in_files(self, begin: int, end: int) -> int:
        """Allocate the pages of these bytes. The first access still maps them, without zeroing."""
        offset = 0
        for fd, (_, nbytes) in zip(self._fds, self.descriptor.files, strict=bool(self._fds)):
            first, last = max(begin - offset, 0), min(end - offset, nbytes)
            offset += nbytes
            if first < last:
                try:
                    os.posix_fallocate(fd, first, last - first)
                except OSError as error:
                    return error.errno or errno.ENOMEM
        return 0

    def close(self) -> None:
        """Unmap the memory and close the owner's descriptor. Views in use keep the memory alive."""
        self.stop_populating()
        self.wait_populated()
        self._close_fds()
        if not self._memory.close():
            log.debug(
                "kvcache: slab: closed while views are in use; the last view frees the memory"
            )

    def _close_fds(self) -> None:
        # Cleared first: a fork in between must not close a reused number.
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)


def _create_files(
    name: str, slots: int, slot_nbytes: int, pages: int, nodes: tuple[int, ...]
) -> tuple[list[int], SlabDescriptor]:
    """Create the files of a slab, of which the first ``pages`` huge pages are a file."""
    huge_nbytes = pages * HUGE_PAGE
    descriptor = SlabDescriptor("", name, slots, slot_nbytes, "", huge_nbytes, nodes)
    fds: list[int] = []
    try:
        for _, nbytes in descriptor.files:
            fds.append(create_file(name, nbytes, huge=bool(pages) and not fds))
    except OSError:
        for fd in fds:
            os.close(fd)
        raise
    paths = [f"/proc/{os.getpid()}/fd/{fd}" for fd in fds]
    huge_path = paths[0] if pages else ""
    return fds, replace(descriptor, path=paths[-1], huge_path=huge_path)


def _check_sizes(descriptor: SlabDescriptor) -> None:
    """Raise SlabError if no slab has this number and size of slots."""
    slots, slot_nbytes, huge = descriptor.slots, descriptor.slot_nbytes, descriptor.huge_nbytes
    whole = slots > 0 and slot_nbytes > 0 and not slot_nbytes % PAGE and not huge % HUGE_PAGE
    if not whole or not 0 <= huge < slots * slot_nbytes + HUGE_PAGE:
        raise SlabError(f"cannot attach {descriptor}: no slab has these sizes")


def _open_file(path: str, name: str, nbytes: int) -> int:
    """Open a file of the slab ``name``, of which ``nbytes`` bytes are mapped."""
    where = f"the slab {name} at {path}"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise SlabError(
            f"cannot attach {where}: {error.strerror}. Its owner must be running on this host, "
            "under the same user and in the same pid namespace"
        ) from error
    found = str(Path(f"/proc/self/fd/{fd}").readlink())
    if name not in found:
        os.close(fd)
        raise SlabError(
            f"cannot attach {where}: it is {found}. Its owner has ended, or is on another host"
        )
    # The first access to a page beyond the end of a file would end this process.
    if (size := os.fstat(fd).st_size) < nbytes:
        os.close(fd)
        raise SlabError(f"cannot attach {where}: it has {size} bytes, not {nbytes}")
    return fd
