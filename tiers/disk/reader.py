"""Reads the directory of a disk tier, also while an engine has it open.

Invariants:

* Nothing is written, created or locked, and no space is taken from the tier.
* A block is returned only if its record did not change while the block was read. The tier clears a
  record before it writes to the slot, so such a block is whole.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvcache.process import bind_to_process
from kvcache.tier import Tier
from kvcache.tiers.disk import namespace_file
from kvcache.tiers.disk.record_file import PAGE, Record, read_geometry, read_record
from kvcache.tiers.disk.record_scan import read_columns
from kvcache.tiers.disk.safe_open import open_directory, open_file


class DiskReader(Tier):
    """A read-only tier with the blocks that a directory had when this was opened.

    Args:
        path: the directory.

    Attributes:
        geometry: bytes of a slot, and the number of slots.

    Raises:
        ValueError: the directory has no disk tier of this version, or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._fds: list[int] = []
        try:
            self._path = path
            self._folder_fd = open_directory(path.absolute(), make=False)
            self._fds.append(self._folder_fd)
            self._records_fd = self._open("records")
            self._blocks_fd = self._open("blocks", os.O_DIRECT)
            geometry = read_geometry(self._records_fd)
            blocks_nbytes = os.fstat(self._blocks_fd).st_size
            if geometry is None or geometry.slot_nbytes not in range(PAGE, blocks_nbytes + 1, PAGE):
                raise ValueError(f"{str(path)!r} has no disk tier that this version can read")
            self.geometry = geometry
            records = read_columns(self._records_fd, geometry)
            records.select(records.by_age())
            self._records = records
            self._positions = {key: at for at, key in enumerate(records.keys)}
            self._buffer = mmap.mmap(-1, geometry.slot_nbytes)
        except (OSError, OverflowError) as error:  # Overflow: a slot larger than memory
            self.close()
            raise ValueError(f"cannot read a disk tier at {str(path)!r}: {error}") from error
        except ValueError:
            self.close()
            raise
        bind_to_process(self)

    def _open(self, name: str, flags: int = 0) -> int:
        """Open a file to read; without ``flags`` if the file system does not support them.

        The tier's own writes bypass the page cache, so reads should too (``O_DIRECT``).
        """
        try:
            fd = open_file(self._folder_fd, name, self._path, os.O_RDONLY | flags)
        except OSError as error:
            if not flags or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            fd = open_file(self._folder_fd, name, self._path, os.O_RDONLY)
        self._fds.append(fd)
        return fd

    def __iter__(self) -> Iterator[Record]:
        """The records, oldest first; of two with the same key, the newer one."""
        return map(self._records.record, self._positions.values())

    def __len__(self) -> int:
        return len(self._positions)

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return [key in self._positions for key in keys]

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        return [self._load(key, buffer) for key, buffer in zip(keys, into, strict=True)]

    def _load(self, key: bytes, buffer: memoryview) -> int:
        if key not in self._positions:
            return 0
        record = self._records.record(self._positions[key])
        if record.nbytes > len(buffer):
            return 0
        pages = memoryview(self._buffer)[: -(-record.nbytes // PAGE) * PAGE]
        try:
            read_nbytes = os.preadv(
                self._blocks_fd, [pages], record.slot * self.geometry.slot_nbytes
            )
        except OSError:
            read_nbytes = 0
        if read_nbytes < record.nbytes or not self.is_unchanged(key):
            return 0
        buffer[: record.nbytes] = pages[: record.nbytes]
        return record.nbytes

    def descriptions(self) -> dict[str, str]:
        """The description of each namespace, by its hex; empty if they cannot be read."""
        try:
            return namespace_file.read(self._folder_fd, self._path)["about"]
        except (OSError, ValueError):
            return {}

    def is_unchanged(self, key: bytes) -> bool:
        """Whether the block is still in the slot that it had when this was opened."""
        record = self._records.record(self._positions[key])
        return read_record(self._records_fd, self.geometry, record.slot) == record

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        return [False] * len(keys)

    def remove(self, keys: Sequence[bytes]) -> None:
        """Do nothing: only the engine that has the tier open removes blocks."""

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())
