"""A tier that keeps each block in another tier as a frame (``format.py``).

Invariants:

* A load returns the bytes that were stored under the key, or a miss. A rejected frame is a miss, is
  counted by reason, and is removed from the inner tier.
* Memory is bounded: a call works in batches of ``call_nbytes``, and at most
  ``MAX_CONCURRENT_CALLS`` calls have a workspace.
* The memory of a caller is touched only in ``Workspace.pack`` and ``Workspace.unpack``, once for
  each block. The memory of the inner tier is not touched after ``close``.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, Literal

from kvcache import telemetry
from kvcache.guards.calls import TierError, result_of
from kvcache.keys import Branch, branches_of, parents_of
from kvcache.process import bind_to_process
from kvcache.reasons import ReasonCounter
from kvcache.stats import usage_of
from kvcache.tier import Tier, TierUsage

from .format import BorrowedWorkspace, RejectedError, Workspace, frame_nbytes, zstandard
from .memory import allocate_in_tier

log = logging.getLogger(__name__)

MAX_CONCURRENT_CALLS: Final = 4
"""Calls that pack or unpack at the same time; further calls wait."""


@dataclass(slots=True)
class FrameStats:
    """Counts of stored and loaded blocks since the tier was opened.

    ``rejected`` counts blocks by reason: ``length`` (cut or extended), ``magic``, ``version``,
    ``header`` (fields that no version writes), ``size`` (larger than the buffer), ``padding`` (not
    zeros), ``codec`` (zstd, and the package is not installed), ``decompression``, ``checksum``.
    """

    verified_blocks: int = 0
    stored_raw_blocks: int = 0
    stored_compressed_blocks: int = 0
    stored_raw_nbytes: int = 0  # raw bytes of the blocks that the inner tier stored
    stored_frame_nbytes: int = 0  # bytes of these blocks' frames
    loaded_raw_nbytes: int = 0  # raw bytes of the loaded blocks that verified
    loaded_frame_nbytes: int = 0  # bytes of these blocks' frames
    rejected: Counter[str] = field(default_factory=Counter)


class Framed(Tier):
    """Frames around the blocks of another tier.

    Args:
        inner: the tier that keeps the frames; it is closed with this tier. It must take blocks of
            any length up to ``frame_nbytes(block_nbytes)``. With ``codec="none"`` and blocks of one
            size, all frames have one size.
        block_nbytes: bytes of the largest block.
        codec: ``"zstd"`` compresses the highest byte of every element, which holds the sign and
            most of the exponent; the other bytes are close to noise and stay as they are. A block
            with a frame that would not shrink by a tenth is kept raw.
        level: zstd's level, 1 to 22. Level 1 is the fastest, and compresses KV cache best.
        element_nbytes: bytes of a little-endian element: 2 for bf16 and fp16, 1 for fp8.

    Raises:
        ValueError: ``block_nbytes``, ``level`` or ``element_nbytes`` is out of range.
        ImportError: ``codec`` is ``"zstd"`` and the package ``zstandard`` is not installed.
    """

    def __init__(
        self,
        inner: Tier,
        *,
        block_nbytes: int,
        codec: Literal["none", "zstd"] = "none",
        level: int = 1,
        element_nbytes: int = 2,
    ) -> None:
        if block_nbytes < 1:
            raise ValueError(f"block_nbytes is {block_nbytes}; a block has at least one byte")
        if not 1 <= level <= 22:
            raise ValueError(f"level is {level}; zstd takes 1 to 22")
        if not 1 <= element_nbytes <= 16:
            raise ValueError(f"element_nbytes is {element_nbytes}; it can be 1 to 16")
        if codec == "zstd" and zstandard() is None:
            raise ImportError("codec = \"zstd\" needs zstandard: pip install 'kvcache[zstd]'")
        self.block_nbytes = block_nbytes
        self.inner = inner
        self.call_nbytes = inner.call_nbytes
        self.codec = codec
        self._level = level if codec == "zstd" else None
        self._element_nbytes = element_nbytes
        # A workspace is created when it is first needed; None stands for one not created yet.
        self._workspaces: queue.LifoQueue[Workspace | None] = queue.LifoQueue()
        for _ in range(MAX_CONCURRENT_CALLS):
            self._workspaces.put(None)
        self._borrowed: list[BorrowedWorkspace] = []
        self._closed = False
        self._no_memory_logged = False
        self._lock = threading.Lock()
        self._stats = FrameStats()
        self._declined = ReasonCounter()
        bind_to_process(self)

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return self.inner.contains(keys)

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        """As the contract says; a frame that does not verify is a miss, and is removed.

        A frame that needs ``zstandard`` where it is not installed is a miss too, but stays: it need
        not be damaged, and other engines that share the inner tier can read it.
        """
        telemetry.current_span().set_attribute(telemetry.CODEC, self.codec)
        pairs = list(zip(keys, into, strict=True))
        written: list[int] = []
        with self._workspace() as workspace:
            for first in range(0, len(pairs), len(workspace.frames)):
                batch = pairs[first : first + len(workspace.frames)]
                lengths = self.inner.load([key for key, _ in batch], workspace.frames[: len(batch)])
                rejected: list[bytes] = []
                for slot, ((key, buffer), length) in enumerate(zip(batch, lengths, strict=True)):
                    written.append(0)
                    if length == 0:
                        continue
                    try:
                        written[-1] = workspace.unpack(slot, length, key, buffer)
                    except RejectedError as error:
                        self._count_rejected(str(error))
                        if str(error) != "codec":
                            rejected.append(key)
                    else:
                        self._count_verified(written[-1], length)
                if rejected:
                    with suppress(TierError):  # the other blocks of this call verified
                        result_of(partial(self.inner.remove, list(dict.fromkeys(rejected))))
        return written

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        """As the contract says; an empty block is declined: loading it would look like a miss.

        Raises:
            ValueError: a block has more than ``block_nbytes`` bytes.
        """
        return self.store_branches([(keys, parent)], blocks)

    def store_branches(
        self, branches: Sequence[Branch], blocks: Sequence[memoryview]
    ) -> list[bool]:
        keys, parents = [key for branch, _ in branches for key in branch], parents_of(branches)
        telemetry.current_span().set_attribute(telemetry.CODEC, self.codec)
        to_store: list[int] = []
        for at, (_, block) in enumerate(zip(keys, blocks, strict=True)):
            if len(block) > self.block_nbytes:
                raise ValueError(
                    f"a block of {len(block)} bytes; the frames here hold {self.block_nbytes}"
                )
            if len(block):
                to_store.append(at)
            elif self._declined.add("empty"):
                log.warning("kvcache: frames: a block is empty; such blocks are declined")
        stored = [False] * len(keys)
        with self._workspace() as workspace:
            for first in range(0, len(to_store), len(workspace.frames)):
                batch = to_store[first : first + len(workspace.frames)]
                frames = [
                    workspace.pack(slot, keys[at], blocks[at]) for slot, at in enumerate(batch)
                ]
                found = branches_of([keys[at] for at in batch], [parents[at] for at in batch])
                if len(found) == 1:
                    answers = self.inner.store(found[0][0], frames, found[0][1])
                else:
                    answers = self.inner.store_branches(found, frames)
                for slot, (at, accepted) in enumerate(zip(batch, answers, strict=True)):
                    stored[at] = accepted
                    if accepted:
                        sizes = len(blocks[at]), len(frames[slot])
                        self._count_stored(*sizes, compressed=workspace.compressed[slot])
        return stored

    def remove(self, keys: Sequence[bytes]) -> None:
        self.inner.remove(keys)

    def resolve(self, namespace: bytes, about: str) -> bytes:
        return self.inner.resolve(namespace, about)

    def forget(self, namespace: bytes) -> None:
        self.inner.forget(namespace)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            borrowed = list(self._borrowed)
        for workspace in borrowed:
            workspace.close()
        self.inner.close()

    def usage(self) -> TierUsage:
        inner, rejected = usage_of(self.inner), self.stats().rejected
        return replace(
            inner,
            rejected_blocks=rejected + Counter(inner.rejected_blocks),
            declined_blocks=Counter(self._declined.counts()) + Counter(inner.declined_blocks),
        )

    def stats(self) -> FrameStats:
        """The counts at this moment."""
        with self._lock:
            return replace(self._stats, rejected=Counter(self._stats.rejected))

    @contextmanager
    def _workspace(self) -> Iterator[Workspace]:
        """Lend a workspace to this call alone; wait while all are in use."""
        workspace = kept = self._workspaces.get()
        try:
            if workspace is None:
                workspace, kept = self._create_workspace()
            yield workspace
        finally:
            self._workspaces.put(kept)

    def _create_workspace(self) -> tuple[Workspace, Workspace | None]:
        """Return a workspace, and the workspace to keep.

        If the inner tier fails to give memory, which it has or ``None``, the workspace is for one
        call. The next call asks again: a tier without a connection has no memory yet.
        """
        # As many frames as the inner tier prefers in one call. With fewer, a disk would overlap
        # fewer reads, and a last batch of one block would be read alone.
        frames = max(1, self.call_nbytes // self.block_nbytes)
        sizes = frames, self.block_nbytes, self._level, self._element_nbytes
        nbytes = frames * frame_nbytes(self.block_nbytes)
        try:
            memory = None if self._closed else allocate_in_tier(self.inner, nbytes)
        except TierError as failure:
            self._log_no_memory(failure)
            return Workspace(*sizes), None
        if memory is None:
            workspace = Workspace(*sizes)
            return workspace, workspace
        borrowed = BorrowedWorkspace(*sizes, memory)
        with self._lock:
            self._borrowed.append(borrowed)
            closed = self._closed
        if closed:
            borrowed.close()
        return borrowed, borrowed

    def _log_no_memory(self, failure: TierError) -> None:
        with self._lock:
            is_first, self._no_memory_logged = not self._no_memory_logged, True
        if is_first:
            log.warning(
                "kvcache: frames: no memory of the tier (%s); blocks are copied once more until it "
                "gives some",
                failure,
            )

    def _count_verified(self, raw_nbytes: int, nbytes: int) -> None:
        with self._lock:
            self._stats.verified_blocks += 1
            self._stats.loaded_raw_nbytes += raw_nbytes
            self._stats.loaded_frame_nbytes += nbytes

    def _count_rejected(self, reason: str) -> None:
        span = telemetry.current_span()
        if span.is_recording():
            span.add_event(telemetry.FRAME_REJECTED, {telemetry.REASON: reason})
        with self._lock:
            self._stats.rejected[reason] += 1
            is_first = reason == "codec" and self._stats.rejected[reason] == 1
        if is_first:
            log.warning(
                "kvcache: frames: zstandard is not installed (pip install 'kvcache[zstd]'); blocks "
                "written with codec zstd count as misses"
            )

    def _count_stored(self, raw_nbytes: int, nbytes: int, *, compressed: bool) -> None:
        with self._lock:
            self._stats.stored_compressed_blocks += compressed
            self._stats.stored_raw_blocks += not compressed
            self._stats.stored_raw_nbytes += raw_nbytes
            self._stats.stored_frame_nbytes += nbytes
