"""The memory that Mooncake's library transfers from and to, in each of the tier's three modes.

=============  =========================================  ==================================
mode           the library transfers                      ``allocate``
=============  =========================================  ==================================
TCP            any memory                                 ``None``: nothing would be saved
RDMA           memory that was registered with the        memory of this process, registered
               network card                               once
host's daemon  memory that it shares with the daemon      memory that is shared with it
=============  =========================================  ==================================

Invariants:

* Memory of a caller that the library cannot transfer is copied through memory that it can.
* Memory that was given to the library stays mapped as long as the tier exists: a transfer that the
  library gave up may still write there.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Final

from kvcache.tiers.mooncake.client import PoolClient, probe
from kvcache.tiers.mooncake.library import RPC_FAILED, describe_code

PAGE: Final = 4096
_MIN_STAGING_NBYTES: Final = 4 << 20
UNREAD_REQUEST_S: Final = 1.0
"""How long a daemon that answers again may take to read a request that was sent before."""


class _PyBuffer(ctypes.Structure):
    """``Py_buffer`` of CPython's stable ABI."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def address_of(view: memoryview) -> int:
    """Return the address of contiguous memory, which may be read-only.

    Raises:
        BufferError: the memory is not contiguous.
    """
    buffer = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(buffer), 0)
    try:
        return buffer.buf or 0
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))


class TransferMemory(ABC):
    """Finds or makes memory that the library can transfer."""

    @abstractmethod
    def attach(self, client: PoolClient) -> None:
        """Prepare a new client of the library; raise ConnectionError if it refuses the memory."""

    @abstractmethod
    def allocate(self, client: PoolClient, nbytes: int) -> memoryview | None:
        """Return memory as :meth:`kvcache.tier.Tier.allocate` does."""

    @abstractmethod
    def lend(
        self, client: PoolClient, views: Sequence[memoryview]
    ) -> AbstractContextManager[Sequence[memoryview]]:
        """Lend, for each of ``views``, memory of its size that the library can transfer.

        It is the view itself if the library can transfer that.
        """

    @abstractmethod
    def wait_quiet(self, client: PoolClient, views: Sequence[memoryview]) -> None:
        """Return once no server writes to ``views``, after a load of them that had no answer."""

    @abstractmethod
    def forget_lost(self, views: Sequence[memoryview]) -> bool:
        """Return whether the library refused ``views`` because a server lost them.

        They are then copied from now on, as memory that the library cannot transfer.
        """


class AnyMemory(TransferMemory):
    """Over TCP: the library copies between its sockets and any memory."""

    def attach(self, client: PoolClient) -> None:
        pass

    def allocate(self, client: PoolClient, nbytes: int) -> memoryview | None:
        return None

    @contextmanager
    def lend(
        self, client: PoolClient, views: Sequence[memoryview]
    ) -> Iterator[Sequence[memoryview]]:
        yield views

    def wait_quiet(self, client: PoolClient, views: Sequence[memoryview]) -> None:
        """Return at once: the client itself reads its sockets, and stops before a call returns."""

    def forget_lost(self, views: Sequence[memoryview]) -> bool:
        return False


@dataclass(slots=True, eq=False)
class Region:
    """Memory that the library can transfer.

    Attributes:
        view: the memory.
        start: its address.
        registered: whether the current client has registered it.
        lost: whether it can never be registered again.
    """

    view: memoryview
    start: int
    registered: bool
    lost: bool = False

    def covers(self, start: int, nbytes: int) -> bool:
        """Whether so many bytes from ``start`` are in this region."""
        return self.start <= start and start + nbytes <= self.start + len(self.view)


