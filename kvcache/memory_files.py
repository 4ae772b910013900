"""Files in memory (``memfd``), and their mapping next to each other in one range of addresses.

Invariants:

* A file keeps its size: the kernel lets no process truncate it, which would end every process that
  has it mapped with SIGBUS.
* The huge pages of a file are reserved for it when it is created: no other process can take them,
  and the first access finds them.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress

from kvcache.huge_pages import HUGE_PAGE

PAGE = mmap.PAGESIZE
_MFD_HUGE_2MB = 21 << 26
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_PROT_NONE, _READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000

_libc = ctypes.CDLL(None, use_errno=True)  # its calls release the GIL
_libc.madvise.argtypes = _libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
)  # fmt: skip
_libc.mmap.restype = ctypes.c_void_p


def create_file(name: str, nbytes: int, *, huge: bool = False) -> int:
    """Create a file that cannot be resized.

    Args:
        name: for ``/proc``.
        nbytes: of a file of huge pages, a whole number of them.
        huge: whether to use huge pages.

    Raises:
        OSError: if the kernel refuses it, or has not enough huge pages.
    """
    flags = os.MFD_HUGETLB | _MFD_HUGE_2MB if huge else 0
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    try:
        os.ftruncate(fd, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        if huge:  # the kernel reserves pages for the first mapping, and keeps them for the file
            mmap.mmap(fd, nbytes).close()
    except OSError:
        os.close(fd)
        raise
    return fd


class MappedFiles:
    """Files that are mapped one after another.

    Args:
        files: the descriptor of each file and how many of its bytes to map. Those of huge pages
            come first.

    Attributes:
        address: of the first byte.
        nbytes: of all files.
        view: all bytes, writable. Slices of it keep the memory mapped after `close`.

    Raises:
        OSError, ValueError: if the kernel refuses a mapping.
    """

    def __init__(self, files: Sequence[tuple[int, int]]) -> None:
        self.nbytes = sum(nbytes for _, nbytes in files)
        begin = 0
        if len(files) == 1:
            self._map = mmap.mmap(files[0][0], self.nbytes)
        else:
            # A range of addresses in which huge pages can begin. Nothing is allocated for it: the
            # files replace it. Python's object unmaps them with it.
            self._map = mmap.mmap(
                -1,
                self.nbytes + HUGE_PAGE,
                mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE,
            )
            begin = -_address(self._map) % HUGE_PAGE
            try:
                self._replace(_address(self._map) + begin, files)
            except OSError:
                self._map.close()
                raise
        self.address = _address(self._map) + begin
        self.view = memoryview(self._map)[begin : begin + self.nbytes]
        self._accessible = self.nbytes
        offset = 0
        for fd, nbytes in files:
            if not is_huge(fd):  # a request; the kernel may ignore it
                _libc.madvise(self.address + offset, nbytes, mmap.MADV_HUGEPAGE)
            offset += nbytes

    @staticmethod
    def _replace(address: int, files: Sequence[tuple[int, int]]) -> None:
        """Map ``files`` from ``address`` on; the new mappings replace those that are there."""
        for fd, nbytes in files:
            flags = mmap.MAP_SHARED | _MAP_FIXED
            if _libc.mmap(address, nbytes, _READ_WRITE, flags, fd, 0) != address:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code))
            address += nbytes

    def advise(self, begin: int, nbytes: int, advice: int) -> int:
        """Call ``madvise`` for these bytes; return 0 or an errno."""
        failed = _libc.madvise(self.address + begin, nbytes, advice)
        return ctypes.get_errno() if failed else 0

    def forbid_access(self) -> None:
        """Make the memory inaccessible to this process; a no-op after `close`."""
        _libc.mprotect(self.address, self._accessible, _PROT_NONE)

    def close(self) -> bool:
        """Unmap the files. Return false if views are in use: the last one unmaps them."""
        accessible, self._accessible = self._accessible, 0
        with suppress(BufferError):
            self.view.release()
            self._map.close()
            return True
        self._accessible = accessible
        return False


def is_huge(fd: int) -> bool:
    """Whether the file's pages are huge."""
    return os.fstat(fd).st_blksize == HUGE_PAGE


def _address(mapped: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapped))
