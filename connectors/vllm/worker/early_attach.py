"""Attaches L1 in a worker before the first request, and pins it in the background.

Invariants:

1. The engine's thread never waits for memory to be allocated, mapped or pinned.
2. L1 is attached once: by the announcement of the scheduler's process, or by the first copy if no
   announcement has arrived (`attach`). An announcement never detaches a slab, because copies may
   use it.
3. Memory is pinned only once it is allocated, and unpinned before it is unmapped.
4. A failure costs speed only: the first copy attaches a slab that is not attached early, and memory
   that is not pinned is copied unpinned.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from contextlib import suppress
from typing import Final

from kvcache import numa
from kvcache.connectors.transfer.pinning import SlabPinning
from kvcache.connectors.transfer.streams import Device
from kvcache.connectors.vllm.attach_pipes import (
    Announcement,
    AttachPipes,
    AttachProgress,
    PipeEnd,
)
from kvcache.process import bind_to_process
from kvcache.slab import Slab, SlabDescriptor
from kvcache.thread_cpus import process_cpus, use_cpus

log = logging.getLogger(__name__)

_PROGRESS_EVERY_S: Final = 1.0


class EarlyAttach:
    """The slab of one worker, and the pipes by which the scheduler's process announces it.

    Args:
        device: for which the slab is pinned; ``None`` for a CPU, which needs no pinned memory.

    Attributes:
        pipes: for the worker's `Shard`.
        nodes: the NUMA nodes from which this rank copies fastest; none if that makes no difference.
    """

    def __init__(self, device: Device | None) -> None:
        self._device = device
        if device is None:
            self.nodes = numa.nodes_of_cpus(os.sched_getaffinity(0))
        else:
            self.nodes = numa.nodes_of_pci(device.pci_address)
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._pauses = True  # between extents, so that other work of the device gets its turn
        self._slab: Slab | None = None
        self._pinning: SlabPinning | None = None
        self._populating: threading.Thread | None = None
        announced, announcement = os.pipe2(os.O_CLOEXEC)
        progress, self._progress_fd = os.pipe2(os.O_CLOEXEC)
        for fd in (announcement, self._progress_fd):
            os.set_blocking(fd, False)
        # An end that the scheduler's process opens by its path stays open here. So that process can
        # read the last progress after this one has closed the other end.
        self._fds = [announcement, announced, progress]
        self.pipes = AttachPipes(PipeEnd.of(announcement), PipeEnd.of(progress))
        self._thread = threading.Thread(
            target=self._await_announcement, args=(announced,), name="kvcache-attach", daemon=True
        )
        bind_to_process(self)
        self._thread.start()

    def _release_in_child(self) -> None:
        self._close_pipes()

    def attach(self, descriptor: SlabDescriptor, *, announced: bool = False) -> Slab:
        """Return the slab, attached now if it is not yet; it is mapped and pinned in background.

        Args:
            descriptor: the slab's. No copy may use another one.
            announced: whether another slab stays attached, if there is one.

        Raises:
            SlabError: if it cannot be attached.
            RuntimeError: after `close`.
        """
        with self._lock:
            if self._closed.is_set():
                raise RuntimeError("this worker's side of the connector is closed")
            if self._slab is not None and self._slab.descriptor != descriptor:
                if announced:
                    raise RuntimeError("the announced slab is not the one of an earlier copy")
                log.warning(
                    "kvcache: worker: L1 is another slab than the announced one; attaching it"
                )
                self._detach()
            if self._slab is None:
                slab = self._slab = Slab.attach(descriptor)
                pinning = None
                if self._device is not None:
                    pinning = self._pinning = SlabPinning(
                        self._device,
                        address=slab.address,
                        slots=slab.slots,
                        slot_nbytes=slab.slot_nbytes,
                        pause=self._pause,
                    )
                self._populating = threading.Thread(
                    target=self._populate, args=(slab, pinning), name="kvcache-pin", daemon=True
                )
                self._populating.start()
            return self._slab

    def _await_announcement(self, announced: int) -> None:
        line = os.read(announced, select.PIPE_BUF)
        if self._closed.is_set():
            return
        try:
            announcement = Announcement.of(line)
            self._pauses = not announcement.wait
            self.attach(announcement.slab, announced=True)
        except Exception as error:  # noqa: BLE001 - the first copy attaches L1, or reports why not
            if not self._closed.is_set():
                log.warning(
                    "kvcache: worker: early attach failed (%s); the first copy attaches L1", error
                )
            with self._lock:
                if self._populating is None:  # else that thread may write to the pipe
                    self._end_progress()

    def _populate(self, slab: Slab, pinning: SlabPinning | None) -> None:
        """Map all of ``slab`` and pin it."""
        use_cpus(process_cpus())  # not only that of the engine's thread, which may have made this
        reported = 0.0

        def ready(slots: int, *, last: bool = False) -> None:
            nonlocal reported
            if pinning is not None:
                pinning.pin_slots(slots)
            now = time.monotonic()
            if last or now - reported >= _PROGRESS_EVERY_S:
                reported = now
                pinned = pinning.pinned_nbytes if pinning is not None else None
                self._report(AttachProgress(slots * slab.slot_nbytes, pinned))

        try:
            slab.populate(ready)
            ready(slab.wait_populated(), last=True)
        finally:
            self._end_progress()

    def _pause(self, seconds: float) -> None:
        """Let the driver's lock rest as long as it was held.

        When several ranks pin at the same time, `seconds` includes their turns, so that all ranks
        together hold the lock for about half of the time.
        """
        if self._pauses:
            self._closed.wait(seconds)

    def _report(self, progress: AttachProgress) -> None:
        if self._progress_fd >= 0:
            with suppress(BlockingIOError):  # full, because no process reads it
                os.write(self._progress_fd, progress.to_line())

    def _end_progress(self) -> None:
        """Close the pipe for writing, which ends the wait of the scheduler's process."""
        fd, self._progress_fd = self._progress_fd, -1
        if fd >= 0:
            os.close(fd)

    def close(self) -> None:
        """Unpin and detach the slab. No copy may be in flight. Closing twice is allowed."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            self._detach()
        with suppress(BlockingIOError):  # full, so the thread has a line to read
            os.write(self._fds[0], b"\n")
        self._thread.join()
        self._close_pipes()

    def _detach(self) -> None:
        if self._slab is not None and self._populating is not None:
            self._slab.stop_populating()
            self._populating.join()
            if self._pinning is not None:
                self._pinning.close()
            self._slab.close()
        self._slab = self._pinning = self._populating = None

    def _close_pipes(self) -> None:
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)
        self._end_progress()