class RegisteredMemory(TransferMemory):
    """Memory of this process, registered with the network card once for each client."""

    def __init__(self) -> None:
        self._regions: list[Region] = []  # only added to, so that it can be read without the lock
        self._unregistered: list[Region] = []  # mapped, and refused by the library until now
        self._lock = threading.Lock()  # held while a region is added or registered
        self._staging_lock = threading.Lock()  # held while the staging memory is in use
        self._staging = memoryview(b"")

    def attach(self, client: PoolClient) -> None:
        with self._lock:
            for region in self._regions:
                region.registered = False
                self._register(client, region)

    def allocate(self, client: PoolClient, nbytes: int) -> memoryview:
        """Return memory that is registered with ``client``.

        Raises:
            ConnectionError: the library refuses it.
            MemoryError, OSError: there is none.
        """
        with self._lock:
            spare = [each for each in self._unregistered if len(each.view) >= nbytes]
            if spare:
                region = spare[0]
            else:
                view = self._map(client, max(nbytes, PAGE))
                region = Region(view, address_of(view), registered=False)
                self._unregistered.append(region)  # for the next call, if this one fails
            self._register(client, region)
            self._unregistered.remove(region)
            self._regions.append(region)
        return region.view[:nbytes]

    @contextmanager
    def lend(
        self, client: PoolClient, views: Sequence[memoryview]
    ) -> Iterator[Sequence[memoryview]]:
        if None not in [self._region_of(view) for view in views]:
            self._register_again(client, views)
            yield views
            return
        starts = [0]
        for view in views:
            starts.append(starts[-1] + -(-len(view) // PAGE) * PAGE)
        with self._staging_lock:
            if len(self._staging) < starts[-1] or not self._region_of(self._staging):
                self._staging = self.allocate(client, max(_MIN_STAGING_NBYTES, 2 * starts[-1]))
            staged = [
                self._staging[start : start + len(view)]
                for start, view in zip(starts, views, strict=False)
            ]
            self._register_again(client, staged)
            yield staged

    def wait_quiet(self, client: PoolClient, views: Sequence[memoryview]) -> None:
        """Return at once: a transfer that the library reports as failed has ended."""

    def forget_lost(self, views: Sequence[memoryview]) -> bool:
        return False

    def _map(self, client: PoolClient, nbytes: int) -> memoryview:
        """Map zeroed memory; a forked child does not get it, as it could not be transferred."""
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTFORK):
            with suppress(OSError):
                memory.madvise(advice)
        return memoryview(memory)

    def _register(self, client: PoolClient, region: Region) -> None:
        if region.registered:
            return
        code = client.call("register_buffer", region.start, len(region.view))
        if code:
            raise ConnectionError(f"Mooncake cannot register memory ({describe_code(code)})")
        region.registered = True

    def _register_again(self, client: PoolClient, views: Sequence[memoryview]) -> None:
        """Register the memory of ``views`` that was unregistered."""
        for region in self._regions_of(views):
            if not region.registered:
                with self._lock:
                    self._register(client, region)

    def _regions_of(self, views: Sequence[memoryview]) -> list[Region]:
        found = [self._region_of(view) for view in views]
        return list({id(region): region for region in found if region}.values())

    def _region_of(self, view: memoryview) -> Region | None:
        start = address_of(view)
        return next(
            (each for each in self._regions if each.covers(start, len(view)) and not each.lost),
            None,
        )


class DaemonMemory(RegisteredMemory):
    """Memory that this process shares with the host's daemon, which copies from and to it.

    Args:
        address: the daemon's host and port.
        timeout_s: after how long a daemon that does not answer is taken for one that hangs.
        unread_request_s: how long a daemon that answers again may take to read an older request.
    """

    def __init__(
        self,
        address: tuple[str, int],
        timeout_s: float,
        unread_request_s: float = UNREAD_REQUEST_S,
    ) -> None:
        super().__init__()
        self._address = address
        self._timeout_s = timeout_s
        self._unread_request_s = unread_request_s

    def wait_quiet(self, client: PoolClient, views: Sequence[memoryview]) -> None:
        """Return once the daemon no longer has the memory, or has ended.

        A daemon that hung during a call executes it when it continues, however late. It is asked to
        unmap the memory, which it does after the calls that it executes, and the memory is
        registered again later, after requests that it had not read.
        """
        for region in self._regions_of(views):
            with self._lock:
                if not region.registered:
                    continue
                while client.call("unregister_buffer", region.start) in RPC_FAILED:
                    if not self._daemon_runs():
                        break
                    time.sleep(self._unread_request_s)
                region.registered = False
                time.sleep(self._unread_request_s)

    def forget_lost(self, views: Sequence[memoryview]) -> bool:
        """As the base class says: a daemon that was restarted has none of the memory.

        The library notices a restart only if the daemon was away for a second. It never registers
        the same memory with the new daemon otherwise.
        """
        lost = self._regions_of(views)
        for region in lost:
            region.lost = True
        return bool(lost)

    def _daemon_runs(self) -> bool:
        """Whether a process has the daemon's port; it need not answer."""
        try:
            probe(self._address, self._timeout_s)
        except TimeoutError:
            return True
        except OSError:
            return False
        return True

    def _map(self, client: PoolClient, nbytes: int) -> memoryview:
        address = client.call("alloc_from_mem_pool", nbytes)
        if not address:
            raise MemoryError(f"Mooncake cannot map {nbytes} bytes of shared memory")
        return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")
